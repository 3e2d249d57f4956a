"""Passes that share what they can give what full passes give; where a model shares nothing, they are full."""

import pytest
import tiny
import tiny_families
import torch
from torch.testing import assert_close

import mechguard as mg
import mechguard.prefixes as prefixes
import mechguard.tracing as tracing
from mechguard.guards import Scope
from mechguard.sweeps import VARIANTS, Variant
from mechguard.tracing import score_next_tokens

LAYERS, ALPHAS = [[0], [1], [0, 2]], (-1.0, 2.0)


@pytest.fixture(scope="module")
def ssd(vlm, prompts) -> mg.Directions:
    return mg.fit_directions(mg.collect(vlm.llm, prompts, progress=False), rank=2)


def guards(ssd: mg.Directions, source: str, scope: Scope, gate: str = "always") -> list[mg.Guard]:
    options = dict(source=source, scope=scope, gate=gate)
    return [mg.vlm_guard(ssd, layers=layers, alpha=alpha, **options) for layers in LAYERS for alpha in ALPHAS]


def first_word(log_probabilities: torch.Tensor) -> torch.Tensor:
    return log_probabilities[:, 7]


def both_ways(model, sent, tried, **options):
    """Scores by shared and by full passes."""
    shared = score_next_tokens(model, sent, tried, first_word, progress=False, **options)
    full = [
        first_word(mg.predict_next_tokens(model, sent, guard=guard, progress=False, **options))
        for guard in tried
    ]
    return shared, torch.stack(full)


@pytest.mark.parametrize(
    ("source", "positions", "condition"),
    [
        ("own", "last", "noise"),
        ("llm", "last", "none"),
        ("last", "all", "noise"),
        ("llm", "text", "noise"),
        ("own", "all", "none"),
    ],
)
def test_scores_of_many_guards_are_those_of_full_passes(vlm, prompts, ssd, condition, positions, source):
    sent = prompts[:5].with_image(condition)
    tried = [None, *guards(ssd, source, Scope(positions, "both"), "midpoint")]
    shared, full = both_ways(vlm, sent, tried, batch_size=3)
    assert_close(shared, full, atol=1e-5, rtol=1e-5)
    assert (shared[1:] - shared[0]).abs().max() > 1e-3


def test_a_language_model_that_reads_along_supervises_the_first_token_alike(vlm, prompts, ssd):
    tried = guards(ssd, "llm-stream", Scope("last", "both"))
    shared, full = both_ways(vlm, prompts[:4].with_image("blank"), tried)
    assert_close(shared, full, atol=1e-5, rtol=1e-5)


def test_a_setting_at_the_last_position_costs_one_token_through_the_layers_above(vlm, prompts, ssd):
    tried = guards(ssd, "own", Scope("last", "both"))
    counted = []
    layers = vlm.hf_model.get_submodule(vlm.parts.layers)
    handles = [
        layer.register_forward_hook(lambda _, given, out: counted.append(out.shape[1])) for layer in layers
    ]
    try:
        score_next_tokens(vlm, prompts[:4], tried, first_word, batch_size=4, progress=False)
    finally:
        for handle in handles:
            handle.remove()
    above = sum(vlm.n_layers - 1 - layers[0] for layers in LAYERS) * len(ALPHAS)
    assert counted.count(1) == above + vlm.n_layers  # and one plain step
    assert (
        len(counted) - counted.count(1) == 2 * vlm.n_layers
    )  # the prefix, and the pass it is checked against


# What a family does between its layers, behind its head, or with the whole prompt at once decides.
SHARES = {
    "llava": (True, True),
    "gemma3": (True, True),
    "qwen2_vl": (True, False),
    "qwen3_vl": (False, False),
    "paligemma": (True, False),
}


@pytest.mark.parametrize("family", SHARES)
def test_what_a_family_cannot_share_is_computed_in_full(family, tmp_path):
    tiny_families.save(family, tmp_path)
    model = mg.load(tmp_path)
    sent = tiny.prompts(pairs=2).with_image("noise")
    ssd = mg.fit_directions(mg.collect(model, tiny.prompts(pairs=4), progress=False), rank=1)
    encoded = model.encode_once(list(sent))
    inputs = {**encoded, **model.position_ids(encoded)}
    for last, expected in zip((False, True), SHARES[family], strict=True):
        assert (prefixes.read_prefix(model, inputs, last=last) is not None) is expected
    for positions in ("all", "last"):
        guard = mg.vlm_guard(
            ssd, layers=[0], alpha=3.0, source="own", scope=Scope(positions, "both"), gate="always"
        )
        shared, full = both_ways(model, sent, [guard], batch_size=4)
        assert_close(shared, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("source", "condition"), [("own", "noise"), ("llm", "none"), ("llm-stream", "noise")]
)
def test_answers_that_share_their_prompt_are_the_same(vlm, prompts, ssd, source, condition):
    sent = prompts[:6].with_image(condition)
    tried = [None, *guards(ssd, source, Scope("last", "both"))[:3]]
    options = dict(max_new_tokens=6, progress=False)
    alone = [mg.respond(vlm, sent, guard=guard, **options) for guard in tried]
    with prefixes.sharing_prompts(vlm) as cache:
        shared = [mg.respond(vlm, sent, guard=guard, **options) for guard in tried]
        again = [mg.respond(vlm, sent, guard=guard, **options) for guard in tried]
    assert [[one.ids for one in rows] for rows in shared] == [[one.ids for one in rows] for rows in alone]
    assert [[one.gates for one in rows] for rows in shared] == [[one.gates for one in rows] for rows in alone]
    assert shared == again
    assert cache.size > 0
    assert prefixes.shared_prompts() is None


def test_a_prompt_is_read_once_for_all_settings(vlm, prompts, ssd, monkeypatch):
    read = []
    real = prefixes._read_cache
    monkeypatch.setattr(prefixes, "_read_cache", lambda *given: read.append(1) or real(*given))
    grid = dict(layers=[[0], [1]], alphas=(1.0, 2.0), conditions=["blank"], max_new_tokens=3, progress=False)
    scopes = [Scope("last", "both")]
    held = {"held": VARIANTS["B, LLM held"]}
    shared = mg.sweep(vlm, prompts[:4], ssd, variants=held, scopes=scopes, **grid)
    assert len(read) == 1
    monkeypatch.setattr(tracing, "shared_prompts", lambda: None)
    alone = mg.sweep(vlm, prompts[:4], ssd, variants=held, scopes=scopes, **grid)
    assert shared.table.equals(alone.table)


def test_other_strings_around_the_same_prompts_share_nothing(vlm, prompts, ssd):
    other = vlm.with_chat(system="please help")
    guard = mg.vlm_guard(ssd, layers=[0, 1], alpha=2.0, source="llm")
    options = dict(max_new_tokens=4, progress=False)

    def answers() -> list[list[str]]:
        return [
            mg.generate(model, prompts[:6], guard=one, **options)
            for model in (vlm, other)
            for one in (None, guard)
        ]

    alone = answers()
    assert alone[0] != alone[2]
    with prefixes.sharing_prompts(vlm), prefixes.keeping_answers(vlm):
        assert answers() == alone
        assert answers() == alone


def test_no_more_is_kept_than_the_limit_allows(vlm, prompts):
    sent = prompts[:4].with_image("blank")
    options = dict(max_new_tokens=3, progress=False)
    with prefixes.sharing_prompts(vlm, limit=10) as cache:
        found = mg.generate(vlm, sent, **options)
    assert cache.size == 0
    assert found == mg.generate(vlm, sent, **options)


def test_guards_at_other_positions_read_the_whole_prompt(vlm, prompts, ssd):
    guard = mg.projection(ssd, layers=[0, 1])
    assert not prefixes.only_last([guard])
    with prefixes.sharing_prompts(vlm) as cache:
        shared = mg.generate(vlm, prompts[:4], guard=guard, max_new_tokens=4, progress=False)
    assert not cache.known
    assert shared == mg.generate(vlm, prompts[:4], guard=guard, max_new_tokens=4, progress=False)


def test_a_sweep_of_first_tokens_tells_both_kinds_of_prompts(vlm, prompts, ssd):
    found = mg.sweep_first_token(
        vlm,
        prompts[:8],
        ssd,
        layers=[[0], [1]],
        alphas=(1.0, 2.0),
        refusal_openings=["sorry"],
        conditions=["none", "blank"],
        scopes=[Scope("last", "prompt")],
        variants={"own": Variant("own", Scope())},
        progress=False,
    ).table
    assert set(found["metric"]) == {"refusal_log_odds", "benign_refusal_log_odds"}
    assert len(found) == 2 * 2 * (1 + 4)
    assert ((found["low"] <= found["value"]) & (found["value"] <= found["high"])).all()
    plain = found[found["guard"] == "none"]
    token = vlm.tokenizer.convert_tokens_to_ids("sorry")
    harmful = prompts[:8].with_label("harmful")
    odds = mg.predict_next_tokens(vlm, harmful, progress=False)[:, token].exp().logit()
    assert plain.iloc[0]["value"] == pytest.approx(float(odds.mean()), abs=1e-4)
