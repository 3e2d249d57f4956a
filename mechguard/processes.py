"""Processes: which part of the work is this process's, under `torchrun`.

Launchers say in the environment how many processes there are and which one this is; torch.distributed lets
them wait for each other. There is no scheduler here: piece k belongs to process k modulo their number.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from mechguard.errors import MechguardError

PATIENCE = timedelta(days=7)  # how long one process waits for another's part


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def owns(self, piece: int) -> bool:
        """Whether a piece of the work is this process's."""
        return piece % self.count == self.rank

    def agree(self, well: bool = True) -> None:
        """Wait until all have come here.

        Raises:
            MechguardError: another process did not come well.
        """
        if self.count == 1:
            return
        import torch
        import torch.distributed as dist

        failed = torch.tensor([int(not well)])
        dist.all_reduce(failed, group=_group())
        if well and failed:
            raise MechguardError("another process of this run failed; its message says why")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do what is inside in every process, and go on only where all have done it."""
        try:
            yield
        except BaseException:
            self.agree(False)
            raise
        self.agree()

    def gather(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The JSON-like rows of all processes, in the order of the processes, in each of them."""
        if self.count == 1:
            return rows
        import torch
        import torch.distributed as dist

        own = torch.frombuffer(bytearray(json.dumps(rows, default=str).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=_group())
        longest = int(max(sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
        dist.all_gather(found, padded, group=_group())
        parts = [bytes(part[: int(size)].tolist()) for part, size in zip(found, sizes, strict=True)]
        return [row for part in parts for row in json.loads(part)]


def find_processes() -> Processes:
    """What the launcher says; one process where there is none.

    Raises:
        MechguardError: the environment's numbers do not fit each other.
    """
    words = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(word.isdigit() for word in words) or not int(words[0]) < int(words[1]):
        raise MechguardError(
            f"the environment says RANK={words[0]!r} of WORLD_SIZE={words[1]!r}; start with torchrun, "
            "which sets both"
        )
    return Processes(int(words[0]), int(words[1]))


def own_device() -> str | None:
    """The accelerator of this process where several share a machine; None where there is no launcher."""
    if find_processes().count == 1:
        return None
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@cache
def _group() -> Any:
    """A gloo group over all processes, whatever the launcher uses between accelerators."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
        atexit.register(_leave)
        return dist.group.WORLD
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
