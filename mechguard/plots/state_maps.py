"""State maps: prompts as points in two dimensions, one frame per layer."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mechguard.errors import MechguardError
from mechguard.plots.style import (
    INK,
    LABEL_COLOURS,
    LINE,
    TEMPLATE,
    colours,
    symbols,
    table_of,
    wrapped,
)
from mechguard.result import Result

COLUMNS = ("layer", "condition", "label", "id", "text", "x", "y", "explained")
MANY = 2000  # points in one frame above which the browser should draw with WebGL


def state_map(result: Result) -> go.Figure:
    """The states on their first two principal components, with a slider and a play button over layers.

    Colour is the label, the symbol is the condition; the prompt stands in the hover box. The axes of a
    layer fit that layer: units differ from layer to layer.

    Args:
        result: of `map_states`.

    Raises:
        MechguardError: the result is not a map, or its layers hold different prompts.
    """
    table = table_of(result, "state_map", *COLUMNS, made_by="map_states")
    order = pd.MultiIndex.from_frame(table[["condition", "label"]].drop_duplicates())
    layers = {int(layer): _grouped(rows, order) for layer, rows in table.groupby("layer")}
    _check_same(layers)
    first = next(iter(layers))
    kind = go.Scattergl if len(table) / len(layers) > MANY else go.Scatter
    traces = _traces(layers[first], order, kind)
    frames = [
        go.Frame(
            name=str(layer),
            data=[kind(x=_short(rows["x"]), y=_short(rows["y"])) for rows in groups],
            traces=list(range(len(groups))),
            layout=_view(layer, groups),
        )
        for layer, groups in layers.items()
    ]
    figure = go.Figure(traces, frames=frames, layout=_view(first, layers[first]))
    figure.update_layout(template=TEMPLATE, height=620, margin={"l": 70, "t": 80, "r": 180, "b": 130})
    # The slider and margins that follow the axes push each other around; here the margins stand still.
    figure.update_xaxes(automargin=False).update_yaxes(automargin=False)
    return figure.update_layout(sliders=[_slider(list(layers))], updatemenus=[_buttons()])


def _grouped(rows: pd.DataFrame, order: pd.MultiIndex) -> list[pd.DataFrame]:
    groups = dict(list(rows.groupby(["condition", "label"])))
    return [groups[key].sort_values("id") if key in groups else rows.iloc[:0] for key in order]


def _check_same(layers: dict[int, list[pd.DataFrame]]) -> None:
    first = next(iter(layers))
    for layer, groups in layers.items():
        if any(list(a["id"]) != list(b["id"]) for a, b in zip(groups, layers[first], strict=True)):
            raise MechguardError(
                f"layers {first} and {layer} of the map hold different prompts; give one result of map_states"
            )


def _traces(groups: list[pd.DataFrame], order: pd.MultiIndex, kind: Any) -> list[Any]:
    conditions, labels = order.unique(0), order.unique(1)
    symbol, colour = symbols(conditions), colours(list(labels), LABEL_COLOURS)
    return [
        kind(
            x=_short(rows["x"]),
            y=_short(rows["y"]),
            name=escape(f"{condition}, {label}"),
            mode="markers",
            marker={
                "color": colour[label],
                "symbol": symbol[condition],
                "size": 11 if symbol[condition].endswith("-open") else 7,
                "opacity": 0.85,
            },
            hovertext=[_hover(row) for row in rows.to_dict("records")],
            hoverinfo="text",
        )
        for (condition, label), rows in zip(order, groups, strict=True)
    ]


def _hover(row: dict[str, Any]) -> str:
    text = wrapped("" if pd.isna(row["text"]) else str(row["text"]))
    return f"{text}<br><i>{escape(str(row['condition']))}, {row['label']}, {escape(str(row['id']))}</i>"


def _short(values: pd.Series) -> np.ndarray:
    # float32 is written as four bytes a number, half of what the same numbers take as text.
    return values.to_numpy().round(4).astype(np.float32)


def _view(layer: int, groups: list[pd.DataFrame]) -> go.Layout:
    """The title and the axes of one layer."""
    rows = pd.concat(groups)
    explained = float(rows["explained"].iloc[0])
    title = f"States at layer {layer}"
    subtitle = f"two principal components, {explained:.0%} of this layer's variance"
    return go.Layout(
        title={"text": title, "subtitle": {"text": subtitle}},
        xaxis={"title": {"text": "first component"}, "range": _range(rows["x"])},
        yaxis={"title": {"text": "second component"}, "range": _range(rows["y"])},
    )


def _range(values: pd.Series) -> list[float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low) or 1.0
    return [low - margin, high + margin]


def _slider(layers: list[int]) -> dict[str, Any]:
    jump = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"method": "animate", "label": str(layer), "args": [[str(layer)], jump]} for layer in layers]
    return {
        "steps": steps,
        "currentvalue": {"prefix": "layer "},
        "x": 0.1,
        "len": 0.9,
        "pad": {"t": 45},
        "bgcolor": LINE,
        "bordercolor": LINE,
        "activebgcolor": INK,
        "tickcolor": INK,
    }


def _buttons() -> dict[str, Any]:
    play = {"frame": {"duration": 700, "redraw": True}, "transition": {"duration": 0}, "fromcurrent": True}
    stop = {"mode": "immediate", "frame": {"duration": 0, "redraw": False}}
    return {
        "type": "buttons",
        "direction": "left",
        "showactive": False,
        "x": 0,
        "xanchor": "left",
        "y": 0,
        "yanchor": "top",
        "pad": {"t": 60},
        "bgcolor": "rgba(128, 128, 128, 0.12)",
        "bordercolor": LINE,
        "buttons": [
            {"label": "▶", "method": "animate", "args": [None, play]},
            {"label": "❚❚", "method": "animate", "args": [[None], stop]},
        ],
    }
