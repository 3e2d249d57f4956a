"""Whether the intervals hold what is planted, and the tests find nothing where nothing is: by simulation.

    python tests/calibration.py --planted 500 --null 500 [--out figures/calibration.csv]

States are drawn from known normal distributions, so that d', AUROC, gap, CKA, angles have values that follow
from the parameters (or, where no formula is at hand, from a sample of 40,000). `planted` counts in how many
seeds each metric's 95% interval holds that value; `null` how often a 5% test finds something where nothing
is.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pandas as pd
import torch
from scipy import stats

import mechguard as mg
from mechguard.gap import METRICS, NULLS, Moved, together
from mechguard.result import Result
from mechguard.separability import OWN, STATES
from mechguard.statistics import compare_outcomes, measure_probe, measure_silhouette, wilson_interval
from mechguard.storage import write_text

PAIRS, WIDTH = 100, 24  # as many pairs as the paper's anchors
Check = Callable[[int], Iterator[tuple[str, bool]]]


def paired_states(harmful: np.ndarray, harmless: np.ndarray) -> mg.Activations:
    """One layer of states from [pair, d_model] of either label."""
    n = len(harmful)
    data = torch.as_tensor(np.concatenate([harmful, harmless])[None], dtype=torch.float32)
    return mg.Activations.from_tensor(data, labels=[1] * n + [0] * n, pairs=[*range(n)] * 2)


def axis(index: int = 0, rank: int = 1, width: int = WIDTH) -> mg.Directions:
    return mg.Directions.from_tensor(torch.eye(width)[index : index + rank].unsqueeze(0))


def row(result: Result, **where: object) -> pd.Series:
    table = result.where(**where).table
    assert len(table) == 1, (where, len(table))
    return table.iloc[0]


def holds(found: pd.Series, truth: float) -> bool:
    return bool(found["low"] - 1e-9 <= truth <= found["high"] + 1e-9)


def two_groups(random: np.random.Generator, dprime: float, pairs: int, shared: float = 0.6) -> mg.Activations:
    """Unit-variance groups `dprime` apart on axis 0, whose pairs share a part of their noise."""
    common = random.normal(size=(pairs, WIDTH)) * np.sqrt(shared)
    states = [common + random.normal(size=(pairs, WIDTH)) * np.sqrt(1 - shared) for _ in range(2)]
    states[0][:, 0] += dprime
    return paired_states(*states)


@cache
def large_sample(dprime: float) -> dict[str, float]:
    """What no formula is at hand for: the silhouette, and the probe of so many prompts."""
    states = two_groups(np.random.default_rng(99), dprime, 3000)
    labels = (states.labels == "harmful").astype(int)
    some = states.data[0].double().numpy()
    silhouette = measure_silhouette(some, labels, np.arange(len(some)), resamples=2, seed=0)[0]
    probes = []
    for seed in range(300):
        drawn = two_groups(np.random.default_rng(10_000 + seed), dprime, PAIRS)
        names = [prompt.pair for prompt in drawn.prompts]
        probes.append(
            measure_probe(
                drawn.data[0].numpy(), (drawn.labels == "harmful").astype(int), names, seed=0, permutations=2
            )[0][0]
        )
    return {"silhouette": silhouette, "probe_accuracy": float(np.mean(probes))}


def planted_along(seed: int) -> Iterator[tuple[str, bool]]:
    for dprime in (0.7, 2.0):
        states = two_groups(np.random.default_rng(seed), dprime, PAIRS)
        result = mg.measure_separability(
            states, axis(), own=False, states=False, nulls=False, resamples=500, seed=seed
        )
        truths = {
            "auroc": stats.norm.cdf(dprime / np.sqrt(2)),
            "dprime": dprime,
            "fisher": dprime**2 / 2,
            "overlap": 2 * stats.norm.cdf(-dprime / 2),
        }
        for metric, truth in truths.items():
            found = row(result, direction=axis().name, metric=metric)
            yield f"{metric}, d' {dprime:g}", holds(found, truth)


def planted_states(seed: int) -> Iterator[tuple[str, bool]]:
    for dprime in (0.7, 2.0):
        states = two_groups(np.random.default_rng(seed), dprime, PAIRS)
        result = mg.measure_separability(states, axis(), nulls=False, resamples=2, seed=seed)
        for metric, truth in large_sample(dprime).items():
            yield f"{metric}, d' {dprime:g}", holds(row(result, direction=STATES, metric=metric), truth)


def null_separability(seed: int) -> Iterator[tuple[str, bool]]:
    random = np.random.default_rng(seed)
    states = two_groups(random, 0.0, PAIRS)
    result = mg.measure_separability(
        states, axis(), nulls=True, resamples=500, random_directions=2, seed=seed
    )
    for direction, name in ((axis().name, "given"), (OWN, "own")):
        for metric, chance in (("auroc", 0.5), ("dprime", 0.0)):
            found = row(result, direction=direction, metric=metric)
            yield f"{metric} along the {name} direction, interval", not holds(found, chance)
    probe = row(result, metric="probe_accuracy", direction=STATES)
    yield "probe accuracy, interval: at most", not holds(probe, 0.5)
    shuffled = row(result, metric="probe_accuracy", direction="shuffled labels")
    yield "probe accuracy, shuffled labels", not holds(shuffled, float(probe["value"]))
    for own, null, name in ((OWN, "own, shuffled labels", "own"), (axis().name, "shuffled labels", "given")):
        value = float(row(result, direction=own, metric="auroc")["value"])
        found = row(result, direction=null, metric="auroc")
        yield f"auroc along the {name} direction, shuffled labels", not holds(found, value)


TEXT_DISTANCE, NOISE = 2.0, 0.7  # between harmful and harmless texts; deviation of the shifts
BASE, SHIFT = np.zeros(WIDTH), np.zeros(WIDTH)
BASE[3:9] = 1.0
SHIFT[:6] = 1.0, 0.5, 0.0, -1.5, 1.0, 0.5


def with_shift(random: np.random.Generator, pairs: int) -> tuple[mg.Activations, mg.Activations]:
    """Texts around BASE, and the same moved by SHIFT and noise; the safety plane is that of axes 0 and 1."""
    texts = BASE + random.normal(size=(2, pairs, WIDTH))
    texts[0, :, 0] += TEXT_DISTANCE
    images = texts + SHIFT + NOISE * random.normal(size=texts.shape)
    return paired_states(*texts), paired_states(*images)


@cache
def gap_truths() -> dict[str, float]:
    """Of the population, in formulas where there are some, else from 80,000 prompts."""
    text, image = with_shift(np.random.default_rng(7), 40_000)
    n = len(text.prompts)
    moved = Moved(text.data[0].double().numpy(), image.data[0].double().numpy())
    truths = {
        name: float(metric(moved, np.full((1, n), 1 / n), together)[0])
        for name, metric in METRICS.items()
        if name not in ("cka", "centroid_distance", "cosine_gap")
    }
    centre = BASE.copy()
    centre[0] += TEXT_DISTANCE / 2
    covariance = np.eye(WIDTH)
    covariance[0, 0] += TEXT_DISTANCE**2 / 4
    length = np.linalg.norm
    truths["centroid_distance"] = float(length(SHIFT))
    truths["cosine_gap"] = float(1 - centre @ (centre + SHIFT) / length(centre) / length(centre + SHIFT))
    truths["cka"] = float(length(covariance) / length(covariance + NOISE**2 * np.eye(WIDTH)))
    truths["safety_share"] = float((np.abs(moved.shift[:, 0]) / length(moved.shift, axis=1)).mean())
    squares, inside = SHIFT @ SHIFT, SHIFT[:2] @ SHIFT[:2]
    truths["safety_energy"] = float((inside + 2 * NOISE**2) / (squares + WIDTH * NOISE**2))
    truths["safety_energy_of_mean"] = float(inside / squares)
    truths["shift_along"] = float(SHIFT[0])
    truths["shift_across"] = float(length(moved.shift[:, 2:], axis=1).mean())
    truths["shift_along_relative"] = float(SHIFT[0] / TEXT_DISTANCE)
    return truths


def planted_gap(seed: int) -> Iterator[tuple[str, bool]]:
    text, image = with_shift(np.random.default_rng(seed), PAIRS)
    result = mg.measure_modality_gap(
        text, image, directions=axis(rank=2), nulls=False, resamples=500, seed=seed
    )
    for metric, truth in gap_truths().items():
        yield metric, holds(row(result, metric=metric, direction="observed"), truth)


def null_gap(seed: int) -> Iterator[tuple[str, bool]]:
    random = np.random.default_rng(seed)
    common = random.normal(size=(2, PAIRS, WIDTH))
    text, image = (paired_states(*(common + random.normal(size=common.shape))) for _ in range(2))
    result = mg.measure_modality_gap(text, image, resamples=500, seed=seed)
    for metric in (*NULLS, "modality_accuracy"):
        value = float(row(result, metric=metric, direction="observed")["value"])
        found = row(result, metric=metric, direction="shuffled modality")
        yield f"{metric}, shuffled modality", not holds(found, value)
    yield (
        "modality accuracy, interval: at most",
        not holds(row(result, metric="modality_accuracy", direction="observed"), 0.5),
    )


def two_conditions(
    random: np.random.Generator, before: float, after: float, layers: int = 1
) -> list[mg.Activations]:
    """The same prompts twice, `before` and `after` apart on axis 0, with most of their noise in common."""
    common = random.normal(size=(layers, 2 * PAIRS, WIDTH)) * np.sqrt(0.7)
    made = []
    for name, dprime in (("text", before), ("image", after)):
        data = common + random.normal(size=common.shape) * np.sqrt(0.3)
        data[:, :PAIRS, 0] += dprime
        labels, pairs = [1] * PAIRS + [0] * PAIRS, [*range(PAIRS)] * 2
        one = mg.Activations.from_tensor(data, labels=labels, pairs=pairs)
        made.append(mg.Activations(one.data, one.layers, one.prompts, {"condition": name}))
    return made


def planted_transfer(seed: int) -> Iterator[tuple[str, bool]]:
    states = two_conditions(np.random.default_rng(seed), 2.0, 0.7)
    result = mg.measure_transfer(states, [axis()], resamples=500, seed=seed)
    before, after = (stats.norm.cdf(dprime / np.sqrt(2)) for dprime in (2.0, 0.7))
    change = row(result, metric="auroc_change", direction=axis().name)
    yield "auroc_change, from d' 2 to 0.7", holds(change, after - before)
    yield (
        "auroc, transferred",
        holds(row(result, metric="auroc", direction=axis().name, condition="image"), after),
    )


def null_transfer(seed: int) -> Iterator[tuple[str, bool]]:
    """Several layers at once: any change that is found at any of them is one false finding."""
    layers = 4
    states = two_conditions(np.random.default_rng(seed), 1.0, 1.0, layers)
    given = mg.Directions.from_tensor(torch.eye(WIDTH)[:1].expand(layers, 1, WIDTH))
    result = mg.measure_transfer(states, [given], resamples=500, seed=seed)
    changes = result.where(metric="auroc_change", direction=given.name).table
    yield "auroc_change at any of 4 layers", bool(((changes["low"] > 0) | (changes["high"] < 0)).any())


TURNS = (20.0, 50.0)


def two_planes(random: np.random.Generator) -> list[mg.Activations]:
    """Differences in two planes whose principal angles are TURNS."""
    turns = np.radians(TURNS)
    bases = np.zeros((2, 2, WIDTH))
    bases[0, [0, 1], [0, 1]] = 1
    bases[1, [0, 1], [0, 1]], bases[1, [0, 1], [2, 3]] = np.cos(turns), np.sin(turns)
    weights = random.normal(size=(PAIRS, 2)) * [1.5, 1.0] + [1.0, 0.0]
    made = []
    for name, basis in zip(("text", "image"), bases, strict=True):
        harmful = weights @ basis + 0.3 * random.normal(size=(PAIRS, WIDTH))
        one = paired_states(harmful, np.zeros_like(harmful))
        made.append(mg.Activations(one.data, one.layers, one.prompts, {"condition": name}))
    return made


def planted_angles(seed: int) -> Iterator[tuple[str, bool]]:
    result = mg.measure_angles(two_planes(np.random.default_rng(seed)), rank=2, resamples=500, seed=seed)
    for number, truth in enumerate(TURNS, 1):
        found = row(result, metric=f"principal_angle_{number}", direction="text")
        yield f"principal angle of {truth:g} degrees", holds(found, truth)
    cosine = row(result, metric="cosine", direction="text")
    yield "cosine of first directions", holds(cosine, float(np.cos(np.radians(TURNS[0]))))
    energy = (1.5**2 + 1 + 1 + 2 * 0.09) / (1.5**2 + 1 + 1 + WIDTH * 0.09)
    yield "subspace_energy", holds(row(result, metric="subspace_energy", condition="text"), energy)


ASKED = 300


def outcomes(random: np.random.Generator, first: float, second: float) -> pd.DataFrame:
    """The same prompts under two conditions; most of what decides is common to both."""
    common = random.normal(size=ASKED) * np.sqrt(0.6)
    rows = []
    for condition, rate in (("text", first), ("blank", second)):
        decided = common + random.normal(size=ASKED) * np.sqrt(0.4) < stats.norm.ppf(rate)
        rows += [
            {"id": str(i), "condition": condition, "guard": "none", "label": "harmful", "complied": bool(hit)}
            for i, hit in enumerate(decided)
        ]
    return pd.DataFrame(rows)


def planted_rates(seed: int) -> Iterator[tuple[str, bool]]:
    random = np.random.default_rng(seed)
    found = compare_outcomes(outcomes(random, 0.15, 0.34)).table.iloc[0]
    yield "attack_success_change, paired", holds(found, 0.19)
    low, high = wilson_interval(int(random.binomial(ASKED, 0.15)), ASKED)
    yield "attack_success, Wilson", low <= 0.15 <= high


def null_rates(seed: int) -> Iterator[tuple[str, bool]]:
    found = compare_outcomes(outcomes(np.random.default_rng(seed), 0.4, 0.4)).table.iloc[0]
    yield "attack_success_change, McNemar exact", bool(found["p"] < 0.05)
    yield "attack_success_change, interval", not holds(found, 0.0)


PLANTED: list[Check] = [
    planted_along,
    planted_states,
    planted_gap,
    planted_transfer,
    planted_angles,
    planted_rates,
]
NULL: list[Check] = [null_separability, null_gap, null_transfer, null_rates]


def count(checks: list[Check], seeds: int) -> pd.DataFrame:
    """How many of the seeds each check was true in."""
    hits: Counter[str] = Counter()
    for check in checks:
        for seed in range(seeds):
            for name, true in check(seed):
                hits[name] += true
    rows = [(name, number, seeds, *wilson_interval(number, seeds)) for name, number in hits.items()]
    return pd.DataFrame(rows, columns=["check", "seeds", "of", "low", "high"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--planted", type=int, default=500, help="seeds of planted truths")
    parser.add_argument("--null", type=int, default=500, help="seeds without an effect")
    parser.add_argument("--only", default="", help="checks whose function's name holds this word")
    parser.add_argument("--out", help="a CSV file for the tables")
    given = parser.parse_args()
    failed, tables = 0, []
    kinds = (("planted", PLANTED, given.planted, 0.93, 1.0), ("no effect", NULL, given.null, 0.03, 0.07))
    for kind, checks, seeds, low, high in kinds:
        chosen = [check for check in checks if given.only in check.__name__]
        table = count(chosen, seeds)
        if table.empty or not seeds:
            continue
        share = table["seeds"] / table["of"]
        wide = table["check"].str.endswith("at most")  # intervals that are wider than a test asks for
        table["within"] = ((share >= low - 1e-9) | wide) & (share <= high + 1e-9)
        failed += int((~table["within"]).sum())
        print(f"\nwanted: {low:.0%} to {high:.0%} of {seeds} seeds")
        print(table.to_string(index=False, float_format="{:.3f}".format), flush=True)
        tables.append(table.assign(kind=kind, low=table["low"].round(4), high=table["high"].round(4)))
    if given.out and tables:
        write_text(given.out, pd.concat(tables).to_csv(index=False, lineterminator="\n"))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
