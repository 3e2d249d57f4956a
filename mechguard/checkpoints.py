"""Checkpoints: the weights of a Hugging Face model, read from a folder or from the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from mechguard.errors import MechguardError, first_line
from mechguard.families import family_of, takes_images
from mechguard.processes import own_device


def read_model(
    source: str | Path,
    *,
    text_only: bool = False,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    **options: Any,
) -> Any:
    """Read the weights from a folder or the hub, in the class that answers text (and pictures).

    Raises:
        MechguardError: there is no such model, or its weights cannot be read.
    """
    from safetensors import SafetensorError

    config = _read_config(source, revision, options.get("trust_remote_code", False))
    loader = _loader(config, text_only)
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if device == "auto" and not on_cpu:
        device = own_device() or device  # of several processes each takes one accelerator
    if dtype == "auto" and on_cpu and getattr(config, "dtype", None) == torch.float16:
        dtype = torch.float32  # half precision on a CPU is slow and loses digits
    if attention := family_of(config).attention:
        options.setdefault("attn_implementation", attention)
    options.setdefault("use_safetensors", True)  # the other form is pickled
    options.setdefault("trust_remote_code", False)
    if not on_cpu:
        options.setdefault("device_map", device)
    try:
        hf_model = loader.from_pretrained(source, dtype=dtype, revision=revision, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise MechguardError(
            f"the weights of {os.fspath(source)!r} cannot be read ({first_line(error)})"
        ) from None
    return hf_model.eval()


def hollow_model(source: str | Path, *, revision: str | None = None) -> Any:
    """The same class without weights, to see its parts.

    Raises:
        MechguardError: there is no such model.
    """
    config = _read_config(source, revision, False)
    with torch.device("meta"):
        return _loader(config, False).from_config(config).eval()


def _loader(config: Any, text_only: bool) -> Any:
    """The class of transformers that answers text, and pictures if it can."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    answers_pictures = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or hasattr(config, "auto_map")
    is_vlm = not text_only and takes_images(config) and answers_pictures
    return AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM


def _read_config(source: str | Path, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if (Path(source) / "config.json").is_file():
            raise MechguardError(
                f"the configuration of {os.fspath(source)!r} cannot be read ({first_line(error)}); it wants "
                "an architecture that the installed transformers knows"
            ) from None
        raise MechguardError(
            f'no model {os.fspath(source)!r} was found: it is neither "organism" nor a folder with a '
            f"config.json nor a model that the hub gave ({first_line(error)}); check the name"
        ) from None
