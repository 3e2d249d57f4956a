"""The shipped checkpoint: it is there, it is small, and asking for another is a clear error."""

import json
import subprocess
import sys

import pytest

from mechguard import organism
from mechguard.organism import grammar


def test_the_default_checkpoint_holds_both_models_and_the_log():
    folder = organism.checkpoint()
    assert (folder / "vlm" / "model.safetensors").is_file()
    assert (folder / "aligned_llm" / "model.safetensors").is_file()
    log = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert log["chosen_is_eligible"]
    assert log["aligned_language_model"]["accepted"]


def test_the_checkpoint_carries_the_judge_of_the_grammar():
    shipped = json.loads((organism.checkpoint() / "vlm" / grammar.JUDGE_FILE).read_text("utf-8"))
    assert shipped == grammar.judge_description()


def test_the_shipped_weights_take_at_most_25_megabytes():
    files = [file for file in organism.CHECKPOINTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 25e6


def test_a_checkpoint_that_is_not_shipped_is_named_with_those_that_are():
    with pytest.raises(ValueError, match=r"organism:999 does not .* has \[0, 1, 2\]"):
        organism.checkpoint(999)


def test_three_trainings_of_one_recipe_are_shipped():
    files = [organism.checkpoint(number) / "training.json" for number in organism.shipped()]
    logs = [json.loads(file.read_text("utf-8")) for file in files]
    assert len({log["seed"] for log in logs}) == len(logs) == 3
    assert [log["seed"] for log in logs] == sorted(log["seed"] for log in logs)
    assert all(log["recipe"] == logs[0]["recipe"] for log in logs)


def test_importing_the_package_imports_no_torch():
    code = "import mechguard.organism, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
