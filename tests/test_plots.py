"""Figures draw the rows they are given, and say so when they cannot."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pretend
import pytest

from mechguard import plots
from mechguard.errors import MechguardError
from mechguard.plots import motion, pages, style
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
        legend = [trace for trace in figure.data if trace.type != "table"]
        shown = [trace.name for trace in legend if trace.showlegend is not False and trace.name]
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
        points = sum(len(trace.x) for trace in frame.data[: len(pretend.VIEWS) * 2])
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
    looks = {
        trace.name: (trace.marker.color, trace.marker.symbol) for trace in figure.data if trace.hovertext
    }
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
    texts = [text for trace in figure.data for text in trace.hovertext or ()]
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
        "projection_ridgeline": plots.projection_ridgeline(pretend.projections()),
        "pareto": plots.pareto(pretend.behaviour()),
        "token_view": plots.token_view(pretend.tokens()),
        "response_table": plots.response_table(responses()),
    }


def responses() -> Result:
    return Result(pd.DataFrame(pretend.responses()))


def test_every_figure_has_the_house_style_and_says_what_it_rests_on():
    for name, figure in every_figure().items():
        assert figure.layout.template.layout.paper_bgcolor == style.CLEAR, name
        subtitle = figure.layout.title.subtitle.text
        assert ("n = " in subtitle) or name in ("state_map", "token_view", "response_table"), name


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
        (plots.projection_ridgeline, "project_states"),
        (plots.pareto, "evaluate"),
        (plots.token_view, "project_tokens"),
        (plots.response_table, r"evaluate\(\.\.\., responses=FILE\)"),
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
    page, table = plots.save(every_figure()["gates"], tmp_path / "gates", pictures=False)
    text = page.read_text()
    assert page == tmp_path / "gates.html"
    assert "Plotly.newPlot" in text
    assert "<script src" not in text
    assert "<link" not in text
    assert len(text) > 4_000_000
    assert table == tmp_path / "gates.csv"
    pd.testing.assert_frame_equal(pd.read_csv(table), pretend.gates().table)


def test_save_writes_a_figure_from_elsewhere_without_a_table(tmp_path: Path):
    assert plots.save(go.Figure(), tmp_path / "f", pictures=False) == [tmp_path / "f.html"]


def test_save_can_share_plotly_among_the_pages_of_a_folder(tmp_path: Path):
    for name in ("a", "b"):
        plots.save(every_figure()["gates"], tmp_path / name, include_plotlyjs="directory", pictures=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.csv",
        "a.html",
        "b.csv",
        "b.html",
        "plotly.min.js",
    ]
    assert 'src="plotly.min.js"' in (tmp_path / "a.html").read_text()
    assert (tmp_path / "a.html").stat().st_size < 100_000


def test_save_makes_do_without_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("there is no Chrome")

    monkeypatch.setattr(pio, "write_images", fail)
    written = plots.save(every_figure()["gates"], tmp_path / "gates.png")
    assert written == [tmp_path / "gates.html", tmp_path / "gates.csv"]


def test_save_writes_pictures_on_white_without_what_only_moves_on_a_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    printed = []

    def draw(figures: list[go.Figure], files: list[Path], **options: object) -> None:
        for figure, file in zip(figures, files, strict=True):
            printed.append(figure)
            file.write_bytes(file.suffix.encode())

    monkeypatch.setattr(pio, "write_images", draw)
    figure = every_figure()["state_map"]
    written = plots.save(figure, tmp_path / "map")
    assert [path.suffix for path in written] == [".html", ".png", ".pdf", ".csv"]
    assert (tmp_path / "map.pdf").read_bytes() == b".pdf"
    assert len(printed) == 2
    assert all(f.layout.paper_bgcolor == "white" and not f.layout.sliders for f in printed)
    assert len(figure.layout.sliders) == 1


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


def test_arrows_go_from_each_prompts_text_to_its_picture_in_every_frame():
    result = pretend.states(3)
    figure = plots.state_map(result)
    names = [trace.name for trace in figure.data if trace.name.startswith("text")]
    assert names == [f"text → vlm {view}, {label}" for view in ("blank", "noise") for label in pretend.LABELS]
    place = next(n for n, trace in enumerate(figure.data) if trace.name == "text → vlm noise, harmful")
    for frame in figure.frames:
        arrow = frame.data[place]
        rows = result.where(layer=int(frame.name), label="harmful").table.set_index(["condition", "id"])
        ends = [[*(rows.loc[(view, f"harmful-{k}"), "x"] for view in ("vlm text", "vlm noise")), np.nan]
                for k in range(3)]  # fmt: skip
        np.testing.assert_allclose(arrow.x, np.ravel(ends), atol=1e-4)
    assert {trace.visible for trace in figure.data if "blank" in trace.name and "→" in trace.name} == {True}
    assert figure.data[place].visible == "legendonly"
    assert not any("→" in trace.name for trace in plots.state_map(result, arrows=False).data)


def test_a_state_map_in_three_dimensions_has_a_third_coordinate_in_every_frame():
    result = pretend.states(4)
    table = result.table.assign(z=result.table["layer"] + 0.25)
    figure = plots.state_map(Result(table, result.about), dimensions=3)
    assert {trace.type for trace in figure.data} == {"scatter3d"}
    for frame in figure.frames:
        assert set(np.concatenate([trace.z for trace in frame.data[:8]])) == {int(frame.name) + 0.25}
        assert frame.layout.scene.zaxis.title.text == "third component"
    with pytest.raises(MechguardError, match="needs the column z"):
        plots.state_map(Result(table.drop(columns="z")), dimensions=3)


def test_points_with_a_picture_name_it_and_the_page_holds_it_once(tmp_path: Path):
    figure = plots.state_map(pretend.states())
    named = {trace.name: trace.customdata for trace in figure.data if trace.hovertext}
    assert set(named["vlm blank, harmful"]) == {"p0"}
    assert named["vlm text, harmful"] is None
    page = plots.save(figure, tmp_path / "map", include_plotlyjs=False, pictures=False)[0].read_text()
    assert page.count("data:image") == 1
    assert "plotly_hover" in page
    assert "plotly_hover" not in pages.draw_html(plots.gates(pretend.gates()), name="gates")


def test_a_map_of_2000_points_and_32_layers_stays_under_10_megabytes(tmp_path: Path):
    result = pretend.many_states()
    figure = plots.state_map(result)
    assert len(result) == 2000 * 32
    assert {trace.type for trace in figure.data} == {"scattergl"}
    [page, _] = plots.save(figure, tmp_path / "map", pictures=False)
    assert page.stat().st_size < 7_000_000
    assert len(figure.to_json()) < 5_000_000  # what a notebook holds


def test_a_page_moves_points_by_whole_numbers_that_are_their_coordinates():
    figure = plots.state_map(pretend.states())
    still, script = motion.set_in_motion(figure)
    assert not still.frames
    assert len(figure.frames) == len(pretend.LAYERS)  # the figure itself keeps them, for notebooks
    described = json.loads(re.search(r"places\} = (\{.*\}), STEPS", script)[1])
    assert described["layers"] == list(pretend.LAYERS)
    places = np.frombuffer(b64decode(described["places"]), "<u2").astype(float)
    steps = places.reshape(len(pretend.LAYERS), -1)
    start = 0
    for trace, count in enumerate(described["counts"]):
        for axis in ("x", "y"):
            for frame, view, known in zip(figure.frames, described["views"], steps, strict=True):
                low, high = view[axis]
                found = known[start : start + count]
                drawn = np.where(found == motion.GAP, np.nan, low + found / motion.STEPS * (high - low))
                np.testing.assert_allclose(drawn, frame.data[trace][axis], atol=(high - low) / motion.STEPS)
            start += count
    assert start == steps.shape[1]


def test_only_flat_maps_are_set_in_motion():
    for figure in (plots.token_view(pretend.tokens()), plots.state_map(pretend.states(3), dimensions=3)):
        assert motion.set_in_motion(figure) == (figure, "")


def test_a_ridgeline_has_a_ridge_per_label_layer_and_condition():
    result = pretend.projections()
    figure = plots.projection_ridgeline(result, scaled=False)
    ridges = [trace for trace in figure.data if trace.type == "violin"]
    assert len(ridges) == len(pretend.VIEWS) * len(pretend.LAYERS) * 2
    assert panel_titles(figure) == list(pretend.VIEWS)
    ridge = next(t for t in ridges if t.xaxis == "x3" and t.name == "harmful" and t.y0 == 4)
    rows = result.where(condition="vlm blank", layer=4, label="harmful").table
    np.testing.assert_allclose(ridge.x, rows["value"], atol=1e-5)
    assert ridge.line.color == style.VERMILLION


def test_a_ridgeline_marks_where_gates_open_and_keeps_far_ones_at_the_edge():
    figure = plots.projection_ridgeline(pretend.projections(), scaled=False)
    marks = {t.name: t for t in figure.data if t.type == "scatter" and t.xaxis == "x"}
    assert list(marks["gate: midpoint"].x) == [10.5 + layer / 2 for layer in pretend.LAYERS]
    assert set(marks["gate: midpoint"].marker.symbol) == {"line-ns-open"}
    assert set(marks["gate: sign"].marker.symbol) == {"triangle-left-open"}
    assert min(marks["gate: sign"].x) > 9
    assert list(marks["gate: sign"].customdata) == [0.0] * len(pretend.LAYERS)


def test_a_pareto_front_joins_the_guards_that_no_other_beats():
    rows = [
        {"condition": "blank", "guard": guard, "metric": metric, "value": value, "low": value - 0.1}
        | {"high": value + 0.1, "n": 40, "split": "test"}
        for guard, harm, helped in (("none", 0.6, 1.0), ("a", 0.2, 0.9), ("b", 0.3, 0.5), ("c", 0.0, 0.4))
        for metric, value in (("attack_success", harm), ("benign_compliance", helped))
    ]
    figure = plots.pareto(Result.from_rows(rows))
    front = figure.data[0]
    assert list(zip(front.x, front.y, strict=True)) == [(0.4, 0.0), (0.9, 0.2), (1.0, 0.6)]
    mark = next(trace for trace in figure.data if trace.name == "b")
    assert (mark.x[0], mark.y[0]) == (0.5, 0.3)
    np.testing.assert_allclose([mark.error_x.array[0], mark.error_y.arrayminus[0]], 0.1)
    with pytest.raises(MechguardError, match="no metric 'kl'"):
        plots.pareto(Result.from_rows(rows), harm="kl")


def test_a_token_view_lays_patches_over_the_picture_and_words_in_lines():
    result = pretend.tokens()
    figure = plots.token_view(result, id="harmful-1", layer=2)
    patches, words = figure.data
    rows = result.where(id="harmful-1", condition="vlm blank", layer=2).table
    np.testing.assert_allclose(np.ravel(patches.z), rows["value"][1:10])
    shown = [word for line in words.text for word in line]
    assert shown[:3] == ["[image]", "&lt;b&gt;", "w11"]
    values = [value for line in words.z for value in line if value is not None]
    assert values == [rows["value"].iloc[0], *rows["value"].iloc[10:]]
    assert figure.layout.images[0].source == pretend.PICTURE
    assert [frame.name for frame in figure.frames] == [str(layer) for layer in pretend.LAYERS]
    assert figure.layout.sliders[0].active == 2
    assert len(plots.token_view(result, id="harmful-1", condition="vlm text").data) == 1


def test_a_token_view_says_what_it_does_not_have():
    result = pretend.tokens()
    for wanted, message in (
        ({"id": "nobody"}, "no prompt 'nobody'"),
        ({"condition": "image"}, "no condition 'image'; it has vlm text, vlm blank"),
        ({"layer": 77}, "no layer 77"),
    ):
        with pytest.raises(MechguardError, match=message):
            plots.token_view(result, **wanted)


def test_a_response_table_sets_before_beside_after_with_verdicts():
    figure = plots.response_table(responses(), condition="blank", count=3)
    [table] = figure.data
    sent, before, after = table.cells.values
    assert len(sent) == 3
    harmful = pd.DataFrame(pretend.responses()).query("label == 'harmful' and condition == 'blank'")
    for guard, cells in (("none", before), ("vlm_guard", after)):
        complied = harmful[harmful["guard"] == guard]["complied"].iloc[[0, 33, 66]]
        assert ["answered" in cell for cell in cells] == complied.tolist()
    assert {"answered" in cell for cell in before} == {True, False}
    assert all(">refused<" in cell for cell in after)
    assert not any("<script" in cell for cell in (*sent, *before, *after))
    with pytest.raises(MechguardError, match="with 'nothing' under 'blank'; the result has the guards none"):
        plots.response_table(responses(), condition="blank", guard="nothing")
