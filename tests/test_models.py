"""Models: parts are found, the LLM component shares its weights, mistakes are one sentence."""

import pytest
import tiny
import torch
from PIL import Image
from transformers import LlamaForCausalLM

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
    assert type(vlm.llm.hf_model) is LlamaForCausalLM


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
    with pytest.raises(ValueError, match="write organism, organism:1"):
        mg.load("organism:one")


def test_a_model_without_an_aligned_llm_says_so(vlm):
    with pytest.raises(ValueError, match="ships no aligned LLM"):
        _ = vlm.aligned_llm


def test_a_tokenizer_without_a_pad_token_pads_with_the_end():
    words = tiny.tokenizer()
    words.pad_token = None
    llm = mg.load(tiny.llama(), processor=words)
    assert llm.tokenizer.pad_token == "</s>"
    words.pad_token = words.eos_token = None
    with pytest.raises(ValueError, match="neither a pad token nor an end token"):
        mg.load(tiny.llama(), processor=words)


def test_pictures_of_every_kind_are_read(vlm, tmp_path):
    kinds = {
        "large.png": Image.new("RGB", (5000, 4000), (255, 0, 0)),
        "alpha.png": Image.new("RGBA", (40, 30), (255, 0, 0, 128)),
        "grey.png": Image.new("L", (40, 30), 128),
        "palette.gif": Image.new("P", (40, 30), 3),
        "flat.png": Image.new("RGB", (300, 2), (0, 255, 0)),
    }
    for name, picture in kinds.items():
        picture.save(tmp_path / name)
        for image in (tmp_path / name, picture):
            sent = mg.Prompts([mg.Prompt("0", "what is in the picture", image=image)])
            assert mg.collect(vlm, sent, progress=False).data.isfinite().all(), name


def test_a_broken_picture_is_named(vlm, tmp_path):
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    broken = tmp_path / "broken.png"
    broken.write_bytes(whole.read_bytes()[:500])
    for path, message in (
        (broken, "broken.png cannot be read as a picture"),
        (tmp_path / "no.png", "no picture"),
    ):
        with pytest.raises(ValueError, match=message):
            mg.collect(vlm, [mg.Prompt("0", "what is this", image=path)], progress=False)


def test_an_architecture_that_transformers_does_not_know_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "telepathy"}')
    with pytest.raises(ValueError, match="the configuration of .* cannot be read .* architecture that the"):
        mg.load(tmp_path)


def test_options_reach_from_pretrained(llava_folder, monkeypatch):
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    seen = {}

    def pretend(source, **options):
        seen.update(options)
        return tiny.llava()

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", pretend)
    quantised = BitsAndBytesConfig(load_in_4bit=True)
    mg.load(llava_folder, quantization_config=quantised, device_map="auto", dtype=torch.bfloat16)
    assert seen["quantization_config"] is quantised
    assert (seen["device_map"], seen["dtype"]) == ("auto", torch.bfloat16)
    assert not seen.get("trust_remote_code")


def test_a_device_map_gives_the_same_states(llava_folder, prompts):
    sent = prompts[:3].with_image("blank")
    expected = mg.collect(mg.load(llava_folder), sent, progress=False).data
    placed = mg.load(llava_folder, device_map="auto")
    assert torch.equal(mg.collect(placed, sent, progress=False).data, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_analysed_in_float32(llava_folder, prompts, dtype):
    half, full = mg.load(llava_folder, dtype=dtype), mg.load(llava_folder)
    assert half.hf_model.dtype == dtype
    sent = prompts.with_image("blank")
    states = mg.collect(half, sent, progress=False)
    assert states.data.dtype == torch.float32
    wanted = mg.collect(full, sent, progress=False).data
    assert (states.data - wanted).abs().max() < 0.05 * wanted.abs().max()
    guard = mg.vlm_guard(mg.fit_directions(mg.collect(half.llm, prompts, progress=False)), layers=[1, 2])
    assert len(mg.generate(half, sent, guard=guard, max_new_tokens=3, progress=False)) == len(sent)
