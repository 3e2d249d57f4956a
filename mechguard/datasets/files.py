"""Rows from files, whatever their form and encoding: JSON lines, JSON, CSV, one text a line."""

from __future__ import annotations

import csv
import io
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mechguard.errors import MechguardError

Values = dict[str, Any]


class DataWarning(UserWarning):
    """Something about a file that a reader of its numbers should know."""


class Row:
    """One row of a file, which knows where it comes from and finds columns in any case."""

    def __init__(self, values: Values, path: Path, number: int) -> None:
        self.values = {str(name).strip().lower(): value for name, value in values.items()}
        self.names = ", ".join(map(str, values)) or "none"
        self.path = path
        self.number = number

    def get(self, column: str) -> str | None:
        """The value as text, or None where it is empty or the column is missing."""
        value = self.values.get(column.lower())
        return None if value is None or str(value).strip() == "" else str(value)

    def __getitem__(self, column: str) -> str:
        """The value as text.

        Raises:
            MechguardError: there is no such column, or it is empty here.
        """
        if column.lower() not in self.values:
            raise MechguardError(
                f"{self.path} has no column {column!r}; its columns are {self.names}; take the file as its "
                "authors publish it, or rename the column"
            )
        value = self.get(column)
        if value is None:
            raise MechguardError(f"row {self.number} of {self.path} has no text in its column {column!r}")
        return value


def read_rows(path: Path) -> list[Values]:
    """The rows of a .jsonl, .json, .csv or .txt file, as they stand there.

    A JSON file is a list of objects or texts, or an object of them, whose names become the column `key`.
    Lines of text become the column `text`.

    Raises:
        MechguardError: the file is missing, empty, broken, not text, or of another form.
    """
    if path.suffix.lower() not in READERS:
        raise MechguardError(f"{path} is none of {', '.join(READERS)}; save the prompts as JSONL or CSV")
    text = read_text(path)
    if not text.strip():
        raise MechguardError(f"{path} holds no prompts; write one prompt a line")
    try:
        rows = READERS[path.suffix.lower()](text)
    except MechguardError as error:
        raise MechguardError(f"{path}: {error}") from None
    if not rows:
        raise MechguardError(f"{path} holds no prompts; write one prompt a line")
    return rows


def read_text(path: Path) -> str:
    """The text of a file: UTF-8 with or without a mark, UTF-16 with one, else cp1252 with a warning.

    Raises:
        MechguardError: there is no such file, or it is not text.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise MechguardError(f"there is no prompt file {path}") from None
    except OSError as error:
        raise MechguardError(f"{path} cannot be read ({error.strerror}); give a prompt file") from None
    try:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            return content.decode("utf-16")
        if b"\0" in content:
            raise MechguardError(f"{path} is not text (it holds zero bytes); save the prompts as UTF-8 text")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _decode_legacy(path, content, error)


def _decode_legacy(path: Path, content: bytes, error: UnicodeDecodeError) -> str:
    try:
        encoding, text = "cp1252", content.decode("cp1252")
    except UnicodeDecodeError:
        encoding, text = "latin-1", content.decode("latin-1")
    warnings.warn(
        f"{path} is not UTF-8 (byte {error.start}: {error.reason}) and was read as {encoding}; save it as "
        "UTF-8 to be sure of its letters",
        DataWarning,
        stacklevel=2,
    )
    return text


def _lines(text: str) -> list[str]:
    # Not splitlines(), which also breaks at U+2028 and the like inside a text.
    return re.split(r"\r\n|\n|\r", text)


def _parse_jsonl(text: str) -> list[Values]:
    rows = []
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
            raise MechguardError(f"line {number} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise MechguardError(f"line {number} is not a JSON object with a `text`")
        rows.append(row)
    return rows


def _parse_json(text: str) -> list[Values]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise MechguardError(f"not readable JSON ({error})") from None
    named = content.items() if isinstance(content, dict) else None
    if named is not None and all(isinstance(value, (dict, list)) for value in content.values()):
        return [
            {"key": key, **_as_values(row)}
            for key, value in named
            for row in (value if isinstance(value, list) else [value])
        ]
    if isinstance(content, list):
        return [_as_values(row) for row in content]
    raise MechguardError("a JSON prompt file is a list of objects or of texts, or an object of them")


def _as_values(row: Any) -> Values:
    return row if isinstance(row, dict) else {"text": row}


def _parse_csv(text: str) -> list[Values]:
    try:
        rows = _csv_rows(text, strict=True)
    except csv.Error as error:
        if "end of data" in str(error):  # everything behind the open quote would be one text
            raise MechguardError("a quote is opened and never closed; close it, or double it") from None
        rows = _csv_rows(text, strict=False)
    return rows


def _csv_rows(text: str, *, strict: bool) -> list[Values]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=strict)
    rows = []
    try:
        columns = list(reader.fieldnames or [])
        for row in reader:
            extra = row.pop(None, None) or []
            if any(extra) and len(columns) == 1:  # then there is nothing that a comma could part
                row[columns[0]] = ",".join([row[columns[0]], *extra])
            elif any(extra):
                raise MechguardError(
                    f"line {reader.line_num} has more values than the {len(columns)} columns; put texts "
                    "that hold a comma into double quotes"
                )
            rows.append(row)
    except csv.Error as error:
        if strict:
            raise
        raise MechguardError(f"line {reader.line_num} is not readable CSV ({error})") from None
    return rows


def _parse_lines(text: str) -> list[Values]:
    return [{"text": line.strip()} for line in _lines(text) if line.strip()]


READERS: dict[str, Callable[[str], list[Values]]] = {
    ".jsonl": _parse_jsonl,
    ".csv": _parse_csv,
    ".txt": _parse_lines,
    ".json": _parse_json,
}
