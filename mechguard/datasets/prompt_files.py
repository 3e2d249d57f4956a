"""Our own form of a prompt file: the columns `id, text, label, pair, image, category, answer`."""

from __future__ import annotations

from pathlib import Path

from mechguard.datasets.files import Values, read_rows
from mechguard.errors import MechguardError
from mechguard.prompts import Prompt, Prompts, as_label


def read_file(path: Path) -> Prompts:
    """Read one prompt file: .jsonl, .csv or .json with the columns above (all but `text` optional), or .txt.

    A path in `image` counts from the file's own folder. A prompt without a label is harmful.

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
    own = path.parent / str(known["image"]) if "image" in known else None
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
