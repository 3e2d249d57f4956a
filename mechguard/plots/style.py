"""One house style: a plotly template, the same colour for the same thing everywhere, and shared wording."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from html import escape
from typing import Any, Concatenate, ParamSpec
from zlib import crc32

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.subplots import make_subplots

from mechguard.errors import MechguardError
from mechguard.result import Result

TEMPLATE = "mechguard"
Options = ParamSpec("Options")
# Okabe and Ito's palette, which colour-blind readers can tell apart, less black and yellow: those vanish
# on a dark or on a light page.
ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
GREY = "#8C8C8C"
INK = "#777777"  # 4.5 : 1 on white and 4.2 : 1 on near-black, so text is readable on either
LINE = "rgba(128, 128, 128, 0.28)"
FONT = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
CLEAR = "rgba(0, 0, 0, 0)"

CONDITION_COLOURS = {
    "llm text": SKY,
    "text": BLUE,
    "blank": VERMILLION,
    "image": GREEN,
    "noise": PURPLE,
    "typographic": ORANGE,
}
GUARD_COLOURS = {"none": GREY, "projection": ORANGE, "vlm_guard": BLUE, "random": PURPLE}
LABEL_COLOURS = {"harmful": VERMILLION, "harmless": BLUE}
LABEL_DASHES = {"harmful": "solid", "harmless": "dot"}
CONDITION_SYMBOLS = {
    "llm text": "circle-open",
    "text": "circle",
    "blank": "square",
    "image": "diamond",
    "noise": "triangle-up",
    "typographic": "cross",
}
SPARE_SYMBOLS = ("x", "star", "triangle-down", "hexagon", "pentagon", "bowtie")

METRIC_NAMES = {
    "auroc": "AUROC",
    "dprime": "d'",
    "attack_success": "Attack success",
    "keyword_refusal": "Keyword refusal",
    "complete_refusal": "Complete refusal",
    "benign_compliance": "Benign compliance",
    "benign_keyword_refusal": "Benign keyword refusal",
    "benign_complete_refusal": "Benign complete refusal",
    "gate_open": "Gate open",
    "centroid_distance": "Centroid distance",
    "centroid_distance_normalised": "Centroid distance, unit states",
    "cosine_gap": "1 - cosine of centroids",
    "cone_text": "Cone of text states",
    "cone_image": "Cone of image states",
    "rmg": "Relative modality gap",
    "cka": "Linear CKA",
    "shift_norm_ratio": "Shift, relative norm",
    "shift_consistency": "Shift, consistency",
    "modality_accuracy": "Modality, probe accuracy",
    "safety_share": "Safety share of the shift",
    "safety_energy": "Shift's energy in the safety subspace",
    "safety_energy_of_mean": "Mean shift's energy in it",
    "shift_along": "Shift along the direction, harmful +",
    "shift_across": "Shift outside the subspace",
    "shift_along_relative": "Harmful prompts' shift, text distances",
    "fisher": "Fisher's criterion",
    "overlap": "Overlap of the groups",
    "silhouette": "Silhouette",
    "probe_accuracy": "Linear probe, accuracy",
    "auroc_change": "Change in AUROC",
    "auroc_recovered": "AUROC, own over first direction",
    "cosine": "Cosine of first directions",
    "subspace_energy": "Energy in the subspace",
    "gate_auroc": "AUROC of the gate's score",
    "gate_differs": "Gates differ",
}


def house_template() -> go.layout.Template:
    """Transparent, thin-lined, mid-contrast: it sits on a light page and on a dark one."""
    axis = {"gridcolor": LINE, "linecolor": LINE, "zeroline": False, "ticks": "outside"}
    axis |= {"tickcolor": LINE, "automargin": True, "title": {"standoff": 8, "font": {"size": 13}}}
    title = {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 17}}
    title |= {"y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 16}}
    hover = {"bgcolor": "#22262B", "bordercolor": "#22262B", "font": {"color": "#F4F4F4", "family": FONT}}
    layout = go.Layout(
        font={"family": FONT, "color": INK, "size": 13},
        colorway=list(PALETTE),
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        title=title,
        margin={"l": 60, "r": 20, "t": 96, "b": 50},
        xaxis=axis,
        yaxis=axis,
        hoverlabel={**hover, "align": "left"},
        legend={"bgcolor": CLEAR, "font": {"size": 12}, "tracegroupgap": 2},
        modebar={"bgcolor": CLEAR, "color": INK, "activecolor": ORANGE},
        colorscale={"sequential": "Cividis"},
    )
    return go.layout.Template(layout=layout)


pio.templates[TEMPLATE] = house_template()


def facets(titles: Sequence[str], *, columns: int, height: int, **options: Any) -> go.Figure:
    """An empty figure of small panels with these titles, filled row by row."""
    rows = -(-len(titles) // columns)
    figure = make_subplots(rows=rows, cols=columns, subplot_titles=titles, **options)
    figure.update_annotations(font_size=13)
    return figure.update_layout(template=TEMPLATE, height=height)


def headed(figure: go.Figure, title: str, subtitle: str) -> go.Figure:
    """The figure with its title, and under it what the numbers rest on."""
    return figure.update_layout(title={"text": title, "subtitle": {"text": subtitle}})


def draws(
    draw: Callable[Concatenate[Result, Options], go.Figure],
) -> Callable[Concatenate[Result, Options], go.Figure]:
    """A plot whose figure remembers the table behind it, for `save` to write beside the figure."""

    @wraps(draw)
    def remembered(result: Result, /, *args: Options.args, **options: Options.kwargs) -> go.Figure:
        figure = draw(result, *args, **options)
        figure._table = result.table
        return figure

    return remembered


def table_behind(figure: go.Figure) -> pd.DataFrame | None:
    """The table that a figure was drawn from; None for a figure from elsewhere."""
    return getattr(figure, "_table", None)


def layered(figure: go.Figure, way: str) -> go.Figure:
    """The figure with a word for pages that link figures by layer: on "x" or "y", or as "frames"."""
    return figure.update_layout(meta={**(figure.layout.meta or {}), "layer": way})


def layer_slider(layers: Sequence[int], *, left: float = 0.14, down: int = 45) -> dict[str, Any]:
    """A slider over frames named by layer."""
    jump = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"method": "animate", "label": str(layer), "args": [[str(layer)], jump]} for layer in layers]
    return {
        "steps": steps,
        "currentvalue": {"prefix": "layer "},
        "x": left,
        "len": 1 - left,
        "pad": {"t": down},
        "bgcolor": LINE,
        "bordercolor": LINE,
        "activebgcolor": INK,
        "tickcolor": INK,
    }


def play_buttons(*, down: int = 60) -> dict[str, Any]:
    """Play and pause, beside the slider."""
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
        "pad": {"t": down},
        "bgcolor": "rgba(128, 128, 128, 0.12)",
        "bordercolor": LINE,
        "buttons": [
            {"label": "▶", "method": "animate", "args": [None, play]},
            {"label": "❚❚", "method": "animate", "args": [[None], stop]},
        ],
    }


def table_of(result: Result, figure: str, *columns: str, made_by: str) -> pd.DataFrame:
    """The rows of a result that has these columns and comes from one split.

    Raises:
        MechguardError: a column is missing, there are no rows, or several splits are mixed.
    """
    table = result.table
    missing = [column for column in columns if column not in table]
    if missing:
        raise MechguardError(
            f"{figure} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}, but this result has "
            f"{', '.join(map(str, table.columns))}; give it the result of {made_by}"
        )
    if table.empty:
        raise MechguardError(f"{figure} was given a result without rows; check what it was filtered by")
    splits = sorted(table["split"].dropna().unique()) if "split" in table else []
    if len(splits) > 1:
        raise MechguardError(
            f"{figure} would mix the splits {', '.join(splits)}; give result.where(split={splits[0]!r})"
        )
    return table


def rows_of_metric(table: pd.DataFrame, figure: str, metric: str) -> pd.DataFrame:
    """The rows of one metric.

    Raises:
        MechguardError: there are none.
    """
    rows = table[table["metric"] == metric]
    if rows.empty:
        known = ", ".join(sorted(table["metric"].unique()))
        raise MechguardError(f"{figure} found no metric {metric!r}; the result has {known}")
    return rows


def colours(names: Iterable[str], fixed: Mapping[str, str]) -> dict[str, str]:
    """A colour for each name: its fixed one, else one drawn from the name, distinct where possible."""
    chosen = {name: fixed[family(name)] for name in names if family(name) in fixed}
    for name in sorted(set(names) - set(chosen)):
        start = crc32(name.encode()) % len(PALETTE)
        turned = PALETTE[start:] + PALETTE[:start]
        free = [colour for colour in turned if colour not in chosen.values()]
        chosen[name] = (free or turned)[0]
    return chosen


def symbols(names: Iterable[str]) -> dict[str, str]:
    """A marker for each condition, fixed where it is known."""
    return {
        name: CONDITION_SYMBOLS.get(family(name), SPARE_SYMBOLS[crc32(name.encode()) % len(SPARE_SYMBOLS)])
        for name in names
    }


def family(name: str) -> str:
    """What decides a name's colour: "llm text -> vlm blank" is blank, "random 2" is random."""
    last = name.split("->")[-1].strip().removeprefix("vlm ")
    head, _, tail = last.rpartition(" ")
    return head if head and tail.isdigit() else last


def translucent(colour: str, opacity: float) -> str:
    """A hexadecimal colour as rgba."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def metric_name(metric: str) -> str:
    """How a metric is called in figures and tables."""
    return METRIC_NAMES.get(metric, escape(metric.replace("_", " ")))


def sample(table: pd.DataFrame) -> str:
    """What the numbers rest on, for a subtitle: "test split, n = 100"."""
    parts = [f"{escape(str(split))} split" for split in table.get("split", pd.Series()).dropna().unique()]
    if "n" in table and table["n"].notna().any():
        low, high = int(table["n"].min()), int(table["n"].max())
        parts.append(f"n = {low}" if low == high else f"n = {low} to {high}")
    return ", ".join(parts)


def wrapped(text: str, *, width: int = 60, lines: int = 8) -> str:
    """Text for a hover box: escaped, in lines of about `width` characters, cut after `lines`."""
    pieces = textwrap.wrap(text, width, max_lines=lines, placeholder=" …")
    return "<br>".join(escape(piece) for piece in pieces)
