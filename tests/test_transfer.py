"""Transfer and angles: a moved direction and a collapsed one look different, planted angles come back."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.metrics import roc_auc_score

import mechguard as mg
from mechguard.separability import OWN
from mechguard.transfer import principal_cosines

WIDTH, PAIRS = 16, 60


def states(name: str, axis: int, strength: float, *, seed: int, layers: int = 2) -> mg.Activations:
    """Harmful states `strength` away along one axis; the same prompts whatever the name."""
    random = torch.Generator().manual_seed(seed)
    data = torch.randn(layers, 2 * PAIRS, WIDTH, generator=random)
    data[:, :PAIRS, axis] += strength
    made = mg.Activations.from_tensor(data, labels=[1] * PAIRS + [0] * PAIRS, pairs=[*range(PAIRS)] * 2)
    return mg.Activations(made.data, made.layers, made.prompts, {"view": "vlm", "condition": name})


@pytest.fixture(scope="module")
def conditions() -> list[mg.Activations]:
    """Text, an image beside which the direction has moved, and one beside which it has collapsed."""
    return [
        states("text", 0, 3.0, seed=0),
        states("moved", 1, 3.0, seed=1),
        states("collapsed", 1, 0.0, seed=2),
        states("kept", 0, 3.0, seed=3),
    ]


@pytest.fixture(scope="module")
def transfer(conditions) -> mg.Result:
    anchors = states("text", 0, 3.0, seed=9)
    return mg.measure_transfer(conditions, [mg.fit_directions(anchors)], resamples=300)


def found(result: mg.Result, metric: str, condition: str, direction: str):
    table = result.where(metric=metric, condition=f"vlm {condition}", direction=direction, layer=0).table
    assert len(table) == 1
    return table.iloc[0]


def test_a_moved_direction_and_a_collapsed_one_look_different(transfer):
    ssd = "svd, vlm text"
    for condition in ("moved", "collapsed"):
        assert found(transfer, "auroc_change", condition, ssd)["high"] < 0
    assert found(transfer, "auroc_change", "kept", ssd)["high"] > 0
    assert found(transfer, "auroc_change", "moved", OWN)["high"] > 0
    assert found(transfer, "auroc_change", "collapsed", OWN)["high"] < 0
    assert found(transfer, "auroc_recovered", "moved", OWN)["low"] > 0
    assert found(transfer, "auroc_recovered", "collapsed", OWN)["low"] < 0


def test_every_entry_of_the_matrix_is_the_auroc_of_that_direction_there(transfer, conditions):
    fitted = mg.fit_directions(states("text", 0, 3.0, seed=9))
    for condition in conditions:
        scores = fitted.project(condition)[0].numpy()
        expected = roc_auc_score(condition.labels == "harmful", scores)
        row = found(transfer, "auroc", condition.condition, fitted.name)
        assert row["value"] == pytest.approx(expected)
        assert row["low"] <= expected <= row["high"]


def test_changes_are_those_of_the_same_prompts_and_narrower_than_two_intervals():
    """Two conditions with nearly the same scores: the paired interval is narrow, each one's own is wide."""
    text = states("text", 0, 1.0, seed=0)
    nudged = mg.Activations(
        text.data + 0.01 * torch.randn(text.data.shape, generator=torch.Generator().manual_seed(1)),
        text.layers,
        text.prompts,
        {"view": "vlm", "condition": "nudged"},
    )
    ssd = mg.fit_directions(states("text", 0, 3.0, seed=9))
    result = mg.measure_transfer([text, nudged], [ssd], resamples=200)
    change = found(result, "auroc_change", "nudged", ssd.name)
    plain = found(result, "auroc", "nudged", ssd.name)
    assert change["high"] - change["low"] < 0.1 * (plain["high"] - plain["low"])
    assert change["value"] == pytest.approx(
        plain["value"] - found(result, "auroc", "text", ssd.name)["value"]
    )


def test_without_directions_each_condition_lends_its_own_held_out(conditions):
    result = mg.measure_transfer(conditions[:2], resamples=50)
    names = ["vlm text, held out", "vlm moved, held out"]
    assert list(result.where(metric="auroc_change").table["direction"].unique()) == names
    assert found(result, "auroc", "text", names[0])["value"] > 0.9
    assert found(result, "auroc", "moved", names[0])["value"] < 0.75
    assert found(result, "auroc", "moved", names[1])["value"] > 0.9


def test_conditions_of_other_prompts_are_refused(conditions):
    short = states("text", 0, 1.0, seed=0, layers=1)
    with pytest.raises(ValueError, match="hold different prompts or layers"):
        mg.measure_transfer([conditions[0], short])
    with pytest.raises(ValueError, match="two conditions or more"):
        mg.measure_transfer(conditions[:1])


def planted_planes(angles: list[float], *, pairs: int = 400, noise: float = 0.3) -> list[mg.Activations]:
    """Differences in two planes whose principal angles, in degrees, are given."""
    random = np.random.default_rng(0)
    turns = np.radians(angles)
    bases = np.zeros((2, 2, WIDTH))
    bases[0, [0, 1], [0, 1]] = 1
    bases[1, [0, 1], [0, 1]], bases[1, [0, 1], [2, 3]] = np.cos(turns), np.sin(turns)
    made = []
    for name, basis in zip(("text", "image"), bases, strict=True):
        weights = random.normal(size=(pairs, 2)) * [2.0, 1.5] + [1.0, 1.0]
        harmful = weights @ basis + noise * random.normal(size=(pairs, WIDTH))
        data = torch.as_tensor(np.concatenate([harmful, np.zeros_like(harmful)])[None], dtype=torch.float32)
        one = mg.Activations.from_tensor(data, labels=[1] * pairs + [0] * pairs, pairs=[*range(pairs)] * 2)
        made.append(mg.Activations(one.data, one.layers, one.prompts, {"view": "vlm", "condition": name}))
    return made


def test_planted_principal_angles_come_back_within_their_intervals():
    result = mg.measure_angles(planted_planes([15.0, 60.0]), rank=2)
    for number, truth in ((1, 15.0), (2, 60.0)):
        row = result.where(metric=f"principal_angle_{number}", direction="vlm text").table.iloc[0]
        assert row["low"] <= truth <= row["high"]
        assert row["high"] - row["low"] < 12


def test_angles_and_energies_are_those_of_scipy_and_of_the_singular_values():
    text, image = planted_planes([15.0, 60.0], pairs=20)
    result = mg.measure_angles([text, image], rank=2, resamples=10)
    bases = [mg.fit_directions(one, rank=2).data[0].double().numpy() for one in (text, image)]
    expected = np.degrees(subspace_angles(bases[0].T, bases[1].T))[::-1]
    for number, angle in enumerate(expected, 1):
        row = result.where(metric=f"principal_angle_{number}", direction="vlm text").table.iloc[0]
        assert row["value"] == pytest.approx(angle, abs=0.05)
    cosine = result.where(metric="cosine", direction="vlm text").table["value"].iloc[0]
    assert cosine == pytest.approx(float(bases[0][0] @ bases[1][0]), abs=1e-4)
    s = torch.linalg.svdvals(text.differences()[0]).double().numpy()
    energy = result.where(metric="subspace_energy", condition="vlm text").table["value"].iloc[0]
    assert energy == pytest.approx(float((s[:2] ** 2).sum() / (s**2).sum()), abs=1e-5)


def test_the_same_states_have_the_same_directions():
    text = planted_planes([0.0, 0.0], pairs=30)[0]
    table = mg.measure_angles([text, text], rank=1, resamples=20).table
    assert table[table["metric"] == "cosine"]["value"].iloc[0] == pytest.approx(1)
    assert principal_cosines(np.eye(3)[None, :1], np.eye(3)[None, 2:])[0, 0] == 0
