"""Figures as files: a page that works offline, light or dark, and a picture where one can be made."""

from __future__ import annotations

import importlib.util
import os
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from mechguard.storage import write_bytes, write_text

SCRIPT = "plotly.min.js"
CONFIG = {"responsive": True, "displaylogo": False}
# A figure's own text is mid-grey, for pages that know nothing of it; our pages give it the page's ink.
FIGURE_CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2125; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e4e6e8; } }
@media print { :root { --paper: #ffffff; --ink: #1d2125; } }
body { background: var(--paper); color: var(--ink); }
.js-plotly-plot :is(.xaxislayer-above, .yaxislayer-above, .infolayer, .menulayer) text {
  fill: var(--ink) !important;
}
.plotly-graph-div { min-width: 860px; }
.js-plotly-plot .updatemenu-item-rect { fill: rgba(128, 128, 128, 0.15) !important; }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}body {{ margin: 1rem auto; max-width: 1200px; overflow-x: auto; padding: 0 1rem; }}</style>
</head>
<body>
{figure}
</body>
</html>
"""


def save(
    figure: go.Figure,
    path: str | os.PathLike[str],
    *,
    include_plotlyjs: bool | str = True,
    png: bool = True,
) -> list[Path]:
    """Write a figure as `path.html`, and as `path.png` where kaleido and a Chromium are installed.

    Args:
        include_plotlyjs: True puts plotly.js into the page (4.8 MB, opens anywhere); "directory" puts it
            beside the page once, for all figures of a folder; False leaves it out.
        png: whether to try for a picture.

    Returns:
        The files that were written.
    """
    stem = Path(path)
    stem = stem.with_suffix("") if stem.suffix in {".html", ".png"} else stem
    page = stem.with_name(stem.name + ".html")
    if include_plotlyjs == "directory":
        _write_script(page.parent)
    body = draw_html(figure, name=stem.name, include_plotlyjs=include_plotlyjs)
    content = PAGE.format(title=escape(stem.name), css=FIGURE_CSS, figure=body)
    written = [write_text(page, content)]
    picture = _picture(figure) if png else None
    if picture is not None:
        written.append(write_bytes(stem.with_name(stem.name + ".png"), picture))
    return written


def draw_html(figure: go.Figure, *, name: str, include_plotlyjs: bool | str = False) -> str:
    """A figure as a piece of HTML, to stand in a page that holds `FIGURE_CSS`."""
    return figure.to_html(
        full_html=False,
        include_plotlyjs=include_plotlyjs,
        div_id=f"figure-{''.join(c if c.isalnum() else '-' for c in name)}",
        config=CONFIG,
        auto_play=False,
        default_height=f"{figure.layout.height or 450}px",
    )


def _write_script(folder: Path) -> None:
    script, content = folder / SCRIPT, get_plotlyjs()
    if not script.is_file() or script.stat().st_size != len(content.encode()):
        write_text(script, content)


def _picture(figure: go.Figure) -> bytes | None:
    """A PNG on white, or None where no browser can draw it."""
    if importlib.util.find_spec("kaleido") is None:
        return None
    printed = go.Figure(figure).update_layout(
        paper_bgcolor="white", plot_bgcolor="white", font_color="#1d2125"
    )
    height = figure.layout.height or 450
    try:
        return printed.to_image("png", width=1100, height=height, scale=2)
    except (RuntimeError, OSError, TimeoutError):  # no Chromium, or one that does not start
        return None
