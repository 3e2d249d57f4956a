"""Figures draw the rows they are given, and say so when they cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pretend
import pytest

from mechguard import plots
from mechguard.errors import MechguardError
from mechguard.plots import pages, style
from mechguard.result import Result


def separability() -> Result:
    return pretend.separability().where(split="test")


def traces(figure: go.Figure, name: str) -> list[go.Scatter]:
    """The lines (not bands) with this name, panel by panel."""
    return [trace for trace in figure.data if trace.name == name and trace.hovertemplate]


def panel_titles(figure: go.Figure) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]


def test_a_layer_sweep_has_one_panel_per_direction_and_one_line_per_condition():
    figure = plots.layer_sweep(separability())
    assert panel_titles(figure) == [
        "along the LLM's safety steering direction",
        "along the states' own direction, held out",
    ]
    for view in pretend.VIEWS:
        assert [line.xaxis for line in traces(figure, view)] == ["x", "x2"]


@pytest.mark.parametrize("metric", ["auroc", "dprime"])
def test_a_layer_sweep_draws_the_values_of_its_metric_with_n(metric: str):
    result = separability()
    line = traces(plots.layer_sweep(result, metric=metric), "vlm blank")[0]
    rows = result.where(metric=metric, condition="vlm blank", direction=pretend.SSD).table
    assert list(line.x) == list(pretend.LAYERS)
    assert np.allclose(line.y, rows["value"])
    assert np.allclose(line.customdata, rows[["low", "high", "n"]])
    assert "n = " in line.hovertemplate


def test_a_band_runs_along_the_upper_ends_and_back_along_the_lower():
    result = separability()
    figure = plots.layer_sweep(result)
    band = next(t for t in figure.data if t.fill and t.legendgroup == "vlm blank")
    rows = result.where(metric="auroc", condition="vlm blank", direction=pretend.SSD).table
    assert np.allclose(band.y, [*rows["high"], *rows["low"][::-1]])
    assert band.hoverinfo == "skip"


def test_nulls_are_grey_bands_in_every_panel_and_never_lines():
    figure = plots.layer_sweep(separability())
    nulls = [trace for trace in figure.data if trace.name and "central 95%" in trace.name]
    assert sorted(trace.xaxis for trace in nulls) == ["x", "x", "x2", "x2"]
    assert all(trace.fill == "toself" and "128, 128, 128" in trace.fillcolor for trace in nulls)
    assert not traces(figure, "random")


def test_a_null_band_is_as_wide_as_the_widest_of_the_conditions():
    table = separability().table
    wide = (table["direction"] == "random") & (table["condition"] == "vlm blank")
    table.loc[wide, ["low", "high"]] = 0.05, 0.9
    figure = plots.layer_sweep(Result(table))
    band = next(trace for trace in figure.data if trace.name == "random directions, central 95%")
    assert min(band.y) == 0.05
    assert max(band.y) == 0.9


def test_every_legend_entry_appears_once():
    for figure in every_figure().values():
        shown = [trace.name for trace in figure.data if trace.showlegend is not False and trace.name]
        assert len(shown) == len(set(shown))


def test_a_figure_refuses_to_mix_splits_and_says_how_to_pick_one():
    with pytest.raises(MechguardError, match=r"test, validation.*where\(split="):
        plots.layer_sweep(pretend.separability())


def test_the_modality_gap_has_one_panel_per_metric_in_the_order_asked_for():
    figure = plots.modality_gap(pretend.modality_gap(), metrics=["rmg", "centroid_distance"])
    assert panel_titles(figure) == ["Relative modality gap", "Centroid distance"]
    assert len(traces(figure, "llm text -&gt; vlm blank")) == 2
    nulls = [trace.xaxis for trace in figure.data if trace.name == "shuffled modality, central 95%"]
    assert nulls == ["x2"]


def test_the_gates_are_solid_for_harmful_and_dotted_for_harmless():
    figure = plots.gates(pretend.gates())
    assert panel_titles(figure) == ["gate: sign", "gate: midpoint"]
    assert {t.line.dash for t in traces(figure, "vlm blank, harmful")} == {"solid"}
    assert {t.line.dash for t in traces(figure, "vlm blank, harmless")} == {"dot"}
    assert [t.y[0] for t in traces(figure, "vlm blank, harmless")] == [0.9, 0.1]


def test_the_transfer_matrix_has_a_panel_per_condition_and_a_row_per_direction():
    result = pretend.transfer()
    figure = plots.transfer_matrix(result)
    assert panel_titles(figure) == [f"tested on {view}" for view in pretend.VIEWS]
    cells = figure.data[2]
    assert list(cells.y) == [pretend.SSD, "svd, vlm blank", "own, held out"]
    rows = result.where(metric="auroc", condition="vlm blank", direction=pretend.SSD).table
    assert list(cells.z[0]) == list(rows["value"])
    assert cells.customdata[0][5][:2] == pytest.approx(rows[["low", "high"]].iloc[5].tolist())


def test_the_angles_have_a_line_per_pair_of_conditions_and_the_null_as_a_band():
    figure = plots.angles(pretend.angles())
    assert panel_titles(figure)[:2] == ["Cosine of first directions", "Principal angle 1, degrees"]
    assert len(traces(figure, "llm text and vlm blank")) == 4
    assert any(trace.name == "random directions, central 95%" for trace in figure.data)


def test_the_shift_is_drawn_in_its_parts_and_asks_for_directions_where_there_are_none():
    figure = plots.shift_decomposition(pretend.modality_gap())
    assert panel_titles(figure)[0] == "Shift along the direction, harmful +"
    without = pretend.modality_gap().where(metric=["rmg", "cka"])
    with pytest.raises(MechguardError, match="give measure_modality_gap directions"):
        plots.shift_decomposition(without)


def test_the_gate_curves_have_a_line_per_layer_and_a_mark_per_gate():
    figure = plots.gate_curves(pretend.gate_curves())
    assert panel_titles(figure) == list(pretend.VIEWS)
    marks = [trace for trace in figure.data if trace.mode == "markers" and trace.xaxis == "x"]
    assert {trace.marker.symbol for trace in marks} == {"x", "circle"}
    assert len(marks) == 2 * len(pretend.LAYERS)
    assert [trace.x[0] for trace in marks if trace.marker.symbol == "x"] == [0.0] * len(pretend.LAYERS)


def test_the_own_direction_lies_over_its_own_shuffled_labels():
    table = separability().table
    own = table[table["direction"] == "shuffled labels"].assign(direction="own, shuffled labels", low=0.1)
    figure = plots.layer_sweep(Result(pd.concat([table, own])))
    bands = [trace for trace in figure.data if trace.name == "shuffled labels, central 95%"]
    assert {trace.xaxis: min(trace.y) for trace in bands} == {"x": 0.4, "x2": 0.1}


def test_behaviour_draws_every_rate_with_its_whiskers():
    result = pretend.behaviour()
    figure = plots.behaviour(result)
    assert [title.split("<br>")[0] for title in panel_titles(figure)] == [
        "Attack success",
        "Complete refusal",
        "Benign compliance",
    ]
    assert len(figure.data) == 3 * len(pretend.GUARDS)
    bars = next(bar for bar in figure.data if bar.name == "none" and bar.xaxis == "x")
    rows = result.where(metric="attack_success", guard="none").table
    assert list(bars.x) == list(pretend.CONDITIONS)
    assert list(bars.y) == list(rows["value"])
    assert np.allclose(np.add(bars.y, bars.error_y.array), rows["high"])
    assert np.allclose(np.subtract(bars.y, bars.error_y.arrayminus), rows["low"])
    assert [row[2] for row in bars.customdata] == list(rows["n"])


def test_behaviour_leaves_out_what_was_not_measured():
    result = pretend.behaviour().where(metric=["attack_success", "benign_compliance"])
    assert len(panel_titles(plots.behaviour(result))) == 2
    assert len(panel_titles(plots.behaviour(result.where(metric="attack_success")))) == 1


def test_behaviour_tells_settings_apart_on_the_axis():
    one = pretend.behaviour()
    other = Result(one.table.assign(setting="jailbreak"))
    bars = plots.behaviour(one + other).data[0]
    assert set(bars.x[0]) == {"test", "jailbreak"}
    assert len(bars.y) == 2 * len(pretend.CONDITIONS)


def test_the_state_map_has_a_frame_and_a_step_per_layer():
    result = pretend.states()
    figure = plots.state_map(result)
    assert [frame.name for frame in figure.frames] == [str(layer) for layer in pretend.LAYERS]
    assert [step.label for step in figure.layout.sliders[0].steps] == [f.name for f in figure.frames]
    assert [button.label for button in figure.layout.updatemenus[0].buttons] == ["▶", "❚❚"]
    assert "60%" in figure.frames[3].layout.title.subtitle.text
    for frame in figure.frames:
        rows = result.where(layer=int(frame.name)).table
        points = sum(len(trace.x) for trace in frame.data)
        assert points == len(rows)
        low, high = frame.layout.xaxis.range
        assert low < rows["x"].min() < rows["x"].max() < high


def test_a_point_of_the_state_map_keeps_its_prompt_in_every_frame():
    result = Result(pretend.states().table.sample(frac=1, random_state=0))
    figure = plots.state_map(result)
    trace = next(n for n, t in enumerate(figure.data) if t.name == "vlm blank, harmful")
    point = next(n for n, text in enumerate(figure.data[trace].hovertext) if "harmful-7<" in text)
    for frame in figure.frames:
        row = result.where(layer=int(frame.name), condition="vlm blank", id="harmful-7").table
        assert np.allclose(frame.data[trace].x[point], row["x"], atol=1e-4)


def test_the_state_map_shows_labels_by_colour_and_conditions_by_symbol():
    figure = plots.state_map(pretend.states())
    looks = {trace.name: (trace.marker.color, trace.marker.symbol) for trace in figure.data}
    assert looks["vlm text, harmful"][0] == looks["vlm blank, harmful"][0]
    assert looks["vlm text, harmful"][0] != looks["vlm text, harmless"][0]
    assert looks["vlm text, harmful"][1] == looks["vlm text, harmless"][1]
    assert looks["vlm text, harmful"][1] != looks["vlm blank, harmful"][1]


def test_the_state_map_refuses_layers_with_other_prompts():
    table = pretend.states().table
    dropped = table[(table["layer"] != 2) | (table["id"] != "harmful-3")]
    with pytest.raises(MechguardError, match="layers 0 and 2"):
        plots.state_map(Result(dropped))


def test_a_prompt_in_a_hover_box_is_escaped_and_wrapped():
    figure = plots.state_map(pretend.states())
    texts = [text for trace in figure.data for text in trace.hovertext]
    assert any("&lt;script&gt;" in text for text in texts)
    assert not any("<script" in text for text in texts)
    lines = style.wrapped("word " * 40 + "<b>").split("<br>")
    assert len(lines) > 1
    assert max(map(len, lines)) <= 60 + len("&lt;&gt;")


def test_a_script_in_a_figure_cannot_leave_its_script_tag():
    table = pretend.behaviour().table.assign(condition="</script><script>alert(1)</script>")
    markup = pages.draw_html(plots.behaviour(Result(table[table["guard"] == "none"])), name="figure")
    assert markup.count("</script>") == markup.count("<script") == 1


def test_a_sweep_heatmap_has_a_cell_per_layers_and_alpha_and_a_panel_per_variant_and_condition():
    result = pretend.sweep()
    figure = plots.sweep_heatmap(result, metric="attack_success")
    assert len(figure.data) == 4
    panel = figure.data[0]
    assert list(panel.x) == ["-1", "1", "2"]
    assert list(panel.y) == ["3", "2 3 4", "0 1 2 3 4 5"]
    row = result.where(
        variant="A, own last token", condition="blank", metric="attack_success", layers="2 3 4", alpha=1.0
    ).table
    assert panel.z[1][1] == row["value"].item()
    assert panel.customdata[1][1] == row[["low", "high", "n"]].iloc[0].tolist()
    assert "unguarded 50%" in panel_titles(figure)[0]


def test_a_sweep_of_many_variants_gives_each_a_row():
    table = pretend.sweep().where(layers=["none", "3"], alpha=[0.0, 1.0]).table
    guarded = table[table["layers"] == "3"]
    many = [guarded[guarded["variant"] == "B, LLM held"].assign(variant=f"option {n}") for n in range(7)]
    figure = plots.sweep_heatmap(
        Result(pd.concat([table[table["layers"] == "none"], *many])), metric="attack_success"
    )
    assert len(figure.data) == 2  # one panel a condition
    assert list(figure.data[0].y) == [f"option {n}" for n in range(7)][::-1]


def test_a_sweep_heatmap_is_the_same_after_saving(tmp_path: Path):
    result = pretend.sweep().where(layers=["", "3"])
    saved = Result.load(result.save(tmp_path / "sweep"))
    drawn = plots.sweep_heatmap(saved, metric="attack_success")
    assert drawn == plots.sweep_heatmap(result, metric="attack_success")
    assert list(drawn.data[0].y) == ["3"]


def test_a_sweep_heatmap_refuses_two_numbers_in_one_cell():
    table = pretend.sweep().table
    twice = pd.concat([table, table.assign(phase="prompt")])
    with pytest.raises(MechguardError, match="differ in phase"):
        plots.sweep_heatmap(Result(twice), metric="attack_success")


@pytest.mark.parametrize("metric", ["attack_success", "benign_compliance"])
def test_the_bright_end_of_a_heatmap_is_the_good_one(metric: str):
    scale = plots.sweep_heatmap(pretend.sweep(), metric=metric).layout.coloraxis.colorscale
    bright = scale[0][1] if metric == "attack_success" else scale[-1][1]
    assert bright == "#fee838"


def every_figure() -> dict[str, go.Figure]:
    return {
        "layer_sweep": plots.layer_sweep(separability()),
        "modality_gap": plots.modality_gap(pretend.modality_gap()),
        "shift": plots.shift_decomposition(pretend.modality_gap()),
        "transfer": plots.transfer_matrix(pretend.transfer()),
        "angles": plots.angles(pretend.angles()),
        "gates": plots.gates(pretend.gates()),
        "gate_curves": plots.gate_curves(pretend.gate_curves()),
        "behaviour": plots.behaviour(pretend.behaviour()),
        "state_map": plots.state_map(pretend.states()),
        "sweep_heatmap": plots.sweep_heatmap(pretend.sweep(), metric="attack_success"),
    }


def test_every_figure_has_the_house_style_and_says_what_it_rests_on():
    for name, figure in every_figure().items():
        assert figure.layout.template.layout.paper_bgcolor == style.CLEAR, name
        subtitle = figure.layout.title.subtitle.text
        assert ("n = " in subtitle) or name == "state_map", name


def test_a_condition_has_the_same_colour_in_every_figure():
    sweep = traces(plots.layer_sweep(separability()), "vlm blank")[0]
    gap = traces(plots.modality_gap(pretend.modality_gap()), "llm text -&gt; vlm blank")[0]
    gate = traces(plots.gates(pretend.gates()), "vlm blank, harmful")[0]
    assert sweep.line.color == gap.line.color == gate.line.color == style.VERMILLION


def test_unknown_names_get_the_same_distinct_colours_in_any_order():
    names = ["vlm mirrored", "vlm cropped", "vlm blank"]  # the first two would draw the same colour
    found = style.colours(names, style.CONDITION_COLOURS)
    assert found == style.colours(names[::-1], style.CONDITION_COLOURS)
    assert len(set(found.values())) == 3


def test_numbered_guards_share_a_colour_and_differ_in_hatching():
    bars = {bar.name: bar.marker for bar in plots.behaviour(pretend.behaviour()).data}
    assert bars["random 1"].line.color == bars["random 2"].line.color == style.PURPLE
    assert bars["random 1"].pattern.shape != bars["random 2"].pattern.shape


@pytest.mark.parametrize(
    ("draw", "made_by"),
    [
        (plots.layer_sweep, "measure_separability"),
        (plots.modality_gap, "measure_modality_gap"),
        (plots.gates, "measure_gates"),
        (plots.gate_curves, "measure_gate_curves"),
        (plots.shift_decomposition, "measure_modality_gap"),
        (plots.transfer_matrix, "measure_transfer"),
        (plots.angles, "measure_angles"),
        (plots.behaviour, "evaluate"),
        (plots.state_map, "map_states"),
        (lambda result: plots.sweep_heatmap(result, metric="attack_success"), "sweep"),
    ],
)
def test_a_result_of_another_kind_is_refused_with_where_the_right_one_comes_from(draw, made_by: str):
    other = Result(pd.DataFrame({"metric": ["ppl"], "value": [1.0]}))
    with pytest.raises(MechguardError, match=rf"needs the column.* of {made_by}$"):
        draw(other)


def test_an_absent_metric_and_an_empty_result_are_refused():
    with pytest.raises(MechguardError, match="'cka'; the result has auroc, dprime"):
        plots.layer_sweep(separability(), metric="cka")
    with pytest.raises(MechguardError, match="without rows"):
        plots.gates(pretend.gates().where(label="unknown"))
    with pytest.raises(MechguardError, match="none of the metrics attack_success"):
        plots.behaviour(pretend.behaviour().where(metric="keyword_refusal"))


def test_save_writes_one_page_that_needs_no_other_file(tmp_path: Path):
    [page] = plots.save(every_figure()["gates"], tmp_path / "gates", png=False)
    text = page.read_text()
    assert page == tmp_path / "gates.html"
    assert "Plotly.newPlot" in text
    assert "<script src" not in text
    assert "<link" not in text
    assert len(text) > 4_000_000


def test_save_can_share_plotly_among_the_pages_of_a_folder(tmp_path: Path):
    for name in ("a", "b"):
        plots.save(every_figure()["gates"], tmp_path / name, include_plotlyjs="directory", png=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html", "plotly.min.js"]
    assert 'src="plotly.min.js"' in (tmp_path / "a.html").read_text()
    assert (tmp_path / "a.html").stat().st_size < 100_000


def test_save_makes_do_without_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **options: object) -> bytes:
        raise RuntimeError("there is no Chrome")

    monkeypatch.setattr(go.Figure, "to_image", fail)
    written = plots.save(every_figure()["gates"], tmp_path / "gates.png")
    assert written == [tmp_path / "gates.html"]


def test_importing_the_figures_and_the_report_loads_no_model_code():
    code = (
        "import sys, mechguard.plots, mechguard.report; "
        "print([m for m in ('torch', 'transformers', 'nnsight', 'sklearn') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_panels_of_a_sweep_share_their_rows_where_only_one_reading_was_swept_by_rank():
    rows = [
        {"condition": "blank", "variant": variant, "layers": layers, "alpha": 1.0, "rank": rank}
        | {
            "metric": "attack_success",
            "value": rank / 10,
            "low": 0.0,
            "high": 1.0,
            "n": 5,
            "split": "validation",
        }
        for variant, layers, rank in [
            ("A", "5", 1),
            ("A", "0 5", 1),
            ("B", "5", 1),
            ("B", "0 5", 1),
            ("B", "5", 4),
        ]
    ]
    first, second = plots.sweep_heatmap(Result.from_rows(rows), metric="attack_success").data
    assert list(first.y) == list(second.y) == ["5, rank 1", "5, rank 4", "0 5, rank 1"]
    assert [row[0] for row in second.z] == [0.1, 0.4, 0.1]


def test_defences_draw_every_method_beside_its_controls():
    rows = []
    for guard, value in (("none", 0.6), ("cast", 0.2), ("cast; random 1", 0.5), ("cast; shuffled", 0.55)):
        for condition in ("text", "blank"):
            for metric in ("attack_success", "benign_compliance"):
                facts = {"setting": "test", "condition": condition, "guard": guard, "metric": metric}
                numbers = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 50, "split": "test"}
                rows.append({**facts, **numbers})
    result = Result.from_rows(rows)
    figure = plots.defences(result)
    names = [trace.name for trace in figure.data]
    assert names == ["the method", "random directions", "shuffled labels"] * 4
    assert sum(bool(trace.showlegend) for trace in figure.data) == 3
    assert all(list(trace.y) == ["cast"] for trace in figure.data)
    assert [trace.x[0] for trace in figure.data[:3]] == [0.2, 0.5, 0.55]
    assert len([shape for shape in figure.layout.shapes if shape.x0 == 0.6]) == 4
    with pytest.raises(ValueError, match="no setting 'jailbreak'; the result has test"):
        plots.defences(result, setting="jailbreak")
