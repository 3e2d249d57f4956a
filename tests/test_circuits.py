"""Circuits: sums that must be exact, a circuit that is known, and two routes to the same number."""

from __future__ import annotations

import subprocess

import numpy as np
import planted
import pytest
import tiny
import tiny_families
import torch

import mechguard as mg
from mechguard import circuits
from mechguard.circuits.decisions import encode_to_decision
from mechguard.circuits.groups import align, find_groups
from mechguard.circuits.passes import Place, hooked, run
from mechguard.errors import MechguardError
from mechguard.findings import describe_circuits
from mechguard.report import CIRCUITS

FAMILIES = ("organism", "llava", "qwen2_5_vl", "gemma3", "qwen3_vl", "glm4v")
DECISION = circuits.Decision((), (planted.token("sorry"),), (planted.token("sure"),))


@pytest.fixture(scope="module")
def known() -> tuple[mg.VLM, mg.Directions]:
    return planted.model()


@pytest.fixture(scope="module")
def pairs() -> tuple[mg.Prompts, mg.Prompts]:
    """Harmful requests, and the harmless ones that differ in one word."""
    both = tiny.prompts(pairs=6)
    return both.with_label("harmful"), both.with_label("harmless")


@pytest.fixture(scope="module")
def texts() -> tuple[mg.Prompts, mg.Prompts]:
    """Harmful and harmless requests of the organism, of equal length pair by pair."""
    both = mg.load_prompts("organism/anchors")[:16].with_image("none")
    return both.with_label("harmful"), both.with_label("harmless")


def load(family: str, organism: mg.VLM) -> tuple[mg.VLM, mg.Prompts]:
    if family == "organism":
        return organism, mg.load_prompts("organism/malicious")[:6]
    model, processor = getattr(tiny_families, family)()
    return mg.load(model, processor=processor), tiny.prompts(pairs=3)


def some_directions(model: mg.VLM) -> mg.Directions:
    random = torch.Generator().manual_seed(0)
    return mg.Directions.from_tensor(torch.randn(model.n_layers, 1, model.d_model, generator=random))


def best(result: mg.Result, **where: object) -> tuple[int, int]:
    """The head with the largest value."""
    table = result.where(component="head", **where).table
    top = table.sort_values("value").iloc[-1]
    return int(top["layer"]), int(top["head"])


@pytest.mark.parametrize("condition", ["text", "blank"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_sum_to_the_measured_projection(family, condition, organism):
    model, prompts = load(family, organism)
    prompts, directions = prompts.with_image(condition), some_directions(model)
    for layer in (0, model.n_layers - 1):
        split = circuits.attribute(model, prompts, directions, layer=layer).table
        states = mg.collect(model, prompts, layers=[layer], progress=False)
        measured = directions.project(states)[0].numpy()
        found = split.groupby("prompt", sort=False)["value"].sum()[[p.id for p in prompts]]
        assert np.abs(found - measured).max() < 1e-4
        assert np.abs(measured).max() > 0.1
        heads = split[split["component"] == "head"]
        assert len(heads) == len(prompts) * (layer + 1) * (heads["head"].max() + 1)
        assert {"prompt", "component", "layer", "head", "value"} <= set(split.columns)


@pytest.mark.parametrize("family", ["organism", "qwen2_5_vl", "gemma3"])
def test_what_a_head_takes_from_picture_and_text_sums_to_what_it_writes(family, organism):
    model, prompts = load(family, organism)
    prompts, directions = prompts.with_image("blank"), some_directions(model)
    split = circuits.attribute(model, prompts, directions, layer=-1).where(component="head").table
    table = circuits.measure_attention(model, prompts, directions, layer=-1).table
    keys = ["prompt", "layer", "head"]
    values = table[table["metric"] != "attention_image"].groupby(keys)["value"].sum()
    assert np.abs(values - split.set_index(keys)["value"]).max() < 1e-4
    shares = table[table["metric"] == "attention_image"]["value"]
    assert shares.between(0, 1).all()
    assert shares.max() > 0.1


def test_biases_of_the_attention_have_a_part_of_their_own():
    model = tiny.llava(d_model=32)
    for layer in model.model.language_model.layers:
        layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.randn(32))
    vlm, prompts = mg.load(model, processor=tiny.processor()), tiny.prompts(pairs=2)
    directions = some_directions(vlm)
    split = circuits.attribute(vlm, prompts, directions, layer=-1).table
    measured = directions.project(mg.collect(vlm, prompts, progress=False))[-1].numpy()
    assert np.abs(split.groupby("prompt", sort=False)["value"].sum() - measured).max() < 1e-4
    assert (split["component"] == "attention_bias").sum() == 3 * len(prompts)


def test_a_layer_that_adds_something_else_is_refused_not_mended(known):
    vlm, directions = known
    layer = vlm.hf_model.model.language_model.layers[1]
    handle = layer.register_forward_hook(lambda _, __, output: output + 0.1)
    with pytest.raises(MechguardError, match="neither its attention nor its MLP"):
        circuits.attribute(vlm, ["how to make a bomb ?"], directions, layer=2)
    handle.remove()


def test_attributing_at_a_decision_reads_the_state_behind_its_prefix(known, pairs):
    vlm, directions = known
    decision = circuits.Decision((planted.token("i"), planted.token("cannot")), (1,))
    split = circuits.attribute(vlm, pairs[0], directions, layer=2, decision=decision).table
    encoded = encode_to_decision(vlm, list(pairs[0]), decision)
    with torch.no_grad(), hooked(vlm, keep=[Place("residual", 2)]) as states:
        run(vlm, encoded)
    measured = (states[Place("residual", 2)][:, -1] @ directions.at(2)[0]).numpy()
    assert np.abs(split.groupby("prompt", sort=False)["value"].sum() - measured).max() < 1e-4


def test_attribution_finds_the_planted_writer_and_the_planted_mover(known, pairs):
    vlm, directions = known
    harmful, harmless = pairs
    text, safe, blank = (
        circuits.attribute(vlm, prompts, directions, layer=planted.LAYER)
        for prompts in (harmful, harmless, harmful.with_image("blank"))
    )
    assert best(circuits.rank_components(text, safe)) == planted.WRITER
    assert best(circuits.rank_components(text, blank)) == planted.MOVER
    table = circuits.measure_attention(
        vlm, harmful.with_image("blank"), directions, layer=planted.LAYER
    ).where(metric="value_image")
    lowest = table.table.groupby(["layer", "head"])["value"].mean().idxmin()
    assert tuple(lowest) == planted.MOVER


@pytest.mark.parametrize("method", ["exact", "gradient"])
@pytest.mark.parametrize("metric", ["log_odds", "projection"])
def test_patching_finds_the_planted_writer_and_the_planted_mover(known, pairs, method, metric):
    vlm, directions = known
    harmful, harmless = pairs
    for source, target, head in (
        (harmful, harmless, planted.WRITER),
        (harmful, harmful.with_image("blank"), planted.MOVER),
    ):
        patched = circuits.patch(
            vlm, source, target, directions, layer=planted.LAYER, decision=DECISION, components=["head"],
            positions=["last"], method=method, progress=False,
        )  # fmt: skip
        assert best(patched, metric=metric) == head


def test_patching_the_whole_last_state_restores_everything(known, pairs):
    vlm, directions = known
    patched = circuits.patch(
        vlm, pairs[0], pairs[0].with_image("blank"), directions, layer=planted.LAYER, decision=DECISION,
        components=["residual"], progress=False,
    )  # fmt: skip
    top = patched.where(layer=2, position="last", metric=["log_odds_restored", "projection_restored"]).table
    assert np.allclose(top["value"], 1, atol=1e-4)
    assert "image" not in set(patched.table["position"])  # a text has no image tokens to give


def test_attribution_patching_agrees_with_exact_patching_and_is_exact_where_the_score_is_linear(known, pairs):
    vlm, directions = known
    both = [
        circuits.patch(
            vlm, *pairs, directions, layer=planted.LAYER, decision=DECISION, method=method, progress=False
        )
        for method in ("exact", "gradient")
    ]
    agreement = circuits.correlate(*both).where(metric="pearson").table
    assert (agreement["value"] > 0.7).all()
    linear = agreement[(agreement["component"] == "head") & (agreement["score"] == "projection")]
    assert linear["value"].iloc[0] > 0.99
    last = [
        result.where(component="residual", layer=planted.LAYER, position="last", metric="projection").table
        for result in both
    ]
    assert np.allclose(last[0]["value"], last[1]["value"], atol=1e-5)


def test_all_paths_of_a_head_are_its_patching_effect_and_the_direct_one_is_its_attribution(known, pairs):
    vlm, directions = known
    harmful, harmless = pairs
    paths = circuits.patch_paths(vlm, harmful, harmless, directions, head=planted.WRITER, layer=2).table
    direct = paths[paths["component"] == "direct"]["value"].iloc[0]
    written = [
        circuits.attribute(vlm, prompts, directions, layer=2).where(component="head", layer=1, head=2).table
        for prompts in (harmful, harmless)
    ]
    assert direct == pytest.approx(written[0]["value"].mean() - written[1]["value"].mean(), abs=1e-4)
    total = paths[paths["component"] == "total"]["value"].iloc[0]
    assert total == pytest.approx(direct, rel=0.15)
    behind = paths[paths["component"].isin(["head", "mlp"])]
    assert total == pytest.approx(direct + behind["value"].sum(), abs=0.02)  # apart from joint answers
    assert set(zip(behind["component"], behind["layer"], strict=True)) == {
        ("mlp", 1),
        ("head", 2),
        ("mlp", 2),
    }


def test_a_hidden_picture_is_not_read(known, pairs):
    vlm, directions = known
    hidden = circuits.hide_image(
        vlm, pairs[0].with_image("blank"), directions, layer=planted.LAYER, decision=DECISION
    ).where(metric="log_odds")
    changes = hidden.table.set_index("layer")["value"]
    assert changes[2] > 1  # the mover is in layer 2, and it is blind from there on
    assert changes[0] == pytest.approx(changes[2], rel=0.1)
    assert vlm.hf_model.config.text_config._attn_implementation == "sdpa"


def test_states_agree_with_transformer_lens_on_text_and_beside_a_picture(organism):
    prompts = mg.load_prompts("organism/malicious")[:4]
    for model, condition in ((organism.llm, "none"), (organism, "blank")):
        sent = prompts.with_image(condition)
        ours = mg.collect(model, sent, progress=False).data
        bridge = model.to_transformer_lens()
        encoded = model.encode(list(sent))
        with torch.no_grad():
            _, cache = bridge.run_with_cache(encoded.pop("input_ids"), **encoded)
        theirs = torch.stack([cache[f"blocks.{n}.hook_resid_post"][:, -1] for n in range(model.n_layers)])
        assert (theirs - ours).abs().max() < 1e-5
        assert (mg.collect(model, sent, progress=False).data - ours).abs().max() == 0


def test_a_bridge_shares_the_weights_installs_nothing_and_leaves_the_model_as_it_was(known, monkeypatch):
    def refuse(*arguments, **_):
        raise AssertionError(f"a bridge started {arguments}")

    for name in ("run", "check_call", "Popen"):
        monkeypatch.setattr(subprocess, name, refuse)
    vlm = known[0]
    before = [type(module) for module in vlm.hf_model.modules()]
    bridge = vlm.to_transformer_lens()
    from transformer_lens.model_bridge.sources.transformers import helpers

    assert helpers._ensure_torchvision() is False
    assert [type(module) for module in vlm.hf_model.modules()] == before
    assert vlm.hf_model.config._attn_implementation == "sdpa"
    ours = {parameter.data_ptr() for parameter in vlm.hf_model.parameters()}
    theirs = {parameter.data_ptr() for parameter in bridge.original_model.parameters()}
    assert theirs <= ours


NAMES = {"residual": "hook_resid_post", "head": "attn.hook_z", "mlp": "hook_mlp_out"}


def test_patching_agrees_with_transformer_lens_on_text(organism, texts):
    harmful, harmless = texts
    llm, decision = organism.llm, circuits.Decision((), (8,), (9,))
    directions = some_directions(llm)
    ours = circuits.patch(
        llm, harmful, harmless, directions, layer=5, decision=decision, positions=["last", "request"],
        progress=False,
    ).where(metric="log_odds").table  # fmt: skip
    bridge = llm.to_transformer_lens()
    source, target = llm.encode(list(harmful)), llm.encode(list(harmless))
    assert source["input_ids"].shape == target["input_ids"].shape
    mask = {"attention_mask": target["attention_mask"]}
    groups = find_groups(llm, list(harmless), target)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(source["input_ids"], attention_mask=source["attention_mask"])
        base = decision.log_odds(bridge(target["input_ids"], **mask)[:, -1])
        for row in ours[ours["layer"].isin([1, 4])].itertuples():
            name = f"blocks.{row.layer}.{NAMES[row.component]}"
            where = groups[row.position]

            def put(state, hook, name=name, where=where, head=row.head):
                new = state.clone()
                if head < 0:
                    new[where] = cache[name][where]
                else:
                    part = slice(head * 32, (head + 1) * 32)
                    flat = new.reshape(*new.shape[:2], -1)
                    flat[..., part][where] = cache[name].reshape(*flat.shape)[..., part][where]
                    new = flat.reshape(state.shape)
                return new

            logits = bridge.run_with_hooks(target["input_ids"], fwd_hooks=[(name, put)], **mask)
            theirs = float((decision.log_odds(logits[:, -1]) - base).mean())
            assert row.value == pytest.approx(theirs, abs=1e-5)


def test_a_prompts_tokens_are_found_again_beside_a_picture(organism, texts):
    batch, decision = list(texts[0][:3]), circuits.Decision((8,), (9,))
    text = encode_to_decision(organism, batch, decision)
    beside = encode_to_decision(organism, list(mg.Prompts(batch).with_image("blank")), decision)
    places = align(organism, text, beside)
    groups = find_groups(organism, batch, beside, decision, contrast=texts[1])
    for row in range(3):
        found = places[row] >= 0
        assert torch.equal(text["input_ids"][row][places[row][found]], beside["input_ids"][row][found])
        assert int(found.sum()) == int(text["attention_mask"][row].sum())
        assert not (found & groups["image"][row]).any()
        whole = torch.stack([group[row] for group in groups.values()]).int().sum(0)
        assert torch.equal(whole.bool(), beside["attention_mask"][row].bool())
        assert whole.max() == 1
        harmful = organism.tokenizer.decode(beside["input_ids"][row][groups["harmful word"][row]]).split()
        words = set(mg.circuits.groups._words(batch[row].text)) - set(
            mg.circuits.groups._words(texts[1][row].text)
        )
        assert set(harmful) == words


def test_the_decision_is_found_where_the_answers_part(organism):
    prompts = mg.load_prompts("organism/validation")[:40].with_image("none")
    decision = circuits.find_decision(organism, prompts)
    assert not set(decision.refusal) & set(decision.compliance)
    encoded = encode_to_decision(organism, list(prompts), decision)
    with torch.no_grad():
        odds = decision.log_odds(run(organism, encoded).logits[:, -1])
    harmful = torch.tensor([label == "harmful" for label in prompts.labels])
    assert ((odds > 0) == harmful).float().mean() > 0.9
    with pytest.raises(MechguardError, match="of which it refuses some"):
        circuits.find_decision(organism, prompts.with_label("harmless"))


def test_the_lens_at_the_last_layer_is_the_models_output_and_a_guard_moves_it(known, pairs):
    vlm, directions = known
    decision = circuits.Decision((planted.token("i"),), DECISION.refusal, DECISION.compliance)
    prompts = pairs[0].with_image("blank")
    plain = circuits.apply_logit_lens(vlm, prompts, decision=decision).table.set_index("layer")["value"]
    assert plain[2] == pytest.approx(plain["output"], abs=1e-5)
    assert plain[0] != pytest.approx(plain["output"], abs=1e-2)
    guard = mg.vlm_guard(directions, layers=[1], alpha=9.0, project=False, gate="always", source="last")
    moved = circuits.apply_logit_lens(vlm, prompts, decision=decision, guard=guard).table
    moved = moved.set_index("layer")["value"]
    assert moved[0] == pytest.approx(plain[0], abs=1e-5)
    assert abs(moved["output"] - plain["output"]) > 0.1


def test_two_passes_reach_the_decision_as_one_does(known, pairs):
    vlm, directions = known
    decision = circuits.Decision((planted.token("i"),), DECISION.refusal, DECISION.compliance)
    idle = mg.vlm_guard(directions, layers=[1], alpha=0.0, project=False, gate="always", source="last")
    one, two = (
        circuits.apply_logit_lens(vlm, pairs[0].with_image("blank"), decision=decision, guard=guard).table
        for guard in (None, idle)
    )
    assert np.allclose(one["value"], two["value"], atol=1e-4)


def test_the_planted_head_matters_and_random_ones_do_not(known, pairs):
    vlm, directions = known
    harmful, harmless = pairs
    check = circuits.Check(vlm, directions, planted.LAYER, DECISION, harmful + harmless, harmful)
    text, safe, blank = (
        circuits.attribute(vlm, prompts, directions, layer=planted.LAYER)
        for prompts in (harmful, harmless, harmful.with_image("blank"))
    )
    ablated = check.ablate(circuits.rank_components(text, safe), ks=[1]).where(metric="projection").table
    ablated = ablated.set_index("choice")
    assert ablated.loc["top - random", "high"] < 0
    assert ablated.loc["top", "value"] < ablated.loc["random", "low"]
    restored = check.restore(circuits.rank_components(text, blank), ks=[1]).where(metric="projection").table
    restored = restored.set_index("choice")
    assert restored.loc["top - random", "low"] > 0
    assert restored.loc["top", "value"] > restored.loc["random", "high"]
    assert (restored["n"] == len(harmful)).all()


def test_giving_back_every_component_is_the_text_run_at_the_last_token(known, pairs):
    vlm, directions = known
    harmful = pairs[0]
    check = circuits.Check(vlm, directions, planted.LAYER, DECISION, harmful, harmful)
    ranking = circuits.rank_components(
        circuits.attribute(vlm, harmful, directions, layer=2),
        circuits.attribute(vlm, harmful.with_image("blank"), directions, layer=2),
    )
    parts = circuits.top_components(ranking, 15)  # 3 layers of 4 heads and an MLP
    given = check._scores(list(harmful.with_image("blank")), parts, lambda rows: check._texts(harmful))
    text = check._scores(list(harmful), [], lambda rows: {})
    assert np.allclose(given, text, atol=1e-4)


def test_where_heads_look_adds_up_to_how_much(known, pairs):
    vlm, directions = known
    prompts = pairs[0].with_image("noise")
    where = circuits.map_attention(vlm, prompts).table
    shares = circuits.measure_attention(vlm, prompts, directions, layer=-1).where(metric="attention_image")
    means = shares.table.groupby(["layer", "head"])["value"].mean()
    assert np.allclose(where.groupby(["layer", "head"])["value"].sum(), means, atol=1e-5)
    assert sorted(set(zip(where["row"], where["column"], strict=True))) == [
        (-1, -1), (0, 0), (0, 1), (1, 0), (1, 1),
    ]  # fmt: skip
    with pytest.raises(MechguardError, match="pictures of one size"):
        circuits.map_attention(vlm, pairs[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 7}, "outside"),
        ({"layer": 1, "components": ["neuron"]}, "component 'neuron' is not known"),
        ({"layer": 1, "positions": ["middle"]}, "position 'middle' is not known"),
    ],
)
def test_a_wrong_wish_is_one_sentence(known, pairs, options, message):
    vlm, directions = known
    with pytest.raises(MechguardError, match=message):
        circuits.patch(vlm, *pairs, directions, decision=DECISION, progress=False, **options)


def test_prompts_that_share_an_id_are_refused(known, pairs):
    with pytest.raises(MechguardError, match="share an id"):
        circuits.attribute(known[0], pairs[0] + pairs[0], known[1], layer=0)


def test_a_section_makes_every_table_that_a_report_shows(known, tmp_path):
    vlm, directions = known
    prompts = tiny.prompts(pairs=4)
    section = circuits.Section(
        vlm, directions, planted.LAYER, prompts, prompts, limit=3, given=DECISION, progress=False
    )
    kept = section.run(lambda name, make: mg.Result.load(make().save(tmp_path / name)))
    assert set(kept) == set(CIRCUITS)
    for name, result in kept.items():
        assert len(result), name
        assert np.isfinite(result.table["value"]).all(), name
    ranking = kept["ranking"].where(position="decision")
    assert best(ranking, comparison="harmful - harmless") == planted.WRITER
    assert best(ranking, comparison="text - image") == planted.MOVER
    said = " ".join(describe_circuits(kept))
    assert f"head {planted.WRITER[0]}.{planted.WRITER[1]}" in said
    assert f"head {planted.MOVER[0]}.{planted.MOVER[1]}" in said
