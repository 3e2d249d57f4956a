"""What the documents show runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def run(code: str, folder: Path) -> str:
    """Run code in a fresh process, in a folder of its own, with figures drawn but not opened."""
    environment = {**os.environ, "PLOTLY_RENDERER": "json", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def readme_block(language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]


def test_the_python_of_the_readme_runs(tmp_path):
    run(readme_block("python"), tmp_path)
    assert (tmp_path / "guards" / "organism.safetensors").is_file()


def test_the_readme_names_every_module():
    tree = readme_block("text")
    package = ROOT / "mechguard"
    rooms = {
        path.name for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    for room in rooms - {"__init__.py", "__main__.py"}:
        assert re.search(rf"^\s*{re.escape(room)}/?\s", tree, re.MULTILINE), room


def test_the_readmes_pictures_are_there():
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / picture).is_file(), picture


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs(notebook, tmp_path):
    run(notebook.read_text(), tmp_path)
