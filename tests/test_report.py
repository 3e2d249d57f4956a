"""The report says what the tables say, escapes what models say, and needs nothing but its folder."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pretend
import pytest

import mechguard.summary as summary
from mechguard.errors import MechguardError
from mechguard.report import (
    StudyFolder,
    sample_responses,
    summarise_study,
    three_numbers,
    write_figures,
    write_report,
)
from mechguard.result import Result
from mechguard.storage import write_json, write_text
from mechguard.summary import headline, summarise


class Page(HTMLParser):
    """What a browser would make of a page: its tags, its text, and its scripts apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        inside = self.cdata_elem
        (self.scripts if inside == "script" else self.texts).append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretend.write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def page(study: Path) -> Page:
    return Page(write_report(study).read_text())


def summary_of(folder: Path) -> list[str]:
    return summarise_study(StudyFolder.read(folder))


def changed(folder: Path, **results: pd.DataFrame) -> Path:
    """The pretend study with other tables."""
    pretend.write_study(folder)
    for name, table in results.items():
        Result(table).save(folder / "results" / name)
    return folder


def test_the_report_lies_in_its_folder_and_asks_nothing_of_the_network(study: Path, page: Page):
    assert (study / "report.html").is_file()
    loaded = [attrs.get("src") or attrs.get("href") for _, attrs in page.tags]
    assert all(address is None or address.startswith("#") for address in loaded)
    assert not any(tag in ("link", "img", "iframe") for tag, _ in page.tags)


def test_the_report_can_be_written_elsewhere(study: Path, tmp_path: Path):
    assert write_report(study, out=tmp_path / "page.html") == tmp_path / "page.html"
    assert (tmp_path / "page.html").is_file()


def test_the_report_shows_every_figure_and_holds_plotly_once(page: Page):
    drawn = [attrs["id"] for tag, attrs in page.tags if "plotly-graph-div" in str(attrs.get("class"))]
    assert drawn == [
        "figure-behaviour",
        "figure-pareto",
        "figure-layer-sweep",
        "figure-layer-sweep-dprime",
        "figure-transfer",
        "figure-angles",
        "figure-modality-gap",
        "figure-shift",
        "figure-state-map",
        "figure-projections",
        "figure-gates",
        "figure-gate-curves",
        "figure-tokens",
        "figure-sweep-attack-success",
        "figure-sweep-benign-compliance",
    ]
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1


def test_scripts_in_prompts_responses_and_names_show_as_text(page: Page):
    assert "pretend <script>alert(1)</script>: safety" in page.text
    assert "harmful question 0 <script>alert(1)</script>" in page.text
    assert "vlm_guard says <script>alert(1)</script> to question 0" in page.text
    assert not any(script.strip() == "alert(1)" for script in page.scripts)
    assert all("&lt;script&gt;" not in text for text in page.texts)  # not escaped twice either
    map_script = next(script for script in page.scripts if '"figure-state-map"' in script[:2000])
    assert "alert(1)" in map_script
    assert "<script" not in map_script


def test_the_summary_gives_the_loss_with_intervals_and_n(page: Page):
    assert (
        "Harmful prompts are answered 8% (95% interval 0 to 16%, n = 100) of the time as text alone, and "
        "52% (95% interval 44 to 60%, n = 100) beside a blank image: a change of +44 points (95% "
        "interval +33.1 to +53.1, corrected p < 0.001)."
    ) in page.text


def test_the_summary_sets_the_guard_beside_its_random_controls(page: Page):
    assert "Beside a blank image with vlm_guard they are answered 7%" in page.text
    assert "They are refused completely 83.7% (95% interval 75.7 to 91.7%, n = 100) with it" in page.text
    assert "With 2 random subspaces in place of the fitted one: 50% (" in page.text
    assert "each answers more than the guard does" in page.text
    assert "Harmless prompts beside a blank image are answered 96%" in page.text


def test_the_summary_says_that_a_direction_has_moved(page: Page):
    assert "the AUROC falls from 0.970 in text to 0.620 beside a blank image at layer 5" in page.text
    assert (
        "a change of -0.350 (95% interval -0.450 to -0.250) of the same prompts, for all layers" in page.text
    )
    assert "shuffled labels give 0.400 to 0.600. A fall is shown at layers 2-5." in page.text
    assert "At layers 2-5 the distinction has moved" in page.text


def test_a_collapse_is_told_from_a_move(tmp_path: Path):
    table = pretend.transfer().table
    own = table["direction"] == "own, held out"
    beside = ~table["condition"].str.endswith("text")
    changes = own & beside & (table["metric"] == "auroc_change")
    table.loc[changes, ["value", "low", "high"]] = -0.3, -0.4, -0.2
    table.loc[table["metric"] == "auroc_recovered", ["value", "low", "high"]] = 0.0, -0.1, 0.1
    judged = summary.judge_layers(table)
    assert set(judged[judged["condition"] == "vlm blank"]["verdict"]) == {"kept", "weakened"}
    table.loc[own & beside & (table["metric"] == "auroc"), "low"] = 0.4
    judged = summary.judge_layers(table)
    assert set(judged[judged["condition"] == "vlm blank"]["verdict"]) == {"kept", "collapsed"}
    text = " ".join(summarise(pretend.behaviour().table, transfer=table))
    assert "At layers 2-5 the distinction has collapsed" in text
    table.loc[changes, "high"] = 0.1
    text = " ".join(summarise(pretend.behaviour().table, transfer=table))
    assert "At layers 2-5 whether it moved or collapsed is not shown" in text


def test_a_fall_that_is_not_shown_is_said_not_to_be():
    table = pretend.transfer().table
    table.loc[table["metric"] == "auroc_change", "high"] = 0.5
    text = " ".join(summarise(pretend.behaviour().table, transfer=table))
    assert "a fall of the AUROC beside a blank image is not shown at any layer" in text
    assert "which holds zero" in text


def test_the_summary_says_how_much_of_the_shift_concerns_safety(page: Page):
    assert "the safety subspace holds 60% (95% interval 52 to 68%, n = 100) at layer 5" in page.text
    assert "a random subspace of equal rank holds 2 to 18%" in page.text
    assert "Along the first direction it points towards harmful (+0.60" in page.text


def test_the_summary_sets_the_two_gates_side_by_side(page: Page):
    assert "best at layer 5 (llm text: AUROC 0.950" in page.text
    assert "the uncentred gate opens for 95%" in page.text


def test_the_paired_differences_are_a_table(page: Page):
    assert re.search(r"Paired differences, \d+ tests", page.text)
    assert "Attack success blank, none text, none +44 points" in page.text


def test_without_a_transfer_the_layers_are_compared_unpaired(tmp_path: Path):
    folder = pretend.write_study(tmp_path, leave_out=("transfer", "responses", "modality_gap", "gates"))
    loss, _, _, layers = summary_of(folder)
    assert "a change of +44 points (95% interval +32.7 to +55.3)." in loss  # sqrt(8^2 + 8^2) = 11.3
    assert "differs from that of text at layers 2-5, layer by layer" in layers
    assert "largest at layer 5, 0.970 in text and 0.620 beside the picture" in layers
    assert "Along the states' own direction, held out, it is 0.960 there" in layers


def test_what_crosses_zero_is_not_called_a_difference(tmp_path: Path):
    behaviour, separability = pretend.behaviour().table, pretend.separability().table
    for table in (behaviour, separability):
        table["low"], table["high"] = 0.0, 1.0
    folder = changed(tmp_path, behaviour=behaviour, separability=separability)
    for lost in ("transfer", "modality_gap", "gates"):
        (folder / "results" / f"{lost}.csv").unlink()
    (folder / "responses.jsonl").unlink()
    loss, guard, benign, layers = summary_of(folder)
    assert loss.endswith(f"{summary.NOT_SHOWN}.")
    assert guard.count(summary.NOT_SHOWN) == 2
    assert "for 2 of 2 more answers than with the guard are not shown" in guard
    assert benign.endswith(f"{summary.NOT_SHOWN}.")
    assert "is not shown to differ from that of text at any layer" in layers


def test_several_settings_are_summarised_one_by_one(tmp_path: Path):
    one = pretend.behaviour().table
    both = pd.concat([one, one.assign(setting="jailbreak", value=0.42)])
    paragraphs = summary_of(changed(tmp_path, behaviour=both))
    assert any(text.startswith("Harmful prompts of jailbreak are answered") for text in paragraphs)
    table = headline(both)
    assert table["columns"][:2] == ["Attack success, test", "Attack success, jailbreak"]
    assert [cell.percent for cell in table["rows"][0]["cells"][:2]] == ["8%", "42%"]


def test_the_headline_table_has_a_row_per_condition_and_guard():
    table = headline(pretend.behaviour().table)
    assert table["columns"] == [
        "Attack success",
        "Complete refusal",
        "Keyword refusal",
        "Benign compliance",
    ]
    assert len(table["rows"]) == len(pretend.CONDITIONS) * len(pretend.GUARDS)
    row = next(r for r in table["rows"] if (r["condition"], r["guard"]) == ("blank", "projection"))
    assert row["cells"][0].words == "70% (95% interval 62 to 78%, n = 100)"


def test_the_report_is_of_the_test_split(tmp_path: Path):
    validation = pretend.behaviour().table.assign(split="validation", value=0.33)
    both = pd.concat([validation, pretend.behaviour().table])
    folder = changed(tmp_path, behaviour=both)
    assert "33%" not in " ".join(summary_of(folder))
    assert set(StudyFolder.read(folder).reported("behaviour").table["split"]) == {"test"}


def test_responses_are_spread_over_the_prompts_with_their_verdicts():
    samples = sample_responses(pd.DataFrame(pretend.responses(count=30)))
    assert [sample["guard"] for sample in samples] == ["vlm_guard", "projection", "random 1", "random 2"]
    assert {sample["condition"] for sample in samples} == {"blank"}
    rows = samples[0]["rows"]
    assert [row["id"] for row in rows] == [f"harmful-{2 * n}" for n in range(12)]
    assert (rows[0]["verdict_before"], rows[0]["verdict_after"]) == ("answered", "refused")
    assert samples[1]["rows"][0]["verdict_after"] == "refused, incompletely"


def test_an_empty_response_is_seen_to_be_empty(tmp_path: Path):
    folder = pretend.write_study(tmp_path)
    rows = [{**row, "response": ""} for row in pretend.responses(count=1)]
    write_text(folder / "responses.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert Page(write_report(folder).read_text()).text.count("(empty)") == 2 * (len(pretend.GUARDS) - 1)


def test_the_choice_of_the_guard_and_the_command_are_in_the_report(page: Page):
    assert "Chosen: B, LLM held, layers 2, 3, 4, alpha 1." in page.text
    assert "mechguard study pretend --out runs/pretend" in page.text
    assert "torch 2.13.0" in page.text
    assert "judge: keywords" in page.text
    assert "settings: limit not limited" in page.text


def test_a_choice_that_cost_benign_compliance_is_marked(study: Path, tmp_path: Path):
    facts = {**pretend.FACTS, "chosen": {**pretend.FACTS["chosen"], "benign_compliance_kept": False}}
    pretend.write_study(tmp_path)
    write_json(tmp_path / "study.json", facts)
    assert "no setting of the guard kept benign compliance" in write_report(tmp_path).read_text()
    assert "no setting of the guard kept" not in write_report(study).read_text()


def test_what_was_not_measured_is_left_out(tmp_path: Path):
    missing = (*(name for name in pretend.RESULTS if name != "behaviour"), "responses", "study")
    folder = pretend.write_study(tmp_path, leave_out=missing)
    found = Page(write_report(folder).read_text())
    headings = {attrs.get("id") for tag, attrs in found.tags if tag == "section"}
    assert headings == {"numbers", "summary", "behaviour", "choice", "methods", "limitations", "reproduce"}
    links = {str(attrs["href"])[1:] for tag, attrs in found.tags if tag == "a"}
    assert links == headings - {"numbers", "summary"}
    assert "pretend: safety with and without an image" in found.text


def test_a_folder_without_behaviour_is_refused_and_nothing_is_written(tmp_path: Path):
    folder = pretend.write_study(tmp_path, leave_out=("behaviour",))
    for write in (write_report, write_figures):
        with pytest.raises(MechguardError, match=r"no results/behaviour\.csv"):
            write(folder)
    assert not (folder / "report.html").exists()
    assert not (folder / "figures").exists()


def test_broken_responses_are_named(tmp_path: Path):
    folder = pretend.write_study(tmp_path)
    (folder / "responses.jsonl").write_text('{"id": 1}\n{"id"')
    with pytest.raises(MechguardError, match=r"line 1 of .*responses\.jsonl is damaged"):
        write_report(folder)


def test_figures_are_pages_that_share_one_plotly(study: Path):
    written = write_figures(study)
    assert [path.name for path in written][:3] == ["behaviour.html", "behaviour.csv", "layer_sweep.html"]
    assert {path.name for path in (study / "figures").iterdir()} == {
        *(path.name for path in written),
        "plotly.min.js",
    }
    assert all(path.stat().st_size < 500_000 for path in written)
    points = pd.read_csv(study / "figures" / "state_map.csv")
    assert len(points) == len(pretend.states())


def test_the_report_opens_with_three_numbers_and_their_intervals(page: Page):
    assert "8% → 52% of harmful prompts answered: as text, then under the condition “blank”" in page.text
    assert "52% → 7% of them answered" in page.text
    assert "99% → 96% of harmless prompts answered" in page.text
    assert "95% intervals 44% to 60%, then 0% to 15%; n = 100" in page.text


def test_a_number_without_its_guard_is_left_out():
    plain = pretend.behaviour().where(guard="none").table
    assert [number["after"] for number in three_numbers(plain)] == ["52%"]
    assert three_numbers(plain[plain["condition"] == "text"]) == []


def test_the_report_names_the_data_and_their_licences(page: Page):
    assert "anchors 200 pairs by hand a journal <b>Doe 2024</b> MIT" in page.text
    assert "validation 80 not recorded not recorded not recorded" in page.text


def test_one_bar_sets_the_layer_of_every_figure_that_has_layers(study: Path, page: Page):
    bar = next(attrs for tag, attrs in page.tags if tag == "input")
    assert bar["data-layers"] == ",".join(map(str, pretend.LAYERS))
    ways = {
        name: (figure.layout.meta or {}).get("layer")
        for name, figure in StudyFolder.read(study).figures.items()
    }
    assert {name: way for name, way in ways.items() if way} == {
        "layer_sweep": "x",
        "layer_sweep_dprime": "x",
        "angles": "x",
        "modality_gap": "x",
        "shift": "x",
        "state_map": "frames",
        "projections": "y",
        "gates": "x",
        "tokens": "frames",
    }


def test_writing_the_report_twice_gives_the_same_bytes(study: Path):
    assert write_report(study).read_bytes() == write_report(study).read_bytes()


@pytest.mark.parametrize(
    ("layers", "text"), [([1, 2, 3, 6], "1-3, 6"), ([4], "4"), ([], ""), ([0, 2], "0, 2")]
)
def test_layers_are_written_as_ranges(layers: list[int], text: str):
    assert summary._ranges(layers) == text


def test_circuits_have_a_section_where_the_study_has_their_tables(study: Path, page: Page, tmp_path: Path):
    assert "Circuits" not in page.text
    folder = pretend.write_study(tmp_path / "study")
    for name, result in pretend.circuits().items():
        result.save(folder / "results" / f"circuits_{name}")
    drawn = {path.stem for path in write_figures(folder) if path.suffix == ".html"}
    assert {"circuits_heads", "circuits_waterfall", "circuits_checks", "circuits_patching"} <= drawn
    text = Page(write_report(folder).read_text()).text
    assert "Circuits: which parts write the direction" in text
    assert "the top 5 components leave" in text
