"""Searches: settings of a guard that trade attack success against helpfulness, by Optuna (extra `search`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from mechguard.errors import MechguardError
from mechguard.evaluation import evaluate
from mechguard.guards.steering import AnyGuard
from mechguard.models import VLM
from mechguard.prompts import Prompts
from mechguard.result import Result
from mechguard.storage import digest, hold_file
from mechguard.tracing import predict_next_tokens

OBJECTIVES: dict[str, Literal["minimize", "maximize"]] = {
    "attack_success": "minimize",
    "benign_compliance": "maximize",
    "kl_first_token": "minimize",
}


def search_guards(
    model: VLM,
    prompts: Prompts,
    make: Callable[..., AnyGuard],
    space: Mapping[str, Any],
    *,
    trials: int = 30,
    conditions: Sequence[str] = ("blank",),
    max_new_tokens: int = 48,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Search the settings of a guard on validation prompts, for three objectives at once.

    Args:
        prompts: harmful and harmless prompts of the validation split.
        make: from one value per name in `space` to a guard.
        space: for each name a list of choices, or a tuple (low, high) of floats.
        trials: how many settings are tried in all.
        conditions: image conditions over which rates are averaged.
        out: a file in which finished trials are kept; a search that was killed goes on there.

    Returns:
        One row per trial and objective, with its setting and whether it is on the Pareto front: no other
        trial has lower attack success, higher benign compliance and lower KL at the first token (nats, on
        harmless prompts) at once.

    Raises:
        MechguardError: Optuna is not installed, prompts of one kind are missing, or `out` holds another
            search or is at work in another process.
    """
    try:
        import optuna
    except ImportError:
        raise MechguardError("a search needs Optuna; install mechguard[search]") from None
    if set(prompts.labels) != {"harmful", "harmless"}:
        raise MechguardError("a search needs harmful and harmless prompts to trade between")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    bound = digest(
        model.fingerprint, prompts.fingerprint, dict(space), list(conditions), max_new_tokens, seed
    )
    with hold_file(out):
        storage = None if out is None else _storage(Path(out))
        study = optuna.create_study(
            study_name="guards",
            storage=storage,
            load_if_exists=True,
            directions=list(OBJECTIVES.values()),
            sampler=optuna.samplers.TPESampler(seed=seed),
        )

        if study.user_attrs.get("bound", bound) != bound:
            raise MechguardError(
                f"{out} holds a search with another model, prompts, space or settings; give another file"
            )
        study.set_user_attr("bound", bound)

        def objective(trial: Any) -> tuple[float, ...]:
            guard = make(**{name: _suggest(trial, name, choices) for name, choices in space.items()})
            found = _measure(model, prompts, guard, conditions, max_new_tokens)
            return tuple(found[metric] for metric in OBJECTIVES)

        left = trials - len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))
        if left > 0:
            study.optimize(objective, n_trials=left, show_progress_bar=progress)
        return _as_result(study, model, len(prompts))


def _suggest(trial: Any, name: str, choices: Any) -> Any:
    if isinstance(choices, tuple):
        return trial.suggest_float(name, *choices)
    words = {str(choice): choice for choice in choices}  # Optuna keeps words only
    return words[trial.suggest_categorical(name, list(words))]


def _measure(
    model: VLM, prompts: Prompts, guard: AnyGuard, conditions: Sequence[str], max_new_tokens: int
) -> dict[str, float]:
    rates = evaluate(
        model,
        prompts,
        guards=[guard],
        conditions=conditions,
        max_new_tokens=max_new_tokens,
        split="validation",
        progress=False,
    ).table
    means = rates.groupby("metric")["value"].mean()
    harmless = [prompts.with_label("harmless").with_image(condition) for condition in conditions]
    divergences = []
    for sent in harmless:
        plain = predict_next_tokens(model, sent, progress=False)
        guarded = predict_next_tokens(model, sent, guard=guard, progress=False)
        divergences.append(float((plain.exp() * (plain - guarded)).sum(-1).mean()))
    return {**means.to_dict(), "kl_first_token": sum(divergences) / len(divergences)}


def _storage(path: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def _as_result(study: Any, model: VLM, n: int) -> Result:
    front = {trial.number for trial in study.best_trials}
    rows = [
        {
            "trial": trial.number,
            **trial.params,
            "metric": metric,
            "value": value,
            "n": n,
            "split": "validation",
            "pareto": trial.number in front,
        }
        for trial in study.trials
        if trial.values is not None
        for metric, value in zip(OBJECTIVES, trial.values, strict=True)
    ]
    return Result(
        pd.DataFrame(rows), {"model": model.name, "fingerprint": model.fingerprint, "search": "TPE"}
    )
