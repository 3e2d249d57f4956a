"""The documentation: complete, true to the code, and its examples run (`make docs` checks the links)."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mechguard as mg
from mechguard.gap import METRICS
from mechguard.statistics import MEASURES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WRITTEN = sorted(DOCS.glob("*.md"))
GUIDES = [path for path in WRITTEN if "```python" in path.read_text()]


def load_script(path: Path) -> ModuleType:
    """A script of the repository, without running it."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site() -> ModuleType:
    return load_script(DOCS / "pages.py")


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    return load_script(ROOT / "figures" / "gallery.py")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def test_every_public_name_has_its_place_in_the_reference(site: ModuleType):
    documented = [line for page in site.reference_pages().values() for line in page.splitlines()]
    index = site.reference_index()
    for name in mg.__all__:
        value = getattr(mg, name)
        if inspect.ismodule(value):
            assert f"## [{name}]({name}.md)" in index
            values = [getattr(value, item) for item in getattr(value, "__all__", ())]
        else:
            values = [value]
        for one in values:
            if inspect.isclass(one) or inspect.isfunction(one):
                assert f"::: {site.home(one)}" in documented, site.home(one)
                assert f"][{site.home(one)}]" in index


def test_every_public_name_says_what_it_is(site: ModuleType):
    for names in site.public_names().values():
        for name in names:
            assert site.summary(name), name


def test_every_command_is_in_the_reference(site: ModuleType):
    page = site.command_line()
    for command in ("study", "protocol", "judge", "compare", "sweep", "doctor", "data", "generate"):
        assert f"## {command}\n" in page
        assert f"Usage: mechguard {command}" in page


@pytest.mark.parametrize("page", WRITTEN, ids=lambda path: path.stem)
def test_what_a_page_shows_in_python_exists(page: Path):
    for block in blocks(page, "py(?:thon)?"):
        compile(block, page.name, "exec")
        for owner, kind in (("mg", mg), ("vlm", mg.VLM), ("guard", mg.Guard)):
            for name in re.findall(rf"\b{owner}\.(\w+)", block):
                assert hasattr(kind, name), name


@pytest.mark.parametrize("page", WRITTEN, ids=lambda path: path.stem)
def test_the_names_that_a_page_mentions_exist(page: Path):
    for path in re.findall(r"`mg\.([\w.]+)", page.read_text()):
        value: Any = mg
        for name in path.split("."):
            assert hasattr(value, name), path
            value = getattr(value, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [path for path in WRITTEN if blocks(path, "python")], ids=lambda path: path.stem
)
def test_the_examples_of_a_guide_run(page: Path, organism: mg.VLM, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mg, "load", lambda name: organism)
    exec("\n".join(blocks(page, "python")), {})


def test_the_messages_that_are_explained_are_the_codes_own(site: ModuleType):
    real = [message for said in site.messages().values() for message in said]
    for path in Path(mg.__file__).parent.rglob("*.py"):  # those that a function of their own composes
        strings = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.JoinedStr))
        real += map(site.words, strings)
    explained = re.findall(r"^- (`{1,2})(.+?)\1$", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert len(explained) > 30
    for _, shown in explained:
        pattern = ".*".join(map(re.escape, re.split("…+", shown)))
        assert any(re.fullmatch(pattern, message.replace("`", "'")) for message in real) or any(
            re.fullmatch(pattern, message) for message in real
        ), shown


def test_the_mathematics_of_every_method_and_measure_are_given():
    page = (DOCS / "mathematics.md").read_text()
    methods = [name for name, value in vars(mg.guards.methods).items() if inspect.isfunction(value)]
    for method in [*methods, "self_reminder", "goal_priority"]:
        if not method.startswith("_") and method in mg.__all__ and method != "fit_directions":
            assert f"`mg.{method}`" in page, method
    for measure in (*METRICS, *MEASURES):
        assert f"`{measure}`" in page, measure


def test_public_names_in_prose_become_links_and_code_stays(site: ModuleType):
    text = "`mg.load` and `mg.plots.pareto(table)`\n\n```python\nmg.load\n```\n"
    linked = site.link_names(text)
    assert "[`mg.load`][mechguard.loading.load]" in linked
    assert "[`mg.plots.pareto(table)`][mechguard.plots.fronts.pareto]" in linked
    assert linked.endswith("```python\nmg.load\n```\n")


def test_the_gallery_shows_every_family_of_plots(gallery: ModuleType):
    drawn = {re.match(r"mg\.plots\.(\w+)", caption["code"])[1] for caption in gallery.CAPTIONS.values()}
    families = {name for name in mg.plots.__all__ if not name.startswith("save")}
    assert drawn == families
    assert set(gallery.CAPTIONS) == {picture.name for picture in gallery.PICTURES}


def test_the_gallery_says_what_n_every_picture_rests_on_and_is_small(gallery: ModuleType):
    page = (ROOT / "figures" / "README.md").read_text()
    pictures = sorted((ROOT / "figures").glob("*.png"))
    assert {path.stem for path in pictures} == {picture.name for picture in gallery.PICTURES}
    for picture in gallery.PICTURES:
        place = page.split(f"]({picture.name}.png)")[1].split("\n## ")[0]
        assert re.search(r"n = \d+", place), picture.name
        assert "`make " in place
    assert sum(path.stat().st_size for path in (ROOT / "figures").glob("*.*")) < 6e6


def test_a_tutorial_with_figures_has_the_script_that_draws_them(site: ModuleType, tmp_path, monkeypatch):
    import nbformat

    story = site.notebooks()[0]
    figure = {"data": [{"type": "bar", "y": {"dtype": "f8", "bdata": "AAAAAAAA8D8="}}], "layout": {}}
    output = nbformat.v4.new_output("display_data", {"application/vnd.plotly.v1+json": figure})
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("1", outputs=[output])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{story.stem}.ipynb")
    monkeypatch.setattr(site, "EXECUTED", tmp_path)
    page = site.tutorial(story)
    assert page.index("# Title") < page.index(site.PLOTLY) < page.index(site.placeholder(0))
    assert "Plotly.newPlot" in site._outputs[f"tutorials/{story.stem}.md"][0]


def test_a_page_of_a_notebook_loads_nothing_from_elsewhere():
    import nbformat

    stories = load_script(DOCS / "stories.py")
    figure = mg.plots.behaviour(mg.Result.load(ROOT / "figures" / "headline")).to_plotly_json()
    data = {"application/vnd.plotly.v1+json": figure}
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("display_data", data)])
    page = stories.draw_page(nbformat.v4.new_notebook(cells=[cell]), "a story")
    body = page.split("<body", 1)[1]
    assert "Plotly.newPlot" in body
    assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//', page)
