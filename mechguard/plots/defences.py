"""Every method on one page, each beside its controls."""

from __future__ import annotations

from html import escape

import pandas as pd
import plotly.graph_objects as go

from mechguard.errors import MechguardError
from mechguard.plots.rates import PANELS
from mechguard.plots.style import BLUE, GREY, ORANGE, PURPLE, draws, facets, headed, sample, table_of
from mechguard.result import UNGUARDED, Result

COLUMNS = ("setting", "condition", "guard", "metric", "value", "low", "high", "n")
# What a name says behind its semicolon -> legend, colour and marker.
KINDS = {
    "": ("the method", BLUE, "circle"),
    "random": ("random directions", PURPLE, "diamond-open"),
    "shuffled": ("shuffled labels", ORANGE, "x-thin-open"),
}


@draws
def defences(result: Result, *, setting: str | None = None) -> go.Figure:
    """Attack success, complete refusals and benign compliance of every method, with 95% whiskers.

    A row of panels for each condition; the dotted line is the unguarded model. A method that its controls
    match does what any push of its size would do.

    Args:
        result: of `compare_guards`.
        setting: which set of prompts; the first by default.

    Raises:
        MechguardError: the result is not a comparison, or has no such setting.
    """
    table = table_of(result, "defences", *COLUMNS, made_by="compare_guards")
    known = list(dict.fromkeys(table["setting"]))
    chosen = known[0] if setting is None else setting
    if chosen not in known:
        raise MechguardError(f"defences found no setting {chosen!r}; the result has {', '.join(known)}")
    table = table[table["setting"] == chosen]
    metrics = [metric for metric in PANELS if metric in set(table["metric"])]
    conditions = list(dict.fromkeys(table["condition"]))
    methods = [name for name in dict.fromkeys(table["guard"]) if name != UNGUARDED and ";" not in name]
    titles = [f"{escape(where)}: {PANELS[metric]}" for where in conditions for metric in metrics]
    height = 180 + len(conditions) * (60 + 24 * len(methods))
    figure = facets(
        titles,
        columns=len(metrics),
        height=height,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=60 / (height - 180) if len(conditions) > 1 else 0.0,
    )
    drawn: set[str] = set()
    for row, where in enumerate(conditions, 1):
        for column, metric in enumerate(metrics, 1):
            panel = table[(table["condition"] == where) & (table["metric"] == metric)]
            for kind in KINDS:
                marks = _marks(panel, kind)
                if marks is not None:
                    figure.add_trace(marks.update(showlegend=kind not in drawn), row=row, col=column)
                    drawn.add(kind)
            for value in panel.loc[panel["guard"] == UNGUARDED, "value"]:
                figure.add_vline(value, line={"color": GREY, "dash": "dot"}, row=row, col=column)
    figure.update_xaxes(range=[-0.03, 1.03], tickformat=".0%")
    order = {"categoryorder": "array", "categoryarray": [escape(name) for name in methods[::-1]]}
    figure.update_yaxes(**order, range=[-0.6, len(methods) - 0.4])
    figure.update_yaxes(tickfont={"size": 12})
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yref": "container", "yanchor": "top"}
    figure.update_layout(margin_t=130, legend=legend)
    rates = table[table["metric"].isin(metrics)]
    return headed(figure, f"Defences, {escape(chosen)}", f"{sample(rates)} per mark; dotted: unguarded")


def _marks(panel: pd.DataFrame, kind: str) -> go.Scatter | None:
    parts = panel["guard"].str.partition("; ")
    rows = panel[(parts[2].str.split(" ").str[0] == kind) & (panel["guard"] != UNGUARDED)]
    if rows.empty:
        return None
    name, colour, symbol = KINDS[kind]
    value = rows["value"]
    whiskers = {
        "array": (rows["high"] - value).clip(lower=0).tolist(),
        "arrayminus": (value - rows["low"]).clip(lower=0).tolist(),
        "color": colour,
        "thickness": 1.5,
        "width": 3,
        "visible": kind == "",
    }
    return go.Scatter(
        x=value.tolist(),
        y=[escape(guard.partition("; ")[0]) for guard in rows["guard"]],
        mode="markers",
        name=name,
        legendgroup=name,
        marker={"color": colour, "symbol": symbol, "size": 9, "line": {"color": colour, "width": 2}},
        error_x=whiskers,
        customdata=rows[["guard", "low", "high", "n"]].to_numpy().tolist(),
        hovertemplate="%{customdata[0]}: %{x:.1%}, 95% interval %{customdata[1]:.1%} to %{customdata[2]:.1%}"
        "<br>n = %{customdata[3]}<extra></extra>",
    )
