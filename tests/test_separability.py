"""Separability: planted distances, nulls that show no effect, held-out own directions."""

import numpy as np
import pytest
import torch
from test_directions import planted

import mechguard as mg
from mechguard.separability import OWN, RANDOM, SHUFFLED


def value(result: mg.Result, layer: int, direction: str, metric: str = "auroc") -> float:
    return float(result.where(layer=layer, direction=direction, metric=metric).table["value"].iloc[0])


@pytest.fixture(scope="module")
def trained():
    activations, _ = planted(strength=3.0)
    fitted, tested = (
        select(activations, range(0, 30)),
        select(activations, range(30, 60)),
    )
    return mg.fit_directions(fitted), tested


def select(activations: mg.Activations, pairs: range) -> mg.Activations:
    rows = [i for i, pair in enumerate(activations.pairs) if int(pair) in pairs]
    labels = [activations.labels[i] for i in rows]
    chosen = [activations.pairs[i] for i in rows]
    return mg.Activations.from_tensor(activations.data[:, rows], labels=labels, pairs=chosen)


def test_separability_of_distant_groups_is_one_and_of_identical_ones_is_chance(trained):
    ssd, tested = trained
    assert value(mg.measure_separability(tested, ssd), 0, ssd.name) > 0.95
    same = mg.Activations.from_tensor(
        torch.ones(3, 20, 24), labels=[1] * 10 + [0] * 10, pairs=[*range(10)] * 2
    )
    assert value(mg.measure_separability(same, ssd), 0, ssd.name) == 0.5


def test_dprime_recovers_the_planted_distance():
    """Along a planted unit axis, unit-variance groups 2 apart have d' = 2 and AUROC = Phi(sqrt 2)."""
    random = torch.Generator().manual_seed(0)
    data = torch.randn(1, 4000, 8, generator=random)
    data[0, :2000, 2] += 2.0
    states = mg.Activations.from_tensor(data, labels=[1] * 2000 + [0] * 2000)
    axis = mg.Directions.from_tensor(torch.eye(8)[2:3])
    result = mg.measure_separability(states, axis, resamples=200)
    assert value(result, 0, axis.name, "dprime") == pytest.approx(2.0, abs=0.1)
    assert value(result, 0, axis.name) == pytest.approx(0.9214, abs=0.01)


def test_intervals_hold_their_value_and_say_how_many(trained):
    ssd, tested = trained
    table = mg.measure_separability(tested, ssd).table
    fitted = table[table["direction"] == ssd.name]
    assert ((fitted["low"] <= fitted["value"]) & (fitted["value"] <= fitted["high"])).all()
    assert set(table["n"]) == {60}
    assert set(table["split"]) == {"test"}


def test_nulls_are_chance_and_bracket_it(trained):
    ssd, tested = trained
    table = mg.measure_separability(tested, ssd).where(metric="auroc", direction=[RANDOM, SHUFFLED]).table
    assert np.allclose(table["value"], 0.5, atol=0.06)
    assert ((table["low"] < 0.5) & (table["high"] > 0.5)).all()


def test_a_moved_direction_and_a_collapsed_one_look_different(trained):
    """Moved: the old direction fails, the own one works. Collapsed: neither does."""
    ssd, tested = trained
    turned = mg.Activations.from_tensor(tested.data.roll(7, dims=2), labels=tested.labels, pairs=tested.pairs)
    noise = torch.randn(tested.data.shape, generator=torch.Generator().manual_seed(5))
    collapsed = mg.Activations.from_tensor(noise, labels=tested.labels, pairs=tested.pairs)
    moved = mg.measure_separability(turned, ssd)
    gone = mg.measure_separability(collapsed, ssd)
    assert value(moved, 0, OWN) > 0.9
    assert value(moved, 0, ssd.name) < 0.85
    assert value(gone, 0, OWN) < 0.75


def test_layers_are_selected_by_the_fitted_direction(trained):
    ssd, tested = trained
    data = tested.data.clone()
    data[1] = torch.randn(data[1].shape, generator=torch.Generator().manual_seed(1))
    worse = mg.Activations.from_tensor(data, labels=tested.labels, pairs=tested.pairs)
    result = mg.measure_separability(worse, ssd, split="validation")
    assert mg.select_layers(result, k=2) == [0, 2]
    with pytest.raises(ValueError, match="k=4 layers were asked for; the result has 3"):
        mg.select_layers(result, k=4)


def test_width_must_fit(trained):
    narrow = mg.Activations.from_tensor(torch.randn(3, 4, 8), labels=[1, 1, 0, 0])
    with pytest.raises(ValueError, match="d_model 24 do not fit states of d_model 8"):
        mg.measure_separability(narrow, trained[0])
