"""State maps: prompts as points in two or three dimensions, one frame per layer."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mechguard.errors import MechguardError
from mechguard.plots.style import (
    INK,
    LABEL_COLOURS,
    TEMPLATE,
    colours,
    draws,
    family,
    layer_slider,
    layered,
    play_buttons,
    symbols,
    table_of,
    translucent,
    wrapped,
)
from mechguard.result import Result

COLUMNS = ("layer", "condition", "label", "id", "text", "x", "y", "explained")
MANY = 1000  # points in one frame above which the browser draws with WebGL
AXIS_NAMES = {"pca": "component", "lda": "discriminant"}
EXPLAINED = {
    "pca": "principal components, {0:.0%} of this layer's variance in the first two",
    "lda": "discriminants of label and condition, fitted on other prompts",
}
# Three-dimensional markers know fewer shapes.
SOLID_SYMBOLS = {"triangle-up": "x", "star": "x", "triangle-down": "x", "hexagon": "x"}
SOLID_KNOWN = ("circle", "circle-open", "square", "diamond", "cross", "x")


@dataclass(frozen=True)
class Map:
    """What is drawn in every frame, in the same order.

    Attributes:
        axes: "x", "y", and in three dimensions "z".
        order: the groups condition x label, one trace each.
        arrows: pairs (from, to) of groups, one trace of arrows each.
        thin: whether points are drawn with WebGL.
    """

    axes: tuple[str, ...]
    order: pd.MultiIndex
    arrows: list[tuple[int, int]]
    thin: bool

    @property
    def kind(self) -> Any:
        if len(self.axes) == 3:
            return go.Scatter3d
        return go.Scattergl if self.thin else go.Scatter


@draws
def state_map(result: Result, *, dimensions: Literal[2, 3] = 2, arrows: bool = True) -> go.Figure:
    """The states on two or three axes, with a slider and a play button over layers.

    Colour is the label, the symbol is the condition; the prompt stands in the hover box, and pages beside it
    show its picture. Arrows go from each prompt's state as text to its state beside a picture. The axes of a
    layer fit that layer: units differ from layer to layer.

    Args:
        result: of `map_states`.
        arrows: those of the first picture are shown, the others wait in the legend.

    Raises:
        MechguardError: the result is not a map of so many dimensions, or its layers hold different prompts.
    """
    axes = ("x", "y", "z")[:dimensions]
    table = table_of(result, "state_map", *COLUMNS, *axes[2:], made_by="map_states")
    order = pd.MultiIndex.from_frame(table[["condition", "label"]].drop_duplicates())
    layers = {int(layer): _grouped(rows, order) for layer, rows in table.groupby("layer")}
    _check_same(layers)
    thin = len(table) / len(layers) > MANY
    plan = Map(axes, order, _pairs(order) if arrows else [], thin)
    first = next(iter(layers))
    words = str(result.about.get("method", "pca"))
    frames = [
        go.Frame(
            name=str(layer),
            data=[plan.kind(place) for place in _places(plan, groups)],
            traces=list(range(len(groups) + len(plan.arrows))),
            layout=_view(plan, layer, groups, words),
        )
        for layer, groups in layers.items()
    ]
    figure = go.Figure(_traces(plan, layers[first]), frames=frames)
    figure.update_layout(_view(plan, first, layers[first], words))
    figure.update_layout(template=TEMPLATE, height=640, margin={"l": 70, "t": 80, "r": 190, "b": 130})
    # The slider and margins that follow the axes push each other around; here the margins stand still.
    figure.update_xaxes(automargin=False).update_yaxes(automargin=False)
    if dimensions == 3:
        figure.update_layout(margin={"l": 0}, scene_camera_eye={"x": 1.65, "y": 1.65, "z": 0.95})
    figure.update_layout(sliders=[layer_slider(list(layers))], updatemenus=[play_buttons()])
    layered(figure, "frames")
    return figure.update_layout(meta={**figure.layout.meta, "pictures": result.about.get("pictures", {})})


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


def _pairs(order: pd.MultiIndex) -> list[tuple[int, int]]:
    """From each label's states as text (the VLM's, else the LLM's) to those beside each picture."""
    conditions = order.unique(0)
    texts = [name for name in ("vlm text", "text", "llm text") if name in conditions]
    pictured = [name for name in conditions if family(name) not in ("text", "llm text")]
    places = {key: index for index, key in enumerate(order)}
    return [
        (places[texts[0], label], places[condition, label])
        for condition in pictured
        for label in order.unique(1)
        if texts and (texts[0], label) in places and (condition, label) in places
    ]


def _places(plan: Map, groups: list[pd.DataFrame]) -> list[dict[str, np.ndarray]]:
    """The coordinates of every trace, points first."""
    points = [{axis: _short(rows[axis].to_numpy()) for axis in plan.axes} for rows in groups]
    return points + [_ends(plan, groups[start], groups[end]) for start, end in plan.arrows]


def _ends(plan: Map, start: pd.DataFrame, end: pd.DataFrame) -> dict[str, np.ndarray]:
    """Each prompt's two places and a gap, for the prompts that have both."""
    both = start.merge(end, on="id", suffixes=("_start", "_end"))
    gap = np.full(len(both), np.nan)
    ends = {
        axis: np.stack([both[f"{axis}_start"], both[f"{axis}_end"], gap], axis=1).ravel()
        for axis in plan.axes
    }
    return {axis: _short(values) for axis, values in ends.items()}


def _traces(plan: Map, groups: list[pd.DataFrame]) -> list[Any]:
    conditions, labels = plan.order.unique(0), plan.order.unique(1)
    symbol, colour = symbols(conditions), colours(list(labels), LABEL_COLOURS)
    places = _places(plan, groups)
    traces = []
    for (condition, label), rows, place in zip(plan.order, groups, places, strict=False):
        marker = {"color": colour[label], "symbol": _symbol(plan, symbol[condition]), "opacity": 0.85}
        marker["size"] = _size(plan, symbol[condition])
        known = rows["picture"] if "picture" in rows else pd.Series(None, index=rows.index)
        trace = plan.kind(
            **place,
            name=escape(f"{condition}, {label}"),
            mode="markers",
            marker=marker,
            hovertext=[_hover(row) for row in rows.to_dict("records")],
            hoverinfo="text",
            ids=rows["id"].astype(str).tolist(),
        )
        if known.notna().any():
            trace.update(customdata=known.where(known.notna(), None).tolist())
        traces.append(trace)
    first = plan.order[plan.arrows[0][1]][0] if plan.arrows else ""
    for (_, end), place in zip(plan.arrows, places[len(groups) :], strict=True):
        condition, label = plan.order[end]
        traces.append(_arrows(plan, place, f"text → {condition}, {label}", colour[label], condition == first))
    return traces


def _arrows(plan: Map, place: dict[str, np.ndarray], name: str, colour: str, shown: bool) -> Any:
    solid = len(plan.axes) == 3  # whose lines add up their light where they are translucent
    faint = colour if solid else translucent(colour, 0.3)
    trace = plan.kind(
        **place,
        name=escape(name),
        mode="lines",
        line={"color": faint, "width": 1},
        opacity=0.4 if solid else 1,
        hoverinfo="skip",
        visible=True if shown else "legendonly",
    )
    if plan.kind is go.Scatter:  # the others draw no arrow heads
        head = {"symbol": "arrow", "angleref": "previous", "color": faint, "size": 8}
        head["standoff"] = 4
        trace.update(mode="lines+markers", marker=head)
    return trace


def _symbol(plan: Map, symbol: str) -> str:
    if len(plan.axes) == 2 or symbol in SOLID_KNOWN:
        return symbol
    return SOLID_SYMBOLS.get(symbol, "x")


def _size(plan: Map, symbol: str) -> int:
    size = 11 if symbol.endswith("-open") else 7
    return size - 3 if len(plan.axes) == 3 else size


def _hover(row: dict[str, Any]) -> str:
    text = wrapped("" if pd.isna(row["text"]) else str(row["text"]))
    return f"{text}<br><i>{escape(str(row['condition']))}, {row['label']}, {escape(str(row['id']))}</i>"


def _short(values: np.ndarray) -> np.ndarray:
    # float32 is written as four bytes a number, half of what the same numbers take as text.
    return values.round(4).astype(np.float32)


def _view(plan: Map, layer: int, groups: list[pd.DataFrame], method: str) -> go.Layout:
    """The title and the axes of one layer."""
    rows = pd.concat(groups)
    subtitle = EXPLAINED.get(method, escape(method)).format(float(rows["explained"].iloc[0]))
    title = {"text": f"States at layer {layer}", "subtitle": {"text": subtitle}}
    word = AXIS_NAMES.get(method, "axis")
    names = dict(zip(plan.axes, ("first", "second", "third"), strict=False))
    axes = {
        f"{axis}axis": {"title": {"text": f"{names[axis]} {word}"}, "range": _range(rows[axis])}
        for axis in plan.axes
    }
    if len(plan.axes) == 2:
        return go.Layout(title=title, **axes)
    plain = {"gridcolor": "rgba(128, 128, 128, 0.28)", "showbackground": False, "color": INK}
    scene: dict[str, Any] = {axis: {**axes[axis], **plain} for axis in axes}
    return go.Layout(title=title, scene={**scene, "aspectmode": "cube", "uirevision": "kept"})


def _range(values: pd.Series) -> list[float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low) or 1.0
    return [low - margin, high + margin]
