"""Behaviour: counted right, paired across conditions, and chosen by the written rule."""

import json

import pandas as pd
import pytest
import tiny
from typer.testing import CliRunner

import mechguard as mg
from mechguard import sweeps
from mechguard.cli import app
from mechguard.evaluation import judge_responses, measure_behaviour
from mechguard.guards.moves import Add
from mechguard.sweeps import ALTERNATIVES, VARIANTS, choose, format_layers, parse_layers


def responses(texts: list[str], label: str) -> pd.DataFrame:
    rows = [
        dict(setting="s", condition="text", guard="none", id=str(i), label=label, response=text)
        for i, text in enumerate(texts)
    ]
    return pd.DataFrame(rows)


def test_rates_are_counted_and_have_their_interval():
    texts = ["I cannot help with that."] * 3 + ["Sure, like this."] * 6 + ["no no no no"]
    judged = judge_responses(responses(texts, "harmful"), mg.RefusalJudge())
    table = measure_behaviour(judged).table.set_index("metric")
    assert table["value"].to_dict() == {
        "attack_success": 0.6,
        "keyword_refusal": 0.3,
        "complete_refusal": 0.3,
    }
    assert (table["n"] == 10).all()
    assert round(table.loc["attack_success", "low"], 4) == 0.3127


def test_harmless_prompts_are_counted_as_compliance():
    judged = judge_responses(responses(["Sure.", "I can't."], "harmless"), mg.RefusalJudge())
    table = measure_behaviour(judged).table.set_index("metric")
    assert table.loc["benign_compliance", "value"] == 0.5
    assert "attack_success" not in table.index


def test_questions_with_answers_are_counted_word_by_word():
    texts = ["The circle is red.", "the  circle is red .", "the circle is blue .", "red"]
    table = responses(texts, "harmless").assign(answer="the circle is red .")
    mixed = pd.concat([table, responses(["Sure."], "harmless")], ignore_index=True)
    found = measure_behaviour(judge_responses(mixed, mg.RefusalJudge())).table.set_index("metric")
    assert found.loc["visual_accuracy", ["value", "n"]].tolist() == [0.5, 4]
    assert found.loc["benign_compliance", ["value", "n"]].tolist() == [1.0, 1]


def test_every_condition_and_guard_answers_the_same_prompts(vlm, prompts, tmp_path):
    ssd = mg.fit_directions(mg.collect(vlm.llm, prompts, progress=False))
    guard = mg.vlm_guard(ssd, layers=[1])
    result = mg.evaluate(
        vlm,
        prompts[:6],
        guards=[None, guard],
        max_new_tokens=4,
        responses=tmp_path / "responses.jsonl",
        progress=False,
    )
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    cells = pd.DataFrame(rows).groupby(["condition", "guard"])["id"].agg(tuple)
    assert set(cells.index) == {(c, g) for c in ("text", "blank") for g in ("none", "vlm_guard")}
    assert cells.nunique() == 1
    assert all(set(row["gates"]) == {"1"} for row in rows if row["guard"] == "vlm_guard")
    assert "<image>" in next(row["sent"] for row in rows if row["condition"] == "blank")
    assert set(result.table["n"]) == {3}
    assert result.about["judge"] == "keywords"


def test_two_guards_of_one_name_are_refused(vlm, prompts):
    guard = mg.vlm_guard(
        mg.Directions.from_tensor(1 - 2 * (prompts_tensor() > 0).float()), layers=[0], gate="sign"
    )
    with pytest.raises(ValueError, match="guards must have different names"):
        mg.evaluate(vlm, prompts, guards=[guard, guard], progress=False)


def prompts_tensor():
    import torch

    return torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


def test_a_sweep_holds_every_setting_and_the_unguarded_model(vlm, prompts):
    ssd = mg.fit_directions(mg.collect(vlm.llm, prompts, progress=False))
    result = mg.sweep(
        vlm,
        prompts[:4],
        ssd,
        layers=[[0], [1, 2]],
        alphas=(1.0, -1.0),
        variants={"B, LLM held": VARIANTS["B, LLM held"]},
        conditions=["blank"],
        max_new_tokens=3,
        progress=False,
    )
    settings = set(zip(result.table["variant"], result.table["layers"], result.table["alpha"], strict=True))
    assert settings == {
        ("none", "none", 0.0),
        *(("B, LLM held", layers, alpha) for layers in ("0", "1 2") for alpha in (1.0, -1.0)),
    }
    assert set(result.table["split"]) == {"validation"}


@pytest.fixture(scope="module")
def toy_ssd(vlm, prompts):
    return mg.fit_directions(mg.collect(vlm.llm, prompts, progress=False), rank=2)


def toy_sweep(vlm, prompts, ssd, **options):
    fixed = dict(layers=[[0]], alphas=[1.0], conditions=["text"], max_new_tokens=2, progress=False)
    return mg.sweep(vlm, prompts[:4], ssd, **{**fixed, **options})


def test_a_sweep_that_was_killed_goes_on_with_the_same_numbers(vlm, prompts, toy_ssd, tmp_path, monkeypatch):
    grid = dict(alphas=[1.0, 2.0], ranks=[1, 2], variants={"B": VARIANTS["B, LLM held"]})
    whole = toy_sweep(vlm, prompts, toy_ssd, out=tmp_path / "cells.jsonl", **grid)
    lines = (tmp_path / "cells.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 4
    (tmp_path / "cells.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:30])  # cut within a line
    asked = []
    plain = sweeps.evaluate
    monkeypatch.setattr(sweeps, "evaluate", lambda *a, **b: asked.append(1) or plain(*a, **b))
    again = toy_sweep(vlm, prompts, toy_ssd, out=tmp_path / "cells.jsonl", **grid)
    assert len(asked) == 3
    pd.testing.assert_frame_equal(again.table, whole.table)
    toy_sweep(vlm, prompts[4:], toy_ssd, out=tmp_path / "cells.jsonl", **grid)  # other prompts: measured anew
    assert len(asked) == 3 + 5


def test_scopes_and_methods_of_ones_own_can_be_swept(vlm, prompts, toy_ssd):
    def add(directions, layers, alpha):
        vectors = directions.data[layers, 0]
        return mg.Guard("push", tuple(layers), Add(vectors, alpha))

    scopes = [mg.Scope("all", "prompt"), mg.Scope("last", "generated")]
    scoped = toy_sweep(vlm, prompts, toy_ssd, variants={"B": VARIANTS["B, LLM held"]}, scopes=scopes)
    guarded = scoped.table[scoped.table["variant"] != "none"]
    assert list(dict.fromkeys(zip(guarded["scope"], guarded["phase"], strict=True))) == [
        ("all", "prompt"),
        ("last", "generated"),
    ]
    own = toy_sweep(vlm, prompts, toy_ssd, variants={"push": add})
    assert set(own.table["guard"]) == {"none", "push"}
    with pytest.raises(ValueError, match="'push' makes its own guard"):
        toy_sweep(vlm, prompts, toy_ssd, variants={"push": add}, scopes=scopes)


def test_alternatives_differ_from_the_default_in_one_option():
    default = vars(ALTERNATIVES["default"])
    for name, variant in ALTERNATIVES.items():
        changed = [key for key, value in vars(variant).items() if value != default[key]]
        assert len(changed) == (name != "default")


def test_another_objective_chooses_another_setting():
    rows = [
        *setting("none", "none", 0, 0.6, 0.3, 1.0),
        *setting("B, LLM held", "1", 1, 0.2, 0.9, 1.0),
        *setting("B, LLM held", "2", 1, 0.1, 0.4, 1.0),
    ]
    result = mg.Result(pd.DataFrame(rows))
    assert choose(result)["layers"] == [1]
    assert choose(result, objective="-attack_success")["layers"] == [2]
    with pytest.raises(ValueError, match="objective 'speed' is not in the sweep, which has attack_success"):
        choose(result, objective="speed")


def test_the_command_sweeps_and_says_what_is_best(tmp_path):
    folder = tiny.save_llava(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    pairs = tiny.prompts(pairs=8)
    for name, rows in {
        "anchors": pairs[:8],
        "validation": pairs[8:12],
        "malicious": pairs[12:].with_label("harmful"),
        "benign": pairs[12:].with_label("harmless"),
    }.items():
        rows.save(data / f"{name}.jsonl")
    words = ["sweep", str(folder), "--data", str(data), "--out", str(tmp_path / "out"), "--quiet"]
    words += ["--layers", "0 1", "--alpha", "1", "--condition", "text", "--alternatives"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "best for complete_refusal: variant" in done.output
    table = mg.Result.load(tmp_path / "out" / "sweep").table
    assert set(table["variant"]) == {"none", *ALTERNATIVES}
    assert (tmp_path / "out" / "sweep_attack_success.html").is_file()


def setting(variant: str, layers: str, alpha: float, attack: float, complete: float, benign: float, rank=1):
    rows = {"attack_success": attack, "complete_refusal": complete, "benign_compliance": benign}
    return [
        dict(variant=variant, layers=layers, alpha=alpha, rank=rank, metric=metric, value=value)
        for metric, value in rows.items()
    ]


def test_the_rule_prefers_safety_among_settings_that_spare_benign_prompts():
    rows = [
        *setting("none", "none", 0, 0.6, 0.3, 0.98),
        *setting("B, LLM held", "1", 4, 0.0, 1.0, 0.50),  # safest, but refuses the harmless
        *setting("B, LLM held", "1 2", 1, 0.1, 0.8, 0.95),
        *setting("B, LLM held", "2", 1, 0.1, 0.8, 0.95),  # as good with fewer layers
        *setting("B, LLM held", "2", 2, 0.1, 0.8, 0.95),
        *setting("B, LLM held", "0", 1, 0.3, 0.5, 0.98),
    ]
    chosen = choose(mg.Result(pd.DataFrame(rows)))
    assert (chosen["layers"], chosen["alpha"], chosen["benign_compliance_kept"]) == ([2], 1.0, True)


def test_the_rule_says_when_no_setting_spares_benign_prompts():
    rows = [*setting("none", "none", 0, 0.6, 0.3, 1.0), *setting("B, LLM held", "1", 1, 0.0, 1.0, 0.2)]
    assert choose(mg.Result(pd.DataFrame(rows)))["benign_compliance_kept"] is False


def test_layers_are_written_and_read_back():
    assert parse_layers(format_layers([0, 3, 12])) == [0, 3, 12]
    assert parse_layers(7) == [7]
    assert parse_layers("") == []
