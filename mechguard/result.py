"""A result: a tidy table that knows its origin."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from mechguard.cards import draw_card, draw_table
from mechguard.errors import MechguardError, first_line
from mechguard.storage import parsing, read_json, versions, write_bytes, write_json

COLUMNS = (
    "setting",
    "condition",
    "guard",
    "layer",
    "direction",
    "metric",
    "value",
    "low",
    "high",
    "n",
    "split",
)
TABLE = "table"  # what the JSON beside a CSV says of it
UNGUARDED = "none"  # the guard of rows that were measured without one


@dataclass(frozen=True, eq=False)
class Result:
    """Tidy rows, one number each, and what they were measured on.

    Attributes:
        table: one row per number. Where they apply the columns are `setting, condition, guard, layer,
            direction, metric, value, low, high, n, split`; `low` and `high` bound a 95% interval unless
            `about` says otherwise. Rates are fractions in [0, 1].
        about: model, data, seed, versions, seconds.
    """

    table: pd.DataFrame
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]], **about: Any) -> Result:
        """Build a result from dictionaries, with the known columns first and in their usual order."""
        table = pd.DataFrame(list(rows))
        known = [column for column in COLUMNS if column in table]
        others = [column for column in table if column not in COLUMNS]
        return cls(table[known + others], {**about, "versions": versions()})

    def where(self, **values: Any) -> Result:
        """The rows whose columns have these values; a list means any of them."""
        table = self.table
        for column, value in values.items():
            if column not in table:
                raise MechguardError(
                    f"the result has no column {column!r}; it has {', '.join(map(str, table.columns))}"
                )
            wanted = value if isinstance(value, (list, tuple, set)) else [value]
            table = table[table[column].isin(list(wanted))]
        return Result(table.reset_index(drop=True), self.about)

    def __add__(self, other: Result) -> Result:
        table = pd.concat([self.table, other.table], ignore_index=True)
        return Result(table, {**other.about, **self.about})

    def __len__(self) -> int:
        return len(self.table)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `path` as CSV and, when that is done, `about` as JSON beside it.

        The JSON's entry `table` holds the checksum of the CSV and which of its columns are text.
        """
        file = Path(path).with_suffix(".csv")
        options: dict[str, Any] = {"index": False, "lineterminator": "\n"}
        text = self.table.to_csv(**options)
        if "\r" in text:  # which only quotes keep from ending a row
            text = self.table.to_csv(quoting=csv.QUOTE_NONNUMERIC, **options)
        content = text.encode(errors="replace")
        words = [str(name) for name, column in self.table.items() if _holds_text(column)]
        write_bytes(file, content)
        facts = {"sha256": hashlib.sha256(content).hexdigest(), "text": words}
        write_json(file.with_suffix(".json"), {**self.about, TABLE: facts})
        return file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Read a saved result.

        Raises:
            MechguardError: there is no such table, it is not a CSV, or it is not the one that was saved.
        """
        file = Path(path).with_suffix(".csv")
        try:
            content = file.read_bytes()
        except OSError as error:
            raise MechguardError(f"there is no result {file} ({error.strerror})") from None
        about: Any = None
        facts: dict[str, Any] = {}
        if file.with_suffix(".json").is_file():
            about = read_json(file.with_suffix(".json"))
            with parsing(file.with_suffix(".json"), "what is known of a result"):
                about = dict(about)
                facts = dict(about.pop(TABLE, {}))
                words = dict.fromkeys(map(str, facts.get("text", ())), str)
        if facts.get("sha256") not in (None, hashlib.sha256(content).hexdigest()):
            raise MechguardError(
                f"{file} is not the table that was saved (its checksum differs); make it again, or, if it "
                f"was changed on purpose, take {TABLE!r} out of {file.with_suffix('.json').name}"
            )
        try:
            table = pd.read_csv(
                io.BytesIO(content),
                keep_default_na=False,
                na_values=[""],
                dtype=words if facts else None,
            )
        except (pd.errors.ParserError, ValueError, OverflowError) as error:
            raise MechguardError(
                f"{file} is not a readable CSV ({first_line(error)}); write it again"
            ) from None
        return cls(table, read_json(file.with_suffix(".json")) if about is None else about)

    def _repr_html_(self) -> str:
        told = ("setting", "condition", "guard", "direction", "metric", "split", "layer")
        facts = {"rows": len(self), "model": self.about.get("model"), "seed": self.about.get("seed")}
        facts |= {name: self._values(name) for name in told if name in self.table}
        rows = self.table.head(6).to_dict("records")
        following = ("result.table", "result.where(...)", "mg.plots....(result)", "result.save(...)")
        return draw_card("Result", facts, preview=draw_table(rows), following=following)

    def _values(self, column: str) -> str:
        """The values of a column in few words."""
        found = [str(value) for value in self.table[column].dropna().unique()]
        return ", ".join(found[:8]) + (f", ... ({len(found)} in all)" if len(found) > 8 else "")


def _holds_text(column: pd.Series) -> bool:
    """Whether a column holds words, and perhaps gaps: "1" then stays a word when it is read back."""
    kept = column.dropna()
    return not kept.empty and all(isinstance(value, str) for value in kept)
