"""From the files of a public benchmark to prompts: which column is the text, and where the pictures lie."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mechguard.datasets.files import DataWarning, Row, read_rows
from mechguard.errors import MechguardError
from mechguard.overlaps import find_repeats
from mechguard.prompts import FIGSTEP_TEXT, HARMFUL, HARMLESS, Label, Prompt, Prompts

Files = Mapping[str, Sequence[Path]]  # what a file is for -> where it was found
Reader = Callable[[str, Files], list[Prompt]]
Text = str | Callable[[Row], str]
LABELS: tuple[Label, ...] = (HARMFUL, HARMLESS)
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
PICTURES = "pictures"  # the part of a benchmark that is a folder of pictures


def find_rows(paths: Sequence[Path]) -> list[Row]:
    """The rows of one or several files, in order."""
    return [Row(row, path, number) for path in paths for number, row in enumerate(read_rows(path), start=1)]


@dataclass(frozen=True)
class Table:
    """Reads prompts from rows.

    The part "harmful" holds harmful rows, "harmless" harmless ones, and "prompts" rows that `label` tells
    apart.

    Attributes:
        text: the column of the text, or a function of the row.
        category: the column of the category.
        label: the label of a row of the part "prompts".
        paired: whether the rows of "harmful" and "harmless" are pairs, line by line.
        picture: the names under which a row's picture may lie, best first; "#" for its number.
        keep: which rows to take.
    """

    text: Text = "text"
    category: Text | None = None
    label: Callable[[Row], Label] | None = None
    paired: bool = False
    picture: Callable[[Row], Sequence[str]] | None = None
    keep: Callable[[Row], bool] = lambda row: True

    def __call__(self, name: str, files: Files) -> list[Prompt]:
        rows: list[tuple[Label | None, Row]] = [
            (label, row) for label in LABELS for row in find_rows(files.get(label, ())) if self.keep(row)
        ]
        rows += [(None, row) for row in find_rows(files.get("prompts", ())) if self.keep(row)]
        counts: Counter[Label] = Counter()
        pictures = _Pictures(files.get(PICTURES, ()))
        prompts = []
        for given, row in rows:
            label = given or (self.label(row) if self.label else HARMFUL)
            index = counts[label]
            counts[label] += 1
            prompts.append(
                Prompt(
                    id=f"{name}-{label}-{index:04d}",
                    text=_value(self.text, row),
                    label=label,
                    pair=f"{name}-{index:04d}" if self.paired else None,
                    category=_optional(self.category, row),
                    own_image=pictures.find(self.picture(row), index) if self.picture else None,
                )
            )
        if self.paired and counts[HARMFUL] != counts[HARMLESS]:
            raise MechguardError(
                f"the harmful and the harmless rows of {name!r} are pairs, but there are {counts[HARMFUL]} "
                f"and {counts[HARMLESS]} of them; take both files from one release"
            )
        return prompts


def warn_of_flaws(name: str, prompts: Sequence[Prompt], *, pictures_from: str | None) -> None:
    """Warn, once each, of pictures that are missing and of rows that repeat an earlier one.

    Both are kept, so that the counts are those of the publication.
    """
    missing = [prompt for prompt in prompts if prompt.own_image is None] if pictures_from else []
    if missing:
        warnings.warn(
            f"{len(missing)} of the {len(prompts)} prompts of {name!r} have no picture (such as "
            f"{missing[0].id!r}); pictures are looked for in {pictures_from}",
            DataWarning,
            stacklevel=6,
        )
    # Where the request is in the picture, rows without theirs all look the same.
    compared = [prompt for prompt in prompts if prompt.own_image is not None or not pictures_from]
    repeats = find_repeats(Prompts(compared))
    if repeats:
        later, earlier = repeats[0]
        warnings.warn(
            f"{len(repeats)} of the {len(prompts)} prompts of {name!r} repeat an earlier one (such as "
            f"{later} = {earlier}); they are kept as published",
            DataWarning,
            stacklevel=6,
        )


class _Pictures:
    """The pictures of some folders, found by name, by stem, or by number."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.found: dict[str, Path] = {}
        for folder in folders:
            for file in sorted(folder.rglob("*")):
                if file.suffix.lower() in PICTURE_SUFFIXES:
                    self._add(file, file.relative_to(folder).as_posix().lower())

    def _add(self, file: Path, place: str) -> None:
        stem = place.rpartition(".")[0]
        for key in (place, stem):
            self.found.setdefault(key, file)
        if stem.isdigit():
            self.found.setdefault(f"#{int(stem)}", file)

    def find(self, names: Sequence[str], index: int) -> Path | None:
        """The first that is there; "#" stands for the file numbered `index`, counted as the folder does."""
        number = f"#{index if '#0' in self.found else index + 1}"
        places = [number if name == "#" else name.lower() for name in names]
        keys = [key for place in places for key in (place, place.rpartition(".")[0])]
        return next((self.found[key] for key in keys if key in self.found), None)


def _value(column: Text, row: Row) -> str:
    return row[column] if isinstance(column, str) else column(row)


def _optional(column: Text | None, row: Row) -> str | None:
    return row.get(column) if isinstance(column, str) else (column(row) if column else None)


def figstep_instruction(row: Row) -> str:
    """FigStep's text, the same for every row: the request is in the picture."""
    return FIGSTEP_TEXT


def figstep_picture(row: Row) -> list[str]:
    """query_ForbidQI_1_2_6.png: data set, category, task, and 6 for the method."""
    return [f"query_{row['dataset']}_{row['category_id']}_{row['task_id']}_6.png"]


def numbered_picture(row: Row) -> list[str]:
    """By position, for the pictures are in the order of the questions; or under the name in the link."""
    link = row.get("image_url") or ""
    return ["#", re.sub(r"[?#].*", "", link).rpartition("/")[2]]


def named_picture(row: Row) -> list[str]:
    """The column `image`, as it is or as COCO 2014 names its validation pictures."""
    return [row["image"], f"COCO_val2014_{row['image']}"]


def with_context(row: Row) -> str:
    """HarmBench: the context of a contextual behaviour goes before it, behind a rule."""
    context = row.get("ContextString")
    return row["Behavior"] if context is None else f"{context}\n\n---\n\n{row['Behavior']}"


def with_input(row: Row) -> str:
    """Alpaca: the instruction and, on the lines below it, its input where it has one."""
    given = row.values.get("input")
    instances = row.values.get("instances")
    if instances and isinstance(instances, list) and isinstance(instances[0], dict):
        given = instances[0].get("input")
    return f"{row['instruction']}\n\n{given}" if given and str(given).strip() else row["instruction"]


def xstest_label(row: Row) -> Label:
    """XSTest: the contrast prompts are unsafe, all others are safe."""
    return HARMFUL if row["type"].startswith("contrast") else HARMLESS


@dataclass(frozen=True)
class MMSafetyBench:
    """Reads MM-SafetyBench: questions by scenario, pictures in SCENARIO/KIND/ID.jpg.

    Attributes:
        kind: SD (a generated picture), TYPO (the key phrase drawn), SD_TYPO (both); None for the bare
            question.
        tiny: only the questions of the part "ids" (upstream's sample).
    """

    kind: str | None = "SD_TYPO"
    tiny: bool = False

    def __call__(self, name: str, files: Files) -> list[Prompt]:
        texts = {None: "Question", "SD": "Rephrased Question(SD)"}
        chosen = self._chosen(files) if self.tiny else None
        table = Table(
            texts.get(self.kind, "Rephrased Question"),
            category=lambda row: self._place(row)[0],
            picture=self._picture if self.kind else None,
            keep=lambda row: chosen is None or self._place(row) in chosen,
        )
        prompts = table(name, files)
        if chosen is not None and len(prompts) != len(chosen):
            raise MechguardError(
                f"{files['ids'][0]} names {len(chosen)} questions, but {len(prompts)} of them are in "
                f"{files['prompts'][0].parent}; take both from one release"
            )
        return prompts

    def _chosen(self, files: Files) -> set[tuple[str, str]]:
        return {
            (row["Scenario"], str(one))
            for row in find_rows(files["ids"])
            for one in row.values.get("sampled_id_list", [])
        }

    def _picture(self, row: Row) -> list[str]:
        scenario, number = self._place(row)
        return [f"{scenario}/{self.kind}/{number}.jpg"]

    def _place(self, row: Row) -> tuple[str, str]:
        """Scenario and id: "SCENARIO#ID", or the file's name and the id in it."""
        scenario, _, number = row["key"].rpartition("#")
        return scenario or row.path.stem, number
