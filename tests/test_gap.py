"""The modality gap: analytic cases, independent formulas, intervals and the null."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

import mechguard as mg
from mechguard.gap import METRICS, NULLS, Grams, cka, rmg


def states(data: torch.Tensor) -> mg.Activations:
    n = data.shape[1]
    return mg.Activations.from_tensor(data, labels=[1, 0] * (n // 2))


def once(n: int) -> np.ndarray:
    """Every prompt with the same weight."""
    return np.full((1, n), 1 / n)


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(size=(20, 7)) + 1
    return x, x @ random.normal(size=(7, 7)) * 0.3 + x + 2


def observed(result: mg.Result, metric: str) -> float:
    return float(result.where(metric=metric, direction="observed").table["value"].iloc[0])


def test_the_same_states_have_no_gap():
    same = states(torch.randn(2, 20, 6))
    result = mg.measure_modality_gap(same, same, resamples=20)
    for metric in ("centroid_distance", "cosine_gap", "rmg", "shift_norm_ratio"):
        assert observed(result, metric) == pytest.approx(0, abs=1e-6), metric
    assert observed(result, "cka") == pytest.approx(1)


def test_a_planted_shift_is_recovered():
    text = torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([3.0, 4.0, 0, 0, 0, 0])
    along = mg.Directions.from_tensor(torch.eye(6)[:1])
    result = mg.measure_modality_gap(states(text), states(text + shift), directions=along, resamples=50)
    assert observed(result, "centroid_distance") == pytest.approx(5.0, abs=1e-4)
    assert observed(result, "shift_consistency") == pytest.approx(1.0, abs=1e-4)
    assert observed(result, "safety_share") == pytest.approx(0.6, abs=1e-4)
    assert observed(result, "cka") == pytest.approx(1.0, abs=1e-4)
    assert observed(result, "modality_accuracy") > 0.9


def test_cka_equals_its_published_formula(pair):
    x, y = (states - states.mean(0) for states in pair)
    expected = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert cka(Grams.of(*pair), once(20))[0] == pytest.approx(expected)


def test_rmg_equals_its_published_formula(pair):
    x, y = pair
    n = len(x)
    cosine_distances = [cdist(a, b, "cosine") / 2 for a, b in ((x, y), (x, x), (y, y))]
    between = np.diag(cosine_distances[0]).mean()
    within = sum(d.sum() / (n * (n - 1)) for d in cosine_distances[1:]) / 2
    cosines = Grams.of(x, y).normalised()
    assert rmg(cosines, once(n))[0] == pytest.approx(between / (between + within))


def test_gram_matrices_give_what_the_states_give(pair):
    x, y = pair
    result = mg.measure_modality_gap(
        states(torch.tensor(x).unsqueeze(0)), states(torch.tensor(y).unsqueeze(0)), resamples=20
    )
    shift = y - x
    cosines = shift @ shift.mean(0) / np.linalg.norm(shift, axis=1) / np.linalg.norm(shift.mean(0))
    expected = {
        "centroid_distance": np.linalg.norm(x.mean(0) - y.mean(0)),
        "shift_consistency": cosines.mean(),
        "shift_norm_ratio": np.linalg.norm(shift, axis=1).mean() / np.linalg.norm(x, axis=1).mean(),
    }
    for metric, number in expected.items():
        assert observed(result, metric) == pytest.approx(number, rel=1e-4), metric


def test_intervals_hold_what_they_should_and_nulls_are_smaller_than_a_real_gap():
    text = torch.randn(1, 60, 6, generator=torch.Generator().manual_seed(0))
    table = mg.measure_modality_gap(states(text), states(text + 1.0)).table
    rows = table[(table["direction"] == "observed") & (table["metric"] != "cone_text")]
    assert (rows["low"] <= rows["value"] + 1e-6).all()
    assert (rows["value"] <= rows["high"] + 1e-6).all()
    null = table[table["direction"] == "shuffled modality"].set_index("metric")
    assert set(null.index) == set(NULLS)
    real = table[table["direction"] == "observed"].set_index("metric")
    assert real.loc["centroid_distance", "low"] > null.loc["centroid_distance", "high"]


def test_weights_give_what_repeated_rows_give(pair):
    """A bootstrap resample as weights, against the same resample as rows of states."""
    x, y = pair
    rows = np.random.default_rng(1).integers(0, 20, 20)
    weights = np.bincount(rows, minlength=20)[None] / 20
    raw, drawn = Grams.of(x, y), Grams.of(x[rows], y[rows])
    for name, metric in METRICS.items():
        if name not in ("cone_text", "cone_image", "rmg"):  # these leave pairs of the same prompt out
            by_weight = metric(raw, raw.normalised(), weights)[0]
            by_row = metric(drawn, drawn.normalised(), once(20))[0]
            assert by_weight == pytest.approx(by_row), name


def test_the_null_is_that_of_exchanged_states(pair):
    x, y = pair
    signs = np.where(np.arange(20) % 3 == 0, -1.0, 1.0)
    first, second = np.where(signs[:, None] < 0, y, x), np.where(signs[:, None] < 0, x, y)
    raw, exchanged = Grams.of(x, y), Grams.of(first, second)
    for name, null in NULLS.items():
        expected = METRICS[name](exchanged, exchanged.normalised(), once(20))[0]
        assert null(raw, raw.normalised(), signs[None] / 20)[0] == pytest.approx(expected), name


def test_a_prompt_drawn_twice_by_the_bootstrap_is_not_compared_with_itself():
    """Orthogonal states have cosine 0 to each other, however often a resample repeats one."""
    orthogonal = states(torch.eye(8).unsqueeze(0))
    row = (
        mg.measure_modality_gap(orthogonal, orthogonal, resamples=50).where(metric="cone_text").table.iloc[0]
    )
    assert (row["low"], row["value"], row["high"]) == pytest.approx((0, 0, 0), abs=1e-9)


def test_every_metric_is_reported_at_every_layer():
    text = torch.randn(3, 12, 6)
    table = mg.measure_modality_gap(states(text), states(text + 1), resamples=10).table
    found = table[table["direction"] == "observed"].groupby("layer")["metric"].nunique()
    assert (found == len(METRICS) + 1).all()
    assert list(found.index) == [0, 1, 2]


def test_different_prompts_are_refused():
    with pytest.raises(ValueError, match="hold different prompts; collect the same prompts twice"):
        mg.measure_modality_gap(states(torch.randn(1, 4, 3)), states(torch.randn(1, 6, 3)))
