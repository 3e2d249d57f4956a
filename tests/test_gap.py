"""The modality gap: analytic cases, independent formulas, intervals and the null."""

import tracemalloc

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

import mechguard as mg
from mechguard.gap import METRICS, NULLS, Moved, apart, cka, rmg, together


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
    assert cka(Moved(*pair), once(20), together)[0] == pytest.approx(expected)


def test_rmg_equals_its_published_formula(pair):
    x, y = pair
    n = len(x)
    cosine_distances = [cdist(a, b, "cosine") / 2 for a, b in ((x, y), (x, x), (y, y))]
    between = np.diag(cosine_distances[0]).mean()
    within = sum(d.sum() / (n * (n - 1)) for d in cosine_distances[1:]) / 2
    assert rmg(Moved(x, y), once(n), together)[0] == pytest.approx(between / (between + within))


def test_the_table_gives_what_plain_formulas_give(pair):
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
    assert set(null.index) == {*NULLS, "modality_accuracy"}
    real = table[table["direction"] == "observed"].set_index("metric")
    assert real.loc["centroid_distance", "low"] > null.loc["centroid_distance", "high"]


def test_weights_give_what_repeated_rows_give(pair):
    """A bootstrap resample as weights, against the same resample as rows of states."""
    x, y = pair
    rows = np.random.default_rng(1).integers(0, 20, 20)
    weights = np.bincount(rows, minlength=20)[None] / 20
    raw, drawn = Moved(x, y), Moved(x[rows], y[rows])
    for name, metric in METRICS.items():
        if name not in ("cone_text", "cone_image", "rmg"):  # these leave pairs of the same prompt out
            by_weight = metric(raw, weights, together)[0]
            by_row = metric(drawn, once(20), together)[0]
            assert by_weight == pytest.approx(by_row), name


def test_the_null_is_that_of_exchanged_states(pair):
    x, y = pair
    signs = np.where(np.arange(20) % 3 == 0, -1.0, 1.0)
    first, second = np.where(signs[:, None] < 0, y, x), np.where(signs[:, None] < 0, x, y)
    raw, exchanged = Moved(x, y), Moved(first, second)
    for name in NULLS:
        expected = METRICS[name](exchanged, once(20), together)[0]
        assert METRICS[name](raw, signs[None] / 20, together)[0] == pytest.approx(expected), name


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


def test_cka_apart_equals_the_unbiased_hsic_of_its_paper(pair):
    """Song et al. 2012, equation 5, written with matrices as there."""
    n = 20

    def hsic(k, m):
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        total = np.trace(k @ m) + k.sum() * m.sum() / (n - 1) / (n - 2) - 2 * (k @ m).sum() / (n - 2)
        return total / (n * (n - 3))

    k, m = (states @ states.T for states in pair)
    expected = hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    assert cka(Moved(*pair), once(n), apart)[0] == pytest.approx(expected)


def test_apart_is_the_mean_over_pairs_of_different_prompts(pair):
    x, y = pair
    products = x @ y.T
    expected = (products.sum() - np.trace(products)) / (20 * 19)
    assert apart(x, y, once(20))[0] == pytest.approx(expected)
    weights = np.array([[0.5, 0.3, 0.2, *[0] * 17]])
    by_hand = sum(
        2 * weights[0, i] * weights[0, j] * (products[i, j] + products[j, i]) / 2
        for i, j in ((0, 1), (0, 2), (1, 2))
    )
    assert apart(x, y, weights)[0] == pytest.approx(by_hand / (1 - 0.25 - 0.09 - 0.04))


def test_blocks_of_rows_give_what_the_whole_gives(pair, monkeypatch):
    whole = [cka(Moved(*pair), once(20), inner)[0] for inner in (together, apart)]
    monkeypatch.setattr("mechguard.gap.ROWS", 7)
    assert [cka(Moved(*pair), once(20), inner)[0] for inner in (together, apart)] == pytest.approx(whole)


def test_the_interval_is_about_the_population_where_d_model_is_far_above_n():
    """No gap at all, 20 prompts, 400 dimensions: the published distance is 9, its interval begins at 0."""
    random = torch.Generator().manual_seed(1)
    text, image = torch.randn(2, 1, 20, 400, generator=random)
    table = mg.measure_modality_gap(states(text), states(image), resamples=100).table
    rows = table[table["direction"] == "observed"].set_index("metric")
    assert rows.loc["centroid_distance", "value"] > 5
    assert rows.loc["centroid_distance", "low"] == 0
    assert rows.loc["cka", "value"] > 0.9  # as if alike
    assert rows.loc["cka", "low"] < 0.1


def test_the_shift_is_taken_apart_along_the_safety_directions():
    """3 along the first direction, 4 along the second, 12 outside both."""
    random = torch.Generator().manual_seed(0)
    text = torch.randn(1, 40, 6, generator=random)
    text[0, ::2, 0] += 100.0  # the harmful prompts
    shift = torch.tensor([3.0, 4.0, 12.0, 0, 0, 0])
    plane = mg.Directions.from_tensor(torch.eye(6)[:2].unsqueeze(0))
    result = mg.measure_modality_gap(states(text), states(text + shift), directions=plane, resamples=50)
    expected = {
        "shift_along": 3.0,
        "shift_across": 12.0,
        "safety_share": 3 / 13,
        "safety_energy": 25 / 169,
        "safety_energy_of_mean": 25 / 169,
    }
    for metric, number in expected.items():
        assert observed(result, metric) == pytest.approx(number, abs=1e-4), metric
    assert observed(result, "shift_along_relative") == pytest.approx(3 / 100, rel=0.02)
    random_share = result.where(direction="random direction", metric="safety_energy").table["value"].iloc[0]
    assert random_share == pytest.approx(2 / 6, abs=0.05)


def test_memory_grows_with_the_prompts_and_not_with_their_square(monkeypatch):
    """Twice the prompts, about twice the memory, where one n x n matrix would take four times as much."""

    def peak(n: int) -> int:
        random = torch.Generator().manual_seed(0)
        text, image = (states(torch.randn(1, n, 8, generator=random)) for _ in range(2))
        tracemalloc.start()
        mg.measure_modality_gap(text, image, resamples=20)
        mg.measure_separability(text, nulls=False, resamples=20, random_directions=2)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    monkeypatch.setattr("mechguard.gap.ROWS", 128)
    monkeypatch.setattr("mechguard.statistics.states.ROWS", 128)
    assert peak(1200) < 2.6 * peak(600)
