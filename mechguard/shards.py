"""Shards: hidden states on disk in pieces that are whole or absent, read back piece by piece.

A store is a folder:

    store.json                    what the states belong to; once it is complete, every file's checksum
    prompts.jsonl                 what was sent
    states-00000.safetensors ...  "data", float32 [layer, prompt, d_model], some prompts each

A shard is written under a temporary name, flushed and renamed, then noted with its checksum in a hidden list;
what a kill leaves is finished by the same call again. Several processes share a store: shard k belongs to
process k modulo their number, and the first one writes store.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mechguard.errors import MechguardError, first_line
from mechguard.processes import Processes
from mechguard.storage import append_line, digest, read_json, read_lines, write_bytes, write_json

KIND = "states"
HEAD, PROMPTS, LOCK = "store.json", "prompts.jsonl", ".lock"
SHARD_BYTES = 1 << 26
SHARD_LIMITS = (64, 1024)  # prompts
BLOCK = 1 << 20
READ_ONLY = "states on disk are not written over; take a copy with .clone()"
aten = torch.ops.aten


@dataclass(frozen=True)
class Shards:
    """The files of a store, to be read from.

    Attributes:
        folder: where they lie.
        shape: of all states together: layer, prompt, d_model.
        size: prompts in each shard but the last.
        sums: the SHA-256 of every shard.
        checked: the shards whose checksum this process has found right.
    """

    folder: Path
    shape: tuple[int, int, int]
    size: int
    sums: tuple[str, ...]
    checked: set[int] = field(default_factory=set)

    def check(self, number: int) -> None:
        """Compare a shard with its checksum, once.

        Raises:
            MechguardError: it is missing, cut off, or not what was written.
        """
        if number in self.checked:
            return
        file = shard_file(self.folder, number)
        if not file.is_file():
            raise MechguardError(
                f"{file} is missing; run the same collect again, which collects what is missing"
            )
        if file_sum(file) != self.sums[number]:
            raise MechguardError(
                f"{file} is not the file that was written (its checksum differs); remove it and run the same "
                "collect again, which collects what is missing"
            )
        self.checked.add(number)

    def read(self, layer: int, rows: Int[Tensor, " prompt"] | None = None) -> Float[Tensor, "prompt d_model"]:
        """The states of some prompts, or of all, at the nth layer of the store."""
        wanted = torch.arange(self.shape[1]) if rows is None else rows
        found = torch.empty(len(wanted), self.shape[2])
        homes = wanted // self.size
        for number in homes.unique().tolist():
            here = homes == number
            inside = wanted[here] - number * self.size
            first, last = int(inside.min()), int(inside.max())
            found[here] = self._part(number, layer, first, last + 1)[inside - first]
        return found

    def _part(self, number: int, layer: int, start: int, stop: int) -> Float[Tensor, "prompt d_model"]:
        from safetensors import SafetensorError, safe_open

        self.check(number)
        file = shard_file(self.folder, number)
        try:
            with safe_open(file, framework="pt") as opened:
                part: Tensor = opened.get_slice("data")[layer, start:stop]
        except (SafetensorError, OSError, IndexError) as error:
            raise MechguardError(f"{file} cannot be read ({first_line(error)}); collect it again") from None
        if part.shape != (stop - start, self.shape[2]) or part.dtype != torch.float32:
            raise MechguardError(f"{file} holds {tuple(part.shape)} of {part.dtype}; collect it again")
        return part


class StoredStates(Tensor):
    """States that lie on disk, as a tensor: [layer, prompt, d_model], float32, read only.

    Choosing layers or prompts (`states[2]`, `states[:, rows]`, `for layer in states`) reads no more than
    that; whatever else is done with it reads all of it first.
    """

    @staticmethod
    def __new__(
        cls, shards: Shards, layers: Int[Tensor, " layer"], rows: Int[Tensor, " prompt"] | None
    ) -> StoredStates:
        shape = (len(layers), shards.shape[1] if rows is None else len(rows), shards.shape[2])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    def __init__(
        self, shards: Shards, layers: Int[Tensor, " layer"], rows: Int[Tensor, " prompt"] | None
    ) -> None:
        self.shards, self.layers, self.rows = shards, layers, rows

    @classmethod
    def of(cls, shards: Shards) -> StoredStates:
        """All states of a store."""
        return cls(shards, torch.arange(shards.shape[0]), None)

    def at(self, index: int) -> Float[Tensor, "prompt d_model"]:
        """One layer, read from disk."""
        return self.shards.read(int(self.layers[index]), self.rows)

    def whole(self) -> Float[Tensor, "layer prompt d_model"]:
        """All of it, in memory."""
        found = torch.empty(self.shape)
        for index in range(len(self.layers)):
            found[index] = self.at(index)
        return found

    def chosen(self, dim: int, index: Any) -> StoredStates:
        """Some of the layers (`dim` 0) or of the prompts (1), still on disk."""
        if dim == 0:
            return StoredStates(self.shards, self.layers[index], self.rows)
        rows = torch.arange(self.shards.shape[1]) if self.rows is None else self.rows
        return StoredStates(self.shards, self.layers, rows[index])

    def numpy(self, *, force: bool = False) -> Any:
        return self.whole().numpy()

    def __iter__(self) -> Iterator[Tensor]:
        return (self.at(index) for index in range(len(self.layers)))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise MechguardError(READ_ONLY)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StoredStates({'x'.join(map(str, self.shape))}, {str(self.shards.folder)!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            raise MechguardError(READ_ONLY)
        states = args[0] if args else None
        if isinstance(states, StoredStates) and not kwargs and (found := _lazily(func, *args)) is not None:
            return found
        plain, named = tree_map_only(StoredStates, StoredStates.whole, (args, kwargs or {}))
        return func(*plain, **named)


def _lazily(func: Any, states: StoredStates, *args: Any) -> Tensor | None:
    """What a function gives without reading everything; None if it cannot."""
    if func in (aten.detach.default, aten.alias.default):
        return states.chosen(0, slice(None))
    if func is aten.select.int and args[0] % 3 == 0:
        return states.at(args[1])
    if func is aten.select.int and args[0] % 3 == 1:
        return states.chosen(1, torch.tensor([args[1]])).whole()[:, 0]
    if func is aten.slice.Tensor and (not args or args[0] in (0, 1)) and all(step == 1 for step in args[3:]):
        dim = args[0] if args else 0
        return states.chosen(dim, slice(*args[1:3]))
    if func is aten.index.Tensor:
        given = [(dim, index) for dim, index in enumerate(args[0]) if index is not None]
        if len(given) == 1 and given[0][0] < 2 and given[0][1].ndim == 1:
            return states.chosen(*given[0])
    if func is aten.mean.dim and len(args) == 1 and args[0] == [1]:
        return torch.cat([layer[None].mean(1) for layer in states])
    return None


@dataclass(frozen=True)
class Store:
    """A store that is being filled.

    Attributes:
        folder: where it lies.
        identity: what the states belong to; a store of something else is refused.
        facts: what comes back when it is read: layers, name, about.
        prompts: what was sent, as JSON lines.
        shape: layer, prompt, d_model.
        size: prompts in each shard but the last.
        processes: who fills it.
    """

    folder: Path
    identity: dict[str, Any]
    facts: dict[str, Any]
    prompts: bytes
    shape: tuple[int, int, int]
    size: int
    processes: Processes

    @property
    def spans(self) -> list[range]:
        """The prompts of each shard."""
        return [
            range(start, min(start + self.size, self.shape[1]))
            for start in range(0, self.shape[1], self.size)
        ]

    def fill(self, read: Callable[[int, range], Float[Tensor, "layer prompt d_model"]]) -> StoredStates:
        """Collect the shards that are not there, note their checksums, and complete the store.

        Args:
            read: gives the states of the nth shard, which are those of a range of prompts.

        Raises:
            MechguardError: another process is at this store, it belongs to something else, a file in it is
                damaged, or there is no room.
        """
        with self._lock():
            with self.processes.together():
                if self.processes.leads:
                    self._open()
            with self.processes.together():  # all have read it before any adds to it
                known = self._known()
            with self.processes.together():
                mine = [number for number in range(len(self.spans)) if self.processes.owns(number)]
                self._check([number for number in mine if number in known], known)
                for number in mine:
                    if number not in known:
                        self._write(number, read(number, self.spans[number]))
            with self.processes.together():
                if self.processes.leads:
                    self._complete()
        shards, _, _ = read_head(self.folder)
        shards.checked.update(range(len(shards.sums)))
        return StoredStates.of(shards)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Keep others out; of several processes that share the work, the first does it for all."""
        if not self.processes.leads:
            yield
            return
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCK)
            lock.acquire(timeout=0)
        except Timeout:
            self.processes.agree(False)
            raise MechguardError(
                f"another process is collecting into {self.folder}; wait until it is done, or give another "
                "folder"
            ) from None
        except OSError as error:
            self.processes.agree(False)
            raise MechguardError(f"nothing can be written into {self.folder} ({error})") from None
        try:
            yield
        finally:
            lock.release()

    def _open(self) -> None:
        """Claim the folder, or see that it is ours; clear away what a kill has left."""
        head = self.folder / HEAD
        for name in ("states-*.safetensors", HEAD, PROMPTS):
            for left in self.folder.glob(f".{name}.*"):
                left.unlink()
        if head.is_file():
            self._compare(_checked_head(self.folder))
        else:
            others = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
            if others:
                raise MechguardError(
                    f"{self.folder} holds {others[0]!r} but no {HEAD}; give a new or an empty folder"
                )
            write_json(head, self._head([]))
        file = self.folder / PROMPTS
        if not file.is_file():
            write_bytes(file, self.prompts)
        elif file.read_bytes() != self.prompts:
            raise MechguardError(f"{file} is not the file that was written; remove it and collect again")

    def _compare(self, head: dict[str, Any]) -> None:
        wanted = self._head([])
        for name, value in wanted["identity"].items():
            found = head["identity"].get(name)
            if found != value:
                raise MechguardError(
                    f"{self.folder} holds other states: their {name} is {_short(found)}, "
                    f"wanted {_short(value)}; give another folder, or remove this one"
                )
        if head["size"] != self.size or head["shape"] != wanted["shape"]:
            raise MechguardError(
                f"{self.folder} holds {head['shape']} in shards of {head['size']} prompts; wanted "
                f"{wanted['shape']} in shards of {self.size}; give another folder, or the same shard_size"
            )

    def _known(self) -> dict[int, str]:
        """The shards that are there, and the checksums that were noted for them."""
        sums = dict(enumerate(_checked_head(self.folder)["shards"]))
        for path in sorted(self.folder.glob(".done-*.jsonl")):
            sums.update((line["shard"], line["sha256"]) for line in read_lines(path))
        return {number: found for number, found in sums.items() if shard_file(self.folder, number).is_file()}

    def _check(self, numbers: Sequence[int], sums: dict[int, str]) -> None:
        every = tuple(sums.get(number, "") for number in range(len(self.spans)))
        shards = Shards(self.folder, self.shape, self.size, every)
        for number in numbers:
            shards.check(number)

    def _write(self, number: int, states: Float[Tensor, "layer prompt d_model"]) -> None:
        from safetensors.torch import save

        content = save({"data": states.to("cpu", torch.float32).contiguous()})
        try:
            write_bytes(shard_file(self.folder, number), content)
            note = {"shard": number, "sha256": hashlib.sha256(content).hexdigest()}
            append_line(self.folder / f".done-{self.processes.rank}.jsonl", note)
        except OSError as error:
            raise MechguardError(
                f"shard {number} of {self.folder} cannot be written ({error}); those before it are kept: "
                "make room and run the same collect again"
            ) from None

    def _complete(self) -> None:
        known = self._known()
        write_json(self.folder / HEAD, self._head([known[number] for number in range(len(self.spans))]))
        for path in self.folder.glob(".done-*.jsonl"):
            path.unlink()

    def _head(self, sums: list[str]) -> dict[str, Any]:
        facts = {
            "identity": self.identity,
            **self.facts,
            "shape": self.shape,
            "size": self.size,
            "prompts": hashlib.sha256(self.prompts).hexdigest(),
            "shards": sums,
        }
        known = json.loads(json.dumps(facts, default=str))
        return {"kind": KIND, "facts": digest(known), **known}


def is_store(path: Path) -> bool:
    """Whether states were collected into this folder."""
    return (path / HEAD).is_file()


def read_head(folder: Path) -> tuple[Shards, dict[str, Any], list[dict[str, Any]]]:
    """The shards of a complete store, what is known about them, and the prompts as rows.

    Raises:
        MechguardError: the store is not complete, or one of its files is not what was written.
    """
    head = _checked_head(folder)
    layers, prompts, width = head["shape"]
    wanted = -(-prompts // head["size"])
    if len(head["shards"]) != wanted:
        raise MechguardError(
            f"the collection into {folder} was not finished ({_count(folder)} of {wanted} shards are there); "
            "run the same collect again, which goes on where it stopped"
        )
    file = folder / PROMPTS
    content = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(content).hexdigest() != head["prompts"]:
        raise MechguardError(
            f"{file} is missing or not the file that was written; remove it and run the same collect again"
        )
    rows = [json.loads(line) for line in content.decode().splitlines()]
    return Shards(folder, (layers, prompts, width), head["size"], tuple(head["shards"])), head, rows


def read_store(
    folder: Path, *, check: bool = True
) -> tuple[StoredStates, dict[str, Any], list[dict[str, Any]]]:
    """The states of a store, what is known about them, and the prompts as rows.

    Args:
        check: compare every shard with its checksum now; otherwise each when it is first read from.

    Raises:
        MechguardError: the store is not complete, or one of its files is missing or not what was written.
    """
    shards, head, rows = read_head(folder)
    for number in range(len(shards.sums)):
        if check:
            shards.check(number)
        elif not shard_file(folder, number).is_file():
            raise MechguardError(f"{shard_file(folder, number)} is missing; run the same collect again")
    return StoredStates.of(shards), head, rows


def shard_size_for(n_layers: int, d_model: int) -> int:
    """How many prompts a shard holds by default: about 64 MB of states."""
    smallest, largest = SHARD_LIMITS
    return min(max(SHARD_BYTES // (4 * n_layers * d_model), smallest), largest)


def shard_file(folder: Path, number: int) -> Path:
    """The file of one shard."""
    return folder / f"states-{number:05d}.safetensors"


def file_sum(path: Path) -> str:
    """The SHA-256 of a file, read block by block."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_texts(texts: Iterable[str]) -> str:
    """A short hash of strings in their order."""
    state = hashlib.sha256()
    for text in texts:
        state.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
    return state.hexdigest()[:16]


def _checked_head(folder: Path) -> dict[str, Any]:
    head = read_json(folder / HEAD)
    if not isinstance(head, dict) or head.get("kind") != KIND:
        raise MechguardError(f"{folder / HEAD} is not the head of a store of states; give the folder of one")
    known = {name: value for name, value in head.items() if name not in ("kind", "facts")}
    if head.get("facts") != digest(known):
        raise MechguardError(
            f"{folder / HEAD} is not the file that was written; collect into a new folder, or bring back "
            "a copy"
        )
    return known


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.glob("states-*.safetensors"))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
