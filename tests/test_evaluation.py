"""Behaviour: counted right, paired across conditions, and chosen by the written rule."""

import json

import pandas as pd
import pytest

import mechguard as mg
from mechguard.evaluation import judge_responses, measure_behaviour
from mechguard.sweeps import VARIANTS, choose, format_layers, parse_layers


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
