"""The modality gap: how far the states of a prompt move when an image enters.

X are the states of the text alone, Y those of the same prompts with an image, row by row. Every metric is a
function of mean inner products, weighted over the prompts; a bootstrap resample is one row of weights.

A mean inner product of states comes in two ways. *Together*, over all pairs of prompts, it gives the
published formulas, and the column `value`. *Apart*, without a prompt's product with itself, it is free of
the bias by which the former grows with d_model over n (a U-statistic); the intervals come from it, and are
widened to hold `value` where that is off. Where d_model is far above n, trust the interval.

Sources: centroid distance and cone, Liang et al., "Mind the Gap", NeurIPS 2022; RMG, Schrodi et al. 2024;
linear CKA, Kornblith et al. 2019, and without bias by the HSIC of Song et al. 2012; the decomposition of
the shift in the manner of ShiftDC, arXiv 2502.13095.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mechguard.activations import Activations
from mechguard.directions import Directions
from mechguard.errors import MechguardError
from mechguard.prompts import HARMFUL
from mechguard.result import Result
from mechguard.statistics import (
    Weights,
    expanded_interval,
    measure_probe,
    percentile_interval,
    resample_weights,
)

OBSERVED, SWAPPED, RANDOM = "observed", "shuffled modality", "random direction"
ROWS = 1024  # inner products of so many prompts with all others are held at once
TINY = 1e-12
States = Float[ndarray, "n d_model"]
Draws = Float[ndarray, " draws"]
Inner = Callable[[States, States, Weights], Draws]


@dataclass(frozen=True)
class Moved:
    """The text states X and the image states Y of the same n prompts."""

    x: States
    y: States

    @cached_property
    def unit_x(self) -> States:
        return _unit(self.x)

    @cached_property
    def unit_y(self) -> States:
        return _unit(self.y)

    @cached_property
    def shift(self) -> States:
        """h(x, image) - h(x)."""
        return self.y - self.x


def together(a: States, b: States, weights: Weights) -> Draws:
    """The inner product of two weighted means, a prompt's product with itself included."""
    return np.einsum("rd,rd->r", weights @ a, weights @ b)


def apart(a: States, b: States, weights: Weights) -> Draws:
    """The mean inner product over pairs of *different* prompts; weights are not negative and sum to 1."""
    squares = weights**2
    own = squares @ np.einsum("nd,nd->n", a, b)
    return np.asarray((together(a, b, weights) - own) / (1 - squares.sum(1)).clip(TINY))


def centroid_distance(moved: Moved, weights: Weights, inner: Inner) -> Draws:
    """||mu_X - mu_Y||, in units of the hidden state."""
    return np.sqrt(inner(moved.shift, moved.shift, weights).clip(0))


def centroid_distance_normalised(moved: Moved, weights: Weights, inner: Inner) -> Draws:
    """The same of states scaled to unit length."""
    shift = moved.unit_y - moved.unit_x
    return np.sqrt(inner(shift, shift, weights).clip(0))


def cosine_gap(moved: Moved, weights: Weights, inner: Inner) -> Draws:
    """1 - cos(mu_X, mu_Y)."""
    squares = inner(moved.x, moved.x, weights) * inner(moved.y, moved.y, weights)
    return np.asarray(1 - inner(moved.x, moved.y, weights) / np.sqrt(squares.clip(TINY)))


def cone_text(moved: Moved, weights: Weights, inner: Inner) -> Draws:
    """Mean cosine between the text states of two different prompts."""
    return apart(moved.unit_x, moved.unit_x, weights)


def cone_image(moved: Moved, weights: Weights, inner: Inner) -> Draws:
    """Mean cosine between the image states of two different prompts."""
    return apart(moved.unit_y, moved.unit_y, weights)


def rmg(moved: Moved, weights: Weights, inner: Inner) -> Draws:
    """Relative modality gap with d = 1 - (cos + 1) / 2: the mean distance of a prompt's two states
    over itself plus the mean distance within the modalities; 1/2 when both are alike."""
    between = weights @ (1 - np.einsum("nd,nd->n", moved.unit_x, moved.unit_y)) / 2
    within = (2 - cone_text(moved, weights, inner) - cone_image(moved, weights, inner)) / 4
    return np.asarray(between / (between + within).clip(TINY))


def cka(moved: Moved, weights: Weights, inner: Inner) -> Draws:
    """Linear CKA of the centred states, ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F); 1 when alike."""
    independence = _hsic_apart if inner is apart else _hsic
    x, y = moved.x - moved.x.mean(0), moved.y - moved.y.mean(0)
    both, own_x, own_y = independence(x, y, weights)
    return np.asarray(both / np.sqrt((own_x * own_y).clip(TINY**2)))


def shift_norm_ratio(moved: Moved, weights: Weights, inner: Inner) -> Draws:
    """Mean ||h(x, image) - h(x)|| over mean ||h(x)||."""
    lengths, shifts = (np.linalg.norm(states, axis=1) for states in (moved.x, moved.shift))
    return np.asarray(weights @ shifts / (weights @ lengths).clip(TINY))


def shift_consistency(moved: Moved, weights: Weights, inner: Inner) -> Draws:
    """Mean cosine between each prompt's shift and the mean shift; 1 when all move alike."""
    squares = inner(moved.shift, moved.shift, weights)
    cosines = inner(_unit(moved.shift), moved.shift, weights) / np.sqrt(squares.clip(TINY))
    return np.where(squares > TINY, cosines, 0.0).clip(-1, 1)


METRICS: dict[str, Callable[[Moved, Weights, Inner], Draws]] = {
    metric.__name__: metric
    for metric in (
        centroid_distance,
        centroid_distance_normalised,
        cosine_gap,
        cone_text,
        cone_image,
        rmg,
        cka,
        shift_norm_ratio,
        shift_consistency,
    )
}
# What exchanging a prompt's two states at random would leave, were there no gap: as many weights are
# negative.
NULLS = ("centroid_distance", "centroid_distance_normalised", "shift_consistency")


def measure_modality_gap(
    text: Activations,
    image: Activations,
    *,
    directions: Directions | None = None,
    nulls: bool = True,
    resamples: int = 400,
    seed: int = 0,
    split: str = "test",
) -> Result:
    """The gap between the states of the same prompts without and with an image, layer by layer.

    With `directions` also what the shift h(x, image) - h(x) does to safety, v_1 their first, V all of them:
    `safety_share`, mean |shift . v_1| / ||shift||; `safety_energy`, the share of the shifts' squared length
    inside V, and `safety_energy_of_mean`, that of the mean shift; `shift_along`, mean shift . v_1 (harmful is
    positive), and `shift_across`, the mean length of what lies outside V, both in units of the hidden
    state; and `shift_along_relative`, the first for harmful prompts, in units of the distance between
    harmful and harmless texts along v_1 (left out where that is not shown to differ from 0): at -1 they lie
    where harmless texts do.

    Args:
        text: states of the text alone (of the LLM, or of the VLM without a picture).
        image: states of the same prompts, in the same order, with a picture.
        nulls: also what the distances would be if text and image were exchanged at random per prompt, and the
            shares of random directions.
        resamples: bootstrap resamples of prompts (whole pairs where there are pairs), and random exchanges.

    Returns:
        Rows layer x metric x direction ("observed" or the null), with 95% intervals over prompts.

    Raises:
        MechguardError: the two do not hold the same prompts at the same layers.
    """
    _check_same(text, image)
    n = len(text.prompts)
    clusters = [p.id if p.pair is None else p.pair for p in text.prompts]
    if len(set(clusters)) < 2:
        clusters = list(map(str, range(n)))
    weights = np.concatenate(list(resample_weights(clusters, resamples, seed)))
    weights /= weights.sum(1, keepdims=True)
    rows: list[dict[str, Any]] = []
    for layer in text.layers:
        moved = Moved(text.at(layer).double().numpy(), image.at(layer).double().numpy())
        found = list(_gap_rows(moved, weights, len(set(clusters)), nulls, seed))
        if directions is not None:
            basis = directions.at(layer).double().numpy()
            is_harmful = text.labels == HARMFUL
            found += _safety_rows(moved, basis, is_harmful, weights, len(set(clusters)), nulls, seed)
        rows += [{"layer": layer, **row} for row in found]
    for row in rows:
        row.setdefault("n", n)
        row.update(condition=f"{text.name} -> {image.name}", split=split)
    return Result.from_rows(rows, **image.about, text=text.name, seed=seed, resamples=resamples)


def _check_same(text: Activations, image: Activations) -> None:
    if [p.id for p in text.prompts] != [p.id for p in image.prompts]:
        raise MechguardError(
            f"{text!r} and {image!r} hold different prompts; collect the same prompts twice, the second "
            "time .with_image(...)"
        )
    if text.layers != image.layers or text.d_model != image.d_model:
        raise MechguardError(f"{text!r} and {image!r} do not hold the same layers")


def _gap_rows(
    moved: Moved, weights: Weights, clusters: int, nulls: bool, seed: int
) -> Iterator[dict[str, Any]]:
    n = len(moved.x)
    once = np.full((1, n), 1 / n)
    for name, metric in METRICS.items():
        draws = metric(moved, weights, apart)
        yield _row(OBSERVED, name, float(metric(moved, once, together)[0]), draws, clusters)
    states = np.concatenate([moved.x, moved.y])
    modality, prompt = np.repeat([0, 1], n), np.tile(np.arange(n), 2)
    (value, low, high), shuffled = measure_probe(states, modality, prompt, seed=seed)
    accuracy = {"direction": OBSERVED, "metric": "modality_accuracy", "value": value, "n": 2 * n}
    yield {**accuracy, "low": low, "high": high}
    if nulls:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], weights.shape) / n
        for name in NULLS:
            yield _null_row(SWAPPED, name, METRICS[name](moved, signs, together))
        yield {**_null_row(SWAPPED, "modality_accuracy", shuffled), "n": 2 * n}


def _safety_rows(
    moved: Moved,
    basis: Float[ndarray, "rank d_model"],
    is_harmful: ndarray,
    weights: Weights,
    clusters: int,
    nulls: bool,
    seed: int,
) -> Iterator[dict[str, Any]]:
    n = len(moved.x)
    every = np.concatenate([np.full((1, n), 1 / n), weights])
    for name, draws in _decomposed(moved, basis, is_harmful, every).items():
        yield _row(OBSERVED, name, float(draws[0]), draws[1:], clusters)
    if nulls:
        random = np.random.default_rng(seed).normal(size=(len(weights), *basis.shape))
        bases = np.linalg.qr(random.transpose(0, 2, 1))[0].transpose(0, 2, 1)
        found = [_shares(moved, one, every[:1]) for one in bases]
        for name in found[0]:
            yield _null_row(RANDOM, name, np.array([float(shares[name][0]) for shares in found]))


def _shares(moved: Moved, basis: Float[ndarray, "rank d_model"], weights: Weights) -> dict[str, Draws]:
    """How much of the shift lies along a subspace."""
    inside = moved.shift @ basis.T
    squares = np.einsum("nd,nd->n", moved.shift, moved.shift)
    shares = np.abs(inside[:, 0]) / np.sqrt(squares).clip(TINY)
    of_mean = together(inside, inside, weights) / together(moved.shift, moved.shift, weights).clip(TINY)
    return {
        "safety_share": weights @ shares,
        "safety_energy": weights @ (inside**2).sum(1) / (weights @ squares).clip(TINY),
        "safety_energy_of_mean": of_mean,
    }


def _decomposed(
    moved: Moved, basis: Float[ndarray, "rank d_model"], is_harmful: ndarray, weights: Weights
) -> dict[str, Draws]:
    """The shift in its safety-relevant part, along the basis, and the rest."""
    inside = moved.shift @ basis.T
    first = apart(inside, inside, weights) / apart(moved.shift, moved.shift, weights).clip(TINY)
    found = _shares(moved, basis, weights)
    found["safety_energy_of_mean"][1:] = first[1:].clip(0, 1)
    found["shift_along"] = weights @ inside[:, 0]
    found["shift_across"] = weights @ np.linalg.norm(moved.shift - inside @ basis, axis=1)
    if is_harmful.any() and not is_harmful.all():
        distance = _mean(moved.x @ basis[0], weights * is_harmful)
        distance = distance - _mean(moved.x @ basis[0], weights * ~is_harmful)
        along = _mean(inside[:, 0], weights * is_harmful)
        low, high = percentile_interval(distance)
        if low > 0 or high < 0:  # else a ratio to what may be nothing
            found["shift_along_relative"] = along / distance
    return found


def _mean(values: Float[ndarray, " n"], weights: Weights) -> Draws:
    return np.asarray(weights @ values / weights.sum(1).clip(TINY))


def _hsic(x: States, y: States, weights: Weights) -> tuple[Draws, ...]:
    """Weighted HSIC of (x, y), (x, x) and (y, y) by linear kernels, each centred on its weighted mean."""
    found = []
    for a, b in ((x, y), (x, x), (y, y)):
        sums = _kernel_sums(a, b, weights, own=True)
        found.append(sums["ij ij"] - 2 * sums["ij ik"] + sums["ij"] * sums["kl"])
    return tuple(found)


def _hsic_apart(x: States, y: States, weights: Weights) -> tuple[Draws, ...]:
    """The same as means over two, three and four different prompts: Song et al. 2012, with weights."""
    s2, s3, s4 = ((weights**power).sum(1) for power in (2, 3, 4))
    pairs, triples = (1 - s2).clip(TINY), (1 - 3 * s2 + 2 * s3).clip(TINY)
    fours = (1 - 6 * s2 + 8 * s3 + 3 * s2**2 - 6 * s4).clip(TINY)
    found = []
    for a, b in ((x, y), (x, x), (y, y)):
        sums = _kernel_sums(a, b, weights, own=False)
        third = sums["ij ik"] - sums["ij ijj"]
        fourth = sums["ij"] * sums["kl"] - 4 * sums["iij ik"] + 2 * sums["iij ijj"]
        found.append(sums["ij ij"] / pairs - 2 * third / triples + fourth / fours)
    return tuple(found)


def _kernel_sums(a: States, b: States, weights: Weights, *, own: bool) -> dict[str, Draws]:
    """Weighted sums of products K_ij L_ij, K_ij L_ik, ... of the kernels K of `a` and L of `b`.

    A repeated index in a name repeats its weight: "ij ijj" is the sum of w_i w_j^2 K_ij L_ij. Rows of the
    kernels are made in blocks, so that no n x n matrix is held for many prompts.
    """
    squares = weights**2
    names = ("ij ij", "ij ik", "ij ijj", "iij ik", "iij ijj", "ij", "kl")
    sums = {name: np.zeros(len(weights)) for name in names}
    for start in range(0, len(a), ROWS):
        block = slice(start, min(start + ROWS, len(a)))
        k, m = a[block] @ a.T, b[block] @ b.T
        if not own:
            at = np.arange(len(k))
            k[at, start + at] = m[at, start + at] = 0.0
        both, here, twice = k * m, weights[:, block], squares[:, block]
        k_means, m_means = weights @ k.T, weights @ m.T
        crossed = k_means * m_means
        parts = (
            here * (weights @ both.T),
            here * crossed,
            here * (squares @ both.T),
            twice * crossed,
            twice * (squares @ both.T),
            here * k_means,
            here * m_means,
        )
        for name, part in zip(names, parts, strict=True):
            sums[name] += part.sum(1)
    return sums


def _unit(states: States) -> States:
    return np.asarray(states / np.linalg.norm(states, axis=1, keepdims=True).clip(TINY))


def _row(direction: str, metric: str, value: float, draws: Draws, clusters: int) -> dict[str, Any]:
    low, high = expanded_interval(draws, clusters)
    row = {"direction": direction, "metric": metric, "value": value}
    return {**row, "low": min(float(low), value), "high": max(float(high), value)}


def _null_row(direction: str, metric: str, draws: Draws) -> dict[str, Any]:
    low, high = percentile_interval(draws)
    row = {"direction": direction, "metric": metric, "value": float(draws.mean())}
    return {**row, "low": float(low), "high": float(high)}
