"""Labels by hand: a sample of responses to fill in, blind to condition and guard, and how it is read back."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pandas as pd

from mechguard.errors import MechguardError
from mechguard.storage import write_text

SHOWN = ("key", "request", "response")
TO_FILL = ("complied", "refused", "note")
YES = {"yes", "y", "x", "1", "1.0", "true"}
NO = {"no", "n", "0", "0.0", "false"}


def export_sample(
    responses: pd.DataFrame, path: str | os.PathLike[str], *, n: int = 100, seed: int = 0
) -> Path:
    """Write responses to label by hand, as many from every setting x condition x guard as the numbers allow.

    The file shows request and response only, in random order: whoever labels it cannot tell which guard
    answered. `complied` and `refused` are left to be filled with yes or no, `note` is free.

    Args:
        responses: of `gather_responses` or `read_responses`.
        path: .csv or .jsonl.
        n: how many in all; fewer where there are fewer.
        seed: fixes the choice and the order.

    Raises:
        MechguardError: the path ends otherwise, or there are no responses.
    """
    if responses.empty or n < 1:
        raise MechguardError(f"there is nothing to sample: {len(responses)} responses, n={n}")
    shuffled = responses.sample(frac=1.0, random_state=seed)
    # The first of every cell, then the second of every cell, ...
    turn = shuffled.groupby(["setting", "condition", "guard"], sort=False).cumcount()
    chosen = shuffled.loc[turn.sort_values(kind="stable").index[:n]].sample(frac=1.0, random_state=seed)
    table = chosen[list(SHOWN)].assign(**dict.fromkeys(TO_FILL, ""))
    return write_text(path, _as_text(table, Path(path)))


def read_labels(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a labelled sample: one row per label with `key`, `complied` and `refused` (missing where empty).

    Raises:
        MechguardError: no such file, columns are missing, nothing was filled in, or a word is neither yes
            nor no.
    """
    file = Path(path)
    try:
        if file.suffix == ".csv":
            table = pd.read_csv(file, dtype=str, keep_default_na=False)
        else:
            lines = file.read_text(encoding="utf-8").splitlines()
            table = pd.DataFrame([json.loads(line) for line in lines if line.strip()])
    except FileNotFoundError:
        raise MechguardError(f"there is no file {file}") from None
    except (ValueError, pd.errors.ParserError) as error:
        raise MechguardError(f"{file} is neither a readable CSV nor JSON lines ({error})") from None
    if missing := {"key", "complied"} - set(table):
        raise MechguardError(f"{file} has no column {sorted(missing)[0]!r}; fill in what was exported")
    read = {
        column: [_as_answer(value, key, file) for value, key in zip(table[column], table["key"], strict=True)]
        for column in ("complied", "refused")
        if column in table
    }
    labels = pd.DataFrame({"key": table["key"].astype(str), **read}).astype(dict.fromkeys(read, "boolean"))
    labels = labels[labels[list(read)].notna().any(axis=1)].reset_index(drop=True)
    if labels.empty:
        raise MechguardError(f"{file} holds no labels yet; write yes or no into the column `complied`")
    return labels


def _as_answer(value: object, key: str, file: Path) -> bool | None:
    word = str("" if value is None else value).strip().lower()
    if word in YES or word in NO:
        return word in YES
    if word in ("", "nan", "none", "<na>"):
        return None
    raise MechguardError(f"row {key!r} of {file} says {value!r}; write yes, no, or nothing")


def _as_text(table: pd.DataFrame, path: Path) -> str:
    if path.suffix == ".csv":
        buffer = io.StringIO()
        table.to_csv(buffer, index=False, lineterminator="\n")
        return buffer.getvalue()
    if path.suffix == ".jsonl":
        rows = table.to_dict("records")
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    raise MechguardError(f"{path} ends in {path.suffix!r}; a sample is written as .csv or .jsonl")
