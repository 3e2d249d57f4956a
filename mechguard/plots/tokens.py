"""Tokens: one prompt, its words and the patches of its picture, coloured by their projection."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mechguard.errors import MechguardError
from mechguard.plots.style import (
    INK,
    draws,
    facets,
    headed,
    layer_slider,
    layered,
    play_buttons,
    table_of,
)
from mechguard.result import Result

COLUMNS = ("id", "condition", "layer", "pos", "token", "is_image", "patch_row", "patch_column", "value")
PER_LINE = 8  # words in a line
# Blue is harmless and vermillion harmful, as in every figure; the middle is nothing.
# Half transparent, so that a word is read on it on a light page and on a dark one.
SCALE = [[0, "rgba(0, 114, 178, 0.7)"], [0.5, "rgba(128, 128, 128, 0.05)"], [1, "rgba(213, 94, 0, 0.7)"]]
FULL = 0.85  # the share of tokens inside the scale: a few, such as the first and the last, dwarf the rest
MARKS = str.maketrans({"▁": "", "Ġ": "", "Ċ": "↵", "\n": "↵"})


@draws
def token_view(
    result: Result, *, id: str | None = None, condition: str | None = None, layer: int | None = None
) -> go.Figure:
    """The tokens of one prompt and the patches of its picture, with a slider over layers.

    Colour is the projection on the layer's first direction: vermillion towards harmful, blue towards
    harmless, none at zero. The scale of a layer holds 85% of its tokens; the others have its end's colour.

    Args:
        result: of `project_tokens`.
        id: which prompt; the first by default.
        condition: which of the prompt's conditions; the last by default, which is one with a picture.
        layer: which layer is shown first; the middle one by default.

    Raises:
        MechguardError: the result is not one of tokens, or holds no such prompt.
    """
    table = table_of(result, "token_view", *COLUMNS, made_by="project_tokens")
    rows, chosen, where = _of_prompt(table, id, condition)
    layers = sorted(int(one) for one in rows["layer"].unique())
    shown = layers[len(layers) // 2] if layer is None else layer
    if shown not in layers:
        raise MechguardError(f"token_view found no layer {layer}; the result has {layers}")
    by_layer = {one: rows[rows["layer"] == one].sort_values("pos") for one in layers}
    patched = bool(rows["patch_row"].notna().any())
    lines = -(-int((by_layer[shown]["patch_row"].isna()).sum()) // PER_LINE)
    figure = facets(
        (["picture"] if patched else []) + ["tokens"],
        columns=1 + patched,
        height=max(430 if patched else 330, 210 + 46 * lines),
        column_widths=[0.32, 0.68] if patched else [1.0],
        horizontal_spacing=0.05,
    )
    for column, grid in enumerate(_grids(by_layer[shown], patched), 1):
        figure.add_trace(grid, row=1, col=column)
    if patched:
        picture = result.about.get("pictures", {}).get(rows["picture"].iloc[0])
        _draw_picture(figure, picture, int(rows["patch_row"].max()) + 1)
    figure.frames = [
        go.Frame(
            name=str(one),
            data=_grids(by_layer[one], patched),
            traces=list(range(1 + patched)),
            layout={"coloraxis": _colours(by_layer[one])},
        )
        for one in layers
    ]
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    figure.update_yaxes(autorange="reversed", col=1 + patched)
    figure.update_layout(coloraxis=_colours(by_layer[shown]), margin={"b": 110, "r": 90})
    slider = {**layer_slider(layers, down=30), "active": layers.index(shown)}
    figure.update_layout(sliders=[slider], updatemenus=[play_buttons(down=45)])
    layered(figure, "frames")
    subtitle = f"{escape(where)}, {escape(str(rows['label'].iloc[0]))}; projection h · v at each token"
    return headed(figure, f"Tokens of {escape(chosen)}", subtitle)


def _of_prompt(table: pd.DataFrame, id: str | None, condition: str | None) -> tuple[pd.DataFrame, str, str]:
    chosen = str(table["id"].iloc[0]) if id is None else id
    rows = table[table["id"].astype(str) == chosen]
    known = list(dict.fromkeys(rows["condition"]))
    if not known:
        ids = ", ".join(map(str, table["id"].unique()[:5]))
        raise MechguardError(f"token_view found no prompt {chosen!r}; the result has {ids}, ...")
    where = known[-1] if condition is None else condition
    if where not in known:
        raise MechguardError(f"prompt {chosen!r} has no condition {where!r}; it has {', '.join(known)}")
    return rows[rows["condition"] == where], chosen, where


def _grids(rows: pd.DataFrame, patched: bool) -> list[go.Heatmap]:
    words = _words(rows[rows["patch_row"].isna()])
    return [_patches(rows[rows["patch_row"].notna()]), words] if patched else [words]


def _patches(rows: pd.DataFrame) -> go.Heatmap:
    side = int(rows["patch_row"].max()) + 1
    grid = np.full((side, side), np.nan)
    grid[rows["patch_row"].astype(int), rows["patch_column"].astype(int)] = rows["value"]
    hover = "patch in row %{y}, column %{x}: %{z:.3f}<extra></extra>"
    return go.Heatmap(z=grid, coloraxis="coloraxis", opacity=0.8, xgap=1, ygap=1, hovertemplate=hover)


def _words(rows: pd.DataFrame) -> go.Heatmap:
    """The words in reading order, in lines; what is left of the last line is empty."""
    lines = max(1, -(-len(rows) // PER_LINE))
    values, words, places = (np.full(lines * PER_LINE, empty, dtype=object) for empty in (None, "", ""))
    values[: len(rows)] = rows["value"].tolist()
    words[: len(rows)] = [_word(row) for row in rows.to_dict("records")]
    places[: len(rows)] = rows["pos"].tolist()
    shape = (lines, PER_LINE)
    return go.Heatmap(
        z=values.reshape(shape).tolist(),
        text=words.reshape(shape).tolist(),
        customdata=places.reshape(shape).tolist(),
        texttemplate="%{text}",
        textfont={"size": 12, "color": INK},
        coloraxis="coloraxis",
        xgap=3,
        ygap=6,
        hoverongaps=False,
        hovertemplate="%{text}, position %{customdata}: %{z:.3f}<extra></extra>",
    )


def _word(row: dict[str, Any]) -> str:
    if row["is_image"]:
        return "[image]"
    return escape(str(row["token"]).translate(MARKS)) or "·"


def _colours(rows: pd.DataFrame) -> dict[str, Any]:
    end = float(np.quantile(rows["value"].abs(), FULL)) or 1.0
    bar = {"thickness": 12, "outlinewidth": 0, "title": {"text": "h · v"}}
    return {"colorscale": SCALE, "cmin": -end, "cmax": end, "colorbar": bar}


def _draw_picture(figure: go.Figure, picture: str | None, side: int) -> None:
    """The picture under its patches, which are half a cell out from whole numbers."""
    figure.update_yaxes(autorange=False, range=[side - 0.5, -0.5], scaleanchor="x", col=1)
    figure.update_xaxes(range=[-0.5, side - 0.5], constrain="domain", col=1)
    if picture:
        place = {"x": -0.5, "y": -0.5, "sizex": side, "sizey": side, "xref": "x", "yref": "y"}
        figure.add_layout_image(source=picture, sizing="stretch", layer="below", **place)
