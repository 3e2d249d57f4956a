"""Nulls: what a measure gives where there is nothing to find."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mechguard.statistics.measures import Measure, Scores, Weights


def swapped_labels(positive: int, negative: int, *, paired: bool, permutations: int, seed: int) -> Weights:
    """Rows of 0 and 1 over both groups: which examples are called positive when labels are dealt anew.

    Args:
        paired: whether positive and negative examples are aligned pairs, which then keep one of each label.
    """
    random = np.random.default_rng(seed)
    if paired:
        first = random.integers(0, 2, (permutations, positive)).astype(float)
        return np.concatenate([first, 1 - first], axis=1)
    labels = np.r_[np.ones(positive), np.zeros(negative)]
    return random.permuted(np.tile(labels, (permutations, 1)), axis=1)


def permuted_measure(
    measure: Measure,
    positive: Scores,
    negative: Scores,
    *,
    permutations: int,
    seed: int,
    paired: bool = False,
) -> Float[ndarray, "*rows permutations"]:
    """`measure` under shuffled labels: what no difference at all would look like at this n."""
    called = swapped_labels(
        positive.shape[-1], negative.shape[-1], paired=paired, permutations=permutations, seed=seed
    )
    both = np.concatenate([positive, negative], axis=-1)
    return measure(both, both, (called, 1 - called))
