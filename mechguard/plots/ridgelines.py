"""Ridgelines: how the projections on the safety steering direction are distributed, layer by layer."""

from __future__ import annotations

from html import escape

import pandas as pd
import plotly.graph_objects as go

from mechguard.errors import MechguardError
from mechguard.plots.style import (
    GREY,
    INK,
    LABEL_COLOURS,
    colours,
    draws,
    facets,
    headed,
    layered,
    rows_of_metric,
    table_of,
    translucent,
)
from mechguard.result import Result

COLUMNS = ("layer", "condition", "metric", "label", "value", "scaled")
BINS = 36
GATES = {"midpoint": (INK, "line-ns-open"), "sign": (GREY, "x-thin-open")}
OUTSIDE = {-1: "triangle-left-open", 1: "triangle-right-open"}  # where a gate lies beyond all prompts


@draws
def projection_ridgeline(result: Result, *, scaled: bool = True) -> go.Figure:
    """The distribution of the projections at every layer, a panel per condition, harmful above harmless.

    Each ridge is a kernel density of one layer's prompts; the marks are where a gate opens: to their right.
    A gate beyond all prompts is a triangle at the edge.

    Args:
        result: of `project_states`.
        scaled: draw in standard deviations of the layer from the midpoint gate, so that layers compare;
            otherwise in the units of the hidden states.

    Raises:
        MechguardError: the result is not one of projections of one split.
    """
    table = table_of(result, "projection_ridgeline", *COLUMNS, made_by="project_states")
    measure = "scaled" if scaled else "value"
    points = rows_of_metric(table, "projection_ridgeline", "projection")
    gates = table[table["metric"] == "gate_threshold"]
    conditions = list(points["condition"].unique())
    layers = sorted(int(layer) for layer in points["layer"].unique())
    figure = facets(
        [escape(name) for name in conditions],
        columns=len(conditions),
        height=150 + max(300, 46 * len(layers)),
        shared_yaxes=True,
        shared_xaxes="all",
        horizontal_spacing=0.02,
    )
    low, high = float(points[measure].min()), float(points[measure].max())
    margin = 0.05 * (high - low)
    edges = (low - margin, high + margin)
    colour = colours(list(points["label"].unique()), LABEL_COLOURS)
    for column, condition in enumerate(conditions, 1):
        of_condition = points[points["condition"] == condition]
        for (label, layer), rows in of_condition.groupby(["label", "layer"], sort=False):
            ridge = _ridge(rows[measure], int(layer), str(label), colour[label])
            ridge.update(showlegend=column == 1 and int(layer) == layers[0])
            figure.add_trace(ridge, row=1, col=column)
        for gate, rows in gates.groupby("gate", sort=False):
            marks = _marks(rows, measure, str(gate), edges).update(showlegend=column == 1)
            figure.add_trace(marks, row=1, col=column)
    unit = "SD from the midpoint gate" if scaled else "h · v"
    room = 0.06 * (edges[1] - edges[0])
    figure.update_xaxes(title_text=unit, title_font_size=12, range=[edges[0] - room, edges[1] + room])
    figure.update_yaxes(tickvals=layers, range=[layers[0] - 0.4, layers[-1] + 1.15], zeroline=False)
    figure.update_yaxes(title_text="layer", col=1)
    figure.update_layout(violingap=0, violinmode="overlay", legend_tracegroupgap=6)
    counts = of_condition[of_condition["layer"] == layers[0]].groupby("label").size()
    subtitle = ", ".join(f"{label}: n = {count}" for label, count in counts.items())
    splits = ", ".join(f"{split} split, " for split in points.get("split", pd.Series()).dropna().unique())
    layered(figure, "y")
    return headed(figure, "Projections on the safety steering direction, by layer", splits + subtitle)


@draws
def projection_histogram(result: Result, *, layer: int) -> go.Figure:
    """The projections of one layer, a panel per condition; lines are where a gate opens, to their right.

    Args:
        result: of `project_states`.

    Raises:
        MechguardError: the result is not one of projections, or holds no such layer.
    """
    table = table_of(result, "projection_histogram", *COLUMNS, made_by="project_states")
    rows = table[table["layer"] == layer]
    if rows.empty:
        known = ", ".join(str(int(one)) for one in sorted(table["layer"].unique()))
        raise MechguardError(f"projection_histogram found no layer {layer}; the result has {known}")
    points = rows_of_metric(rows, "projection_histogram", "projection")
    conditions = list(points["condition"].unique())
    figure = facets(
        [escape(name) for name in conditions],
        columns=len(conditions),
        height=300,
        shared_yaxes=True,
        shared_xaxes="all",
        horizontal_spacing=0.02,
    )
    colour = colours(list(points["label"].unique()), LABEL_COLOURS)
    low, high = float(points["value"].min()), float(points["value"].max())
    bins = {"start": low, "end": high + 1e-9, "size": (high - low) / BINS or 1.0}
    for column, condition in enumerate(conditions, 1):
        for label, found in points[points["condition"] == condition].groupby("label", sort=False):
            bars = go.Histogram(x=found["value"].to_numpy().astype("float32"), xbins=bins, name=str(label))
            bars.update(marker_color=translucent(colour[str(label)], 0.55), legendgroup=str(label))
            figure.add_trace(bars.update(showlegend=column == 1), row=1, col=column)
        for gate in rows[rows["metric"] == "gate_threshold"].to_dict("records"):
            if low <= gate["value"] <= high:
                line = {"color": INK, "dash": "solid" if gate["gate"] == "midpoint" else "dot"}
                figure.add_vline(gate["value"], line=line, row=1, col=column)
    figure.update_layout(barmode="overlay", bargap=0.02)
    figure.update_xaxes(title_text="h · v").update_yaxes(title_text="prompts", col=1)
    return headed(figure, f"Projections at layer {layer}", "lines: where a gate opens")


def _ridge(values: pd.Series, layer: int, label: str, colour: str) -> go.Violin:
    return go.Violin(
        x=values.to_numpy().astype("float32"),
        y0=layer,
        orientation="h",
        side="positive",
        width=1.7,
        points=False,
        name=label,
        legendgroup=label,
        scalegroup="ridge",
        line={"color": colour, "width": 1.3},
        fillcolor=translucent(colour, 0.25),
        meanline_visible=False,
        hoveron="violins",
        hoverinfo="x+name",
    )


def _marks(rows: pd.DataFrame, measure: str, gate: str, edges: tuple[float, float]) -> go.Scatter:
    colour, symbol = GATES.get(gate, (GREY, "diamond-open"))
    beyond = (rows[measure] > edges[1]).astype(int) - (rows[measure] < edges[0]).astype(int)
    return go.Scatter(
        x=rows[measure].clip(*edges).tolist(),
        y=rows["layer"].astype(int).tolist(),
        customdata=rows["value"].tolist(),
        mode="markers",
        name=f"gate: {escape(gate)}",
        legendgroup=f"gate: {gate}",
        marker={
            "symbol": [OUTSIDE.get(side, symbol) for side in beyond],
            "size": 11,
            "color": colour,
            "line": {"width": 2, "color": colour},
        },
        hovertemplate="layer %{y}, opens above h · v = %{customdata:.3f}<extra>%{fullData.name}</extra>",
    )
