"""How well harmful and harmless states come apart, layer by layer, with controls.

Four things are kept apart in every result (column `direction`): the separation along a direction that was
fitted elsewhere, such as the LLM's SSD; the separation along the states' *own* direction, held out by pair;
that of the whole states, without a direction; and the nulls, random directions and shuffled labels. A
direction that has *moved* separates no more while the own one still does; when safety has *collapsed*
neither does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from mechguard.activations import Activations
from mechguard.directions import Directions, cross_project
from mechguard.errors import MechguardError
from mechguard.overlaps import warn_of_fitted
from mechguard.prompts import HARMFUL, Prompts
from mechguard.result import Result
from mechguard.statistics import (
    MEASURES,
    Measure,
    bootstrap_draws,
    bootstrap_measure,
    measure_probe,
    measure_silhouette,
    overlap,
    percentile_interval,
    permuted_measure,
    reverse_interval,
    swapped_labels,
)
from mechguard.statistics import dprime as dprime_measure

OWN, STATES = "own, held out", "whole states"
RANDOM, SHUFFLED, OWN_SHUFFLED = "random", "shuffled labels", "own, shuffled labels"
NULLS = (RANDOM, SHUFFLED, OWN_SHUFFLED)
NULL_METRICS = ("auroc", "dprime")
STATE_RESAMPLES = 200  # of the silhouette, which is n x n for each
SEVERAL = 20  # shuffles that are projected at once
Scores = Float[ndarray, "layer half"]
Values = Float[ndarray, " layer"]
Bounds = tuple[Values, Values, Values]  # value, low, high


@dataclass(frozen=True)
class Half:
    """Prompts that are scored by one direction per layer, and the two groups among them."""

    rows: Int[ndarray, " half"]
    scores: Scores
    harmful: Int[ndarray, " a"]  # positions in `rows`; aligned pair by pair if `paired`
    harmless: Int[ndarray, " b"]
    paired: bool

    @classmethod
    def of(cls, prompts: Prompts, rows: Any, scores: Any) -> Half:
        """The half of some prompts; whole pairs only."""
        kept = np.asarray(rows)
        chosen = Prompts([prompts[index] for index in kept])
        if all(prompt.pair is not None for prompt in chosen):
            harmful, harmless = chosen.pair_indices()
            return cls(kept, np.asarray(scores), np.array(harmful), np.array(harmless), True)
        is_harmful = np.array(chosen.labels) == HARMFUL
        return cls(kept, np.asarray(scores), np.flatnonzero(is_harmful), np.flatnonzero(~is_harmful), False)

    @property
    def groups(self) -> tuple[Scores, Scores]:
        return self.scores[:, self.harmful], self.scores[:, self.harmless]

    def clusters(self, names: Sequence[str] | None) -> tuple[list[str], list[str]] | None:
        """The cluster of each harmful and of each harmless prompt, if clusters were given."""
        if names is None:
            return None
        named = [names[index] for index in self.rows]
        return [named[i] for i in self.harmful], [named[i] for i in self.harmless]


def project_halves(activations: Activations, directions: Directions) -> list[Half]:
    """All prompts on the first direction of each layer, which was fitted elsewhere."""
    everyone = range(len(activations.prompts))
    return [Half.of(activations.prompts, everyone, directions.project(activations).numpy())]


def own_halves(activations: Activations, *, fitted: Activations | None = None, seed: int = 0) -> list[Half]:
    """Either half of the prompts on the mean difference of the other, of these states or of `fitted`."""
    found = cross_project(fitted or activations, activations, seed=seed)
    return [Half.of(activations.prompts, rows.numpy(), scores.numpy()) for rows, scores in found]


def name_clusters(prompts: Prompts, clusters: str | Sequence[Any] | None) -> list[str] | None:
    """The cluster of every prompt: from an attribute of prompts, or as given; None for pairs.

    Raises:
        MechguardError: an attribute that some prompt lacks, or a wrong number of clusters.
    """
    if clusters is None or clusters == "pair":
        return None
    if isinstance(clusters, str):
        found = [getattr(prompt, clusters, None) for prompt in prompts]
        if any(value is None for value in found):
            raise MechguardError(
                f"not every prompt of {prompts.name!r} has a {clusters!r} to cluster by; use 'pair', "
                "'category', or give one cluster per prompt"
            )
        return [str(value) for value in found]
    if len(clusters) != len(prompts):
        raise MechguardError(f"{len(clusters)} clusters do not fit {len(prompts)} prompts")
    return [str(value) for value in clusters]


def measure_separability(
    activations: Activations,
    directions: Directions | None = None,
    *,
    own: bool = True,
    states: bool = True,
    nulls: bool = True,
    clusters: str | Sequence[Any] | None = None,
    resamples: int = 1000,
    random_directions: int = 200,
    seed: int = 0,
    split: str = "test",
) -> Result:
    """How far harmful and harmless states lie apart at every layer.

    Along a direction: `auroc`, `dprime`, `fisher` (d'^2 / 2) and `overlap` (of two fitted normals). Of the
    whole
    states: `silhouette` and `probe_accuracy`, of a ridge probe held out by pair.

    Args:
        activations: states of harmful and harmless prompts that took no part in fitting `directions`; an
            `OverlapWarning` says so if they did.
        directions: fitted elsewhere; the projection on the first of each layer is the score.
        own: also measure along the states' own mean difference, fitted and tested on different pairs. Each
            half's direction is tested on the other half; the value is the mean over both. Since the accidents
            of one half enter both tests, the interval is as wide as that of one half.
        states: also measure the whole states.
        nulls: also random directions (their mean and the central 95% of them) and shuffled labels, for the
            own direction with the directions fitted anew.
        clusters: what was drawn independently and is resampled whole: "pair" (the default, where there are
            pairs), another attribute of the prompts such as "category", or one name per prompt, such as its
            template.
        resamples: bootstrap resamples and permutations.
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
    names = name_clusters(activations.prompts, clusters)
    lines: dict[str, list[Half]] = {}
    if directions is not None:
        lines[directions.name] = project_halves(activations, directions)
    if own or directions is None:
        lines[OWN] = own_halves(activations, seed=seed)
    draws = {"resamples": resamples, "seed": seed}
    rows: list[dict[str, Any]] = []
    for name, halves in lines.items():
        for metric, measure in MEASURES.items():
            rows += _rows(activations, name, metric, *measure_halves(measure, halves, names, **draws))
    if states:
        rows += _state_rows(activations, names, nulls, seed)
    if nulls:
        rows += _null_rows(activations, lines, random_directions, **draws)
    for row in rows:
        row.update(condition=activations.name, n=len(activations.prompts), split=split)
    return Result.from_rows(
        rows,
        **activations.about,
        directions=None if directions is None else directions.name,
        clusters=clusters if isinstance(clusters, str) else "pair" if clusters is None else "given",
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
    fitted = [name for name in table["direction"].unique() if name not in (OWN, STATES, *NULLS)]
    chosen = table[table["direction"] == (fitted[0] if fitted else OWN)]
    best = chosen.groupby("layer")["value"].mean().sort_values(ascending=False, kind="stable")
    if not 1 <= k <= len(best):
        raise MechguardError(f"k={k} layers were asked for; the result has {len(best)}")
    return sorted(int(layer) for layer in best.index[:k])


def measure_halves(
    measure: Measure, halves: list[Half], clusters: list[str] | None, *, resamples: int, seed: int
) -> Bounds:
    """A measure and its 95% interval at every layer; the mean of both halves' where there are two."""
    found = [_measure_half(measure, half, clusters, resamples, seed) for half in halves]
    value, low, high = (np.mean(numbers, axis=0) for numbers in zip(*found, strict=True))
    return value, low, high


def _measure_half(
    measure: Measure, half: Half, clusters: list[str] | None, resamples: int, seed: int
) -> Bounds:
    positive, negative = half.groups
    options: dict[str, Any] = {
        "paired": half.paired,
        "resamples": resamples,
        "seed": seed,
        "clusters": half.clusters(clusters),
    }
    value = measure(positive, negative)
    if measure is MEASURES["fisher"]:  # a square: from the interval of d', which may hold zero
        low, high = bootstrap_measure(dprime_measure, positive, negative, **options)
        squares = np.stack([low**2, high**2]) / 2
        return value, np.where((low < 0) & (high > 0), 0.0, squares.min(0)), squares.max(0)
    if measure is overlap:  # at most 1, and below it by the accidents of the sample alone
        draws, n = bootstrap_draws(overlap, positive, negative, **options)
        low, high = reverse_interval(value, draws, n)
        return value, np.minimum(low, value).clip(0, 1), np.maximum(high, value).clip(0, 1)
    return value, *bootstrap_measure(measure, positive, negative, **options)


def _state_rows(
    activations: Activations, clusters: list[str] | None, nulls: bool, seed: int
) -> Iterator[dict[str, Any]]:
    is_harmful = (activations.labels == HARMFUL).astype(int)
    pairs = [prompt.pair if prompt.pair is not None else prompt.id for prompt in activations.prompts]
    names = clusters or pairs
    for index, layer in enumerate(activations.layers):
        states = activations.data[index].double().numpy()
        silhouette = measure_silhouette(states, is_harmful, names, resamples=STATE_RESAMPLES, seed=seed)
        probe, null = measure_probe(states, is_harmful, names, seed=seed)
        yield _row(layer, STATES, "silhouette", *silhouette)
        yield _row(layer, STATES, "probe_accuracy", *probe)
        if nulls:
            low, high = percentile_interval(null)
            yield _row(layer, SHUFFLED, "probe_accuracy", float(null.mean()), float(low), float(high))


def _null_rows(
    activations: Activations, lines: dict[str, list[Half]], count: int, *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    rows = []
    for name, halves in lines.items():
        drawn = (
            _shuffled_and_fitted(activations, halves, resamples, seed)
            if name == OWN
            else _shuffled(halves[0], resamples, seed)
        )
        shuffled = OWN_SHUFFLED if name == OWN else SHUFFLED
        for metric, values in drawn.items():
            rows += _rows(activations, shuffled, metric, values.mean(-1), *percentile_interval(values))
    for metric, values in _random(activations, count, seed).items():
        rows += _rows(activations, RANDOM, metric, values.mean(-1), *percentile_interval(values))
    return rows


def _random(activations: Activations, count: int, seed: int) -> dict[str, Float[ndarray, "layer draws"]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, activations.d_model, generator=generator)
    units = torch.nn.functional.normalize(drawn, dim=-1)
    everyone = range(len(activations.prompts))
    found: dict[str, list[Values]] = {metric: [] for metric in NULL_METRICS}
    for states in activations.data:
        positive, negative = Half.of(activations.prompts, everyone, (states @ units.T).T.numpy()).groups
        for metric in NULL_METRICS:
            found[metric].append(MEASURES[metric](positive, negative))
    return {metric: np.stack(values) for metric, values in found.items()}


def _shuffled(half: Half, permutations: int, seed: int) -> dict[str, Float[ndarray, "layer draws"]]:
    positive, negative = half.groups
    draws: dict[str, Any] = {"permutations": permutations, "seed": seed, "paired": half.paired}
    return {
        metric: permuted_measure(MEASURES[metric], positive, negative, **draws) for metric in NULL_METRICS
    }


def _shuffled_and_fitted(
    activations: Activations, halves: list[Half], permutations: int, seed: int
) -> dict[str, Float[ndarray, "layer draws"]]:
    """The held-out measures when labels are dealt anew before the directions are fitted."""
    called = [
        swapped_labels(
            len(half.harmful),
            len(half.harmless),
            paired=half.paired,
            permutations=permutations,
            seed=seed + i,
        )
        for i, half in enumerate(halves)
    ]
    order = [half.rows[np.concatenate([half.harmful, half.harmless])] for half in halves]
    found: dict[str, list[Values]] = {metric: [] for metric in NULL_METRICS}
    for states in activations.data:
        parts = [states[torch.as_tensor(rows)].numpy() for rows in order]
        values = [_refitted(parts[1 - i], called[1 - i], parts[i], called[i]) for i in (0, 1)]
        for metric in NULL_METRICS:
            found[metric].append((values[0][metric] + values[1][metric]) / 2)
    return {metric: np.stack(values) for metric, values in found.items()}


def _refitted(
    fitted: Float[ndarray, "a d_model"],
    fitted_labels: Float[ndarray, "draws a"],
    tested: Float[ndarray, "b d_model"],
    labels: Float[ndarray, "draws b"],
) -> dict[str, Float[ndarray, " draws"]]:
    """Measures of one half along the mean differences of the other, a row of labels at a time."""
    found: dict[str, list[Values]] = {metric: [] for metric in NULL_METRICS}
    for start in range(0, len(labels), SEVERAL):
        some = slice(start, start + SEVERAL)
        positive, negative = fitted_labels[some], 1 - fitted_labels[some]
        weights = positive / positive.sum(1, keepdims=True) - negative / negative.sum(1, keepdims=True)
        scores = (weights.astype(np.float32) @ fitted) @ tested.T
        is_positive = labels[some].astype(bool)
        groups = [
            np.stack([row[kept] for row, kept in zip(scores, chosen, strict=True)])
            for chosen in (is_positive, ~is_positive)
        ]
        for metric in NULL_METRICS:
            found[metric].append(MEASURES[metric](groups[0], groups[1]))
    return {metric: np.concatenate(values) for metric, values in found.items()}


def _rows(
    activations: Activations, direction: str, metric: str, value: Values, low: Values, high: Values
) -> list[dict[str, Any]]:
    return [
        _row(layer, direction, metric, *map(float, numbers))
        for layer, *numbers in zip(activations.layers, value, low, high, strict=True)
    ]


def _row(layer: int, direction: str, metric: str, value: float, low: float, high: float) -> dict[str, Any]:
    row = {"layer": layer, "direction": direction, "metric": metric}
    return {**row, "value": value, "low": low, "high": high}
