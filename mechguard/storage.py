"""Files that are either whole or absent, and checked when they are read back.

Tensors are stored as safetensors, what is known about them as JSON beside them; the JSON carries the
SHA-256 of the tensor file and of itself, so that a truncated or altered file is noticed. What grows during a
run is a file of JSON lines, each with its own checksum. Nothing is pickled.

A file is written under a temporary name, flushed to disk and renamed. A run holds its folder (`hold_folder`),
so that a second process is refused; whoever holds it sweeps up the temporary files of runs that were killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from zlib import crc32

from mechguard.errors import DiskError, MechguardError, first_line

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = ("mechguard", "torch", "transformers", "nnsight", "scikit-learn", "numpy")
BLOCK = 1 << 16  # bytes looked at in one go from the end of a file
NUMBERS = ("torch.float32", "torch.float64", "torch.bfloat16", "torch.float16")
UNFINISHED = ".unfinished"  # ends the temporary name of a file that is being written
CHECK = "crc32"  # the last entry of every line: the checksum of the line without it
CHECKED = re.compile(rb'(.*?)(?:, )?"crc32": "([0-9a-f]{8})"\}', re.DOTALL)
# What parsing a file that is not what it says may raise.
UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, RecursionError,
              OverflowError)  # fmt: skip


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a file under a temporary name, flush it to disk and rename it into place.

    Raises:
        DiskError: it cannot be written; the old file is as it was.
    """
    target = Path(path)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name}.", suffix=UNFINISHED
        )
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
            _flush_folder(target.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return target


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text atomically; half of a surrogate pair, which UTF-8 has no bytes for, becomes "?"."""
    return write_bytes(path, text.encode(errors="replace"))


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write JSON atomically, keys in the order given."""
    return write_bytes(path, encode_json(value, indent=1) + b"\n")


def write_lines(path: str | os.PathLike[str], values: Iterable[Any]) -> Path:
    """Write a whole file of JSON lines atomically, each line with its checksum."""
    return write_bytes(path, b"".join(map(_as_line, values)))


def append_line(path: str | os.PathLike[str], value: Any) -> None:
    """Add one line of JSON to a file and flush it to disk."""
    append_lines(path, [value])


def append_lines(path: str | os.PathLike[str], values: Iterable[Any]) -> None:
    """Add lines of JSON to a file, each with its checksum, and flush them to disk together.

    Raises:
        DiskError: they cannot be written; the lines before them are as they were.
    """
    target = Path(path)
    content = b"".join(map(_as_line, values))
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        new = not target.exists()
        with target.open("ab+", buffering=0) as file:
            _cut_unfinished(file)
            written = 0
            while written < len(content):  # a disk that is nearly full takes a part
                written += file.write(content[written:]) or 0
            os.fsync(file.fileno())
        if new:
            _flush_folder(target.parent)


def read_lines(
    path: str | os.PathLike[str], *, needed: Sequence[str] = (), adding: bool = False
) -> list[Any]:
    """Read what `append_lines` wrote; a last line that was cut off by a kill is left out.

    Args:
        needed: names that every line must hold.
        adding: whether lines are to be added: then a last line without an end is left out even if it can be
            read, for it will be cut off.

    Raises:
        MechguardError: a line before the last is damaged. A file in which no line has a checksum was not
            written here, and is taken as it is.
    """
    target = Path(path)
    content = target.read_bytes() if target.is_file() else b""
    *lines, last = content.split(b"\n")
    checked = any(CHECKED.fullmatch(line) for line in lines)
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(_read_line(line, checked, needed))
        except UNREADABLE as error:
            raise MechguardError(
                f"line {number} of {target} is damaged ({first_line(error)}); delete that line, and what it "
                "held is measured again"
            ) from None
    if last.strip() and not adding:
        with suppress(*UNREADABLE):
            found.append(_read_line(last, checked, needed))
    return found


def encode_json(value: Any, indent: int | None = None) -> bytes:
    """JSON as UTF-8."""
    options: dict[str, Any] = {"indent": indent, "default": str}
    try:
        return json.dumps(value, ensure_ascii=False, **options).encode()
    except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8, but a JSON escape
        return json.dumps(value, **options).encode()


def _as_line(value: Any) -> bytes:
    text = encode_json(value)
    if not isinstance(value, dict):
        return text + b"\n"
    comma = b", " if value else b""
    return text[:-1] + comma + f'"{CHECK}": "{crc32(text):08x}"}}\n'.encode()


def _read_line(line: bytes, checked: bool, needed: Sequence[str]) -> Any:
    if match := CHECKED.fullmatch(line):
        text = match[1] + b"}"
        if f"{crc32(text):08x}".encode() != match[2]:
            raise ValueError("its checksum differs")
    elif checked:
        raise ValueError("it has no checksum, as the others do")
    else:
        text = line
    value = json.loads(text)
    if needed and not isinstance(value, dict):
        raise ValueError("it is not an object")
    if missing := [name for name in needed if name not in value]:
        raise ValueError(f"it has no {missing[0]!r}")
    return value


def _cut_unfinished(file: IO[bytes]) -> None:
    """Drop a last line that has no end."""
    end = file.seek(0, os.SEEK_END)
    kept = end
    while kept > 0:
        start = max(0, kept - BLOCK)
        file.seek(start)
        found = file.read(kept - start).rfind(b"\n")
        if found >= 0:
            kept = start + found + 1
            break
        kept = start
    if kept < end:
        file.truncate(kept)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; a missing or broken one is a `MechguardError`."""
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MechguardError(f"there is no file {path}") from None
    except OSError as error:
        raise MechguardError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise MechguardError(f"{path} is not readable JSON ({first_line(error)}); write it again") from None


@contextmanager
def parsing(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Turn whatever a file raises that is not what it says into a `MechguardError` that names it."""
    try:
        yield
    except MechguardError:
        raise
    except UNREADABLE as error:
        raise MechguardError(
            f"{path} does not hold {kind} as they are saved ({type(error).__name__}: {first_line(error)}); "
            f"save the {kind} again"
        ) from None


@contextmanager
def hold_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes from working in a run's folder until the block ends; one process may nest it.

    The lock is the system's and dies with the process, however that ends. What killed runs left half
    written in the folder is swept up.

    Raises:
        MechguardError: another process works there.
    """
    root = Path(folder)
    with _held(root / ".lock", root):
        for left in root.rglob(f".*{UNFINISHED}"):
            left.unlink(missing_ok=True)
        yield


@contextmanager
def hold_file(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Keep other processes from adding to a file of lines until the block ends; see `hold_folder`.

    None stands for no file, and holds nothing.
    """
    if path is None:
        yield
        return
    file = Path(path)
    with _held(file.with_name(f".{file.name}.lock"), file):
        for name in {file.name, f"{file.stem}.json"}:
            for left in file.parent.glob(f".{name}.*{UNFINISHED}"):
                left.unlink(missing_ok=True)
        yield


@contextmanager
def _held(lock: Path, place: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    with _writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=0, is_singleton=True)
        try:
            held.acquire()
        except Timeout:
            raise MechguardError(
                f"another process is at work on {place}; wait until it has ended, or give another place"
            ) from None
    try:
        yield
    finally:
        held.release()


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Say in one sentence that something could not be written."""
    try:
        yield
    except MechguardError:
        raise
    except OSError as error:
        raise DiskError(
            f"{target} cannot be written ({error.strerror or error}); what was written before it is kept, "
            "and the same call goes on from there once there is room"
        ) from error


def flush_tree(folder: str | os.PathLike[str]) -> None:
    """Flush every file below a folder to disk, for files that others wrote."""
    for path in [*Path(folder).rglob("*"), Path(folder)]:
        if path.is_dir():
            _flush_folder(path)
        else:
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a renamed file survives a crash of the machine."""
    with suppress(OSError):  # some systems cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> Path:
    """Write `path.safetensors` and `path.json`; the JSON names its kind and the tensors' checksum."""
    from safetensors.torch import save

    stem = _stem(path)
    # Cloned, for safetensors refuses tensors that share memory.
    content = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    write_bytes(stem.with_name(stem.name + ".safetensors"), content)
    known = json.loads(json.dumps(facts, default=str))
    record = {"kind": kind, "sha256": hashlib.sha256(content).hexdigest(), "facts": digest(known), **known}
    return write_json(stem.with_name(stem.name + ".json"), record)


def load_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote; takes as much memory as the file is long.

    Raises:
        MechguardError: a file is missing, of another kind, or not what was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    stem = _stem(path)
    place = stem.with_name(stem.name + ".json")
    facts = read_json(place)
    if not isinstance(facts, dict) or facts.get("kind") != kind:
        found = facts.get("kind", "something else") if isinstance(facts, dict) else "something else"
        raise MechguardError(f"{place} holds {str(found)[:80]}, not {kind}; give the path of saved {kind}")
    file = stem.with_name(stem.name + ".safetensors")
    if not file.is_file():
        raise MechguardError(f"{file} is missing beside its .json; save the {kind} again")
    sums = {name: facts.pop(name, None) for name in ("kind", "sha256", "facts")}
    with parsing(place, kind):
        if digest(facts) != sums["facts"]:
            raise MechguardError(f"{place} is not the file that was saved; save the {kind} again")
    if hash_file(file) != sums["sha256"]:
        raise MechguardError(
            f"{file} is not the file that was saved (its checksum differs); save the {kind} again"
        )
    try:
        return load_file(file), facts
    except (SafetensorError, OSError, *UNREADABLE) as error:
        raise MechguardError(
            f"{file} does not hold tensors ({first_line(error)}); save the {kind} again"
        ) from None


def check_numbers(tensor: Tensor) -> Tensor:
    """A tensor from a file, as float32.

    Raises:
        MechguardError: it holds something else.
    """
    if str(tensor.dtype) not in NUMBERS:
        raise MechguardError(f"found a tensor of {tensor.dtype}; wanted float32")
    return tensor.float()


def hash_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def versions() -> dict[str, str]:
    """The versions of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def digest(*parts: Any) -> str:
    """A short, stable SHA-256 of JSON-like values, to recognise the same data again."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def file_name(name: str) -> str:
    """A name as a file's; where letters had to go, a mark keeps it apart from others."""
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:60]
    return plain if plain == name and name else f"{plain}-{digest(name)[:6]}"


def _stem(path: str | os.PathLike[str]) -> Path:
    stem = Path(path)
    return stem.with_suffix("") if stem.suffix in {".json", ".safetensors"} else stem


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
