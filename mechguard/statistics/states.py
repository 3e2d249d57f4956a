"""How two groups of whole states lie apart: silhouette and a linear probe, without a direction given."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from mechguard.statistics.intervals import (
    Clusters,
    expanded_interval,
    resample_weights,
    wilson_interval,
)
from mechguard.statistics.measures import Weights

States = Float[ndarray, "n d_model"]
Groups = Int[ndarray, " n"]  # 0 or 1
PERMUTATIONS = 200
ROWS = 1024  # distances are held for so many states at once
Estimate = tuple[float, float, float]  # value, low, high


def measure_silhouette(
    states: States, groups: Groups, clusters: Clusters, *, resamples: int, seed: int
) -> Estimate:
    """The mean silhouette of two groups (Rousseeuw 1987), with a 95% interval.

    (b - a) / max(a, b), a the mean distance to one's own group, b that to the other: near 1 apart, 0 alike.
    For the interval no state is compared with its own cluster, to which it is nearer than to a new prompt.
    """
    centred = states - states.mean(0)
    n = len(states)
    members = np.unique(np.asarray(clusters), return_inverse=True)[1]
    value, sums = 0.0, np.zeros(resamples)
    for start in range(0, n, ROWS):
        block = slice(start, min(start + ROWS, n))
        distances = _distances(centred[block], centred)
        once, itself = np.ones((1, n)), np.arange(n)
        value += float(_silhouette_sums(distances, groups, itself, block, once)[0]) / n
        done = 0
        for weights in resample_weights(clusters, resamples, seed):
            found = _silhouette_sums(distances, groups, members, block, weights) / weights.sum(1)
            sums[done : done + len(weights)] += found
            done += len(weights)
    low, high = expanded_interval(sums, int(members.max()) + 1)
    return value, min(float(low), value), max(float(high), value)


def measure_probe(
    states: States, groups: Groups, clusters: Clusters, *, seed: int, permutations: int = PERMUTATIONS
) -> tuple[Estimate, Float[ndarray, " permutations"]]:
    """The accuracy of a linear (ridge) probe on held-out clusters, and that under shuffled labels.

    The clusters are cut in two halves, each tested by the probe of the other. An accident of one half
    enters both tests, so the interval is as wide as that of one half. Where there is nothing to find that
    is wider than need be; the test for that is the second return value.
    """
    names, members = np.unique(np.asarray(clusters), return_inverse=True)
    in_first = (np.random.default_rng(seed).permutation(len(names)) < len(names) // 2)[members]
    called = np.concatenate([groups[None], _dealt(groups, members, permutations, seed)])
    shares, bounds = [], []
    for test in (in_first, ~in_first):
        if min(np.bincount(groups[~test], minlength=2)) == 0 or not test.any():
            return (0.5, 0.0, 1.0), np.full(permutations, 0.5)
        hits = probe_hits(states[~test], called[:, ~test], states[test], called[:, test])
        bounds.append(_share(hits[0], members[test], seed))
        shares.append(hits.mean(1))
    value, low, high = np.mean(bounds, axis=0)
    return (float(value), float(low), float(high)), np.mean(shares, axis=0)[1:]


def probe_hits(
    fitted: States,
    labels: Int[ndarray, "draws n"],
    tested: States,
    truth: Int[ndarray, "draws m"],
) -> Bool[ndarray, "draws m"]:
    """Which tested states a ridge classifier on standardised states gets right, for each row of labels."""
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), Ridge()).fit(fitted, 2.0 * labels.T - 1)
    predicted = np.asarray(probe.predict(tested)).reshape(len(tested), -1).T > 0
    return np.asarray(predicted == truth.astype(bool))


def _dealt(
    groups: Groups, members: Int[ndarray, " n"], permutations: int, seed: int
) -> Int[ndarray, "draws n"]:
    """Labels dealt anew: exchanged within clusters that hold one of each, else among all."""
    random = np.random.default_rng(seed + 1)
    if (np.bincount(members) == 2).all() and (np.bincount(members, weights=groups) == 1).all():
        turned = random.integers(0, 2, (permutations, members.max() + 1))[:, members]
        return np.where(turned == 1, 1 - groups, groups)
    return random.permuted(np.tile(groups, (permutations, 1)), axis=1)


def _share(hits: Bool[ndarray, " n"], clusters: Clusters, seed: int, resamples: int = 400) -> Estimate:
    """A share whose examples come in clusters; where all agree, Wilson's interval of as many clusters."""
    n = len(np.unique(np.asarray(clusters)))
    value = float(hits.mean())
    if value in (0.0, 1.0):
        return value, *wilson_interval(round(value * n), n)
    blocks = [weights @ hits / weights.sum(1) for weights in resample_weights(clusters, resamples, seed)]
    low, high = expanded_interval(np.concatenate(blocks), n)
    return value, float(low), float(high)


def _distances(some: States, every: States) -> Float[ndarray, "some n"]:
    squares = (some**2).sum(1)[:, None] + (every**2).sum(1) - 2 * some @ every.T
    return np.sqrt(squares.clip(0))


def _silhouette_sums(
    distances: Float[ndarray, "some n"],
    groups: Groups,
    members: Int[ndarray, " n"],
    block: slice,
    weights: Weights,
) -> Float[ndarray, " draws"]:
    """The silhouettes of a block of states, summed with their weights; nobody meets their own cluster."""
    others = (members[block, None] != members).astype(float)
    apart = distances * others
    own = groups[block] == 1
    sums, totals = [], []
    for kind in (0, 1):
        counted = weights * (groups == kind)
        sums.append(counted @ apart.T)
        totals.append(counted @ others.T)
    means = [np.divide(s, t, out=np.zeros_like(s), where=t > 0) for s, t in zip(sums, totals, strict=True)]
    inside, across = np.where(own, means[1], means[0]), np.where(own, means[0], means[1])
    larger = np.maximum(inside, across)
    silhouettes = np.divide(across - inside, larger, out=np.zeros_like(larger), where=larger > 0)
    alone = np.where(own, totals[1], totals[0]) <= 0
    return np.einsum("ri,ri->r", weights[:, block], np.where(alone, 0.0, silhouettes))
