"""What a study shows, in sentences and one table that are made from its results.

A difference is named with its own interval: of the same prompts in pairs where their outcomes are at hand,
else from the two rates' intervals. Where it holds zero, or a corrected test does not reject, the difference
is "not shown".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from mechguard.plots.style import metric_name
from mechguard.result import UNGUARDED
from mechguard.statistics import independent_difference

HARM_METRICS = ("attack_success", "complete_refusal")
HEADLINE = ("attack_success", "complete_refusal", "keyword_refusal", "benign_compliance")
GUARDED, CONTROL = "vlm_guard", "random"
OWN, SHUFFLED = "own, held out", "shuffled labels"
CONTROLS = (OWN, "random", SHUFFLED, "own, shuffled labels", "whole states")
NOT_SHOWN = "a difference is not shown"
SIGNIFICANT = 0.05
VERDICTS = {
    "kept": "no loss along the LLM's direction is shown",
    "moved": "the distinction has moved: another direction still tells, and no loss along it is shown",
    "partly moved": "the distinction has partly moved: another direction tells better, yet less than in text",
    "weakened": "the distinction has weakened: less is left along either direction, and none that tells "
    "better is shown",
    "collapsed": "the distinction has collapsed: the own direction is not shown to tell anything either",
    "undecided": "whether it moved or collapsed is not shown",
}


class Difference(NamedTuple):
    """A difference of two numbers with its 95% interval."""

    value: float
    low: float
    high: float
    p: float | None = None  # corrected, where there is a test

    @property
    def shown(self) -> bool:
        return (self.low > 0 or self.high < 0) and (self.p is None or self.p < SIGNIFICANT)

    @property
    def points(self) -> str:
        """In percentage points."""
        interval = f"{_number(self.low, sign=True)} to {_number(self.high, sign=True)}"
        test = "" if self.p is None else f", {_p_words(self.p)}"
        return f"{_number(self.value, sign=True)} points (95% interval {interval}{test})"

    @property
    def verdict(self) -> str:
        return f"{self.points}{'' if self.shown else f': {NOT_SHOWN}'}"

    @property
    def words(self) -> str:
        return f"{self.value:+.3f} (95% interval {self.low:+.3f} to {self.high:+.3f})"


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


def summarise(
    behaviour: pd.DataFrame,
    separability: pd.DataFrame | None = None,
    *,
    comparisons: pd.DataFrame | None = None,
    transfer: pd.DataFrame | None = None,
    gap: pd.DataFrame | None = None,
    gates: pd.DataFrame | None = None,
) -> list[str]:
    """A study in a few sentences, one paragraph per question that its tables can answer.

    Args:
        behaviour: the table of `evaluate`, of one split.
        separability: the table of `measure_separability`, of the same split.
        comparisons: the table of `compare_outcomes` on the same responses.
        transfer: the table of `measure_transfer`; with it, whether the direction moved or collapsed.
        gap: the table of `measure_modality_gap` with directions.
        gates: the table of `measure_gates`.
    """
    harm = behaviour[behaviour["metric"].isin(HARM_METRICS)]
    layers = _say_transfer(transfer) if transfer is not None else ""
    if not layers and separability is not None:
        layers = _say_layers(separability)
    paragraphs = [
        *(
            text
            for about, rows in _named_settings(harm)
            for text in (_say_loss(rows, about, comparisons), _say_guard(rows, comparisons))
        ),
        _say_benign(behaviour, comparisons),
        layers,
        "" if gap is None else _say_shift(gap),
        "" if gates is None else _say_gates(gates),
    ]
    return [text for text in paragraphs if text]


def judge_layers(transfer: pd.DataFrame) -> pd.DataFrame:
    """Whether the LLM's direction kept, moved or collapsed, at each layer and under each condition.

    From three paired differences of AUROC whose intervals hold for all layers at once: what the first
    direction lost, what the states' own direction lost, and what the own one recovers over the first.

    Args:
        transfer: the table of `measure_transfer`.

    Returns:
        `condition`, `layer`, `verdict` (a key of `VERDICTS`), and the three differences' values.
    """
    changes = transfer[transfer["metric"] == "auroc_change"]
    recovered = transfer[transfer["metric"] == "auroc_recovered"]
    fitted = [name for name in changes["direction"].unique() if name != OWN]
    rows = []
    for (condition, layer), found in changes.groupby(["condition", "layer"], sort=False):
        lost = _one(found[found["direction"] == (fitted or [OWN])[0]])
        own = _one(found[found["direction"] == OWN])
        over = _one(recovered[(recovered["condition"] == condition) & (recovered["layer"] == layer)])
        if lost is None or own is None or over is None:
            continue
        values = {"lost": lost.value, "own_lost": own.value, "recovered": over.value}
        left = transfer[(transfer["metric"] == "auroc") & (transfer["direction"] == OWN)]
        left = _one(left[(left["condition"] == condition) & (left["layer"] == layer)])
        verdict = _verdict(lost, own, over, left)
        rows.append({"condition": condition, "layer": int(layer), "verdict": verdict, **values})
    return pd.DataFrame(rows, columns=["condition", "layer", "verdict", "lost", "own_lost", "recovered"])


def _verdict(lost: Difference, own: Difference, recovered: Difference, left: Difference | None) -> str:
    if lost.high >= 0:
        return "kept"
    if recovered.low > 0:
        return "partly moved" if own.high < 0 else "moved"
    if own.high >= 0:
        return "undecided"
    return "weakened" if left is not None and left.low > 0.5 else "collapsed"


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


def _say_loss(rows: pd.DataFrame, about: str, paired: pd.DataFrame | None) -> str:
    """How much more is answered beside a picture."""
    answered = _of(rows, "attack_success")
    picture = picture_condition(list(answered["condition"].unique()))
    text, seen = _rate(answered, "text", UNGUARDED), _rate(answered, picture, UNGUARDED)
    if text is None or seen is None or picture == "text":
        return ""
    change = _compared(answered, paired, text, seen, picture, UNGUARDED, "text")
    return (
        f"Harmful prompts{about} are answered {text.words} of the time as text alone, and {seen.words} "
        f"beside {_called(picture)}: a change of {change.verdict}."
    )


def _say_guard(rows: pd.DataFrame, paired: pd.DataFrame | None) -> str:
    """What the guard changes beside a picture: answers, complete refusals, and the control."""
    answered = _of(rows, "attack_success")
    picture = picture_condition(list(answered["condition"].unique()))
    plain, guarded = _rate(answered, picture, UNGUARDED), _rate(answered, picture, GUARDED)
    if plain is None or guarded is None:
        return ""
    change = _compared(answered, paired, plain, guarded, picture, GUARDED, UNGUARDED)
    said = [
        f"Beside {_called(picture)} with {GUARDED} they are answered {guarded.words}; against the unguarded "
        f"model, a change of {change.verdict}.",
        _say_refusals(_of(rows, "complete_refusal"), picture, paired),
        _say_controls(answered, picture, guarded, paired),
    ]
    return " ".join(sentence for sentence in said if sentence)


def _say_refusals(refused: pd.DataFrame, picture: str, paired: pd.DataFrame | None) -> str:
    """Complete refusals, without which few answers may only mean a broken model."""
    plain, guarded = _rate(refused, picture, UNGUARDED), _rate(refused, picture, GUARDED)
    if plain is None or guarded is None:
        return ""
    change = _compared(refused, paired, plain, guarded, picture, GUARDED, UNGUARDED)
    return (
        f"They are refused completely {guarded.words} with it, and {plain.words} without: {change.verdict}."
    )


def _say_controls(answered: pd.DataFrame, picture: str, guarded: Rate, paired: pd.DataFrame | None) -> str:
    """Whether random subspaces do what the fitted one does."""
    names = [guard for guard in answered["guard"].unique() if guard.split(" ")[0] == CONTROL]
    controls = {name: rate for name in names if (rate := _rate(answered, picture, name))}
    if not controls:
        return ""
    changes = [
        _compared(answered, paired, guarded, rate, picture, name, GUARDED) for name, rate in controls.items()
    ]
    found = "; ".join(
        f"{rate.words}, {change.points} against it"
        for rate, change in zip(controls.values(), changes, strict=True)
    )
    alike = sum(not change.shown or change.value < 0 for change in changes)
    compared = (
        f"for {alike} of {len(controls)} more answers than with the guard are not shown, nor is a part "
        f"of the "
        "fitted direction in this"
        if alike
        else "each answers more than the guard does"
    )
    subspaces = "a random subspace" if len(controls) == 1 else f"{len(controls)} random subspaces"
    return f"With {subspaces} in place of the fitted one: {found}; {compared}."


def _say_benign(behaviour: pd.DataFrame, paired: pd.DataFrame | None) -> str:
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
        change = _compared(found, paired, plain, guarded, picture, GUARDED, UNGUARDED)
        sentences.append(
            f"Harmless prompts{about} beside {_called(picture)} are answered {guarded.words} with "
            f"{GUARDED}, and {plain.words} without: {change.verdict}."
        )
    return " ".join(sentences)


def _say_transfer(transfer: pd.DataFrame) -> str:
    """What the image does along the LLM's direction and along the own one, and which it is: moved or gone."""
    judged = judge_layers(transfer)
    picture = _pictured(list(judged["condition"].unique()))
    judged = judged[judged["condition"] == picture]
    changes = transfer[(transfer["metric"] == "auroc_change") & (transfer["condition"] == picture)]
    if judged.empty or changes.empty:
        return ""
    first = next(name for name in changes["direction"].unique() if name != OWN)
    text = str(changes["against"].iloc[0])
    layer = int(judged.loc[judged["lost"].idxmin(), "layer"])
    at = transfer[transfer["layer"] == layer]
    change = _one(changes[(changes["layer"] == layer) & (changes["direction"] == first)])
    before, after = (_placed(at, condition, first) for condition in (text, picture))
    assert change is not None
    shown = [int(one) for one in judged.loc[judged["verdict"] != "kept", "layer"]]
    if not shown:
        return (
            f"Along the LLM's safety steering direction a fall of the AUROC beside {_called(picture)} is not "
            f"shown at any layer: the largest is at layer {layer}, from {before} to {after}, a change of "
            f"{change.words}, which holds zero (for all layers at once, n = {_count(at)})."
        )
    null = _placed(at, picture, SHUFFLED, interval=True)
    said = [
        f"Along the LLM's safety steering direction the AUROC falls from {before} in text to {after} beside "
        f"{_called(picture)} at layer {layer}: a change of {change.words} of the same prompts, for all "
        f"layers "
        f"at once, n = {_count(at)}{f'; shuffled labels give {null}' if null else ''}. A fall is shown at "
        f"layer{'s' * (len(shown) > 1)} {_ranges(shown)}.",
        _say_own(at, text, picture, changes, layer),
    ]
    for verdict, found in judged[judged["verdict"] != "kept"].groupby("verdict", sort=False):
        layers = [int(one) for one in found["layer"]]
        said.append(f"At layer{'s' * (len(layers) > 1)} {_ranges(layers)} {VERDICTS[str(verdict)]}.")
    return " ".join(said)


def _say_own(at: pd.DataFrame, text: str, picture: str, changes: pd.DataFrame, layer: int) -> str:
    change = _one(changes[(changes["layer"] == layer) & (changes["direction"] == OWN)])
    recovered = _one(at[(at["metric"] == "auroc_recovered") & (at["condition"] == picture)])
    if change is None or recovered is None:
        return ""
    return (
        f"Along the states' own direction, held out, it goes from {_placed(at, text, OWN)} to "
        f"{_placed(at, picture, OWN)} there, a change of {change.words}; over the LLM's direction that "
        f"recovers "
        f"{recovered.words}."
    )


def _say_shift(gap: pd.DataFrame) -> str:
    """How much of the image's shift lies in the safety subspace, and which way it points."""
    rows = gap[gap["metric"].isin(["safety_energy_of_mean", "shift_along", "shift_consistency"])]
    picture = _pictured(list(rows["condition"].unique()))
    rows = rows[rows["condition"] == picture]
    energy = rows[(rows["metric"] == "safety_energy_of_mean") & (rows["direction"] == "observed")]
    if energy.empty:
        return ""
    largest = energy.loc[energy["value"].idxmax()]
    at = rows[rows["layer"] == largest["layer"]]
    found = {(row["metric"], row["direction"]): _as_rate(row) for _, row in at.iterrows()}
    share, random = (
        found["safety_energy_of_mean", "observed"],
        found.get(("safety_energy_of_mean", "random direction")),
    )
    said = (
        f"{_called(picture, upper=True)} shifts the states; of the mean shift's energy the safety "
        f"subspace holds "
        f"{share.percent} (95% interval {share.interval}, n = {share.n}) at layer "
        f"{int(largest['layer'])}, where "
        "it holds most"
    )
    if random is not None:
        beyond = share.low > random.high
        said += f"; a random subspace of equal rank holds {random.interval}"
        said += "" if beyond else ", so a part in safety is not shown"
    along = found.get(("shift_along", "observed"))
    if along is not None:
        way = "towards harmless" if along.high < 0 else "towards harmful" if along.low > 0 else ""
        pointed = f"Along the first direction it points {way}"
        pointed = pointed if way else "A way along the first direction is not shown"
        interval = f"95% interval {along.low:+.2f} to {along.high:+.2f}, in units of the state"
        said += f". {pointed} ({along.value:+.2f}, {interval})"
    return f"{said}."


def _say_gates(gates: pd.DataFrame) -> str:
    """What the two gates do at the layer where any threshold could do most."""
    scored = gates[gates["metric"] == "gate_auroc"]
    if scored.empty:
        return ""
    supervising = scored["condition"].iloc[0]
    best = scored[scored["condition"] == supervising]
    layer = int(best.loc[best["value"].idxmax(), "layer"])
    at = gates[(gates["layer"] == layer) & (gates["condition"] == supervising)]
    found = {(r["metric"], r["gate"], r["label"]): _as_rate(r) for _, r in at.iterrows()}
    auroc = found["gate_auroc", "any threshold", "both"]
    said = [
        f"As a gate, h . v tells harmful from harmless best at layer {layer} ({supervising}: AUROC "
        f"{auroc.value:.3f}, 95% interval {auroc.low:.3f} to {auroc.high:.3f}, n = {auroc.n})."
    ]
    for gate, called in (("sign", "uncentred"), ("midpoint", "centred")):
        harmful, harmless = (found.get(("gate_open", gate, label)) for label in ("harmful", "harmless"))
        if harmful is not None and harmless is not None:
            said.append(
                f"There the {called} gate opens for {harmful.words} of harmful and {harmless.words} of "
                f"harmless "
                "prompts."
            )
    return " ".join(said)


def _say_layers(separability: pd.DataFrame) -> str:
    """Where along the layers the LLM's direction separates less beside a picture than in text, unpaired."""
    rows = separability[separability["metric"] == "auroc"]
    fitted = [name for name in rows["direction"].unique() if name not in CONTROLS]
    conditions = list(rows["condition"].unique())
    texts = [name for name in ("vlm text", "llm text", "text") if name in conditions]
    picture = _pictured(conditions)
    if not fitted or not texts or not picture:
        return ""
    gaps = _auroc_gaps(rows[rows["direction"] == fitted[0]], texts[0], picture)
    if not gaps:
        return ""
    changes = {layer: _independent(text, seen) for layer, (text, seen) in gaps.items()}
    shown = [layer for layer, change in changes.items() if change.shown]
    layer = max(shown or gaps, key=lambda key: abs(changes[key].value))
    text, seen = gaps[layer]
    where = (
        f"differs from that of text at layer{'s' * (len(shown) > 1)} {_ranges(shown)}, layer by layer"
        if shown
        else "is not shown to differ from that of text at any layer"
    )
    return (
        f"Along the LLM's safety steering direction the AUROC beside {_called(picture)} {where}; the "
        f"difference is largest at layer {layer}, {text.value:.3f} in text and {seen.value:.3f} beside the "
        f"picture, a change of {changes[layer].words} (n = {seen.n}).{_own_there(rows, picture, layer)}"
    )


def _own_there(rows: pd.DataFrame, picture: str, layer: int) -> str:
    own = rows[(rows["direction"] == OWN) & (rows["layer"] == layer)]
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


def _compared(
    rows: pd.DataFrame,
    paired: pd.DataFrame | None,
    before: Rate,
    after: Rate,
    condition: str,
    guard: str,
    against: str,
) -> Difference:
    """after - before: of the same prompts where that was compared, else from the two rates' intervals."""
    if paired is not None and not paired.empty:
        found = paired[
            (paired["metric"] == f"{rows['metric'].iloc[0]}_change")
            & (paired["condition"] == condition)
            & (paired["guard"] == guard)
            & (paired["against"] == against)
        ]
        if "setting" in rows and "setting" in found:
            found = found[found["setting"] == rows["setting"].iloc[0]]
        if len(found) == 1 and int(found["n"].iloc[0]) == after.n:
            row = found.iloc[0]
            return Difference(row["value"], row["low"], row["high"], float(row["p_holm"]))
    return _independent(before, after)


def _independent(before: Rate, after: Rate) -> Difference:
    return Difference(
        *independent_difference((before.value, before.low, before.high), (after.value, after.low, after.high))
    )


def _one(rows: pd.DataFrame) -> Difference | None:
    if rows.empty:
        return None
    row = rows.iloc[0]
    return Difference(float(row["value"]), float(row["low"]), float(row["high"]))


def _placed(rows: pd.DataFrame, condition: str, direction: str, *, interval: bool = False) -> str:
    """The AUROC of one place of a transfer, or its interval."""
    found = rows[(rows["metric"] == "auroc") & (rows["condition"] == condition)]
    found = found[found["direction"] == direction]
    if found.empty:
        return ""
    row = found.iloc[0]
    return f"{row['low']:.3f} to {row['high']:.3f}" if interval else f"{row['value']:.3f}"


def _count(rows: pd.DataFrame) -> int:
    return int(rows["n"].iloc[0])


def _pictured(conditions: list[str]) -> str:
    """Blank if it is among the conditions, else the first with a picture, else none."""
    pictures = [name for name in conditions if not name.endswith("text")]
    return next((name for name in pictures if name.endswith("blank")), (pictures or [""])[0])


def _p_words(p: float) -> str:
    return "corrected p < 0.001" if p < 0.001 else f"corrected p = {p:.3f}"


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


def _called(condition: str, *, upper: bool = False) -> str:
    name = condition.split(" -> ")[-1].removeprefix("vlm ")
    known = {"text": "no image", "image": "their own image", "noise": "an image of noise"}
    words = known.get(name, f"a {name} image")
    return words[0].upper() + words[1:] if upper else words


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
