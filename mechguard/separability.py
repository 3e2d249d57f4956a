"""How well harmful and harmless states come apart, layer by layer, with controls.

Three things are kept apart in every result (column `direction`): the separation along a direction that was
fitted elsewhere, such as the LLM's SSD; the separation along the states' *own* direction, held out by pair;
and two nulls, random directions and shuffled labels. A direction that has *moved* separates no more while
the own one still does; when safety has *collapsed* neither does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from mechguard.activations import Activations
from mechguard.directions import Directions, held_out_projections
from mechguard.errors import MechguardError
from mechguard.overlaps import warn_of_fitted
from mechguard.prompts import HARMFUL
from mechguard.result import Result
from mechguard.statistics import (
    Measure,
    auroc,
    bootstrap_measure,
    dprime,
    percentile_interval,
    permuted_measure,
)

METRICS: Mapping[str, Measure] = {"auroc": auroc, "dprime": dprime}
OWN, RANDOM, SHUFFLED = "own, held out", "random", "shuffled labels"
Scores = Float[ndarray, "layer prompt"]


def measure_separability(
    activations: Activations,
    directions: Directions | None = None,
    *,
    own: bool = True,
    nulls: bool = True,
    resamples: int = 1000,
    random_directions: int = 200,
    seed: int = 0,
    split: str = "test",
) -> Result:
    """AUROC and d' of harmful against harmless states at every layer.

    Args:
        activations: states of harmful and harmless prompts that took no part in fitting `directions`; an
            `OverlapWarning` says so if they did.
        directions: fitted elsewhere; the projection on the first of each layer is the score.
        own: also measure the states' own mean difference, fitted and tested on different pairs.
        nulls: also random directions (their mean and the central 95% of them) and shuffled labels.
        resamples: bootstrap resamples (whole pairs where there are pairs) and permutations.
        split: what to write into the column `split`.

    Returns:
        Rows condition x layer x direction x metric with 95% intervals; for the nulls `low` and `high`
        hold the central 95% under the null.

    Raises:
        MechguardError: one label only, or nothing to measure along.
    """
    activations.groups()  # refuses a single label
    if directions is not None:
        warn_of_fitted(activations.prompts, {directions.name: directions.about})
    rows: list[dict[str, Any]] = []
    lines: dict[str, Scores] = {}
    if directions is not None:
        lines[directions.name] = directions.project(activations).numpy()
    if own or directions is None:
        lines[OWN] = held_out_projections(activations, seed=seed).numpy()
    draws = {"resamples": resamples, "seed": seed}
    for name, scores in lines.items():
        rows += _measured(activations, name, scores, **draws)
    if nulls:
        rows += _random_null(activations, random_directions, seed)
        rows += _shuffled_null(activations, next(iter(lines.values())), **draws)
    for row in rows:
        row.update(condition=activations.name, n=len(activations.prompts), split=split)
    return Result.from_rows(
        rows,
        **activations.about,
        directions=None if directions is None else directions.name,
        seed=seed,
        resamples=resamples,
        random_directions=random_directions,
    )


def select_layers(result: Result, *, k: int, metric: str = "dprime") -> list[int]:
    """The k layers where the first fitted direction separates best; call it on validation results.

    Ties in AUROC are common, so d' decides by default. Layers come back in order.
    """
    table = result.table
    table = table[table["metric"] == metric]
    fitted = [name for name in table["direction"].unique() if name not in (OWN, RANDOM, SHUFFLED)]
    chosen = table[table["direction"] == (fitted[0] if fitted else OWN)]
    best = chosen.groupby("layer")["value"].mean().sort_values(ascending=False, kind="stable")
    if not 1 <= k <= len(best):
        raise MechguardError(f"k={k} layers were asked for; the result has {len(best)}")
    return sorted(int(layer) for layer in best.index[:k])


def _split_scores(activations: Activations, scores: Float[ndarray, "... prompt"]) -> tuple[Any, Any, bool]:
    if all(pair is not None for pair in activations.pairs):
        harmful, harmless = activations.prompts.pair_indices()
        return scores[..., harmful], scores[..., harmless], True
    is_harmful = activations.labels == HARMFUL
    return scores[..., is_harmful], scores[..., ~is_harmful], False


def _measured(
    activations: Activations, name: str, scores: Scores, *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    positive, negative, paired = _split_scores(activations, scores)
    rows = []
    for metric, measure in METRICS.items():
        low, high = bootstrap_measure(
            measure, positive, negative, paired=paired, resamples=resamples, seed=seed
        )
        rows += _rows(activations, name, metric, measure(positive, negative), low, high)
    return rows


def _random_null(activations: Activations, count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, activations.d_model, generator=generator)
    units = torch.nn.functional.normalize(drawn, dim=-1)
    scores = torch.einsum("lpd,cd->lcp", activations.data, units).numpy()
    positive, negative, _ = _split_scores(activations, scores)
    rows = []
    for metric, measure in METRICS.items():
        values = measure(positive, negative)
        rows += _rows(activations, RANDOM, metric, values.mean(-1), *percentile_interval(values))
    return rows


def _shuffled_null(
    activations: Activations, scores: Scores, *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    positive, negative, _ = _split_scores(activations, scores)
    rows = []
    for metric, measure in METRICS.items():
        values = permuted_measure(measure, positive, negative, permutations=resamples, seed=seed)
        rows += _rows(activations, SHUFFLED, metric, values.mean(-1), *percentile_interval(values))
    return rows


def _rows(
    activations: Activations,
    direction: str,
    metric: str,
    values: Float[ndarray, " layer"],
    low: Float[ndarray, " layer"],
    high: Float[ndarray, " layer"],
) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "direction": direction,
            "metric": metric,
            "value": float(values[index]),
            "low": float(np.asarray(low)[index]),
            "high": float(np.asarray(high)[index]),
        }
        for index, layer in enumerate(activations.layers)
    ]
