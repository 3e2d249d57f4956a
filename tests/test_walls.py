"""The walls between the rooms, read off the code's own imports."""

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mechguard as mg

PACKAGE = Path(mg.__file__).parent
# From the ground up: a room imports only from rows above it (and from within itself).
ROWS = [
    {"errors", "thumbnails", "cards"},
    {"storage", "processes"},
    {
        "ledgers",
        "shards",
        "result",
        "prompts",
        "families",
        "interventions",
        "caching",
        "pictures",
        "kv_cache",
    },
    {"overlaps", "statistics", "moments"},
    {"datasets", "activations", "organism", "plots", "chat", "checkpoints", "processors"},
    {"models", "directions", "summary", "findings", "judges"},
    {"separability", "gap", "maps", "loading", "positions"},
    {"projections"},
    {"guards", "transfer"},
    {"prefixes"},
    {"tracing"},
    {"responses", "circuits", "report", "doctor"},
    {"evaluation", "quality", "explorer"},
    {"sweeps", "searches", "judging"},
    {"study", "comparison", "inspect_logs"},
    {"protocol"},
    {"cli"},
    {"__main__"},
]
# Methods that open on a later room, which is imported when they are called.
DOORS = {("models", "directions"), ("directions", "models"), ("models", "circuits")}
LEVEL = {room: level for level, rooms in enumerate(ROWS) for room in rooms}


def files() -> dict[Path, str]:
    """Every source file and the room it stands in."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            found[path] = room
    return found


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it, those for type checkers left out."""
    found = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def importers_of(package: str) -> set[str]:
    return {
        room for path, room in files().items() if any(name.split(".")[0] == package for name in imports(path))
    }


def test_every_room_has_a_row():
    assert set(files().values()) == set(LEVEL)


@pytest.mark.parametrize(("path", "room"), [pytest.param(p, r, id=r) for p, r in sorted(files().items())])
def test_a_room_imports_only_from_rows_above_it(path, room):
    if room in ("cli", "__main__"):
        return  # the doors, which may open on every room
    for name in imports(path):
        if not name.startswith("mechguard."):
            continue
        other = name.split(".")[1]
        if other in LEVEL and other != room:
            assert LEVEL[other] < LEVEL[room] or (room, other) in DOORS, f"{room} imports {other}"


def test_only_models_and_tracing_know_nnsight():
    assert importers_of("nnsight") <= {"models", "tracing"}
    assert importers_of("nnsight")


def test_only_circuits_knows_transformer_lens():
    assert importers_of("transformer_lens") <= {"circuits"}


def test_plots_and_statistics_import_neither_torch_nor_a_model():
    for package in ("torch", "transformers"):
        assert importers_of(package).isdisjoint(
            {"plots", "statistics", "report", "result", "summary", "findings"}
        )


DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}
OPTIONAL = {
    "kaleido",
    "optuna",
    "transformer_lens",
    "inspect_ai",
    "ipywidgets",
    "anywidget",
    "traitlets",
    "IPython",
}  # looked for, and done without where they are missing


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    found = {name.split(".")[0] for path in files() for name in imports(path)}
    found -= {"mechguard", *sys.stdlib_module_names, *OPTIONAL}
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    assert {DISTRIBUTIONS.get(name, name) for name in found} == declared


def test_nothing_is_pickled_and_nothing_installs_packages():
    for path in files():
        code = path.read_text()
        for banned in (
            "import pickle",
            "torch.load(",
            "torch.save(",
            "pip install",
            "trust_remote_code=True",
        ):
            assert banned not in code, f"{path.name}: {banned}"


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys, json\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {"torch", "nnsight", "transformers", "sklearn", "pandas", "plotly"}


def test_importing_mechguard_imports_neither_torch_nor_nnsight():
    assert loaded_by("import mechguard").isdisjoint(HEAVY)


def test_the_command_line_starts_without_them_too():
    assert loaded_by("import mechguard.cli").isdisjoint(HEAVY)


def test_plots_load_without_torch():
    assert loaded_by("import mechguard.plots").isdisjoint({"torch", "nnsight", "transformers"})


def test_every_public_name_exists_and_is_documented():
    for name in mg.__all__:
        assert getattr(mg, name).__doc__, f"mechguard.{name} has no docstring"


def test_no_function_hides_a_module_of_the_same_name():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    functions = {name for name in mg.__all__ if not inspect.ismodule(getattr(mg, name))}
    assert functions.isdisjoint(rooms)
