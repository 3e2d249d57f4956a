"""Models: parts are found, the LLM component shares its weights, mistakes are one sentence."""

import pytest
import tiny
import torch

import mechguard as mg


def test_the_parts_of_a_llava_are_found(vlm):
    parts = vlm.parts
    assert (vlm.family, vlm.n_layers, vlm.d_model) == ("llava", 3, 32)
    assert parts.layers == "model.language_model.layers"
    assert parts.vision == "model.vision_tower"
    assert parts.projector == "model.multi_modal_projector"
    assert parts.image_token_id == tiny.SPECIAL.index("<image>")


def test_the_llm_component_shares_every_weight(vlm):
    own = {p.data_ptr() for p in vlm.hf_model.parameters()}
    assert all(p.data_ptr() in own for p in vlm.llm.hf_model.parameters())
    assert not any(p.is_meta for p in vlm.llm.hf_model.parameters())
    assert vlm.llm.fingerprint == vlm.fingerprint
    assert vlm.llm.llm is vlm.llm


def test_a_folder_on_disk_gives_the_same_states_as_the_model_in_memory(vlm, llava_folder, prompts):
    loaded = mg.load(llava_folder)
    sent = prompts[:3].with_image("blank")
    expected = mg.collect(vlm, sent, progress=False).data
    assert torch.allclose(mg.collect(loaded, sent, progress=False).data, expected, atol=1e-5)
    assert loaded.folder == llava_folder


def test_every_picture_token_stands_in_the_prompt(vlm, prompts):
    encoded = vlm.encode(prompts[:2].with_image("blank"))
    count = (encoded["input_ids"] == vlm.parts.image_token_id).sum(-1)
    assert count.tolist() == [5, 5]  # four patches and the class token


def test_a_tokenizer_that_pads_on_the_right_is_turned_to_the_left(prompts):
    processor = tiny.processor()
    processor.tokenizer.padding_side = "right"
    encoded = mg.load(tiny.llava(), processor=processor).encode(list(prompts))
    assert (encoded["attention_mask"][:, -1] == 1).all()
    assert (encoded["attention_mask"][:, 0] == 0).any()


def test_the_string_that_is_sent_can_be_seen(vlm, prompts):
    text, picture = vlm.render([prompts[0], prompts[:1].with_image("blank")[0]])
    assert text == f"user : {prompts[0].text} assistant :"
    assert picture == f"user : <image> {prompts[0].text} assistant :"


def test_another_model_has_another_fingerprint(vlm):
    other = mg.load(tiny.llava(seed=1), processor=tiny.processor())
    assert other.fingerprint != vlm.fingerprint
    assert not vlm.recognises(other.fingerprint)


def test_a_text_only_model_is_its_own_llm_and_refuses_pictures(prompts):
    llm = mg.load(tiny.llama(), processor=tiny.tokenizer())
    assert llm.llm is llm
    assert not llm.takes_images
    assert mg.collect(llm, prompts[:2], progress=False).data.shape == (2, 2, 32)
    with pytest.raises(ValueError, match="reads text only"):
        mg.collect(llm, prompts.with_image("blank"), progress=False)


def test_an_unknown_name_is_one_sentence():
    with pytest.raises(ValueError, match=r'neither "organism" nor a folder .* check the name'):
        mg.load("nobody/no-such-model")


def test_a_folder_without_a_processor_says_what_to_save(tmp_path):
    folder = tiny.save_llava(tmp_path / "bare", with_processor=False)
    with pytest.raises(ValueError, match="no readable processor .*save_pretrained"):
        mg.load(folder)


def test_truncated_weights_are_one_sentence(tmp_path):
    folder = tiny.save_llava(tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ValueError, match="the weights of .* cannot be read"):
        mg.load(folder)


def test_a_model_in_memory_needs_its_processor():
    with pytest.raises(ValueError, match="needs its processor"):
        mg.load(tiny.llava())


def test_an_organism_that_is_not_shipped_is_refused():
    with pytest.raises(ValueError, match="does not come with the package"):
        mg.load("organism:987")
    with pytest.raises(ValueError, match="write organism, or organism:SEED"):
        mg.load("organism:one")


def test_a_model_without_an_aligned_llm_says_so(vlm):
    with pytest.raises(ValueError, match="ships no aligned LLM"):
        _ = vlm.aligned_llm
