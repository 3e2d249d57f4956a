"""Judging stored responses, then or later, with one judge or several, and hand labels among them.

    responses.jsonl -> verdicts/JUDGE.jsonl -> results/{behaviour,judges,agreement}

Nothing here loads the model that answered.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from mechguard.errors import MechguardError
from mechguard.evaluation import VERDICT, judge_responses, measure_behaviour
from mechguard.judges import AnyJudge, Judge, find_judge, measure_agreement, read_labels
from mechguard.responses import read_responses
from mechguard.result import Result
from mechguard.storage import append_lines, file_name, hold_folder, parsing, read_json, read_lines, write_json

RESPONSES, VERDICTS, NAMES = "responses.jsonl", "verdicts", "judges.json"
JUDGED_AT_ONCE = 64  # what a killed judge loses at most
HAND = "by hand"


def judge_run(
    folder: str | os.PathLike[str],
    judges: Sequence[AnyJudge] = ("refusal",),
    *,
    labels: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Judge the stored responses of a run, with nothing but its folder.

    Verdicts are kept in `verdicts/`, one file a judge; a judge that was interrupted goes on, and judges of
    earlier calls stay in the tables `results/behaviour` (the first judge there ever was), `results/judges`
    (all) and `results/agreement` (Cohen's kappa for every pair).

    Args:
        folder: of a run, or any folder with a `responses.jsonl`.
        judges: see `judges.find_judge`.
        labels: a sample labelled by hand, which then stands among the judges.

    Returns:
        Rows setting x condition x guard x metric x judge.
    """
    root = Path(folder)
    responses = read_responses(root / RESPONSES)
    with hold_folder(root):
        return _judge_run(root, responses, judges, labels, progress)


def _judge_run(
    root: Path,
    responses: pd.DataFrame,
    judges: Sequence[AnyJudge],
    labels: str | os.PathLike[str] | None,
    progress: bool,
) -> Result:
    for judge in judges:
        _store_verdicts(root, responses, find_judge(judge, root), progress)
    tables = read_verdicts(root, responses)
    if not tables:
        raise MechguardError(f"{root} holds no verdicts yet; name a judge")
    about = _about(root)
    first, *_ = tables
    measure_behaviour(tables[first], about={**about, "judge": first}).save(root / "results" / "behaviour")
    parts = [measure_behaviour(table, about=about).table.assign(judge=name) for name, table in tables.items()]
    result = Result.from_rows(pd.concat(parts).to_dict("records"), **about, judges=list(tables))
    result.save(root / "results" / "judges")
    said = {name: table["complied"] for name, table in tables.items() if "complied" in table}
    if labels is not None:
        by_key = read_labels(labels).set_index("key")["complied"].to_dict()
        said[HAND] = responses["key"].map(by_key)
    said = {name: column for name, column in said.items() if column.notna().any()}
    if len(said) > 1:
        agreement = measure_agreement(pd.DataFrame(said), clusters=_clusters(responses))
        Result(agreement.table, {**agreement.about, **about}).save(root / "results" / "agreement")
    return result


def _clusters(responses: pd.DataFrame) -> list[str]:
    """Responses to one prompt belong together."""
    return [f"{setting} {name}" for setting, name in zip(responses["setting"], responses["id"], strict=True)]


def _store_verdicts(root: Path, responses: pd.DataFrame, judge: Judge, progress: bool) -> None:
    names = _judge_names(root)
    if judge.name not in names:
        write_json(root / VERDICTS / NAMES, [*names, judge.name])
    place = _verdicts_of(root, judge.name)
    known = {line["key"] for line in read_lines(place, needed=("key",), adding=True)}
    left = responses[~responses["key"].isin(known)]
    with tqdm(total=len(left), desc=f"judge {judge.name}", disable=not progress, leave=False) as bar:
        for start in range(0, len(left), JUDGED_AT_ONCE):
            part = left.iloc[start : start + JUDGED_AT_ONCE]
            judged = judge_responses(part, judge)
            said = [column for column in VERDICT if column in judged]
            append_lines(place, judged[["key", *said]].to_dict("records"))
            bar.update(len(part))


def read_verdicts(folder: str | os.PathLike[str], responses: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The responses with the verdicts of each judge that is through with them, in the order of judging."""
    root = Path(folder)
    found = {}
    for name in _judge_names(root):
        rows = read_lines(_verdicts_of(root, name), needed=("key",))
        if set(responses["key"]) <= {row["key"] for row in rows}:
            verdicts = pd.DataFrame(rows).drop_duplicates("key")
            plain = responses.drop(columns=list(VERDICT), errors="ignore")
            found[name] = plain.merge(verdicts, on="key", how="left")
    return found


def _judge_names(root: Path) -> list[str]:
    place = root / VERDICTS / NAMES
    found = read_json(place) if place.is_file() else []
    with parsing(place, "names of judges"):
        return [str(name) for name in found]


def _verdicts_of(root: Path, judge: str) -> Path:
    return root / VERDICTS / f"{file_name(judge)}.jsonl"


def _about(root: Path) -> dict[str, Any]:
    place = root / "protocol.json"
    facts = read_json(place) if place.is_file() else {}
    return {key: facts[key] for key in ("model", "fingerprint", "options") if key in facts}
