"""Every method of the literature: its formula, and one result whichever way it is run."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch.testing import assert_close

import mechguard as mg
from mechguard import guards as g
from mechguard import tracing

LAYERS = [0, 1, 2]
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def anchors(prompts):
    return prompts


@pytest.fixture(scope="module")
def text(vlm, anchors):
    return mg.collect(vlm.llm, anchors, progress=False)


@pytest.fixture(scope="module")
def blank(vlm, anchors):
    return mg.collect(vlm, anchors.with_image("blank"), progress=False)


@pytest.fixture(scope="module")
def methods(text, blank):
    """Every method at a strength that shows."""
    ssd = mg.fit_directions(text, rank=2)
    vlm_guards = {
        f"vlm_guard {source}": g.vlm_guard(ssd, layers=LAYERS, alpha=2.0, source=source)
        for source in ("own", "last", "llm", "llm-stream")
    }
    return {
        **vlm_guards,
        "vlm_guard kept norm": g.vlm_guard(ssd, layers=LAYERS, alpha=3.0, source="llm", keep_norm=True),
        "projection": g.projection(ssd, layers=LAYERS),
        "ablation": g.ablation(ssd, layer=1),
        "activation_addition": g.activation_addition(text, layers=[1], alpha=2.0),
        "inferaligner": g.inferaligner(text, layers=LAYERS, alpha=2.0),
        "cast": g.cast(text, layers=LAYERS, alpha=2.0),
        "cmrm": g.cmrm(text, blank, layers=LAYERS),
        "cmrm_sample": g.cmrm_sample(text, layers=LAYERS),
        "shift_dc": g.shift_dc(text, layers=LAYERS, alpha=1.5),
        "astra": g.astra(text, layers=LAYERS),
        "adasteer": g.adasteer(text, blank, layers=LAYERS),
        "tbop": g.tbop(text, blank, layers=[2], rank=2),
        "mars": g.mars(text, blank, layers=LAYERS, alpha=2.0, radius=5.0),
        "alpha_steer": g.alpha_steer(text, layers=LAYERS, alpha=2.0),
        "two together": g.vlm_guard(ssd, layers=LAYERS, source="llm") | g.projection(ssd, layers=[2]),
        "stream and held": g.vlm_guard(ssd, layers=[2]) | g.vlm_guard(ssd, layers=[1], source="llm"),
    }


NAMES = [
    *("vlm_guard own", "vlm_guard last", "vlm_guard llm", "vlm_guard llm-stream", "vlm_guard kept norm"),
    *("projection", "ablation", "activation_addition", "inferaligner", "cast", "cmrm", "cmrm_sample"),
    *("shift_dc", "astra", "adasteer", "tbop", "mars", "alpha_steer", "two together", "stream and held"),
]


def test_the_list_of_names_is_complete(methods):
    assert list(methods) == NAMES


@pytest.fixture(scope="module")
def mixed(anchors):
    """Prompts of unequal length, some beside a picture."""
    return mg.Prompts([*anchors[:4].with_image("blank"), *anchors[4:7]])


def attached_tokens(vlm, guard, prompts, **options):
    """Tokens of plain `generate` under an attached guard, batch by batch as respond makes them."""
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **options}
    encoded = vlm.encode(list(prompts))
    with torch.no_grad(), guard.attach(vlm, prompts) as hf_model:
        sequences = hf_model.generate(**encoded, **settings)
    return sequences[:, encoded["input_ids"].shape[1] :]


def as_ids(vlm, tokens):
    end = vlm.tokenizer.eos_token_id
    rows = [row.tolist() for row in tokens]
    return [tuple(row[: row.index(end) + 1] if end in row else row) for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_and_hooks_give_the_same_tokens(vlm, methods, mixed, name):
    traced = mg.respond(vlm, mixed, guard=methods[name], max_new_tokens=NEW_TOKENS, progress=False)
    for rows in (slice(0, 4), slice(4, 7)):
        hooked = as_ids(vlm, attached_tokens(vlm, methods[name], mixed[rows]))
        assert [response.ids for response in traced][rows] == hooked


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_and_hooks_give_the_same_states(vlm, methods, anchors, name):
    sent = anchors[:5].with_image("blank")
    traced = mg.collect(vlm, sent, guard=methods[name], progress=False).data[-1]
    found = []
    layer = vlm.hf_model.model.language_model.layers[-1]
    with torch.no_grad(), methods[name].attach(vlm, sent):
        handle = layer.register_forward_hook(lambda *call: found.append(call[-1][:, -1]))
        vlm.hf_model(**vlm.encode(list(sent)))
        handle.remove()
    assert_close(traced, found[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_gives_each_row_what_it_gets_alone(vlm, methods, mixed, name):
    options = dict(guard=methods[name], max_new_tokens=4, progress=False)
    together = mg.respond(vlm, mixed, **options)
    alone = [mg.respond(vlm, [prompt], **options)[0] for prompt in mixed]
    assert together == alone


@pytest.mark.parametrize("name", NAMES)
def test_a_method_does_something_and_leaves_nothing_behind(vlm, methods, anchors, name):
    sent = anchors[:6].with_image("blank")
    before = mg.collect(vlm, sent, progress=False).data
    guarded = mg.collect(vlm, sent, guard=methods[name], progress=False).data
    assert (guarded - before).abs().max() > 1e-3
    assert torch.equal(mg.collect(vlm, sent, progress=False).data, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_survives_a_round_trip(methods, vlm, anchors, name, tmp_path):
    guard = methods[name]
    guard.save(tmp_path / "guard")
    loaded = type(guard).load(tmp_path / "guard")
    assert repr(loaded) == repr(guard)
    sent = anchors[:3].with_image("blank")
    states = [mg.collect(vlm, sent, guard=one, progress=False).data for one in (guard, loaded)]
    assert torch.equal(*states)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("two together", "stream and held")])
def test_a_random_control_has_the_same_gate_and_size(methods, name):
    guard = methods[name]
    if name == "cmrm_sample":
        with pytest.raises(ValueError, match="no random one of its kind"):
            guard.randomised()
        return
    control = guard.randomised(1)
    assert control.layers == guard.layers
    assert control.move.options() == guard.move.options()
    for key, tensor in guard._tensors().items():
        other = control._tensors()[key]
        assert other.shape == tensor.shape
        if key in ("move.basis", "move.vectors", "move.matrices"):
            assert not torch.allclose(other, tensor)
            assert_close(other.norm(dim=-1), tensor.norm(dim=-1), atol=1e-3, rtol=1e-3)
        else:
            assert torch.equal(other, tensor)


def test_rows_whose_gate_is_closed_are_the_plain_models(vlm, text, mixed):
    ssd = mg.fit_directions(text)
    guard = g.vlm_guard(ssd, layers=LAYERS, alpha=3.0, source="llm")
    closed = mg.Guard(
        guard.name,
        guard.layers,
        guard.move,
        gate=g.Gate("sign", guard.gate.directions, torch.full((3,), 1e9)),
        source="llm",
        about=guard.about,
    )
    sent = mixed[:4]
    with torch.no_grad():
        plain = vlm.hf_model(**vlm.encode(list(sent))).logits
        with closed.attach(vlm, sent):
            guarded = vlm.hf_model(**vlm.encode(list(sent))).logits
        after = vlm.hf_model(**vlm.encode(list(sent))).logits
    assert torch.equal(plain, guarded)
    assert torch.equal(plain, after)


def test_sampling_and_beams_work_under_hooks(vlm, methods, anchors):
    sent = anchors[:3].with_image("blank")
    guard = methods["vlm_guard llm"]
    torch.manual_seed(0)
    sampled = attached_tokens(vlm, guard, sent, do_sample=True)
    torch.manual_seed(0)
    traced = mg.respond(
        vlm, sent, guard=guard, max_new_tokens=NEW_TOKENS, do_sample=True, progress=False, batch_size=3
    )
    order = sorted(range(3), key=lambda row: len(sent[row].text))
    if order == [0, 1, 2]:  # sampling draws row by row
        assert [response.ids for response in traced] == as_ids(vlm, sampled)
    beams = attached_tokens(vlm, guard, sent, num_beams=3)
    alone = [attached_tokens(vlm, guard, sent[row : row + 1], num_beams=3) for row in range(3)]
    assert as_ids(vlm, beams) == [as_ids(vlm, tokens)[0] for tokens in alone]
    empty = g.vlm_guard(
        mg.Directions.from_tensor(torch.eye(32)[None, :1]),
        layers=[0],
        alpha=0,
        project=False,
        gate="sign",
        source="own",
    )
    with torch.no_grad():
        encoded = vlm.encode(list(sent))
        plain = vlm.hf_model.generate(**encoded, num_beams=3, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert torch.equal(
        attached_tokens(vlm, empty, sent, num_beams=3), plain[:, encoded["input_ids"].shape[1] :]
    )


def test_what_a_trace_cannot_follow_is_refused(vlm, methods, anchors):
    sent = anchors[:2].with_image("blank")
    with pytest.raises(ValueError, match="cannot follow beams"):
        mg.generate(vlm, sent, guard=methods["projection"], num_beams=2, progress=False)
    with pytest.raises(ValueError, match="cannot follow sampled tokens in a trace"):
        mg.generate(vlm, sent, guard=methods["vlm_guard llm-stream"], do_sample=True, progress=False)
    with pytest.raises(ValueError, match="cannot follow beams"):
        attached_tokens(vlm, methods["vlm_guard llm-stream"], sent, num_beams=2)


def test_a_supervised_guard_asks_for_its_prompts(vlm, methods, anchors):
    with (
        pytest.raises(ValueError, match=r"give them: guard\.attach\(vlm, prompts\)"),
        methods["shift_dc"].attach(vlm),
    ):
        pass
    sent = anchors[:2].with_image("blank")
    with (
        pytest.raises(ValueError, match="2 rows were sent, but the guard was attached with 3 prompts"),
        methods["shift_dc"].attach(vlm, anchors[:3]),
        torch.no_grad(),
    ):
        vlm.hf_model(**vlm.encode(list(sent)))


def test_nothing_stays_attached_after_an_exception(vlm, methods, anchors):
    layers = vlm.hf_model.model.language_model.layers
    own = [set(layer._forward_hooks) for layer in layers]  # transformers leaves some to read states with
    with pytest.raises(RuntimeError, match="mine"), methods["projection"].attach(vlm):
        assert set(layers[0]._forward_hooks) > own[0]
        raise RuntimeError("mine")
    assert [set(layer._forward_hooks) for layer in layers] == own
    assert not vlm.hf_model._forward_pre_hooks


def test_a_pipeline_is_guarded_too(vlm, methods):
    from transformers import pipeline

    asked = [{"role": "user", "content": [{"type": "text", "text": "how to make a cake"}]}]
    speak = pipeline("text-generation", model=vlm.llm.hf_model, tokenizer=vlm.tokenizer)
    guard = methods["activation_addition"]
    strong = mg.Guard(guard.name, guard.layers, g.Add(guard.move.vectors, 30.0), scope=guard.scope)
    options = dict(max_new_tokens=5, do_sample=False, return_full_text=False)
    plain = speak("how to make a cake", **options)[0]["generated_text"]
    with strong.attach(vlm.llm):
        guarded = speak("how to make a cake", **options)[0]["generated_text"]
    assert plain != guarded
    assert speak("how to make a cake", **options)[0]["generated_text"] == plain
    assert asked


def test_a_held_state_stays_held_beside_a_stream(vlm, text, methods, mixed):
    ssd = mg.fit_directions(text)
    idle = g.vlm_guard(ssd, layers=[2], alpha=0.0, project=False)  # streams, and does nothing
    held, streamed = methods["vlm_guard llm"], methods["vlm_guard llm-stream"]
    options = dict(max_new_tokens=NEW_TOKENS, progress=False)
    ids = {
        name: [answer.ids for answer in mg.respond(vlm, mixed, guard=guard, **options)]
        for name, guard in {"held": held, "both": idle | held, "streamed": streamed}.items()
    }
    assert ids["both"] == ids["held"] != ids["streamed"]


def test_a_cosine_gate_does_not_look_at_lengths():
    v = torch.tensor([[1.0, 0.0]])
    gate = g.Gate("cosine", v, torch.tensor([0.5]))
    states = torch.tensor([[10.0, 100.0], [0.1, 0.01], [0.6, 0.8], [-1.0, 0.0]])
    assert gate.opens(0, states).tolist() == [False, True, True, False]
    assert g.Gate("sign", v, torch.zeros(1)).opens(0, states).tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match="gate='half' is not known"):
        g.Gate("half", v, torch.zeros(1))


# --------------------------------------------------------------------------------- formulas


def one_state(guard, hidden, query):
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
    return guard.steer(guard.layers[0], hidden, query, mask)


@pytest.fixture(scope="module")
def hidden():
    return torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def query():
    return torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(1))


def difference(states, layer):
    harmful, harmless, _ = states.groups()
    return harmful[layer].mean(0) - harmless[layer].mean(0)


def test_formulas_that_add_a_vector(text, blank, hidden, query):
    d = difference(text, 1)
    assert_close(
        one_state(g.activation_addition(text, layers=[1], alpha=0.5), hidden, query), hidden + 0.5 * d
    )
    assert_close(one_state(g.inferaligner(text, layers=[1], alpha=2.0), hidden, query), hidden + 2 * d)
    assert_close(one_state(g.cast(text, layers=[1], alpha=2.0), hidden, query), hidden + 2 * d)
    shift = (blank.data[1] - text.data[1]).mean(0)
    assert_close(one_state(g.cmrm(text, blank, layers=[1], alpha=0.7), hidden, query), hidden - 0.7 * shift)


def test_formulas_that_use_the_language_models_state(text, hidden, query):
    moved = one_state(g.cmrm_sample(text, layers=[1], alpha=0.5), hidden, query)
    assert_close(moved, hidden - 0.5 * (hidden[:, -1:] - query))
    s = difference(text, 1)
    m = hidden - query
    wanted = hidden - 0.8 * (m @ s / (s @ s)).unsqueeze(-1) * s
    assert_close(
        one_state(g.shift_dc(text, layers=[1], alpha=0.8), hidden, query), wanted, atol=1e-4, rtol=1e-4
    )


def test_astra_moves_only_what_lies_on_the_harmful_side(text, hidden, query):
    harmless = text.groups()[1][1].mean(0)
    v = torch.nn.functional.normalize(difference(text, 1), dim=0)
    cosine = torch.nn.functional.cosine_similarity(hidden - harmless, v, dim=-1)
    wanted = hidden - 1.5 * (cosine.clamp(0, 1) * hidden.norm(dim=-1)).unsqueeze(-1) * v
    moved = one_state(g.astra(text, layers=[1], alpha=1.5), hidden, query)
    assert_close(moved, wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(moved[cosine < 0], hidden[cosine < 0])


def test_adasteer_is_zero_at_the_harmless_mean_and_one_at_the_harmful_mean(text, blank, hidden):
    harmful, harmless, _ = blank.groups()
    guard = g.adasteer(text, blank, layers=[1])
    at = lambda mean: one_state(guard, hidden[:1], mean.reshape(1, 1, -1))  # noqa: E731
    assert_close(at(harmless[1].mean(0)), hidden[:1], atol=1e-4, rtol=1e-4)
    both = difference(text, 1) + difference(blank, 1)
    assert_close(at(harmful[1].mean(0)), hidden[:1] + both, atol=1e-4, rtol=1e-4)
    beyond = harmful[1].mean(0) + 10 * difference(blank, 1)
    assert_close(at(beyond), hidden[:1] + both, atol=1e-4, rtol=1e-4)  # clipped


def test_tbop_takes_out_the_shift_of_a_blank_image(text, blank, hidden, query):
    guard = g.tbop(text, blank, layers=[2], rank=2)
    shifts = blank.data[2] - text.data[2]
    moved = one_state(guard, hidden, query)
    v = torch.linalg.svd(shifts, full_matrices=False).Vh[:2]
    assert_close(moved @ v.T, torch.zeros(4, 3, 2), atol=1e-4, rtol=0)
    assert_close(moved, hidden - hidden @ v.T @ v, atol=1e-4, rtol=1e-4)


def test_mars_fills_the_gap_and_no_more_than_its_radius(text, blank, hidden, query):
    v = torch.nn.functional.normalize(difference(text, 1), dim=0)
    center = text.groups()[0][1].mean(0) + (blank.data[1] - text.data[1]).mean(0)
    gap = ((center - query) @ v).clamp_min(0)
    wide = one_state(g.mars(text, blank, layers=[1], radius=1e6), hidden, query)
    assert_close(wide, hidden + gap.unsqueeze(-1) * v, atol=1e-4, rtol=1e-4)
    narrow = one_state(g.mars(text, blank, layers=[1], alpha=50, radius=0.1), hidden, query)
    lengths = (narrow - hidden).norm(dim=-1)
    assert (lengths <= 0.1 * hidden.norm(dim=-1) + 1e-4).all()


def test_alpha_steer_moves_harmful_states_and_spares_harmless_ones(text):
    harmful, harmless, _ = text.groups()
    guard = g.alpha_steer(text, layers=[1], null_share=0.6, ridge=1e-3)
    moved = lambda states: (states[1] @ guard.move.matrices[0]).norm(dim=-1).mean()  # noqa: E731
    assert moved(harmful) > 3 * moved(harmless)


def test_a_kept_norm_is_kept(text, hidden, query):
    guard = g.vlm_guard(mg.fit_directions(text), layers=[1], alpha=9.0, source="llm", keep_norm=True)
    assert_close(one_state(guard, hidden, query).norm(dim=-1), hidden.norm(dim=-1), atol=1e-4, rtol=1e-4)


def test_ablation_uses_one_direction_at_every_layer(text):
    ssd = mg.fit_directions(text, rank=2)
    guard = g.ablation(ssd, layer=1)
    assert guard.layers == (0, 1, 2)
    for row in range(3):
        assert_close(guard.basis[row], ssd.at(1)[:1])


# ----------------------------------------------------------------------------- prompt guards


def test_prompt_guards_change_the_prompt_and_nothing_else(vlm, anchors):
    guard = g.self_reminder()
    wrapped = guard.wrap(anchors[:1])[0].text
    assert wrapped.startswith("You should be a responsible assistant")
    assert anchors[0].text in wrapped
    told = mg.generate(vlm, anchors[:2], guard=guard, max_new_tokens=3, progress=False)
    assert told == mg.generate(vlm, guard.wrap(anchors[:2]), max_new_tokens=3, progress=False)


def test_goal_priority_is_judged_behind_its_mark():
    guard = g.goal_priority()
    assert guard.counted("it is safe . [Final response] sure , here it is") == "sure , here it is"
    assert guard.counted("no mark") == "no mark"
    assert guard.wrap(mg.Prompts([mg.Prompt("0", "How?")]))[0].text.endswith("How?\n[Internal thoughts]")


def test_prompt_guards_combine_with_others(vlm, text, anchors, tmp_path):
    both = g.self_reminder() | g.projection(mg.fit_directions(text), layers=[2])
    assert both.name == "self_reminder | projection"
    answers = mg.generate(vlm, anchors[:2], guard=both, max_new_tokens=3, progress=False)
    steered = mg.generate(vlm, both.wrap(anchors[:2]), guard=both.parts[1], max_new_tokens=3, progress=False)
    assert answers == steered
    both.save(tmp_path / "both")
    assert repr(mg.Chain.load(tmp_path / "both")) == repr(both)


# --------------------------------------------------------------------------------- bad input


def test_guards_that_cannot_be_are_refused(vlm, text, blank):
    ssd = mg.fit_directions(text)
    broken = mg.Directions.from_tensor(torch.randn(3, 32))
    broken.data[1, 0, 3] = torch.nan
    for make, message in (
        (lambda: g.vlm_guard(broken, layers=[1], gate="sign"), "holds NaN or infinity"),
        (lambda: g.activation_addition(text, layers=[]), "has no layers"),
        (lambda: g.activation_addition(text, layers=[7]), "layer 7 has no states"),
        (lambda: g.tbop(text, blank, layers=[1], rank=99), "rank 99 does not exist"),
        (
            lambda: g.cmrm(
                text, mg.Activations.from_tensor(torch.randn(3, 2, 32), labels=[1, 0]), layers=[1]
            ),
            "not of the same prompts",
        ),
        (lambda: mg.Guard("nothing", (), None), "either a move or a template"),
        (lambda: mg.Guard("short", (0, 1), g.Realign(ssd.data[:1])), "has 2 layers, but move.basis has 1"),
        (lambda: g.Add(text.data[:, :1], coefficient="cubic"), "coefficient='cubic' is not known"),
        (lambda: g.self_reminder().randomised(), "no random control"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    outside = mg.Guard("outside", (9,), g.Realign(ssd.data[:1]))
    with pytest.raises(ValueError, match="has layers 0-2"), outside.attach(vlm):
        pass


def test_a_reading_of_the_picture_joins_the_text_that_supervises(vlm, text, anchors):
    ssd = mg.fit_directions(text)
    sent = anchors[:3].with_image("noise")
    question = "what is in the picture ?"
    guard = g.vlm_guard(ssd, layers=LAYERS, alpha=3.0, source="llm", gate="always", reads=question)
    read = mg.generate(
        vlm,
        [mg.Prompt("0", question, image="noise")]
        and mg.Prompts([mg.Prompt(p.id, question) for p in sent]).with_image("noise"),
        max_new_tokens=32,
        progress=False,
    )
    joined = mg.Prompts([mg.Prompt(p.id, f"{answer} {p.text}") for p, answer in zip(sent, read, strict=True)])
    states = mg.collect(vlm.llm, joined, progress=False).data
    guarded = mg.collect(vlm, sent, guard=guard, progress=False).data
    assert_close(
        torch.einsum("lpd,lrd->lpr", guarded, ssd.data)[0],
        3 * torch.einsum("lpd,lrd->lpr", states, ssd.data)[0],
        atol=1e-3,
        rtol=1e-3,
    )
    assert tiny.SPECIAL


def gated_at(guard, threshold):
    """The guard, open where a state lies farther along its direction than that."""
    return replace(
        guard, gate=replace(guard.gate, thresholds=torch.full_like(guard.gate.thresholds, threshold))
    )


@pytest.mark.parametrize("source", ["llm", "llm-stream"])
def test_rows_that_a_guard_leaves_alone_are_answered_without_it(vlm, text, anchors, monkeypatch, source):
    ssd = mg.fit_directions(text)
    sent = anchors.with_image("noise")
    guard = g.vlm_guard(ssd, layers=LAYERS, alpha=4.0, source=source)
    options = dict(max_new_tokens=NEW_TOKENS, batch_size=len(sent), progress=False)
    plain = mg.respond(vlm, sent, **options)
    steered, real = [], tracing._steered_responses

    def listen(model, batch, guards, teacher, settings, read, rows):
        steered.extend(batch[row].id for row in rows)
        return real(model, batch, guards, teacher, settings, read, rows)

    monkeypatch.setattr(tracing, "_steered_responses", listen)
    found = mg.respond(vlm, sent, guard=guard, **options)
    opened = [any(answer.gates.values()) for answer in found]
    assert 0 < sum(opened) < len(sent)
    assert sorted(steered) == sorted(p.id for p, is_open in zip(sent, opened, strict=True) if is_open)
    for without, answer, is_open in zip(plain, found, opened, strict=True):
        assert is_open or answer.ids == without.ids
    alone = [mg.respond(vlm, prompt, guard=guard, **options)[0] for prompt in sent]
    assert [answer.ids for answer in found] == [answer.ids for answer in alone]
    assert any(answer.ids != without.ids for answer, without in zip(found, plain, strict=True))


def test_answers_without_a_guard_are_written_once(vlm, text, anchors, monkeypatch):
    guards = [
        gated_at(g.vlm_guard(mg.fit_directions(text), layers=LAYERS, source="llm"), 1e6).renamed(name)
        for name in ("one", "two")
    ]
    written, real = [], tracing._plain_responses
    monkeypatch.setattr(tracing, "_plain_responses", lambda *a: written.append(len(a[1])) or real(*a))
    options = dict(conditions=["blank"], max_new_tokens=3, batch_size=4, progress=False)
    table = mg.gather_responses(vlm, anchors[:8], guards=[*guards, None], **options)
    assert written == [4, 4]
    assert table.groupby("id")["response"].nunique().max() == 1
    assert (table["seconds"] > 0).all()
    written.clear()
    mg.gather_responses(vlm, anchors[:8], guards=guards[:1], **options)
    assert written == [4, 4]


def test_extra_passes_are_counted(vlm, text, anchors):
    ssd = mg.fit_directions(text)
    sent = anchors[:3].with_image("noise")
    question = "what is in the picture ?"

    def passes(guard):
        return [(a.extra_passes, a.tokens) for a in mg.respond(vlm, sent, guard=guard, progress=False)]

    plain, once = passes(None), passes(g.vlm_guard(ssd, layers=LAYERS, source="llm"))
    assert {extra for extra, _ in plain} == {0}
    assert {extra for extra, _ in once} == {1}
    stream = g.vlm_guard(ssd, layers=LAYERS, gate="always")
    assert all(extra == tokens for extra, tokens in passes(stream))
    opened, closed = (gated_at(g.vlm_guard(ssd, layers=LAYERS), far) for far in (-1e6, 1e6))
    # One pass over the text tells whether a gate opens.
    assert all(extra == tokens + 1 for extra, tokens in passes(opened))
    assert {extra for extra, _ in passes(closed)} == {1}
    asked = mg.Prompts([mg.Prompt(p.id, question, image="noise") for p in sent])
    read = mg.respond(vlm, asked, max_new_tokens=32, progress=False)
    first = passes(g.vlm_guard(ssd, layers=LAYERS, source="llm", reads=question))
    assert [extra for extra, _ in first] == [1 + answer.tokens for answer in read]
