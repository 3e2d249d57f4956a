"""What there is to load: the public benchmarks, and what of them lies in a folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mechguard.datasets.benchmarks import BENCHMARKS, ROLES
from mechguard.datasets.files import READERS, DataWarning
from mechguard.datasets.prompt_files import read_file
from mechguard.datasets.readers import PICTURES, Files
from mechguard.datasets.records import Source
from mechguard.datasets.templates import TEMPLATES
from mechguard.errors import MechguardError
from mechguard.overlaps import count_overlaps
from mechguard.prompts import HARMFUL, HARMLESS, Prompts

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
COUNTS = ("harmful", "harmless", "templates", "pictures")
NOTHING: dict[str, Any] = {**dict.fromkeys(COUNTS), "problem": ""}


def list_benchmarks(data: str | os.PathLike[str] | None = None) -> pd.DataFrame:
    """The public benchmarks that can be loaded, and what of them lies in a folder.

    Files in the folder that are named after a role of a study come first.

    Args:
        data: a data folder; MECHGUARD_DATA by default; without either nothing is found.

    Returns:
        One row per benchmark: `name` (what `load_prompts` or, where `kind` is "templates",
        `load_templates` takes), `kind` ("prompts", "templates" or "file"), `what`, `role` (of a study),
        `harmful`, `harmless`, `templates` and `pictures` (counts found; none where the set is not found or
        has no such thing), `licence`, `source`, `citation`, `path` (of its first file) and `problem` (why it
        cannot be read, or "").

    Raises:
        MechguardError: the folder does not exist.
    """
    import pandas as pd

    folder = data_folder(data)
    records: list[Source] = [*BENCHMARKS.values(), *TEMPLATES.values()]
    rows = [_describe_file(role, path) for role, path in _role_files(folder)]
    rows += [_describe(record, folder) for record in records]
    return pd.DataFrame(rows).astype(dict.fromkeys(COUNTS, "Int64"))


def measure_overlaps(data: str | os.PathLike[str] | None = None) -> pd.DataFrame:
    """How many prompts of each set (row) are also in each other set (column) of a data folder.

    The diagonal holds the sizes. Rows and columns of one pair may differ where a set repeats a prompt.

    Raises:
        MechguardError: the folder does not exist, or none was given.
    """
    import pandas as pd

    folder = data_folder(data)
    if folder is None:
        raise MechguardError("there is no data to compare; give a data folder, or set MECHGUARD_DATA")
    counts = count_overlaps(dict(_readable(folder)))
    return pd.DataFrame.from_dict(counts, orient="index", columns=list(counts), dtype=int)


def data_folder(data: str | os.PathLike[str] | None) -> Path | None:
    """The folder that was given, or else MECHGUARD_DATA; None without either.

    Raises:
        MechguardError: it does not exist.
    """
    given = data if data is not None else os.environ.get("MECHGUARD_DATA")
    if given is None:
        return None
    if not Path(given).is_dir():
        raise MechguardError(f"there is no data folder {given}; give a folder that holds benchmarks")
    return Path(given)


def format_benchmarks(table: pd.DataFrame) -> str:
    """The table of `list_benchmarks` as text: what is found, and where to get the rest."""
    lines = []
    for title, rows in (
        ("found:", table[table["path"] != ""]),
        ("not found:", table[table["path"] == ""]),
    ):
        lines += ["", title] if len(rows) else []
        for row in rows.astype(object).where(rows.notna(), None).to_dict("records"):
            role = f" (role: {row['role']})" if row["role"] else ""
            lines.append(f"  {row['name']:<34}{_say_counts(row):<32}{row['what']}{role}")
            lines.append(f"      {'; '.join(filter(None, [row['path'] or row['source'], row['licence']]))}")
    return "\n".join(lines[1:])


def format_overlaps(table: pd.DataFrame) -> str:
    """The table of `measure_overlaps` as text, without the sets that share nothing."""
    others = table.to_numpy() * (1 - np.eye(len(table), dtype=int))
    shown = table.index[others.sum(0) + others.sum(1) > 0]
    if shown.empty:
        return f"the {len(table)} sets found share no prompt"
    names = [f"{number} {name}" for number, name in enumerate(shown, start=1)]
    matrix = table.loc[shown, shown].set_axis(names, axis=0).set_axis(range(1, len(shown) + 1), axis=1)
    title = "prompts of the row that are also in the column (on the diagonal: all of the row)"
    return f"{title}\n{matrix.replace(0, '.').to_string()}"


def _say_counts(row: dict[str, Any]) -> str:
    if row["problem"]:
        return f"unreadable: {row['problem']}; "
    said = [f"{row[count]} {count}" for count in COUNTS if row[count] is not None]
    return ", ".join(one for one in said if one not in ("0 harmful", "0 harmless"))


def _role_files(folder: Path | None) -> list[tuple[str, Path]]:
    """The files that stand for a role before any benchmark does."""
    if folder is None:
        return []
    places = [(role, folder / f"{role}{suffix}") for role in ROLES for suffix in READERS]
    return [(role, path) for role, path in places if path.is_file()]


def _describe_file(role: str, path: Path) -> dict[str, Any]:
    return {
        "name": role,
        "kind": "file",
        "what": "a prompt file",
        "role": role,
        **_count(lambda: read_file(path), illustrated=True),
        **dict.fromkeys(("licence", "source", "citation"), ""),
        "path": str(path),
    }


def _describe(record: Source, folder: Path | None) -> dict[str, Any]:
    files = None if folder is None else record.locate(folder)
    counts = NOTHING
    if files is not None:
        counts = _count(lambda: _load(record, files), illustrated=PICTURES in record.files)
    return {
        "name": record.name,
        "kind": "templates" if record.name in TEMPLATES else "prompts",
        "what": record.what,
        "role": ", ".join(role for role, records in ROLES.items() if record in records),
        **counts,
        "licence": record.origin.licence,
        "source": record.origin.source,
        "citation": record.origin.citation,
        "path": "" if files is None else str(next(iter(files.values()))[0]),
    }


def _load(record: Source, files: Files) -> Prompts | int:
    """The prompts, or how many templates there are."""
    if record.name in TEMPLATES:
        return len(TEMPLATES[record.name].load(files))
    return BENCHMARKS[record.name].load(files)


def _count(load: Callable[[], Prompts | int], *, illustrated: bool) -> dict[str, Any]:
    try:
        found = _quietly(load)
    except MechguardError as error:
        return {**NOTHING, "problem": str(error)}
    if isinstance(found, int):
        return {**NOTHING, "templates": found}
    labels = found.labels
    pictures = sum(prompt.own_image is not None for prompt in found) if illustrated else None
    counts = {HARMFUL: labels.count(HARMFUL), HARMLESS: labels.count(HARMLESS), "pictures": pictures}
    return {**NOTHING, **counts}


def _readable(folder: Path) -> Iterator[tuple[str, Prompts]]:
    found: list[tuple[str, Callable[[], Prompts]]] = [
        (role, partial(read_file, path)) for role, path in _role_files(folder)
    ]
    for name, record in BENCHMARKS.items():
        if files := record.locate(folder):
            found.append((name, partial(record.load, files)))
    for name, load in found:
        try:
            yield name, _quietly(load)
        except MechguardError:
            continue  # list_benchmarks says why


def _quietly(load: Callable[[], T]) -> T:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return load()
