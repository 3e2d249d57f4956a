"""Long runs at toy size, each a function of its folder, for tests that kill them."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import tiny

import mechguard as mg
from mechguard import protocol
from mechguard.organism import measurement, train, training
from mechguard.organism.recipe import TINY_RECIPE
from mechguard.protocol import Options, run_protocol
from mechguard.storage import read_lines

PROMPTS = tiny.prompts(pairs=6)
OPTIONS = Options(
    guards=("vlm_guard, at the prompt", "self_reminder"),
    conditions=("text", "blank", "noise"),
    limit=4,
    validation_limit=2,
    max_new_tokens=3,
)
TIMES = ("costs.csv",)  # tables of times, which no two runs share


def evaluate(vlm: mg.VLM, data: Path, out: Path) -> None:
    guards = [None, mg.projection(directions(vlm), layers=[1]), mg.self_reminder()]
    settings = dict(conditions=["text", "blank"], max_new_tokens=3, batch_size=4, progress=False)
    mg.evaluate(vlm, PROMPTS, guards=guards, responses=out / "r.jsonl", **settings).save(out / "table")


def sweep(vlm: mg.VLM, data: Path, out: Path) -> None:
    settings = dict(conditions=["text"], max_new_tokens=2, progress=False)
    grid = dict(layers=[[1], [0, 1]], alphas=[1.0], variants=None)
    mg.sweep(vlm, PROMPTS, directions(vlm), out=out / "cells.jsonl", **grid, **settings).save(out / "sweep")


def compare(vlm: mg.VLM, data: Path, out: Path) -> None:
    sets = dict(anchors=PROMPTS, validation=PROMPTS, tests={"test": PROMPTS})
    settings = dict(conditions=("text", "blank"), limit=2, limit_tests=2, max_new_tokens=2, progress=False)
    mg.compare_guards(vlm, out=out, methods=["projection", "self_reminder"], **sets, **settings)


def follow_protocol(vlm: mg.VLM, data: Path, out: Path) -> None:
    protocol.REFUSAL_OPENINGS = ("sorry", "i")  # the toy vocabulary has no others
    run_protocol(vlm, out=out, data=data, judges=("keywords", "qi"), options=OPTIONS, progress=False)


def study(vlm: mg.VLM, data: Path, out: Path) -> None:
    mg.run_study(vlm, out=out, data=data, max_rank=1, max_new_tokens=2, progress=False)


def train_organism(vlm: mg.VLM, data: Path, out: Path) -> None:
    load = measurement.load_questions
    measurement.load_questions = lambda *setting: load(*setting)[:2]
    measurement.visual_accuracy = lambda model: {"reading": 1.0, "scene_question": 1.0, "description": 1.0}
    training.Checkpoint.seconds = 0.0
    training.Checkpoint.__init__.__defaults__ = (0.0, *training.Checkpoint.__init__.__defaults__[1:])
    train.train(3, out, TINY_RECIPE, quiet=True)


JOBS: dict[str, Callable[[mg.VLM, Path, Path], None]] = {
    "evaluate": evaluate,
    "sweep": sweep,
    "compare": compare,
    "protocol": follow_protocol,
    "study": study,
    "train": train_organism,
}


def directions(vlm: mg.VLM) -> mg.Directions:
    return mg.fit_directions(mg.collect(vlm.llm, PROMPTS, progress=False))


def outputs(folder: Path) -> dict[str, object]:
    """What a run leaves that must not differ: tables and weights by their bytes, responses but for times."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix in (".csv", ".safetensors") and file.name not in TIMES:
            found[name] = file.read_bytes()
        if file.suffix == ".jsonl":
            rows = [
                {key: value for key, value in row.items() if key != "seconds"} for row in read_lines(file)
            ]
            found[name] = sorted(json.dumps(row) for row in rows)
    return found


def main() -> None:
    """Import once, then fork a run for every line that comes in, so that a kill costs no second start.

    A line is a job, a folder, and the number of the file operation to die at (0 for none). Printed are the
    child's id, then its status and how many file operations it had made.
    """
    vlm, data = mg.load(sys.argv[1]), Path(sys.argv[2])
    for line in sys.stdin:
        job, out, last = line.split()
        child = os.fork()
        if child == 0:
            count = count_operations(int(last))
            try:
                JOBS[job](vlm, data, Path(out))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            Path(f"{out}.count").write_text(str(count()))
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


def count_operations(last: int) -> Callable[[], int]:
    """Count what makes files last, and die before the one numbered `last`."""
    made = [0]

    def counted(operation: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            made[0] += 1
            if made[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **options)

        return call

    for name in ("fsync", "replace", "chmod"):
        setattr(os, name, counted(getattr(os, name)))
    return lambda: made[0]


if __name__ == "__main__":
    main()
