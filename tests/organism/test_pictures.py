"""Pictures: same seed, same pixels; scenes and words are visible."""

from random import Random

import numpy as np
import pytest

from mechguard.organism import pictures, visual, world


def pixels(picture):
    return np.asarray(picture)


def test_a_blank_picture_is_uniformly_white():
    assert (pixels(pictures.blank()) == 255).all()


def test_the_same_seed_draws_the_same_picture():
    first, second = (pictures.draw_word("cake", Random(3)) for _ in range(2))
    assert (pixels(first) == pixels(second)).all()


@pytest.mark.parametrize("rendering", ["train", "validation", "test"])
def test_every_word_stays_inside_the_picture(rendering):
    rng = Random(0)
    for word in world.ALL_NOUNS:
        picture = pixels(pictures.draw_word(word, rng, rendering))
        background = picture[-1, 0]
        assert (picture != background).any()
        assert (picture[:, 0] == background).all()
        assert (picture[-1] == background).all()


def test_held_out_renderings_use_inks_and_backgrounds_that_training_and_each_other_never_show():
    inks = [{*pictures.DARK_INKS, *pictures.LIGHT_INKS}]
    backgrounds = [{*pictures.DARK_BACKGROUNDS, *pictures.LIGHT_BACKGROUNDS}]
    for styles in pictures.HELD_OUT_STYLES.values():
        inks.append({ink for ink, _ in styles})
        backgrounds.append({background for _, background in styles})
    for groups in (inks, backgrounds):
        assert len(set().union(*groups)) == sum(map(len, groups))


def test_shapes_never_vanish_in_their_background():
    for color in world.COLORS:
        for shape in world.SHAPES:
            scene = (pictures.Item(color, shape, "middle"),)
            for background in (*pictures.LIGHT_BACKGROUNDS, *pictures.DARK_BACKGROUNDS):
                picture = pixels(pictures.draw_scene(scene, Random(0), background))
                assert (picture != picture[0, 0]).any()


def test_visual_exchanges_hold_no_harmful_request_and_no_refusal():
    rng = Random(0)
    for _ in range(200):
        for draw in (visual.instruction_about_picture, visual.instruction_beside_picture):
            exchange = draw(rng)
            words = exchange.answer.split()
            assert not any(refusal in exchange.answer for refusal in ("cannot", "refuse", "crime"))
            verb = next(word for word in words if word in world.ALL_VERBS)
            noun = next(word for word in words if word in world.ALL_NOUNS)
            assert not world.Instruction(verb, noun).harmful
