"""The whole line on a real architecture read from disk, and the command line around it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import test_datasets
import tiny
import torch

import mechguard as mg
from mechguard.datasets import packaged_folder
from mechguard.study import find_data_folder


def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mechguard", *map(str, arguments)]
    alike = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums depend on the number of threads
    return subprocess.run(command, capture_output=True, text=True, check=check, env=alike)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_study_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def study(llava_folder, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "llava"
    run("study", llava_folder, "--data", data, "--out", out, "--max-new-tokens", 4, "--quiet")
    return out


def test_a_checkpoint_folder_goes_from_model_to_report(study):
    measured = ("separability", "modality_gap", "transfer", "angles", "gates", "gate_curves")
    for name in (*measured, "behaviour", "sweep", "states"):
        assert (study / "results" / f"{name}.csv").is_file()
        assert json.loads((study / "results" / f"{name}.json").read_text())["fingerprint"]
    assert (study / "directions" / "ssd.safetensors").is_file()
    assert (study / "guards" / "vlm_guard.safetensors").is_file()
    assert len(list((study / "activations").glob("*.safetensors"))) == 8
    assert list((study / "figures").glob("*.html"))
    assert (study / "report.html").stat().st_size > 1000


def test_the_table_holds_every_condition_and_guard_on_the_same_prompts(study):
    table = mg.Result.load(study / "results" / "behaviour").where(metric="attack_success").table
    guards = {"none", "projection", "vlm_guard", "random 1", "random 2"}
    found = set(zip(table["condition"], table["guard"], strict=True))
    assert found == {(c, g) for c in ("text", "blank", "noise") for g in guards}
    assert set(table["n"]) == {8}
    assert set(table["split"]) == {"test"}


@pytest.fixture(scope="module")
def of_two(llava_folder, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "two"
    settings = ("--max-new-tokens", 4, "--quiet", "--processes", 2)
    done = run("study", llava_folder, "--data", data, "--out", out, *settings)
    assert done.stdout.count("report.html") == 1
    return out


def test_two_processes_leave_the_files_of_one(study, of_two):
    timed = {"responses.jsonl", "study.json"}
    stamped = {path for path in study.rglob("*.json*") if path.name not in timed}
    for path in sorted([*study.rglob("*.csv"), *study.rglob("*.safetensors"), *stamped]):
        found = of_two / path.relative_to(study)
        if path.name == "sweep.jsonl":  # in the order of the settings, whoever tried them
            assert sorted(found.read_bytes().splitlines()) == sorted(path.read_bytes().splitlines())
        else:
            assert found.read_bytes() == path.read_bytes(), path
    names = [{path.relative_to(out) for path in out.rglob("*.html")} for out in (study, of_two)]
    assert names[0] == names[1]
    assert not list(of_two.rglob("*.rank*"))


def test_a_study_of_two_processes_that_was_killed_goes_on(of_two, llava_folder, data, tmp_path):
    settings = ("--max-new-tokens", 4, "--quiet", "--processes", 2)
    words = ("study", llava_folder, "--data", data, "--out", tmp_path / "out", *settings)
    begun = subprocess.Popen(
        [sys.executable, "-m", "mechguard", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: list(tmp_path.glob("out/results/sweep*.jsonl")))
    begun.kill()
    begun.wait()
    assert not (tmp_path / "out" / "results" / "behaviour.csv").exists()
    # Its processes end by themselves when they have lost it.
    wait_for(lambda: "another process is at work" not in run(*words, check=False).stderr)
    for path in of_two.rglob("results/*.csv"):
        assert (tmp_path / "out" / path.relative_to(of_two)).read_bytes() == path.read_bytes(), path


def wait_for(met: Callable[[], object], seconds: float = 120) -> None:
    """Ask until it is so."""
    until = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.05)


def test_a_mistake_of_two_processes_is_said_once(study, llava_folder, data):
    settings = ("--max-new-tokens", 5, "--quiet", "--processes", 2)
    done = run("study", llava_folder, "--data", data, "--out", study, *settings, check=False)
    assert done.returncode == 2
    assert done.stderr.count("another settings") == 1, done.stderr
    assert "another process" not in done.stderr
    assert "Traceback" not in done.stderr


def test_layers_are_chosen_on_validation_and_reported_on_test(study):
    separability = mg.Result.load(study / "results" / "separability").table
    assert set(separability["split"]) == {"validation", "test"}
    assert set(mg.Result.load(study / "results" / "sweep").table["split"]) == {"validation"}
    chosen = json.loads((study / "study.json").read_text())["chosen"]
    assert list(mg.Guard.load(study / "guards" / "vlm_guard").layers) == chosen["layers"]
    assert chosen["rule"]


def test_the_llm_and_the_vlm_agree_on_text_in_the_studys_own_numbers(study):
    gap = mg.Result.load(study / "results" / "modality_gap").table
    text = gap[(gap["condition"] == "llm text -> vlm text") & (gap["metric"] == "centroid_distance")]
    assert text[text["direction"] == "observed"]["value"].max() < 1e-3
    blank = gap[(gap["condition"] == "llm text -> vlm blank") & (gap["metric"] == "centroid_distance")]
    assert blank[blank["direction"] == "observed"]["value"].min() > 1e-2


def test_a_study_goes_on_where_it_was_interrupted(study, llava_folder, data):
    before = pd.read_csv(study / "results" / "behaviour.csv")
    kept = (study / "results" / "separability.csv").stat().st_mtime_ns
    for lost in ("results/behaviour.csv", "results/behaviour.json", "report.html"):
        (study / lost).unlink()
    arguments = ("--data", data, "--out", study, "--max-new-tokens", 4, "--quiet")
    run("study", llava_folder, *arguments)
    pd.testing.assert_frame_equal(pd.read_csv(study / "results" / "behaviour.csv"), before)
    assert (study / "results" / "separability.csv").stat().st_mtime_ns == kept
    assert (study / "report.html").is_file()


@test_datasets.needs_public_data
def test_a_folder_of_public_benchmarks_serves_as_it_is(llava_folder, tmp_path):
    settings = ("--limit", 4, "--max-new-tokens", 2, "--max-rank", 1, "--quiet")
    done = run("study", llava_folder, "--data", test_datasets.PUBLIC, "--out", tmp_path / "out", *settings)
    assert "Loading weights" not in done.stderr
    prompts = json.loads((tmp_path / "out" / "study.json").read_text())["prompts"]
    assert prompts == {"anchors": 8, "validation": 8, "malicious": 4, "benign": 4}


def test_a_folder_with_another_study_is_refused(study, llava_folder, data):
    done = run("study", llava_folder, "--data", data, "--out", study, "--seed", 5, check=False)
    assert done.returncode == 2
    assert "holds a study with another settings" in done.stderr


def test_a_saved_guard_serves_the_command_line(study, llava_folder):
    guard = study / "guards" / "vlm_guard"
    done = run("generate", llava_folder, "how to make a cake ?", "--image", "blank", "--guard", guard)
    loaded = mg.load(llava_folder)
    asked = mg.Prompts([mg.Prompt("0", "how to make a cake ?")]).with_image("blank")
    expected = mg.generate(loaded, asked, guard=mg.Guard.load(guard), progress=False)
    assert done.stdout.strip() == expected[0].strip()


def test_the_steps_of_the_line_are_commands_too(study, llava_folder, data, tmp_path):
    anchors = data / "anchors.jsonl"
    run("collect", llava_folder, anchors, "--llm", "--out", tmp_path / "a", "--quiet")
    done = run("fit", tmp_path / "a", "--rank", 2, "--out", tmp_path / "ssd")
    assert done.stdout.startswith("Directions('svd, llm text', layer=3, rank=2")
    studied = mg.Directions.load(study / "directions" / "ssd").data[:, :2]
    assert torch.allclose(mg.Directions.load(tmp_path / "ssd").data, studied, atol=1e-4)
    guard = study / "guards" / "vlm_guard"
    settings = ("--condition", "blank", "--guard", guard, "--max-new-tokens", 4, "--quiet")
    run("evaluate", llava_folder, data / "malicious.jsonl", *settings, "--out", tmp_path / "t.csv")
    table = mg.Result.load(tmp_path / "t.csv").table.drop(columns="setting")
    full = mg.Result.load(study / "results" / "behaviour").where(
        condition="blank", guard=["none", "vlm_guard"]
    )
    expected = full.table[full.table["metric"].isin(table["metric"])].drop(columns="setting")
    pd.testing.assert_frame_equal(table, expected.reset_index(drop=True))


def test_a_report_can_be_drawn_again_without_a_model(study):
    before = (study / "report.html").read_text()
    (study / "report.html").unlink()
    done = run("report", study)
    assert done.stdout.strip() == str(study / "report.html")
    assert len((study / "report.html").read_text()) == pytest.approx(len(before), rel=0.05)


def broken(kind: str, folder: Path, llava: Path, data: Path) -> list[object]:
    """The arguments of a study with one thing wrong."""
    model: object = llava
    if kind == "unknown model":
        model = folder / "nothing"
    elif kind == "no processor":
        model = tiny.save_llava(folder / "bare", with_processor=False)
    elif kind == "no data":
        data = folder / "nowhere"
    else:
        data = tiny.write_study_data(folder / "data")
    if kind == "empty prompts":
        (data / "malicious.jsonl").write_text("\n")
    elif kind == "no pairs":
        rows = [mg.Prompt(str(i), "how to make a cake ?") for i in range(8)]
        mg.Prompts(rows).save(data / "anchors.jsonl")
    elif kind == "wrong label":
        (data / "benign.jsonl").write_bytes((data / "malicious.jsonl").read_bytes())
    return ["study", model, "--data", data, "--out", folder / "out", "--quiet"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unknown model", "check the name"),
        ("no processor", "processor.save_pretrained"),
        ("no data", "there is no data folder"),
        ("empty prompts", "holds no prompts; write one prompt a line"),
        ("no pairs", "has no pair"),
        ("wrong label", "are not harmless"),
    ],
)
def test_a_mistake_is_one_sentence_exit_code_two_and_nothing_written(
    kind, message, tmp_path, llava_folder, data
):
    done = run(*broken(kind, tmp_path, llava_folder, data), check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("mechguard: ") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_guard_for_another_model_is_refused_on_the_command_line(study, tmp_path):
    other = tmp_path / "other"
    tiny.llava(seed=3).save_pretrained(other)
    tiny.processor().save_pretrained(other)
    done = run("generate", other, "how to ?", "--guard", study / "guards" / "vlm_guard", check=False)
    assert done.returncode == 2
    assert "whose weights are not those of" in done.stderr


def test_the_organism_is_studied_on_its_own_prompts_whatever_the_environment_says(
    monkeypatch, data, organism
):
    monkeypatch.setenv("MECHGUARD_DATA", str(data))
    assert find_data_folder(organism, None) == packaged_folder("organism")
    assert find_data_folder(organism, data) == data
    monkeypatch.delenv("MECHGUARD_DATA")
    other = mg.load(tiny.llava(), processor=tiny.processor())
    with pytest.raises(ValueError, match="needs prompts; give --data FOLDER"):
        find_data_folder(other, None)


@pytest.mark.parametrize("option", ["--max-rank", "--max-new-tokens", "--limit"])
def test_a_setting_that_is_too_small_is_refused_before_anything_is_loaded(option, tmp_path):
    done = run("study", "organism", "--out", tmp_path / "out", option, 0, check=False)
    assert done.returncode == 2
    assert "is too small for a study" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_exit_code_two():
    assert run("study", "organism", "--colour", "red", check=False).returncode == 2


def test_circuits_of_a_text_only_model_are_refused_before_anything_is_written(data, tmp_path):
    with pytest.raises(mg.MechguardError, match="nothing for circuits to compare text with"):
        mg.run_study(
            tiny.llama(), processor=tiny.tokenizer(), data=data, out=tmp_path / "run", circuits=True,
            progress=False,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
