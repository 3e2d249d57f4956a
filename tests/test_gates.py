"""The gate report: rates, where two gates differ, and the curve of every threshold."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

import mechguard as mg

N = 50


@pytest.fixture(scope="module")
def states() -> mg.Activations:
    """Harmful 2 above harmless, and both far below zero: the uncentred gate never opens."""
    data = torch.randn(2, 2 * N, 6, generator=torch.Generator().manual_seed(0))
    data[:, :N, 0] += 2.0
    data[..., 0] -= 20.0
    return mg.Activations.from_tensor(data, labels=[1] * N + [0] * N)


@pytest.fixture(scope="module")
def direction(states) -> mg.Directions:
    return mg.fit_directions(states, method="mean_difference")


def test_a_gate_that_never_opens_may_still_tell_all_apart(states, direction):
    result = mg.measure_gates(direction, [states], resamples=50)
    opened = result.where(metric="gate_open", gate="sign").table
    assert (opened["value"] == 0).all()
    assert set(opened["n"]) == {N}
    found = result.where(metric="gate_auroc").table
    labels = states.labels == "harmful"
    expected = [roc_auc_score(labels, one) for one in direction.project(states).numpy()]
    assert found["value"].tolist() == pytest.approx(expected)
    assert ((found["low"] <= found["value"]) & (found["value"] <= found["high"])).all()


def test_two_gates_differ_where_one_is_open_and_the_other_is_not(states, direction):
    table = mg.measure_gates(direction, [states], resamples=10).table
    shares = table.pivot_table(index=["layer", "label"], columns=["metric", "gate"], values="value")
    alone = shares["gate_differs", "sign or midpoint alone"].dropna()
    assert alone.tolist() == shares["gate_open", "midpoint"].dropna().tolist()
    assert alone.xs("harmful", level="label").min() > alone.xs("harmless", level="label").max()


def test_the_curve_is_scikit_learns(states, direction):
    curve = mg.measure_gate_curves(direction, [states]).where(layer=1, gate="any threshold").table
    scores = direction.project(states)[1].numpy()
    false_alarms, hits, _ = roc_curve(states.labels == "harmful", scores, drop_intermediate=False)
    for row in curve.itertuples():
        within = false_alarms <= row.false_positive_rate + 1e-9
        assert row.value == pytest.approx(hits[within].max())
    assert np.all(np.diff(curve["value"]) >= 0)


def test_the_gates_themselves_are_points_of_the_report(states, direction):
    curves = mg.measure_gate_curves(direction, [states])
    rates = mg.measure_gates(direction, [states], resamples=10)
    for gate in ("sign", "midpoint"):
        point = curves.where(layer=0, gate=gate).table.iloc[0]
        opened = rates.where(layer=0, gate=gate, metric="gate_open").table.set_index("label")["value"]
        assert (point["value"], point["false_positive_rate"]) == (opened["harmful"], opened["harmless"])


def test_one_label_has_rates_but_no_curve(states, direction):
    only = mg.Activations(states.data[:, :N], states.layers, states.prompts[:N])
    assert set(mg.measure_gates(direction, [only]).table["metric"]) == {"gate_open", "gate_differs"}
    with pytest.raises(ValueError, match="harmful and harmless ones are needed"):
        mg.measure_gate_curves(direction, [only])
