"""Safety against helpfulness: every guard as a point, and the ones that no other guard beats."""

from __future__ import annotations

from html import escape

import pandas as pd
import plotly.graph_objects as go

from mechguard.errors import MechguardError
from mechguard.plots.style import (
    GREY,
    GUARD_COLOURS,
    colours,
    draws,
    facets,
    family,
    headed,
    metric_name,
    sample,
    table_of,
)
from mechguard.result import UNGUARDED, Result

COLUMNS = ("condition", "guard", "metric", "value", "low", "high", "n")
SHAPES = {UNGUARDED: "x", "random": "diamond-open"}
ERROR = {"thickness": 1, "width": 0}


@draws
def pareto(
    result: Result, *, harm: str = "attack_success", help: str = "benign_compliance", setting: str = ""
) -> go.Figure:
    """Attack success against benign compliance, a panel per condition, with 95% whiskers.

    Down and to the right is good. The stepped line joins the guards on the front: no other one has both a
    lower attack success and a higher benign compliance. Controls (random subspaces) are hollow.

    Args:
        result: of `evaluate`, or of `compare_guards`.
        harm: the metric that should be low.
        help: the metric that should be high.
        setting: which set of prompts; the first by default.

    Raises:
        MechguardError: the result is not a behaviour table of one split, or lacks one of the metrics.
    """
    table = table_of(result, "pareto", *COLUMNS, made_by="evaluate")
    table = _of_setting(table, setting)
    missing = [metric for metric in (harm, help) if metric not in set(table["metric"])]
    if missing:
        known = ", ".join(sorted(table["metric"].unique()))
        raise MechguardError(f"pareto found no metric {missing[0]!r}; the result has {known}")
    points = _points(table, harm, help)
    conditions = list(dict.fromkeys(points["condition"]))
    figure = facets(
        [escape(name) for name in conditions],
        columns=len(conditions),
        height=480,
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    guards = list(dict.fromkeys(points["guard"]))
    colour = colours(guards, GUARD_COLOURS)
    for column, condition in enumerate(conditions, 1):
        rows = points[points["condition"] == condition]
        front = _front(rows)
        stairs = go.Scatter(
            x=front["help"].tolist(),
            y=front["harm"].tolist(),
            mode="lines",
            line={"shape": "hv", "color": GREY, "width": 1, "dash": "dot"},
            name="front",
            legendgroup="front",
            showlegend=column == 1,
            hoverinfo="skip",
        )
        figure.add_trace(stairs, row=1, col=column)
        for row in rows.to_dict("records"):
            mark = _mark(row, colour[row["guard"]]).update(showlegend=column == 1)
            figure.add_trace(mark, row=1, col=column)
    figure.update_xaxes(title_text=metric_name(help), tickformat=".0%", range=[-0.05, 1.06])
    figure.update_yaxes(tickformat=".0%", range=[-0.05, 1.06])
    figure.update_yaxes(title_text=metric_name(harm), col=1)
    subtitle = f"{sample(table[table['metric'].isin([harm, help])])} per mark; down and right is good"
    return headed(figure, f"{metric_name(harm)} against {metric_name(help).lower()}", subtitle)


def _of_setting(table: pd.DataFrame, setting: str) -> pd.DataFrame:
    if "setting" not in table:
        return table
    known = list(dict.fromkeys(table["setting"]))
    chosen = setting or known[0]
    if chosen not in known:
        raise MechguardError(f"pareto found no setting {chosen!r}; the result has {', '.join(known)}")
    return table[table["setting"] == chosen]


def _points(table: pd.DataFrame, harm: str, help: str) -> pd.DataFrame:
    """One row per condition and guard, with both metrics and their intervals."""
    keys = ["condition", "guard"]
    columns = [*keys, "value", "low", "high"]
    sides = {
        name: table.loc[table["metric"] == metric, columns].rename(
            columns={"value": name, "low": f"{name}_low", "high": f"{name}_high"}
        )
        for name, metric in (("harm", harm), ("help", help))
    }
    return sides["harm"].merge(sides["help"], on=keys)


def _front(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that no other row beats in both, by increasing help."""
    ordered = rows.sort_values(["help", "harm"], ascending=[False, True])
    best = ordered["harm"].cummin().shift(fill_value=float("inf"))
    return ordered[ordered["harm"] < best].iloc[::-1]


def _mark(row: dict[str, float | str], colour: str) -> go.Scatter:
    guard = str(row["guard"])
    control = "; " in guard
    name = escape(guard)
    sides = {
        side: {
            "array": [max(0.0, float(row[f"{key}_high"]) - float(row[key]))],
            "arrayminus": [max(0.0, float(row[key]) - float(row[f"{key}_low"]))],
            "color": colour,
            **ERROR,
        }
        for side, key in (("error_x", "help"), ("error_y", "harm"))
    }
    symbol = "diamond-open" if control else SHAPES.get(family(guard), "circle")
    return go.Scatter(
        x=[row["help"]],
        y=[row["harm"]],
        mode="markers",
        name=name,
        legendgroup=name,
        marker={"color": colour, "size": 10, "symbol": symbol, "line": {"color": colour, "width": 2}},
        **sides,
        hovertemplate="answers %{y:.1%} of harmful and %{x:.1%} of harmless prompts"
        "<extra>%{fullData.name}</extra>",
    )
