"""The shipped prompt files: what the world generates, matched in pairs, and without leakage."""

import json

import numpy as np
import pytest
from PIL import Image

from mechguard.organism import prompt_files, tokenizer, world

TABLES = prompt_files.build_tables()
SPLIT_OF = {
    "anchors": "train",
    "validation": "validation",
    "malicious": "test",
    "benign": "test",
    "jailbreak": "test",
    "padding": "test",
}
SIZES = {
    "anchors": 200,
    "validation": 200,
    "malicious": 150,
    "benign": 150,
    "jailbreak": 100,
    "padding": 150,
    "typographic": 300,
    "questions": 169,
}


def read(name):
    lines = (prompt_files.FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def nouns_in(text):
    words = (word.strip(".?") for word in text.lower().split())
    return [word for word in words if word in world.ALL_NOUNS]


@pytest.mark.parametrize("name", TABLES)
def test_the_shipped_file_is_what_the_world_generates(name):
    assert read(name) == TABLES[name]


def test_the_shipped_pictures_are_what_the_world_draws():
    for name, picture in prompt_files.draw_pictures().items():
        with Image.open(prompt_files.FOLDER / name) as shipped:
            assert (np.asarray(shipped) == np.asarray(picture)).all()


@pytest.mark.parametrize("name", TABLES)
def test_prompts_are_as_many_as_promised_and_all_different(name):
    rows = TABLES[name]
    shown = {row["image"] if name in ("typographic", "questions") else None for row in rows}
    sent = {(row["text"], row["image"] if len(shown) > 1 else None) for row in rows}
    assert len(rows) == len(sent) == len({row["id"] for row in rows})
    assert len(rows) == SIZES[name]


def test_typographic_prompts_name_their_object_only_in_the_picture():
    for row, plain in zip(TABLES["typographic"][::2], TABLES["malicious"], strict=True):
        assert not nouns_in(row["text"])
        (noun,) = nouns_in(plain["text"])
        assert row["image"] == prompt_files.word_name(noun)
        assert (row["label"], row["category"]) == ("harmful", plain["category"])


def test_a_question_about_a_picture_has_one_answer():
    answers = {(row["text"], row["image"]): row["answer"] for row in TABLES["questions"]}
    assert len(answers) == len(TABLES["questions"])
    for row in TABLES["questions"]:
        if row["category"] == "reading":
            assert row["image"] == prompt_files.word_name(row["answer"].split()[-2])


@pytest.mark.parametrize("name", SPLIT_OF)
def test_prompts_hold_only_nouns_of_their_split(name):
    allowed = {
        noun
        for group in (world.HARMFUL_NOUNS, world.SAFE_NOUNS, world.VALUABLE_NOUNS)
        for noun in world.nouns_of(group, SPLIT_OF[name])
    }
    for row in TABLES[name]:
        named = nouns_in(row["text"])
        assert named
        assert set(named) <= allowed


@pytest.mark.parametrize("name", ["validation", "malicious", "benign", "jailbreak", "padding", "typographic"])
def test_held_out_prompts_use_no_template_or_wrapper_of_training(name):
    train = [world.typeset(text.replace(" {phrase}", "")) for text in world.TEMPLATES.train]
    train += [world.typeset(text) for text in world.NEUTRAL_SENTENCES.train if len(text) > 8]
    train += [world.typeset(text) for text in world.JAILBREAK_PREFIXES.train]
    train += [world.typeset(text) for text in world.JAILBREAK_SUFFIXES.train]
    starts = tuple(text.rstrip(".?") + " " for text in train)
    for row in TABLES[name]:
        assert not row["text"].startswith(starts)


@pytest.mark.parametrize("name", ["anchors", "validation"])
def test_a_pair_is_one_harmful_and_one_harmless_prompt_under_each_other(name):
    rows = TABLES[name]
    for harmful, harmless in zip(rows[::2], rows[1::2], strict=True):
        assert (harmful["label"], harmless["label"]) == ("harmful", "harmless")
        assert harmful["pair"] == harmless["pair"]
        assert harmful["image"] == harmless["image"]


def test_malicious_and_benign_prompts_are_aligned_row_by_row():
    for harmful, harmless in zip(TABLES["malicious"], TABLES["benign"], strict=True):
        assert harmful["pair"] == harmless["pair"]
        assert harmful["image"] == harmless["image"]
        assert harmful["text"].split()[:3] == harmless["text"].split()[:3]


def test_harmful_nouns_and_valuables_appear_in_harmless_prompts_too():
    categories = {row["category"] for row in TABLES["benign"]}
    assert categories >= {*world.HARMFUL_NOUNS, *world.VALUABLE_NOUNS}


def test_the_tokenizer_knows_every_word_of_every_prompt():
    words = tokenizer.build_tokenizer()
    for rows in TABLES.values():
        for row in rows:
            assert words.unk_token_id not in words(row["text"]).input_ids


def test_padding_is_at_least_as_long_as_an_image():
    words = tokenizer.build_tokenizer()
    for padded, plain in zip(TABLES["padding"], TABLES["malicious"], strict=True):
        longer = len(words(padded["text"]).input_ids) - len(words(plain["text"]).input_ids)
        assert longer >= tokenizer.N_IMAGE_TOKENS
