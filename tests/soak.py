"""A soak: guarded answers, one after the other, in one process; memory stays flat and no hook stays behind.

    python tests/soak.py --count 2000

Half of them are traced, half run under attached hooks; every fourth goes beside a picture.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys

import psutil
import tiny
from torch import nn

import mechguard as mg

WARM = 0.15  # the share of the run after which memory counts


def count_hooks(model: nn.Module) -> int:
    """All hooks on all modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def run(count: int, vlm: mg.VLM | None = None) -> dict[str, object]:
    """Answer `count` prompts, one at a time, under a guard; what was left behind."""
    model = vlm or mg.load(tiny.llava(), processor=tiny.processor())
    prompts = tiny.prompts(pairs=8)
    ssd = mg.fit_directions(mg.collect(model.llm, prompts, progress=False))
    guards = [
        mg.vlm_guard(ssd, layers=[1], gate="always", source=source) for source in ("llm-stream", "last")
    ]
    mg.generate(
        model, prompts[:1], max_new_tokens=1, progress=False
    )  # nnsight's own hooks come with its view
    hooks, process, memory, objects = count_hooks(model.hf_model), psutil.Process(), [], []
    for number in range(count):
        sent = prompts[number % len(prompts) :][:1].with_image("blank" if number % 4 == 0 else "none")
        if number % 2:
            mg.generate(model, sent, guard=guards[number % 4 == 1], max_new_tokens=3, progress=False)
        else:
            with guards[1].attach(model, sent) as hf_model:
                hf_model.generate(**model.encode(list(sent)), max_new_tokens=3, do_sample=False)
        if number % max(1, count // 100) == 0:
            gc.collect()
            memory.append(process.memory_info().rss)
            objects.append(len(gc.get_objects()))
    warm = int(WARM * len(memory))
    third = max(1, (len(memory) - warm) // 3)
    early, late = sum(memory[warm : warm + third]) / third, sum(memory[-third:]) / third
    return {
        "generations": count,
        "memory early, MB": round(early / 1e6, 1),
        "memory late, MB": round(late / 1e6, 1),
        "memory grew by": round(late / early - 1, 4),
        "largest after warm-up over smallest": round(max(memory[warm:]) / min(memory[warm:]) - 1, 4),
        "objects early and late": [objects[warm], objects[-1]],
        "hooks before and after": [hooks, count_hooks(model.hf_model)],
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    found = run(parser.parse_args().count)
    print(json.dumps(found, indent=1))
    before, after = found["hooks before and after"]
    return int(abs(float(str(found["memory grew by"]))) > 0.05 or before != after)


if __name__ == "__main__":
    sys.exit(main())
