"""Figures of circuits: which heads and MLPs write a direction, and what patching and ablation change."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go

from mechguard.errors import MechguardError
from mechguard.plots.style import (
    BLUE,
    CONDITION_COLOURS,
    GREY,
    TEMPLATE,
    VERMILLION,
    colours,
    draws,
    facets,
    headed,
    rows_of_metric,
    sample,
    table_of,
    translucent,
)
from mechguard.result import UNGUARDED, Result

SIGNED = [[0, BLUE], [0.5, "#F2F2F2"], [1, VERMILLION]]  # below zero, zero, above
MLP = "MLP"
POSITIONS = ("image", "harmful word", "request", "template", "last", "answer")
COMPONENT_NAMES = {
    "embedding": "embedding",
    "mlp": "MLP",
    "attention_bias": "attention bias",
    "attention": "attention",
    "added": "added between layers",
}
PANEL_COLUMNS = ("comparison", "source", "condition", "label", "split")
METRIC_TITLES = {
    "difference": "what components write more",
    "attention_image": "attention to the picture",
    "value_image": "written from the picture",
    "value_text": "written from the text",
    "log_odds": "log-odds of refusal, change in nats",
    "projection": "projection on the SSD, change",
    "log_odds_restored": "log-odds of refusal, share restored",
    "projection_restored": "projection on the SSD, share restored",
}


@draws
def head_heatmap(result: Result, *, metric: str | None = None, position: str | None = None) -> go.Figure:
    """One number for every head, layer by head, and for the MLP of each layer beside them.

    Args:
        result: of `rank_components`, `measure_attention` or `patch`, as means over prompts; a panel is drawn
            for each comparison, direction of patching, or condition.
        metric: one of its metrics; may be left out where there is one.
        position: one of its positions; may be left out where there is one.

    Raises:
        MechguardError: the result has no heads, or a cell more than once.
    """
    table = table_of(result, "head_heatmap", "layer", "head", "value", made_by="circuits.rank_components")
    table = _chosen(table, "head_heatmap", metric=metric, position=position)
    if "component" in table:
        table = table[table["component"].isin(["head", "mlp"])]
    panels = _panels(table)
    names = [str(head) for head in sorted(int(h) for h in table["head"].unique() if h >= 0)]
    columns = [*names, MLP] if (table["head"] < 0).any() else names
    layers = sorted(int(layer) for layer in table["layer"].unique())
    figure = facets(
        [escape(title) for title in panels],
        columns=min(len(panels), 2),
        height=150 + 300 * -(-len(panels) // 2),
    )
    for index, rows in enumerate(panels.values()):
        grid = rows.assign(place=[MLP if head < 0 else str(int(head)) for head in rows["head"]])
        if grid.duplicated(["layer", "place"]).any():
            raise MechguardError(
                "head_heatmap found several rows for one head; pick some with result.where(...)"
            )
        wide = grid.pivot(index="layer", columns="place", values="value").reindex(
            index=layers, columns=columns
        )
        figure.add_trace(
            go.Heatmap(
                z=wide.to_numpy().tolist(),
                x=columns,
                y=[str(layer) for layer in layers],
                texttemplate="%{z:.2f}" if wide.size <= 200 else None,
                hovertemplate="layer %{y}, head %{x}: %{z:.3f}<extra></extra>",
                coloraxis="coloraxis",
                xgap=2,
                ygap=2,
            ),
            row=index // 2 + 1,
            col=index % 2 + 1,
        )
    _signed(figure, table["value"])
    figure.update_xaxes(type="category", title_text="head", showgrid=False)
    figure.update_yaxes(type="category", title_text="layer", showgrid=False)
    title = METRIC_TITLES.get(str(metric or table.get("metric", pd.Series([""])).iloc[0]), "by head")
    where = f", {position}" if position else ""
    return headed(figure, f"Heads: {title}{where}", f"{sample(table)}; means over prompts")


@draws
def attribution_waterfall(result: Result, *, top: int = 8) -> go.Figure:
    """From nothing to the whole difference: the components that make most of it, then all others together.

    Args:
        result: of `rank_components`, one comparison.
        top: so many components are drawn by themselves, largest first, whatever their sign.

    Raises:
        MechguardError: the result is no ranking, or holds several.
    """
    table = table_of(
        result,
        "attribution_waterfall",
        "component",
        "layer",
        "head",
        "value",
        made_by="circuits.rank_components",
    )
    if table.duplicated(["component", "layer", "head"]).any():
        raise MechguardError(
            "attribution_waterfall found several rows for a component; give result.where(comparison=..., "
            "position=...)"
        )
    order = table.reindex(table["value"].abs().sort_values(ascending=False).index)
    shown, rest = order.head(top), order.iloc[top:]
    names = [*(_component_name(row) for row in shown.itertuples()), f"{len(rest)} others", "all"]
    values = [*shown["value"], rest["value"].sum(), table["value"].sum()]
    spread = [
        f"<br>95% interval {row.low:.3f} to {row.high:.3f}" if hasattr(row, "low") else ""
        for row in shown.itertuples()
    ]
    figure = go.Figure(
        go.Waterfall(
            x=names,
            y=values,
            measure=["relative"] * (len(names) - 1) + ["total"],
            text=[f"{value:+.2f}" for value in values],
            textposition="outside",
            customdata=[*spread, "", ""],
            hovertemplate="%{x}: %{delta:.3f}%{customdata}<extra></extra>",
            increasing={"marker": {"color": VERMILLION}},
            decreasing={"marker": {"color": BLUE}},
            totals={"marker": {"color": GREY}},
            connector={"line": {"color": GREY, "width": 1}},
            cliponaxis=False,
        )
    )
    figure.update_layout(template=TEMPLATE, height=430, showlegend=False)
    figure.update_yaxes(title_text="projection on the SSD")
    comparison = table["comparison"].iloc[0] if "comparison" in table else "first - second"
    return headed(figure, f"What makes the difference: {escape(str(comparison))}", sample(table))


@draws
def patching(
    result: Result, *, metric: str = "log_odds_restored", components: Sequence[str] = ("residual", "mlp")
) -> go.Figure:
    """What patching changes, layer by part of the prompt: a panel for each component and direction.

    Args:
        result: of `patch`.
        metric: "log_odds", "projection", or either with "_restored".
        components: of its components, those that are not heads; for heads there is `head_heatmap`.

    Raises:
        MechguardError: the result has none of these rows.
    """
    columns = ("source", "condition", "component", "layer", "position", "metric", "value")
    table = table_of(result, "patching", *columns, made_by="circuits.patch")
    rows = rows_of_metric(table, "patching", metric)
    rows = rows[rows["component"].isin(components)]
    if rows.empty:
        raise MechguardError(f"patching found none of the components {', '.join(components)}; patch them")
    ways = list(dict.fromkeys(zip(rows["source"], rows["condition"], strict=True)))
    titles = [f"{component}, {source} → {target}" for component in components for source, target in ways]
    figure = facets(
        [escape(title) for title in titles], columns=len(ways), height=190 + 230 * len(components),
        shared_xaxes=True, vertical_spacing=0.2 / len(components),
    )  # fmt: skip
    positions = [position for position in POSITIONS if position in set(rows["position"])]
    layers = sorted(int(layer) for layer in rows["layer"].unique())
    for row, component in enumerate(components):
        for column, (source, target) in enumerate(ways):
            part = rows[
                (rows["component"] == component) & (rows["source"] == source) & (rows["condition"] == target)
            ]
            wide = part.pivot(index="layer", columns="position", values="value").reindex(
                layers, columns=positions
            )
            figure.add_trace(
                go.Heatmap(
                    z=wide.to_numpy().tolist(),
                    x=positions,
                    y=[str(layer) for layer in layers],
                    texttemplate="%{z:.2f}",
                    hovertemplate="layer %{y}, %{x}: %{z:.3f}<extra></extra>",
                    coloraxis="coloraxis",
                    xgap=2,
                    ygap=2,
                ),
                row=row + 1,
                col=column + 1,
            )
    _signed(figure, rows["value"])
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", title_text="layer", showgrid=False)
    what = METRIC_TITLES.get(metric, metric)
    return headed(figure, f"Patching: {what}", f"{sample(rows)}; source → run that is patched")


@draws
def attention_map(result: Result, *, heads: int = 6) -> go.Figure:
    """Where in the picture heads look from the last token: the patches of those that look there most.

    Args:
        result: of `map_attention`.
        heads: so many are drawn, those with the largest share of attention on the picture first.

    Raises:
        MechguardError: the result is no map of attention.
    """
    columns = ("layer", "head", "position", "row", "column", "value")
    table = table_of(result, "attention_map", *columns, made_by="circuits.map_attention")
    shares = (
        table.groupby(["layer", "head"], sort=False)["value"].sum().sort_values(ascending=False).head(heads)
    )
    patches = table[table["row"] >= 0]
    titles = [
        f"layer {layer}, head {head}<br>{share:.0%} on the picture" for (layer, head), share in shares.items()
    ]
    across = min(3, len(titles))
    down = -(-len(titles) // across)
    figure = facets(titles, columns=across, height=160 + 270 * down, vertical_spacing=0.32 / max(down, 1))
    for index, (layer, head) in enumerate(shares.index):
        part = patches[(patches["layer"] == layer) & (patches["head"] == head)]
        wide = part.pivot(index="row", columns="column", values="value")
        figure.add_trace(
            go.Heatmap(
                z=wide.to_numpy().tolist(),
                hovertemplate="row %{y}, column %{x}: %{z:.2%}<extra></extra>",
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
            ),
            row=index // across + 1,
            col=index % across + 1,
        )
        figure.update_yaxes(
            autorange="reversed", scaleanchor=f"x{index + 1 if index else ''}", row=index // across + 1,
            col=index % across + 1,
        )  # fmt: skip
    bar = {"tickformat": ".1%", "thickness": 12, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": "Cividis", "cmin": 0, "colorbar": bar}, margin_t=130)
    figure.update_xaxes(showgrid=False, showticklabels=False, ticks="", constrain="domain")
    figure.update_yaxes(showgrid=False, showticklabels=False, ticks="", constrain="domain")
    others = " Tokens that are no patch are left out." if (table["row"] < 0).any() else ""
    return headed(figure, "Attention over the picture's patches", f"{sample(table)}, mean.{others}")


@draws
def logit_lens(result: Result) -> go.Figure:
    """The log-odds of refusal read off each layer: a line per condition and guard, with 95% bands.

    Args:
        result: of `apply_logit_lens`, or several added up.

    Raises:
        MechguardError: it is not one.
    """
    columns = ("condition", "guard", "layer", "value", "low", "high")
    table = table_of(result, "logit_lens", *columns, made_by="circuits.apply_logit_lens")
    table = table[table["layer"].astype(str) != "output"]
    figure = go.Figure()
    shades = colours(list(table["condition"].unique()), CONDITION_COLOURS)
    for (condition, guard), line in table.groupby(["condition", "guard"], sort=False):
        name = condition if guard == UNGUARDED else f"{condition}, {guard}"
        x, colour = [int(layer) for layer in line["layer"]], shades[str(condition)]
        figure.add_trace(
            go.Scatter(
                x=[*x, *x[::-1]], y=[*line["high"], *line["low"][::-1]], fill="toself", mode="lines",
                line_width=0,
                fillcolor=translucent(colour, 0.18), hoverinfo="skip", showlegend=False, legendgroup=name,
            )
        )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=x, y=line["value"], name=escape(str(name)), mode="lines+markers", legendgroup=name,
                line={"color": colour, "dash": "solid" if guard == UNGUARDED else "dash"},
                hovertemplate="layer %{x}: %{y:.2f} nats<extra>" + escape(str(name)) + "</extra>",
            )
        )  # fmt: skip
    figure.add_hline(y=0, line={"color": GREY, "width": 1})
    figure.update_layout(template=TEMPLATE, height=430)
    figure.update_xaxes(title_text="layer", dtick=1 if table["layer"].nunique() <= 16 else None)
    figure.update_yaxes(title_text="log-odds of refusal, nats")
    return headed(figure, "Logit lens: where the model leans to refusing", f"{sample(table)}; 95% bands")


@draws
def component_checks(result: Result, *, metric: str = "refusal") -> go.Figure:
    """What the top components change beside as many random ones, by how many there are.

    Args:
        result: of `Check.ablate` and `Check.restore`, added up.
        metric: "refusal" (the share of prompts with positive log-odds), "log_odds" or "projection".

    Raises:
        MechguardError: the result holds no such check.
    """
    columns = ("check", "condition", "k", "choice", "metric", "value", "low", "high")
    table = table_of(result, "component_checks", *columns, made_by="circuits.Check")
    rows = rows_of_metric(table, "component_checks", metric)
    kinds = {
        "ablate": "taken out of text",
        "restore": "given back beside a picture",
    }
    found = [check for check in kinds if check in set(rows["check"])]
    if not found:
        raise MechguardError("component_checks was given neither an ablation nor a restoration")
    figure = facets([kinds[check] for check in found], columns=len(found), height=400, shared_yaxes=True)
    styles = {"top": (VERMILLION, "top k by attribution"), "random": (GREY, "k random ones (95% of draws)")}
    for column, check in enumerate(found):
        part = rows[rows["check"] == check]
        start = part[part["choice"] == "none"]
        for choice, (colour, name) in styles.items():
            line = pd.concat([start, part[part["choice"] == choice]]).sort_values("k")
            figure.add_trace(
                go.Scatter(
                    x=line["k"], y=line["value"], name=name, mode="lines+markers", line_color=colour,
                    error_y={"array": line["high"] - line["value"], "arrayminus": line["value"] - line["low"],
                             "thickness": 1},
                    legendgroup=choice, showlegend=column == 0,
                    hovertemplate="k = %{x}: %{y:.2f}<extra>" + name + "</extra>",
                ),
                row=1, col=column + 1,
            )  # fmt: skip
    figure.update_xaxes(title_text="components")
    names = {
        "refusal": "share that refuses",
        "log_odds": "log-odds of refusal, nats",
        "projection": "projection",
    }
    figure.update_yaxes(title_text=names.get(metric, metric), col=1)
    if metric == "refusal":
        figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03])
    return headed(figure, "Do the components that write it matter?", f"{sample(rows)}; held-out prompts")


def _chosen(table: pd.DataFrame, figure: str, **wanted: str | None) -> pd.DataFrame:
    for column, value in wanted.items():
        if value is not None:
            table = table[table[column] == value] if column in table else table.iloc[:0]
    if table.empty:
        asked = ", ".join(f"{column} {value!r}" for column, value in wanted.items() if value is not None)
        raise MechguardError(f"{figure} found no rows with {asked or 'heads'}")
    return table


def _panels(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """One table per panel, by its title; columns that do not vary are left out of the titles."""
    varying = [column for column in PANEL_COLUMNS if column in table and table[column].nunique() > 1]
    if {"source", "condition"} <= set(varying):
        table = table.assign(
            way=[f"{a} → {b}" for a, b in zip(table["source"], table["condition"], strict=True)]
        )
        varying = ["way"]
    if not varying:
        return {"": table}
    keys = table[varying].astype(str).agg(", ".join, axis=1)
    return {str(title): rows for title, rows in table.groupby(keys, sort=False)}


def _component_name(row: object) -> str:
    component, layer, head = (getattr(row, name) for name in ("component", "layer", "head"))
    if component == "head":
        return f"head {layer}.{head}"
    name = COMPONENT_NAMES.get(component, str(component))
    return name if layer < 0 else f"{name} {layer}"


def _signed(figure: go.Figure, values: pd.Series) -> None:
    """Colours around zero, as wide as the numbers."""
    most = float(values.abs().max()) or 1.0
    bar = {"thickness": 12, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": SIGNED, "cmin": -most, "cmax": most, "colorbar": bar})
