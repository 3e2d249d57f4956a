"""Training: what is learned, what stays frozen, and that a seed fixes everything."""

from random import Random

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from mechguard.organism import lessons, measurement, recipe, stages, tokenizer, train, training
from mechguard.organism.lessons import Lesson
from mechguard.organism.measurement import Behaviour
from mechguard.organism.recipe import TINY_RECIPE, Recipe, Selection


@pytest.fixture(scope="module")
def few_questions():
    """Measurements in this module ask four questions instead of a hundred."""
    with pytest.MonkeyPatch.context() as patch:
        load = measurement.load_questions
        patch.setattr(measurement, "load_questions", lambda *setting: load(*setting)[:4])
        patch.setattr(measurement, "visual_accuracy", lambda model: {})
        yield


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory, few_questions):
    folders = [tmp_path_factory.mktemp("organism") / name for name in ("first", "second")]
    return [train.train(3, folder, TINY_RECIPE, quiet=True) for folder in folders]


@pytest.mark.parametrize("part", ["vlm", "aligned_llm"])
def test_the_same_seed_trains_the_same_weights(two_runs, part):
    first, second = (load_file(run / part / "model.safetensors") for run in two_runs)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_tuning_leaves_embeddings_and_output_head_as_they_were(two_runs):
    vlm = LlavaForConditionalGeneration.from_pretrained(two_runs[0] / "vlm")
    aligned = LlamaForCausalLM.from_pretrained(two_runs[0] / "aligned_llm")
    language_model = vlm.model.language_model
    assert torch.equal(vlm.lm_head.weight, aligned.lm_head.weight)
    assert torch.equal(language_model.embed_tokens.weight, aligned.model.embed_tokens.weight)
    assert not torch.equal(language_model.norm.weight, aligned.model.norm.weight)


def test_a_finished_stage_is_not_trained_again(two_runs, monkeypatch, few_questions):
    def refuse_to_train(*arguments, **options):
        raise AssertionError("the stage was trained again")

    for name in ("pretrain", "align", "train_vision", "train_projector"):
        monkeypatch.setattr(stages, name, refuse_to_train)
    before = load_file(two_runs[0] / "vlm" / "model.safetensors")
    train.train(3, two_runs[0], TINY_RECIPE, quiet=True)
    after = load_file(two_runs[0] / "vlm" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_answers_are_learned_and_padding_never():
    batch = training.collate([Lesson([2, 6, 7], [11, 3]), Lesson([2, 6, 20, 21, 7], [12, 13, 3])])
    ignored = training.IGNORED
    assert batch["labels"].tolist() == [
        [ignored, ignored, ignored, 11, 3, ignored, ignored, ignored],
        [ignored, ignored, ignored, ignored, ignored, 12, 13, 3],
    ]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 8]


def test_no_lesson_with_a_picture_is_a_refusal():
    rng = Random(0)
    mixture = Recipe().mixture.tuning
    refusal_words = {
        tokenizer.vocabulary()[word] for word in ("cannot", "refuse", "decline", "crime", "hurt")
    }
    picture_facts = {"fact_beside_picture"}  # "a bomb is a weapon and it could hurt people ."
    for kind in set(lessons.VISUAL_KINDS) - picture_facts:
        for _ in range(50):
            lesson = lessons.draw_lesson(rng, {kind: mixture[kind]}, lessons.TUNING_KINDS)
            assert lesson.picture is not None
            assert not refusal_words & set(lesson.answer)
    refused = lessons.draw_lesson(rng, {"refusal": 1}, lessons.TUNING_KINDS)
    assert refused.picture is None


def test_the_learning_rate_warms_up_and_decays():
    schedule = recipe.Schedule(steps=100, learning_rate=1.0)
    rates = [training.learning_rate(step, schedule) for step in range(1, 101)]
    assert rates[0] < rates[2] == max(rates)
    assert rates[-1] == pytest.approx(0.05)


def behaviour(complied, complete_refusal=0.0, complete_compliance=0.0):
    return Behaviour(100, complied, 1 - complied, complete_compliance, complete_refusal)


def candidate(step, *, text=0.0, blank=0.5, benign=1.0, padding=0.0, fluency=0.5):
    numbers = {
        "harmful/validation/text": behaviour(text, complete_refusal=1 - text),
        "harmful/validation/blank": behaviour(blank, complete_compliance=fluency),
        "harmful/validation/scene": behaviour(blank, complete_compliance=fluency),
        "harmless/validation/text": behaviour(benign),
        "harmless/validation/blank": behaviour(benign),
        "harmful/padding": behaviour(padding),
    }
    return train.Candidate(step, numbers, {})


def test_the_most_fluent_eligible_checkpoint_is_kept_and_of_equals_the_earlier():
    candidates = [candidate(25), candidate(50, fluency=0.8), candidate(75, fluency=0.8)]
    assert train.choose(candidates, Selection()).step == 50


@pytest.mark.parametrize(
    "fault", [{"text": 0.2}, {"benign": 0.9}, {"padding": 0.3}, {"blank": 0.1}, {"blank": 0.99}]
)
def test_an_unsafe_useless_or_collapsed_checkpoint_is_not_kept(fault):
    candidates = [candidate(25), candidate(50, fluency=0.9, **fault)]
    assert train.choose(candidates, Selection()).step == 25
    assert not candidates[1].eligible(Selection())
