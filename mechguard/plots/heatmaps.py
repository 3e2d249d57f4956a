"""Heatmaps of sweeps: one cell per set of layers and strength."""

from __future__ import annotations

from html import escape
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mechguard.errors import MechguardError
from mechguard.plots.style import draws, facets, headed, metric_name, rows_of_metric, sample, table_of
from mechguard.result import UNGUARDED, Result

FACETS = ("condition", "variant")
MOST_COLUMNS = 5  # panels beside each other
# Where low is good, the scale is turned, so that the bright end is the good one in every figure.
LOW_IS_GOOD = ("attack_success", "benign_keyword_refusal", "benign_complete_refusal")


@draws
def sweep_heatmap(result: Result, *, metric: str) -> go.Figure:
    """One metric by layers, rank and alpha: a column of panels per `variant`, a row per `condition`.

    Rows of the unguarded model (layers "none") are not cells; their value stands in the title of the row.

    Args:
        result: of `sweep`.
        metric: e.g. "attack_success".

    Raises:
        MechguardError: the result is not a sweep, lacks the metric, or holds a cell more than once.
    """
    table = table_of(result, "sweep_heatmap", "layers", "alpha", "metric", "value", made_by="sweep")
    rows = rows_of_metric(table, "sweep_heatmap", metric)
    guarded = rows["layers"].astype(str) != UNGUARDED
    plain, cells = rows[~guarded], _with_facets(rows[guarded])
    _check_cells(cells, metric)
    conditions, variants = list(cells["condition"].unique()), list(cells["variant"].unique())
    figure = facets(
        [_title(c, v, plain) for c in conditions for v in variants],
        columns=len(variants),
        height=190 + max(170, 26 * cells["layers"].nunique()) * len(conditions),
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.02,
        vertical_spacing=0.28 / len(conditions),
    )
    # The same rows in every panel: panels that share an axis must agree on the order of its words.
    order = list(dict.fromkeys(cells["layers"]))[::-1]
    if variants != [""]:
        order.sort(key=lambda text: (len(text.split(",")[0].split()), text))
    for (condition, variant), panel in cells.groupby(list(FACETS), sort=False):
        place = (conditions.index(condition) + 1, variants.index(variant) + 1)
        figure.add_trace(_heatmap(panel, order), row=place[0], col=place[1])
    turned = "Cividis_r" if metric in LOW_IS_GOOD else "Cividis"
    bar = {"tickformat": ".0%", "thickness": 12, "outlinewidth": 0}
    figure.update_layout(margin_t=112)
    figure.update_layout(coloraxis={"colorscale": turned, "cmin": 0, "cmax": 1, "colorbar": bar})
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_xaxes(title_text="alpha", row=len(conditions))
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_yaxes(title_text="" if variants == [""] else "layers", col=1)
    subtitle = f"{sample(rows)} per cell; bright is good"
    return headed(figure, f"{metric_name(metric)} by layers and strength", subtitle)


def _with_facets(cells: pd.DataFrame) -> pd.DataFrame:
    absent = {column: "" for column in FACETS if column not in cells}
    filled = cells.assign(**absent)
    layers = filled["layers"].map(_layers_text)
    if "rank" in filled and filled["rank"].nunique() > 1:
        layers = layers + ", rank " + filled["rank"].astype(str)
    if filled["variant"].nunique() > MOST_COLUMNS:  # too many for panels: a row each
        layers = filled["variant"] + (", layers " + layers if layers.nunique() > 1 else "")
        filled = filled.assign(variant="")
    return filled.assign(layers=layers)


def _layers_text(layers: Any) -> str:
    """As written; a column of single layers may have been read back as numbers."""
    return str(int(layers)) if isinstance(layers, float) else str(layers)


def _check_cells(cells: pd.DataFrame, metric: str) -> None:
    if cells.empty:
        raise MechguardError(f"the sweep has no guarded setting with {metric!r}; sweep over layers and alpha")
    keys = [*FACETS, "layers", "alpha"]
    if not cells.duplicated(keys).any():
        return
    others = [c for c in ("setting", "guard", "source", "phase") if c in cells and c not in keys]
    varying = [column for column in others if cells[column].nunique() > 1]
    raise MechguardError(
        f"several rows share a cell of layers and alpha; they differ in {', '.join(varying) or 'nothing'}; "
        "pick one with result.where(...)"
    )


def _title(condition: str, variant: str, plain: pd.DataFrame) -> str:
    title = " · ".join(escape(part) for part in (variant, condition) if part)
    if "condition" in plain:
        plain = plain[plain["condition"] == condition]
    return f"{title}<br>unguarded {plain['value'].iloc[0]:.0%}" if len(plain) == 1 else title


def _heatmap(cells: pd.DataFrame, order: list[str]) -> go.Heatmap:
    columns = ["value", *[column for column in ("low", "high", "n") if column in cells]]
    grids = {
        column: cells.pivot_table(index="layers", columns="alpha", values=column).reindex(order)
        for column in columns
    }
    hover = "layers %{y}, alpha %{x}: %{z:.1%}"
    if {"low", "high", "n"} <= set(grids):
        hover += ", 95% interval %{customdata[0]:.1%} to %{customdata[1]:.1%}<br>n = %{customdata[2]:.0f}"
    known = [grids[column].to_numpy() for column in columns[1:]]
    return go.Heatmap(
        z=grids["value"].to_numpy().tolist(),
        x=[f"{alpha:g}" for alpha in grids["value"].columns],
        y=[escape(text) for text in order],
        customdata=[list(map(list, zip(*rows, strict=True))) for rows in zip(*known, strict=True)],
        texttemplate="%{z:.0%}",
        hovertemplate=hover + "<extra></extra>",
        coloraxis="coloraxis",
        xgap=2,
        ygap=2,
    )
