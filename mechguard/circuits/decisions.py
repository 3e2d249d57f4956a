"""Refusal as one number: the log-odds of refusing, at the token where the model decides.

Arditi et al. (arXiv 2406.11717) take the first token of the answer. A model whose refusals and compliances
begin alike decides later, so the point is found in the model's own answers: the tokens they share come first
(`prefix`, put behind every prompt), and what follows tells refusal from compliance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechguard.errors import MechguardError
from mechguard.judges import AnyJudge, Exchange, find_judge
from mechguard.models import VLM
from mechguard.prompts import Prompt, Prompts, as_prompts
from mechguard.tracing import AnyPrompts, respond

TELLING = 0.9  # the balanced share of prompts that the deciding token must tell apart
LONGEST_PREFIX = 8
MOST_PREFIXES = 24
BATCH = 64


@dataclass(frozen=True)
class Decision:
    """Where the model decides, and what its words there mean.

    Attributes:
        prefix: token ids that the answer begins with.
        refusal: token ids that then begin a refusal.
        compliance: those that begin a compliance; empty for all others.
        words: the same as text, to read.
    """

    prefix: tuple[int, ...]
    refusal: tuple[int, ...]
    compliance: tuple[int, ...] = ()
    words: str = ""

    def log_odds(self, logits: Float[Tensor, "batch vocabulary"]) -> Float[Tensor, " batch"]:
        """log P(refusal) - log P(compliance), positive where refusing is likelier."""
        chances = logits.float().log_softmax(-1)
        refusal = chances[:, list(self.refusal)].logsumexp(-1)
        if self.compliance:
            return refusal - chances[:, list(self.compliance)].logsumexp(-1)
        return refusal - torch.log1p(-refusal.exp().clamp_max(1 - 1e-6))


def find_decision(
    model: VLM,
    prompts: AnyPrompts,
    *,
    judge: AnyJudge = "refusal",
    max_new_tokens: int = 32,
    samples: int = 2,
    seed: int = 0,
) -> Decision:
    """Find where the model's answers to these prompts turn to refusal or compliance.

    Every beginning that refusals and compliances share is tried: put behind all prompts, do the tokens that
    followed it tell those that the model refuses from those that it answers? The one that tells most wins,
    the shorter of equals.

    Args:
        prompts: some that it refuses and some that it answers; not those that are reported on.
        judge: see `find_judge`; one that goes by phrases, such as "refusal".
        samples: so many answers are sampled beside the greedy one, to see more beginnings.

    Raises:
        MechguardError: it refuses all or none of them, or no beginning tells nine in ten apart.
    """
    sent = model.prepare(as_prompts(prompts))
    verdict = find_judge(judge, model.folder)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": False}
    greedy = respond(model, sent, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        more = [respond(model, sent, do_sample=True, **options) for _ in range(samples)]
    asked = [
        (prompt, answer) for answers in (greedy, *more) for prompt, answer in zip(sent, answers, strict=True)
    ]
    said = verdict.judge([Exchange(prompt.text, answer.text, prompt.label) for prompt, answer in asked])
    judged = [(found, answer.ids) for found, (_, answer) in zip(said, asked, strict=True)]
    refused = [ids for found, ids in judged if found.keyword_refusal]
    complied = [ids for found, ids in judged if found.complied and not found.keyword_refusal]
    first = said[: len(greedy)]
    refuses = torch.tensor([bool(found.keyword_refusal) for found in first])
    answers = torch.tensor([bool(found.complied) and not found.keyword_refusal for found in first])
    if not refuses.any() or not answers.any():
        raise MechguardError(
            f"{model.name} refuses {int(refuses.sum())} and answers {int(answers.sum())} of {len(first)} "
            "prompts; give prompts of which it refuses some and answers some"
        )
    tried = {
        candidate: _told(model, sent, candidate, refuses, answers)
        for candidate in _candidates(refused, complied)
    }
    best = max(tried, key=lambda candidate: (tried[candidate], -len(candidate.prefix)), default=None)
    if best is None or tried[best] < TELLING:
        raise MechguardError(
            f"no beginning of its answers tells what {model.name} refuses from what it answers (the best "
            f"tells {max(tried.values(), default=0):.0%} of {len(first)}); give a Decision of your own"
        )
    return replace(best, words=_describe(model, best))


def _candidates(refused: list[tuple[int, ...]], complied: list[tuple[int, ...]]) -> list[Decision]:
    """The most common beginnings that both kinds of answers share, and what follows them in each."""
    shared = [
        Counter(ids[:size] for ids in answers for size in range(min(len(ids), LONGEST_PREFIX + 1)))
        for answers in (refused, complied)
    ]
    common = {
        prefix: min(count, shared[1][prefix]) for prefix, count in shared[0].items() if shared[1][prefix]
    }
    found = []
    for prefix in sorted(common, key=lambda prefix: -common[prefix])[:MOST_PREFIXES]:
        first, second = _shares(refused, prefix), _shares(complied, prefix)
        telling = tuple(token for token in first if first[token] > second.get(token, 0.0))
        others = tuple(token for token in second if second[token] > first.get(token, 0.0))
        if telling and others:
            found.append(Decision(prefix, telling, others))
    return found


def _told(
    model: VLM,
    prompts: Prompts,
    decision: Decision,
    refuses: Bool[Tensor, " prompt"],
    answers: Bool[Tensor, " prompt"],
) -> float:
    """The balanced share of prompts whose log-odds have the sign of what the model does."""
    odds = []
    for start in range(0, len(prompts), BATCH):
        encoded = encode_to_decision(model, list(prompts[start : start + BATCH]), decision)
        with torch.no_grad():
            logits = model.hf_model(**encoded, **model.position_ids(encoded), use_cache=False).logits
        odds.append(decision.log_odds(logits[:, -1]).cpu())
    positive = torch.cat(odds) > 0
    return float(positive[refuses].float().mean() + (~positive[answers]).float().mean()) / 2


def encode_to_decision(model: VLM, batch: Sequence[Prompt], decision: Decision | None) -> dict[str, Tensor]:
    """A batch with the decision's prefix behind every prompt."""
    encoded = model.encode(batch)
    prefix = () if decision is None else decision.prefix
    if not prefix:
        return encoded
    shape = encoded["input_ids"].shape
    fill = {"input_ids": torch.tensor(prefix), "attention_mask": torch.ones(len(prefix))}
    zeros = torch.zeros(len(prefix))
    return {
        name: torch.cat([value, fill.get(name, zeros).to(value).expand(shape[0], -1)], dim=1)
        if value.shape == shape
        else value
        for name, value in encoded.items()
    }


def _shares(answers: list[tuple[int, ...]], prefix: tuple[int, ...]) -> dict[int, float]:
    """How often each token comes next, among the answers that begin so."""
    size = len(prefix)
    following = Counter(ids[size] for ids in answers if ids[:size] == prefix and len(ids) > size)
    total = sum(following.values())
    return {token: count / total for token, count in following.items()}


def _describe(model: VLM, decision: Decision) -> str:
    def words(tokens: Sequence[int]) -> str:
        return " / ".join(repr(model.tokenizer.decode([token]).strip()) for token in tokens)

    behind = f"behind {model.tokenizer.decode(list(decision.prefix))!r}: " if decision.prefix else ""
    return f"{behind}{words(decision.refusal)} against {words(decision.compliance)}"
