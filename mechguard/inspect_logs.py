"""A run as a log of Inspect (inspect_ai), for `inspect view --log-dir DIR` (extra `inspect`).

One sample per response, its id the response's key; one score per judge, 1 for complied and 0 for not;
condition, guard, the exact string that was sent and the gates stand in the sample's metadata.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from mechguard.errors import MechguardError
from mechguard.evaluation import VERDICT, measure_behaviour
from mechguard.judging import RESPONSES, read_verdicts
from mechguard.responses import read_responses
from mechguard.storage import read_json, versions

TASK = "mechguard/protocol"
METADATA = (
    *("setting", "condition", "guard", "id", "label", "pair", "category", "sent", "raw", "gates"),
    *("refusal_log_odds", "kl_first_token", "tokens", "seconds"),
)


def export_inspect_log(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Write the responses and verdicts of a run as an Inspect log.

    Args:
        folder: of a run, or any folder with a `responses.jsonl`.
        path: .eval (compressed) or .json.

    Raises:
        MechguardError: inspect_ai is not installed, the path ends otherwise, or there are no responses.
    """
    try:
        from inspect_ai.log import EvalLog, EvalStats, write_eval_log
    except ImportError:
        raise MechguardError("an Inspect log needs inspect_ai; install mechguard[inspect]") from None
    root, target = Path(folder), Path(path)
    if target.suffix not in (".eval", ".json"):
        raise MechguardError(f"{target} ends in {target.suffix!r}; an Inspect log is a .eval or a .json file")
    responses = read_responses(root / RESPONSES)
    judged = read_verdicts(root, responses)
    when = datetime.fromtimestamp((root / RESPONSES).stat().st_mtime, UTC).isoformat(timespec="seconds")
    facts = read_json(root / "protocol.json") if (root / "protocol.json").is_file() else {}
    log = EvalLog(
        status="success",
        eval=_spec(responses, list(judged), facts, when),
        results=_results(judged, len(responses)),
        stats=EvalStats(started_at=when, completed_at=when),
        samples=_samples(responses, judged, str(facts.get("model", "unknown"))),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_eval_log(log, target)
    return target


def _spec(responses: pd.DataFrame, judges: list[str], facts: dict[str, Any], when: str) -> Any:
    from inspect_ai.log import EvalConfig, EvalDataset, EvalSpec
    from inspect_ai.log._log import EvalScorer

    keys = [str(key) for key in responses["key"]]
    return EvalSpec(
        created=when,
        task=TASK,
        dataset=EvalDataset(name="+".join(responses["setting"].unique()), samples=len(keys), sample_ids=keys),
        model=f"mechguard/{facts.get('model', 'unknown')}",
        config=EvalConfig(),
        packages=versions(),
        scorers=[EvalScorer(name=judge) for judge in judges],
        metadata={key: facts[key] for key in ("fingerprint", "options", "prompts") if key in facts},
    )


def _results(judged: dict[str, pd.DataFrame], total: int) -> Any:
    from inspect_ai.log import EvalMetric, EvalResults, EvalScore

    scores = []
    for judge, table in judged.items():
        rates = measure_behaviour(table).table
        metrics = {}
        for row in rates.to_dict("records"):
            name = f"{row['setting']} / {row['condition']} / {row['guard']} / {row['metric']}"
            metrics[name] = EvalMetric(name=name, value=row["value"])
        said = int(table["complied"].notna().sum()) if "complied" in table else 0
        score = EvalScore(
            name=judge, scorer=judge, scored_samples=said, unscored_samples=total - said, metrics=metrics
        )
        scores.append(score)
    return EvalResults(total_samples=total, completed_samples=total, scores=scores)


def _samples(responses: pd.DataFrame, judged: dict[str, pd.DataFrame], model: str) -> list[Any]:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ModelOutput

    verdicts = {judge: table.set_index("key").to_dict("index") for judge, table in judged.items()}
    samples = []
    for row in responses.to_dict("records"):
        request, response = str(row["request"]), str(row["response"])
        scores = {judge: _score(known[row["key"]], response) for judge, known in verdicts.items()}
        sample = EvalSample(
            id=row["key"],
            epoch=1,
            input=request,
            target=_text(row.get("answer")),
            messages=[ChatMessageUser(content=request), ChatMessageAssistant(content=response)],
            output=ModelOutput.from_content(model, response),
            scores={judge: score for judge, score in scores.items() if score is not None},
            metadata={name: _plain(row[name]) for name in METADATA if name in row},
            total_time=float(row["seconds"]),
        )
        samples.append(sample)
    return samples


def _score(verdict: dict[str, Any], response: str) -> Any:
    """1 for complied, 0 for not; where a judge says another word, 1 for that; None where it says none."""
    from inspect_ai.scorer import Score

    said = {name: _plain(verdict[name]) for name in VERDICT if name in verdict}
    said = {name: value for name, value in said.items() if value is not None}
    for name in ("complied", "exact", "degenerate", "refused"):
        if name in said:
            explanation = None if name == "complied" else f"the value is {name!r}"
            return Score(value=int(said[name]), answer=response, explanation=explanation, metadata=said)
    return None


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and value != value else value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
