"""The explorer links a study's figures, from its folder and without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pretend
import pytest

import mechguard as mg

pytest.importorskip("ipywidgets")
pytest.importorskip("anywidget")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretend.write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def explorer(study: Path):
    return mg.explore(study)


def sent(explorer, name: str) -> dict:
    """A figure as the browser gets it."""
    return json.loads(explorer.view.drawn[name])


def test_moving_the_layer_moves_map_histogram_and_tokens(explorer):
    before = dict(explorer.view.drawn)
    explorer.layer.value = 4
    assert all(before[name] != explorer.view.drawn[name] for name in ("map", "histogram", "tokens"))
    assert sent(explorer, "map")["layout"]["title"]["text"] == "States at layer 4"
    assert "layer 4" in sent(explorer, "histogram")["layout"]["title"]["text"]
    rows = pretend.states().where(layer=4, condition="llm text", label="harmful").table.sort_values("id")
    np.testing.assert_allclose(explorer.figures["map"].data[0].x, rows["x"], atol=1e-4)
    assert list(explorer.figures["map"].data[0].ids) == list(rows["id"])
    tokens = pretend.tokens().where(layer=4, id="harmful-1", condition="vlm blank").table
    np.testing.assert_allclose(np.ravel(explorer.figures["tokens"].data[0].z), tokens["value"][1:10])


def test_choosing_a_prompt_shows_its_places_its_tokens_and_its_answers(explorer):
    explorer.prompt.value = "harmless-1"
    assert list(explorer.condition.options) == ["vlm text", "vlm blank"]
    assert "harmless-1" in sent(explorer, "tokens")["layout"]["title"]["text"]
    rows = pretend.states().where(layer=0, id="harmless-1").table
    ring = explorer.figures["map"].data[-1]
    assert list(zip(ring.x, ring.y, strict=True)) == list(zip(rows["x"], rows["y"], strict=True))
    values = pretend.projections().where(layer=0, id="harmless-1").table["value"]
    lines = [shape.x0 for shape in explorer.figures["histogram"].layout.shapes if shape.line.width == 2]
    assert lines == list(values)
    assert "question 1" in explorer.answers.value
    assert "<script" not in explorer.answers.value
    assert explorer.answers.value.count("<tr") == 1 + len(pretend.CONDITIONS) * len(pretend.GUARDS)


def test_a_click_in_the_map_chooses_the_prompt(explorer):
    explorer.view.clicked = "harmless-3"
    assert explorer.prompt.value == "harmless-3"
    assert "were not kept" in explorer.note.value
    assert explorer.view.drawn["tokens"] is None
    explorer.view.clicked = ""  # a point of an arrow or of a histogram is no prompt
    assert explorer.prompt.value == "harmless-3"


def test_choosing_a_condition_shows_its_tokens(explorer):
    explorer.condition.value = "vlm text"
    assert len(explorer.figures["tokens"].data) == 1  # words, no picture


def test_the_explorer_loads_no_model(study: Path):
    code = f"import sys, mechguard; mechguard.explore({str(study)!r}); print('nnsight' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_folder_without_projections_says_how_to_get_them(tmp_path: Path):
    folder = pretend.write_study(tmp_path, leave_out=("projections",))
    with pytest.raises(mg.MechguardError, match=r"no results/projections\.csv.*mechguard study"):
        mg.explore(folder)
