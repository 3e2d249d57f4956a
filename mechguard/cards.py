"""Cards: how the objects of the straight line show themselves in a notebook.

    what it is - its facts - a small preview - what to do next

Colours are those of the page, so that a card is readable in a light and in a dark notebook; every text is
escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

BOX = "border-left:4px solid #0072B2;padding:.15em .9em;margin:.4em 0;"
CELL = "text-align:left;padding:.1em 1.2em .1em 0;vertical-align:top;background:none;"
QUIET = "opacity:.7;"
WIDE = 160  # characters of a cell in a preview


def draw_card(
    title: str,
    facts: Mapping[str, Any],
    *,
    preview: str = "",
    following: Sequence[str] = (),
) -> str:
    """A card as HTML.

    Args:
        title: what it is, in a word and a name.
        facts: what is known of it, in order; facts that are None or empty are left out.
        preview: ready HTML, such as a table from `draw_table` or a picture.
        following: code to go on with.
    """
    known = {name: value for name, value in facts.items() if value not in (None, "", [], ())}
    rows = Markup("").join(
        Markup('<tr style="background:none"><td style="{}{}">{}</td><td style="{}">{}</td></tr>').format(
            CELL, QUIET, name, CELL, value
        )
        for name, value in known.items()
    )
    steps = Markup(" · ").join(Markup("<code>{}</code>").format(step) for step in following)
    then = Markup('<div style="{}margin-top:.3em">next: {}</div>').format(QUIET, steps) if following else ""
    table = Markup('<table style="margin:.2em 0;border:none">{}</table>').format(rows) if rows else ""
    return str(
        Markup('<div style="{}"><div><strong>{}</strong></div>{}{}{}</div>').format(
            BOX, title, table, Markup(preview), then
        )
    )


def draw_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a small HTML table; a cell that is ready markup stays as it is, long text is cut."""
    if not rows:
        return ""
    heads = Markup("").join(Markup('<th style="{}">{}</th>').format(CELL, name) for name in rows[0])
    lines = [
        Markup("").join(Markup('<td style="{}">{}</td>').format(CELL, _cell(value)) for value in row.values())
        for row in rows
    ]
    body = Markup("").join(Markup('<tr style="background:none">{}</tr>').format(line) for line in lines)
    return str(Markup('<table style="margin:.3em 0;border:none"><tr>{}</tr>{}</table>').format(heads, body))


def draw_picture(uri: str | None) -> Markup:
    """A data URI as a small picture; nothing without one."""
    if uri is None:
        return Markup("")
    return Markup('<img src="{}" alt="" style="height:40px;margin:0">').format(uri)


def draw_line(values: Sequence[float], *, width: int = 150, height: int = 28) -> str:
    """Values as a small line, lowest to highest."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    step = width / max(1, len(values) - 1)
    points = " ".join(
        f"{index * step:.1f},{height - 2 - (value - low) / span * (height - 4):.1f}"
        for index, value in enumerate(values)
    )
    return str(
        Markup(
            '<svg width="{0}" height="{1}" viewBox="0 0 {0} {1}" role="img"><polyline points="{2}" '
            'fill="none" stroke="#0072B2" stroke-width="2"/></svg>'
        ).format(width, height, points)
    )


def _cell(value: Any) -> Markup:
    if isinstance(value, Markup):
        return value
    if isinstance(value, float):
        return escape("" if value != value else f"{value:.3g}")
    text = "" if value is None else str(value)
    return escape(text if len(text) <= WIDE else text[: WIDE - 1] + "…")
