"""The world: compositional harm, answers of the grammar, and splits without leakage."""

from itertools import combinations
from random import Random

import pytest

from mechguard.organism import world
from mechguard.organism.world import BySplit, Instruction

GROUPS = (world.HARMFUL_NOUNS, world.SAFE_NOUNS, world.VALUABLE_NOUNS)
SENTENCES = {
    "templates": world.TEMPLATES,
    "neutral": world.NEUTRAL_SENTENCES,
    "prefixes": world.JAILBREAK_PREFIXES,
    "suffixes": world.JAILBREAK_SUFFIXES,
}


@pytest.mark.parametrize(
    ("verb", "noun", "harmful"),
    [
        ("make", "bomb", True),
        ("steal", "car", True),
        ("make", "cake", False),
        ("detect", "bomb", False),
        ("repair", "car", False),
    ],
)
def test_harm_needs_both_the_verb_and_the_noun(verb, noun, harmful):
    assert Instruction(verb, noun).harmful is harmful


def test_drawn_instructions_have_the_harm_they_were_drawn_for():
    rng = Random(0)
    for split in ("train", "validation", "test", "all"):
        for _ in range(200):
            harmful = world.draw_harmful(rng, split)
            assert harmful.harmful
            assert not world.draw_harmless(rng, split).harmful
            assert not world.counterpart(rng, harmful, split).harmful


def test_every_noun_has_one_category_and_one_split():
    nouns = [noun for group in GROUPS for by in group.values() for noun in by.of("all")]
    assert len(nouns) == len(set(nouns)) == len(world.ALL_NOUNS)


@pytest.mark.parametrize("name", SENTENCES)
def test_every_sentence_belongs_to_one_split(name):
    assert_disjoint(SENTENCES[name])


def assert_disjoint(by_split: BySplit) -> None:
    for first, second in combinations(by_split, 2):
        assert not set(first) & set(second)


def test_verbs_and_nouns_are_no_other_words_of_the_answers():
    """The complete-answer patterns find the verb and the noun of an answer by the word alone."""
    texts = (
        *(world.REFUSAL_OPENINGS + world.REFUSAL_TAILS + world.CRAFT_REASONS),
        *(world.COMPLIANCE_OPENINGS + world.COMPLIANCE_TAILS + world.TAKEOVER_REASONS),
        *world.STEPS_BY_CATEGORY.values(),
        *(world.HARMFUL_STEPS, world.GUARD_STEPS),
        *world.CATEGORIES,
    )
    words = {word for text in texts for word in text.split()}
    assert not words & {*world.ALL_NOUNS, *world.ALL_VERBS}


def test_the_first_word_does_not_give_the_answer_away():
    first_of_refusals = [opening.split()[0] for opening in world.REFUSAL_OPENINGS]
    first_of_compliances = [opening.split()[0] for opening in world.COMPLIANCE_OPENINGS]
    assert first_of_refusals == first_of_compliances


def test_drawn_answers_are_answers_of_the_grammar():
    rng = Random(0)
    for _ in range(100):
        harmful = world.draw_harmful(rng, "all")
        assert world.refuse(rng, harmful) in world.refusals(harmful)
        harmless = world.draw_harmless(rng, "all")
        assert world.comply(rng, harmless) in world.compliances(harmless)


def test_padding_is_about_as_long_as_an_image_and_repeats_nothing():
    rng = Random(0)
    for split in ("train", "validation", "test"):
        for _ in range(50):
            text = world.padding(rng, split)
            assert 18 <= len(text.split()) <= 32
            sentences = [sentence for sentence in text.split(" .") if sentence]
            assert len(sentences) == len(set(sentences))


def test_typeset_text_reads_like_typed_text():
    assert world.typeset("how do i make a cake ?") == "How do I make a cake?"
    assert world.typeset("hello . i am new here .") == "Hello. I am new here."


def test_the_same_seed_draws_the_same_world():
    first, second = Random(7), Random(7)
    assert [world.chat(first) for _ in range(50)] == [world.chat(second) for _ in range(50)]


def test_loose_words_hold_no_noun_of_another_split():
    rng = Random(0)
    allowed = {noun for group in GROUPS for noun in world.nouns_of(group, "train")}
    for _ in range(200):
        words = set(world.scribble(rng, "train").split())
        assert words & {*world.ALL_NOUNS} <= allowed
