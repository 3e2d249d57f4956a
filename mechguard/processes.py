"""Processes: which part of the work is this process's, under `torchrun` or `--processes`.

Launchers say in the environment how many processes there are and which one this is; torch.distributed lets
them wait for each other. There is no scheduler here: piece k belongs to process k modulo their number.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from mechguard.errors import MechguardError, OtherProcessError, first_line

PATIENCE = timedelta(days=7)  # how long one process waits for another's part
GRACE = 10  # seconds that the others have to say why they stop
T = TypeVar("T")
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


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

    def own(self, pieces: Sequence[T]) -> list[T]:
        """The pieces of the work that are this process's."""
        return [piece for number, piece in enumerate(pieces) if self.owns(number)]

    def own_of(self, sizes: Sequence[int]) -> set[int]:
        """The numbers of this process's pieces where these differ in size: the largest are dealt first."""
        loads = [0] * self.count
        found = set()
        for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
            owner = loads.index(min(loads))
            loads[owner] += sizes[number]
            if owner == self.rank:
                found.add(number)
        return found

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
        with _connected():
            dist.all_reduce(failed, group=_group())
        if well and failed:
            raise OtherProcessError("another process of this run failed; its message says why")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do what is inside in every process, and go on only where all have done it."""
        try:
            yield
        except BaseException:
            self.agree(False)
            raise
        self.agree()

    @contextmanager
    def hold(self, lock: AbstractContextManager[Any]) -> Iterator[None]:
        """Let the first process hold a lock for all while a block runs.

        Raises:
            MechguardError: it cannot be had.
        """
        with ExitStack() as held:
            with self.together():
                if self.leads:
                    held.enter_context(lock)
            yield

    def gather(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The JSON-like rows of all processes, in the order of the processes, in each of them."""
        if self.count == 1:
            return rows
        import torch
        import torch.distributed as dist

        own = torch.frombuffer(bytearray(json.dumps(rows, default=str).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        with _connected():
            dist.all_gather(sizes, torch.tensor([len(own)]), group=_group())
        longest = int(max(sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
        with _connected():
            dist.all_gather(found, padded, group=_group())
        parts = [bytes(part[: int(size)].tolist()) for part, size in zip(found, sizes, strict=True)]
        return [row for part in parts for row in json.loads(part)]


def find_processes() -> Processes:
    """What the launcher says; one process where there is none, or inside `alone`.

    Raises:
        MechguardError: the environment's numbers do not fit each other.
    """
    return Processes() if _ALONE.get() else _read_environment()


def _read_environment() -> Processes:
    words = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(word.isdigit() for word in words) or not int(words[0]) < int(words[1]):
        raise MechguardError(
            f"the environment says RANK={words[0]!r} of WORLD_SIZE={words[1]!r}; start with torchrun, "
            "which sets both"
        )
    return Processes(int(words[0]), int(words[1]))


@contextmanager
def alone() -> Iterator[None]:
    """What a block does is this process's whole, as if there were no other: its like is shared outside."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def launched() -> bool:
    """Whether this process is one of several."""
    return _read_environment().count > 1


def launch(count: int, work: Callable[..., Any], *given: Any) -> int:
    """Run `work(*given)` in so many processes of this machine, which find each other as under torchrun.

    They share the cores. Where the system can fork, they begin with the modules that are imported here. A
    mistake that stops them is said once, on stderr; Ctrl-C stops them all.

    Args:
        work: a function at the top of a module.

    Returns:
        The exit code of the first that stopped, 0 if all ended well.

    Raises:
        MechguardError: one of them was killed.
    """
    from torch.multiprocessing import (
        ProcessExitedException,
        get_all_start_methods,
        get_context,
        start_processes,
    )

    method = "fork" if "fork" in get_all_start_methods() else "spawn"
    said = get_context(method).Value("b", 0)
    given = (count, _free_port(), said, work, given)
    gc.freeze()  # what is imported here stays: no use in looking it through in each of them
    context = start_processes(_begin, given, nprocs=count, join=False, start_method=method)
    try:
        while not context.join(grace_period=GRACE):
            pass
    except ProcessExitedException as end:
        if said.value:
            return end.exit_code
        raise MechguardError(
            f"process {end.error_index} of {count} was stopped ({end}); the same command goes on from what "
            "was done"
        ) from None
    except KeyboardInterrupt:
        for pid in context.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
        raise
    return 0


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _begin(
    rank: int, count: int, port: int, said: Any, work: Callable[..., Any], given: tuple[Any, ...]
) -> None:
    import torch
    from threadpoolctl import threadpool_limits

    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in facts.items()}, MASTER_ADDR="127.0.0.1")
    threads = max(1, (os.cpu_count() or 1) // count)
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            work(*given)
    except MechguardError as error:
        with said.get_lock():
            if not said.value and not isinstance(error, OtherProcessError):
                print(f"mechguard: {error}", file=sys.stderr, flush=True)
                said.value = 1
        sys.exit(2)


def own_device() -> str | None:
    """The accelerator of this process where several share a machine; None where there is no launcher."""
    if not launched():
        return None
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def _connected() -> Iterator[None]:
    """Say in one sentence that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise OtherProcessError(
            f"another process of this run has ended ({first_line(error)}); the same command goes on from "
            "what was done"
        ) from error


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
