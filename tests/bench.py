"""What tracing costs beside plain transformers, on the organism, in one run: medians of ratios.

python tests/bench.py [--out benchmarks.json] [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import torch

import mechguard as mg
from mechguard.storage import write_json

BATCH = 100


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(name: str, work: Callable[[], object], plain: Callable[[], object], rounds: int) -> dict:
    """The ratio of two pieces of work, timed in turns so that a slow moment hits both."""
    work(), plain()  # warm
    ratios = [seconds(work) / seconds(plain) for _ in range(rounds)]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {"name": name, "ratio": float(np.median(ratios)), "low": low, "high": high, "n": rounds}


def plain_forward(vlm: mg.VLM, prompts: mg.Prompts) -> None:
    with torch.no_grad():
        vlm.hf_model(**vlm.encode(list(prompts)), use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks.json")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    vlm = mg.load("organism")
    anchors = mg.load_prompts("organism/anchors")
    blank = mg.load_prompts("organism/malicious")[:BATCH].with_image("blank")
    ssd = mg.fit_directions(mg.collect(vlm.llm, anchors, progress=False), rank=4)
    every_layer = range(vlm.n_layers)
    quiet = {"progress": False, "batch_size": BATCH}
    answering = {**quiet, "max_new_tokens": 24, "min_new_tokens": 24}

    def generate(guard: mg.Guard | None) -> list[str]:
        return mg.generate(vlm, blank, guard=guard, **answering)

    cases = {
        "collect, last token of all layers / plain forward": (
            lambda: mg.collect(vlm, blank, **quiet),
            lambda: plain_forward(vlm, blank),
        ),
        "generate with a rank-4 projection at all layers / plain generate": (
            lambda: generate(mg.projection(ssd, layers=every_layer)),
            lambda: generate(None),
        ),
        "generate with VLM-Guard, LLM held / plain generate": (
            lambda: generate(mg.vlm_guard(ssd, layers=every_layer, source="llm")),
            lambda: generate(None),
        ),
        "generate with VLM-Guard, LLM stream / plain generate": (
            lambda: generate(mg.vlm_guard(ssd, layers=every_layer, source="llm-stream")),
            lambda: generate(None),
        ),
    }
    rows = [compare(name, *works, options.rounds) for name, works in cases.items()]
    for row in rows:
        print(f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}] n={row['n']}  {row['name']}")
    write_json(options.out, rows)


if __name__ == "__main__":
    main()
