"""What a study shows, in sentences and one table that are made from its results.

A difference is named only where two 95% intervals do not overlap; otherwise it is "not shown".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from mechguard.plots.style import metric_name
from mechguard.result import UNGUARDED

HARM_METRICS = ("attack_success", "complete_refusal")
HEADLINE = ("attack_success", "complete_refusal", "keyword_refusal", "benign_compliance")
GUARDED, CONTROL = "vlm_guard", "random"
CONTROLS = ("own, held out", "random", "shuffled labels")
NOT_SHOWN = "the intervals overlap, so a difference is not shown"


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


def summarise(behaviour: pd.DataFrame, separability: pd.DataFrame | None = None) -> list[str]:
    """A study in a few sentences, one paragraph per question that its tables can answer.

    Args:
        behaviour: the table of `evaluate`, of one split.
        separability: the table of `measure_separability`, of the same split.
    """
    paragraphs = [
        *(
            text
            for about, rows in _named_settings(behaviour[behaviour["metric"].isin(HARM_METRICS)])
            for text in (_say_loss(_of(rows, "attack_success"), about), _say_guard(rows))
        ),
        _say_benign(behaviour),
        "" if separability is None else _say_layers(separability),
    ]
    return [text for text in paragraphs if text]


def headline(table: pd.DataFrame) -> dict[str, Any]:
    """The headline table: columns of metrics (and settings), rows of condition x guard."""
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


def _say_loss(rows: pd.DataFrame, about: str) -> str:
    """How much more is answered beside a picture."""
    picture = picture_condition(list(rows["condition"].unique()))
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
    picture = picture_condition(list(answered["condition"].unique()))
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
    picture = picture_condition(list(rows["condition"].unique()))
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


def picture_condition(conditions: list[str]) -> str:
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
