"""Sentences about circuits say what the tables hold, and no more."""

from __future__ import annotations

import pandas as pd
import pretend
import pytest

from mechguard import plots
from mechguard.errors import MechguardError
from mechguard.findings import components_for_half, describe_circuits
from mechguard.result import Result


def test_a_difference_that_could_be_chance_is_not_called_shown():
    tables = pretend.circuits()
    (said,) = [text for text in describe_circuits(tables) if text.startswith("Set to their mean")]
    assert "-40 points [-60%, -20%], which is shown" in said
    checks = tables["checks"].table
    gap = (checks["choice"] == "top - random") & (checks["metric"] == "refusal")
    checks.loc[gap, "high"] = 0.1
    (said,) = [text for text in describe_circuits(tables) if text.startswith("Set to their mean")]
    assert "not shown, for the interval of the difference holds zero" in said


def test_the_number_of_components_is_not_picked_by_outcome():
    tables = pretend.circuits()
    checks = tables["checks"].table
    checks.loc[(checks["k"] == 2) & (checks["choice"] == "top - random"), "value"] = -1.0
    said = " ".join(describe_circuits(tables))
    assert "the top 5 components" in said
    assert "the top 2 components" not in said


@pytest.mark.parametrize(("values", "half"), [([8.0, 1, 1, 1], 1), ([1.0, -1, 1, -1], 2), ([0.0, 0.0], 2)])
def test_half_of_what_is_written_counts_sizes_not_signs(values, half):
    assert components_for_half(pd.DataFrame({"value": values})) == (half, len(values))


def test_missing_tables_are_passed_over():
    assert describe_circuits({}) == []
    assert len(describe_circuits({"ranking": pretend.circuits()["ranking"]})) == 1


def test_a_heatmap_has_a_cell_for_every_head_and_mlp():
    figure = plots.head_heatmap(pretend.circuits()["ranking"], position="decision")
    assert [list(panel.x) for panel in figure.data] == [["0", "1", "MLP"]] * 2
    assert figure.data[0].z[1][2] == pytest.approx(0.14)
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax


def test_a_waterfall_ends_at_the_whole_and_loses_nothing():
    ranking = pretend.circuits()["ranking"].where(comparison="text - image", position="decision")
    (bars,) = plots.attribution_waterfall(ranking, top=2).data
    assert sum(bars.y[:-1]) == pytest.approx(bars.y[-1]) == pytest.approx(ranking.table["value"].sum())
    with pytest.raises(MechguardError, match="several rows for a component"):
        plots.attribution_waterfall(pretend.circuits()["ranking"])


def test_patching_has_a_panel_for_each_component_and_direction():
    figure = plots.patching(pretend.circuits()["patching"], components=["residual"])
    assert [note.text for note in figure.layout.annotations] == [
        "residual, text → blank",
        "residual, blank → text",
    ]
    assert list(figure.data[0].x) == ["request", "last"]
    with pytest.raises(MechguardError, match="none of the components mlp"):
        plots.patching(pretend.circuits()["patching"], components=["mlp"])


def test_the_other_figures_draw_their_rows():
    tables = pretend.circuits()
    lines = [line for line in plots.logit_lens(tables["lens"]).data if line.name]
    assert [line.name for line in lines] == ["text", "blank", "blank, vlm_guard"]
    checks = plots.component_checks(tables["checks"]).data
    assert list(checks[0].x) == [0, 2, 5]
    assert list(checks[0].y) == [1.0, 0.5, 0.5]
    patches = plots.attention_map(tables["attention_map"], heads=1).data
    assert len(patches) == 1
    assert patches[0].z[0][1] == pytest.approx(0.21)
    with pytest.raises(MechguardError, match=r"circuits\.map_attention"):
        plots.attention_map(Result(pd.DataFrame({"value": [1.0]})))
