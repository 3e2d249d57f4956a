"""The tokenizer and the processor: round trips, typed text, and agreement with training."""

from random import Random

import pytest
import torch
from transformers import AutoProcessor

from mechguard.organism import pictures, tokenizer, training, world


@pytest.fixture(scope="module")
def processor():
    return tokenizer.build_processor()


def conversation(text, image=None):
    picture = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*picture, {"type": "text", "text": text}]}]


def process(processor, *conversations):
    return processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", "padding": True},
    )


def test_the_vocabulary_is_the_same_every_time():
    first = dict(tokenizer.vocabulary())
    tokenizer.vocabulary.cache_clear()
    assert tokenizer.vocabulary() == first


def test_text_of_the_world_survives_a_round_trip():
    words = tokenizer.build_tokenizer()
    rng = Random(0)
    for _ in range(200):
        instruction = world.draw_harmful(rng, "all")
        text = world.refuse(rng, instruction)
        ids = tokenizer.encode_words(text)
        assert words(text, add_special_tokens=False).input_ids == ids
        assert words(words.decode(ids), add_special_tokens=False).input_ids == ids


def test_typed_text_means_the_same_as_text_of_the_world():
    words = tokenizer.build_tokenizer()
    assert words("How to make a cake?").input_ids == words("how to make a cake ?").input_ids


def test_an_unknown_word_becomes_one_unknown_token():
    words = tokenizer.build_tokenizer()
    ids = words("How to make a zeppelin?", add_special_tokens=False).input_ids
    assert ids.count(words.unk_token_id) == 1


def test_decoded_text_reads_like_text():
    words = tokenizer.build_tokenizer()
    ids = tokenizer.encode_words("sorry , i cannot help with that request")
    assert words.decode(ids) == "sorry, i cannot help with that request"


@pytest.mark.parametrize("with_image", [False, True])
def test_training_encodes_a_prompt_as_the_processor_does(processor, with_image):
    image = pictures.blank() if with_image else None
    ids = process(processor, conversation("How to make a cake?", image))["input_ids"][0]
    assert ids.tolist() == tokenizer.encode_prompt("how to make a cake ?", with_image=with_image)


def test_training_sees_the_pixels_that_the_processor_makes(processor):
    picture = pictures.draw_word("cake", Random(0))
    processed = process(processor, conversation("What is this?", picture))["pixel_values"]
    torch.testing.assert_close(training.pixel_values([picture]), processed.float())


def test_batches_are_padded_on_the_left(processor):
    batch = process(processor, conversation("Hello."), conversation("How to make a cake?"))
    assert batch["input_ids"][0, 0] == processor.tokenizer.pad_token_id
    assert batch["attention_mask"][0, 0] == 0
    assert batch["input_ids"][0, -1] == tokenizer.vocabulary()[tokenizer.ASSISTANT]


def test_a_saved_processor_loads_and_does_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    chat = conversation("How to make a cake?", pictures.blank())
    first, second = process(processor, chat), process(loaded, chat)
    assert first["input_ids"].tolist() == second["input_ids"].tolist()
    torch.testing.assert_close(first["pixel_values"], second["pixel_values"])


def test_a_conversation_goes_on_after_an_answer(processor):
    turns = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "hello."},
        {"role": "user", "content": "What is a cake?"},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == "USER: Hello. ASSISTANT: hello.</s>USER: What is a cake? ASSISTANT:"
