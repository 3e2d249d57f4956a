"""Intervals and measures against known answers and against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mechguard.statistics import (
    auroc,
    bootstrap_measure,
    dprime,
    percentile_interval,
    permuted_measure,
    wilson_interval,
)


def test_wilson_interval_of_a_known_case():
    low, high = wilson_interval(15, 100)
    assert (round(low, 4), round(high, 4)) == (0.0931, 0.2328)


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (20, 20), (0, 0)])
def test_wilson_interval_stays_inside_the_unit_interval(hits, n):
    low, high = wilson_interval(hits, n)
    assert 0 <= low <= high <= 1


def test_auroc_of_identical_groups_is_chance_and_of_distant_ones_is_one():
    same = np.arange(10.0)
    assert auroc(same, same) == 0.5
    assert auroc(same + 100, same) == 1.0
    assert auroc(same - 100, same) == 0.0


def test_auroc_equals_scikit_learns_with_ties():
    random = np.random.default_rng(0)
    positive = random.integers(0, 5, 40).astype(float)
    negative = random.integers(0, 4, 30).astype(float)
    expected = roc_auc_score([1] * 40 + [0] * 30, np.concatenate([positive, negative]))
    assert auroc(positive, negative) == pytest.approx(expected)


def test_dprime_of_a_planted_distance():
    random = np.random.default_rng(0)
    positive, negative = random.normal(3, 2, 50_000), random.normal(0, 2, 50_000)
    assert dprime(positive, negative) == pytest.approx(1.5, abs=0.03)


def test_dprime_of_constants_is_zero_not_nan():
    assert dprime(np.ones(4), np.ones(4)) == 0


def test_measures_keep_the_axes_before_the_examples():
    positive, negative = np.random.default_rng(0).normal(size=(2, 5, 30, 8))
    assert auroc(positive, negative).shape == (5, 30)
    assert auroc(positive, negative)[3, 7] == auroc(positive[3, 7], negative[3, 7])


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    """True AUROC of two unit normals one apart is Phi(1 / sqrt 2) = 0.7602."""
    random = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        positive, negative = random.normal(1, 1, 60), random.normal(0, 1, 60)
        low, high = bootstrap_measure(auroc, positive, negative, paired=False, resamples=400, seed=seed)
        covered += low <= 0.7602 <= high
    assert covered >= 88


def test_shuffled_labels_are_centred_on_chance():
    random = np.random.default_rng(2)
    positive, negative = random.normal(2, 1, 50), random.normal(0, 1, 50)
    null = permuted_measure(auroc, positive, negative, permutations=2000, seed=0)
    low, high = percentile_interval(null)
    assert null.mean() == pytest.approx(0.5, abs=0.01)
    assert low < 0.5 < high < auroc(positive, negative)
