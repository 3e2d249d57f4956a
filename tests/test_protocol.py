"""The protocol: every cell there, killed and resumed to the same tables, judged again without a model."""

import json
import os
import sys
from pathlib import Path

import pandas as pd
import pytest
import tiny
from typer.testing import CliRunner

import mechguard as mg
from mechguard import protocol, tracing
from mechguard.cli import app
from mechguard.judging import judge_run
from mechguard.protocol import Options, load_settings, run_protocol

OPTIONS = Options(
    guards=("vlm_guard, at the prompt", "self_reminder"),
    conditions=("text", "blank", "noise"),
    limit=4,
    validation_limit=2,
    max_new_tokens=3,
)
JUDGES = ("keywords", "qi", "coherence")
TABLES = ("results/behaviour.csv", "results/judges.csv", "results/agreement.csv", "results/quality.csv")


@pytest.fixture(scope="module", autouse=True)
def openings():
    """The toy vocabulary has no words that refusals of large models begin with."""
    patch = pytest.MonkeyPatch()
    patch.setattr(protocol, "REFUSAL_OPENINGS", ("sorry", "i"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tiny.write_study_data(tmp_path_factory.mktemp("data") / "d", pairs=6)
    harmful = tiny.prompts(pairs=5).with_label("harmful")
    harmful.with_template("please {query}").save(folder / "jailbreak.jsonl")
    return folder


def run(vlm, data, out, **options):
    return run_protocol(vlm, out=out, data=data, judges=JUDGES, options=OPTIONS, progress=False, **options)


@pytest.fixture(scope="module")
def finished(vlm, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return run(vlm, data, folder), folder


def tables(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TABLES}


def test_the_same_prompts_stand_in_every_cell(finished):
    _, folder = finished
    responses = mg.read_responses(folder / "responses.jsonl")
    cells = responses.groupby(["setting", "condition", "guard"])["id"].agg(lambda ids: tuple(sorted(ids)))
    guards = {"none", "vlm_guard, at the prompt", "vlm_guard, at the prompt; random 1", "self_reminder"}
    wanted = {
        (setting, condition, guard)
        for setting in ("malicious", "jailbreak", "benign")
        for condition in ("text", "blank", "noise")
        for guard in guards
    }
    assert set(cells.index) == wanted
    assert (cells.groupby("setting").nunique() == 1).all()
    assert (cells.map(len) == 4).all()
    assert {"refusal_log_odds", "kl_first_token", "seconds", "tokens", "gates", "sent"} <= set(responses)


def test_every_table_is_there(finished):
    result, folder = finished
    assert set(result.table["judge"]) == {"keywords", "keywords qi", "coherence"}
    behaviour = mg.Result.load(folder / "results/behaviour")
    assert set(behaviour.table["metric"]) >= {"attack_success", "complete_refusal", "benign_compliance"}
    assert behaviour.about["judge"] == "keywords"
    quality = mg.Result.load(folder / "results/quality").table
    assert {"perplexity", "repetition", "length", "kl_first_token", "refusal_log_odds"} <= set(
        quality["metric"]
    )
    plain = quality[(quality["guard"] == "none") & (quality["metric"] == "kl_first_token")]
    assert (plain["value"] == 0).all()
    agreement = mg.Result.load(folder / "results/agreement").table
    assert set(zip(agreement["first"], agreement["second"], strict=True)) == {("keywords", "keywords qi")}
    missing = json.loads((folder / "protocol.json").read_text())["missing"]
    assert missing == ["multimodal", "over_refusal", "benign_multimodal", "questions"]
    chosen = json.loads((folder / "chosen.json").read_text())["vlm_guard, at the prompt"]
    saved = next(iter((folder / "guards").glob("vlm_guard__at_the_prompt-*.json")))
    assert list(mg.Guard.load(saved).layers) == chosen["layers"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [10, 40])
def test_a_run_that_was_stopped_ends_in_the_same_tables(finished, vlm, data, tmp_path, monkeypatch, after):
    left = [after]

    def stop_after(plain):
        def call(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return plain(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("_plain_responses", "_guarded_responses"):
            patch.setattr(tracing, name, stop_after(getattr(tracing, name)))
        with pytest.raises(Killed):
            run(vlm, data, tmp_path)
    for file in tmp_path.glob("*.jsonl"):
        with file.open("ab") as stream:
            stream.write(b'{"key": "cut of')
    run(vlm, data, tmp_path)
    assert tables(tmp_path) == tables(finished[1])


def test_a_finished_run_answers_and_judges_nothing_again(finished, vlm, data, monkeypatch):
    before = tables(finished[1])
    monkeypatch.setattr(tracing, "_plain_responses", None)
    monkeypatch.setattr(tracing, "_guarded_responses", None)
    run(vlm, data, finished[1])
    assert tables(finished[1]) == before


def test_a_folder_of_another_run_is_refused(finished, vlm, data):
    with pytest.raises(ValueError, match="holds a run with another .*options"):
        run_protocol(
            vlm, out=finished[1], data=data, options=Options(seed=1, guards=(), conditions=("text",))
        )


def copied(folder: Path, target: Path) -> Path:
    for name in ("responses.jsonl", "responses.json", "protocol.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


def test_a_run_is_judged_again_from_its_folder_alone(finished, tmp_path):
    whole, folder = finished
    again = judge_run(copied(folder, tmp_path), JUDGES, progress=False)
    assert again.table.equals(whole.table)
    for name in TABLES[:3]:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_judge_that_was_stopped_goes_on(finished, tmp_path, monkeypatch):
    _, folder = finished
    asked = []

    def slow(request, response):
        asked.append(response)
        if len(asked) == 70:
            raise Killed
        return len(response) % 2 == 0

    with pytest.raises(Killed):
        judge_run(copied(folder, tmp_path), [slow], progress=False)
    judge_run(tmp_path, [slow], progress=False)
    total = len(mg.read_responses(folder / "responses.jsonl"))
    assert len(asked) == total + 70 - 64  # the first 64 were kept


def test_labels_by_hand_stand_among_the_judges(finished, tmp_path):
    _, folder = finished
    copied(folder, tmp_path)
    done = CliRunner().invoke(app, ["judge", str(tmp_path), "--sample", str(tmp_path / "s.csv"), "-n", "12"])
    assert done.exit_code == 0, done.output
    sample = pd.read_csv(tmp_path / "s.csv", dtype=str)
    sample["complied"] = ["yes", "no"] * 6
    sample.to_csv(tmp_path / "s.csv", index=False)
    words = ["judge", str(tmp_path), "--judge", "keywords", "--labels", str(tmp_path / "s.csv"), "-q"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    agreement = mg.Result.load(tmp_path / "results/agreement").table
    assert agreement[["first", "second", "n"]].drop_duplicates().to_numpy().tolist() == [
        ["keywords", "by hand", 12]
    ]


def test_a_run_without_verdicts_wants_a_judge(finished, tmp_path):
    with pytest.raises(ValueError, match="holds no verdicts yet; name a judge"):
        judge_run(copied(finished[1], tmp_path), [], progress=False)


def test_settings_come_from_public_sets_and_from_the_organism():
    organism = load_settings(mg.datasets.packaged_folder("organism"), 20)
    assert list(organism) == [
        "malicious",
        "jailbreak",
        "multimodal",
        "benign",
        "benign_multimodal",
        "questions",
    ]
    assert {len(prompts) for prompts in organism.values()} == {20}
    assert set(organism["multimodal"].labels) == {"harmful"}
    assert "MECHGUARD_DATA" not in os.environ or load_settings(Path(os.environ["MECHGUARD_DATA"]))


def test_a_folder_without_benign_prompts_is_refused(tmp_path):
    tiny.prompts(pairs=2).with_label("harmful").save(tmp_path / "malicious.jsonl")
    with pytest.raises(ValueError, match="holds no prompts named 'benign'"):
        load_settings(tmp_path)


def test_an_unknown_guard_is_refused(vlm, data, tmp_path):
    with pytest.raises(ValueError, match="guard 'magic' is not known"):
        run_protocol(vlm, out=tmp_path, data=data, options=Options(guards=("magic",)))


def test_a_run_becomes_an_inspect_log(finished, tmp_path):
    pytest.importorskip("inspect_ai")
    from inspect_ai.log import read_eval_log

    _, folder = finished
    done = CliRunner().invoke(app, ["export", str(folder), "--out", str(tmp_path / "run.eval")])
    assert done.exit_code == 0, done.output
    log = read_eval_log(str(tmp_path / "run.eval"))
    responses = mg.read_responses(folder / "responses.jsonl").set_index("key")
    assert log.status == "success"
    assert {sample.id for sample in log.samples} == set(responses.index)
    table = mg.Result.load(folder / "results/behaviour").table
    row = table[table["metric"] == "attack_success"].iloc[0]
    name = f"{row['setting']} / {row['condition']} / {row['guard']} / attack_success"
    assert log.results.scores[0].metrics[name].value == row["value"]
    hits = [
        sample.scores["keywords"].value
        for sample in log.samples
        if (sample.metadata["setting"], sample.metadata["condition"], sample.metadata["guard"])
        == (row["setting"], row["condition"], row["guard"])
    ]
    assert sum(hits) / len(hits) == row["value"]
    sample = log.samples[0]
    assert sample.output.completion == responses.loc[sample.id, "response"]
    assert sample.metadata["sent"] == responses.loc[sample.id, "sent"]
    with pytest.raises(ValueError, match=r"an Inspect log is a \.eval or a \.json file"):
        mg.export_inspect_log(folder, tmp_path / "run.txt")


def test_without_inspect_the_extra_is_named(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "inspect_ai.log", None)
    with pytest.raises(ValueError, match=r"install mechguard\[inspect\]"):
        mg.export_inspect_log(finished[1], tmp_path / "run.eval")
