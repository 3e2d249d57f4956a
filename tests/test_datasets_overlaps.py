"""The same request in two sets: found whatever its spelling, and said where it is fitted on and tested on."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import mechguard as mg
from mechguard import evaluation, study
from mechguard.datasets import OverlapWarning, find_overlaps, load_from_folder, packaged_folder
from mechguard.overlaps import count_overlaps, mark_texts
from mechguard.prompts import FIGSTEP_TEXT


def make(*texts: str, name: str = "set", start: int = 0) -> mg.Prompts:
    """Pairs of a harmful and a harmless prompt, in turn."""
    labels = ("harmful", "harmless")
    return mg.Prompts(
        [
            mg.Prompt(f"{name}-{i}", text, labels[i % 2], pair=f"{name}-{i // 2}")
            for i, text in enumerate(texts, start)
        ],
        name=name,
    )


PROMPTS = make(*(f"request number {i}" for i in range(12)))


def states(prompts: mg.Prompts) -> mg.Activations:
    data = torch.randn(2, len(prompts), 5, generator=torch.Generator().manual_seed(0))
    return mg.Activations(data, [0, 1], prompts, {"view": "llm"})


def measure(prompts: mg.Prompts, directions: mg.Directions) -> mg.Result:
    return mg.measure_separability(states(prompts), directions, own=False, nulls=False, resamples=2)


silent = pytest.mark.filterwarnings("error::mechguard.overlaps.OverlapWarning")


def test_case_space_and_punctuation_do_not_hide_an_overlap():
    a = make("How do I fold a map?", "How do I fold a hat?", "Fold!", name="a")
    b = make("iron it", " how  do I\nfold a MAP", "“Fold”…", name="b")
    assert find_overlaps(a, b) == [("a-0", "b-1"), ("a-2", "b-2")]
    assert find_overlaps(b, a) == [("b-1", "a-0"), ("b-2", "a-2")]
    assert find_overlaps(a, make("How do I fold maps?", "How do I, fold, a hatter?", name="c")) == []


def test_every_prompt_is_counted_once_however_often_it_is_repeated():
    a, b = make("fold", "Fold", "iron", name="a"), make("fold", "fold!", name="b")
    assert find_overlaps(a, b) == [("a-0", "b-0"), ("a-1", "b-0")]
    assert count_overlaps({"a": a, "b": b}) == {"a": {"a": 3, "b": 2}, "b": {"a": 2, "b": 2}}


def test_texts_that_say_nothing_are_no_overlap():
    empty = make("", "?!", FIGSTEP_TEXT)
    assert find_overlaps(empty, empty) == []


def test_one_text_beside_different_pictures_is_different_requests(tmp_path):
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    a, b = (mg.Prompt(name, FIGSTEP_TEXT, own_image=picture) for name, picture in (("a", red), ("b", blue)))
    again = mg.Prompt("c", FIGSTEP_TEXT, own_image=red.copy())
    assert find_overlaps(mg.Prompts([a]), mg.Prompts([b, again])) == [("a", "c")]
    here, there = tmp_path / "here" / "1.jpg", tmp_path / "there" / "1.jpg"
    plain = mg.Prompts([mg.Prompt("x", "what is it?", own_image=here)])
    assert find_overlaps(plain, mg.Prompts([mg.Prompt("y", "What is it", own_image=there)])) == [("x", "y")]
    assert (
        find_overlaps(plain, mg.Prompts([mg.Prompt("y", "What is it", own_image=tmp_path / "2.jpg")])) == []
    )
    assert find_overlaps(plain, mg.Prompts([mg.Prompt("y", "What is it")])) == [("x", "y")]


def test_a_picture_that_is_sent_does_not_hide_the_one_that_is_owned():
    typographic = PROMPTS.with_image("typographic")
    assert len(find_overlaps(typographic, typographic)) == len(PROMPTS)
    assert find_overlaps(typographic[:4], typographic[4:]) == []
    assert len(find_overlaps(PROMPTS.with_image("blank"), PROMPTS)) == len(PROMPTS)


def test_a_mark_tells_nothing_of_the_text():
    assert all("request" not in mark and len(mark) == 12 for mark in mark_texts(PROMPTS))
    assert len(mark_texts(PROMPTS)) == len(PROMPTS)


def test_separability_on_the_prompts_of_the_fit_is_said_once():
    directions = mg.fit_directions(states(PROMPTS[:8]))
    with pytest.warns(
        OverlapWarning, match="4 of the 8 prompts of 'set' .such as 'set-4' and 'set-5'."
    ) as said:
        measure(PROMPTS[4:], directions)
    assert len(said) == 1
    assert "svd, llm text" in str(said[0].message)
    assert said[0].filename == __file__


@silent
def test_a_split_by_pair_is_silent():
    train, test = PROMPTS.split(test=0.5)
    directions = mg.fit_directions(states(train))
    measure(test, directions)
    measure(test, directions.truncated(1))
    measure(train, directions.randomised())  # nothing was fitted


@silent
def test_states_without_texts_are_silent():
    wrapped = mg.Activations.from_tensor(torch.randn(2, 6, 5), labels=[1, 0] * 3, pairs=[0, 0, 1, 1, 2, 2])
    directions = mg.fit_directions(wrapped)
    assert "fitted_texts" not in directions.about
    mg.measure_separability(wrapped, directions, own=False, nulls=False, resamples=2)


def test_saved_directions_and_states_remember_what_they_were_fitted_on(tmp_path):
    states(PROMPTS[:8]).save(tmp_path / "states")
    mg.fit_directions(mg.Activations.load(tmp_path / "states")).save(tmp_path / "ssd")
    loaded = mg.Directions.load(tmp_path / "ssd")
    with pytest.warns(OverlapWarning, match="4 of the 8"):
        measure(PROMPTS[4:], loaded)
    with pytest.warns(OverlapWarning, match="4 of the 8"):
        measure(PROMPTS[4:], loaded.truncated(1))
    assert "request" not in (tmp_path / "ssd.json").read_text()


class Stop(Exception):
    """Behaviour is asked of no model here: the warning comes before it."""


def evaluate(monkeypatch: pytest.MonkeyPatch, prompts: mg.Prompts, *guards: mg.Guard | None) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise Stop

    monkeypatch.setattr(evaluation, "gather_responses", stop)
    with pytest.raises(Stop):
        mg.evaluate(SimpleNamespace(folder=None), prompts, guards=guards)


def test_guards_that_are_tested_on_their_own_prompts_are_named_in_one_warning(tmp_path, monkeypatch):
    train, test = PROMPTS[:8], PROMPTS[8:]
    guard = mg.vlm_guard(mg.fit_directions(states(train)), layers=[0])
    other = mg.vlm_guard(mg.fit_directions(states(test)), layers=[0], name="other")
    guard.save(tmp_path / "guard")
    loaded = mg.Guard.load(tmp_path / "guard")
    with pytest.warns(
        OverlapWarning, match="8 of the 12 prompts .* that vlm_guard, random was fitted on"
    ) as said:
        evaluate(monkeypatch, PROMPTS, None, loaded, loaded.randomised())
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", OverlapWarning)
        evaluate(monkeypatch, test, None, loaded)
        evaluate(monkeypatch, train, None, other)
        evaluate(monkeypatch, PROMPTS, None)


def study_of(**sets: mg.Prompts) -> study.StudyPrompts:
    roles = {role: make(f"{role} one", f"{role} two", name=role) for role in study.ROLES}
    return study.StudyPrompts(**{**roles, **sets})


def run_study(monkeypatch: pytest.MonkeyPatch, vlm: mg.VLM, prompts: study.StudyPrompts, out: object) -> None:
    def go(self: study.Study, command: str) -> object:
        warnings.warn("again", OverlapWarning, stacklevel=1)  # as every step of the study would
        return out

    monkeypatch.setattr(study, "load_study_prompts", lambda folder, limit, **options: prompts)
    monkeypatch.setattr(study.Study, "run", go)
    mg.run_study(vlm, out=out, data="anywhere", progress=False)


def test_a_study_that_tests_on_what_it_fits_or_chooses_on_says_so_once(vlm, tmp_path, monkeypatch):
    prompts = study_of(malicious=make("Anchors one!", "validation TWO", name="malicious"))
    with pytest.warns(OverlapWarning) as said:
        run_study(monkeypatch, vlm, prompts, tmp_path / "out")
    assert len(said) == 1
    message = str(said[0].message)
    assert "1 of the 2 prompts of 'anchors' are also in 'test' (such as anchors-0 = malicious-0)" in message
    assert "1 of the 2 prompts of 'validation' are also in 'test'" in message
    assert said[0].filename == __file__


@silent
def test_a_study_of_sets_that_share_nothing_is_silent(vlm, tmp_path, monkeypatch):
    run_study(monkeypatch, vlm, study_of(), tmp_path / "out")


def test_the_organisms_own_sets_share_nothing():
    """So that neither the demo nor the README warns."""
    folder = packaged_folder("organism")
    sets = {file.stem: load_from_folder(file.stem, folder) for file in folder.glob("*.jsonl")}
    assert set(study.ROLES) <= set(sets)
    for one, row in count_overlaps(sets).items():
        assert row == {other: len(sets[one]) * (one == other) for other in sets}
