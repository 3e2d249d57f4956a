"""The logit lens: what the model would say if it stopped at a layer.

The state after each layer is sent through the final norm and the unembedding (nostalgebraist 2020); read
along the tokens of refusal and compliance it says from which layer on the model leans to one of them. Layers
before the last need not speak the language of the unembedding, so a low value early is no evidence of
indecision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from mechguard.circuits.attribution import batches
from mechguard.circuits.decisions import AnyPrompts, Decision, encode_to_decision
from mechguard.circuits.passes import Place, States, hooked, run
from mechguard.guards.steering import AnyGuard
from mechguard.models import VLM
from mechguard.prompts import Prompt, as_prompts
from mechguard.result import UNGUARDED, Result
from mechguard.statistics import bootstrap_mean

BATCH = 64


def apply_logit_lens(
    model: VLM,
    prompts: AnyPrompts,
    *,
    decision: Decision,
    guard: AnyGuard | None = None,
    batch_size: int = BATCH,
    seed: int = 0,
) -> Result:
    """The log-odds of refusal read off every layer at the token where the model decides.

    Args:
        guard: acts in the same pass; states are read after it.

    Returns:
        One row per layer: metric "log_odds", the mean over prompts in nats with a 95% bootstrap interval; and
        layer "output", the model's own.
    """
    sent = model.prepare(as_prompts(prompts))
    found: dict[int | str, list[Tensor]] = {}
    for batch in batches(sent, batch_size):
        layers = model.parts.running(with_picture=bool(batch[0].images))
        with reaching(model, batch, decision, guard, [Place("residual", n) for n in layers]) as (
            logits,
            states,
        ):
            for number in layers:
                spoken = unembed(model, states[Place("residual", number)][:, -1])
                found.setdefault(number, []).append(decision.log_odds(spoken).cpu())
            found.setdefault("output", []).append(decision.log_odds(logits[:, -1]).cpu())
    rows = []
    for layer, parts in found.items():
        values = torch.cat(parts).numpy()
        low, high = bootstrap_mean(values, seed=seed)
        rows.append(
            {"condition": sent.condition, "guard": UNGUARDED if guard is None else guard.name, "layer": layer,
             "metric": "log_odds", "value": float(values.mean()), "low": low, "high": high, "n": len(values)}
        )  # fmt: skip
    about = {"decision": decision.words, "seed": seed, "prompts": sent.fingerprint}
    return Result.from_rows(rows, model=model.name, **about)


def unembed(model: VLM, state: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch vocabulary"]:
    """Logits of a state: the final norm and the unembedding."""
    with torch.no_grad():
        normed = state if model.parts.norm is None else model.hf_model.get_submodule(model.parts.norm)(state)
        return model.hf_model.get_output_embeddings()(normed).float()


@contextmanager
def reaching(
    model: VLM, batch: list[Prompt], decision: Decision, guard: AnyGuard | None, keep: list[Place]
) -> Iterator[tuple[Tensor, States]]:
    """Logits and kept states of the pass that reaches the decision, guarded or not.

    A guard decides its gates at the end of the prompt, so the decision's prefix then comes in a second pass.
    """
    with torch.no_grad():
        if guard is None or not decision.prefix:
            with _guarded(model, batch, guard), hooked(model, keep=keep) as states:
                yield run(model, encode_to_decision(model, batch, decision)).logits, states
            return
        encoded, whole = model.encode(batch), encode_to_decision(model, batch, decision)
        size = len(decision.prefix)
        with _guarded(model, batch, guard), hooked(model, keep=keep) as states:
            begun = model.hf_model(**encoded, **model.position_ids(encoded), use_cache=True)
            places = {name: ids[:, -size:] for name, ids in model.position_ids(whole).items()}
            logits = model.hf_model(
                input_ids=whole["input_ids"][:, -size:],
                attention_mask=whole["attention_mask"],
                past_key_values=begun.past_key_values,
                use_cache=True,
                **places,
            ).logits
            yield logits, states


@contextmanager
def _guarded(model: VLM, batch: list[Prompt], guard: AnyGuard | None) -> Iterator[None]:
    if guard is None:
        yield
        return
    with guard.attach(model, batch):
        yield
