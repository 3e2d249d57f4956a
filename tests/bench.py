"""What mechguard costs beside plain transformers: every row timed in turns with its plain counterpart.

    python tests/bench.py                        # all rows; writes benchmarks.json
    python tests/bench.py --only collect_floor   # one row; the others in the file stay
    python tests/bench.py --clock cpu            # processor time: for a machine that others use too
    python tests/bench.py --list
    python tests/bench.py --markdown             # what benchmarks.json holds, as the README shows it

A row is the median over rounds with its 95% interval (by order statistics; of fewer than six rounds, their
whole range). The control is the plain work against itself: what is nearer to 1 than that cannot be told
here. A round times the work and the plain one directly after each other, in changing order. Models and
prompts are made here (`bench_models`): d 512 x 12 layers, vocabulary 8192, 200 prompts of 20-60 tokens,
batch 16, random weights, float32.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bench_models
import numpy as np
import torch
from PIL import Image
from scipy import stats

import mechguard as mg
from mechguard.guards import Scope
from mechguard.storage import read_json, write_json
from mechguard.sweeps import Variant
from mechguard.tracing import score_next_tokens

ROOT = Path(__file__).parents[1]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
BATCH = bench_models.BATCH
TOKENS = 24
ALPHAS = (-2.0, -1.0, 1.0, 2.0, 3.0)
QUIET = {"progress": False, "batch_size": BATCH}
Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        says: what is compared.
        bar: what the value should be at most (at least, for a speed-up); None for the control.
        measure: from a number of rounds to values, one a round.
        unit: "x" for a ratio of times, "x faster" for its inverse, "s" for seconds.
    """

    says: str
    bar: float | None
    measure: Callable[[int], list[float]]
    unit: str = "x"

    def met(self, value: float) -> bool:
        if self.bar is None:
            return True
        return value >= self.bar if self.unit == "x faster" else value <= self.bar


clock = time.perf_counter


def seconds(work: Work) -> float:
    started = clock()
    work()
    return clock() - started


def in_turns(work: Work, plain: Work, rounds: int) -> list[float]:
    """The ratio of two pieces of work, timed in turns so that a slow moment hits both."""
    work(), plain()  # warm
    ratios = []
    for number in range(rounds):
        if number % 2:
            other, own = seconds(plain), seconds(work)
        else:
            own, other = seconds(work), seconds(plain)
        ratios.append(own / other)
    return ratios


@cache
def llama() -> mg.VLM:
    return mg.load(bench_models.llama(), processor=bench_models.tokenizer(), template=None)


@cache
def llava() -> mg.VLM:
    return mg.load(bench_models.llava(), processor=bench_models.processor())


@cache
def texts() -> list[str]:
    return bench_models.texts()


@cache
def ssd() -> mg.Directions:
    """Any subspace will do: a guard costs the same whatever it holds."""
    drawn = torch.randn(
        bench_models.N_LAYERS, 4, bench_models.D_MODEL, generator=torch.Generator().manual_seed(0)
    )
    return mg.Directions.from_tensor(torch.linalg.qr(drawn.transpose(1, 2))[0].transpose(1, 2).contiguous())


def encode(model: mg.VLM, rows: Sequence[str]) -> dict[str, torch.Tensor]:
    return dict(model.tokenizer(list(rows), return_tensors="pt", padding=True))


def plain_pass(model: mg.VLM, rows: Sequence[str], *, sort: bool = True, whole: bool = False) -> None:
    """Plain transformers over all prompts: the decoder alone, or the model as it is called by default."""
    hf_model = model.hf_model
    if sort:
        counts = [len(ids) for ids in model.tokenizer(list(rows))["input_ids"]]
        rows = [rows[index] for index in sorted(range(len(rows)), key=counts.__getitem__)]
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            encoded = encode(model, rows[start : start + BATCH])
            places = (encoded["attention_mask"].cumsum(-1) - 1).clamp_min(0)
            if whole:
                hf_model(**encoded, position_ids=places)
            else:
                hf_model.base_model(**encoded, position_ids=places, use_cache=False)


def collect() -> None:
    mg.collect(llama(), texts(), **QUIET)


def collect_against(**options: Any) -> Callable[[int], list[float]]:
    return lambda rounds: in_turns(collect, lambda: plain_pass(llama(), texts(), **options), rounds)


def collect_on_the_organism(rounds: int) -> list[float]:
    model = mg.load("organism").llm
    prompts = (mg.load_prompts("organism/malicious") + mg.load_prompts("organism/benign"))[:: 300 // 200]
    prompts = prompts[: bench_models.PROMPTS]
    rendered = model.render(list(prompts))

    def work() -> None:
        forget(model)
        mg.collect(model, prompts, **QUIET)

    return in_turns(work, lambda: plain_pass(model, rendered), rounds)


def peak_memory(work: Work) -> int:
    """Bytes above what the process holds before, at the worst moment (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _kilobytes("VmRSS")
    work()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])


def memory_of_collect(rounds: int) -> list[float]:
    """In a process of its own, whose allocator gives back what is freed: else its fragments are counted."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # read when a process starts
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_memory_of_collect, (rounds,))
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _memory_of_collect(rounds: int) -> list[float]:
    collect(), plain_pass(llama(), texts())
    return [peak_memory(collect) / peak_memory(lambda: plain_pass(llama(), texts())) for _ in range(rounds)]


def pictured(count: int) -> mg.Prompts:
    """Prompts that own a picture each."""
    drawn = np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)
    rows = enumerate(zip(texts()[:count], drawn, strict=True))
    return mg.Prompts([mg.Prompt(str(i), text, own_image=Image.fromarray(one)) for i, (text, one) in rows])


def forget(model: mg.VLM) -> None:
    """Pictures and strings that the round before has left."""
    for known in (model, model.llm):
        for name in ("picture_features", "_strings"):
            vars(known).pop(name, None)


def three_views(rounds: int) -> list[float]:
    model, prompts = llava(), pictured(32)
    views = [prompts, prompts.with_image("blank"), prompts.with_image("image")]

    def shared() -> None:
        forget(model)
        for part, sent in zip((model.llm, model, model), views, strict=True):
            mg.collect(part, sent, **QUIET)

    def each() -> None:
        forget(model)
        counts = model.count_tokens(list(prompts))
        order = sorted(range(len(prompts)), key=counts.__getitem__)
        with torch.no_grad():
            for sent in views:
                for start in range(0, len(order), BATCH):
                    encoded = model.encode([sent[row] for row in order[start : start + BATCH]])
                    model.hf_model.base_model(**encoded, use_cache=False)

    return in_turns(shared, each, rounds)


def generate_plainly(model: mg.VLM, rows: Sequence[mg.Prompt]) -> None:
    encoded = model.encode(rows)
    with torch.no_grad():
        found = model.hf_model.generate(
            **encoded, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS
        )
    model.decode(found[:, encoded["input_ids"].shape[1] :])


def guarded(model: mg.VLM, prompts: Any, guard: mg.Guard) -> None:
    mg.generate(model, prompts, guard=guard, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **QUIET)


def everywhere() -> mg.Guard:
    return mg.projection(ssd(), layers=range(bench_models.N_LAYERS))


def control(rounds: int) -> list[float]:
    rows = mg.Prompts([mg.Prompt(text, text) for text in texts()[:BATCH]])
    return in_turns(lambda: generate_plainly(llama(), rows), lambda: generate_plainly(llama(), rows), rounds)


def generate_attached(rounds: int) -> list[float]:
    rows, guard = mg.Prompts([mg.Prompt(text, text) for text in texts()[:BATCH]]), everywhere()

    def attached() -> None:
        with guard.attach(llama()):
            generate_plainly(llama(), rows)

    return in_turns(attached, lambda: generate_plainly(llama(), rows), rounds)


def generate_traced(rounds: int) -> list[float]:
    rows = mg.Prompts([mg.Prompt(text, text) for text in texts()[:BATCH]])
    return in_turns(
        lambda: guarded(llama(), rows, everywhere()), lambda: generate_plainly(llama(), rows), rounds
    )


def generate_baked(rounds: int) -> list[float]:
    rows = mg.Prompts([mg.Prompt(text, text) for text in texts()[:BATCH]])
    baked = mg.ablation(ssd(), layer=0).bake(llama())
    return in_turns(lambda: generate_plainly(baked, rows), lambda: generate_plainly(llama(), rows), rounds)


def gated_guard(source: str) -> Callable[[int], list[float]]:
    """Beside the passes that it cannot do without: the prompt with its picture, its text, plain decoding."""

    def measure(rounds: int) -> list[float]:
        model, prompts = llava(), pictured(BATCH).with_image("image")
        guard = mg.vlm_guard(
            ssd(),
            layers=range(bench_models.N_LAYERS),
            source=source,
            gate="sign",
            scope=Scope("last", "both"),
        )
        plain_text = [prompt.text for prompt in prompts]

        def work() -> None:
            forget(model)
            guarded(model, prompts, guard)

        def plain() -> None:
            generate_plainly(model, list(prompts))
            plain_pass(model.llm, plain_text)

        return in_turns(work, plain, rounds)

    return measure


def first_token_sweep(positions: str) -> Callable[[int], list[float]]:
    """12 layers x 5 alphas; the full passes are timed with every layer once, and counted five times."""

    def measure(rounds: int) -> list[float]:
        model, rows = llama(), texts()[:BATCH]
        scope = Scope(positions, "both")
        cells = [
            mg.vlm_guard(ssd(), layers=[layer], alpha=alpha, source="own", gate="always", scope=scope)
            for alpha in ALPHAS
            for layer in range(bench_models.N_LAYERS)
        ]
        timed = cells[: bench_models.N_LAYERS]
        encoded = {**(found := encode(model, rows)), **model.position_ids(found)}
        prompts = mg.Prompts([mg.Prompt(str(i), text) for i, text in enumerate(rows)])
        found_full: list[torch.Tensor] = []

        def score(log_probabilities: torch.Tensor) -> torch.Tensor:
            return log_probabilities[:, 100]

        def shared() -> torch.Tensor:
            return score_next_tokens(model, prompts, cells, score, **QUIET)

        def full() -> None:
            found_full.clear()
            for guard in timed:
                with torch.no_grad(), guard.attach(model) as hf_model:
                    found_full.append(score(hf_model(**encoded).logits[:, -1].log_softmax(-1)))

        scores, _ = shared(), full()
        assert torch.allclose(scores[: len(timed)], torch.stack(found_full), atol=1e-5)
        return [len(ALPHAS) / ratio for ratio in in_turns(shared, full, rounds)]

    return measure


def generating_sweep(rounds: int) -> list[float]:
    """12 layers x 2 alphas, 8 new tokens; full answers are timed for six settings, and counted four times."""
    model, prompts = llava(), pictured(8).with_image("image")
    prompts = mg.Prompts([*prompts], name="pictures")
    layers = [[layer] for layer in range(bench_models.N_LAYERS)]
    reading = {"own": Variant("own", Scope("last", "both"), gate="always")}
    guards = [
        mg.vlm_guard(
            ssd().truncated(1),
            layers=one,
            alpha=1.0,
            source="own",
            gate="always",
            scope=Scope("last", "both"),
        )
        for one in layers[::2]
    ]

    def shared() -> None:
        forget(model)
        mg.sweep(
            model,
            prompts,
            ssd(),
            layers=layers,
            alphas=(1.0, 2.0),
            variants=reading,
            conditions=["image"],
            max_new_tokens=8,
            progress=False,
        )

    def full() -> None:
        for guard in guards:
            encoded = model.encode(list(prompts))
            with torch.no_grad(), guard.attach(model) as hf_model:
                model.decode(hf_model.generate(**encoded, do_sample=False, max_new_tokens=8))

    return [len(layers) * 2 / len(guards) / ratio for ratio in in_turns(shared, full, rounds)]


def study(processes: int) -> Callable[[int], list[float]]:
    """From nothing to the report, as a user starts it."""

    def run(rounds: int) -> list[float]:
        command = f"-m mechguard study organism --quiet --processes {processes} --out".split()
        with tempfile.TemporaryDirectory() as folder:
            return [_run(*command, f"{folder}/{number}") for number in range(rounds)]

    return run


def start_up(*arguments: str) -> Callable[[int], list[float]]:
    return lambda rounds: [_run(*arguments) for _ in range(rounds)]


def _run(*arguments: str) -> float:
    """The seconds that a process of its own takes."""
    before, started = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT)
    after, wall = os.times(), time.perf_counter() - started
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return wall if clock is time.perf_counter else used


def peer(name: str) -> Callable[[int], list[float]]:
    """Our collect over theirs, each beside the plain sorted forward in its own process."""

    def measure(rounds: int) -> list[float]:
        ours = _ours(rounds)
        python = PEERS_PYTHON if name in IN_THEIR_OWN else sys.executable
        command = [str(python), str(ROOT / "tests" / "bench_peers.py"), name, str(rounds)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return [ours / theirs for theirs in json.loads(done.stdout.splitlines()[-1])]

    return measure


@cache
def _ours(rounds: int) -> float:
    return float(np.median(collect_against(whole=True)(rounds)))


PEERS = ("nnsight", "transformer_lens", "transformer_lens_full_cache", "steering_vectors", "repeng", "pyvene")
IN_THEIR_OWN = ("steering_vectors", "repeng", "pyvene")  # their pins do not go with ours


ROWS = {
    "collect_floor": Row("collect / its floor: decoder only, sorted", 1.06, collect_against()),
    "collect_sorted": Row("collect / plain full forward, sorted", 0.98, collect_against(whole=True)),
    "collect_unsorted": Row(
        "collect / plain full forward, unsorted", 0.72, collect_against(whole=True, sort=False)
    ),
    "collect_organism": Row("collect on the organism / its floor", 1.25, collect_on_the_organism),
    "collect_memory": Row("extra peak memory of collect / of the floor", 1.3, memory_of_collect),
    "three_views": Row(
        "text, blank and image of the same prompts / the sum of their plain passes", 1.0, three_views
    ),
    "control": Row("control: plain generate / itself", None, control),
    "generate_attached": Row("generate, hooks, rank 4, all layers / plain", 1.03, generate_attached),
    "generate_traced": Row("generate, traced, rank 4, all layers / plain", 1.06, generate_traced),
    "generate_baked": Row("generate, baked / plain", 1.02, generate_baked),
    "gated_llm": Row("gated guard, LLM held / its passes", 1.05, gated_guard("llm")),
    "gated_stream": Row("gated guard, LLM reads along / the same passes", 1.05, gated_guard("llm-stream")),
    "sweep_all": Row(
        "first-token sweep, all positions, over full passes", 2.3, first_token_sweep("all"), "x faster"
    ),
    "sweep_last": Row(
        "first-token sweep, last position, over full passes", 10, first_token_sweep("last"), "x faster"
    ),
    "sweep_generate": Row(
        "sweep with answers to image prompts, over full ones", 2, generating_sweep, "x faster"
    ),
    "study": Row("the whole study on the organism, two processes", 90, study(2), "s"),
    "study_alone": Row("the same in one process", None, study(1), "s"),
    "import": Row("import mechguard", 0.3, start_up("-c", "import mechguard"), "s"),
    "help": Row("mechguard --help", 0.5, start_up("-m", "mechguard", "--help"), "s"),
    **{f"peer_{name}": Row(f"collect / {name.replace('_', ' ')}", 1.0, peer(name)) for name in PEERS},
}


def measured(name: str, rounds: int) -> dict[str, Any]:
    """One row as it is written down."""
    row = ROWS[name]
    values = row.measure(rounds)
    low, high = interval_of_median(values)
    value = float(np.median(values))
    facts = {"name": name, "says": row.says, "ratio": value, "low": low, "high": high}
    facts |= {"n": len(values), "unit": row.unit, "bar": row.bar, "met": row.met(value), "rounds": values}
    return {**facts, "clock": "wall" if clock is time.perf_counter else "cpu"}


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a median by order statistics; the whole range of fewer than six values."""
    ordered = sorted(values)
    outside = max(int(stats.binom.ppf(0.025, len(ordered), 0.5)) - 1, 0)
    return ordered[outside], ordered[-1 - outside]


def shown(row: dict[str, Any]) -> str:
    sign = ">=" if row["unit"] == "x faster" else "<="
    value = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}] {row['unit']}"
    said = f"{'met' if row['met'] else 'NOT MET':8} {row['says']}"
    bar = "" if row["bar"] is None else f"{sign} {row['bar']}"
    return f"{row['name']:28} {value:32} n={row['n']:<3} {bar:8} {said}"


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of the README."""
    lines = ["| work | measured | bar | n |", "|---|---|---|---|"]
    for row in rows:
        bar = f"{'at least' if row['unit'] == 'x faster' else 'at most'} {row['bar']:g}" if row["bar"] else ""
        value = f"{row['ratio']:.2f}" + (f" [{row['low']:.2f}, {row['high']:.2f}]" if row["n"] > 1 else "")
        bar += "" if row["met"] else ", **missed**"
        lines.append(f"| {row['says']} | {value} {row['unit']} | {bar} | {row['n']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    if options.clock == "cpu":
        global clock
        clock = time.process_time
    if options.list:
        print("\n".join(f"{name:28} {row.says}" for name, row in ROWS.items()))
        return
    found = {row["name"]: row for row in read_json(options.out)} if options.out.is_file() else {}
    if options.markdown:
        print(as_markdown(list(found.values())))
        return
    for name in options.only:
        if name.removeprefix("peer_") in IN_THEIR_OWN and not PEERS_PYTHON.is_file():
            print(f"{name:28} left out: the other libraries are not installed (make bench-peers)")
            continue
        found[name] = measured(name, options.rounds)
        print(shown(found[name]), flush=True)
        write_json(options.out, [found[one] for one in ROWS if one in found])


if __name__ == "__main__":
    main()
