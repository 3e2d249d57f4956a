"""The doctor passes what is right, and finds each thing that is wrong."""

import dataclasses
import json

import pytest
import tiny
import torch
from typer.testing import CliRunner

import mechguard as mg
from mechguard.cli import app
from mechguard.doctor import CHECKS, is_healthy


def verdicts(vlm: mg.VLM) -> dict[str, str]:
    table = mg.diagnose(vlm, progress=False).table
    return dict(zip(table["check"], table["verdict"], strict=True))


@pytest.fixture
def own() -> mg.VLM:
    """A model of this test's own, to be broken."""
    return mg.load(tiny.llava(), processor=tiny.processor())


def test_a_model_that_is_read_right_passes_every_check(own):
    diagnosis = mg.diagnose(own, progress=False)
    assert set(diagnosis.table["verdict"]) == {"pass"}
    assert list(diagnosis.table["check"]) == list(CHECKS)
    assert is_healthy(diagnosis)
    assert diagnosis.about["model"] == own.name


def test_the_organism_is_read_right(organism):
    assert set(verdicts(organism).values()) == {"pass"}


def test_checks_with_pictures_are_skipped_for_text_only_models():
    found = verdicts(mg.load(tiny.llama(), processor=tiny.tokenizer()))
    skipped = [check for check, verdict in found.items() if verdict == "skip"]
    assert skipped == [check for check, (needs_picture, _) in CHECKS.items() if needs_picture]


def test_bfloat16_is_held_to_its_own_tolerance(own):
    own = mg.load(own.hf_model.to(torch.bfloat16), processor=own.processor)
    assert is_healthy(mg.diagnose(own, progress=False))


def broken_layers(own: mg.VLM) -> None:
    own.parts = dataclasses.replace(own.parts, layers="model.vision_tower.encoder.layers", n_layers=2)


def broken_image_token(own: mg.VLM) -> None:
    own.parts = dataclasses.replace(own.parts, image_token_id=own.tokenizer.convert_tokens_to_ids("how"))


def broken_llm(own: mg.VLM) -> None:
    own.llm = mg.load(tiny.llama(), processor=own.processor)


def broken_padding(own: mg.VLM) -> None:
    own.tokenizer.padding_side = "right"


def broken_template(own: mg.VLM) -> None:
    own.chat = dataclasses.replace(own.chat, template="{{ messages[0]['content'][-1]['text'] | upper }}")


def broken_positions(own: mg.VLM) -> None:
    own.encode = lambda prompts: {  # type: ignore[method-assign]
        **mg.VLM.encode(own, prompts),
        "attention_mask": torch.ones_like(mg.VLM.encode(own, prompts)["attention_mask"]),
    }


@pytest.mark.parametrize(
    ("break_it", "check"),
    [
        (broken_layers, "traced states = plain hidden states"),
        (broken_image_token, "pictures stand at the image positions"),
        (broken_llm, "text through the VLM = text through the LLM"),
        (broken_padding, "the tokenizer pads on the left"),
        (broken_template, "the chat template places the picture"),
        (broken_template, "the chat template keeps the text"),
        (broken_positions, "a batch = each prompt alone"),
    ],
)
def test_what_is_broken_is_found(own, break_it, check):
    assert verdicts(own)[check] == "pass"
    break_it(own)
    assert verdicts(own)[check] == "fail"


def test_a_guard_that_acts_when_it_should_not_is_found(own, monkeypatch):
    plain = mg.Guard.steer
    monkeypatch.setattr(mg.Guard, "steer", lambda *call: plain(*call) + torch.randn(32))
    assert verdicts(own)["generate under an empty guard = plain generate"] == "fail"


def test_a_guard_that_traces_apply_otherwise_than_hooks_is_found(own, monkeypatch):
    from mechguard.guards.steering import Steering

    plain = Steering.__call__
    monkeypatch.setattr(Steering, "__call__", lambda *call: plain(*call) * 1.01)
    assert verdicts(own)["a guard by hooks = a guard by traces"] == "fail"


def test_the_command_prints_a_table_and_says_by_its_exit_code(tmp_path):
    folder = tiny.save_llava(tmp_path / "model")
    done = CliRunner().invoke(app, ["doctor", str(folder), "--quiet"])
    assert done.exit_code == 0
    assert "traced states = plain hidden states" in done.stdout
    machine = CliRunner().invoke(app, ["doctor", str(folder), "--quiet", "--json"])
    report = json.loads(machine.stdout)
    assert {row["verdict"] for row in report["checks"]} == {"pass"}
    assert report["about"]["family"] == "llava"


def test_the_command_fails_for_a_model_that_fails(tmp_path):
    folder = tiny.save_llava(tmp_path / "model")
    template = folder / "chat_template.jinja"
    template.write_text("{{ messages[0]['content'][-1]['text'] }}")  # places no picture
    done = CliRunner().invoke(app, ["doctor", str(folder), "--quiet", "--json"])
    assert done.exit_code == 1
    notes = {row["check"]: row["note"] for row in json.loads(done.stdout)["checks"]}
    assert "cannot read these prompts with their pictures" in notes["the chat template places the picture"]


def test_the_families_that_were_tried_are_listed():
    done = CliRunner().invoke(app, ["models"])
    assert done.exit_code == 0
    assert "qwen3_vl" in done.stdout
    rows = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)
    assert {"family", "loads", "two images", "doctor", "note"} <= set(rows[0])
