"""Paired comparisons of rates: the same prompts under two conditions, or with two guards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy import stats

from mechguard.errors import MechguardError
from mechguard.result import UNGUARDED, Result
from mechguard.statistics.intervals import LEVEL, Clusters, bootstrap_rate

TEXT = "text"
GUARD_METRICS = {  # metric -> (label of its prompts, column of the responses)
    "attack_success": ("harmful", "complied"),
    "complete_refusal": ("harmful", "complete_refusal"),
    "keyword_refusal": ("harmful", "keyword_refusal"),
    "benign_compliance": ("harmless", "complied"),
}
CHANGE = "_change"


def mcnemar_p(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p, from how many prompts changed in either direction."""
    changed = gained + lost
    return float(stats.binomtest(gained, changed).pvalue) if changed else 1.0


def adjust_holm(p: Sequence[float] | Float[ndarray, " tests"]) -> Float[ndarray, " tests"]:
    """Holm's step-down correction (1979): below 5%, the chance of any false one among them is below 5%."""
    values = np.asarray(p, dtype=float)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def paired_difference(
    first: Bool[ndarray, " n"], second: Bool[ndarray, " n"], level: float = LEVEL
) -> tuple[float, float, float]:
    """rate(second) - rate(first) on the same prompts, with a 95% interval.

    Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions based
    on paired data": the two counts of change, each with one prompt added.
    """
    n = len(first)
    if n == 0:
        return 0.0, -1.0, 1.0
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = stats.norm.ppf((1 + level) / 2) * np.sqrt((up + down - (up - down) ** 2) / (n + 2))
    low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
    return (gained - lost) / n, float(low), float(high)


def compare_outcomes(outcomes: pd.DataFrame, *, clusters: str | None = None, seed: int = 0) -> Result:
    """Every paired difference of a table of responses: between conditions, and between guards.

    Compared are each condition with text alone, unguarded; and under each condition each guard with none, and
    every other guard with `vlm_guard` where that is among them.

    Args:
        outcomes: one row per prompt x condition x guard, with the columns `id`, `condition`, `guard`, `label`
            and the judge's `complied`, `complete_refusal`, `keyword_refusal` as far as there are any, e.g.
            the responses that `evaluate` stores; `setting` keeps sets of prompts apart.
        clusters: a column by whose values whole groups of prompts are resampled for the interval, such as
            the template; by prompt otherwise.

    Returns:
        Rows metric (`attack_success_change`, ...) x condition x guard x `against`, with 95% intervals,
        `gained` and `lost` prompts, McNemar's exact `p`, and `p_holm`, which is corrected over the table.

    Raises:
        MechguardError: a column is missing, or a prompt was answered twice in one place.
    """
    missing = [c for c in ("id", "condition", "guard", "label") if c not in outcomes]
    if clusters is not None and clusters not in outcomes:
        missing.append(clusters)
    if missing:
        raise MechguardError(
            f"the outcomes have no column {', '.join(missing)}; they have {', '.join(outcomes.columns)}. "
            f"Give "
            "one row per prompt, condition and guard, such as the responses of evaluate"
        )
    rows = []
    settings = outcomes.groupby("setting", sort=False) if "setting" in outcomes else [("", outcomes)]
    for setting, table in settings:
        for metric, (label, column) in GUARD_METRICS.items():
            asked = table[table["label"] == label]
            if column in asked and not asked.empty:
                found = _differences(asked, column, clusters, seed)
                rows += [{"setting": setting, "metric": metric + CHANGE, **row} for row in found]
    if not rows:
        return Result(pd.DataFrame(columns=["metric", "condition", "guard", "against", "value"]))
    result = Result.from_rows(rows, clusters=clusters or "id", seed=seed)
    return Result(result.table.assign(p_holm=adjust_holm(result.table["p"].to_numpy())), result.about)


def _differences(asked: pd.DataFrame, column: str, clusters: str | None, seed: int) -> list[dict[str, Any]]:
    """Paired differences of one outcome among the places (condition, guard) where it was asked."""
    if asked.duplicated(["id", "condition", "guard"]).any():
        raise MechguardError(
            "a prompt was answered twice under the same condition and guard; its id must be unique in its set"
        )
    wide = asked.pivot(index="id", columns=["condition", "guard"], values=column)
    groups = None if clusters is None else asked.drop_duplicates("id").set_index("id")[clusters]
    rows = []
    for first, second in _contrasts(list(wide.columns)):
        both = wide[[first, second]].dropna().astype(bool)
        before, after = both[first].to_numpy(), both[second].to_numpy()
        value, low, high = paired_difference(before, after)
        if groups is not None:
            change = after.astype(float) - before
            low, high = bootstrap_rate(change, _of(groups, both.index), seed=seed)
        gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
        against = first[0] if second[1] == UNGUARDED else first[1]
        rows.append(
            {"condition": second[0], "guard": second[1], "against": against, "value": value, "low": low}
            | {"high": high, "n": len(both), "before": before.mean(), "after": after.mean()}
            | {"gained": gained, "lost": lost, "p": mcnemar_p(gained, lost)}
        )
    return rows


def _of(groups: pd.Series, ids: pd.Index) -> Clusters:
    return groups.reindex(ids).astype(str).to_numpy()


def _contrasts(places: list[tuple[str, str]]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Which places are compared: (before, after)."""
    conditions = list(dict.fromkeys(condition for condition, _ in places))
    reference = TEXT if TEXT in conditions else conditions[0]
    found = [
        ((reference, UNGUARDED), (condition, UNGUARDED))
        for condition in conditions
        if condition != reference and {(reference, UNGUARDED), (condition, UNGUARDED)} <= set(places)
    ]
    for condition in conditions:
        guards = [guard for place, guard in places if place == condition]
        ordered = sorted(guards, key=lambda guard: (guard != UNGUARDED, guard != "vlm_guard"))
        found += [
            ((condition, first), (condition, second))
            for first, second in combinations(ordered, 2)
            if first in (UNGUARDED, "vlm_guard")
        ]
    return found
