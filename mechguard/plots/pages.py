"""Figures as files: a page that works offline, light or dark, pictures for papers, and the table behind."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from mechguard.plots.motion import set_in_motion
from mechguard.plots.style import INK, table_behind
from mechguard.storage import write_bytes, write_text

SCRIPT = "plotly.min.js"
CONFIG = {"responsive": True, "displaylogo": False}
WIDTH = 1100  # pixels of a picture
PRINTED = "#1d2125"  # ink on white
PICTURES = ("png", "pdf")
SUFFIXES = {".html", ".csv", *(f".{kind}" for kind in PICTURES)}
# A figure's own text is mid-grey, for pages that know nothing of it; our pages give it the page's ink.
FIGURE_CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2125; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e4e6e8; } }
@media print { :root { --paper: #ffffff; --ink: #1d2125; } }
body { background: var(--paper); color: var(--ink); }
.js-plotly-plot :is(.xaxislayer-above, .yaxislayer-above, .infolayer, .menulayer) text {
  fill: var(--ink) !important;
}
.js-plotly-plot :is(.table, .table-control-view, .waterfalllayer) text { fill: var(--ink) !important; }
/* Opaque cells choose light or dark text by themselves; those that the page shines through do not. */
.js-plotly-plot .heatmaplayer text[style*="rgb(119, 119, 119)"] { fill: var(--ink) !important; }
.plotly-graph-div { min-width: 860px; }
.js-plotly-plot .updatemenu-item-rect { fill: rgba(128, 128, 128, 0.15) !important; }
.hover-picture { border: 1px solid #8c8c8c; border-radius: 4px; pointer-events: none; position: absolute;
                 z-index: 10; }
"""
# A point that has a picture shows it beside the hover box, which cannot hold one.
HOVER_SCRIPT = """
(figure => {
  const pictures = (figure.layout.meta || {}).pictures || {};
  if (!Object.keys(pictures).length) return;
  const shown = document.createElement("img");
  shown.className = "hover-picture";
  shown.hidden = true;
  figure.style.position = "relative";
  figure.appendChild(shown);
  figure.on("plotly_hover", event => {
    const point = event.points[0], source = pictures[point.customdata];
    shown.hidden = !source;
    if (!source) return;
    const box = figure.getBoundingClientRect();
    shown.src = source;
    shown.style.left = `${event.event.clientX - box.left - 90}px`;
    shown.style.top = `${event.event.clientY - box.top + 14}px`;
  });
  figure.on("plotly_unhover", () => { shown.hidden = true; });
})(document.getElementById("{plot_id}"));
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
    pictures: bool = True,
) -> list[Path]:
    """Write a figure as `path.html`, `path.png`, `path.pdf`, and the table behind it as `path.csv`.

    Pictures are drawn by kaleido (extra `images`) with a Chromium, on white, for papers; without them the
    page and the table are written alone.

    Args:
        include_plotlyjs: True puts plotly.js into the page (4.8 MB, opens anywhere); "directory" puts it
            beside the page once, for all figures of a folder; False leaves it out.
        pictures: whether to try for PNG and PDF, some seconds each.

    Returns:
        The files that were written.
    """
    return save_all({Path(path): figure}, include_plotlyjs=include_plotlyjs, pictures=pictures)


def save_all(
    figures: Mapping[Path, go.Figure],
    *,
    include_plotlyjs: bool | str = True,
    pictures: bool = True,
) -> list[Path]:
    """Write several figures, each as `save` does, with one Chromium for all their pictures.

    Args:
        figures: by path.
    """
    stems = {_stem(path): figure for path, figure in figures.items()}
    drawn = draw_pictures(list(stems.values())) if pictures else [{}] * len(stems)
    written = []
    for (stem, figure), files in zip(stems.items(), drawn, strict=True):
        if include_plotlyjs == "directory":
            _write_script(stem.parent)
        body = draw_html(figure, name=stem.name, include_plotlyjs=include_plotlyjs)
        page = PAGE.format(title=escape(stem.name), css=FIGURE_CSS, figure=body)
        written.append(write_text(_beside(stem, "html"), page))
        written += [write_bytes(_beside(stem, kind), picture) for kind, picture in files.items()]
        table = table_behind(figure)
        if table is not None:
            written.append(write_text(_beside(stem, "csv"), table.to_csv(index=False, lineterminator="\n")))
    return written


def draw_html(figure: go.Figure, *, name: str, include_plotlyjs: bool | str = False) -> str:
    """A figure as a piece of HTML, to stand in a page that holds `FIGURE_CSS`."""
    still, motion = set_in_motion(figure)
    pictured = (figure.layout.meta or {}).get("pictures")
    return still.to_html(
        full_html=False,
        include_plotlyjs=include_plotlyjs,
        div_id=f"figure-{''.join(c if c.isalnum() else '-' for c in name)}",
        config=CONFIG,
        auto_play=False,
        default_height=f"{figure.layout.height or 450}px",
        post_script=[script for script in (motion, HOVER_SCRIPT if pictured else "") if script],
    )


def draw_pictures(figures: Sequence[go.Figure], kinds: Sequence[str] = PICTURES) -> list[dict[str, bytes]]:
    """Figures on white, as they stand in a paper: the picture by kind, none where no browser can draw it.

    Args:
        kinds: "png" (twice as fine as the screen), "pdf", "svg".
    """
    if importlib.util.find_spec("kaleido") is None:
        return [{} for _ in figures]
    wanted = [(number, kind) for number in range(len(figures)) for kind in kinds]
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.{kind}" for number, kind in wanted]
        printed = [_print(figures[number]) for number, _ in wanted]
        heights = [figure.layout.height or 450 for figure in printed]
        # No Chromium, one that does not start, or a figure that it cannot draw: those files are missing.
        with suppress(RuntimeError, OSError, TimeoutError):
            pio.write_images(printed, files, width=WIDTH, height=heights, scale=2)
        drawn: list[dict[str, bytes]] = [{} for _ in figures]
        for (number, kind), file in zip(wanted, files, strict=True):
            if file.is_file() and file.stat().st_size:
                drawn[number][kind] = file.read_bytes()
    return drawn


def _print(figure: go.Figure) -> go.Figure:
    """A copy on white, without what only moves on a screen."""
    printed = go.Figure(figure).update_layout(paper_bgcolor="white", plot_bgcolor="white", font_color=PRINTED)
    printed.update_traces(cells_font_color=PRINTED, header_font_color=PRINTED, selector={"type": "table"})
    printed.update_traces(textfont_color=PRINTED, selector=_written_in_grey)
    printed.layout.sliders = printed.layout.updatemenus = ()
    printed.layout.meta, printed.frames = None, ()
    return printed


def _written_in_grey(trace: Any) -> bool:
    """Whether a trace's words have the grey that pages replace by their ink."""
    return trace.type == "heatmap" and trace.textfont.color == INK


def _stem(stem: Path) -> Path:
    return stem.with_suffix("") if stem.suffix in SUFFIXES else stem


def _beside(stem: Path, kind: str) -> Path:
    return stem.with_name(f"{stem.name}.{kind}")


def _write_script(folder: Path) -> None:
    script, content = folder / SCRIPT, get_plotlyjs()
    if not script.is_file() or script.stat().st_size != len(content.encode()):
        write_text(script, content)
