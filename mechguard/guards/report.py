"""How often each gate would open: by layer, label and condition, uncentred and centred."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from jaxtyping import Bool
from torch import Tensor

from mechguard.activations import Activations
from mechguard.directions import Directions
from mechguard.projections import gate_thresholds
from mechguard.result import Result
from mechguard.statistics import wilson_interval


def measure_gates(directions: Directions, states: Sequence[Activations], *, split: str = "test") -> Result:
    """How often the gate of each layer would open, uncentred and centred, by label and condition.

    Returns a `Result` with metric `gate_open` and the columns `gate` and `label`; 95% Wilson intervals.
    """
    rows = []
    for activations in states:
        scores = directions.project(activations)
        for gate, thresholds in gate_thresholds(directions, activations.layers).items():
            opened = scores > thresholds.unsqueeze(1)
            rows += _firing_rows(opened, activations, gate, split)
    about = states[0].about if states else {}
    return Result.from_rows(rows, **{**about, "directions": directions.name})


def _firing_rows(
    opened: Bool[Tensor, "layer prompt"], activations: Activations, gate: str, split: str
) -> list[dict[str, Any]]:
    table = pd.DataFrame(opened.T.numpy(), columns=activations.layers)
    counts = table.groupby(activations.labels).agg(["sum", "count"])
    rows = []
    for label, row in counts.iterrows():
        for layer in activations.layers:
            hits, n = int(row[(layer, "sum")]), int(row[(layer, "count")])
            low, high = wilson_interval(hits, n)
            rows.append(
                {
                    "condition": activations.name,
                    "layer": layer,
                    "metric": "gate_open",
                    "value": hits / n,
                    "low": low,
                    "high": high,
                    "n": n,
                    "split": split,
                    "gate": gate,
                    "label": label,
                }
            )
    return rows
