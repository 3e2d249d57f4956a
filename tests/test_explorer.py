"""The explorer links a study's figures, from its folder and without a model."""

from __future__ import annotations

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


def test_moving_the_layer_moves_map_histogram_and_tokens(explorer):
    before = [np.array(figure.data[0].x) for figure in (explorer.map, explorer.histogram)]
    colours = np.array(explorer.tokens.data[0].z)
    explorer.layer.value = 4
    assert "layer 4" in explorer.map.layout.title.text
    assert "layer 4" in explorer.histogram.layout.title.text
    for old, figure in zip(before, (explorer.map, explorer.histogram), strict=True):
        assert not np.allclose(old, figure.data[0].x)
    assert not np.allclose(colours, np.array(explorer.tokens.data[0].z, dtype=float))
    rows = pretend.states().where(layer=4, condition="llm text", label="harmful").table.sort_values("id")
    np.testing.assert_allclose(explorer.map.data[0].x, rows["x"], atol=1e-4)


def test_choosing_a_prompt_shows_its_place_its_tokens_and_its_answers(explorer):
    explorer.prompt.value = "harmful-1"
    assert list(explorer.condition.options) == ["vlm text", "vlm blank"]
    assert "harmful-1" in explorer.tokens.layout.title.text
    chosen = explorer.map.data[0]
    assert chosen.meta["ids"][chosen.selectedpoints[0]] == "harmful-1"
    assert "question 1" in explorer.answers.value
    assert "<script" not in explorer.answers.value
    assert explorer.answers.value.count("<tr") == 1 + len(pretend.CONDITIONS) * len(pretend.GUARDS)


def test_a_click_in_the_map_chooses_the_prompt(explorer):
    trace = next(trace for trace in explorer.map.data if trace.name == "vlm blank, harmless")

    class Points:
        point_inds = (trace.meta["ids"].index("harmless-3"),)

    explorer._clicked(trace, Points, None)
    assert explorer.prompt.value == "harmless-3"
    assert "were not kept" in explorer.note.value
    assert explorer._token_box.layout.display == "none"


def test_the_explorer_loads_no_model(study: Path):
    import subprocess
    import sys

    code = f"import sys, mechguard; mechguard.explore({str(study)!r}); print('nnsight' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_folder_without_projections_says_how_to_get_them(tmp_path: Path):
    folder = pretend.write_study(tmp_path, leave_out=("projections",))
    with pytest.raises(mg.MechguardError, match=r"no results/projections\.csv.*mechguard study"):
        mg.explore(folder)
