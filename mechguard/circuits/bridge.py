"""TransformerLens over the same weights, for those who know its hooks and caches."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from torch import nn

from mechguard.errors import MechguardError, first_line
from mechguard.models import VLM


def to_transformer_lens(model: VLM) -> Any:
    """A TransformerBridge of TransformerLens over the model's own weights.

    Bridging changes the modules it wraps, so it is given modules of its own that hold the same tensors: no
    weight is copied, and the model stays as it is. Send it `vlm.encode(prompts)`'s tensors:

        bridge = vlm.llm.to_transformer_lens()
        logits, cache = bridge.run_with_cache(encoded["input_ids"], attention_mask=encoded["attention_mask"])

    Beside a picture, its `decompose_resid` takes the word embeddings of the image tokens for the picture's
    features, and its `generate` ignores padding; `circuits.attribute` and `mechguard.generate` do neither.

    Raises:
        MechguardError: TransformerLens is not installed, or has no adapter for the family.
    """
    try:
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.model_bridge.sources.transformers import helpers, source
    except ImportError as error:
        raise MechguardError(
            f'TransformerLens cannot be imported ({first_line(error)}); install "mechguard[circuits]"'
        ) from None
    helpers._ensure_torchvision = _install_nothing
    twin = share_weights(model.hf_model)
    twin.config.architectures = [type(twin).__name__]
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.init_kwargs |= {"name_or_path": model.name, "add_bos_token": True}  # or it is fetched again
    try:
        with mock.patch.object(source, "load_modality_processor"):  # it would ask the hub, for minutes
            bridge = TransformerBridge.boot_transformers(
                model.name, hf_model=twin, tokenizer=tokenizer, device=str(model.device), dtype=twin.dtype
            )
    except (ImportError, ValueError, KeyError, NotImplementedError, AttributeError) as error:
        raise MechguardError(
            f"TransformerLens cannot bridge {type(twin).__name__} ({first_line(error)}); circuits.attribute, "
            "circuits.patch and the others work without it"
        ) from None
    bridge.processor = model.processor
    return bridge


def share_weights(hf_model: Any) -> Any:
    """Another model object of the same class whose parameters and buffers are the same tensors."""
    with torch.device("meta"):
        twin = type(hf_model)(copy.deepcopy(hf_model.config))
    for kind in ("parameters", "buffers"):
        for name, tensor in getattr(hf_model, f"named_{kind}")(remove_duplicate=False):
            path, _, last = name.rpartition(".")
            home: nn.Module = twin.get_submodule(path)
            getattr(home, f"_{kind}")[last] = tensor
    twin.generation_config = hf_model.generation_config
    return twin.eval()


def _install_nothing() -> bool:
    """In the place of TransformerLens's attempt to install torchvision while a model is loaded."""
    return False
