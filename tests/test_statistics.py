"""Intervals and measures against known answers and against scikit-learn."""

from statistics import NormalDist

import calibration
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import roc_auc_score, silhouette_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import mechguard.statistics.measures as measures
from mechguard.statistics import (
    MEASURES,
    adjust_holm,
    auroc,
    bootstrap_measure,
    bootstrap_rate,
    compare_outcomes,
    count_prompts_needed,
    dprime,
    fisher,
    independent_difference,
    mcnemar_p,
    measure_probe,
    measure_silhouette,
    overlap,
    paired_difference,
    percentile_interval,
    permuted_measure,
    probe_hits,
    resample_weights,
    simultaneous_interval,
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


@pytest.mark.parametrize("kinds", [3, 10_000])  # of scores: with ties, and hardly any
def test_a_resampled_auroc_is_that_of_the_repeated_scores_however_it_is_counted(kinds, monkeypatch):
    random = np.random.default_rng(0)
    scores = [random.integers(0, kinds, (2, n)).astype(float) for n in (40, 30)]
    counts = [random.integers(0, 3, (5, n)).astype(float) for n in (40, 30)]
    found = auroc(*scores, tuple(counts))
    for row, draw in np.ndindex(2, 5):
        repeated = [
            np.repeat(one[row], times[draw].astype(int)) for one, times in zip(scores, counts, strict=True)
        ]
        assert found[row, draw] == pytest.approx(auroc(*repeated))
    monkeypatch.setattr(measures, "FEW_PAIRS", 0)
    assert (auroc(*scores, tuple(counts)) == found).all()


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


def test_fisher_is_half_the_square_of_dprime_and_equals_its_formula():
    positive, negative = np.random.default_rng(0).normal([[1.0], [0.0]], 1, (2, 30))
    formula = (positive.mean() - negative.mean()) ** 2 / (positive.var(ddof=1) + negative.var(ddof=1))
    assert fisher(positive, negative) == pytest.approx(formula)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 1.0), (3.0, 0.5), (0.2, -2.0), (1.7, 0.0)])
def test_overlap_equals_the_standard_librarys(scale, shift):
    random = np.random.default_rng(0)
    positive, negative = random.normal(shift, scale, 40), random.normal(0, 1, 50)
    expected = NormalDist.from_samples(positive).overlap(NormalDist.from_samples(negative))
    assert overlap(positive, negative) == pytest.approx(expected)


def test_overlap_of_constants_is_whole_or_nothing():
    assert overlap(np.ones(4), np.ones(4)) == 1
    assert overlap(np.ones(4), np.zeros(4)) == 0


@pytest.mark.parametrize("name", list(MEASURES))
def test_weights_give_what_repeated_examples_give(name):
    random = np.random.default_rng(0)
    positive, negative = random.integers(0, 9, 12) / 2.0, random.integers(0, 7, 15) / 2.0
    rows = random.integers(0, 12, 12), random.integers(0, 15, 15)
    counts = [
        np.bincount(some, minlength=len(group))[None] * 1.0
        for some, group in zip(rows, (positive, negative), strict=True)
    ]
    weighted = MEASURES[name](positive, negative, (counts[0], counts[1]))
    assert weighted[0] == pytest.approx(MEASURES[name](positive[rows[0]], negative[rows[1]]))


def test_silhouette_equals_scikit_learns():
    states = np.random.default_rng(0).normal(size=(40, 5))
    states[:15, 0] += 2
    groups = np.array([1] * 15 + [0] * 25)
    value, low, high = measure_silhouette(states, groups, np.arange(40), resamples=50, seed=0)
    assert value == pytest.approx(silhouette_score(states, groups))
    assert low <= value <= high


def test_silhouette_in_blocks_of_rows_is_the_same(monkeypatch):
    states = np.random.default_rng(0).normal(size=(40, 5))
    groups = np.arange(40) % 2
    whole = measure_silhouette(states, groups, np.arange(40) // 2, resamples=20, seed=0)
    monkeypatch.setattr("mechguard.statistics.states.ROWS", 7)
    assert measure_silhouette(states, groups, np.arange(40) // 2, resamples=20, seed=0) == pytest.approx(
        whole
    )


def test_the_probe_is_scikit_learns_ridge_classifier():
    random = np.random.default_rng(0)
    fitted, tested = random.normal(size=(60, 8)), random.normal(size=(40, 8))
    labels, truth = (fitted[:, 0] > 0).astype(int), (tested[:, 0] > 0).astype(int)
    probe = make_pipeline(StandardScaler(), RidgeClassifier()).fit(fitted, labels)
    hits = probe_hits(fitted, labels[None], tested, truth[None])[0]
    assert np.array_equal(hits, probe.predict(tested) == truth)


def test_the_probe_is_never_tested_on_a_cluster_it_was_fitted_on():
    """Each state stands twice: a probe that saw the one would know the other's arbitrary label."""
    random = np.random.default_rng(0)
    states = np.repeat(random.normal(size=(30, 200)), 2, axis=0)
    groups = np.repeat(random.integers(0, 2, 30), 2)
    (value, low, _), _ = measure_probe(states, groups, np.repeat(np.arange(30), 2), seed=0)
    assert value < 0.8
    assert low < 0.5


def test_clusters_are_drawn_whole_and_strata_keep_their_size():
    clusters, strata = np.array([0, 0, 1, 1, 2, 3]), np.array([0, 0, 0, 0, 1, 1])
    weights = np.concatenate(list(resample_weights(clusters, 300, 0, strata=strata)))
    assert weights.shape == (300, 6)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, :4].sum(1) == 4).all()
    assert (weights[:, 4:].sum(1) == 2).all()
    with pytest.raises(ValueError, match="lies in several strata"):
        next(resample_weights([0, 0], 10, 0, strata=[0, 1]))


def test_clustered_outcomes_have_a_wider_interval():
    """Ten templates whose prompts all fare alike hold ten facts, not a hundred."""
    hits = np.repeat(np.arange(10) % 2, 10).astype(float)
    alone = bootstrap_rate(hits, np.arange(100), seed=0)
    by_template = bootstrap_rate(hits, np.repeat(np.arange(10), 10), seed=0)
    assert by_template[1] - by_template[0] > 2.5 * (alone[1] - alone[0])


def test_a_perfect_auroc_does_not_claim_to_be_certain():
    positive, negative = np.arange(20) + 100.0, np.arange(20.0)
    low, high = bootstrap_measure(auroc, positive, negative, paired=False, resamples=50, seed=0)
    assert 0.8 < low < 0.99
    assert high == 1


def test_the_band_over_layers_is_wider_than_each_layers_interval():
    draws = np.random.default_rng(0).normal(size=(20, 2000))
    low, high = simultaneous_interval(np.zeros(20), draws, 1000)
    inside = ((draws >= low[:, None]) & (draws <= high[:, None])).all(0).mean()
    assert inside == pytest.approx(0.95, abs=0.02)


def test_mcnemar_is_the_exact_binomial_test():
    """Agresti 2013, a table with 10 and 2 changes: 2 P(X <= 2 | n = 12, 1/2) = 158 / 4096."""
    assert mcnemar_p(10, 2) == pytest.approx(158 / 4096)
    assert mcnemar_p(0, 0) == 1


def test_holm_is_the_published_procedure():
    """Holm 1979: sorted p times 3, 2, 1, never decreasing."""
    assert adjust_holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjust_holm([0.6, 0.7]) == pytest.approx([1, 1])


def test_a_paired_difference_is_narrower_than_one_of_other_prompts():
    random = np.random.default_rng(0)
    first = random.random(100) < 0.3
    second = first | (random.random(100) < 0.2)
    value, low, high = paired_difference(first, second)
    rates = [(hits.mean(), *wilson_interval(hits.sum(), 100)) for hits in (first, second)]
    other, wide_low, wide_high = independent_difference(rates[0], rates[1])
    assert value == pytest.approx(other) == pytest.approx(second.mean() - first.mean())
    assert high - low < wide_high - wide_low


def test_the_unpaired_interval_is_newcombes():
    """Newcombe 1998, table II, 56/70 against 48/80: 0.2 with 0.0524 to 0.3339 by method 10."""
    rates = [(hits / n, *wilson_interval(hits, n)) for hits, n in ((48, 80), (56, 70))]
    assert independent_difference(rates[0], rates[1]) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def outcomes() -> pd.DataFrame:
    """100 prompts: 15 answered in text, 34 beside a blank image, 5 of them with the guard."""
    rows = []
    for condition, guard, answered in (
        ("text", "none", 15),
        ("blank", "none", 34),
        ("blank", "vlm_guard", 5),
    ):
        for i in range(100):
            row = {"id": str(i), "condition": condition, "guard": guard, "label": "harmful"}
            rows.append({**row, "complied": i < answered, "template": i // 10})
    return pd.DataFrame(rows)


def test_outcomes_are_compared_prompt_by_prompt_and_corrected_over_the_table():
    table = compare_outcomes(outcomes()).table
    assert table[["condition", "guard", "against"]].to_numpy().tolist() == [
        ["blank", "none", "text"],
        ["blank", "vlm_guard", "none"],
    ]
    assert table["value"].tolist() == pytest.approx([0.19, -0.29])
    assert table[["gained", "lost"]].to_numpy().tolist() == [[19, 0], [0, 29]]
    assert table["p"].tolist() == pytest.approx([2 / 2**19, 2 / 2**29])
    assert table["p_holm"].tolist() == pytest.approx([2 / 2**19, 4 / 2**29])


def test_outcomes_by_template_have_wider_intervals_and_the_same_differences():
    plain, clustered = compare_outcomes(outcomes()), compare_outcomes(outcomes(), clusters="template")
    assert clustered.table["value"].tolist() == plain.table["value"].tolist()
    width = [(t["high"] - t["low"]).min() for t in (plain.table, clustered.table)]
    assert width[1] > width[0]


def test_a_table_that_cannot_be_paired_is_refused():
    with pytest.raises(ValueError, match="no column guard"):
        compare_outcomes(outcomes().drop(columns="guard"))
    with pytest.raises(ValueError, match="answered twice"):
        compare_outcomes(pd.concat([outcomes(), outcomes()]))


def test_the_number_of_prompts_is_that_of_the_books_and_enough():
    """Unpaired 0.15 against 0.34: (1.96 sqrt(2 p q) + 0.8416 sqrt(p1 q1 + p2 q2))^2 / 0.19^2 = 79.2."""
    assert count_prompts_needed(0.15, 0.34, paired=False) == 80
    n = count_prompts_needed(0.15, 0.34, agreement=0.4)
    assert n < count_prompts_needed(0.15, 0.34)
    both = 0.15 * 0.34 + 0.4 * np.sqrt(0.15 * 0.85 * 0.34 * 0.66)
    shares = [0.34 - both, 0.15 - both, 1 - 0.34 - 0.15 + 2 * both]
    drawn = np.random.default_rng(0).multinomial(n, shares, 2000)
    power = np.mean([mcnemar_p(gained, lost) < 0.05 for gained, lost, _ in drawn])
    assert 0.68 < power < 0.86  # the formula is of the normal test, the exact one asks for a little more


def test_impossible_rates_are_refused():
    with pytest.raises(ValueError, match="two different rates"):
        count_prompts_needed(0.2, 0.2)
    with pytest.raises(ValueError, match="cannot correlate"):
        count_prompts_needed(0.1, 0.9, agreement=0.9)


@pytest.mark.parametrize("check", [c for c in calibration.PLANTED if c is not calibration.planted_states])
def test_planted_truths_are_mostly_held_in_a_few_seeds(check):
    """The quick version of `make calibration`: 10 seeds, of which a sound interval misses 4 once in 1,000."""
    table = calibration.count([check], 10)
    assert (table["seeds"] >= 7).all(), table.to_string()


@pytest.mark.parametrize("check", [calibration.null_transfer, calibration.null_rates])
def test_little_is_found_where_nothing_is(check):
    table = calibration.count([check], 10)
    assert (table["seeds"] <= 3).all(), table.to_string()
