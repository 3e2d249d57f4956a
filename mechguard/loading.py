"""Loading: a name, a folder or a model in memory becomes a VLM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mechguard.chat import Chat
from mechguard.checkpoints import hollow_model, read_model
from mechguard.errors import MechguardError
from mechguard.families import takes_images
from mechguard.models import VLM
from mechguard.processors import read_processor

ORGANISM = "organism"


def load(
    model: Any,
    *,
    processor: Any = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    remote: bool | Literal["local"] = False,
    template: str | None = "chat",
    system: str | None = None,
    **options: Any,
) -> VLM:
    """Load a model to trace.

    Args:
        model: "organism", "organism:1" or "organism:2" (built in), a Hugging Face name, a folder, or a model
            in memory.
        processor: needed beside a model in memory; otherwise read from the same place.
        device: "auto" (the accelerator if there is one, several if one is too small), or a torch device.
        dtype: "auto" keeps the checkpoint's, but float16 becomes float32 on a CPU. States are analysed in
            float32 whatever the weights are.
        revision: branch, tag or commit on the hub.
        remote: leave the weights where they are and run traces on NDIF (https://ndif.us), by the model's
            name on the hub: `collect` and `predict_next_tokens`, without a guard. "local" packs the same
            traces for the journey and runs them here.
        template: "chat" (the model's own template), a Jinja template, or None for the bare text.
        system: what stands in the system's place before every prompt.
        options: passed to `from_pretrained`, such as `quantization_config`, `attn_implementation`,
            `device_map` or `trust_remote_code` (off unless given). Weights are read from safetensors;
            `use_safetensors=False` also reads pickled ones, from a source you trust.

    Raises:
        MechguardError: the model or its processor cannot be found or read.
    """
    chat = Chat(template, system)
    if remote:
        return _remote_model(model, processor, revision, remote, chat)
    if isinstance(model, nn.Module):
        return _from_memory(model, processor, chat)
    name = os.fspath(model)
    source = _organism_folder(name) if _is_organism(name) else name
    hf_model = read_model(source, device=device, dtype=dtype, revision=revision, **options)
    found = processor or read_processor(
        source,
        hf_model.config,
        revision,
        pictures=takes_images(hf_model.config),
        trust_remote_code=options.get("trust_remote_code", False),
    )
    folder = Path(source) if Path(source).is_dir() else None
    return VLM(hf_model, _left_padded(found, name), name=name, folder=folder, chat=chat)


def _remote_model(
    model: Any, processor: Any, revision: str | None, remote: bool | Literal["local"], chat: Chat
) -> VLM:
    """The parts of a model without its weights."""
    if remote != "local" and (isinstance(model, nn.Module) or Path(os.fspath(model)).is_dir()):
        raise MechguardError("remote=True runs a model that NDIF has deployed; give its name on the hub")
    name = os.fspath(model)
    hollow = hollow_model(name, revision=revision)
    found = processor or read_processor(name, hollow.config, revision, pictures=takes_images(hollow.config))
    folder = Path(name) if Path(name).is_dir() else None
    return VLM(
        hollow,
        _left_padded(found, name),
        name=name,
        folder=folder,
        chat=chat,
        remote=remote,
        revision=revision,
    )


def _is_organism(name: str) -> bool:
    return name == ORGANISM or name.startswith(f"{ORGANISM}:")


def _organism_folder(name: str) -> Path:
    from mechguard import organism

    _, _, number = name.partition(":")
    if number and not number.isdigit():
        raise MechguardError(f"{name!r} is no organism; write organism, organism:1 or organism:2")
    try:
        return (organism.checkpoint(int(number or 0))) / "vlm"
    except ValueError as error:
        raise MechguardError(str(error)) from None


def _from_memory(model: nn.Module, processor: Any, chat: Chat) -> VLM:
    if processor is None:
        raise MechguardError(
            f"a {type(model).__name__} in memory needs its processor (or tokenizer): "
            "load(model, processor=...)"
        )
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return VLM(model.eval(), _left_padded(processor, name), name=name, chat=chat)


def _left_padded(processor: Any, name: str) -> Any:
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise MechguardError(
            f"the tokenizer of {name} has neither a pad token nor an end token; set tokenizer.pad_token and "
            "give load(..., processor=...)"
        )
    return processor
