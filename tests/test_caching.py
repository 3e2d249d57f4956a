"""run_with_cache: TransformerLens's names, plain hidden states."""

import pytest
import tiny
import torch

import mechguard as mg


@pytest.fixture(scope="module")
def sent(prompts):
    return prompts[:3].with_image("blank")


@pytest.fixture(scope="module")
def cached(vlm, sent):
    return vlm.run_with_cache(sent)


def test_every_name_that_is_listed_is_there(vlm, cached):
    _, cache = cached
    assert list(cache) == vlm.hook_names()
    assert {"hook_embed", "blocks.2.hook_attn_out", "ln_final", "vision.blocks.1.hook_resid_post"} <= set(
        cache
    )


def test_the_states_are_those_of_plain_transformers(vlm, sent, cached):
    logits, cache = cached
    with torch.no_grad():
        plain = vlm.hf_model(**vlm.encode(list(sent)), output_hidden_states=True)
    assert torch.allclose(logits, plain.logits, atol=1e-5)
    assert torch.allclose(cache["hook_embed"], plain.hidden_states[0], atol=1e-6)
    assert torch.allclose(cache["resid_post", 0], plain.hidden_states[1], atol=1e-5)
    assert torch.allclose(cache["resid_pre", 1], plain.hidden_states[1], atol=1e-5)
    assert torch.allclose(cache["ln_final"], plain.hidden_states[-1], atol=1e-5)
    vision = vlm.hf_model.model.vision_tower(
        vlm.encode(list(sent))["pixel_values"], output_hidden_states=True
    )
    assert torch.allclose(cache["vision.blocks.1.hook_resid_post"], vision.hidden_states[-1], atol=1e-5)
    projected = cache["projector.hook_out"].reshape(-1, 32)
    assert torch.allclose(cache["hook_embed"][cache.is_image], projected, atol=1e-6)


def test_a_stack_holds_every_layer(vlm, cached):
    _, cache = cached
    stack = cache.stack_activation("resid_post")
    assert stack.shape == (3, *cache.tokens.shape, 32)
    assert torch.equal(stack[1], cache["blocks.1.hook_resid_post"])
    with pytest.raises(KeyError, match="no layer has a state 'hook_z'"):
        cache.stack_activation("hook_z")


def test_names_choose_what_is_read(vlm, sent):
    _, cache = vlm.run_with_cache(sent, names="blocks.1.hook_resid_post")
    assert list(cache) == ["blocks.1.hook_resid_post"]
    _, cache = vlm.run_with_cache(sent, names=lambda name: name.endswith("mlp_out"))
    assert list(cache) == [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]
    _, cache = vlm.run_with_cache(sent, names=[("resid_post", 2), "embed"])
    assert list(cache) == ["hook_embed", "blocks.2.hook_resid_post"]


def test_text_alone_has_no_vision_states(vlm, prompts):
    _, cache = vlm.run_with_cache(prompts[:2])
    assert not [name for name in cache if name.startswith(("vision", "projector"))]
    assert not cache.is_image.any()
    _, alone = vlm.llm.run_with_cache(prompts[:2].with_image("blank"))
    assert torch.allclose(alone["resid_post", 2], cache["resid_post", 2], atol=1e-5)


def test_padding_is_marked(vlm, prompts):
    _, cache = vlm.run_with_cache([prompts[0], prompts[9]])
    assert cache.present.sum(-1).tolist() == [9, 10]


def test_an_unknown_name_is_one_sentence(vlm, sent, prompts, cached):
    with pytest.raises(ValueError, match=r"there is no state 'blocks\.9\.hook_resid_post' here"):
        vlm.run_with_cache(sent, names=[("resid_post", 9)])
    with pytest.raises(ValueError, match="need a picture"):
        vlm.run_with_cache(prompts[:1], names="vision.blocks.0.hook_resid_post")
    with pytest.raises(ValueError, match="no state was asked for"):
        vlm.run_with_cache(sent, names=lambda name: False)
    with pytest.raises(KeyError, match="it holds hook_embed"):
        vlm.run_with_cache(sent, names="embed")[1]["resid_post", 0]


def test_the_tree_shows_what_there_is(vlm, cached):
    tree = vlm.tree()
    assert "blocks.0..2.hook_resid_post" in tree
    assert "ln_final" in vlm._repr_html_()
    assert "hook_embed" in cached[1]._repr_html_()


def test_traced_is_the_plain_nnsight_model(vlm, sent):
    encoded = vlm.encode(list(sent))
    with torch.no_grad(), vlm.traced.trace(**encoded):
        state = vlm.traced.model.language_model.layers[1].output.save()
    assert torch.allclose(state, vlm.run_with_cache(sent)[1]["resid_post", 1], atol=1e-6)


def test_absolute_positions_start_behind_the_padding():
    import tiny_families

    model, words = tiny_families.gpt2()
    llm = mg.load(model, processor=words)
    short, long = tiny.prompts(pairs=3)[0], tiny.prompts(pairs=3)[2]
    _, together = llm.run_with_cache([short, long])
    _, alone = llm.run_with_cache([short])
    assert torch.allclose(together["resid_post", 2][0, -1], alone["resid_post", 2][0, -1], atol=1e-5)
