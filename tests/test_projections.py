"""Projections of prompts and tokens, and the maps that are drawn of states."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

import mechguard as mg
from mechguard.projections import gate_thresholds

N_LAYERS, D_MODEL = 3, 32


def states(*, condition: str = "text", shift: float = 0.0, seed: int = 0) -> mg.Activations:
    """Forty prompts in pairs; harmful ones lie 3 along the first axis, a picture moves all of them."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(N_LAYERS, 40, D_MODEL, generator=generator)
    data[:, :20, 0] += 3
    data[:, :, 1] += shift
    labels, pairs = [1] * 20 + [0] * 20, list(range(20)) * 2
    found = mg.Activations.from_tensor(data, labels=labels, pairs=pairs)
    return mg.Activations(found.data, found.layers, found.prompts, {"view": "vlm", "condition": condition})


def axis(number: int) -> mg.Directions:
    data = torch.zeros(N_LAYERS, D_MODEL)
    data[:, number] = 1
    return mg.Directions.from_tensor(data)


def test_projections_are_those_of_the_directions_prompt_by_prompt():
    text, blank = states(), states(condition="blank", shift=5, seed=1)
    table = mg.project_states(axis(0), [text, blank]).where(metric="projection").table
    for found in (text, blank):
        rows = table[(table["condition"] == found.name) & (table["layer"] == 1)]
        np.testing.assert_allclose(rows["value"], found.at(1)[:, 0], atol=1e-4)
        assert list(rows["id"]) == [prompt.id for prompt in found.prompts]
        assert list(rows["label"]) == found.prompts.labels


def test_scaled_projections_count_standard_deviations_from_the_midpoint_gate():
    text = states()
    ssd = mg.fit_directions(text)
    result = mg.project_states(ssd, [text])
    gates = result.where(metric="gate_threshold").table
    np.testing.assert_allclose(gates.loc[gates["gate"] == "midpoint", "scaled"], 0, atol=1e-6)
    rows = result.where(metric="projection", layer=2).table
    threshold = float(gate_thresholds(ssd, text.layers)["midpoint"][2])
    wanted = (rows["value"] - threshold) / rows["value"].std(ddof=0)
    np.testing.assert_allclose(rows["scaled"], wanted, atol=1e-3)


def test_projections_refuse_states_of_other_layers():
    text = states()
    few = mg.Activations(text.data[:2], [0, 1], text.prompts, text.about)
    with pytest.raises(mg.MechguardError, match="all of the same layers"):
        mg.project_states(axis(0), [text, few])


def test_tokens_project_as_the_last_token_does_and_patches_know_their_place(vlm: mg.VLM):
    prompts = tiny.prompts(pairs=2)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(vlm.n_layers, vlm.d_model, generator=generator)
    ssd = mg.Directions.from_tensor(drawn)
    sent = prompts + prompts.with_image("blank")
    result = mg.project_tokens(vlm, sent, ssd)
    for found in (prompts, prompts.with_image("blank")):
        collected = mg.collect(vlm, found, progress=False)
        rows = result.where(condition=collected.name).table
        last = rows[rows["pos"] == rows.groupby("id")["pos"].transform("max")]
        for layer in range(vlm.n_layers):
            ours = last[last["layer"] == layer].set_index("id")["value"]
            wanted = ssd.project(collected)[layer]
            for prompt, value in zip(found, wanted.tolist(), strict=True):
                assert abs(ours[prompt.id] - value) < 1e-3
    one = result.where(condition="vlm blank", id=prompts[0].id, layer=0).table
    patches = one[one["patch_row"].notna()]
    assert one["is_image"].sum() == 5  # a class token and 2 x 2 patches
    assert patches[["patch_row", "patch_column"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert list(result.about["pictures"]) == ["blank"]
    assert set(one["picture"]) == {"blank"}


def test_a_map_holds_three_axes_of_falling_spread_and_one_picture_once():
    blank = states(condition="blank", shift=5, seed=1)
    pictured = mg.Activations(blank.data, blank.layers, blank.prompts.with_image("blank"), blank.about)
    result = mg.map_states([states(), pictured])
    spread = result.where(layer=0).table[["x", "y", "z"]].std()
    assert spread["x"] > spread["y"] > spread["z"] > 0
    assert list(result.about["pictures"]) == ["p0"]
    assert result.about["pictures"]["p0"].startswith("data:image/jpeg;base64,")
    keys = result.table.groupby("condition")["picture"].unique()
    assert list(keys["vlm blank"]) == ["p0"]
    assert not mg.map_states([states(), pictured], pictures=False).about["pictures"]


def test_the_discriminant_map_shows_prompts_it_was_not_fitted_on():
    nothing = [states(seed=5).shuffled(1), states(condition="blank", seed=6).shuffled(1)]
    there = [states(), states(condition="blank", shift=5, seed=1)]
    gaps = {}
    for name, conditions in (("nothing", nothing), ("there", there)):
        table = mg.map_states(conditions, method="lda").table
        assert len(table) == N_LAYERS * 40  # half of 40 prompts under two conditions
        groups = table[table["layer"] == 0].groupby("label")[["x", "y", "z"]].mean()
        gaps[name] = float(np.linalg.norm(groups.loc["harmful"] - groups.loc["harmless"]))
    assert gaps["there"] > 2.0
    assert gaps["nothing"] < 1.0
    with pytest.raises(mg.MechguardError, match="use one of pca, lda"):
        mg.map_states(there, method="umap")


def test_thumbnails_are_small_and_missing_where_a_picture_is_gone():
    prompts = mg.Prompts([mg.Prompt("a", "x"), mg.Prompt("b", "y", image="blank")])
    gone = mg.Prompts([mg.Prompt("c", "z", image="/nowhere/picture.png")])
    none, blank, missing = (prompts + gone).thumbnails()
    assert none is None
    assert missing is None
    assert blank is not None
    assert len(blank) < 2000
    noise = mg.Prompts([mg.Prompt("a", "x"), mg.Prompt("b", "y")]).with_image("noise").thumbnails()
    assert noise[0] != noise[1]
