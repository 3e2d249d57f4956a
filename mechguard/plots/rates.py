"""The headline: what a model answers, by condition and guard."""

from __future__ import annotations

from html import escape
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mechguard.errors import MechguardError
from mechguard.plots.style import (
    GUARD_COLOURS,
    colours,
    draws,
    facets,
    headed,
    rows_of_metric,
    sample,
    table_of,
    translucent,
)
from mechguard.result import Result

# metric -> the title of its panel, which is drawn where the metric was measured
PANELS = {
    "attack_success": "Attack success<br>harmful prompts, lower is better",
    "complete_refusal": "Complete refusal<br>harmful prompts, higher is better",
    "benign_compliance": "Benign compliance<br>harmless prompts, higher is better",
}
COLUMNS = ("condition", "guard", "metric", "value", "low", "high", "n")
PATTERNS = ("", "/", ".", "x", "-", "|")


@draws
def behaviour(result: Result) -> go.Figure:
    """Attack success, complete refusal and benign compliance, as far as measured, with 95% whiskers.

    Bars stand by condition and have the colour of their guard; numbered guards, such as several random
    subspaces, share a colour and differ in hatching.

    Args:
        result: of `evaluate`.

    Raises:
        MechguardError: the result is not a behaviour table of one split, or holds none of these metrics.
    """
    table = table_of(result, "behaviour", *COLUMNS, made_by="evaluate")
    panels = {metric: title for metric, title in PANELS.items() if metric in set(table["metric"])}
    if not panels:
        raise MechguardError(
            f"behaviour found none of the metrics {', '.join(PANELS)}; evaluate some prompts"
        )
    figure = facets(
        list(panels.values()),
        columns=len(panels),
        height=480,
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    colour = colours(list(table["guard"].unique()), GUARD_COLOURS)
    for column, metric in enumerate(panels, 1):
        rows = rows_of_metric(table, "behaviour", metric)
        for guard in table["guard"].unique():
            of_guard = rows[rows["guard"] == guard]
            if not of_guard.empty:
                bars = _bars(of_guard, guard, colour[guard])
                figure.add_trace(bars.update(showlegend=column == 1), row=1, col=column)
    figure.update_yaxes(range=[-0.01, 1.03], tickformat=".0%")
    figure.update_layout(barmode="group", bargap=0.2, bargroupgap=0.08, margin_t=112)
    shown = table[table["metric"].isin(list(panels))]
    subtitle = f"{sample(shown)} per bar; whiskers: 95% intervals"
    return headed(figure, "Behaviour by condition and guard", subtitle)


def _bars(rows: pd.DataFrame, guard: str, colour: str) -> go.Bar:
    value = rows["value"]
    hover = (
        "%{x}: %{y:.1%}, 95% interval %{customdata[0]:.1%} to %{customdata[1]:.1%}"
        "<br>n = %{customdata[2]}<extra>%{fullData.name}</extra>"
    )
    return go.Bar(
        x=_places(rows),
        y=value.tolist(),
        name=escape(guard),
        legendgroup=escape(guard),
        customdata=rows[["low", "high", "n"]].to_numpy().tolist(),
        error_y={
            "array": (rows["high"] - value).clip(lower=0).tolist(),
            "arrayminus": (value - rows["low"]).clip(lower=0).tolist(),
            "color": colour,
            "thickness": 2,
            "width": 3,
        },
        marker={
            "color": translucent(colour, 0.42),
            "line": {"color": colour, "width": 1.5},
            "pattern": {"shape": _pattern(guard), "fgcolor": colour, "bgcolor": translucent(colour, 0.2)},
        },
        hovertemplate=hover,
    )


def _places(rows: pd.DataFrame) -> list[Any]:
    """The condition, and the setting above it where several settings share a metric."""
    conditions = [escape(condition) for condition in rows["condition"]]
    if "setting" not in rows or rows["setting"].nunique() < 2:
        return conditions
    return [[escape(setting) for setting in rows["setting"]], conditions]


def _pattern(guard: str) -> str:
    number = guard.rpartition(" ")[2]
    return PATTERNS[(int(number) - 1) % len(PATTERNS)] if number.isdigit() else ""
