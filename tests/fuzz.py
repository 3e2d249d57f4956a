"""Altered files: thousands of mutated guard, directions, activation, result, response and prompt files.

    python tests/fuzz.py --count 10000

Each is read and used. What may happen: it is read, or `MechguardError` is raised. What may not: another
error, a crash, code that runs, a process that starts, a file elsewhere that is opened or written, or more
memory than twice the file's length beside a fixed allowance. Half of the mutated files have their checksums
made good again, so that what stands behind the checksums is tried too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tiny
import torch
from PIL import Image

import mechguard as mg
from mechguard.report import describe_parameters
from mechguard.responses import as_exchanges
from mechguard.storage import digest, write_lines

ALLOWANCE = 1 << 20  # bytes that reading any file may take, such as the buffers of a parser
FORBIDDEN = (
    "exec",
    "compile",
    "pickle.find_class",
    "os.system",
    "os.exec",
    "subprocess.Popen",
    "socket.connect",
)
WORDS = (None, True, -1, 0, 1e308, 10**30, "", "x" * 300, "../../../etc/passwd", "/etc/passwd", "\0",
         "\ud800", "<script>alert(1)</script>", [], {}, [[[[[]]]]], {"__class__": "os.system"},
         float("nan"))  # fmt: skip


def make(folder: Path) -> dict[str, tuple[list[Path], Callable[[], object]]]:
    """A file of every kind, and how it is read and used."""
    torch.manual_seed(0)
    Image.init()  # Pillow imports its readers late
    prompts = tiny.prompts(pairs=4)
    labels = [int(prompt.label == "harmful") for prompt in prompts]
    states = mg.Activations(torch.randn(2, 8, 6), [0, 1], prompts, {"model": "m", "view": "llm"})
    states.save(folder / "states")
    ssd = mg.fit_directions(
        mg.Activations.from_tensor(states.data, labels=labels, pairs=[0, 0, 1, 1, 2, 2, 3, 3])
    )
    ssd.save(folder / "ssd")
    guard = mg.vlm_guard(ssd, layers=[0, 1])
    guard.save(folder / "guard")
    (guard | mg.self_reminder() | mg.mars(states, states, layers=[1])).save(folder / "chain")
    rows = [
        dict(guard="none", metric="auroc", layer=n, value=n / 7, low=0.0, high=1.0, n=9) for n in range(6)
    ]
    mg.Result.from_rows(rows, model="m", seed=1).save(folder / "table")
    answers = [dict(key=str(n), setting="s", condition="text", guard="none", id=str(n), label="harmful",
                    request="how?", response="so", tokens=2, gates={}) for n in range(5)]  # fmt: skip
    write_lines(folder / "responses.jsonl", answers)
    (folder / "responses.json").write_text('{"model": {"fingerprint": "f"}, "responses": 5}')
    prompts.save(folder / "prompts.jsonl")
    prompts.to_pandas().to_csv(folder / "prompts.csv", index=False)
    (folder / "list.json").write_text(json.dumps(prompts.to_rows()))

    def use_states() -> object:
        found = mg.Activations.load(folder / "states")
        return repr(found), found.labels, found.name, found.prompts.fingerprint, found.data.sum()

    def use_directions() -> object:
        found = mg.Directions.load(folder / "ssd")
        return repr(found), found.name, found.randomised().data, found.at(found.layers[0])

    def use_guard(kind: type, name: str) -> object:
        found = kind.load(folder / name)
        return repr(found), found._repr_html_(), found.fingerprint, found.about, found.layers

    def use_result() -> object:
        found = mg.Result.load(folder / "table")
        return found._repr_html_(), len(found), describe_parameters(found.about), found.table.to_csv()

    def use_prompts(name: str) -> object:
        found = mg.load_prompts(folder / name)
        return repr(found), found._repr_html_(), found.fingerprint, found.find_unreadable()

    def pair(name: str) -> list[Path]:
        return [folder / f"{name}.json", folder / f"{name}.safetensors"]

    return {
        "activations": (pair("states"), use_states),
        "directions": (pair("ssd"), use_directions),
        "guard": (pair("guard"), lambda: use_guard(mg.Guard, "guard")),
        "chain": (pair("chain"), lambda: use_guard(mg.Chain, "chain")),
        "result": ([folder / "table.csv", folder / "table.json"], use_result),
        "responses": (
            [folder / "responses.jsonl", folder / "responses.json"],
            lambda: as_exchanges(mg.read_responses(folder / "responses.jsonl").assign(label="harmful")),
        ),
        "prompts, jsonl": ([folder / "prompts.jsonl"], lambda: use_prompts("prompts.jsonl")),
        "prompts, csv": ([folder / "prompts.csv"], lambda: use_prompts("prompts.csv")),
        "prompts, json": ([folder / "list.json"], lambda: use_prompts("list.json")),
    }


# ------------------------------------------------------------------------------------ mutations


def mutate(content: bytes, suffix: str, chance: random.Random) -> bytes:
    """One to three mutations of a file."""
    for _ in range(chance.randint(1, 3)):
        ways = [flip, cut, insert, repeat, overwrite]
        if suffix in (".json", ".jsonl"):
            ways += [change_json] * 4
        if suffix == ".safetensors":
            ways += [change_header] * 4
        content = chance.choice(ways)(content, chance)
    return content


def flip(content: bytes, chance: random.Random) -> bytes:
    if not content:
        return b"\x00"
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


def cut(content: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(content))
    return (
        content[:start]
        if chance.random() < 0.5
        else content[:start] + content[start + chance.randint(1, 64) :]
    )


def insert(content: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(content))
    junk = chance.choice(
        [chance.randbytes(8), b"\0" * 16, b'"' * 3, b"\xff\xfe", b"[" * 5000, b"9" * 5000, b"\r"]
    )
    return content[:start] + junk + content[start:]


def repeat(content: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(content))
    return content[:start] + content[start : start + chance.randint(1, 200)] * 3 + content[start:]


def overwrite(content: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(content))
    return content[:start] + chance.randbytes(chance.randint(1, 16)) + content[start + 16 :]


def change_json(content: bytes, chance: random.Random) -> bytes:
    """Another value, key or shape somewhere in a JSON file, or in one of its lines."""
    lines = content.split(b"\n")
    whole = content.lstrip()[:2] in (b"{\n", b"[\n") or len(lines) < 2
    place = 0 if whole else chance.randrange(len(lines))
    try:
        value = json.loads(content if whole else lines[place])
    except (ValueError, RecursionError):
        return flip(content, chance)
    text = json.dumps(change(value, chance)).encode()
    return text if whole else b"\n".join([*lines[:place], text, *lines[place + 1 :]])


def change(value: object, chance: random.Random) -> object:
    """The same value with something else in one of its places."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        if chance.random() < 0.15:
            return {name: kept for name, kept in value.items() if name != key}
        return {**value, key: change(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        place = chance.randrange(len(value))
        if chance.random() < 0.2:
            return value[:place] + value[place + 1 :]
        return [*value[:place], change(value[place], chance), *value[place + 1 :]]
    return chance.choice(WORDS)


def change_header(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file that says another length, shape, type or place of its tensors."""
    if chance.random() < 0.2:
        return struct.pack("<Q", chance.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1])) + content[8:]
    try:
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        name = chance.choice([key for key in header if key != "__metadata__"])
        tensor = header[name]
        way = chance.randrange(4)
        if way == 0:
            tensor["shape"] = chance.choice([[2**40], [0, 2**40], [2**62, 4], [], [-1], tensor["shape"][::-1],
                                             [*tensor["shape"], 1], tensor["shape"][1:]])  # fmt: skip
        elif way == 1:
            tensor["dtype"] = chance.choice(["F64", "I64", "F16", "BF16", "F8_E4M3", "BOOL", "C64", "X9", 3])
        elif way == 2:
            tensor["data_offsets"] = chance.choice([[0, 2**50], [2**63, 2**64], [5, 1], [0, 0], "x"])
        else:
            header[chance.choice(["data", "../x", "move.basis", ""])] = header.pop(name)
        text = json.dumps(header).encode()
    except (ValueError, KeyError, IndexError, TypeError, struct.error, AttributeError):
        return flip(content, chance)
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def make_good(files: list[Path]) -> None:
    """Checksums that fit what the files now hold."""
    for file in files:
        try:
            if file.suffix == ".jsonl" and file.stem == "responses":
                rows = [json.loads(line) for line in file.read_bytes().split(b"\n") if line.strip()]
                for row in rows:
                    row.pop("crc32", None)
                write_lines(file, rows)
            if file.suffix == ".json" and file.stem not in ("list", "responses"):
                facts = json.loads(file.read_bytes())
                if "table" in facts:
                    table = file.with_suffix(".csv").read_bytes()
                    facts["table"]["sha256"] = hashlib.sha256(table).hexdigest()
                else:
                    tensors = file.with_suffix(".safetensors").read_bytes()
                    known = {key: facts[key] for key in facts if key not in ("kind", "sha256", "facts")}
                    facts |= {"sha256": hashlib.sha256(tensors).hexdigest(), "facts": digest(known)}
                file.write_text(json.dumps(facts))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
            continue


# ------------------------------------------------------------------------------------- watching


class Watch:
    """What happens while a file is read: Python's own audit events."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on, self.seen = str(folder), False, []
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.on:
            return
        if event in FORBIDDEN and not self.is_import(event, arguments):
            self.seen.append(f"{event} {arguments!r:.80}")
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path, writes = (
                os.fsdecode(arguments[0]),
                isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"),
            )
            outside = not path.startswith(self.folder) and not path.startswith((sys.prefix, sys.base_prefix))
            if outside or writes:
                self.seen.append(f"open {path!r} {arguments[1]!r}")

    def is_import(self, event: str, arguments: tuple[object, ...]) -> bool:
        """Whether Python runs a module of its own, such as a codec, for the first time."""
        file = (
            str(getattr(arguments[0], "co_filename", arguments[-1])) if event in ("exec", "compile") else ""
        )
        return file.startswith((sys.prefix, sys.base_prefix, "<frozen"))

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.on, self.seen = True, []
        try:
            yield
        finally:
            self.on = False


def run(count: int, seed: int = 0) -> dict[str, object]:
    """Mutate and read `count` files; what happened, and everything that must not have."""
    chance = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    kinds = make(folder)
    watch = Watch(folder)
    warnings.simplefilter("ignore")
    for _, use in kinds.values():
        use()  # what is imported on first use is imported now
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    most = 0
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    for number in range(count):
        name = list(kinds)[number % len(kinds)]
        files, use = kinds[name]
        kept = {file: file.read_bytes() for file in files}
        changed = chance.choice(files)
        changed.write_bytes(mutate(kept[changed], changed.suffix, chance))
        if chance.random() < 0.5:
            make_good(files)
        length = sum(file.stat().st_size for file in files)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            with watch.watching():
                use()
            outcome = "read"
        except mg.MechguardError:
            outcome = "refused"
        except BaseException as error:
            outcome = "wrong"
            wrong.append(f"{number} {name}: {type(error).__name__}: {str(error)[:200]}")
        grown = tracemalloc.get_traced_memory()[1] - before
        most = max(most, grown - 2 * length)
        if grown > 2 * length + ALLOWANCE:
            wrong.append(f"{number} {name}: {grown} bytes of memory for a file of {length}")
        wrong += [f"{number} {name}: {event}" for event in watch.seen]
        outcomes[f"{name}: {outcome}"] += 1
        for file, content in kept.items():
            file.write_bytes(content)
    tracemalloc.stop()
    shutil.rmtree(folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started
    return {"outcomes": dict(sorted(outcomes.items())), "wrong": wrong, "above twice the file": most,
            "resident memory grew by kB": grown}  # fmt: skip


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = run(options.count, options.seed)
    print(json.dumps({**found, "count": options.count}, indent=1))
    return bool(found["wrong"])


if __name__ == "__main__":
    sys.exit(main())
