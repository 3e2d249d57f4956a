"""How often each gate would open, uncentred and centred, and what any threshold could do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from mechguard.activations import Activations
from mechguard.directions import Directions
from mechguard.projections import gate_thresholds
from mechguard.result import Result
from mechguard.separability import Half, measure_halves, project_halves
from mechguard.statistics import auroc, wilson_interval

SIGN, MIDPOINT = "sign", "midpoint"
ANY, DIFFERING = "any threshold", "sign or midpoint alone"
RATES = tuple(np.round(np.linspace(0, 1, 41), 3))  # of false alarms, along a curve


def measure_gates(
    directions: Directions,
    states: Sequence[Activations],
    *,
    resamples: int = 400,
    seed: int = 0,
    split: str = "test",
) -> Result:
    """How often the gate of each layer would open, uncentred and centred, by label and condition.

    Returns:
        Rows layer x condition x `gate` x `label`:

        - `gate_open`: the share of prompts it opens for, gate "sign" (h . v > 0, the paper's) and "midpoint"
          (centred on the anchors' midpoint, where the directions know it), with 95% Wilson intervals;
        - `gate_differs`: the share for which the two decide differently (gate "sign or midpoint alone");
        - `gate_auroc`: how well h . v tells harmful from harmless at any threshold (label "both"), with a
          bootstrap interval. A gate that never opens although its AUROC is high wants another threshold.
    """
    rows: list[dict[str, Any]] = []
    for activations in states:
        scores = directions.project(activations)
        opened = {
            gate: (scores > thresholds.unsqueeze(1)).numpy()
            for gate, thresholds in gate_thresholds(directions, activations.layers).items()
        }
        found = [row for gate, one in opened.items() for row in _shares(one, activations, "gate_open", gate)]
        if MIDPOINT in opened:
            differing = opened[SIGN] ^ opened[MIDPOINT]
            found += _shares(differing, activations, "gate_differs", DIFFERING)
        if len(set(activations.labels)) == 2:
            found += _auroc_rows(project_halves(activations, directions), activations, resamples, seed)
        rows += [{**row, "condition": activations.name, "split": split} for row in found]
    about = states[0].about if states else {}
    return Result.from_rows(rows, **{**about, "directions": directions.name, "seed": seed})


def measure_gate_curves(
    directions: Directions, states: Sequence[Activations], *, split: str = "test"
) -> Result:
    """The gates' ROC: the share of harmful prompts a threshold opens for, by that of harmless ones.

    Returns:
        Rows layer x condition x `gate`, metric `true_positive_rate` with 95% Wilson intervals at
        `false_positive_rate`: gate "any threshold" along a grid of 41 rates (the highest share of harmful
        prompts at no more than this share of harmless ones), and one point each for "sign" and "midpoint".

    Raises:
        MechguardError: states of one label only.
    """
    rows: list[dict[str, Any]] = []
    for activations in states:
        activations.groups()
        half = project_halves(activations, directions)[0]
        thresholds = gate_thresholds(directions, activations.layers)
        for index, layer in enumerate(activations.layers):
            here = {"condition": activations.name, "layer": layer, "split": split}
            rows += [{**here, **row} for row in _curve(half, index)]
            points = {gate: float(levels[index]) for gate, levels in thresholds.items()}
            rows += [{**here, **_point(half, index, gate, level)} for gate, level in points.items()]
    about = states[0].about if states else {}
    return Result.from_rows(rows, **{**about, "directions": directions.name})


def _shares(
    chosen: Bool[ndarray, "layer prompt"], activations: Activations, metric: str, gate: str
) -> Iterator[dict[str, Any]]:
    for label in sorted(set(activations.labels.tolist())):
        of_label = activations.labels == label
        for layer, hits in zip(activations.layers, chosen[:, of_label].sum(1), strict=True):
            row = {"layer": layer, "metric": metric, "gate": gate, "label": label}
            yield {**row, **_rate(int(hits), int(of_label.sum()))}


def _auroc_rows(
    halves: list[Half], activations: Activations, resamples: int, seed: int
) -> Iterator[dict[str, Any]]:
    band = measure_halves(auroc, halves, None, resamples=resamples, seed=seed)
    for layer, value, low, high in zip(activations.layers, *band, strict=True):
        row = {"layer": layer, "metric": "gate_auroc", "gate": ANY, "label": "both"}
        interval = {"value": float(value), "low": float(low), "high": float(high)}
        yield {**row, **interval, "n": len(activations.prompts)}


def _curve(half: Half, index: int) -> Iterator[dict[str, Any]]:
    """The empirical curve at a grid of false alarms: the lowest threshold that keeps to each."""
    harmful, harmless = (np.sort(group[index]) for group in half.groups)
    for rate in RATES:
        allowed = int(np.floor(rate * len(harmless) + 1e-9))
        threshold = harmless[-allowed - 1] if allowed < len(harmless) else -np.inf
        hits = int((harmful > threshold).sum())
        yield {**_row(ANY, float(rate)), **_rate(hits, len(harmful))}


def _point(half: Half, index: int, gate: str, threshold: float) -> dict[str, Any]:
    harmful, harmless = (group[index] > threshold for group in half.groups)
    return {**_row(gate, float(harmless.mean())), **_rate(int(harmful.sum()), len(harmful))}


def _row(gate: str, rate: float) -> dict[str, Any]:
    return {"metric": "true_positive_rate", "gate": gate, "false_positive_rate": rate}


def _rate(hits: int, n: int) -> dict[str, Any]:
    low, high = wilson_interval(hits, n)
    return {"value": hits / n, "low": low, "high": high, "n": n}
