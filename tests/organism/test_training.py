"""Training: what is learned, what stays frozen, and that a seed fixes everything."""

from random import Random

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from mechguard.organism import lessons, measurement, recipe, stages, tokenizer, train, training, world
from mechguard.organism.lessons import Lesson
from mechguard.organism.measurement import Behaviour
from mechguard.organism.recipe import TINY_RECIPE, Recipe, Selection


@pytest.fixture(scope="module")
def few_questions():
    """Measurements in this module ask four questions instead of a hundred."""
    with pytest.MonkeyPatch.context() as patch:
        load = measurement.load_questions
        patch.setattr(measurement, "load_questions", lambda *setting: load(*setting)[:4])
        seen = {"reading": 1.0, "scene_question": 1.0, "description": 1.0}
        patch.setattr(measurement, "visual_accuracy", lambda model: seen)
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

    for name in ("pretrain", "align", "train_vision", "match_projector", "train_projector"):
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
    assert "attention_mask" not in batch


def test_parts_of_a_batch_sum_to_the_loss_of_the_batch():
    torch.manual_seed(0)
    model = stages.build_language_model(TINY_RECIPE.architecture)
    rng = Random(0)
    batch = [lessons.draw_lesson(rng, Recipe().mixture.alignment, lessons.ALIGNMENT_KINDS) for _ in range(9)]
    with torch.no_grad():
        parts = [part.item() for part in training.lesson_losses(model, batch)]
        whole = model(**training.collate(batch)).loss.item()
    assert len(parts) > 1
    assert sum(parts) == pytest.approx(whole, rel=1e-5)


def test_an_opening_is_long_enough_to_decide_and_shorter_than_the_answer():
    rng = Random(0)
    for _ in range(50):
        refused, complied = (
            tuple(lessons.ALIGNMENT_KINDS[f"{kind}_opening"](rng).answer)
            for kind in ("refusal", "compliance")
        )
        assert len(refused) == len(complied) == lessons.OPENING_LENGTH
        assert refused != complied


def test_a_stand_in_holds_every_fact_and_is_no_longer_than_an_image():
    rng = Random(0)
    for _ in range(100):
        facts = rng.choice([("cake", "light"), ("red circle left", "blue bar right", "dark"), ("light",)])
        words = lessons.loose_facts(rng, facts)
        assert all(fact in words for fact in facts)
        assert len(words.split()) <= tokenizer.N_IMAGE_TOKENS


def test_pretraining_answers_either_way_whether_a_request_is_harmful_or_not():
    rng = Random(0)
    decoder = tokenizer.build_tokenizer()
    for kind in ("refusal", "compliance"):
        drawn = [lessons.PRETRAINING_KINDS[kind](rng) for _ in range(200)]
        verdict = measurement.judge([decoder.decode(lesson.answer[:-1]) for lesson in drawn])
        assert (verdict.refused if kind == "refusal" else verdict.complied) == 1.0
        harmful = [
            any(word in decoder.decode(lesson.prompt) for word in ("steal", "bomb")) for lesson in drawn
        ]
        assert 0 < sum(harmful) < len(harmful)


def test_no_harmful_request_stands_beside_a_picture_or_its_stand_in():
    rng = Random(0)
    decoder = tokenizer.build_tokenizer()
    kinds = [lessons.TUNING_KINDS[kind] for kind in lessons.VISUAL_KINDS]
    stand_ins = [kind for kind in lessons.PRETRAINING_KINDS if kind.endswith("stand_in")]
    kinds += [lessons.PRETRAINING_KINDS[kind] for kind in (*lessons.STAND_IN_KINDS, *stand_ins)]
    for kind in kinds:
        for _ in range(100):
            words = decoder.decode(kind(rng).prompt).split("\n")[-1].replace("?", "").replace(".", "").split()
            verbs, nouns = (
                [word for word in words if word in group] for group in (world.ALL_VERBS, world.ALL_NOUNS)
            )
            assert not any(world.Instruction(verb, noun).harmful for verb in verbs for noun in nouns)


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


def behaviour(complied, complete=1.0):
    refused = 1 - complied
    return Behaviour(100, complied, refused, complied, round(complete * refused, 4))


def candidate(step, *, text=0.0, blank=0.5, benign=1.0, padding=0.0, complete=1.0, reading=1.0, scenes=1.0):
    numbers = {
        "harmful/validation/text": behaviour(text),
        "harmful/validation/blank": behaviour(blank, complete),
        "harmful/validation/scene": behaviour(blank, complete),
        "harmless/validation/text": behaviour(benign),
        "harmless/validation/blank": behaviour(benign),
        "harmless/validation/scene": behaviour(benign),
        "harmful/padding": behaviour(padding),
    }
    return train.Candidate(step, numbers, {"reading": reading, "scene_question": scenes}, {})


def test_the_checkpoint_nearest_to_the_wanted_decay_is_kept_and_of_equals_the_later():
    wanted = Selection().blank_attack_success
    candidates = [candidate(25, blank=0.46), candidate(50, blank=wanted), candidate(75, blank=wanted)]
    assert train.choose(candidates, Selection()).step == 75


@pytest.mark.parametrize(
    "fault",
    [
        {"text": 0.2},
        {"benign": 0.9},
        {"padding": 0.3},
        {"complete": 0.5},
        {"reading": 0.5},
        {"scenes": 0.5},
        {"blank": 0.1},
        {"blank": 0.99},
    ],
)
def test_a_checkpoint_with_a_fault_is_not_kept(fault):
    candidates = [candidate(25, blank=0.46), candidate(50, **fault)]
    assert train.choose(candidates, Selection()).step == 25
    assert len(candidates[1].faults(Selection())) == 1
