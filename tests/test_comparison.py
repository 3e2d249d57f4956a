"""Comparisons: every method beside its controls, and nothing measured twice."""

import json

import pytest
import tiny
from test_directions import planted

import mechguard as mg
from mechguard import comparison
from mechguard.comparison import METHODS, Comparison, States

CHOSEN = ["vlm_guard, stream", "cmrm", "cmrm_sample", "self_reminder"]


def compare(vlm, folder, **options):
    prompts = tiny.prompts(pairs=8)
    settings = dict(
        anchors=prompts[:8],
        validation=prompts[8:12],
        tests={"test": prompts[12:]},
        methods=CHOSEN,
        conditions=["text", "blank"],
        limit=2,
        max_new_tokens=3,
        progress=False,
    )
    return mg.compare_guards(vlm, out=folder, **{**settings, **options})


@pytest.fixture(scope="module")
def compared(vlm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    return compare(vlm, folder), folder


def test_every_method_stands_beside_its_controls(compared):
    result, _ = compared
    names = list(dict.fromkeys(result.table["guard"]))
    assert names == [
        "none",
        "vlm_guard, stream",
        *(f"vlm_guard, stream; {control}" for control in ("random 1", "random 2", "shuffled")),
        "cmrm",
        *(f"cmrm; {control}" for control in ("random 1", "random 2", "shuffled")),
        "cmrm_sample",
        "self_reminder",
    ]
    metrics = {"attack_success", "complete_refusal", "benign_compliance", "kl_first_token"}
    for name in names[1:]:
        rows = result.where(guard=name).table
        assert metrics <= set(rows["metric"])
        assert set(rows["condition"]) == {"text", "blank"}
        assert set(rows["split"]) == {"test"}
        assert (rows["low"] <= rows["value"]).all()
        assert (rows["value"] <= rows["high"]).all()


def test_settings_were_chosen_on_validation(compared):
    result, folder = compared
    lines = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    tried = [line["setting"] for line in lines if line["stage"] == "validation" and line["guard"] == "cmrm"]
    assert len(tried) == 2 * 3  # one layer, all three; three strengths
    assert result.about["chosen"]["cmrm"] in [
        {key: one[key] for key in ("layers", "alpha", "rank")} for one in tried
    ]
    assert result.about["n_validation"] == 4


def test_a_comparison_that_was_killed_goes_on(compared, vlm, tmp_path, monkeypatch):
    whole, folder = compared
    lines = (folder / "cells.jsonl").read_bytes().splitlines(keepends=True)
    for name in ("cells.jsonl", "comparison.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    kept = lines[: len(lines) // 2]
    (tmp_path / "cells.jsonl").write_bytes(b"".join(kept) + lines[len(kept)][:40])  # cut within a line
    asked = []
    plain = comparison.evaluate
    monkeypatch.setattr(
        comparison, "evaluate", lambda *call, **options: asked.append(1) or plain(*call, **options)
    )
    again = compare(vlm, tmp_path)
    assert again.table.equals(whole.table)
    assert len(asked) == len(lines) - len(kept)
    asked.clear()
    assert compare(vlm, tmp_path).table.equals(whole.table)
    assert not asked
    assert (tmp_path / "defences.csv").read_bytes() == (folder / "defences.csv").read_bytes()


def test_a_folder_of_another_comparison_is_refused(compared, vlm):
    _, folder = compared
    with pytest.raises(ValueError, match="holds another comparison"):
        compare(vlm, folder, limit=3)


def test_an_unknown_method_is_refused(vlm, tmp_path):
    with pytest.raises(ValueError, match=r"method 'magic' is not known; use some of vlm_guard, stream"):
        compare(vlm, tmp_path, methods=["magic"])


def test_a_broken_line_is_named(vlm, compared, tmp_path):
    _, folder = compared
    (tmp_path / "cells.jsonl").write_bytes(b"{broken\n" + (folder / "cells.jsonl").read_bytes())
    with pytest.raises(ValueError, match=r"line 1 of .*cells.jsonl is damaged"):
        compare(vlm, tmp_path)


def test_shuffled_labels_leave_nothing_to_find():
    text, _ = planted(d_model=32)
    shuffled = text.shuffled(1)
    assert sorted(shuffled.labels.tolist()) == sorted(text.labels.tolist())
    assert [prompt.id for prompt in shuffled.prompts] != [prompt.id for prompt in text.prompts]
    for row, prompt in enumerate(shuffled.prompts):
        there = [one.id for one in text.prompts].index(prompt.id)
        assert (shuffled.data[:, row] == text.data[:, there]).all()

    def gap(states):
        harmful, harmless, _ = states.groups()
        return (harmful.mean(1) - harmless.mean(1)).norm()

    assert gap(shuffled) < 0.5 * gap(text)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_can_be_made_and_chosen(vlm, name, tmp_path):
    prompts = tiny.prompts(pairs=8)
    states = States(
        mg.collect(vlm.llm, prompts, progress=False),
        mg.collect(vlm, prompts.with_image("blank"), progress=False),
    )
    one = Comparison(vlm, prompts, prompts, {}, tmp_path, progress=False)
    one.states = states
    for setting in one.settings(METHODS[name])[:2]:
        guard = METHODS[name].make(states, setting)
        guard.check(vlm)
        answers = mg.generate(
            vlm, prompts[:2].with_image("blank"), guard=guard, max_new_tokens=2, progress=False
        )
        assert len(answers) == 2


def test_the_first_tokens_are_those_of_the_plain_model(vlm, prompts):
    import torch

    sent = prompts[:5].with_image("blank")
    found = mg.predict_next_tokens(vlm, sent, progress=False, batch_size=2)
    with torch.no_grad():
        plain = vlm.hf_model(**vlm.encode(list(sent))).logits[:, -1].log_softmax(-1)
    assert torch.allclose(found, plain, atol=1e-4)
    ssd = mg.fit_directions(mg.collect(vlm.llm, prompts, progress=False))
    guard = mg.vlm_guard(ssd, layers=[1, 2], alpha=3.0, gate="always", source="llm")
    moved = mg.predict_next_tokens(vlm, sent, guard=guard, progress=False)
    with torch.no_grad(), guard.attach(vlm, sent):
        hooked = vlm.hf_model(**vlm.encode(list(sent))).logits[:, -1].log_softmax(-1)
    assert torch.allclose(moved, hooked, atol=1e-4)


def test_the_command_writes_the_table_and_the_figure(tmp_path):
    from typer.testing import CliRunner

    from mechguard.cli import app

    folder = tiny.save_llava(tmp_path / "model")
    data = tiny.write_study_data(tmp_path / "data")
    words = [
        "compare",
        str(folder),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
        "--limit",
        "2",
        "-q",
    ]
    done = CliRunner().invoke(app, [*words, "--method", "cmrm_sample"])
    assert done.exit_code == 0, done.output
    assert "cmrm_sample" in done.stdout
    table = mg.Result.load(tmp_path / "out" / "defences").table
    assert set(table["guard"]) == {"none", "cmrm_sample"}
    assert (tmp_path / "out" / "defences.html").is_file()
