"""From a word to a judge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mechguard.errors import MechguardError
from mechguard.judges.refusal import PUBLISHED_LISTS, CoherenceJudge, PublishedKeywords, RefusalJudge
from mechguard.judges.rubrics import LlamaGuard, RubricJudge
from mechguard.judges.speakers import ChatModel, Endpoint
from mechguard.judges.tokens import RefusalOdds
from mechguard.judges.verdicts import CallableJudge, Judge, Verdict

AnyJudge = str | Judge | Callable[[str, str], Verdict | bool | None]
OWN = "judge.json"
WORDS = ("refusal", "keywords", *PUBLISHED_LISTS, "coherence", "refusal_odds")
HELP = (
    f"{', '.join(WORDS)}, llama_guard:MODEL, strongreject:MODEL, or strongreject:URL#MODEL for an "
    "OpenAI-compatible endpoint"
)


def find_judge(judge: AnyJudge, folder: Path | None = None) -> Judge:
    """The judge behind a word, a function, or a judge.

    Args:
        judge: "refusal" (the model's own `judge.json` if its folder has one, else our keywords),
            "keywords", a published list ("arditi", "qi"), "coherence", "refusal_odds",
            "llama_guard:MODEL", "strongreject:MODEL", "strongreject:URL#MODEL", a function of request and
            response, or anything with a name and a method `judge`.
        folder: of the judged model.

    Raises:
        MechguardError: an unknown word.
    """
    if not isinstance(judge, str):
        if isinstance(judge, Judge):
            return judge
        if callable(judge):
            return CallableJudge(judge, getattr(judge, "__name__", "callable"))
        raise MechguardError(f"{judge!r} is not a judge; use one of {HELP}, or a function")
    word, _, where = judge.partition(":")
    if where:
        return _with_model(judge, word, where)
    if word == "refusal" and folder is not None and (folder / OWN).is_file():
        return RefusalJudge.load(folder / OWN)
    if word in PUBLISHED_LISTS:
        return PublishedKeywords(word)
    simple: dict[str, Callable[[], Any]] = {
        "refusal": RefusalJudge,
        "keywords": RefusalJudge,
        "coherence": CoherenceJudge,
        "refusal_odds": RefusalOdds,
    }
    if word not in simple:
        raise MechguardError(f"judge {judge!r} is not known; use one of {HELP}, or a function")
    return simple[word]()


def _with_model(judge: str, word: str, where: str) -> Judge:
    if word == "llama_guard":
        return LlamaGuard(where)
    if word == "strongreject" and where.startswith(("http://", "https://")):
        url, _, model = where.partition("#")
        if not model:
            raise MechguardError(f"judge {judge!r} names no model; write strongreject:{url}#MODEL")
        return RubricJudge(Endpoint(url, model))
    if word == "strongreject":
        return RubricJudge(ChatModel(where))
    raise MechguardError(f"judge {judge!r} is not known; use one of {HELP}, or a function")
