"""Intervals, resampling and the measures of separation. NumPy arrays in, numbers out; no models.

A measure takes two arrays whose last axis runs over examples and keeps every axis before it, so that
one call serves all layers and all resamples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats

Measure = Callable[
    [Float[ndarray, "*rows positive"], Float[ndarray, "*rows negative"]], Float[ndarray, "*rows"]
]
LEVEL = 0.95


def wilson_interval(successes: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a rate; (0, 1) when nothing was observed."""
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def auroc(
    positive: Float[ndarray, "*rows positive"], negative: Float[ndarray, "*rows negative"]
) -> Float[ndarray, "*rows"]:
    """The chance that a positive example scores above a negative one; ties count half."""
    count = positive.shape[-1]
    ranks = stats.rankdata(np.concatenate([positive, negative], axis=-1), axis=-1)
    above = ranks[..., :count].sum(-1) - count * (count + 1) / 2
    return np.asarray(above / (count * negative.shape[-1]))


def dprime(
    positive: Float[ndarray, "*rows positive"], negative: Float[ndarray, "*rows negative"]
) -> Float[ndarray, "*rows"]:
    """(mean1 - mean0) / sqrt((var1 + var0) / 2): the distance in units of the pooled deviation."""
    pooled = (positive.var(-1, ddof=1) + negative.var(-1, ddof=1)) / 2
    difference = positive.mean(-1) - negative.mean(-1)
    return np.divide(difference, np.sqrt(pooled), out=np.zeros_like(difference), where=pooled > 0)


def percentile_interval(
    draws: Float[ndarray, "*rows draws"], level: float = LEVEL
) -> tuple[Float[ndarray, "*rows"], Float[ndarray, "*rows"]]:
    """The central interval that holds `level` of the draws, over the last axis."""
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(draws, [tail, 100 - tail], axis=-1)
    return low, high


def resample_indices(n: int, resamples: int, seed: int) -> Int[ndarray, "resamples n"]:
    """Rows of n indices drawn with replacement: the bootstrap."""
    return np.random.default_rng(seed).integers(0, n, (resamples, n))


def bootstrap_measure(
    measure: Measure,
    positive: Float[ndarray, "*rows positive"],
    negative: Float[ndarray, "*rows negative"],
    *,
    paired: bool,
    resamples: int,
    seed: int,
) -> tuple[Float[ndarray, "*rows"], Float[ndarray, "*rows"]]:
    """A 95% percentile interval of `measure`, resampling whole pairs if `paired`, else each group."""
    first = resample_indices(positive.shape[-1], resamples, seed)
    second = first if paired else resample_indices(negative.shape[-1], resamples, seed + 1)
    return percentile_interval(measure(positive[..., first], negative[..., second]))


def bootstrap_mean(values: Float[ndarray, " n"], *, seed: int, resamples: int = 1000) -> tuple[float, float]:
    """A 95% percentile interval of the mean."""
    low, high = percentile_interval(values[resample_indices(len(values), resamples, seed)].mean(-1))
    return float(low), float(high)


def permuted_measure(
    measure: Measure,
    positive: Float[ndarray, "*rows positive"],
    negative: Float[ndarray, "*rows negative"],
    *,
    permutations: int,
    seed: int,
) -> Float[ndarray, "*rows permutations"]:
    """`measure` under shuffled labels: what no difference at all would look like at this n."""
    both = np.concatenate([positive, negative], axis=-1)
    random = np.random.default_rng(seed)
    order = random.permuted(np.tile(np.arange(both.shape[-1]), (permutations, 1)), axis=1)
    shuffled = both[..., order]
    count = positive.shape[-1]
    return measure(shuffled[..., :count], shuffled[..., count:])
