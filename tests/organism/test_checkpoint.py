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
    assert log["seed"] == organism.DEFAULT_SEED
    assert log["chosen_is_eligible"]
    assert log["aligned_language_model"]["accepted"]


def test_the_checkpoint_carries_the_judge_of_the_grammar():
    shipped = json.loads((organism.checkpoint() / "vlm" / grammar.JUDGE_FILE).read_text("utf-8"))
    assert shipped == grammar.judge_description()


def test_the_shipped_weights_take_at_most_25_megabytes():
    files = [file for file in organism.CHECKPOINTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 25e6


def test_a_seed_that_is_not_shipped_is_named_with_those_that_are():
    with pytest.raises(ValueError, match=r"seed 999 .* has seeds \[\d.*--seed 999"):
        organism.checkpoint(999)


def test_importing_the_package_imports_no_torch():
    code = "import mechguard.organism, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
