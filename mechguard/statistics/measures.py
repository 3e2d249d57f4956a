"""How far two groups of scores lie apart.

A measure takes two arrays whose last axis runs over examples and keeps every axis before it, so that one call
serves all layers. With `weights`, rows of counts for either group, it is measured once per row: a bootstrap
resample or a permutation is one row, and all of them cost a few products of matrices.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

FEW_PAIRS = 2**20  # pairs of a positive and a negative example that are compared one with one
Scores = Float[ndarray, "*rows examples"]
Weights = Float[ndarray, "draws examples"]  # how often each example counts; zero leaves it out
Values = Float[ndarray, "*rows draws"]  # without weights, one per row


class Measure(Protocol):
    """A function of the scores of two groups."""

    def __call__(
        self, positive: Scores, negative: Scores, weights: tuple[Weights, Weights] | None = None
    ) -> Values: ...


def auroc(positive: Scores, negative: Scores, weights: tuple[Weights, Weights] | None = None) -> Values:
    """The chance that a positive example scores above a negative one; ties count half."""
    scores = np.concatenate([positive, negative], axis=-1)
    count = positive.shape[-1]
    if weights is None:
        above = stats.rankdata(scores, axis=-1)[..., :count].sum(-1) - count * (count + 1) / 2
        return np.asarray(above / (count * negative.shape[-1]))
    first, second = weights
    few = count * negative.shape[-1] <= FEW_PAIRS
    count_wins = _compared_auroc if few else _sorted_auroc
    rows = [count_wins(row, count, first, second) for row in scores.reshape(-1, scores.shape[-1])]
    return np.stack(rows).reshape(*scores.shape[:-1], len(first))


def dprime(positive: Scores, negative: Scores, weights: tuple[Weights, Weights] | None = None) -> Values:
    """(mean1 - mean0) / sqrt((var1 + var0) / 2): the distance in units of the pooled deviation."""
    mean1, var1, mean0, var0 = _moments(positive, negative, weights)
    pooled = (var1 + var0) / 2
    difference = mean1 - mean0
    return np.divide(difference, np.sqrt(pooled), out=np.zeros_like(difference), where=pooled > 0)


def fisher(positive: Scores, negative: Scores, weights: tuple[Weights, Weights] | None = None) -> Values:
    """Fisher's criterion (mean1 - mean0)^2 / (var1 + var0), which is d'^2 / 2."""
    return np.asarray(dprime(positive, negative, weights) ** 2 / 2)


def overlap(positive: Scores, negative: Scores, weights: tuple[Weights, Weights] | None = None) -> Values:
    """The area under both of two normal densities with the groups' means and variances: 1 when alike.

    Inman and Bradley 1989, the overlapping coefficient with unequal variances. Groups without spread overlap
    wholly where their means agree, else not at all.
    """
    mean1, var1, mean0, var0 = np.broadcast_arrays(*_moments(positive, negative, weights))
    narrow = np.where(var1 < var0, var1, var0)
    wide = np.maximum(np.where(var1 < var0, var0, var1), np.finfo(float).tiny)
    gap = np.abs(mean1 - mean0)
    spread = wide - narrow
    alike = spread < 1e-9 * wide
    with np.errstate(divide="ignore", invalid="ignore"):
        equal = 2 * stats.norm.cdf(-gap / np.sqrt(wide) / 2)
        # Where the densities cross, on an axis with the narrow one at 0 and the wide one at `gap`.
        root = np.sqrt(narrow * wide * (gap**2 + spread * np.log(wide / narrow)))
        low, high = (-narrow * gap - root) / spread, (-narrow * gap + root) / spread
        inside = stats.norm.cdf((high - gap) / np.sqrt(wide)) - stats.norm.cdf((low - gap) / np.sqrt(wide))
        outside = 1 - stats.norm.cdf(high / np.sqrt(narrow)) + stats.norm.cdf(low / np.sqrt(narrow))
        area = np.where(alike, equal, inside + outside)
    return np.where(narrow > 0, area, np.where(gap > 0, 0.0, 1.0))


MEASURES: dict[str, Measure] = {"auroc": auroc, "dprime": dprime, "fisher": fisher, "overlap": overlap}


def _compared_auroc(
    scores: Float[ndarray, " both"], count: int, first: Weights, second: Weights
) -> Float[ndarray, " draws"]:
    """By comparing each with each: one product of matrices, for groups that are not large."""
    positive, negative = scores[:count, None], scores[count:]
    wins = (positive > negative) + (positive == negative) / 2
    return _share_of_pairs(np.einsum("rn,rn->r", first @ wins, second), first, second)


def _sorted_auroc(
    scores: Float[ndarray, " both"], count: int, first: Weights, second: Weights
) -> Float[ndarray, " draws"]:
    """By sorting both: memory does not grow with their product."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] > ordered[:-1]])  # of every run of ties
    positive = np.concatenate([first, np.zeros((len(first), second.shape[1]))], axis=1)[:, order]
    negative = np.concatenate([np.zeros((len(second), count)), second], axis=1)[:, order]
    if len(starts) < len(scores):
        positive = np.add.reduceat(positive, starts, axis=1)
        negative = np.add.reduceat(negative, starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    return _share_of_pairs(np.einsum("rn,rn->r", positive, below), first, second)


def _share_of_pairs(above: Float[ndarray, " draws"], first: Weights, second: Weights) -> ndarray:
    totals = first.sum(1) * second.sum(1)
    return np.divide(above, totals, out=np.full(len(first), 0.5), where=totals > 0)


def _moments(
    positive: Scores, negative: Scores, weights: tuple[Weights, Weights] | None
) -> tuple[Values, Values, Values, Values]:
    """Mean and unbiased variance of either group."""
    if weights is None:
        return positive.mean(-1), positive.var(-1, ddof=1), negative.mean(-1), negative.var(-1, ddof=1)
    # Around a common origin, so that squares of large scores do not swallow small differences.
    origin = np.concatenate([positive, negative], axis=-1).mean(-1, keepdims=True)
    return *_weighted(positive - origin, weights[0]), *_weighted(negative - origin, weights[1])


def _weighted(scores: Scores, weights: Weights) -> tuple[Values, Values]:
    total = weights.sum(1)
    mean = scores @ weights.T / np.maximum(total, 1)
    squares = scores**2 @ weights.T - total * mean**2
    return mean, np.maximum(squares, 0) / np.maximum(total - 1, 1)
