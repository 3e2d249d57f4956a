"""A ledger: a file of JSON lines that grows as work is done, from which an interrupted run goes on.

Several processes (`torchrun`) add to one ledger, each to a part of its own beside it; at the end the first of
them joins the parts as one process would have written them.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mechguard.processes import Processes, find_processes
from mechguard.storage import append_lines, hold_file, read_lines, write_lines

Row = dict[str, Any]


@dataclass(frozen=True)
class Ledger:
    """What is done already, and what is added.

    Attributes:
        path: the file; None keeps nothing.
        key: the name under which every line holds what tells it from the others.
        needed: other names that every line must hold.
        processes: those that share the work.
    """

    path: Path | None
    key: str
    needed: tuple[str, ...] = ()
    processes: Processes = field(default_factory=find_processes)

    def held(self) -> AbstractContextManager[None]:
        """Keep other runs from it while a block runs.

        Raises:
            MechguardError: another process adds to it.
        """
        return self.processes.hold(hold_file(self.path))

    def read(self) -> dict[str, Row]:
        """All lines by their key, also those that other processes of an interrupted run have left.

        Raises:
            MechguardError: a line that cannot be read.
        """
        with self.processes.together():  # all have read before any of them adds to it
            return {row[self.key]: row for part in self._parts() for row in self._lines(part)}

    def add(self, rows: Iterable[Row]) -> None:
        """Add lines and flush them to disk."""
        if self.path is not None:
            append_lines(self._own(self.path), rows)

    def gather(self, known: Mapping[str, Row], order: Sequence[str]) -> dict[str, Row]:
        """What all processes know, in each of them; the parts are joined.

        Args:
            order: the keys of this run, as one process would have added them.
        """
        found = {row[self.key]: row for row in self.processes.gather(list(known.values()))}
        with self.processes.together():
            if self.processes.leads:
                self._join(found, order)
        return found

    def _join(self, known: Mapping[str, Row], order: Sequence[str]) -> None:
        parts = self._parts()[1:]
        if self.path is None or not parts:
            return
        mine = set(order)
        others = [row for row in self._lines(self.path) if row[self.key] not in mine]
        write_lines(self.path, others + [known[key] for key in order])
        for part in parts:
            part.unlink()

    def _lines(self, part: Path) -> list[Row]:
        return read_lines(part, needed=(self.key, *self.needed), adding=True)

    def _own(self, path: Path) -> Path:
        """Where this process adds its lines."""
        return path if self.processes.leads else path.with_suffix(f".rank{self.processes.rank}.jsonl")

    def _parts(self) -> list[Path]:
        """The file, and what processes other than the first have added beside it."""
        if self.path is None:
            return []
        return [self.path, *sorted(self.path.parent.glob(f"{glob.escape(self.path.stem)}.rank*.jsonl"))]
