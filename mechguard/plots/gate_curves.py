"""The gates' ROC curves: what any threshold could do, and what the two gates do."""

from __future__ import annotations

from html import escape

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from mechguard.plots.style import GREY, draws, facets, headed, rows_of_metric, sample, table_of
from mechguard.result import Result

CURVE = "any threshold"
COLUMNS = ("condition", "layer", "gate", "metric", "value", "low", "high", "n", "false_positive_rate")
SYMBOLS = {"sign": "x", "midpoint": "circle"}
MOST = 6  # layers drawn, evenly spaced, where there are more
SCALE = "Viridis"


@draws
def gate_curves(result: Result) -> go.Figure:
    """Harmful prompts the gate opens for, by harmless ones, one panel per condition and one line per layer.

    Crosses are the uncentred gate (h . v > 0), circles the one centred on the anchors' midpoint.

    Args:
        result: of `measure_gate_curves`.

    Raises:
        MechguardError: the result is not of `measure_gate_curves`, or mixes splits.
    """
    table = table_of(result, "gate_curves", *COLUMNS, made_by="measure_gate_curves")
    rows = rows_of_metric(table, "gate_curves", "true_positive_rate")
    layers = _few(sorted(rows["layer"].unique()))
    conditions = list(rows["condition"].unique())
    columns = min(4, len(conditions))
    lines = -(-len(conditions) // columns)
    figure = facets(
        [escape(name) for name in conditions],
        columns=columns,
        height=140 + 290 * lines,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.24 / lines,
    )
    at = [0.9 * place / max(1, len(layers) - 1) for place in range(len(layers))]
    colours = dict(zip(layers, sample_colorscale(SCALE, at), strict=True))
    for place, condition in enumerate(conditions):
        where = {"row": place // columns + 1, "col": place % columns + 1}
        chance = {"color": GREY, "dash": "dot", "width": 1}
        figure.add_trace(
            go.Scatter(x=[0, 1], y=[0, 1], line=chance, mode="lines", hoverinfo="skip", showlegend=False),
            **where,
        )
        for layer in layers:
            of_layer = rows[(rows["condition"] == condition) & (rows["layer"] == layer)]
            for trace in _traces(of_layer, int(layer), colours[layer]):
                figure.add_trace(trace.update(showlegend=trace.showlegend and not place), **where)
    figure.update_xaxes(range=[-0.03, 1.03], tickformat=".0%")
    figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%")
    for place in range(max(0, len(conditions) - columns), len(conditions)):
        figure.update_xaxes(
            title_text="opens for harmless", row=place // columns + 1, col=place % columns + 1
        )
    figure.update_yaxes(title_text="opens for harmful", col=1)
    subtitle = f"{sample(rows)} harmful; crosses: uncentred gate, circles: centred on the anchors"
    return headed(figure, "What a gate could do, and what the two gates do", subtitle)


def _traces(rows: pd.DataFrame, layer: int, colour: str) -> list[go.Scatter]:
    hover = (
        "opens for %{y:.0%} of harmful (95% interval %{customdata[0]:.0%} to %{customdata[1]:.0%}), "
        "%{x:.0%} of "
        f"harmless<br>layer {layer}, %{{customdata[2]}}<extra></extra>"
    )
    found = []
    for gate, points in rows.groupby("gate", sort=False):
        points = points.sort_values("false_positive_rate")
        curve = gate == CURVE
        found.append(
            go.Scatter(
                x=points["false_positive_rate"].tolist(),
                y=points["value"].tolist(),
                customdata=points[["low", "high", "gate"]].to_numpy().tolist(),
                mode="lines" if curve else "markers",
                line={"color": colour, "width": 2, "shape": "hv"},
                marker={"color": colour, "size": 10, "symbol": SYMBOLS.get(str(gate), "square")},
                name=f"layer {layer}",
                legendgroup=f"layer {layer}",
                showlegend=curve,
                hovertemplate=hover,
            )
        )
    return found


def _few(layers: list[int]) -> list[int]:
    if len(layers) <= MOST:
        return layers
    return [layers[round(place * (len(layers) - 1) / (MOST - 1))] for place in range(MOST)]
