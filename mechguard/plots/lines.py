"""Figures over layers: lines with interval bands, and the nulls as grey bands behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd
import plotly.graph_objects as go

from mechguard.plots.style import (
    CONDITION_COLOURS,
    LABEL_DASHES,
    METRIC_NAMES,
    colours,
    draws,
    facets,
    family,
    headed,
    layered,
    metric_name,
    rows_of_metric,
    sample,
    symbols,
    table_of,
    translucent,
)
from mechguard.result import Result

OWN, SHUFFLED, OWN_SHUFFLED = "own, held out", "shuffled labels", "own, shuffled labels"
# null -> (how the legend calls it, its grey)
NULLS = {
    "random": ("random directions, central 95%", "rgba(128, 128, 128, 0.20)"),
    "random direction": ("random directions, central 95%", "rgba(128, 128, 128, 0.20)"),
    SHUFFLED: ("shuffled labels, central 95%", "rgba(128, 128, 128, 0.36)"),
    OWN_SHUFFLED: ("shuffled labels, central 95%", "rgba(128, 128, 128, 0.36)"),
    "shuffled modality": ("shuffled modality, central 95%", "rgba(128, 128, 128, 0.36)"),
}
DIRECTION_TITLES = {
    "svd, llm text": "along the LLM's safety steering direction",
    OWN: "along the states' own direction, held out",
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
INTERVAL_COLUMNS = ("condition", "layer", "metric", "value", "low", "high", "n")


@dataclass(frozen=True)
class Panel:
    """One panel of a figure, and which legend entries the figure already has."""

    figure: go.Figure
    row: int
    column: int
    entries: set[str]

    def add(self, trace: go.Scatter, entry: str, *, legend: bool = True) -> None:
        """Draw a trace here; its legend entry appears once per figure."""
        shown = legend and entry not in self.entries
        if shown:
            self.entries.add(entry)
        trace.update(legendgroup=entry, showlegend=shown)
        self.figure.add_trace(trace, row=self.row, col=self.column)


@dataclass(frozen=True)
class Look:
    """How a line looks."""

    colour: str
    dash: str = "solid"
    symbol: str = "circle"
    width: float = 2


@draws
def layer_sweep(result: Result, *, metric: str = "auroc") -> go.Figure:
    """How well harmful and harmless states come apart at every layer, one panel per direction.

    Args:
        result: of `measure_separability`.
        metric: "auroc" or "dprime".

    Raises:
        MechguardError: the result is not a separability table of one split, or lacks the metric.
    """
    table = table_of(result, "layer_sweep", "direction", *INTERVAL_COLUMNS, made_by="measure_separability")
    rows = rows_of_metric(table, "layer_sweep", metric)
    is_null = rows["direction"].isin(list(NULLS))
    lines, nulls = rows[~is_null], rows[is_null]
    directions = list(lines["direction"].unique()) or list(nulls["direction"].unique()[:1])
    titles = [DIRECTION_TITLES.get(name, f"along {escape(name)}") for name in directions]
    figure = facets(titles, columns=len(directions), height=440, shared_yaxes=True, horizontal_spacing=0.03)
    entries: set[str] = set()
    for column, direction in enumerate(directions, 1):
        panel = Panel(figure, 1, column, entries)
        _draw_nulls(panel, _nulls_of(nulls, direction))
        dash = DASHES[(column - 1) % len(DASHES)]
        _draw_conditions(panel, lines[lines["direction"] == direction], metric_name(metric), dash)
    _mark_layers(figure, rows["layer"], panels=len(titles), columns=len(titles))
    figure.update_yaxes(title_text=metric_name(metric), col=1)
    if metric == "auroc":
        figure.update_yaxes(range=[-0.02, 1.04])
    subtitle = f"{sample(lines)}; bands: 95% intervals"
    return headed(figure, "Harmful against harmless states, by layer", subtitle)


@draws
def modality_gap(result: Result, *, metrics: Sequence[str] | None = None) -> go.Figure:
    """The gap between states without and with a picture at every layer, one panel per metric.

    Args:
        result: of `measure_modality_gap`.
        metrics: which, and in which order; all of the result's by default.

    Raises:
        MechguardError: the result is not a modality-gap table of one split, or lacks a metric.
    """
    made_by = "measure_modality_gap"
    table = table_of(result, "modality_gap", "direction", *INTERVAL_COLUMNS, made_by=made_by)
    chosen = list(table["metric"].unique()) if metrics is None else list(metrics)
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = facets(
        [metric_name(metric) for metric in chosen],
        columns=columns,
        height=150 + 215 * rows,
        vertical_spacing=0.28 / max(rows, 1),
        horizontal_spacing=0.06,
    )
    entries: set[str] = set()
    for index, metric in enumerate(chosen):
        found = rows_of_metric(table, "modality_gap", metric)
        panel = Panel(figure, index // columns + 1, index % columns + 1, entries)
        is_null = found["direction"].isin(list(NULLS))
        _draw_nulls(panel, found[is_null])
        _draw_conditions(panel, found[~is_null], METRIC_NAMES.get(metric, metric))
    _mark_layers(figure, table["layer"], panels=len(chosen), columns=columns)
    subtitle = f"{sample(table)} (states); bands: 95% intervals; grey: without a gap"
    return headed(figure, "Modality gap, by layer", subtitle)


@draws
def gates(result: Result) -> go.Figure:
    """How often the gate opens at every layer, one panel per gate; solid is harmful, dotted harmless.

    Args:
        result: of `measure_gates`.

    Raises:
        MechguardError: the result is not a gate table of one split.
    """
    table = table_of(result, "gates", "gate", "label", *INTERVAL_COLUMNS, made_by="measure_gates")
    table = rows_of_metric(table, "gates", "gate_open")
    names = list(table["gate"].unique())
    titles = [f"gate: {escape(name)}" for name in names]
    figure = facets(titles, columns=len(names), height=440, shared_yaxes=True, horizontal_spacing=0.03)
    looks = _looks(table["condition"])
    entries: set[str] = set()
    for column, gate in enumerate(names, 1):
        panel = Panel(figure, 1, column, entries)
        of_gate = table[table["gate"] == gate]
        for (condition, label), rows in of_gate.groupby(["condition", "label"], sort=False):
            look = looks[condition]
            dash = LABEL_DASHES.get(label, "dash")
            line = Look(look.colour, dash, look.symbol, look.width)
            _draw_line(panel, rows, f"{condition}, {label}", line, "open")
    _mark_layers(figure, table["layer"], panels=len(titles), columns=len(titles))
    figure.update_yaxes(range=[-0.02, 1.04], tickformat=".0%")
    figure.update_yaxes(title_text="share of prompts", col=1)
    subtitle = f"{sample(table)} per line; bands: 95% intervals"
    return headed(figure, "How often the gate opens, by layer", subtitle)


def _nulls_of(nulls: pd.DataFrame, direction: str) -> pd.DataFrame:
    """The own direction is fitted anew when labels are shuffled, and has a null of its own."""
    foreign = OWN_SHUFFLED
    if direction == OWN and (nulls["direction"] == OWN_SHUFFLED).any():
        foreign = SHUFFLED
    return nulls[nulls["direction"] != foreign]


def _looks(conditions: pd.Series) -> dict[str, Look]:
    names = list(conditions.unique())
    colour, symbol = colours(names, CONDITION_COLOURS), symbols(names)
    # The LLM's line lies under the VLM's own text line, which it should equal: wider, it stays visible.
    return {
        name: Look(colour[name], symbol=symbol[name], width=5 if family(name) == "llm text" else 2)
        for name in names
    }


def _draw_conditions(panel: Panel, rows: pd.DataFrame, measure: str, dash: str = "solid") -> None:
    for condition, look in _looks(rows["condition"]).items():
        line = Look(look.colour, dash, look.symbol, look.width)
        _draw_line(panel, rows[rows["condition"] == condition], condition, line, measure)


def _draw_line(panel: Panel, rows: pd.DataFrame, name: str, look: Look, measure: str) -> None:
    rows = rows.sort_values("layer")
    entry = escape(name)
    panel.add(_band(rows, translucent(look.colour, 0.13)), entry, legend=False)
    hover = (
        f"{measure} %{{y:.3f}}, 95% interval %{{customdata[0]:.3f}} to %{{customdata[1]:.3f}}"
        "<br>layer %{x}, n = %{customdata[2]}<extra>%{fullData.name}</extra>"
    )
    line = go.Scatter(
        x=rows["layer"].astype(int).tolist(),
        y=rows["value"].tolist(),
        customdata=rows[["low", "high", "n"]].to_numpy().tolist(),
        name=entry,
        mode="lines+markers",
        line={"color": look.colour, "dash": look.dash, "width": look.width},
        marker={"color": look.colour, "symbol": look.symbol, "size": 5 + look.width},
        hovertemplate=hover,
    )
    panel.add(line, entry)


def _draw_nulls(panel: Panel, nulls: pd.DataFrame) -> None:
    """One band per null, as wide as the widest of the conditions."""
    for null, rows in nulls.groupby("direction", sort=False):
        name, grey = NULLS[str(null)]
        widest = rows.groupby("layer", as_index=False).agg(low=("low", "min"), high=("high", "max"))
        panel.add(_band(widest, grey).update(name=name), name)


def _band(rows: pd.DataFrame, colour: str) -> go.Scatter:
    layers = rows["layer"].astype(int).tolist()
    return go.Scatter(
        x=layers + layers[::-1],
        y=rows["high"].tolist() + rows["low"].tolist()[::-1],
        mode="lines",
        fill="toself",
        fillcolor=colour,
        line={"width": 0, "color": colour},
        hoverinfo="skip",
    )


def _mark_layers(figure: go.Figure, layers: pd.Series, *, panels: int, columns: int) -> None:
    """Whole layers on every x axis, and the word under the lowest panel of every column."""
    layered(figure, "x")
    span = int(layers.max()) - int(layers.min())
    figure.update_xaxes(dtick=max(1, -(-span // 12)), range=[layers.min() - 0.3, layers.max() + 0.3])
    for index in range(max(0, panels - columns), panels):
        figure.update_xaxes(title_text="layer", row=index // columns + 1, col=index % columns + 1)
