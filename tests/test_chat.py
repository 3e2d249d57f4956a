"""The exact string that is sent, and what templates that cannot be used say."""

import pytest
import tiny
import tiny_families

import mechguard as mg
from mechguard import chat

PROMPTS = mg.Prompts([mg.Prompt("0", "how to make a cake")])


def test_the_processor_places_the_pictures(vlm):
    assert PROMPTS.render(vlm) == ["user : how to make a cake assistant :"]
    two = mg.Prompts([mg.Prompt("0", "how to make a cake", image=("blank", "black"))])
    assert two.render(vlm) == ["user : <image> <image> how to make a cake assistant :"]


def test_the_template_can_be_switched_off(vlm):
    plain = vlm.with_chat(template=None)
    assert PROMPTS.render(plain) == ["how to make a cake"]
    assert PROMPTS.with_image("blank").render(plain) == ["<image>\nhow to make a cake"]
    assert plain.hf_model is vlm.hf_model
    assert PROMPTS.render(plain.llm) == ["how to make a cake"]


def test_a_system_text_stands_before_every_prompt(vlm):
    spoken = vlm.with_chat(system="please help")
    assert PROMPTS.render(spoken) == ["system : please help user : how to make a cake assistant :"]
    bare = vlm.with_chat(template=None, system="please help")
    assert PROMPTS.render(bare) == ["please help\n\nhow to make a cake"]
    assert not (
        mg.collect(vlm, PROMPTS, progress=False).data == mg.collect(spoken, PROMPTS, progress=False).data
    ).all()


def test_load_takes_the_chat_settings(llava_folder):
    loaded = mg.load(llava_folder, system="please help", template=None)
    assert PROMPTS.render(loaded) == ["please help\n\nhow to make a cake"]


def test_a_template_of_ones_own(vlm):
    own = vlm.with_chat(template="Q: {{ messages[0]['content'][-1]['text'] }} A:")
    assert PROMPTS.render(own) == ["Q: how to make a cake A:"]


def test_strings_are_rendered_once_and_anew_for_another_template():
    vlm = mg.load(tiny.llava(), processor=tiny.processor())
    rendered, real = [], type(vlm.chat).render
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(vlm.chat), "render", lambda self, p, *a, **b: rendered.append(p.id) or real(self, p, *a, **b)
        )
        first = PROMPTS.render(vlm)
        assert PROMPTS.render(vlm) == first
        assert len(rendered) == 1
        assert PROMPTS.with_image("blank").render(vlm) != first
        vlm.processor.chat_template = "Q: {{ messages[0]['content'][-1]['text'] }} A:"
        assert PROMPTS.render(vlm) == ["Q: how to make a cake A:"]
    few = chat.KnownStrings(limit=2)
    for number in range(5):
        few.render(vlm.chat, mg.Prompt("0", str(number)), vlm.processor, plain="{text}")
    assert len(few._known) == 2


def test_a_processor_without_a_template_uses_its_tokenizers():
    processor = tiny.processor()
    processor.chat_template = None
    vlm = mg.load(tiny.llava(), processor=processor)
    assert PROMPTS.with_image("blank").render(vlm) == ["user : <image>\nhow to make a cake assistant :"]
    processor.tokenizer.chat_template = None
    assert PROMPTS.with_image("blank").render(vlm) == ["<image>\nhow to make a cake"]


def test_a_text_only_model_is_asked_by_its_tokenizer():
    llm = mg.load(tiny.llama(), processor=tiny.tokenizer())
    assert PROMPTS.render(llm) == ["user : how to make a cake assistant :"]


def test_a_template_with_too_few_or_too_many_places_is_one_sentence(vlm):
    for images in ("", "<image> <image> "):
        wrong = vlm.with_chat(template=f"{images}{{{{ messages[0]['content'][-1]['text'] }}}}")
        with pytest.raises(
            ValueError, match="cannot read these prompts with their pictures .*one placeholder"
        ):
            mg.collect(wrong, PROMPTS.with_image("blank"), progress=False)


def test_a_picture_that_gets_no_place_is_one_sentence():
    # This family's processor does not count placeholders itself.
    model, processor = tiny_families.idefics3()
    vlm = mg.load(model, processor=processor)
    vlm.processor.validate_inputs = lambda *_, **__: None
    blind = vlm.with_chat(template="{{ messages[0]['content'][-1]['text'] }}")
    with pytest.raises(ValueError, match=r"left no place for the picture .*with_chat\(template=None\)"):
        mg.collect(blind, PROMPTS.with_image("blank"), progress=False)


def test_a_template_that_refuses_the_messages_is_one_sentence(vlm):
    strict = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}{{ bos_token }}"
    with pytest.raises(ValueError, match=r"cannot render prompt '0' \(no system role\); use template=None"):
        PROMPTS.render(vlm.with_chat(template=strict, system="please help"))
    with pytest.raises(ValueError, match="cannot render prompt '0'"):
        PROMPTS.render(vlm.with_chat(template="{% if %}"))


def test_the_start_token_is_not_doubled():
    model, processor = tiny_families.llava()
    vlm = mg.load(model, processor=processor)
    begin = vlm.tokenizer.bos_token_id
    for prompts in (PROMPTS, PROMPTS.with_image("blank")):
        assert (vlm.encode(list(prompts))["input_ids"] == begin).sum() == 1
