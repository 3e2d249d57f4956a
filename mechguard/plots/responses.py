"""Responses before and after a guard, side by side."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from mechguard.errors import MechguardError
from mechguard.plots.style import (
    BLUE,
    CLEAR,
    GREY,
    INK,
    LINE,
    ORANGE,
    TEMPLATE,
    VERMILLION,
    draws,
    headed,
    table_of,
    wrapped,
)
from mechguard.result import UNGUARDED, Result

COLUMNS = ("condition", "guard", "id", "label", "sent", "response", "complied")
VERDICTS = {
    "answered": VERMILLION,
    "refused": BLUE,
    "refused, incompletely": ORANGE,
    "neither": GREY,
}


@draws
def response_table(
    result: Result,
    *,
    guard: str = "vlm_guard",
    condition: str | None = None,
    label: str = "harmful",
    count: int = 8,
) -> go.Figure:
    """What was answered without and with a guard, and how it was judged.

    The prompts are spread evenly over the set in its own order, whatever was answered.

    Args:
        result: the judged responses, e.g. `Result(pandas.read_json("responses.jsonl", lines=True))`.
        guard: beside the unguarded model.
        condition: an image condition; the last by default.
        count: prompts shown.

    Raises:
        MechguardError: the result holds no responses of this guard under this condition.
    """
    table = table_of(result, "response_table", *COLUMNS, made_by="evaluate(..., responses=FILE)")
    table = table[table["label"] == label]
    known = list(dict.fromkeys(table["condition"]))
    where = known[-1] if condition is None and known else condition
    shown = table[table["condition"] == where]
    before, after = (shown[shown["guard"] == name].set_index("id") for name in (UNGUARDED, guard))
    both = [prompt for prompt in before.index if prompt in after.index]
    if not both:
        raise MechguardError(
            f"response_table found no {label} prompt answered without a guard and with {guard!r} under "
            f"{where!r}; the result has the guards {', '.join(table['guard'].unique())} under "
            f"{', '.join(known)}"
        )
    chosen = both[:: max(1, len(both) // count)][:count]
    columns = [
        [wrapped(str(before.at[prompt, "sent"]), width=46) for prompt in chosen],
        *[_cells(rows.loc[chosen]) for rows in (before, after)],
    ]
    figure = go.Figure(
        go.Table(
            header={
                "values": ["prompt, as sent", "unguarded", guard],
                "align": "left",
                "fill_color": LINE,
                "font": {"color": INK},
            },
            cells={
                "values": columns,
                "align": "left",
                "fill_color": CLEAR,
                "line_color": LINE,
                "font": {"color": INK, "size": 12},
            },
        )
    )
    lines = sum(max(cell.count("<br>") for cell in row) + 1 for row in zip(*columns, strict=True))
    figure.update_layout(template=TEMPLATE, height=190 + 20 * lines, margin={"b": 10})
    return headed(figure, f"Responses beside: {where}", f"{len(chosen)} of {len(both)} {label} prompts")


def verdict(complied: bool, complete: bool, keyword: bool) -> str:
    """What the judge made of a response, in words."""
    if complied:
        return "answered"
    if complete:
        return "refused"
    return "refused, incompletely" if keyword else "neither"


def _cells(rows: pd.DataFrame) -> list[str]:
    cells = []
    for row in rows.to_dict("records"):
        word = verdict(row["complied"], row.get("complete_refusal", False), row.get("keyword_refusal", False))
        text = wrapped(str(row["response"]) or "(empty)", width=52, lines=5)
        cells.append(f'<b><span style="color:{VERDICTS[word]}">{word}</span></b><br>{text}')
    return cells
