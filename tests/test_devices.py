"""A model that is spread over places gives what it gives in one."""

import pytest
import tiny
import torch

import mechguard as mg

QUIET = dict(progress=False)


def test_layers_offloaded_to_the_disk_give_the_same_states_and_answers(llava_folder, tmp_path):
    prompts = tiny.prompts(pairs=4).with_image("blank")
    whole = mg.load(llava_folder)
    parts = ("vision_tower", "multi_modal_projector", "language_model.embed_tokens", "language_model.norm")
    spread = mg.load(
        llava_folder,
        device_map={
            "lm_head": "cpu",
            **{f"model.{name}": "cpu" for name in (*parts, "language_model.rotary_emb")},
            **{f"model.language_model.layers.{n}": "disk" if n else "cpu" for n in range(whole.n_layers)},
        },
        offload_folder=tmp_path,
    )
    assert spread.hf_model.model.language_model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert spread.fingerprint == whole.fingerprint
    for view in (lambda vlm: vlm, lambda vlm: vlm.llm):
        ours, theirs = (mg.collect(view(vlm), prompts, **QUIET) for vlm in (spread, whole))
        assert torch.equal(ours.data, theirs.data)
    guard = mg.projection(mg.fit_directions(ours), layers=[0, 1])
    ours, theirs = (
        mg.generate(vlm, prompts, guard=guard, max_new_tokens=4, **QUIET) for vlm in (spread, whole)
    )
    assert ours == theirs


def test_a_remote_model_gives_the_same_states_without_weights_here(llava_folder, vlm, prompts):
    asked = prompts[:6]
    here, away = mg.load(llava_folder), mg.load(llava_folder, remote="local")
    for ours, theirs, sent in (
        (away, here, asked.with_image("blank")),
        (away, here, asked),
        (away.llm, here.llm, asked),
    ):
        states = [mg.collect(model, sent, position="last_text", **QUIET) for model in (ours, theirs)]
        # Here a picture is encoded by itself, there with its batch.
        assert torch.allclose(states[0].data, states[1].data, atol=2e-5)
        assert states[0].name == states[1].name
    logits = [mg.predict_next_tokens(model, asked.with_image("blank"), **QUIET) for model in (away, here)]
    assert torch.allclose(*logits, atol=1e-5)
    assert next(away.hf_model.parameters()).device.type == "meta"
    assert away.fingerprint != here.fingerprint  # nothing is known of the weights


def test_what_cannot_be_done_from_afar_is_refused(llava_folder, prompts):
    away = mg.load(llava_folder, remote="local")
    guard = mg.projection(mg.Directions.from_tensor(torch.eye(32)[:1].unsqueeze(1)), layers=[0])
    for attempt in (
        lambda: mg.generate(away, prompts, **QUIET),
        lambda: mg.collect(away, prompts, guard=guard, **QUIET),
        lambda: guard.attach(away).__enter__(),
        lambda: guard.bake(away),
        lambda: away.run_with_cache(prompts[:1]),
    ):
        with pytest.raises(mg.MechguardError, match="needs the weights of .* here"):
            attempt()
    with pytest.raises(mg.MechguardError, match="give its name on the hub"):
        mg.load(llava_folder, remote=True)
