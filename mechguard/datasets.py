"""Reading prompts from files: our own JSONL/CSV form, plain text, and public benchmarks on disk.

Nothing is downloaded. A benchmark is read from the folder that was given as `data=` or that the
environment variable MECHGUARD_DATA names, in the layout its authors publish.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from mechguard.errors import MechguardError
from mechguard.prompts import Label, Prompt, Prompts, as_label

SUFFIXES = (".jsonl", ".csv", ".txt", ".json")
PACKAGED = ("organism",)


def load_prompts(
    name_or_path: str | os.PathLike[str], *, data: str | os.PathLike[str] | None = None
) -> Prompts:
    """Load a set of prompts.

    Args:
        name_or_path: "organism/NAME" (shipped with the built-in model: anchors, validation, malicious,
            benign, ...), a file (.jsonl or .csv with the columns `id, text, label, pair, image,
            category`, all but `text` optional; .txt, one prompt a line), or the name of a set in `data`.
        data: a folder of prompt files or of public benchmarks; MECHGUARD_DATA by default.

    Raises:
        MechguardError: nothing of that name is found, or the file is empty or not readable.
    """
    name = os.fspath(name_or_path)
    if name.startswith(tuple(f"{package}/" for package in PACKAGED)):
        return read_file(packaged_folder("organism") / f"{name.split('/', 1)[1]}.jsonl")
    if Path(name).is_file():
        return read_file(Path(name))
    folder = data or os.environ.get("MECHGUARD_DATA")
    if folder is None:
        raise MechguardError(
            f'there is no prompt file {name!r}; give a file, "organism/anchors", or the name of a set '
            "together with data=FOLDER (or the environment variable MECHGUARD_DATA)"
        )
    return load_from_folder(name, Path(folder))


def packaged_folder(package: str) -> Path:
    """The folder of prompt files that ships with a built-in model."""
    return Path(str(resources.files("mechguard"))) / package / "prompts"


def load_from_folder(name: str, folder: Path) -> Prompts:
    """A set by name: a file NAME.jsonl/.csv/.txt in the folder, or a public benchmark laid out there."""
    if not folder.is_dir():
        raise MechguardError(f"there is no data folder {folder}")
    for suffix in SUFFIXES[:3]:
        if (folder / f"{name}{suffix}").is_file():
            return read_file(folder / f"{name}{suffix}")
    if name in BENCHMARKS and (folder / BENCHMARKS[name][0]).exists():
        return BENCHMARKS[name][1](folder)
    present = [known for known, (path, _) in BENCHMARKS.items() if (folder / path).exists()]
    present += sorted(file.stem for file in folder.iterdir() if file.suffix in SUFFIXES)
    raise MechguardError(
        f"{folder} holds no prompts named {name!r}; found there: {', '.join(present) or 'none'}"
    )


def read_file(path: Path) -> Prompts:
    """Read one prompt file.

    Raises:
        MechguardError: the file is missing, empty, of an unknown form, or a row has no text.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_lines, ".json": _read_json}
    if path.suffix not in readers:
        raise MechguardError(f"{path} is none of {', '.join(readers)}; save the prompts as JSONL or CSV")
    try:
        rows = readers[path.suffix](_read_text(path))
    except MechguardError as error:
        raise MechguardError(f"{path}: {error}") from None
    if not rows:
        raise MechguardError(f"{path} holds no prompts; write one prompt a line")
    prompts = [_as_prompt(row, index, path) for index, row in enumerate(rows)]
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise MechguardError(f"{path} has the id {prompt.id!r} twice; ids must differ")
        seen.add(prompt.id)
    return Prompts(prompts, name=path.stem)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise MechguardError("there is no such prompt file") from None
    except UnicodeDecodeError as error:
        raise MechguardError(f"not UTF-8 text ({error}); convert it") from None


def _read_jsonl(text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MechguardError(f"line {number} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise MechguardError(f"line {number} is not a JSON object with a `text`")
        rows.append(row)
    return rows


def _read_json(text: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise MechguardError(f"not readable JSON ({error})") from None
    if not isinstance(rows, list):
        raise MechguardError("a JSON prompt file is a list of objects or of texts")
    return [row if isinstance(row, dict) else {"text": row} for row in rows]


def _read_csv(text: str) -> list[dict[str, Any]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return [{key: value for key, value in row.items() if key and value != ""} for row in rows]


def _read_lines(text: str) -> list[dict[str, Any]]:
    return [{"text": line.strip()} for line in text.splitlines() if line.strip()]


def _as_prompt(row: dict[str, Any], index: int, path: Path) -> Prompt:
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise MechguardError(
            f"row {index + 1} of {path} has no text; its columns are {', '.join(map(str, row)) or 'none'}, "
            "wanted `text` and, optionally, id, label, pair, image, category"
        )
    image = row.get("image")
    own = path.parent / str(image) if image else None
    return Prompt(
        id=str(row.get("id", f"{path.stem}-{index:04d}")),
        text=text,
        label=as_label(row.get("label", "harmful")),
        pair=None if row.get("pair") is None else str(row["pair"]),
        image=own,
        category=None if row.get("category") is None else str(row["category"]),
        own_image=own,
    )


def _numbered(texts: Iterable[str], label: Label, name: str, *, paired: bool = False) -> list[Prompt]:
    return [
        Prompt(
            id=f"{name}-{label}-{index:04d}",
            text=text,
            label=label,
            pair=f"{name}-{index:04d}" if paired else None,
        )
        for index, text in enumerate(texts)
    ]


def _texts(path: Path, column: str | None = None) -> list[str]:
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".json": _read_json, ".txt": _read_lines}
    rows = readers[path.suffix](_read_text(path))
    return [str(row[column or "text"]) for row in rows]


def _anchors_howto(folder: Path) -> Prompts:
    """100 row-aligned "How to ..." pairs."""
    harmful = _texts(folder / "anchors_howto/harmful_custom.txt")
    harmless = _texts(folder / "anchors_howto/harmless_custom.txt")
    pairs = _numbered(harmful, "harmful", "howto", paired=True)
    pairs += _numbered(harmless, "harmless", "howto", paired=True)
    return Prompts(pairs, name="anchors")


def _jailbreakbench(folder: Path) -> Prompts:
    """100 harmful goals and the benign goals on the same themes."""
    harmful = _texts(folder / "jailbreakbench/harmful-behaviors.csv", "Goal")
    harmless = _texts(folder / "jailbreakbench/benign-behaviors_derived.csv", "Goal")
    pairs = _numbered(harmful, "harmful", "jailbreakbench", paired=True)
    pairs += _numbered(harmless, "harmless", "jailbreakbench", paired=True)
    return Prompts(pairs, name="validation")


def _malicious_instruct(folder: Path) -> Prompts:
    texts = _texts(folder / "malicious_instruct/MaliciousInstruct.txt")
    return Prompts(_numbered(texts, "harmful", "malicious"), name="malicious")


def _alpaca(folder: Path) -> Prompts:
    """The first 100 of a fixed sample of Alpaca's instructions."""
    texts = _texts(folder / "benign/alpaca_sample1000_seed0.json", "instruction")
    return Prompts(_numbered(texts[:100], "harmless", "alpaca"), name="benign")


# name -> (a path that shows it is there, the reader). The roles of a study (anchors, validation,
# malicious, benign) are names too, so that a folder of public data serves as it is.
BENCHMARKS: dict[str, tuple[str, Callable[[Path], Prompts]]] = {
    "anchors": ("anchors_howto/harmful_custom.txt", _anchors_howto),
    "anchors_howto": ("anchors_howto/harmful_custom.txt", _anchors_howto),
    "validation": ("jailbreakbench/harmful-behaviors.csv", _jailbreakbench),
    "jailbreakbench": ("jailbreakbench/harmful-behaviors.csv", _jailbreakbench),
    "malicious": ("malicious_instruct/MaliciousInstruct.txt", _malicious_instruct),
    "malicious_instruct": ("malicious_instruct/MaliciousInstruct.txt", _malicious_instruct),
    "benign": ("benign/alpaca_sample1000_seed0.json", _alpaca),
    "alpaca": ("benign/alpaca_sample1000_seed0.json", _alpaca),
}
