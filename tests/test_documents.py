"""What the documents show runs as it stands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import bench
import organism_table
import pandas as pd
import pytest

import mechguard as mg
from mechguard.families import tested_families as read_families

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


def test_the_readmes_other_blocks_use_names_that_exist():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) > 1
    for block in blocks:
        compile(block, "README.md", "exec")
        for name in re.findall(r"\bmg\.(\w+)", block):
            assert hasattr(mg, name), name
        for name in re.findall(r"\bvlm\.(\w+)", block):
            assert hasattr(mg.VLM, name), name
        for name in re.findall(r"\bguard\.(\w+)", block):
            assert hasattr(mg.Guard, name), name


def test_the_readme_names_every_module():
    tree = readme_block("text")
    package = ROOT / "mechguard"
    rooms = {
        path.name for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    for room in rooms - {"__init__.py", "__main__.py"}:
        assert re.search(rf"^\s*{re.escape(room)}/?\s", tree, re.MULTILINE), room


def test_the_model_cards_numbers_are_those_of_the_table():
    card = (ROOT / "mechguard" / "organism" / "README.md").read_text()
    assert organism_table.as_markdown(pd.read_csv(organism_table.SEEDS_TABLE)) in card


def test_the_readmes_numbers_are_those_of_the_demo():
    table = mg.Result.load(ROOT / "figures" / "headline").table
    metrics = ["attack_success", "complete_refusal", "benign_compliance"]
    shown = (ROOT / "README.md").read_text()
    for (condition, guard), rows in table.groupby(["condition", "guard"], sort=False):
        cells = [shown_rate(rows[rows["metric"] == metric].iloc[0]) for metric in metrics]
        assert f"| {' | '.join([condition, guard, *cells])} |" in shown
    assert set(table["n"]) == {150}


def test_the_readmes_comparison_is_the_committed_one():
    table = mg.Result.load(ROOT / "figures" / "defences").table
    shown = (ROOT / "README.md").read_text()
    methods = [name for name in dict.fromkeys(table["guard"]) if ";" not in name]
    cells = {
        "test/blank": "complete_refusal",
        "test/image": "complete_refusal",
        "questions/image": "visual_accuracy",
    }
    block = shown.split("from figures/defences.csv")[1]
    for name in methods:
        line = re.search(rf"^\| {re.escape(name)} \|.*$", block, re.MULTILINE)[0]
        for where, metric in cells.items():
            setting, condition = where.split("/")
            rows = table[(table["guard"] == name) & (table["metric"] == metric)]
            row = rows[(rows["setting"] == setting) & (rows["condition"] == condition)].iloc[0]
            assert f"| {shown_rate(row)} |" in line
    assert set(table["n"]) == {100}


def test_the_readmes_table_of_families_is_the_packaged_one():
    shown = (ROOT / "README.md").read_text()
    for row in read_families().itertuples(index=False):
        assert f"| {' | '.join(row)} |" in shown


def test_the_readmes_timings_are_those_of_the_benchmark():
    rows = json.loads((ROOT / "benchmarks.json").read_text())
    assert bench.as_markdown(rows) in (ROOT / "README.md").read_text()
    assert {row["name"] for row in rows} == set(bench.ROWS)
    for row in rows:
        measured = bench.ROWS[row["name"]]
        assert (row["says"], row["bar"], row["unit"]) == (measured.says, measured.bar, measured.unit)
        assert row["met"] == measured.met(row["ratio"])


def shown_rate(row) -> str:
    return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def test_the_readmes_calibration_is_that_of_its_table():
    table = pd.read_csv(ROOT / "figures" / "calibration.csv")
    assert table["within"].all()
    assert set(table["of"]) == {500}
    planted, wide = table["kind"] == "planted", table["check"].str.endswith("at most")
    shares = {
        name: (100 * table["seeds"] / table["of"])[rows].agg(["size", "min", "max"])
        for name, rows in {"planted": planted, "nothing": ~planted & ~wide, "wide": wide}.items()
    }
    text = " ".join((ROOT / "README.md").read_text().split())
    count, low, high = shares["planted"]
    assert f"the {count:.0f} planted checks hold in {low:.1f}% to {high:.1f}%" in text
    count, low, high = shares["nothing"]
    assert f"the {count:.0f} tests of nothing find something in {low:.1f}% to {high:.1f}%" in text
    assert f"({shares['wide']['min']:.1f}% and {shares['wide']['max']:.1f}%)" in text


def test_the_readmes_pictures_are_there():
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / picture).is_file(), picture


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs(notebook, tmp_path):
    run(notebook.read_text(), tmp_path)
