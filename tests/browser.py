"""A headless Chromium, driven by Playwright, and what its console says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
# WebGL without a graphics card; a container has no user namespaces for the sandbox.
FLAGS = ("--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader")
NOISE = ("GL Driver Message", "willReadFrequently")  # Chromium on the speed of drawing
PATIENCE = 120_000  # milliseconds, for machines that do other things too


def find_chromium() -> str | None:
    """The system's Chromium, if there is one."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@contextmanager
def open_browser() -> Iterator[Any]:
    """A browser of the system; nothing is downloaded."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser: Any, *, scheme: str = "light", width: int = 1280, height: int = 900) -> Any:
    """An empty page in a colour scheme; `page.said` collects errors and what the console says."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.set_default_timeout(PATIENCE)
    page.said = []
    page.on("pageerror", lambda error: page.said.append(f"error: {error}"))
    page.on("console", lambda message: _note(page, message))
    return page


def _note(page: Any, message: Any) -> None:
    if not any(noise in message.text for noise in NOISE):
        page.said.append(f"{message.type}: {message.text}")


def wait_for_figures(page: Any, count: int = 1, *, patience: int = PATIENCE) -> None:
    """Wait until so many figures are drawn, and until they are painted."""
    page.wait_for_function(
        "count => [...document.querySelectorAll('.js-plotly-plot')].filter(f => f.querySelector('.main-svg')"
        ").length >= count",
        arg=count,
        timeout=patience,
    )
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
