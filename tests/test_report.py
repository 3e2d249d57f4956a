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
from mechguard.report import StudyFolder, sample_responses, three_numbers, write_figures, write_report
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
    study = StudyFolder.read(folder)
    separability = study.reported("separability").table if "separability" in study.results else None
    return summarise(study.reported("behaviour").table, separability)


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
        "figure-modality-gap",
        "figure-state-map",
        "figure-projections",
        "figure-gates",
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
        "52% (95% interval 44 to 60%, n = 100) beside a blank image: a change of +44 points, intervals apart."
    ) in page.text


def test_the_summary_sets_the_guard_beside_its_random_controls(page: Page):
    assert "Beside a blank image with vlm_guard they are answered 7%" in page.text
    assert "They are refused completely 83.7% (95% interval 75.7 to 91.7%, n = 100) with it" in page.text
    assert "With 2 random subspaces in place of the fitted one: 50% (" in page.text
    assert "their intervals are apart from the guard's" in page.text
    assert "Harmless prompts beside a blank image are answered 96%" in page.text


def test_the_summary_names_the_layers_where_the_ssd_loses_its_grip(page: Page):
    assert "differs from that of text at layers 2-5, intervals apart" in page.text
    assert "largest at layer 5, 0.970 in text and 0.620 beside the picture" in page.text
    assert "Along the states' own direction, held out, it is 0.960 there" in page.text


def test_overlapping_intervals_are_not_called_a_difference(tmp_path: Path):
    behaviour, separability = pretend.behaviour().table, pretend.separability().table
    for table in (behaviour, separability):
        table["low"], table["high"] = 0.0, 1.0
    folder = changed(tmp_path, behaviour=behaviour, separability=separability)
    loss, guard, benign, layers = summary_of(folder)
    assert loss.endswith(f"{summary.NOT_SHOWN}.")
    assert f"against the unguarded model, {summary.NOT_SHOWN}" in guard
    assert "of 2 of 2 overlap the guard's, so a part of the fitted direction in this is not shown" in guard
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
    with pytest.raises(MechguardError, match=r"responses\.jsonl is not readable"):
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
        name: (figure.layout.meta or {}).get("layer") for name, figure in StudyFolder.read(study).figures()
    }
    assert {name: way for name, way in ways.items() if way} == {
        "layer_sweep": "x",
        "layer_sweep_dprime": "x",
        "modality_gap": "x",
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
