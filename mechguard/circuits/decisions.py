"""Refusal as one number: the log-odds of refusing, at the token where the model decides.

Arditi et al. (arXiv 2406.11717) take the first token of the answer. A model whose refusals and compliances
begin alike decides later, so the point is found in the model's own answers: the tokens they share come first
(`prefix`, put behind every prompt), and what follows tells refusal from compliance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechguard.errors import MechguardError
from mechguard.judges import RefusalJudge, find_judge
from mechguard.models import VLM
from mechguard.prompts import Prompt
from mechguard.tracing import AnyPrompts, respond

TELLING = 0.9  # the balanced share of answers that the deciding token must tell apart
LONGEST_PREFIX = 8


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
    judge: str | RefusalJudge = "refusal",
    max_new_tokens: int = 32,
) -> Decision:
    """Find where the model's answers to these prompts turn to refusal or compliance.

    Args:
        prompts: some that it refuses and some that it answers; not those that are reported on.
        judge: "refusal" (the model's own judge, or keywords), "keywords", or a RefusalJudge.

    Raises:
        MechguardError: it refuses all or none of them, or no single token tells the two apart.
    """
    verdict = find_judge(judge, model.folder)
    answers = respond(model, prompts, max_new_tokens=max_new_tokens, progress=False)
    judged = [(verdict(answer.text), answer.ids) for answer in answers]
    refused = [ids for said, ids in judged if said.keyword_refusal]
    complied = [ids for said, ids in judged if said.complied]
    if not refused or not complied:
        raise MechguardError(
            f"{model.name} refuses {len(refused)} and answers {len(complied)} of {len(answers)} prompts; "
            "give prompts of which it refuses some and answers some"
        )
    prefix: tuple[int, ...] = ()
    while len(prefix) <= LONGEST_PREFIX:
        first, second = _shares(refused, prefix), _shares(complied, prefix)
        telling = [token for token in first if first[token] > second.get(token, 0.0)]
        others = [token for token in second if second[token] > first.get(token, 0.0)]
        told = (sum(first[token] for token in telling) + sum(second[token] for token in others)) / 2
        if telling and others and told >= TELLING:
            return Decision(prefix, tuple(telling), tuple(others), _describe(model, prefix, telling, others))
        common = {token: min(share, second.get(token, 0.0)) for token, share in first.items()}
        best = max(common, key=lambda token: common[token], default=None)
        if best is None or not common[best]:
            break
        prefix = (*prefix, best)
    raise MechguardError(
        f"no single token tells refusals of {model.name} from compliances; give a Decision of your own"
    )


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


def _describe(model: VLM, prefix: tuple[int, ...], refusal: list[int], compliance: list[int]) -> str:
    def words(tokens: Sequence[int]) -> str:
        return " / ".join(repr(model.tokenizer.decode([token]).strip()) for token in tokens)

    behind = f"behind {model.tokenizer.decode(list(prefix))!r}: " if prefix else ""
    return f"{behind}{words(refusal)} against {words(compliance)}"
