"""Look at everything that is drawn: pages, the report and JupyterLab in a headless Chromium, light and dark.

    python tests/look.py figures report jupyter motion --study figures/demo --out build/look

Screenshots go to the folder; a console message or an error of any page ends it with exit code 1.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pretend
from browser import open_browser, open_page, wait_for_figures

from mechguard import plots
from mechguard.report import StudyFolder
from mechguard.result import Result

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SCHEMES = ("light", "dark")
SMOOTH = 50  # milliseconds between two frames


def look_at_figures(browser: Any, study: Path, out: Path) -> list[str]:
    """Every figure of a study and those that it does not hold, each on its page in both colour schemes."""
    folder = out / "figures"
    for name, figure in _figures(study):
        plots.save(figure, folder / name, include_plotlyjs="directory", pictures=False)
    problems = []
    for scheme in SCHEMES:
        page = open_page(browser, scheme=scheme)
        for file in sorted(folder.glob("*.html")):
            page.goto(file.resolve().as_uri())
            wait_for_figures(page)
            page.screenshot(path=folder / f"{file.stem}-{scheme}.png", full_page=True)
            problems += [f"{file.name}, {scheme}: {line}" for line in page.said]
            page.said.clear()
        page.close()
    return problems


def _figures(study: Path) -> Iterator[tuple[str, go.Figure]]:
    found = StudyFolder.read(study)
    yield from found.figures.items()
    layer = found.layers[-1]
    yield "projection_histogram", plots.projection_histogram(found.reported("projections"), layer=layer)
    yield "state_map_3d", plots.state_map(found.results["states"], dimensions=3)
    yield "response_table", plots.response_table(Result(found.responses))
    defences = ROOT / "figures" / "defences"
    yield "defences", plots.defences(Result.load(defences))


def look_at_report(browser: Any, study: Path, out: Path) -> list[str]:
    """The report in both colour schemes, its bar moved, and on paper."""
    problems = []
    for scheme in SCHEMES:
        page = open_page(browser, scheme=scheme)
        page.goto((study / "report.html").resolve().as_uri())
        wait_for_figures(page, page.locator(".plotly-graph-div").count())
        page.screenshot(path=out / f"report-{scheme}.png", full_page=True)
        page.locator("#layer").focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        page.wait_for_timeout(4000)
        page.locator("#map").screenshot(path=out / f"report-map-{scheme}.png")
        print("report,", scheme, "bar at", page.locator(".layer-bar output").text_content(), "map:",
              page.locator("#map .gtitle").text_content())  # fmt: skip
        problems += [f"report, {scheme}: {line}" for line in page.said]
        if scheme == "light":
            page.pdf(path=out / "report.pdf", format="A4", print_background=True)
        page.close()
    return problems


def look_at_motion(browser: Any, study: Path, out: Path) -> list[str]:
    """Drag the slider of a map of 2,000 points and 32 layers, and time what is painted."""
    [file, _] = plots.save(plots.state_map(pretend.many_states()), out / "many", pictures=False)
    page = open_page(browser)
    page.goto(file.resolve().as_uri())
    wait_for_figures(page)
    page.wait_for_timeout(2000)
    page.evaluate(
        """async () => {
          window.painted = [];
          let before = performance.now(), running = true;
          const tick = now => {
            painted.push(now - before);
            before = now;
            if (running) requestAnimationFrame(tick);
          };
          requestAnimationFrame(tick);
          window.layersPassed = 0;
          const figure = document.querySelector('.js-plotly-plot');
          figure.addEventListener('layer', () => layersPassed++);
          window.stop = () => { running = false; return painted; };
        }"""
    )
    rail = page.locator(".slider-rail-touch-rect").bounding_box()
    height = rail["y"] + rail["height"] / 2
    page.mouse.move(rail["x"] + 5, height)
    page.mouse.down()
    for step in range(1, 63):
        page.mouse.move(rail["x"] + 5 + step / 63 * rail["width"], height)
        page.wait_for_timeout(30)
    frames = page.evaluate("stop()")
    page.screenshot(path=out / "motion-1.png")
    page.mouse.up()
    started = time.monotonic()
    page.wait_for_function("() => document.querySelector('.gtitle').textContent.includes('layer 3')")
    frames = sorted(frames[2:])
    middle, late = frames[len(frames) // 2], frames[int(len(frames) * 0.95)]
    print(f"map: {file.stat().st_size / 1e6:.1f} MB; {page.evaluate('layersPassed')} layers passed; "
          f"{len(frames)} frames painted, {middle:.0f} ms each (median), {late:.0f} ms (95%); "
          f"at rest after {time.monotonic() - started:.1f} s")  # fmt: skip
    page.screenshot(path=out / "motion-2.png")
    problems = [f"motion: {line}" for line in page.said]
    page.close()
    return problems + ([f"motion: {middle:.0f} ms for a frame"] if middle > SMOOTH else [])


def look_at_jupyter(browser: Any, study: Path, out: Path) -> list[str]:
    """Run the quickstart and the explorer in JupyterLab, and move, hover and click in them."""
    folder = out / "jupyter"
    folder.mkdir(parents=True, exist_ok=True)
    cell = f"import mechguard as mg\nmg.explore({str(study.resolve())!r})"
    _write_notebook(folder / "explore.ipynb", [cell])
    _write_notebook(folder / "quickstart.ipynb", _cells(ROOT / "notebooks" / "01_quickstart.py"))
    with start_jupyter(folder) as address:
        return [*_explore(browser, address, out), *_quickstart(browser, address, out)]


def _explore(browser: Any, address: str, out: Path) -> list[str]:
    page = _run_notebook(browser, f"{address}/lab/tree/explore.ipynb")
    wait_for_figures(page, 3)
    titles = "() => [...document.querySelectorAll('.js-plotly-plot .gtitle')].map(title => title.textContent)"
    points = "() => document.querySelector('.js-plotly-plot')._fullData.reduce((n, t) => n + t._length, 0)"
    print("explorer opens on", page.evaluate(titles), page.evaluate(points), "points")
    page.screenshot(path=out / "explorer-1.png")
    before = page.evaluate("() => [...document.querySelector('.js-plotly-plot')._fullData[0].x].slice(0, 3)")
    page.locator(".jupyter-widgets .noUi-handle").first.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('.gtitle').textContent.includes('layer 3')")
    after = page.evaluate("() => [...document.querySelector('.js-plotly-plot')._fullData[0].x].slice(0, 3)")
    print("slider moved:", page.evaluate(titles), before, "->", after)
    problems = [] if before != after else ["explorer: the map did not move with the layer"]
    page.mouse.move(*_place_of_point(page))
    page.wait_for_selector(".hoverlayer .hovertext")
    print("hover:", page.locator(".hoverlayer .hovertext").first.text_content())
    page.screenshot(path=out / "explorer-2.png")
    chosen = "() => document.querySelector('.jupyter-widgets select').selectedOptions[0].textContent"
    first = page.evaluate(chosen)
    page.mouse.click(*_place_of_point(page))
    page.wait_for_function(f"first => ({chosen})() !== first", arg=first)
    print("click:", first, "->", page.evaluate(chosen))
    page.wait_for_timeout(2000)
    page.screenshot(path=out / "explorer-3.png")
    return problems + _errors(page, "explorer")


def _place_of_point(page: Any) -> list[float]:
    """Where on the screen a point of the first figure is: one of its second group."""
    return page.evaluate(
        """() => {
          const figure = document.querySelector('.js-plotly-plot');
          const {xaxis, yaxis} = figure._fullLayout, group = figure._fullData[1];
          const box = figure.getBoundingClientRect();
          const across = xaxis._offset + xaxis.d2p(group.x[0]), down = yaxis._offset + yaxis.d2p(group.y[0]);
          return [box.left + across, box.top + down];
        }"""
    )


def _quickstart(browser: Any, address: str, out: Path) -> list[str]:
    page = _run_notebook(browser, f"{address}/lab/tree/quickstart.ipynb", height=3000)
    wait_for_figures(page, 3, patience=600_000)  # JupyterLab draws what is on the screen: here, to the map
    page.screenshot(path=out / "quickstart-1.png")
    maps = page.locator(".js-plotly-plot:has(.slider-group)")
    maps.first.scroll_into_view_if_needed()
    title = maps.first.locator(".gtitle")
    before = title.text_content()
    rail = maps.first.locator(".slider-rail-touch-rect").bounding_box()
    page.mouse.click(rail["x"] + 0.6 * rail["width"], rail["y"] + rail["height"] / 2)
    heading = "document.querySelector('.js-plotly-plot:has(.slider-group) .gtitle').textContent"
    moved = f"before => {heading} !== before"
    page.wait_for_function(moved, arg=before)
    print("quickstart's map:", before, "->", title.text_content())
    maps.first.screenshot(path=out / "quickstart-2.png")
    return _errors(page, "quickstart")


def _errors(page: Any, name: str) -> list[str]:
    """JupyterLab tells its own times as warnings; errors count."""
    said = [f"{name}: {line}" for line in page.said if line.startswith("error")]
    page.close()
    return said


def _run_notebook(browser: Any, address: str, *, height: int = 1900) -> Any:
    page = open_page(browser, width=1400, height=height)
    page.goto(f"{address}?reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).first.click()
    page.get_by_text("Run All Cells", exact=True).first.click()
    print("running", address)
    return page


@contextmanager
def start_jupyter(folder: Path) -> Iterator[str]:
    """JupyterLab over a folder, with settings of its own; yields its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    hidden = {
        f"JUPYTER_{kind}_DIR": str(folder / f".{kind.lower()}") for kind in ("CONFIG", "DATA", "RUNTIME")
    }
    command = [str(BIN / "jupyter-lab"), "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder.resolve()}"]
    with (folder / "jupyter.log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | hidden, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api")
        yield address
    finally:
        server.terminate()
        server.wait()


def _wait_for(address: str, seconds: int = 180) -> None:
    for _ in range(seconds):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"{address} did not answer within {seconds} s")


def _cells(script: Path) -> list[str]:
    """The code of a notebook that is kept as text."""
    import jupytext

    return [cell.source for cell in jupytext.read(script).cells if cell.cell_type == "code"]


def _write_notebook(path: Path, cells: list[str]) -> None:
    import nbformat

    code = [nbformat.v4.new_code_cell(cell) for cell in cells]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata={"kernelspec": kernel}), path)


LOOKS = {
    "figures": look_at_figures,
    "report": look_at_report,
    "motion": look_at_motion,
    "jupyter": look_at_jupyter,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("looks", nargs="*", default=list(LOOKS), help=", ".join(LOOKS))
    parser.add_argument("--study", type=Path, default=Path("figures/demo"))
    parser.add_argument("--out", type=Path, default=Path("build/look"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with open_browser() as browser:
        problems = [
            line for name in options.looks for line in LOOKS[name](browser, options.study, options.out)
        ]
    for line in problems:
        print("PROBLEM", line)
    print(f"{len(problems)} problems; screenshots in {options.out}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
