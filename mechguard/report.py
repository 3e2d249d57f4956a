"""The report of a study: one page from the study's folder, which opens without a network.

    results/*.csv, responses.jsonl, study.json -> figures/*.html and report.html

Only the folder is read, so a report can be written again anywhere. Its sentences are made from the tables:
they name a difference only where two 95% intervals do not overlap.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mechguard import plots
from mechguard.errors import MechguardError
from mechguard.plots.pages import FIGURE_CSS, draw_html
from mechguard.plots.style import metric_name
from mechguard.result import Result
from mechguard.storage import read_json, write_text

RESULTS = ("behaviour", "separability", "modality_gap", "gates", "sweep", "states")
HARM_METRICS = ("attack_success", "complete_refusal")
HEADLINE = ("attack_success", "complete_refusal", "keyword_refusal", "benign_compliance")
UNGUARDED, GUARDED, CONTROL = "none", "vlm_guard", "random"
CONTROLS = ("own, held out", "random", "shuffled labels")
SAMPLES = 12
NOT_SHOWN = "the intervals overlap, so a difference is not shown"


class Drawing(NamedTuple):
    """A figure of the report: its file name, the result it shows, how it is drawn, and for which metric."""

    name: str
    result: str
    draw: Callable[[Result], go.Figure]
    metric: str | None = None


DRAWINGS = (
    Drawing("behaviour", "behaviour", plots.behaviour),
    *(
        Drawing(name, "separability", partial(plots.layer_sweep, metric=metric), metric)
        for name, metric in (("layer_sweep", "auroc"), ("layer_sweep_dprime", "dprime"))
    ),
    Drawing("modality_gap", "modality_gap", plots.modality_gap),
    Drawing("state_map", "states", plots.state_map),
    Drawing("gates", "gates", plots.gates),
    *(
        Drawing(f"sweep_{metric}", "sweep", partial(plots.sweep_heatmap, metric=metric), metric)
        for metric in ("attack_success", "complete_refusal", "benign_compliance")
    ),
)


class Rate(NamedTuple):
    """One number of a table with its 95% interval."""

    value: float
    low: float
    high: float
    n: int

    @property
    def percent(self) -> str:
        return f"{_number(self.value)}%"

    @property
    def interval(self) -> str:
        return f"{_number(self.low)} to {_number(self.high)}%"

    @property
    def words(self) -> str:
        return f"{self.percent} (95% interval {self.interval}, n = {self.n})"

    def overlaps(self, other: Rate) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class StudyFolder:
    """What a study left in its folder; results that were not made are absent."""

    folder: Path
    facts: dict[str, Any]
    results: dict[str, Result]
    responses: pd.DataFrame

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> StudyFolder:
        """Read a study's folder.

        Raises:
            MechguardError: it holds no behaviour table, or one of its files is broken.
        """
        root = Path(folder)
        found = [name for name in RESULTS if (root / "results" / f"{name}.csv").is_file()]
        if "behaviour" not in found:
            raise MechguardError(
                f"{root} holds no results/behaviour.csv, which a report is about; give the folder of a "
                "finished `mechguard study`"
            )
        results = {name: Result.load(root / "results" / name) for name in found}
        facts = read_json(root / "study.json") if (root / "study.json").is_file() else {}
        return cls(root, facts, results, _read_responses(root / "responses.jsonl"))

    @property
    def model(self) -> str:
        known = self.facts.get("model") or self.results["behaviour"].about.get("model")
        return str(known or "an unnamed model")

    def reported(self, name: str) -> Result:
        """The rows of a result that a report is about: the test split, where it has one."""
        result = self.results[name]
        if "split" in result.table and (result.table["split"] == "test").any():
            return result.where(split="test")
        return result

    def figures(self) -> Iterator[tuple[str, go.Figure]]:
        """Every figure that the results allow, by name."""
        for drawing in DRAWINGS:
            if drawing.result not in self.results:
                continue
            result = self.reported(drawing.result)
            if drawing.metric is None or drawing.metric in set(result.table["metric"]):
                yield drawing.name, drawing.draw(result)


def write_report(study_dir: str | os.PathLike[str], *, out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a study as one self-contained HTML file.

    Args:
        study_dir: a folder that `mechguard study` made; nothing else is read.
        out: where to write; `report.html` in that folder by default.

    Raises:
        MechguardError: the folder holds no behaviour table, or one of its files is broken.
    """
    study = StudyFolder.read(study_dir)
    environment = Environment(
        loader=PackageLoader("mechguard", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        model=study.model,
        facts=study.facts,
        summary=summarise(study),
        headline=headline(study.reported("behaviour")),
        figures={name: Markup(draw_html(figure, name=name)) for name, figure in study.figures()},
        samples=sample_responses(study.responses),
        parameters=describe_parameters(study.facts),
        versions=study.facts.get("versions") or study.results["behaviour"].about.get("versions", {}),
        judge=str(study.results["behaviour"].about.get("judge", "not recorded")),
        figure_css=Markup(FIGURE_CSS),
        plotlyjs=Markup(get_plotlyjs()),
    )
    return write_text(study.folder / "report.html" if out is None else out, page)


def write_figures(study_dir: str | os.PathLike[str], *, png: bool = False) -> list[Path]:
    """Write each figure of a study to `figures/NAME.html`; they share one plotly.min.js beside them.

    Args:
        png: also try for pictures, some seconds each; needs kaleido and a Chromium.

    Raises:
        MechguardError: the folder holds no behaviour table, or one of its files is broken.
    """
    study = StudyFolder.read(study_dir)
    written = []
    for name, figure in study.figures():
        page = study.folder / "figures" / name
        written += plots.save(figure, page, include_plotlyjs="directory", png=png)
    return written


def summarise(study: StudyFolder) -> list[str]:
    """The study in a few sentences, one paragraph per question that the tables can answer."""
    behaviour = study.reported("behaviour").table
    paragraphs = [
        *(
            text
            for about, rows in _named_settings(behaviour[behaviour["metric"].isin(HARM_METRICS)])
            for text in (_say_loss(_of(rows, "attack_success"), about), _say_guard(rows))
        ),
        _say_benign(behaviour),
        _say_layers(study.reported("separability").table) if "separability" in study.results else "",
    ]
    return [text for text in paragraphs if text]


def headline(behaviour: Result) -> dict[str, Any]:
    """The headline table: columns of metrics (and settings), rows of condition x guard."""
    table = behaviour.table
    columns = [
        (metric, setting)
        for metric in HEADLINE
        for setting, _ in _by_setting(table[table["metric"] == metric])
    ]
    many = len({setting for _, setting in columns}) > 1
    rows = [
        {
            "condition": condition,
            "guard": guard,
            "cells": [
                _rate(table, condition, guard, metric=metric, **({"setting": setting} if setting else {}))
                for metric, setting in columns
            ],
        }
        for condition in table["condition"].unique()
        for guard in table["guard"].unique()
    ]
    names = [metric_name(m) + (f", {setting}" if many else "") for m, setting in columns]
    return {"columns": names, "rows": [row for row in rows if any(row["cells"])]}


def sample_responses(responses: pd.DataFrame, count: int = SAMPLES) -> list[dict[str, Any]]:
    """Answers to harmful prompts before and after each guard, beside a picture where there is one.

    The prompts are spread evenly over the set in its own order, whatever was answered.
    """
    if responses.empty:
        return []
    harmful = responses[responses["label"] == "harmful"]
    condition = _picture_condition(list(harmful["condition"].unique()))
    shown = harmful[harmful["condition"] == condition]
    before = shown[shown["guard"] == UNGUARDED]
    step = max(1, len(before) // count)
    before = before.iloc[::step].head(count)
    guards = [guard for guard in shown["guard"].unique() if guard != UNGUARDED]
    keys = ["setting", "id"]
    return [
        {
            "guard": guard,
            "condition": condition,
            "rows": before.merge(shown[shown["guard"] == guard], on=keys, suffixes=("_before", "_after"))
            .pipe(_with_verdicts)
            .to_dict("records"),
        }
        for guard in sorted(guards, key=lambda name: name != GUARDED)
    ]


def describe_parameters(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What determined the study's numbers, as names and values to print."""
    described = []
    for key in ("model", "family", "n_layers", "d_model", "seed", "conditions", "prompts", "settings"):
        if key in facts:
            described += _flattened(key, facts[key])
    chosen = dict(facts.get("chosen") or {})
    chosen.pop("rule", None)
    described += _flattened("chosen", chosen)
    return described


def _flattened(name: str, value: Any) -> list[tuple[str, str]]:
    label = name.replace("_", " ")
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flattened(f"{label}: {key}", inner)]
    if isinstance(value, (list, tuple)):
        return [(label, ", ".join(map(str, value)))]
    return [(label, "not limited" if value is None else str(value))]


def _read_responses(path: Path) -> pd.DataFrame:
    if not path.is_file():
        return pd.DataFrame()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return pd.DataFrame([json.loads(line) for line in lines if line.strip()])
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MechguardError(f"{path} is not readable JSON lines ({error}); write it again") from None


def _with_verdicts(rows: pd.DataFrame) -> pd.DataFrame:
    verdicts = {f"verdict_{when}": [_verdict(row, when) for row in rows.to_dict("records")]
                for when in ("before", "after")}  # fmt: skip
    return rows.assign(**verdicts)


def _verdict(row: dict[str, Any], when: str) -> str:
    if row.get(f"complied_{when}"):
        return "answered"
    if row.get(f"complete_refusal_{when}"):
        return "refused"
    return "refused, incompletely" if row.get(f"keyword_refusal_{when}") else "neither"


def _say_loss(rows: pd.DataFrame, about: str) -> str:
    """How much more is answered beside a picture."""
    picture = _picture_condition(list(rows["condition"].unique()))
    text, seen = _rate(rows, "text", UNGUARDED), _rate(rows, picture, UNGUARDED)
    if text is None or seen is None or picture == "text":
        return ""
    verdict = (
        NOT_SHOWN
        if text.overlaps(seen)
        else f"a change of {_number(seen.value - text.value, sign=True)} points, intervals apart"
    )
    return (
        f"Harmful prompts{about} are answered {text.words} of the time as text alone, and {seen.words} "
        f"beside {_called(picture)}: {verdict}."
    )


def _say_guard(rows: pd.DataFrame) -> str:
    """What the guard changes beside a picture: answers, complete refusals, and the control."""
    answered = _of(rows, "attack_success")
    picture = _picture_condition(list(answered["condition"].unique()))
    plain, guarded = _rate(answered, picture, UNGUARDED), _rate(answered, picture, GUARDED)
    if plain is None or guarded is None:
        return ""
    verdict = NOT_SHOWN if plain.overlaps(guarded) else "the intervals are apart"
    said = [
        f"Beside {_called(picture)} with {GUARDED} they are answered {guarded.words}; "
        f"against the unguarded model, {verdict}.",
        _say_refusals(_of(rows, "complete_refusal"), picture),
        _say_controls(answered, picture, guarded),
    ]
    return " ".join(sentence for sentence in said if sentence)


def _say_refusals(refused: pd.DataFrame, picture: str) -> str:
    """Complete refusals, without which few answers may only mean a broken model."""
    plain, guarded = _rate(refused, picture, UNGUARDED), _rate(refused, picture, GUARDED)
    if plain is None or guarded is None:
        return ""
    return f"They are refused completely {guarded.words} with it, and {plain.words} without."


def _say_controls(answered: pd.DataFrame, picture: str, guarded: Rate) -> str:
    """Whether random subspaces do what the fitted one does."""
    names = [guard for guard in answered["guard"].unique() if guard.split(" ")[0] == CONTROL]
    controls = [rate for rate in (_rate(answered, picture, name) for name in names) if rate]
    if not controls:
        return ""
    alike = sum(control.overlaps(guarded) for control in controls)
    compared = (
        f"the intervals of {alike} of {len(controls)} overlap the guard's, so a part of the fitted "
        "direction in this is not shown"
        if alike
        else "their intervals are apart from the guard's"
    )
    subspaces = "a random subspace" if len(controls) == 1 else f"{len(controls)} random subspaces"
    found = "; ".join(control.words for control in controls)
    return f"With {subspaces} in place of the fitted one: {found}; {compared}."


def _say_benign(behaviour: pd.DataFrame) -> str:
    """What the guard costs on harmless prompts."""
    rows = behaviour[behaviour["metric"] == "benign_compliance"]
    if rows.empty:
        return ""
    picture = _picture_condition(list(rows["condition"].unique()))
    sentences = []
    for about, found in _named_settings(rows):
        plain, guarded = _rate(found, picture, UNGUARDED), _rate(found, picture, GUARDED)
        if plain is None or guarded is None:
            continue
        verdict = NOT_SHOWN if plain.overlaps(guarded) else "the intervals are apart"
        sentences.append(
            f"Harmless prompts{about} beside {_called(picture)} are answered {guarded.words} with "
            f"{GUARDED}, and {plain.words} without: {verdict}."
        )
    return " ".join(sentences)


def _say_layers(separability: pd.DataFrame) -> str:
    """Where along the layers the LLM's direction separates less beside a picture than in text."""
    rows = separability[separability["metric"] == "auroc"]
    fitted = [name for name in rows["direction"].unique() if name not in CONTROLS]
    conditions = list(rows["condition"].unique())
    texts = [name for name in ("vlm text", "llm text", "text") if name in conditions]
    pictures = [name for name in conditions if not name.endswith("text")]
    if not fitted or not texts or not pictures:
        return ""
    picture = next((name for name in pictures if name.endswith("blank")), pictures[0])
    along = rows[rows["direction"] == fitted[0]]
    gaps = _auroc_gaps(along, texts[0], picture)
    if not gaps:
        return ""
    shown = [layer for layer, (text, seen) in gaps.items() if not text.overlaps(seen)]
    layer = max(shown or gaps, key=lambda key: abs(gaps[key][0].value - gaps[key][1].value))
    text, seen = gaps[layer]
    where = (
        f"differs from that of text at layer{'s' * (len(shown) > 1)} {_ranges(shown)}, intervals apart"
        if shown
        else "is not shown to differ from that of text at any layer: the intervals overlap"
    )
    return (
        f"Along the LLM's safety steering direction the AUROC beside {_called(picture)} {where}; the "
        f"difference is largest at layer {layer}, {text.value:.3f} in text and {seen.value:.3f} beside the "
        f"picture (95% intervals {text.low:.3f} to {text.high:.3f} and {seen.low:.3f} to "
        f"{seen.high:.3f}, n = {seen.n}).{_say_own(rows, picture, layer)}"
    )


def _say_own(rows: pd.DataFrame, picture: str, layer: int) -> str:
    own = rows[(rows["direction"] == CONTROLS[0]) & (rows["layer"] == layer)]
    own = own[own["condition"] == picture]
    if own.empty:
        return ""
    found = _as_rate(own.iloc[0])
    return (
        f" Along the states' own direction, held out, it is {found.value:.3f} there ({found.low:.3f} to "
        f"{found.high:.3f})."
    )


def _auroc_gaps(along: pd.DataFrame, text: str, picture: str) -> dict[int, tuple[Rate, Rate]]:
    rates = {
        condition: {int(row["layer"]): _as_rate(row) for _, row in rows.iterrows()}
        for condition, rows in along.groupby("condition")
    }
    return {
        layer: (rates[text][layer], rates[picture][layer])
        for layer in rates.get(text, {})
        if layer in rates.get(picture, {})
    }


def _of(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    return table[table["metric"] == metric]


def _rate(table: pd.DataFrame, condition: str, guard: str, **where: str) -> Rate | None:
    chosen = (table["condition"] == condition) & (table["guard"] == guard)
    for column, value in where.items():
        chosen &= table[column] == value
    rows = table[chosen]
    return None if rows.empty else _as_rate(rows.iloc[0])


def _as_rate(row: pd.Series) -> Rate:
    return Rate(float(row["value"]), float(row["low"]), float(row["high"]), int(row["n"]))


def _by_setting(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    if "setting" not in table:
        yield "", table
        return
    for setting, rows in table.groupby("setting", sort=False):
        yield str(setting), rows


def _named_settings(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each setting, with words for it where there are several."""
    groups = list(_by_setting(table))
    for setting, rows in groups:
        yield (f" of {setting}" if len(groups) > 1 else ""), rows


def _picture_condition(conditions: list[str]) -> str:
    """Blank if it was measured, else the first condition with a picture, else text."""
    pictures = [name for name in conditions if name != "text"]
    return "blank" if "blank" in pictures else (pictures or ["text"])[0]


def _called(condition: str) -> str:
    name = condition.removeprefix("vlm ")
    known = {"text": "no image", "image": "their own image", "noise": "an image of noise"}
    return known.get(name, f"a {name} image")


def _number(share: float, *, sign: bool = False) -> str:
    """A share in per cent, with one decimal where it says something."""
    return f"{100 * share:{'+' if sign else ''}.1f}".removesuffix(".0")


def _ranges(layers: list[int]) -> str:
    """[1, 2, 3, 6] as "1-3, 6"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
