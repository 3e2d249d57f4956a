"""Files that are either whole or absent, and checked when they are read back.

Tensors are stored as safetensors, what is known about them as JSON beside them; the JSON carries the
SHA-256 of the tensor file and of itself, so that a truncated or altered file is noticed. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mechguard.errors import MechguardError

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = ("mechguard", "torch", "transformers", "nnsight", "scikit-learn", "numpy")
BLOCK = 1 << 16  # bytes looked at in one go from the end of a file


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a file under a temporary name, flush it to disk and rename it into place."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write JSON atomically, keys in the order given."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def append_line(path: str | os.PathLike[str], value: Any) -> None:
    """Add one line of JSON to a file and flush it to disk."""
    append_lines(path, [value])


def append_lines(path: str | os.PathLike[str], values: Iterable[Any]) -> None:
    """Add lines of JSON to a file and flush them to disk together."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("ab+") as file:
        _cut_unfinished(file)
        for value in values:
            file.write((json.dumps(value, ensure_ascii=False, default=str) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: str | os.PathLike[str]) -> list[Any]:
    """Read what `append_line` wrote; a last line that was cut off by a kill is left out.

    Raises:
        MechguardError: a line before the last is not JSON.
    """
    target = Path(path)
    content = target.read_bytes() if target.is_file() else b""
    found = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            found.append(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise MechguardError(
                f"line {number} of {target} is not readable JSON; take it out, and its cell is measured again"
            ) from None
    return found


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
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MechguardError(f"there is no file {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MechguardError(f"{path} is not readable JSON ({error}); write it again") from None


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
    """Read what `save_tensors` wrote.

    Raises:
        MechguardError: a file is missing, of another kind, or not what was written.
    """
    from safetensors.torch import load

    stem = _stem(path)
    facts = read_json(stem.with_name(stem.name + ".json"))
    if not isinstance(facts, dict) or facts.get("kind") != kind:
        found = facts.get("kind", "something else") if isinstance(facts, dict) else "something else"
        raise MechguardError(f"{stem}.json holds {found}, not {kind}; give the path of saved {kind}")
    file = stem.with_name(stem.name + ".safetensors")
    if not file.is_file():
        raise MechguardError(f"{file} is missing beside its .json; save the {kind} again")
    sums = {name: facts.pop(name, None) for name in ("kind", "sha256", "facts")}
    if digest(facts) != sums["facts"]:
        raise MechguardError(f"{stem}.json is not the file that was saved; save the {kind} again")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != sums["sha256"]:
        raise MechguardError(
            f"{file} is not the file that was saved (its checksum differs); save the {kind} again"
        )
    return load(content), facts


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
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_name(name: str) -> str:
    """A name as a file's; where letters had to go, a mark keeps it apart from others."""
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
    return plain if plain == name else f"{plain[:60]}-{digest(name)[:6]}"


def _stem(path: str | os.PathLike[str]) -> Path:
    stem = Path(path)
    return stem.with_suffix("") if stem.suffix in {".json", ".safetensors"} else stem


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
