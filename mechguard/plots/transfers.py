"""Every direction under every condition, and the angles between the directions."""

from __future__ import annotations

from html import escape

import pandas as pd
import plotly.graph_objects as go

from mechguard.plots.lines import (
    DASHES,
    INTERVAL_COLUMNS,
    NULLS,
    SHUFFLED,
    Look,
    Panel,
    _draw_line,
    _draw_nulls,
    _mark_layers,
)
from mechguard.plots.style import (
    PALETTE,
    draws,
    facets,
    headed,
    metric_name,
    rows_of_metric,
    sample,
    table_of,
)
from mechguard.result import Result

FEW_LAYERS = 12  # with more, the cells are too small for numbers
CHANCE = {"auroc": 0.5, "dprime": 0.0}


@draws
def transfer_matrix(result: Result, *, metric: str = "auroc") -> go.Figure:
    """How well each direction (rows) separates the states of each condition (panels), by layer.

    Args:
        result: of `measure_transfer`.
        metric: "auroc" or "dprime".

    Raises:
        MechguardError: the result is not a transfer of one split, or lacks the metric.
    """
    table = table_of(result, "transfer_matrix", "direction", *INTERVAL_COLUMNS, made_by="measure_transfer")
    rows = rows_of_metric(table, "transfer_matrix", metric)
    rows = rows[rows["direction"] != SHUFFLED]
    conditions = list(rows["condition"].unique())
    directions = list(rows["direction"].unique())
    figure = facets(
        [f"tested on {escape(name)}" for name in conditions],
        columns=min(2, len(conditions)),
        height=130 + (70 + 34 * len(directions)) * -(-len(conditions) // 2),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.24 / -(-len(conditions) // 2),
    )
    for place, condition in enumerate(conditions):
        cells = _cells(rows[rows["condition"] == condition], directions, metric_name(metric))
        figure.add_trace(cells, row=place // 2 + 1, col=place % 2 + 1)
    top = 1.0 if metric == "auroc" else float(rows["value"].max())
    bar = {"title": {"text": metric_name(metric)}, "thickness": 12, "outlinewidth": 0}
    scale = {"colorscale": "Cividis", "cmin": CHANCE.get(metric, 0.0), "cmax": top, "colorbar": bar}
    figure.update_layout(coloraxis=scale)
    figure.update_xaxes(showgrid=False, dtick=max(1, -(-len(rows["layer"].unique()) // FEW_LAYERS)))
    figure.update_yaxes(showgrid=False, autorange="reversed")
    lowest = range(max(0, len(conditions) - 2), len(conditions))
    for place in lowest:
        figure.update_xaxes(title_text="layer", row=place // 2 + 1, col=place % 2 + 1)
    subtitle = f"{sample(rows)}; rows: what the direction was fitted on; dark is chance"
    return headed(figure, "Every direction under every condition", subtitle)


@draws
def angles(result: Result) -> go.Figure:
    """Cosines and principal angles between the conditions' directions at every layer, and their energies.

    Args:
        result: of `measure_angles`.

    Raises:
        MechguardError: the result is not of `measure_angles`, or mixes splits.
    """
    table = table_of(result, "angles", "direction", *INTERVAL_COLUMNS, made_by="measure_angles")
    metrics = list(dict.fromkeys(["cosine", *sorted(table["metric"].unique())]))
    metrics = [metric for metric in metrics if (table["metric"] == metric).any()]
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure = facets(
        [_angle_name(metric) for metric in metrics],
        columns=columns,
        height=150 + 240 * lines,
        vertical_spacing=0.28 / lines,
        horizontal_spacing=0.06,
    )
    entries: set[str] = set()
    looks = _looks(table)
    for index, metric in enumerate(metrics):
        found = rows_of_metric(table, "angles", metric)
        panel = Panel(figure, index // columns + 1, index % columns + 1, entries)
        is_null = found["direction"].isin(list(NULLS))
        _draw_nulls(panel, found[is_null])
        for name, rows in found[~is_null].groupby(_pair_names(found[~is_null]), sort=False):
            _draw_line(panel, rows, str(name), looks[str(name)], _angle_name(metric))
    _mark_layers(figure, table["layer"], panels=len(metrics), columns=columns)
    subtitle = f"{sample(table)} pairs; bands: 95% intervals, corrected for the noise of fitting"
    return headed(figure, "How far the conditions' safety directions are turned", subtitle)


def _cells(rows: pd.DataFrame, directions: list[str], measure: str) -> go.Heatmap:
    grids = {
        column: rows.pivot(index="direction", columns="layer", values=column).reindex(directions)
        for column in ("value", "low", "high", "n")
    }
    layers = [int(layer) for layer in grids["value"].columns]
    known = [grids[column].to_numpy() for column in ("low", "high", "n")]
    hover = (
        f"layer %{{x}}, fitted on %{{y}}<br>{measure} %{{z:.3f}}, 95% interval %{{customdata[0]:.3f}} to "
        "%{customdata[1]:.3f}, n = %{customdata[2]:.0f}<extra></extra>"
    )
    return go.Heatmap(
        z=grids["value"].to_numpy().tolist(),
        x=layers,
        y=[escape(name) for name in directions],
        customdata=[list(map(list, zip(*line, strict=True))) for line in zip(*known, strict=True)],
        texttemplate="%{z:.2f}" if len(layers) <= FEW_LAYERS else None,
        hovertemplate=hover,
        coloraxis="coloraxis",
        xgap=2,
        ygap=2,
    )


def _pair_names(rows: pd.DataFrame) -> pd.Series:
    same = rows["direction"] == rows["condition"]
    return rows["direction"].where(same, rows["direction"] + " and " + rows["condition"])


def _looks(table: pd.DataFrame) -> dict[str, Look]:
    names = _pair_names(table[~table["direction"].isin(list(NULLS))]).unique()
    return {
        str(name): Look(PALETTE[place % len(PALETTE)], DASHES[place // len(PALETTE) % len(DASHES)])
        for place, name in enumerate(names)
    }


def _angle_name(metric: str) -> str:
    number = metric.removeprefix("principal_angle_")
    return f"Principal angle {number}, degrees" if number != metric else metric_name(metric)
