"""Prompts: pairs stay together, conditions say what is sent, files are read as written."""

import numpy as np
import pytest
from PIL import Image

import mechguard as mg
from mechguard.prompts import CONDITIONS


def test_a_split_never_separates_a_pair(prompts):
    first, second = prompts.split(test=0.4, seed=3)
    assert {p.pair for p in first}.isdisjoint({p.pair for p in second})
    assert len(first) + len(second) == len(prompts)
    assert len(second) == 2 * round(12 * 0.4)


def test_a_split_is_fixed_by_its_seed(prompts):
    assert prompts.split(seed=1) == prompts.split(seed=1)
    assert prompts.split(seed=1) != prompts.split(seed=2)


def test_unpaired_prompts_are_split_label_by_label():
    rows = [mg.Prompt(f"{label}{i}", "x", label) for label in ("harmful", "harmless") for i in range(10)]
    _, test = mg.Prompts(rows).split(test=0.5)
    assert sorted(test.labels) == ["harmful"] * 5 + ["harmless"] * 5


def test_prompts_slice_and_concatenate_like_a_sequence(prompts):
    assert prompts[:4] + prompts[4:] == prompts
    assert prompts[-1].id == list(prompts)[-1].id


@pytest.mark.parametrize("name", sorted(CONDITIONS))
def test_a_generated_picture_names_its_condition(prompts, name):
    sent = prompts.with_image(name)
    assert sent.condition == name
    assert sent[0].pictures((20, 10))[0].size == (20, 10)


def test_blank_is_white_and_black_is_black(prompts):
    assert np.asarray(prompts.with_image("blank")[0].pictures()[0]).min() == 255
    assert np.asarray(prompts.with_image("black")[0].pictures()[0]).max() == 0


def test_noise_differs_between_prompts_but_not_between_calls(prompts):
    noisy = prompts.with_image("noise")
    first, again, other = noisy[0].pictures()[0], noisy[0].pictures()[0], noisy[1].pictures()[0]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_none_takes_the_picture_away_and_image_brings_the_own_one_back(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    (tmp_path / "set.jsonl").write_text('{"text": "what is this?", "image": "red.png"}\n')
    loaded = mg.load_prompts(tmp_path / "set.jsonl")
    assert loaded.condition == "image"
    assert loaded.with_image("none").condition == "text"
    restored = loaded.with_image("blank").with_image("image")
    assert restored[0].pictures()[0].getpixel((0, 0)) == (255, 0, 0)


def test_typographic_moves_the_request_into_the_picture(prompts):
    drawn = prompts.with_image("typographic")
    assert prompts[0].text not in drawn[0].text
    assert np.asarray(drawn[0].pictures()[0]).min() < 50
    assert drawn[0].label == prompts[0].label


def test_a_template_wraps_every_text(prompts):
    wrapped = prompts.with_template("Be kind. {query} Thank you {name}.")
    assert wrapped[0].text == f"Be kind. {prompts[0].text} Thank you {{name}}."


@pytest.mark.parametrize(
    ("condition", "message"),
    [("image", "owns no picture"), ("mist", "neither a picture file nor one of none, image")],
)
def test_a_picture_that_does_not_exist_is_refused(prompts, condition, message):
    with pytest.raises(ValueError, match=message):
        prompts.with_image(condition)


def test_a_file_that_is_no_picture_is_refused(prompts, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        prompts.with_image(tmp_path / "broken.png")[0].pictures()[0]


def test_pairs_must_hold_one_of_each_label():
    two = [mg.Prompt("a", "x", "harmful", pair="1"), mg.Prompt("b", "y", "harmful", pair="1")]
    with pytest.raises(ValueError, match="holds two harmful prompts"):
        mg.Prompts(two).pair_indices()
    with pytest.raises(ValueError, match="has only a harmful prompt"):
        mg.Prompts(two[:1]).pair_indices()
