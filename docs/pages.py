"""The pages of the site that are made, not written: home, tutorials, gallery, reference, messages.

MkDocs calls the functions named `on_...` (its hooks). Everything is read from the repository: README.md, the
notebooks (with their outputs, where `make notebooks` has run them), the docstrings, and the code's own error
messages. Formulas become MathML here, and a page that would load anything from elsewhere is an error.
"""

from __future__ import annotations

import ast
import html
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from stories import draw_output

EXECUTED = ROOT / "build" / "notebooks"
PLOTLY, FIGURES_CSS = "assets/plotly.min.js", "assets/figures.css"
# Guides in the order of a reader; any other page in docs/ follows them.
GUIDES = (
    "your-model", "your-data", "your-method", "production", "running", "report", "comparing", "circuits",
    "scale",
)  # fmt: skip
BACKGROUND = ("mathematics", "neighbours", "organism", "changelog")
# What repository links become on the site; None: the file is not part of it, and the link only names it.
LINKS = {
    "mechguard/organism/README.md": "organism.md",
    "CHANGELOG.md": "changelog.md",
    "figures/README.md": "figures/README.md",
    "tests/test_walls.py": None,
}
LOADS = r"""<(?:script|img|iframe|link(?![^>]*canonical))\b[^>]*\b(?:src|href)="?(?:https?:)?//[^"\s>]+"""
WIDE = "---\nhide: [toc]\n---\n\n"  # a page whose figures want the room
ALONE = "---\nhide: [navigation]\n---\n\n"  # a page without others beside it
TABLE_ROW = "| [`mg.{name}`][{path}] | {summary} |\n"

_outputs: dict[str, list[str]] = {}  # page -> the outputs of its notebook, for the placeholders in it


# --- what MkDocs calls -------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """The navigation: every page has its place, and a new page in docs/ needs no line here."""
    written = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
    placed = {*GUIDES, *BACKGROUND, "errors"}
    guides = [name for name in GUIDES if name in written] + [name for name in written if name not in placed]
    config.nav = [
        {"Home": "index.md"},
        {"Tutorials": ["tutorials/index.md", *(f"tutorials/{path.stem}.md" for path in notebooks())]},
        {"Guides": [f"{name}.md" for name in guides]},
        {"Gallery": "figures/README.md"},
        {"Background": [f"{name}.md" for name in BACKGROUND]},
        {"Errors": "errors.md"},
        {"Reference": ["reference/index.md", *reference_pages(), "reference/command-line.md"]},
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the made pages and the pictures."""
    from mkdocs.structure.files import File
    from plotly.offline import get_plotlyjs

    from mechguard.plots.pages import FIGURE_CSS

    made = {
        "index.md": ALONE + site_links((ROOT / "README.md").read_text()),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "organism.md": (ROOT / "mechguard" / "organism" / "README.md").read_text(),
        "figures/README.md": ALONE + site_links((ROOT / "figures" / "README.md").read_text(), up="../"),
        "tutorials/index.md": tutorial_index(),
        **{f"tutorials/{path.stem}.md": tutorial(path) for path in notebooks()},
        "reference/index.md": reference_index(),
        **reference_pages(),
        "reference/command-line.md": command_line(),
        PLOTLY: get_plotlyjs(),
        FIGURES_CSS: FIGURE_CSS[FIGURE_CSS.index(".js-plotly-plot") :],
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    for picture in sorted((ROOT / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Link public names to the reference; list the code's messages under the page about errors."""
    if page.file.src_uri == "errors.md":
        markdown += "\n" + every_message()
    return markdown if page.file.src_uri.startswith("reference/") else link_names(markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Formulas as MathML, and the outputs of notebooks in their places."""
    content = draw_formulas(content)
    shown = _outputs.get(page.file.src_uri, [])
    for number, output in enumerate(shown):
        content = content.replace(placeholder(number), output)
    return content


def on_post_build(config: Any) -> None:
    """Refuse a site that loads anything from elsewhere."""
    for path in Path(config.site_dir).rglob("*.html"):
        if found := re.search(LOADS, path.read_text(encoding="utf-8")):
            raise SystemExit(f"{path} loads from elsewhere: {found[0][:200]}")


# --- home and tutorials ------------------------------------------------------------------------------------


def site_links(text: str, up: str = "") -> str:
    """Links of the repository as links of the site; `up` leads from the text's folder to the top."""

    def target(match: re.Match[str]) -> str:
        words, link = match[1], match[2].removeprefix(up)
        if link in LINKS:
            return words if LINKS[link] is None else f"[{words}]({up}{LINKS[link]})"
        if link.startswith("docs/"):
            return f"[{words}]({up}{link.removeprefix('docs/')})"
        if link.startswith("notebooks/"):
            return f"[{words}]({up}tutorials/{Path(link).stem}.md)"
        return match[0]

    return re.sub(r"(?<!!)\[([^]]+)\]\(([^)#:]+)\)", target, text)


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.py"))


def tutorial_index() -> str:
    """The notebooks, with the first sentences of each."""
    lines = [
        "# Tutorials",
        "",
        "Notebooks that run on the built-in model in minutes, on a laptop without a GPU.",
        "",
    ]
    for path in notebooks():
        title, _, rest = first_words(path)
        lines += [f"## [{title}]({path.stem}.md)", "", rest, ""]
    lines.append(
        "The same files open in JupyterLab (right click, *Open With*, *Notebook*), through jupytext. "
        "`make notebooks` runs them into pages of their own in `build/notebooks/`."
    )
    return "\n".join(lines)


def first_words(path: Path) -> tuple[str, str, str]:
    """A notebook's title and its opening paragraph."""
    prose = re.search(r"# %% \[markdown\]\n((?:#.*\n)+)", path.read_text())
    assert prose is not None
    lines = [line.removeprefix("#").removeprefix(" ") for line in prose[1].splitlines()]
    title, _, rest = "\n".join(lines).removeprefix("# ").partition("\n")
    return title, _, rest.strip().split("\n\n")[0]


def tutorial(path: Path) -> str:
    """A notebook as a page; with pictures and tables where `make notebooks` has run it."""
    import jupytext

    executed = EXECUTED / f"{path.stem}.ipynb"
    notebook = jupytext.read(executed if executed.is_file() else path)
    outputs = _outputs.setdefault(f"tutorials/{path.stem}.md", [])
    outputs.clear()
    parts: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\((\d\d_\w+)\.py\)", r"(\1.md)", cell.source))
        elif cell.source.strip():
            parts.append(f"```python\n{cell.source}\n```")
            for output in cell.get("outputs", []):
                if shown := draw_output(output, f"{path.stem}-{len(outputs)}"):
                    parts.append(placeholder(len(outputs)))
                    outputs.append(shown)
    script = f'<script src="../{PLOTLY}"></script>'
    note = "!!! note\n\n    Without outputs: `make notebooks` runs the notebooks and adds them."
    parts.insert(1, script if executed.is_file() else note)  # behind the title
    return WIDE + "\n\n".join(parts)


def placeholder(number: int) -> str:
    return f'<div class="output" data-output="{number}"></div>'


# --- reference ---------------------------------------------------------------------------------------------


def public_names() -> dict[str, list[str]]:
    """Page -> the full names it documents, from `mg.__all__` and the rooms that are public as a whole."""
    import mechguard as mg

    pages: dict[str, list[str]] = {}
    placed: set[str] = set()
    for name in mg.__all__:
        value = getattr(mg, name)
        room = name if isinstance(value, ModuleType) else mg._HOMES[name]
        inside = written_in(value) if isinstance(value, ModuleType) else [home(value)]
        pages.setdefault(room, []).extend(item for item in inside if item not in placed)
        placed.update(inside)
    return pages


def written_in(module: ModuleType) -> list[str]:
    """The functions and classes that a room offers."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    values = [getattr(module, name) for name in names]
    return [
        home(value)
        for value in values
        if inspect.isclass(value) or inspect.isfunction(value)
        if value.__module__.startswith("mechguard")
    ]


def home(value: Any) -> str:
    """Where a function or class is written: its full name."""
    value = inspect.unwrap(value)
    return f"{value.__module__}.{value.__qualname__}"


def reference_pages() -> dict[str, str]:
    """A page for each room with public names: its docstring, then each name with signature and docstring."""
    pages = {}
    for room, names in public_names().items():
        opening = inspect.getdoc(importlib.import_module(f"mechguard.{room}")) or ""
        blocks = [f"# {room}", "", opening, ""]
        for name in names:
            blocks += [f"::: {name}", "    options:", f"        heading: {name.rpartition('.')[2]}", ""]
        pages[f"reference/{room}.md"] = "\n".join(blocks)
    return pages


def reference_index() -> str:
    """Every public name in one table, with the first line of its docstring."""
    lines = ["# Reference\n\nEvery public name of `import mechguard as mg`, from its docstring.\n\n"]
    for room, names in public_names().items():
        lines.append(f"\n## [{room}]({room}.md)\n\n| name | what |\n|---|---|\n")
        for path in names:
            short = path.rpartition(".")[2]
            prefix = "" if short in public_short_names() else f"{room}."
            lines.append(TABLE_ROW.format(name=prefix + short, path=path, summary=summary(path)))
    return "".join(lines)


def public_short_names() -> set[str]:
    import mechguard as mg

    return set(mg.__all__)


def summary(path: str) -> str:
    module, _, name = path.rpartition(".")
    text = inspect.getdoc(getattr(importlib.import_module(module), name)) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def command_line() -> str:
    """The help of every command, as the program prints it."""
    import click
    import typer

    from mechguard.cli import app

    group = typer.main.get_command(app)
    with click.Context(group, info_name="mechguard") as parent:
        parts = ["# Command line", "", "What `mechguard COMMAND --help` prints.", ""]
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            with click.Context(command, info_name=name, parent=parent, max_content_width=96) as context:
                parts += [f"## {name}", "", "```text", command.get_help(context), "```", ""]
    return "\n".join(parts)


def link_names(markdown: str) -> str:
    """`mg.name` in prose becomes a link to its reference; code blocks stay."""
    import mechguard as mg

    def link(match: re.Match[str]) -> str:
        room, _, name = match[1].rpartition(".")
        owner = getattr(mg, room) if room else mg
        value = getattr(owner, name, None)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            return match[0]
        return f"[`{match[0].strip('`')}`][{home(value)}]"

    pieces = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    pattern = r"(?<!\[)`mg\.((?:plots\.|judges\.|guards\.|circuits\.|datasets\.)?\w+)(?:\([^`]*\))?`(?!\])"
    return "".join(piece if piece.startswith("```") else re.sub(pattern, link, piece) for piece in pieces)


# --- formulas and messages ---------------------------------------------------------------------------------


def draw_formulas(content: str) -> str:
    """LaTeX as arithmatex leaves it, as MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    def inline(match: re.Match[str]) -> str:
        return convert(html.unescape(match[1]))

    def block(match: re.Match[str]) -> str:
        return f'<div class="formula">{convert(html.unescape(match[1]), display="block")}</div>'

    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, content, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', block, content, flags=re.DOTALL)


def messages() -> dict[str, list[str]]:
    """Room -> the messages of its errors, with `…` where a value is filled in."""
    found: dict[str, list[str]] = {}
    package = ROOT / "mechguard"
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        said = [text for text in raised(ast.parse(path.read_text())) if text.strip("… ")]
        if said:
            found.setdefault(room, []).extend(said)
    return found


def raised(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        error = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(error, ast.Call) and error.args and ast.unparse(error.func) == "MechguardError":
            yield re.sub(r"…+", "…", words(error.args[0]))


def words(node: ast.AST) -> str:
    """The text of a string expression, with `…` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return words(node.left) + words(node.right)
    return "…"


def every_message() -> str:
    """All messages of the package, by room."""
    lines = ["## Every message", "", "As the code raises them; `…` is filled in.", ""]
    for room, said in messages().items():
        lines += [f"### {room}", "", *(f"- `{text.replace('`', chr(39))}`" for text in said), ""]
    return "\n".join(lines)
