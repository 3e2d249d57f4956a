"""Our own form of a prompt file: the columns `id, text, label, pair, image, category, answer`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mechguard.datasets.files import Values, read_rows
from mechguard.datasets.readers import PICTURE_SUFFIXES
from mechguard.errors import MechguardError
from mechguard.prompts import CONDITIONS, Prompt, Prompts, as_label

HALF = re.compile("[\ud800-\udfff]")


def read_file(path: Path) -> Prompts:
    """Read one prompt file: .jsonl, .csv or .json with the columns above (all but `text` optional), or .txt.

    A path in `image` counts from the file's own folder and may not lead out of it, unless it is a whole path.
    A prompt without a label is harmful.

    Raises:
        MechguardError: the file is missing, empty or of an unknown form, a row has no text, or an id is
            there twice.
    """
    prompts = [_as_prompt(row, index, path) for index, row in enumerate(read_rows(path))]
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise MechguardError(f"{path} has the id {prompt.id!r} twice; ids must differ")
        seen.add(prompt.id)
    return Prompts(prompts, name=path.stem)


def _as_prompt(row: Values, index: int, path: Path) -> Prompt:
    known = {str(name): value for name, value in row.items() if name and value not in (None, "")}
    text = known.get("text")
    if not isinstance(text, str) or not text.strip():
        raise MechguardError(
            f"row {index + 1} of {path} has no text; its columns are {', '.join(map(str, row)) or 'none'}, "
            "wanted `text` and, optionally, id, label, pair, image, category, answer"
        )
    if any(HALF.search(str(value)) for value in known.values()):
        raise MechguardError(
            f"row {index + 1} of {path} holds half of a surrogate pair, which no tokenizer reads; take it out"
        )
    own = _picture(known["image"], index, path) if "image" in known else None
    pair, category, answer = (
        None if name not in known else str(known[name]) for name in ("pair", "category", "answer")
    )
    return Prompt(
        id=str(known.get("id", f"{path.stem}-{index:04d}")),
        text=text,
        label=as_label(known.get("label", "harmful")),
        pair=pair,
        image=own,
        category=category,
        own_image=own,
        answer=answer,
    )


def _picture(named: Any, index: int, path: Path) -> Path | tuple[Path, ...]:
    """The picture, or the several pictures, that a row names."""
    if isinstance(named, list):
        found = [_picture(one, index, path) for one in named]
        return tuple(one for one in found if isinstance(one, Path))
    if not isinstance(named, str) or "\0" in named:
        raise MechguardError(f"row {index + 1} of {path} names no picture file in `image`")
    if named in CONDITIONS and not os.path.exists(path.parent / named):
        raise MechguardError(
            f"row {index + 1} of {path} names the generated picture {named!r}; take it out of `image`, and "
            f"use prompts.with_image({named!r})"
        )
    if ".." in Path(named).parts:
        raise MechguardError(
            f"the picture {named!r} in row {index + 1} of {path} leads out of the file's folder; move it "
            "there, or write its whole path"
        )
    if Path(named).is_absolute() and Path(named).suffix.lower() not in PICTURE_SUFFIXES:
        raise MechguardError(
            f"{named!r} in row {index + 1} of {path} is not named as a picture is "
            f"({', '.join(PICTURE_SUFFIXES)}); a picture elsewhere must be"
        )
    return path.parent / named
