"""Responses: what was sent and what came back, stored as it comes.

A store is a file of JSON lines, one per prompt x condition x guard, with a claim beside it (`.json`) that
says which model, prompts and guards it belongs to. Answering goes on where it was interrupted, with the same
batches, so that the texts are those of an uninterrupted run; judging comes later and needs no model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd

from mechguard.errors import MechguardError
from mechguard.guards.steering import AnyGuard
from mechguard.judges import LOG_ODDS, REFUSAL_OPENINGS, Exchange, refusal_log_odds, refusal_token_ids
from mechguard.ledgers import Ledger
from mechguard.models import VLM
from mechguard.prefixes import AnswerCache, keeping_answers
from mechguard.processes import find_processes
from mechguard.prompts import Prompts
from mechguard.result import UNGUARDED
from mechguard.storage import digest, parsing, read_json, read_lines, write_json
from mechguard.tracing import (
    BatchSize,
    Response,
    plan_batches,
    predict_next_tokens,
    respond_in_batches,
)

KL = "kl_first_token"
COUNT = "responses"  # in a store's claim: how many it held when an evaluation ended


def gather_responses(
    model: VLM,
    prompts: Prompts,
    *,
    guards: Sequence[AnyGuard | None] = (None,),
    conditions: Sequence[str] | None = None,
    teacher: VLM | None = None,
    max_new_tokens: int = 64,
    batch_size: BatchSize = "auto",
    first_token: bool = False,
    refusal_openings: Sequence[str] = REFUSAL_OPENINGS,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Every response, one row per prompt x condition x guard.

    Args:
        guards: None stands for the unguarded model.
        conditions: image conditions; `default_conditions` by default.
        first_token: also measure, at the first token of the answer, the log-odds of a refusal opening
            (`refusal_log_odds`, nats) and the KL divergence from the unguarded model to the guarded one
            (`kl_first_token`, nats). Costs two more passes over each prompt.
        refusal_openings: words that refusals begin with; see `judges.RefusalOdds`.
        out: a file of JSON lines to which each finished batch is added, and from which known rows are taken.
            Several processes (`torchrun`) share the batches, with or without a file.

    Returns:
        Columns `key` (unique), `setting`, `condition`, `guard`, `id`, `label`, `pair`, `category`, `request`
        (the prompt's own text), `answer` (what a right answer says), `sent` (the exact string, with the
        guard's wrapper and the chat template), `response` (the part that counts), `raw` (the whole answer,
        where a guard counts a part only), `tokens`, `seconds` (its share of its batch), `gates`.

    Raises:
        MechguardError: two guards have one name, or `out` holds responses of another model, of other
            prompts, or of another guard of the same name, is damaged, or another process adds to it.
    """
    ledger = Ledger(None if out is None else Path(out), "key", ("response",))
    with ledger.held():
        return _gather(
            model,
            prompts,
            guards,
            default_conditions(model, prompts) if conditions is None else list(conditions),
            ledger,
            refusal_token_ids(model.tokenizer, refusal_openings) if first_token else None,
            teacher=teacher,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )


def _gather(
    model: VLM,
    prompts: Prompts,
    guards: Sequence[AnyGuard | None],
    words: list[str],
    ledger: Ledger,
    odds: Sequence[int] | None,
    *,
    teacher: VLM | None,
    max_new_tokens: int,
    batch_size: BatchSize,
    progress: bool,
) -> pd.DataFrame:
    named = {UNGUARDED if guard is None else guard.name: guard for guard in guards}
    if len(named) != len(guards):
        names = [UNGUARDED if guard is None else guard.name for guard in guards]
        raise MechguardError(f"guards must have different names, found {names}; use guard.renamed(...)")
    sent = {condition: prompts.with_image(condition) for condition in words}
    processes = find_processes()
    with processes.together():
        if ledger.path is not None and processes.leads:
            _claim(ledger.path, model, sent, prompts.name, named, max_new_tokens)
    known = ledger.read()
    # All conditions in one call: the fewer batches, the fewer steps.
    everything = Prompts([prompt for batch in sent.values() for prompt in batch], name=prompts.name)
    where = [condition for condition, batch in sent.items() for _ in batch]
    keys = {
        name: [
            make_key(prompts.name, place, name, one.id) for place, one in zip(where, everything, strict=True)
        ]
        for name in named
    }
    plan = plan_batches(model, everything, batch_size)
    own = processes.own_of([len(rows) for rows in plan])
    foreign = {row for number, rows in enumerate(plan) if number not in own for row in rows}

    def answer(name: str, guard: AnyGuard | None) -> Iterator[list[dict[str, Any]]]:
        rendered = model.render(everything if guard is None else guard.wrap(everything))
        batches = respond_in_batches(
            model,
            everything,
            guard=guard,
            teacher=teacher,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            known={row for row, key in enumerate(keys[name]) if key in known} | foreign,
            progress=progress and processes.leads,
        )
        for rows, responses, seconds in _timed(batches, kept):
            measured = (
                _first_tokens(model, everything, rows, guard, teacher, odds) if odds is not None else {}
            )
            yield [
                {
                    "key": keys[name][row],
                    "setting": prompts.name,
                    "condition": where[row],
                    "guard": name,
                    **_facts(everything, row, rendered[row], response, guard),
                    "seconds": round(seconds / len(rows), 4),
                    **{column: values[place] for column, values in measured.items()},
                }
                for place, (row, response) in enumerate(zip(rows, responses, strict=True))
                if keys[name][row] not in known
            ]

    with processes.together(), keeping_answers(model) if None in guards else nullcontext() as kept:
        for name, guard in named.items():
            for new in answer(name, guard):
                ledger.add(new)
                known.update((row["key"], row) for row in new)
    known = ledger.gather(known, [keys[name][row] for name in named for rows in plan for row in rows])
    with processes.together():
        if ledger.path is not None and processes.leads:
            _count(ledger.path, len(known))
    order = [
        keys[name][row]
        for condition in words
        for name in named
        for row, place in enumerate(where)
        if place == condition
    ]
    return pd.DataFrame([known[key] for key in order])


def read_responses(path: str | os.PathLike[str]) -> pd.DataFrame:
    """The responses of a store, in its order.

    Raises:
        MechguardError: there is no such file, it holds none, a line is broken, or some are gone.
    """
    with parsing(path, "responses"):
        rows = {str(row["key"]): row for row in read_lines(path, needed=("key", "response"))}
        table = pd.DataFrame(list(rows.values()))
    if not rows:
        raise MechguardError(f"there are no responses in {path}; give the store of an evaluation")
    claim = _read_claim(Path(path))
    if len(rows) < claim.get(COUNT, 0):
        raise MechguardError(
            f"{path} holds {len(rows)} of the {claim[COUNT]} responses that were stored: it was cut; run the "
            "same evaluation again, which answers the others"
        )
    return table


def as_exchanges(responses: pd.DataFrame) -> list[Exchange]:
    """What judges are given, row by row."""
    rows = responses.to_dict("records")
    return [
        Exchange(str(row.get("request", "")), str(row["response"]), row["label"], _present(row))
        for row in rows
    ]


def default_conditions(model: VLM, prompts: Prompts) -> list[str]:
    """text; for a model that takes pictures also blank, and image where every prompt owns one."""
    if not model.takes_images:
        return ["text"]
    own = all(prompt.own_image is not None for prompt in prompts)
    return ["text", "blank", *(["image"] if own else [])]


def make_key(setting: str, condition: str, guard: str, prompt: str) -> str:
    """The key of one response; says nothing to a reader."""
    return digest(setting, condition, guard, prompt)


def _facts(
    prompts: Prompts, row: int, sent: str, response: Response, guard: AnyGuard | None
) -> dict[str, Any]:
    prompt = prompts[row]
    counted = response.text if guard is None else guard.counted(response.text)
    return {
        "id": prompt.id,
        "label": prompt.label,
        "pair": prompt.pair,
        "category": prompt.category,
        "request": prompt.text,
        "answer": prompt.answer,
        "sent": sent,
        "response": counted,
        "raw": None if counted == response.text else response.text,
        "tokens": response.tokens,
        "gates": {str(layer): opened for layer, opened in response.gates.items()},
    }


def _first_tokens(
    model: VLM,
    prompts: Prompts,
    rows: list[int],
    guard: AnyGuard | None,
    teacher: VLM | None,
    openings: Sequence[int],
) -> dict[str, list[float]]:
    """Log-odds of a refusal opening and KL to the unguarded model, for one batch."""
    batch = Prompts([prompts[row] for row in rows], name=prompts.name)
    options: dict[str, Any] = {"batch_size": len(rows), "progress": False}
    plain = predict_next_tokens(model, batch, **options)
    found = plain
    if guard is not None:
        found = predict_next_tokens(model, batch, guard=guard, teacher=teacher, **options)
    divergence = (plain.exp() * (plain - found)).sum(-1).clamp_min(0.0)
    return {LOG_ODDS: _rounded(refusal_log_odds(found, openings)), KL: _rounded(divergence)}


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 6) for value in values]


def _timed(
    batches: Iterator[tuple[list[int], list[Response]]], kept: AnswerCache | None
) -> Iterator[tuple[list[int], list[Response], float]]:
    """Each batch and the seconds it took, or would have, had no answer been known."""

    def now() -> float:
        return time.monotonic() + (kept.spared if kept is not None else 0.0)

    started = now()
    for rows, responses in batches:
        yield rows, responses, now() - started
        started = now()


def _present(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that have a value: a table fills the others with NaN."""
    return {name: value for name, value in row.items() if not (isinstance(value, float) and value != value)}


def _claim(
    path: Path,
    model: VLM,
    sent: dict[str, Prompts],
    setting: str,
    guards: dict[str, AnyGuard | None],
    max_new_tokens: int,
) -> None:
    """Say what the store belongs to, or refuse one that belongs to something else."""
    place = path.with_suffix(".json")
    known = _read_claim(path)
    if not known and path.is_file():
        raise MechguardError(f"{path} is there without its {place.name}; give another file, or remove it")
    wanted: dict[str, Any] = {
        "model": {"fingerprint": model.fingerprint},
        "settings": {"max_new_tokens": max_new_tokens},
        "prompts": {f"{setting}, {condition}": batch.whole_fingerprint for condition, batch in sent.items()},
        "guards": {name: None if guard is None else guard.fingerprint for name, guard in guards.items()},
    }
    for part, facts in wanted.items():
        for name, value in facts.items():
            if known.get(part, {}).get(name, value) != value:
                raise MechguardError(
                    f"{path} holds responses with another {name!r} (in its {part}); give another file"
                )
    merged = {**known, **{part: {**known.get(part, {}), **facts} for part, facts in wanted.items()}}
    if merged != known:
        write_json(place, merged)


def _read_claim(path: Path) -> dict[str, Any]:
    """What a store says of itself; nothing where it was not written here."""
    place = path.with_suffix(".json")
    if not place.is_file():
        return {}
    found = read_json(place)
    with parsing(place, "what a store of responses belongs to"):
        return {name: int(part) if name == COUNT else dict(part) for name, part in found.items()}


def _count(path: Path, count: int) -> None:
    """Note how many responses a store holds, so that one that is cut later is found."""
    claim = _read_claim(path)
    if claim.get(COUNT) != count:
        write_json(path.with_suffix(".json"), {**claim, COUNT: count})
