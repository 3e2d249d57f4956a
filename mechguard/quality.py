"""Whether guarded responses are still good text: perplexity, repetition, length, drift from the model.

Everything but perplexity is read off stored responses. Perplexity needs a reference model; it is stored as it
comes, and gone on with after an interruption.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mechguard.judges import LOG_ODDS, is_degenerate, normalise, repeated_share
from mechguard.models import VLM
from mechguard.prompts import Prompt
from mechguard.responses import KL
from mechguard.result import Result
from mechguard.statistics import bootstrap_mean
from mechguard.storage import append_lines, read_lines

NLL = "nll"
CELL = ("setting", "condition", "guard", "label")


def measure_perplexity(
    reference: VLM,
    responses: pd.DataFrame,
    *,
    with_request: bool = True,
    batch_size: int = 32,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """How likely each response is to a reference model, as text.

    Perplexity is exp(nll), nll the mean negative log-likelihood of the response's tokens in nats. VLM-Guard
    reports it under Llama-2-7b-chat; whether the request stood before the response is not known.

    Args:
        reference: a model whose language model reads the responses, such as the guarded model itself.
        responses: of `gather_responses` or `read_responses`.
        with_request: whether the request, in the reference's chat template, stands before the response.
        out: a file of JSON lines to which each batch is added, and from which known rows are taken.

    Returns:
        `key`, `nll` and `nll_tokens`, one row per response; NaN for an empty one.
    """
    model = reference.llm
    known = (
        {row["key"]: row for row in read_lines(out, needed=("key", NLL), adding=True)}
        if out is not None
        else {}
    )
    rows = responses.drop_duplicates("key").to_dict("records")
    parts = {row["key"]: _tokens(model, row, with_request) for row in rows}
    order = sorted(parts, key=lambda key: sum(map(len, parts[key])))
    with tqdm(total=len(order), desc="perplexity", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]  # the same after an interruption
            bar.update(len(batch))
            if all(key in known for key in batch):
                continue
            found = zip(batch, _mean_nll(model, [parts[key] for key in batch]), strict=True)
            new = [
                {"key": key, NLL: nll, "nll_tokens": len(parts[key][1])}
                for key, nll in found
                if key not in known
            ]
            if out is not None:
                append_lines(out, new)
            known.update((row["key"], row) for row in new)
    table = pd.DataFrame([known[row["key"]] for row in rows])
    return table.assign(**{NLL: table[NLL].astype(float)})


def measure_quality(responses: pd.DataFrame, *, split: str = "test", seed: int = 0, **about: Any) -> Result:
    """The quality of responses by setting x condition x guard x label.

    Metrics, as far as the columns are there: `repetition` (mean share of repeated word 4-grams, seq-rep-4),
    `degenerate` (share of empty or repetitive responses), `length` (mean tokens), `perplexity` (exp of the
    mean over responses of their nll: a geometric mean, which one broken response does not decide),
    `kl_first_token` (mean, nats, from the unguarded model), `refusal_log_odds` (mean, nats).

    Args:
        responses: of `gather_responses`, joined with `measure_perplexity` if wanted.

    Returns:
        Rows with bootstrap 95% intervals over responses.
    """
    texts = responses["response"].astype(str)
    measured = pd.DataFrame(
        {
            "repetition": texts.map(repeated_share),
            "degenerate": texts.map(lambda text: float(is_degenerate(normalise(text)))),
            "length": responses["tokens"].astype(float),
            **{name: responses[name].astype(float) for name in (NLL, KL, LOG_ODDS) if name in responses},
        }
    )
    rows: list[dict[str, Any]] = []
    for cell, numbers in measured.groupby([responses[name] for name in CELL], sort=False):
        facts = dict(zip(CELL, cell, strict=True))
        for metric in measured:
            rows += _row(facts, str(metric), numbers[metric].dropna(), seed, split)
    return Result.from_rows(rows, **about)


def _row(
    facts: dict[str, Any], metric: str, values: pd.Series, seed: int, split: str
) -> Iterator[dict[str, Any]]:
    if values.empty:
        return
    numbers = torch.tensor([float(values.mean()), *bootstrap_mean(values.to_numpy(), seed=seed)])
    if metric == NLL:
        metric, numbers = "perplexity", numbers.exp()
    value, low, high = numbers.tolist()
    yield {
        **facts,
        "metric": metric,
        "value": value,
        "low": low,
        "high": high,
        "n": len(values),
        "split": split,
    }


def _tokens(model: VLM, row: dict[str, Any], with_request: bool) -> tuple[list[int], list[int]]:
    """Token ids before the response, and of the response."""
    tokenizer = model.tokenizer
    own = tokenizer(str(row["response"]), add_special_tokens=False)["input_ids"]
    if with_request:
        encoded = model.encode([Prompt(str(row["id"]), str(row["request"]))])
        return encoded["input_ids"][0].tolist(), own
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [int(begin)], own


def _mean_nll(model: VLM, batch: Sequence[tuple[list[int], list[int]]]) -> list[float | None]:
    """Mean negative log-likelihood (nats) of each response's tokens; None for an empty response."""
    width = max(len(before) + len(own) for before, own in batch)
    pad = model.tokenizer.pad_token_id
    ids = torch.full((len(batch), width), int(pad))
    mask = torch.zeros_like(ids)
    for row, (before, own) in enumerate(batch):
        ids[row, width - len(before) - len(own) :] = torch.tensor([*before, *own])
        mask[row, width - len(before) - len(own) :] = 1
    encoded = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    with torch.no_grad():
        logits = model.hf_model(**encoded, **model.position_ids(encoded), use_cache=False).logits
    chosen: Float[Tensor, "batch pos"] = (
        logits[:, :-1].float().log_softmax(-1).gather(-1, encoded["input_ids"][:, 1:, None])[..., 0].cpu()
    )
    return [
        float(-chosen[row, -len(own) :].double().mean()) if own else None
        for row, (_, own) in enumerate(batch)
    ]
