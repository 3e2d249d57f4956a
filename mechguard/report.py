"""The report of a study: one page from the study's folder, which opens without a network.

    results/*.csv, responses.jsonl, study.json -> figures/*.html and report.html

Only the folder is read, so a report can be written again anywhere. Its sentences are in `summary`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mechguard import plots
from mechguard.errors import MechguardError
from mechguard.findings import describe_circuits
from mechguard.plots.pages import FIGURE_CSS, draw_html
from mechguard.plots.responses import verdict
from mechguard.plots.shifts import DECOMPOSITION
from mechguard.plots.style import metric_name
from mechguard.result import UNGUARDED, Result
from mechguard.statistics import compare_outcomes
from mechguard.storage import read_json, read_lines, write_text
from mechguard.summary import GUARDED, Difference, headline, picture_condition, summarise

CIRCUITS = (
    "attribution", "ranking", "attention", "attention_map", "lens", "patching", "patching_estimate",
    "agreement", "paths", "checks",
)  # fmt: skip
RESULTS = (
    "behaviour", "separability", "modality_gap", "transfer", "angles", "gates", "gate_curves", "sweep",
    "states", "projections", "tokens", *(f"circuits_{name}" for name in CIRCUITS),
)  # fmt: skip
SAMPLES = 12


def _draw_gap(result: Result) -> go.Figure:
    """The gap without what its shift does to safety, which has a figure of its own."""
    metrics = [metric for metric in result.table["metric"].unique() if metric not in DECOMPOSITION]
    return plots.modality_gap(result, metrics=metrics)


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
    Drawing("pareto", "behaviour", plots.pareto, "benign_compliance"),
    Drawing("transfer", "transfer", plots.transfer_matrix, "auroc"),
    Drawing("angles", "angles", plots.angles),
    Drawing("modality_gap", "modality_gap", _draw_gap),
    Drawing("shift", "modality_gap", plots.shift_decomposition, "safety_energy"),
    Drawing("state_map", "states", plots.state_map),
    Drawing("projections", "projections", plots.projection_ridgeline),
    Drawing("tokens", "tokens", plots.token_view),
    Drawing("gates", "gates", plots.gates),
    Drawing("gate_curves", "gate_curves", plots.gate_curves),
    *(
        Drawing(f"sweep_{metric}", "sweep", partial(plots.sweep_heatmap, metric=metric), metric)
        for metric in ("attack_success", "complete_refusal", "benign_compliance")
    ),
    Drawing("circuits_heads", "circuits_ranking", partial(plots.head_heatmap, position="decision")),
    Drawing("circuits_waterfall", "circuits_ranking", lambda ranking: plots.attribution_waterfall(
        ranking.where(comparison="text - image", position="decision"))),
    Drawing("circuits_attention", "circuits_attention",
            partial(plots.head_heatmap, metric="attention_image"), "attention_image"),
    Drawing("circuits_attention_map", "circuits_attention_map", plots.attention_map),
    Drawing("circuits_patching", "circuits_patching", plots.patching, "log_odds_restored"),
    Drawing("circuits_lens", "circuits_lens", plots.logit_lens),
    Drawing("circuits_checks", "circuits_checks", plots.component_checks, "refusal"),
)  # fmt: skip


@dataclass(frozen=True)
class StudyFolder:
    """What a study left in its folder; results that were not made are absent."""

    folder: Path
    facts: dict[str, Any]
    results: dict[str, Result]
    responses: pd.DataFrame

    @classmethod
    def read(cls, folder: str | os.PathLike[str] | StudyFolder) -> StudyFolder:
        """Read a study's folder; one that was read stays as it is.

        Raises:
            MechguardError: it holds no behaviour table, or one of its files is broken.
        """
        if isinstance(folder, StudyFolder):
            return folder
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

    @property
    def circuits(self) -> list[str]:
        """The tables of circuits that the study holds."""
        return [name for name in CIRCUITS if f"circuits_{name}" in self.results]

    @property
    def layers(self) -> list[int]:
        """The layers that were measured."""
        if "separability" not in self.results:
            return []
        return sorted({int(layer) for layer in self.results["separability"].table["layer"]})

    def reported(self, name: str) -> Result:
        """The rows of a result that a report is about: the test split, where it has one."""
        result = self.results[name]
        if "split" in result.table and (result.table["split"] == "test").any():
            return result.where(split="test")
        return result

    @cached_property
    def comparisons(self) -> pd.DataFrame | None:
        """The paired differences of its responses; None where these hold no verdicts."""
        return compare_responses(self.responses)

    @cached_property
    def figures(self) -> dict[str, go.Figure]:
        """Every figure that the results allow, by name."""
        return dict(self._drawn())

    def _drawn(self) -> Iterator[tuple[str, go.Figure]]:
        for drawing in DRAWINGS:
            if drawing.result not in self.results:
                continue
            result = self.reported(drawing.result)
            if drawing.metric is None or drawing.metric in set(result.table["metric"]):
                yield drawing.name, drawing.draw(result)


def write_report(
    study_dir: str | os.PathLike[str] | StudyFolder, *, out: str | os.PathLike[str] | None = None
) -> Path:
    """Write the report of a study as one self-contained HTML file.

    Args:
        study_dir: a folder that `mechguard study` made, or what was read of one; nothing else is read.
        out: where to write; `report.html` in that folder by default.

    Raises:
        MechguardError: the folder holds no behaviour table, or one of its files is broken.
    """
    study = StudyFolder.read(study_dir)
    behaviour = study.reported("behaviour").table
    comparisons = study.comparisons
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
        numbers=three_numbers(behaviour),
        summary=summarise_study(study),
        circuits=describe_circuits({name: study.results[f"circuits_{name}"] for name in study.circuits}),
        differences=describe_differences(comparisons),
        headline=headline(behaviour),
        figures={name: Markup(draw_html(figure, name=name)) for name, figure in study.figures.items()},
        samples=sample_responses(study.responses),
        data=describe_data(study.facts),
        layers=study.layers,
        parameters=describe_parameters(study.facts),
        versions=study.facts.get("versions") or study.results["behaviour"].about.get("versions", {}),
        judge=str(study.results["behaviour"].about.get("judge", "not recorded")),
        figure_css=Markup(FIGURE_CSS),
        plotlyjs=Markup(get_plotlyjs()),
    )
    return write_text(study.folder / "report.html" if out is None else out, page)


def write_figures(study_dir: str | os.PathLike[str] | StudyFolder, *, png: bool = False) -> list[Path]:
    """Write each figure of a study to `figures/NAME.html`, with its table as CSV.

    The pages share one plotly.min.js beside them.

    Args:
        study_dir: a folder that `mechguard study` made, or what was read of one.
        png: also try for PNG and PDF, some seconds each; needs kaleido and a Chromium.

    Raises:
        MechguardError: the folder holds no behaviour table, or one of its files is broken.
    """
    study = StudyFolder.read(study_dir)
    pages = {study.folder / "figures" / name: figure for name, figure in study.figures.items()}
    return plots.save_all(pages, include_plotlyjs="directory", pictures=png)


def sample_responses(responses: pd.DataFrame, count: int = SAMPLES) -> list[dict[str, Any]]:
    """Answers to harmful prompts before and after each guard, beside a picture where there is one.

    The prompts are spread evenly over the set in its own order, whatever was answered.
    """
    if responses.empty:
        return []
    harmful = responses[responses["label"] == "harmful"]
    condition = picture_condition(list(harmful["condition"].unique()))
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


def summarise_study(study: StudyFolder) -> list[str]:
    """What the study's tables show, in paragraphs."""
    found = {name: study.reported(name).table for name in study.results}
    return summarise(
        found["behaviour"],
        found.get("separability"),
        comparisons=study.comparisons,
        transfer=found.get("transfer"),
        gap=found.get("modality_gap"),
        gates=found.get("gates"),
    )


def compare_responses(responses: pd.DataFrame) -> pd.DataFrame | None:
    """The paired differences of a study's responses; None where these hold no verdicts."""
    if not {"id", "condition", "guard", "label", "complied"} <= set(responses.columns):
        return None
    return compare_outcomes(responses).table


def describe_differences(comparisons: pd.DataFrame | None) -> list[dict[str, Any]]:
    """The paired differences as rows to print."""
    if comparisons is None or comparisons.empty:
        return []
    many = comparisons["setting"].nunique() > 1
    described = []
    for row in comparisons.to_dict("records"):
        change = Difference(row["value"], row["low"], row["high"], row["p_holm"])
        name = metric_name(row["metric"].removesuffix("_change"))
        place = f"{row['condition']}, {row['guard']}"
        against = row["against"] if row["guard"] != UNGUARDED else f"{row['against']}, {UNGUARDED}"
        described.append(
            {"metric": name + (f", {row['setting']}" if many else ""), "place": place, "against": against}
            | {"change": change.points, "shown": change.shown, "n": row["n"]}
            | {"gained": row["gained"], "lost": row["lost"]}
        )
    return described


def three_numbers(behaviour: pd.DataFrame) -> list[dict[str, str]]:
    """What the picture costs, what the guard gives back, and what that costs: before, after, in words."""
    harmful = behaviour[behaviour["metric"] == "attack_success"]
    picture = picture_condition(list(harmful["condition"].unique()))
    plain, guarded = (picture, UNGUARDED), (picture, GUARDED)
    beside = f"under the condition “{picture}”"
    wanted = [
        (
            "attack_success",
            ("text", UNGUARDED),
            plain,
            f"of harmful prompts answered: as text, then {beside}",
        ),
        ("attack_success", plain, guarded, f"of them answered {beside}: unguarded, then with {GUARDED}"),
        (
            "benign_compliance",
            plain,
            guarded,
            f"of harmless prompts answered {beside}: unguarded, then with it",
        ),
    ]
    groups = behaviour.groupby(["metric", "condition", "guard"], sort=False)
    rates = {key: rows.iloc[0] for key, rows in groups}
    return [
        {"words": words, **_compared(rates[metric, *before], rates[metric, *after])}
        for metric, before, after, words in wanted
        if before != after and {(metric, *before), (metric, *after)} <= set(rates)
    ]


def _compared(first: pd.Series, second: pd.Series) -> dict[str, str]:
    interval = f"95% intervals {_share(first)}, then {_share(second)}; n = {int(second['n'])}"
    return {"before": f"{first['value']:.0%}", "after": f"{second['value']:.0%}", "interval": interval}


def _share(row: pd.Series) -> str:
    return f"{row['low']:.0%} to {row['high']:.0%}"


def describe_data(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """For each set of prompts: its role, how many, what it is, where it comes from, and its licence."""
    counts, sources = facts.get("prompts") or {}, facts.get("sources") or {}
    return [{"role": role, "count": count, **sources.get(role, {})} for role, count in counts.items()]


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
    return pd.DataFrame(read_lines(path, needed=("id", "condition", "guard", "label")))


def _with_verdicts(rows: pd.DataFrame) -> pd.DataFrame:
    verdicts = {f"verdict_{when}": [_judged(row, when) for row in rows.to_dict("records")]
                for when in ("before", "after")}  # fmt: skip
    return rows.assign(**verdicts)


def _judged(row: dict[str, Any], when: str) -> str:
    names = ("complied", "complete_refusal", "keyword_refusal")
    return verdict(*(bool(row.get(f"{name}_{when}")) for name in names))
