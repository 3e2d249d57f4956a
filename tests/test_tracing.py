"""Traces: equal to plain transformers, equal for a batch and a row, and steered as the guard says."""

import contextlib
import gc

import pytest
import tiny
import torch
from torch.testing import assert_close

import mechguard as mg
from mechguard.interventions import project_out

CLOSE = dict(atol=2e-5, rtol=1e-5)
SOURCES = ["own", "last", "llm", "llm-stream"]


def quiet(model: mg.VLM, prompts: mg.Prompts, **options: object) -> mg.Activations:
    return mg.collect(model, prompts, progress=False, **options)


@contextlib.contextmanager
def hooked(model: mg.VLM, layers, hook):
    """Ordinary forward hooks that are called with the layer's number and its output."""
    modules = model.hf_model.get_submodule(model.parts.layers)
    handles = [
        modules[i].register_forward_hook(lambda _module, _input, out, i=i: hook(i, out)) for i in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_states(model: mg.VLM, prompt: mg.Prompt) -> torch.Tensor:
    """The last-token output of every decoder layer, by ordinary forward hooks: [layer, d_model]."""
    found = []
    with torch.no_grad(), hooked(model, range(model.n_layers), lambda _, out: found.append(out[0, -1])):
        model.hf_model(**model.encode([prompt]))
    return torch.stack(found)


@pytest.fixture(scope="module")
def ssd(vlm, prompts) -> mg.Directions:
    return mg.fit_directions(quiet(vlm.llm, prompts), rank=2)


@pytest.mark.parametrize("condition", ["none", "blank", "noise"])
def test_traced_states_equal_plain_hugging_face_hidden_states(vlm, prompts, condition):
    sent = prompts[:3].with_image(condition)
    traced = quiet(vlm, sent, batch_size=1).data
    expected = torch.stack([plain_states(vlm, prompt) for prompt in sent], dim=1)
    assert_close(traced, expected, **CLOSE)


@pytest.mark.parametrize("guarded", [False, True])
def test_a_stopped_trace_leaves_no_hidden_states_for_the_garbage_collector(vlm, prompts, ssd, guarded):
    guard = mg.projection(ssd, layers=[1]) if guarded else None
    quiet(vlm, prompts[:2], guard=guard)
    gc.collect()
    gc.disable()
    try:
        quiet(vlm, prompts[:2], guard=guard)
        tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
        wide = [one for one in tensors if one.ndim == 3 and one.shape[0] == 2 and one.shape[2] == vlm.d_model]
        assert not wide, [tuple(one.shape) for one in wide]
    finally:
        gc.enable()


def test_states_are_those_before_the_final_norm(vlm, prompts):
    with torch.no_grad():
        out = vlm.hf_model(**vlm.encode(prompts[:1]), output_hidden_states=True)
    traced = quiet(vlm, prompts[:1]).data[:, 0]
    assert_close(traced[:-1], torch.stack([h[0, -1] for h in out.hidden_states[1:-1]]), **CLOSE)
    norm = vlm.hf_model.get_submodule(vlm.parts.norm)
    assert_close(norm(traced[-1]), out.hidden_states[-1][0, -1], **CLOSE)


def test_text_looks_the_same_to_the_vlm_and_to_its_llm(vlm, prompts):
    assert_close(quiet(vlm, prompts).data, quiet(vlm.llm, prompts).data, **CLOSE)


def test_the_llm_component_reads_the_text_only(vlm, prompts):
    with_picture = quiet(vlm.llm, prompts.with_image("blank"))
    assert torch.equal(with_picture.data, quiet(vlm.llm, prompts).data)
    assert with_picture.condition == "text"


@pytest.mark.parametrize("condition", ["none", "blank"])
def test_a_left_padded_batch_gives_each_row_what_it_gets_alone(vlm, prompts, condition):
    sent = prompts.with_image(condition)
    assert_close(quiet(vlm, sent).data, quiet(vlm, sent, batch_size=1).data, **CLOSE)


def test_rows_come_back_in_their_own_order(vlm, prompts):
    forward = quiet(vlm, prompts)
    backward = quiet(vlm, mg.Prompts(reversed(prompts)))
    assert_close(forward.data, backward.data.flip(1), **CLOSE)
    assert [p.id for p in forward.prompts] == [p.id for p in prompts]


def test_rows_with_and_without_a_picture_share_a_batch(vlm, prompts):
    mixed = prompts[:3].with_image("blank") + prompts[3:6]
    apart = torch.cat([quiet(vlm, mixed[:3]).data, quiet(vlm, mixed[3:]).data], dim=1)
    assert_close(quiet(vlm, mixed, batch_size=6).data, apart, **CLOSE)
    one_batch = vlm.encode(list(mixed))
    assert one_batch["input_ids"].shape[0] == 6


def test_a_picture_changes_the_states(vlm, prompts):
    text, blank, black = (quiet(vlm, prompts.with_image(c)).data for c in ("none", "blank", "black"))
    assert (text - blank).abs().max() > 0.1
    assert (black - blank).abs().max() > 1e-3


def test_some_layers_and_another_position(vlm, prompts):
    everything = quiet(vlm, prompts[:2], batch_size=1)
    some = quiet(vlm, prompts[:2], layers=[-1, 0], batch_size=1)
    assert some.layers == [0, 2]
    assert_close(some.data, everything.data[[0, 2]], **CLOSE)
    second_last = quiet(vlm, prompts[:2], position=-2, batch_size=1)
    assert not torch.allclose(second_last.data, everything.data, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layers=[3]), "layer 3 is outside .* layers 0-2; use -1 for the last"),
        (dict(layers=[]), "no layers were asked for"),
        (dict(position="middle"), "position 'middle' is not known"),
        (dict(position=-99), "position -99 lies outside prompt"),
        (dict(position="image"), "has no position 'image'"),
        (dict(batch_size=0), "batch_size=0 is not a size"),
    ],
)
def test_what_cannot_be_collected_is_refused(vlm, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        quiet(vlm, prompts[:2], **options)


def test_plain_texts_serve_as_prompts(vlm, prompts):
    texts = [prompt.text for prompt in prompts[:3]]
    assert torch.equal(quiet(vlm, texts).data, quiet(vlm, prompts[:3]).data)
    one, same = (mg.generate(vlm, given, max_new_tokens=4, progress=False) for given in (texts[0], texts[:1]))
    assert one == same


def test_no_prompts_are_refused(vlm):
    with pytest.raises(ValueError, match="there are no prompts"):
        quiet(vlm, mg.Prompts([]))


def test_the_batch_is_halved_when_memory_runs_out(vlm, prompts, monkeypatch):
    import mechguard.tracing as tracing

    real, sizes = tracing._trace_states, []

    def small_memory(model, batch, *rest):
        sizes.append(len(batch))
        if len(batch) > 6:
            raise torch.OutOfMemoryError
        return real(model, batch, *rest)

    monkeypatch.setattr(tracing, "_trace_states", small_memory)
    with pytest.warns(UserWarning, match="batches of 6 "):
        found = quiet(vlm, prompts)
    monkeypatch.undo()
    assert_close(found.data, quiet(vlm, prompts).data, **CLOSE)
    assert max(sizes[-2:]) <= 6


def test_a_guard_acts_in_the_pass_that_is_read(vlm, prompts, ssd):
    guard = mg.projection(ssd, layers=[2])
    guarded = quiet(vlm, prompts.with_image("blank"), guard=guard)
    plain = quiet(vlm, prompts.with_image("blank"))
    assert_close(guarded.data[:2], plain.data[:2], **CLOSE)
    assert_close(guarded.data[2], project_out(plain.data[2], ssd.at(2)), atol=1e-4, rtol=1e-4)


def test_the_llm_supervises_row_by_row(vlm, prompts, ssd):
    """Reading B: after projection and realignment the VLM has its LLM's component along the SSD."""
    guard = mg.vlm_guard(ssd, layers=[1], gate="always", source="llm")
    guarded = quiet(vlm, prompts.with_image("blank"), guard=guard).at(1)
    text = quiet(vlm.llm, prompts).at(1)
    assert_close(guarded @ ssd.at(1).T, text @ ssd.at(1).T, atol=1e-4, rtol=1e-4)


def test_collecting_the_teacher_first_and_in_the_same_pass_agree(vlm, prompts, ssd):
    sent = prompts.with_image("blank")
    first = mg.vlm_guard(ssd, layers=[0, 2], source="llm")
    same = mg.vlm_guard(ssd, layers=[0, 2], source="llm-stream")
    assert_close(quiet(vlm, sent, guard=first).data, quiet(vlm, sent, guard=same).data, atol=1e-4, rtol=1e-4)


def test_guarded_generation_equals_a_hook_reference(vlm, prompts, ssd):
    sent = prompts.with_image("blank")
    guard = mg.projection(ssd, layers=[0, 1, 2])
    traced = mg.generate(vlm, sent, guard=guard, max_new_tokens=8, progress=False)
    with hooked(vlm, [0, 1, 2], lambda layer, out: project_out(out, ssd.at(layer))):
        reference = mg.generate(vlm, sent, max_new_tokens=8, progress=False)
    assert traced == reference
    assert traced != mg.generate(vlm, sent, max_new_tokens=8, progress=False)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("phase", ["prompt", "both"])
def test_a_guarded_batch_gives_each_row_what_it_gets_alone(vlm, prompts, ssd, source, phase):
    sent = prompts[:6].with_image("blank")
    scope = mg.Scope("last", phase)
    guard = mg.vlm_guard(ssd, layers=[0, 2], source=source, alpha=3.0, scope=scope)
    settings = dict(guard=guard, max_new_tokens=6, progress=False)
    together = mg.respond(vlm, sent, **settings)
    alone = mg.respond(vlm, sent, batch_size=1, **settings)
    assert [r.text for r in together] == [r.text for r in alone]
    assert [r.gates for r in together] == [r.gates for r in alone]
    assert {layer for r in together for layer in r.gates} == {0, 2}


SILENT = list(range(len(tiny.SPECIAL)))  # a random model would write <image> and </s>


def reference_stream(model: mg.VLM, prompt: mg.Prompt, guard: mg.Guard, steps: int) -> list[int]:
    """Greedy decoding of one prompt without a cache: at every step the LLM reads the query and the tokens
    so far, and its states replace the VLM's component along the SSD from the end of the prompt on."""
    picture = model.encode([prompt])
    text = model.encode(list(mg.Prompts([prompt]).with_image("none")))["input_ids"]
    image_end, text_end = picture["input_ids"].shape[1] - 1, text.shape[1] - 1
    tokens: list[int] = []
    for _ in range(steps):
        new = torch.tensor([tokens], dtype=torch.long)
        spoken: dict[int, torch.Tensor] = {}

        def listen(layer, out, spoken=spoken):
            spoken[layer] = out[:, text_end:]

        def steer(layer, out, spoken=spoken):
            tail = out[:, image_end:]
            everywhere = torch.ones(tail.shape[:2], dtype=torch.bool)
            return torch.cat([out[:, :image_end], guard.steer(layer, tail, spoken[layer], everywhere)], 1)

        with torch.no_grad(), hooked(model, guard.layers, listen):
            model.llm.hf_model(torch.cat([text, new], 1))
        ids = torch.cat([picture["input_ids"], new], 1)
        with torch.no_grad(), hooked(model, guard.layers, steer):
            logits = model.hf_model(input_ids=ids, pixel_values=picture["pixel_values"]).logits[0, -1]
        logits[SILENT] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens


def test_the_streaming_teacher_equals_a_reference_without_cache_or_batch(vlm, prompts, ssd):
    sent = prompts[:4].with_image("blank")
    guard = mg.vlm_guard(ssd, layers=[0, 1, 2], gate="always", source="llm-stream", alpha=2.0)
    settings = dict(guard=guard, max_new_tokens=6, suppress_tokens=SILENT, progress=False)
    traced = mg.generate(vlm, sent, **settings)
    expected = [vlm.decode(torch.tensor([reference_stream(vlm, prompt, guard, 6)]))[0] for prompt in sent]
    assert traced == expected


def test_rows_whose_gate_is_closed_answer_as_if_unguarded(vlm, prompts, ssd):
    sent = prompts.with_image("blank")
    guard = mg.vlm_guard(ssd, layers=[1], source="llm", alpha=8.0, gate="midpoint")
    guarded = mg.respond(vlm, sent, guard=guard, max_new_tokens=6, progress=False)
    plain = mg.respond(vlm, sent, max_new_tokens=6, progress=False)
    closed = [i for i, response in enumerate(guarded) if not response.gates[1]]
    assert 0 < len(closed) < len(sent)
    assert [guarded[i].text for i in closed] == [plain[i].text for i in closed]


def test_the_prompt_phase_alone_differs_from_every_token(vlm, prompts, ssd):
    sent = prompts.with_image("blank")
    answers = [
        mg.generate(
            vlm,
            sent,
            guard=mg.vlm_guard(ssd, layers=[2], alpha=9.0, gate="always", scope=mg.Scope("last", phase)),
            max_new_tokens=8,
            progress=False,
        )
        for phase in ("prompt", "generated", "both")
    ]
    assert answers[0] != answers[2]
    assert answers[1] != answers[2]


def test_a_guard_on_the_image_leaves_text_prompts_alone(vlm, prompts, ssd):
    guard = mg.vlm_guard(ssd, layers=[0], gate="always", alpha=5.0, scope=mg.Scope("image", "prompt"))
    assert_close(quiet(vlm, prompts, guard=guard).data, quiet(vlm, prompts).data, **CLOSE)
    blank = prompts.with_image("blank")
    assert (quiet(vlm, blank, guard=guard).data - quiet(vlm, blank).data).abs().max() > 1e-3


def test_nothing_stays_attached_after_an_error(vlm, prompts, ssd, monkeypatch):
    sent = prompts[:4].with_image("blank")
    before = mg.generate(vlm, sent, max_new_tokens=4, progress=False)

    def fail(*_: object) -> None:
        raise RuntimeError("broken on purpose")

    with monkeypatch.context() as patch, pytest.raises(Exception, match="broken on purpose"):
        patch.setattr(mg.Guard, "steer", fail)
        mg.generate(vlm, sent, guard=mg.projection(ssd, layers=[0]), max_new_tokens=4, progress=False)
    assert mg.generate(vlm, sent, max_new_tokens=4, progress=False) == before


def test_a_streaming_teacher_must_be_the_models_own(vlm, prompts, ssd):
    guard = mg.vlm_guard(ssd, layers=[0], source="llm-stream")
    with pytest.raises(ValueError, match='use source="llm" with another teacher'):
        mg.generate(vlm, prompts[:2], guard=guard, teacher=vlm, progress=False)


def test_a_teacher_of_another_shape_is_refused(vlm, prompts):
    ssd = mg.fit_directions(mg.collect(vlm.llm, prompts, progress=False))
    guard = mg.vlm_guard(ssd, layers=[2], source="llm")
    teacher = mg.load(tiny.llama(), processor=tiny.tokenizer())  # two layers
    with pytest.raises(ValueError, match=r"has 2 layers of d_model 32, but the guard wants layers \[2\]"):
        mg.generate(vlm, prompts[:2], guard=guard, teacher=teacher, progress=False)
