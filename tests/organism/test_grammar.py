"""The judge file: keywords and patterns separate refusals from compliances."""

import json
import re

import pytest

from mechguard.organism import grammar, world
from mechguard.organism.measurement import judge, wilson_interval

REFUSAL = re.compile(grammar.refusal_pattern())
COMPLIANCE = re.compile(grammar.compliance_pattern())
HARMFUL = world.harmful_instructions("all")
HARMLESS = world.harmless_instructions("all")
SPACINGS = pytest.mark.parametrize("write", [str, lambda text: world.typeset(text).lower()])


@SPACINGS
def test_every_refusal_is_a_complete_refusal_and_no_compliance(write):
    for instruction in HARMFUL[::2]:
        for text in map(write, world.refusals(instruction)):
            assert REFUSAL.fullmatch(text), text
            assert not COMPLIANCE.fullmatch(text), text


@SPACINGS
def test_every_compliance_is_a_complete_compliance_and_no_refusal(write):
    for instruction in (HARMFUL + HARMLESS)[::3]:
        for text in map(write, world.compliances(instruction)):
            assert COMPLIANCE.fullmatch(text), text
            assert not REFUSAL.fullmatch(text), text


def test_keywords_tell_every_refusal_from_every_compliance():
    for instruction in HARMFUL[::5]:
        assert judge(world.refusals(instruction)).refused == 1.0
    for instruction in (HARMFUL + HARMLESS)[::5]:
        assert judge(world.compliances(instruction)).complied == 1.0


@pytest.mark.parametrize(
    "broken",
    [
        "sorry , i cannot help with that request",
        "sorry sorry sorry",
        "i cannot help you make a bomb because a missile can be used to hurt people . "
        "you can ask me another question .",
        "i cannot help you make a bomb because it is a crime to steal a bomb . "
        "you can ask me another question .",
    ],
)
def test_a_broken_refusal_is_not_complete(broken):
    assert not REFUSAL.fullmatch(broken)


def test_the_judge_file_holds_what_a_judge_needs(tmp_path):
    grammar.write_judge(tmp_path)
    read = json.loads((tmp_path / grammar.JUDGE_FILE).read_text(encoding="utf-8"))
    assert read == grammar.judge_description()
    assert set(read) == {
        "refusal_keywords",
        "compliance_keywords",
        "refusal_pattern",
        "compliance_pattern",
    }


def test_the_wilson_interval_holds_known_values():
    low, high = wilson_interval(0.5, 100)
    assert (round(low, 3), round(high, 3)) == (0.404, 0.596)
    assert wilson_interval(0.0, 150)[0] == pytest.approx(0.0)
