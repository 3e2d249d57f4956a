"""Processors: what turns text and pictures into tensors, read from disk.

Half of the families have a processor for pictures and videos in one, and its video part needs torchvision,
which a machine without a GPU often lacks. Where it is missing, such a processor is read without its video
part; pictures go through the versions of the image processors that need Pillow alone.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from mechguard.errors import MechguardError, first_line

VIDEO = "video_processor"
READING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError)


def read_processor(
    source: str | Path,
    config: Any,
    revision: str | None,
    *,
    pictures: bool,
    trust_remote_code: bool = False,
) -> Any:
    """The processor (for a text-only model, the tokenizer) that lies beside a model.

    Args:
        source: a folder, or a name on the hub.
        config: the model's configuration.
        revision: branch, tag or commit on the hub.
        pictures: whether the model takes pictures.
        trust_remote_code: whether code that lies beside the model may be run.

    Raises:
        MechguardError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    noun = "processor" if pictures else "tokenizer"
    reader = _reader(config) if pictures else AutoTokenizer
    try:
        found = reader.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        if pictures and getattr(found, "image_processor", None) is None:
            raise ValueError("what was found there cannot read pictures")
    except READING_ERRORS as error:
        raise MechguardError(
            f"{os.fspath(source)!r} has a model but no readable {noun} ({first_line(error)}); save the "
            f"{noun} there with {noun}.save_pretrained, or give load(..., processor=...)"
        ) from None
    return found


def without_video(processor_class: Any) -> Any:
    """A processor class that reads text and pictures, and neither needs nor has a video part."""
    from transformers import ProcessorMixin

    names = list(processor_class.get_attributes())

    class PictureProcessor(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in names if name != VIDEO]

        @classmethod
        def _get_arguments_from_pretrained(cls, *place: Any, **options: Any) -> list[Any]:
            parts = super()._get_arguments_from_pretrained(*place, **options)
            found = dict(zip(cls.get_attributes(), parts, strict=True))
            return [found.get(name) for name in names]

        def apply_chat_template(self, *messages: Any, **options: Any) -> Any:
            # Some families ask their video part how many frames a video has, before they look for one.
            return ProcessorMixin.apply_chat_template(self, *messages, **options)

    PictureProcessor.__name__ = processor_class.__name__
    return PictureProcessor


def _reader(config: Any) -> Any:
    """Who reads the processor: transformers itself, or its class without the video part."""
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    found = None if is_torchvision_available() else processor_class(str(config.model_type))
    if found is not None and VIDEO in found.get_attributes():
        return without_video(found)
    return AutoProcessor


def processor_class(family: str) -> Any:
    """The processor class of a family, from its own module; None for a family that has none.

    transformers hides a class whose declared backends are missing, also where only its video part
    or nothing at all needs them.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(family)
    homes = [family, *(key for key, value in PROCESSOR_MAPPING_NAMES.items() if value == name)]
    for home in homes:
        try:
            module = importlib.import_module(f"transformers.models.{home}.processing_{home}")
        except ImportError:
            continue
        if name and hasattr(module, name):
            return getattr(module, name)
    return None
