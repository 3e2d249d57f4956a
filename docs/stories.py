"""The notebooks as pages: run, drawn, and each self-contained.

    python docs/stories.py notebooks/01_quickstart.py build/notebooks

writes 01_quickstart.ipynb with its outputs and 01_quickstart.html, which opens without a network.
"""

from __future__ import annotations

import base64
import html
import os
import re
import sys
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

CELL_SECONDS = 1200  # more than any cell takes on the organism
BAR = "application/vnd.jupyter.widget-view+json"
LIGHT = ":root { color-scheme: light; --ink: #1d2125; --paper: #fff; } .output { overflow-x: auto; }"
FROM_ELSEWHERE = r'<script[^>]*\bsrc="(?:https?:)?(?://[^"]*)?"[^>]*>\s*</script>'


def run(story: Path) -> Any:
    """A notebook with its outputs, run in the current folder.

    Raises:
        CellExecutionError: a cell failed.
    """
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(story)
    quiet = ["--IPKernelApp.log_level=ERROR"]
    NotebookClient(notebook, timeout=CELL_SECONDS, store_widget_state=False, extra_arguments=quiet).execute()
    return without_bars(notebook)


def without_bars(notebook: Any) -> Any:
    """The notebook without the progress bars, which have run."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if BAR not in output.get("data", {})]
    return notebook


def draw_output(output: Any, name: str) -> str:
    """One output of a cell as HTML: a figure, a table or card, or text; nothing for what went to stderr."""
    if output.output_type == "stream":
        return f'<pre class="output">{html.escape(output.text)}</pre>' if output.name == "stdout" else ""
    data = output.get("data", {})
    if figure := data.get("application/vnd.plotly.v1+json"):
        return f'<div class="output figure">{draw_figure(figure, name)}</div>'
    if "text/html" in data:
        return f'<div class="output">{data["text/html"]}</div>'
    if "text/plain" in data:
        return f'<pre class="output">{html.escape(data["text/plain"])}</pre>'
    return ""


def draw_figure(figure: dict[str, Any], name: str) -> str:
    """A stored figure as it stands in a report, for a page that holds plotly.js."""
    import plotly.graph_objects as go

    from mechguard.plots.pages import draw_html

    parts = {part: unpacked(figure[part]) for part in ("data", "layout", "frames") if part in figure}
    return draw_html(go.Figure(parts), name=name)


def unpacked(value: Any) -> Any:
    """A part of a stored figure with its packed arrays as arrays."""
    if isinstance(value, dict):
        if {"dtype", "bdata"} <= set(value):
            array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
            return array.reshape([int(size) for size in str(value.get("shape", -1)).split(",")])
        return {name: unpacked(inner) for name, inner in value.items()}
    return [unpacked(inner) for inner in value] if isinstance(value, list) else value


def draw_page(notebook: Any, name: str) -> str:
    """A notebook that was run as one page that loads nothing from elsewhere."""
    from nbconvert import HTMLExporter
    from plotly.offline import get_plotlyjs

    from mechguard.plots.pages import FIGURE_CSS

    for cell_number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\((\d\d_\w+)\.py\)", r"(\1.html)", cell.source)
        for number, output in enumerate(cell.get("outputs", [])):
            if "application/vnd.plotly.v1+json" in output.get("data", {}):
                output["data"] = {"text/html": draw_output(output, f"{name}-{cell_number}-{number}")}
    page, _ = HTMLExporter().from_notebook_node(notebook)
    page = re.sub(FROM_ELSEWHERE, "", page)
    style = FIGURE_CSS + LIGHT
    head = f"<title>{name}</title><style>{style}</style><script>{get_plotlyjs()}</script></head>"
    return re.sub(r"<title>.*?</title>", "", page, count=1).replace("</head>", head, 1)


def main(story: Path, folder: Path) -> None:
    """Run one notebook in an empty folder, and write it and its page to `folder`."""
    import nbformat

    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    source, target = story.resolve(), folder.resolve()
    with TemporaryDirectory() as empty, chdir(empty):
        notebook = run(source)
    target.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target / f"{source.stem}.ipynb")
    (target / f"{source.stem}.html").write_text(draw_page(notebook, source.stem), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
