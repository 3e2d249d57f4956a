"""In a real browser: the report of a study draws without a word on the console, light and dark, and moves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pretend
import pytest
from browser import find_chromium, open_browser, open_page, wait_for_figures

from mechguard.report import write_report

pytest.importorskip("playwright")
pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine")
TITLE = "() => document.querySelector('#map .gtitle').textContent"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = pretend.write_study(tmp_path_factory.mktemp("study"))
    return write_report(folder).resolve().as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_draws_every_figure_and_says_nothing(browser: Any, report: str, scheme: str):
    page = open_page(browser, scheme=scheme)
    page.goto(report)
    drawn = page.locator(".plotly-graph-div").count()
    wait_for_figures(page, drawn)
    assert drawn >= 14
    if scheme == "dark":  # cells have colours of their own, on which the page's light ink would vanish
        ink = page.evaluate("() => getComputedStyle(document.body).color")
        cells = page.locator("#transfer .heatmaplayer text")
        cells = cells.evaluate_all("texts => texts.map(text => getComputedStyle(text).fill)")
        assert cells
        assert ink not in cells
    page.locator("#layer").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"() => ({TITLE})() === 'States at layer 1'")
    assert page.locator(".layer-bar output").text_content() == "1"
    assert page.said == []
    page.close()
