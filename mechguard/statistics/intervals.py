"""Intervals: Wilson's for rates, the bootstrap by clusters for everything else.

A cluster is what was drawn independently: a prompt, a harmful and harmless pair, all prompts of one template.
A resample draws whole clusters and is kept as a row of counts, never as copies of the states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import optimize, stats

from mechguard.errors import MechguardError
from mechguard.statistics.measures import Measure, Scores, Values, Weights, auroc

LEVEL = 0.95
BLOCK = 128  # resamples that are held at once
Clusters = Sequence[Any] | Int[ndarray, " n"]
Bounds = tuple[Float[ndarray, "*rows"], Float[ndarray, "*rows"]]


@lru_cache(maxsize=4096)
def wilson_interval(successes: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a rate; (0, 1) when nothing was observed."""
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def independent_difference(
    first: tuple[float, float, float], second: tuple[float, float, float]
) -> tuple[float, float, float]:
    """second - first with a 95% interval, from two (value, low, high) of different prompts.

    Newcombe 1998, method 10, generalised by Donner and Zou: the distances to the near ends, added in
    quadrature. On the same prompts it is too wide, for what a pair shares does not cancel.
    """
    (a, a_low, a_high), (b, b_low, b_high) = first, second
    low = b - a - np.hypot(b - b_low, a_high - a)
    high = b - a + np.hypot(b_high - b, a - a_low)
    return b - a, float(low), float(high)


def percentile_interval(draws: Float[ndarray, "*rows draws"], level: float = LEVEL) -> Bounds:
    """The central interval that holds `level` of the draws, over the last axis."""
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(draws, [tail, 100 - tail], axis=-1)
    return low, high


def expanded_interval(draws: Float[ndarray, "*rows draws"], n: int, level: float = LEVEL) -> Bounds:
    """The percentile interval, taken as much further out as Student's t of `n` clusters asks for.

    Hesterberg 2015, "What teachers should know about the bootstrap", section 4.4: the plain percentile
    interval is too narrow by sqrt((n - 1) / n) and by the normal in place of t.
    """
    return percentile_interval(draws, _expanded(n, level))


def expanded_t(n: int, level: float = LEVEL) -> float:
    """How many bootstrap standard errors an interval reaches to either side, of `n` clusters, 2 or more."""
    return float(stats.t.ppf((1 + level) / 2, n - 1) * np.sqrt(n / (n - 1)))


def reverse_interval(
    value: Float[ndarray, "*rows"], draws: Float[ndarray, "*rows draws"], n: int, level: float = LEVEL
) -> Bounds:
    """2 value - quantiles of the draws: for estimates whose resamples are off as they are themselves.

    Davison and Hinkley 1997, the basic bootstrap interval, expanded as above.
    """
    low, high = expanded_interval(draws, n, level)
    return 2 * value - high, 2 * value - low


def simultaneous_interval(
    value: Float[ndarray, "*rows layer"],
    draws: Float[ndarray, "*rows layer draws"],
    n: int,
    level: float = LEVEL,
) -> tuple[Float[ndarray, "*rows layer"], Float[ndarray, "*rows layer"]]:
    """A band that holds the truth of *all* layers at once with this probability.

    The max-t bootstrap: one multiple of each layer's standard error, the quantile of the largest deviation
    over layers. After it a layer may be picked because it stands out.
    """
    errors = draws.std(-1, ddof=1)
    deviations = np.abs(draws - draws.mean(-1, keepdims=True))
    scaled = np.divide(
        deviations, errors[..., None], out=np.zeros_like(deviations), where=errors[..., None] > 0
    )
    quantile = np.quantile(scaled.max(-2), _expanded(n, level), axis=-1)
    half = quantile[..., None] * errors
    return value - half, value + half


def resample_weights(
    clusters: Clusters, resamples: int, seed: int, *, strata: Clusters | None = None
) -> Iterator[Weights]:
    """Bootstrap resamples of whole clusters, as counts per example, in blocks of at most 128 rows.

    The same seed gives the same resamples, so what is measured with it twice is measured in pairs.

    Args:
        clusters: the cluster of each example.
        strata: the stratum of each example; as many clusters are drawn from each as it has.

    Raises:
        MechguardError: a cluster lies in two strata.
    """
    _, first, members = np.unique(np.asarray(clusters), return_index=True, return_inverse=True)
    stratum = np.zeros(len(members), int) if strata is None else np.unique(strata, return_inverse=True)[1]
    of_cluster = stratum[first]
    if (of_cluster[members] != stratum).any():
        raise MechguardError("a cluster lies in several strata; give strata that hold whole clusters")
    random = np.random.default_rng(seed)
    for start in range(0, resamples, BLOCK):
        rows = min(BLOCK, resamples - start)
        counts = np.zeros((rows, len(first)))
        for one in np.unique(of_cluster):
            inside = np.flatnonzero(of_cluster == one)
            counts[:, inside] = random.multinomial(len(inside), np.full(len(inside), 1 / len(inside)), rows)
        yield counts[:, members]


def bootstrap_measure(
    measure: Measure,
    positive: Scores,
    negative: Scores,
    *,
    paired: bool,
    resamples: int,
    seed: int,
    clusters: tuple[Clusters, Clusters] | None = None,
) -> Bounds:
    """A 95% interval of `measure`.

    Args:
        paired: whether positive and negative examples are aligned pairs, which are drawn whole.
        clusters: the cluster of each positive and each negative example, in place of the pairs.
    """
    draws, n = bootstrap_draws(
        measure, positive, negative, paired=paired, resamples=resamples, seed=seed, clusters=clusters
    )
    low, high = expanded_interval(draws, n)
    if measure is auroc:
        return _with_score_interval(auroc(positive, negative), low, high, positive, negative)
    return low, high


def resample_indices(n: int, resamples: int, seed: int) -> Int[ndarray, "resamples n"]:
    """Rows of n indices drawn with replacement: the bootstrap."""
    return np.random.default_rng(seed).integers(0, n, (resamples, n))


def bootstrap_draws(
    measure: Measure,
    positive: Scores,
    negative: Scores,
    *,
    paired: bool,
    resamples: int,
    seed: int,
    clusters: tuple[Clusters, Clusters] | None = None,
) -> tuple[Values, int]:
    """`measure` of every resample, and how many clusters there are."""
    count = positive.shape[-1]
    if clusters is not None:
        joined, strata = np.concatenate([np.asarray(one, dtype=str) for one in clusters]), None
    elif paired:
        joined, strata = np.tile(np.arange(count), 2), None
    else:
        total = count + negative.shape[-1]
        joined, strata = np.arange(total), np.arange(total) < count
    blocks = [
        measure(positive, negative, (weights[:, :count], weights[:, count:]))
        for weights in resample_weights(joined, resamples, seed, strata=strata)
    ]
    n = len(np.unique(joined)) if strata is None else min(count, negative.shape[-1])
    return np.concatenate(blocks, axis=-1), n


def bootstrap_mean(values: Float[ndarray, " n"], *, seed: int, resamples: int = 1000) -> tuple[float, float]:
    """A 95% interval of the mean."""
    return bootstrap_rate(values, np.arange(len(values)), seed=seed, resamples=resamples)


def bootstrap_rate(
    values: Float[ndarray, " n"], clusters: Clusters, *, seed: int, resamples: int = 1000
) -> tuple[float, float]:
    """A 95% interval of a rate or a mean whose examples come in clusters, such as prompts of one template."""
    blocks = [weights @ values / weights.sum(1) for weights in resample_weights(clusters, resamples, seed)]
    low, high = expanded_interval(np.concatenate(blocks), len(np.unique(np.asarray(clusters))))
    return float(low), float(high)


def _expanded(n: int, level: float) -> float:
    if n < 2:
        return 1.0
    return float(1 - 2 * stats.norm.cdf(-expanded_t(n, level)))


def _with_score_interval(
    value: Values, low: Values, high: Values, positive: Scores, negative: Scores
) -> Bounds:
    """Where the groups do not overlap every resample agrees; there, Newcombe's interval in its place."""
    width = auroc_score_width(positive.shape[-1], negative.shape[-1])
    return np.where(value >= 1, 1 - width, low), np.where(value <= 0, width, high)


def auroc_score_width(positive: int, negative: int, level: float = LEVEL) -> float:
    """How far below 1 the truth may lie when an AUROC of exactly 1 is seen.

    Newcombe 2006, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic",
    method 5: the variance is that at the truth, not at the estimate.
    """
    z = stats.norm.ppf((1 + level) / 2)
    equal = (positive + negative) / 2 - 1

    def excess(truth: float) -> float:
        spread = 1 + equal * ((1 - truth) / (2 - truth) + truth / (1 + truth))
        return (1 - truth) - z * np.sqrt(truth * (1 - truth) * spread / (positive * negative))

    return float(1 - optimize.brentq(excess, 1e-9, 1 - 1e-12)) if excess(1e-9) > 0 else 1.0
