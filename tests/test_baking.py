"""Baked guards, guards on the hub, and arithmetic on directions."""

import shutil
from pathlib import Path

import pytest
import tiny
import tiny_families
import torch
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

import mechguard as mg


@pytest.fixture
def own() -> mg.VLM:
    return mg.load(tiny.llava(), processor=tiny.processor())


@pytest.fixture
def ssd(own, prompts) -> mg.Directions:
    return mg.fit_directions(mg.collect(own.llm, prompts, progress=False), rank=1)


def reference_logits(vlm, basis, encoded):
    """The plain model with hooks after every write to the residual stream."""
    inner = vlm.hf_model.model
    layers = inner.language_model.layers
    writers = [inner.language_model.embed_tokens, inner.multi_modal_projector]
    writers += [module for layer in layers for module in (layer.self_attn, layer.mlp)]

    def erase(_, __, output):
        hidden = output[0] if isinstance(output, tuple) else output
        erased = hidden - (hidden @ basis.T) @ basis
        return (erased, *output[1:]) if isinstance(output, tuple) else erased

    handles = [module.register_forward_hook(erase) for module in writers]
    with torch.no_grad():
        logits = vlm.hf_model(**encoded).logits
    for handle in handles:
        handle.remove()
    return logits


def test_baked_weights_equal_hooks_after_every_write(own, ssd, prompts, tmp_path):
    guard = mg.ablation(ssd, layer=1)
    before = {name: value.clone() for name, value in own.hf_model.state_dict().items()}
    baked = guard.bake(own)
    for sent in (prompts[:4], prompts[:4].with_image("noise")):
        encoded = own.encode(list(sent))
        with torch.no_grad():
            logits = baked.hf_model(**encoded).logits
        assert_close(logits, reference_logits(own, guard.basis[0], encoded), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in own.hf_model.state_dict().items())
    plain = AutoModelForImageTextToText.from_pretrained(baked.save(tmp_path / "baked"))
    with torch.no_grad():
        assert_close(plain(**encoded).logits, logits, atol=1e-6, rtol=1e-6)
    assert mg.load(tmp_path / "baked").takes_images


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "llava_next", "gpt2", "internvl"])
def test_other_families_are_baked_too(family):
    model, processor = tiny_families.BUILDERS[family]()
    vlm = mg.load(model, processor=processor)
    direction = mg.Directions.from_tensor(torch.randn(1, 1, 32).repeat(vlm.n_layers, 1, 1))
    baked = mg.ablation(direction, layer=0).bake(vlm)
    _, cache = baked.run_with_cache(["how to make a cake"], names=lambda name: name.endswith("resid_post"))
    for state in cache.values():
        assert (state @ direction.at(0).T).abs().max() < 1e-4


def test_tied_embeddings_are_untied_and_saved(tmp_path):
    config = tiny.llama_config()
    config.tie_word_embeddings = True
    from transformers import LlamaForCausalLM

    llm = mg.load(LlamaForCausalLM(config), processor=tiny.tokenizer())
    head = llm.hf_model.lm_head.weight.detach().clone()
    direction = mg.Directions.from_tensor(torch.randn(1, 32).repeat(2, 1))
    baked = mg.ablation(direction, layer=0).bake(llm)
    loaded = mg.load(baked.save(tmp_path / "baked"))
    assert torch.equal(loaded.hf_model.lm_head.weight, head)
    assert not loaded.hf_model.config.tie_word_embeddings
    assert (loaded.hf_model.get_input_embeddings().weight @ direction.at(0).T).abs().max() < 1e-5


def test_what_cannot_be_baked_is_refused(own, ssd):
    for guard, message in (
        (mg.vlm_guard(ssd, layers=[0, 1, 2]), "is no ungated projection"),
        (mg.projection(ssd, layers=[0, 1, 2]), "does not project the same subspace at every layer"),
        (mg.projection(ssd, layers=[1]), "does not project the same subspace at every layer"),
    ):
        with pytest.raises(ValueError, match=message):
            guard.bake(own)


def test_a_family_that_normalises_what_it_writes_is_refused():
    model, processor = tiny_families.gemma3()
    vlm = mg.load(model, processor=processor)
    direction = mg.Directions.from_tensor(torch.randn(1, 32).repeat(3, 1))
    with pytest.raises(ValueError, match="goes through no matrix of its own"):
        mg.ablation(direction, layer=0).bake(vlm)


def test_a_model_in_which_something_else_writes_is_refused(own, ssd, monkeypatch):
    from mechguard.guards import baking

    plain = baking._writers
    monkeypatch.setattr(baking, "_writers", lambda model: list(plain(model))[:-1])  # the projector forgotten
    with pytest.raises(ValueError, match="cannot be baked: .* still lies along"):
        mg.ablation(ssd, layer=1).bake(own)


# ---------------------------------------------------------------------------------- the hub


def test_a_guard_goes_to_the_hub_and_comes_back(own, ssd, tmp_path, monkeypatch):
    import huggingface_hub

    class StandIn:
        def create_repo(self, repo, exist_ok, **options):
            assert options == {"private": True}
            return f"https://hub/{repo}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", StandIn)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, name, revision: str(tmp_path / repo / name)
    )
    guard = mg.vlm_guard(ssd, layers=[1, 2])
    assert guard.push_to_hub("me/guard", private=True) == "https://hub/me/guard"
    assert sorted(path.name for path in Path(tmp_path / "me/guard").iterdir()) == [
        *("README.md", "guard.json", "guard.safetensors"),
    ]
    assert repr(mg.Guard.from_hub("me/guard")) == repr(guard)
    broken = tmp_path / "me/guard/guard.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="checksum differs"):
        mg.Guard.from_hub("me/guard")


# ------------------------------------------------------------------------------- arithmetic


def test_directions_combine_layer_by_layer():
    draw = torch.Generator().manual_seed(0)
    a = mg.Directions.from_tensor(torch.randn(3, 2, 16, generator=draw))
    b = mg.Directions.from_tensor(torch.randn(3, 1, 16, generator=draw))
    both = a | b
    assert both.rank == 3
    assert_close(both.data[:, :2], a.data)
    assert_close(both.data @ both.data.mT, torch.eye(3).expand(3, 3, 3), atol=1e-5, rtol=0)
    projected = torch.einsum("lrd,lkd,lke->lre", b.data, both.data, both.data)
    assert_close(projected, b.data, atol=1e-5, rtol=1e-4)
    rest = a - b
    assert_close(rest.data @ b.data.mT, torch.zeros(3, 2, 1), atol=1e-5, rtol=0)
    assert_close((-a).data, -a.data)
    with pytest.raises(ValueError, match="nothing is left"):
        b - both
    with pytest.raises(ValueError, match="do not combine"):
        a | mg.Directions.from_tensor(torch.randn(3, 8))
    with pytest.raises(ValueError, match="layer 2 has no direction"):
        a | mg.Directions.from_tensor(torch.randn(2, 16))
