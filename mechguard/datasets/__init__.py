"""Reading prompts: our own JSONL/CSV form, plain text, and public benchmarks on disk.

Nothing is downloaded. A benchmark is read from the folder that was given as `data=` or that the
environment variable MECHGUARD_DATA names, in the layout its authors publish or in that of a collection;
`list_benchmarks` (on the command line `mechguard data`) says which there are and which were found.
"""

from __future__ import annotations

import os
import warnings
from importlib import resources
from pathlib import Path

from mechguard.datasets.benchmarks import BENCHMARKS, ROLES
from mechguard.datasets.catalogue import data_folder, list_benchmarks, measure_overlaps
from mechguard.datasets.files import READERS, DataWarning
from mechguard.datasets.prompt_files import read_file
from mechguard.datasets.records import Benchmark
from mechguard.datasets.templates import TEMPLATES, TemplateSet, apply_templates
from mechguard.errors import MechguardError
from mechguard.overlaps import OverlapWarning, find_overlaps
from mechguard.prompts import Prompts

__all__ = [
    "BENCHMARKS",
    "ROLES",
    "TEMPLATES",
    "Benchmark",
    "DataWarning",
    "OverlapWarning",
    "TemplateSet",
    "apply_templates",
    "describe_source",
    "find_overlaps",
    "list_benchmarks",
    "load_from_folder",
    "load_prompts",
    "load_templates",
    "measure_overlaps",
    "packaged_folder",
    "read_file",
    "skip_unreadable_pictures",
]

SUFFIXES = tuple(READERS)
PACKAGED = ("organism",)


def load_prompts(
    name_or_path: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    skip_unreadable: bool = False,
) -> Prompts:
    """Load a set of prompts.

    Args:
        name_or_path: "organism/NAME" (shipped with the built-in model: anchors, validation, malicious,
            benign, ...), a file (.jsonl or .csv with the columns `id, text, label, pair, image,
            category`, all but `text` optional; .txt, one prompt a line), or the name of a set in `data`:
            a file there, a public benchmark (see `list_benchmarks`), or the role of one in a study.
        data: a folder of prompt files or of public benchmarks; MECHGUARD_DATA by default.
        skip_unreadable: read every picture once and leave out the prompts whose own cannot be read, with a
            `DataWarning`; their ids stand in `Prompts.skipped` and in the `about` of what is measured. By
            default such a picture is an error when it is to be sent.

    Raises:
        MechguardError: nothing of that name is found, or the file is empty or not readable.
    """
    found = _find_prompts(os.fspath(name_or_path), data)
    return skip_unreadable_pictures(found) if skip_unreadable else found


def skip_unreadable_pictures(prompts: Prompts) -> Prompts:
    """The prompts whose pictures can be read, with a `DataWarning` that names the others."""
    kept = prompts.without_unreadable()
    if kept.skipped != prompts.skipped:
        gone = kept.skipped[len(prompts.skipped) :]
        warnings.warn(
            f"{len(gone)} of the {len(prompts)} prompts of {prompts.name!r} are left out, for their pictures "
            f"(or their partners') cannot be read: {', '.join(gone)}",
            DataWarning,
            stacklevel=3,
        )
    return kept


def _find_prompts(name: str, data: str | os.PathLike[str] | None) -> Prompts:
    if name.startswith(tuple(f"{package}/" for package in PACKAGED)):
        return read_file(packaged_folder("organism") / f"{_as_name(name.split('/', 1)[1])}.jsonl")
    if Path(name).is_file():
        return read_file(Path(name))
    folder = data if data is not None else os.environ.get("MECHGUARD_DATA")
    if folder is None:
        raise MechguardError(
            f'there is no prompt file {name!r}; give a file, "organism/anchors", or the name of a set '
            "together with data=FOLDER (or the environment variable MECHGUARD_DATA)"
        )
    return load_from_folder(name, Path(folder))


def load_templates(name: str, *, data: str | os.PathLike[str] | None = None) -> list[str]:
    """Load public jailbreak templates, each with `{query}` where the request belongs.

    Templates without a place for the request get it at their end. Those that want it in a code (base64,
    rot13, ...) are left out.

    Args:
        name: "gptfuzzer", "gptfuzzer_short", "self_reminder", "self_reminder_itw" or "goal_priority".
        data: a folder of public benchmarks; MECHGUARD_DATA by default.

    Raises:
        MechguardError: no templates of that name are known, or found there.
    """
    if name not in TEMPLATES:
        raise MechguardError(f"no templates are named {name!r}; there are {', '.join(TEMPLATES)}")
    folder = data_folder(data)
    if folder is None:
        raise MechguardError(
            f"there is no folder to read {name!r} from; give data=FOLDER, or set MECHGUARD_DATA"
        )
    record = TEMPLATES[name]
    files = record.locate(folder)
    if files is None:
        raise MechguardError(
            f"{folder} holds no templates {name!r}; wanted {record.wanted}, from {record.origin.source}"
        )
    return [template for _, template in record.load(files)]


def packaged_folder(package: str) -> Path:
    """The folder of prompt files that ships with a built-in model."""
    return Path(str(resources.files("mechguard"))) / package / "prompts"


def load_from_folder(name: str, folder: Path) -> Prompts:
    """A set by name: a file NAME.jsonl/.csv/.txt/.json in the folder, or a public benchmark laid out there.

    Raises:
        MechguardError: there is no such folder, or no such set in it.
    """
    _as_name(name)
    if not folder.is_dir():
        raise MechguardError(f"there is no data folder {folder}; give a folder that holds prompts")
    for suffix in SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return read_file(folder / f"{name}{suffix}")
    records = ROLES.get(name) or ([BENCHMARKS[name]] if name in BENCHMARKS else [])
    for record in records:
        if files := record.locate(folder):
            return record.load(files)[: record.roles.get(name)].renamed(name)
    raise MechguardError(
        f"{folder} holds no prompts named {name!r}{_wanted(name, records)}; found there: "
        f"{', '.join(_present(folder)) or 'none'}"
    )


def describe_source(name: str, folder: Path) -> dict[str, str]:
    """Where `load_from_folder` finds a set: what it is, its source, licence and citation, as far as known."""
    for suffix in SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            packaged = folder == packaged_folder("organism")
            return {
                "what": f"{name}{suffix}",
                "source": "shipped with mechguard, written from templates" if packaged else str(folder),
                "licence": "Apache-2.0" if packaged else "not recorded; see whoever gave the file",
            }
    records = ROLES.get(name) or ([BENCHMARKS[name]] if name in BENCHMARKS else [])
    for record in records:
        if folder.is_dir() and record.locate(folder):
            origin = record.origin
            known = {"source": origin.source, "licence": origin.licence, "citation": origin.citation}
            return {"what": record.what, **known}
    return {}


def _as_name(name: str) -> str:
    """Refuse the name of a set that leads out of its folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise MechguardError(f"{name!r} is not the name of a set; give a name, or the path of a prompt file")
    return name


def _wanted(name: str, records: list[Benchmark]) -> str:
    if name in TEMPLATES:
        return " (they are templates: use load_templates)"
    places = [f"{record.wanted}, from {record.origin.source}" for record in records]
    return f" (wanted {'; or '.join(places)})" if places else ""


def _present(folder: Path) -> list[str]:
    benchmarks = [name for name, record in BENCHMARKS.items() if record.locate(folder)]
    return benchmarks + sorted(file.stem for file in folder.iterdir() if file.suffix in SUFFIXES)
