"""Guards: what they are made of, whom they fit, and their files."""

import pytest
import tiny
import torch
from test_directions import planted

import mechguard as mg


@pytest.fixture(scope="module")
def ssd() -> mg.Directions:
    return mg.fit_directions(planted(d_model=32)[0], rank=2)


def test_a_guard_survives_a_round_trip(ssd, tmp_path):
    guard = mg.vlm_guard(ssd, layers=[2, 0], alpha=-1.5, source="last", scope=mg.Scope("all", "prompt"))
    guard.save(tmp_path / "guards" / "mine")
    loaded = mg.Guard.load(tmp_path / "guards" / "mine")
    assert repr(loaded) == repr(guard)
    assert loaded.layers == (0, 2)
    assert torch.equal(loaded.basis, guard.basis)
    assert torch.equal(loaded.gate.thresholds, guard.gate.thresholds)


@pytest.mark.parametrize("broken", ["bit", "cut", "gone", "kind", "json", "fact"])
def test_a_damaged_guard_file_is_refused(ssd, tmp_path, broken):
    mg.vlm_guard(ssd, layers=[0]).save(tmp_path / "g")
    tensors, facts = tmp_path / "g.safetensors", tmp_path / "g.json"
    if broken == "bit":
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x7f")
    elif broken == "cut":
        tensors.write_bytes(tensors.read_bytes()[:40])
    elif broken == "gone":
        tensors.unlink()
    elif broken == "kind":
        ssd.save(tmp_path / "g")
    elif broken == "fact":
        facts.write_text(facts.read_text().replace('"alpha": 1.0', '"alpha": 9.0'))
    else:
        facts.write_text("{")
    with pytest.raises(mg.MechguardError, match=r"guard|JSON"):
        mg.Guard.load(tmp_path / "g")


def test_a_guard_for_another_width_or_depth_is_refused(ssd, vlm):
    wide = mg.fit_directions(planted(d_model=48)[0])
    with pytest.raises(ValueError, match="of d_model 48, but .* d_model 32; fit a guard on this model"):
        mg.vlm_guard(wide, layers=[0]).check(vlm)
    deep = mg.Directions.from_tensor(torch.randn(9, 32))
    with pytest.raises(ValueError, match="has layers 0-2"):
        mg.vlm_guard(deep, layers=[8], gate="sign").check(vlm)


def test_a_guard_for_other_weights_is_refused_until_rebound(vlm, prompts):
    other = mg.load(tiny.llava(seed=5), processor=tiny.processor())
    guard = mg.vlm_guard(mg.fit_directions(mg.collect(other.llm, prompts, progress=False)), layers=[0])
    guard.check(other)
    with pytest.raises(ValueError, match="whose weights are not those of"):
        mg.generate(vlm, prompts, guard=guard, progress=False)
    guard.rebound(vlm).check(vlm)


def test_a_random_control_keeps_everything_but_the_subspace(ssd):
    guard = mg.vlm_guard(ssd, layers=[0, 1], alpha=2.0)
    control = guard.randomised(3)
    assert control.name == "random"
    assert (control.layers, control.rank) == ((0, 1), 2)
    assert control.move.options() == guard.move.options()
    assert torch.equal(control.gate.directions, guard.gate.directions)
    assert not torch.allclose(control.basis, guard.basis)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layers=[]), "has no layers"),
        (dict(layers=[7]), "layer 7 has no direction"),
        (dict(layers=[0], gate="open"), "gate='open' is not known; use one of always, sign, midpoint"),
        (dict(layers=[0], source="oracle"), "source='oracle' is not known"),
    ],
)
def test_a_guard_that_makes_no_sense_is_refused(ssd, options, message):
    with pytest.raises(ValueError, match=message):
        mg.vlm_guard(ssd, **options)


def test_a_centred_gate_needs_a_midpoint():
    bare = mg.Directions.from_tensor(torch.randn(2, 8))
    with pytest.raises(ValueError, match='use gate="sign"'):
        mg.vlm_guard(bare, layers=[0])


def test_negative_layers_count_from_the_last(ssd):
    assert mg.vlm_guard(ssd, layers=[-1]).layers == (2,)


def test_gate_report_counts_what_the_gate_does(ssd):
    activations, _ = planted(d_model=32)
    result = mg.measure_gates(ssd, [activations])
    guard = mg.vlm_guard(ssd, layers=[1], gate="midpoint")
    opened = guard.opens(1, activations.at(1)).numpy()
    for label in ("harmful", "harmless"):
        row = result.where(layer=1, gate="midpoint", label=label).table.iloc[0]
        assert row["value"] == pytest.approx(opened[activations.labels == label].mean())
        assert row["n"] == 60
    assert result.where(layer=1, gate="midpoint", label="harmful").table["value"].iloc[0] > 0.9
    assert result.where(layer=1, gate="midpoint", label="harmless").table["value"].iloc[0] < 0.1
