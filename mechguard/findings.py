"""What the circuits of a study show, in sentences that are made from its tables.

Nothing is called shown whose interval holds zero, or whose control does as much.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from mechguard.result import Result

FEW = 0.15  # of all components: up to so many are few
REPORTED_K = 5  # of the numbers of components that were tried, the largest up to this one is reported
POSITION_WORDS = {
    "image": "the image tokens",
    "harmful word": "the harmful word",
    "request": "the rest of the request",
    "template": "the template",
    "last": "the last token of the prompt",
    "answer": "the answer's first words",
}


def describe_circuits(tables: Mapping[str, Result]) -> list[str]:
    """A study's circuits in a few paragraphs, one for each question that its tables can answer.

    Args:
        tables: by name, as `circuits.section.Section` makes them; those that are missing are passed over.
    """
    said = []
    if "ranking" in tables:
        said += [_say_writers(tables["ranking"]), _say_where(tables.get("attention"), tables["ranking"])]
    if "patching" in tables:
        said += [_say_patching(tables["patching"].table), _say_hidden(tables["patching"].table)]
    if "checks" in tables:
        said += [_say_ablated(tables["checks"].table), _say_restored(tables["checks"].table)]
    if "agreement" in tables:
        said.append(_say_agreement(tables["agreement"].table))
    return [text for text in said if text]


def components_for_half(ranking: pd.DataFrame) -> tuple[int, int]:
    """How many of the largest components make half of all that is written, and how many there are.

    Signs are left out: what cancels counts twice.
    """
    sizes = ranking["value"].abs().sort_values(ascending=False)
    if not sizes.sum():
        return len(sizes), len(sizes)
    return int((sizes.cumsum() < sizes.sum() / 2).sum()) + 1, len(sizes)


def _say_writers(ranking: Result) -> str:
    sentences = []
    for comparison, words in (
        ("harmful - harmless", "write it more for harmful than for harmless requests in text"),
        ("text - image", "write it more in text than beside the picture"),
    ):
        rows = _where(ranking.table, comparison=comparison, position="decision")
        if rows.empty:
            continue
        top = ", ".join(
            f"{_name(row)} ({row['value']:+.2f} {_interval(row)})" for row in rows.head(3).to_dict("records")
        )
        half, count = components_for_half(rows)
        spread = "concentrated in few" if half <= FEW * count else "spread over many"
        sentences.append(
            f"The components that {words} are {top}; of {count} components, {half} make half of what is "
            f"written by size: it is {spread}."
        )
    decision = ranking.about.get("decision")
    about = f" Measured where the model decides ({decision}), on validation prompts." if decision else ""
    return " ".join(sentences) + about if sentences else ""


def _say_where(attention: Result | None, ranking: Result) -> str:
    if attention is None:
        return ""
    table = attention.table
    looks = _where(table, metric="attention_image").sort_values("value", ascending=False)
    if looks.empty:
        return ""
    image = _where(table, metric="value_image").set_index(["layer", "head"])["value"]
    text = _where(table, metric="value_text").set_index(["layer", "head"])["value"]
    top = looks.iloc[0]
    lowest = image.sort_values().index[0]
    return (
        f"From the last token, heads give {looks['value'].mean():.0%} of their attention to the picture on "
        "average, "
        f"{_name({'component': 'head', **top})} most ({top['value']:.0%}). What all heads take from "
        f"the picture adds {image.sum():+.2f} to the projection on the SSD, what they take from the text "
        f"{text.sum():+.2f}; the head whose reading of the picture lowers it most is {lowest[0]}.{lowest[1]} "
        f"({image[lowest]:+.2f})."
    )


def _say_patching(table: pd.DataFrame) -> str:
    rows = table[(table["metric"] == "log_odds_restored") & (table["component"] == "residual")]
    sentences = []
    for (source, target), way in rows.groupby(["source", "condition"], sort=False):
        # The score is read at the last position, where a late state carries everything by necessity.
        reading = "answer" if "answer" in set(way["position"]) else "last"
        others, read = way[way["position"] != reading], way[way["position"] == reading]
        if others.empty:
            continue
        best = others.sort_values("value").iloc[-1].to_dict()
        half = read[read["value"] >= 0.5].sort_values("layer")
        carried = (
            f"; where the score is read, {POSITION_WORDS[reading]}, half of it has arrived after layer "
            f"{int(half.iloc[0]['layer'])}"
            if len(half)
            else ""
        )
        last = others[others["position"] == "last"].sort_values("value")
        aside = ""
        if len(last) and best["position"] != "last":
            most = last.iloc[-1].to_dict()
            share = f"{most['value']:.0%} {_interval(most, share=True)}"
            aside = f", and at the last token of the prompt at most {share}"
        sentences.append(
            f"Of the difference in log-odds, states of the {source} run put into the {target} run carry most "
            f"at {POSITION_WORDS[str(best['position'])]} after layer {best['layer']}: {best['value']:.0%} "
            f"{_interval(best, share=True)}{aside}{carried}."
        )
    return " ".join(sentences)


def _say_hidden(table: pd.DataFrame) -> str:
    rows = _where(table, component="image hidden", metric="log_odds")
    if rows.empty:
        return ""
    steps = rows.sort_values("layer").to_dict("records")
    first, last = (
        steps[0],
        max(steps, key=lambda row: row["layer"] if row["low"] > 0 or row["high"] < 0 else -1),
    )
    return (
        f"Hiding the picture from the other tokens at all layers changes the log-odds of refusal by "
        f"{first['value']:+.2f} {_interval(first)}; hidden from layer {last['layer']} on, still by "
        f"{last['value']:+.2f} {_interval(last)}."
    )


def _say_ablated(table: pd.DataFrame) -> str:
    sentences = [_compare(table, "ablate", "Set to their mean in text", lower=True)]
    whole = _where(table, check="ablate", metric="keyword_refusal")
    for k, rows in whole.groupby("k"):
        cells = "; ".join(f"{row['choice']} {_share(row)}" for row in rows.to_dict("records"))
        sentences.append(f"In whole answers, with {k} components, refusals are: {cells}.")
    return " ".join(sentence for sentence in sentences if sentence)


def _say_restored(table: pd.DataFrame) -> str:
    said = _compare(table, "restore", "Given back their text values beside the picture", lower=False)
    start = _where(table, check="restore", metric="log_odds", choice="none")
    guard = _where(table, check="guard", metric="log_odds")
    if said and len(start) and len(guard):
        base, guarded = start.iloc[0]["value"], guard.iloc[0]
        gain = guarded["value"] - base
        tops = _where(table, check="restore", metric="log_odds", choice="top")
        parts = ", ".join(f"{row['k']}: {row['value'] - base:+.2f}" for row in tops.to_dict("records"))
        said += (
            f" The guard {guarded['choice']} changes the log-odds by {gain:+.2f} nats, the top components "
            f"(by their number) {parts}."
        )
    return said


def _compare(table: pd.DataFrame, check: str, what: str, *, lower: bool) -> str:
    """What the top components do beside random ones; how many they are is fixed, not picked by outcome."""
    rows = _where(table, check=check, metric="refusal")
    gaps = rows[(rows["choice"] == "top - random") & (rows["k"] <= REPORTED_K)].sort_values("k")
    if gaps.empty:
        return ""
    best = gaps.iloc[-1].to_dict()
    k = int(best["k"])
    at = {str(row["choice"]): row for row in rows[rows["k"].isin([0, k])].to_dict("records")}
    shown = best["high"] < 0 if lower else best["low"] > 0
    verdict = "shown" if shown else "not shown, for the interval of the difference holds zero"
    return (
        f"{what}, the top {k} components leave {_share(at['top'])} of held-out harmful prompts refused at "
        f"the decision (untouched {_share(at['none'])}, {k} random components {at['random']['value']:.0%} "
        f"{_interval(at['random'], share=True)} over draws): a difference from random of "
        f"{100 * best['value']:+.0f} points {_interval(best, share=True)}, which is {verdict}."
        f"{_nats(table, best)}{_by_number(rows)}"
    )


def _by_number(rows: pd.DataFrame) -> str:
    """Every number of components that was tried, top against random."""
    wide = rows[rows["k"] > 0].pivot(index="k", columns="choice", values="value")
    cells = ", ".join(f"{k}: {row['top']:.0%} / {row['random']:.0%}" for k, row in wide.iterrows())
    return f" By their number, top / random: {cells}."


def _nats(table: pd.DataFrame, difference: Mapping[str, Any]) -> str:
    """The same difference in log-odds, which also moves where all or none are refused."""
    rows = _where(
        table, check=difference["check"], k=difference["k"], choice="top - random", metric="log_odds"
    )
    if rows.empty:
        return ""
    row = rows.iloc[0].to_dict()
    return f" In log-odds it is {row['value']:+.2f} {_interval(row)} nats."


def _say_agreement(table: pd.DataFrame) -> str:
    rows = _where(table, component="all", metric="pearson").to_dict("records")
    cells = "; ".join(
        f"{row['value']:.2f} {_interval(row)} for the {str(row['score']).replace('_', '-')} "
        f"(n = {row['n']} places)"
        for row in rows
    )
    return f"Attribution patching correlates with exact patching by {cells}." if rows else ""


def _where(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    for column, value in values.items():
        table = table[table[column] == value] if column in table else table.iloc[:0]
    return table


def _name(row: Mapping[str, Any]) -> str:
    component, layer, head = str(row["component"]), int(row["layer"]), int(row["head"])
    return f"head {layer}.{head}" if component == "head" else f"{component.replace('mlp', 'MLP')} {layer}"


def _interval(row: Mapping[str, Any], *, share: bool = False) -> str:
    low, high = row["low"], row["high"]
    return f"[{low:.0%}, {high:.0%}]" if share else f"[{low:.2f}, {high:.2f}]"


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.0%} {_interval(row, share=True)}, n = {int(row['n'])}"
