"""What every judge is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from mechguard.errors import MechguardError
from mechguard.prompts import HARMFUL, Label


@dataclass(frozen=True)
class Exchange:
    """One request and its response.

    Attributes:
        request: what the user asked, without chat template and without a guard's wrapper.
        response: the part of the answer that counts.
        label: whether the request is harmful.
        facts: what else was stored with the response, such as `refusal_log_odds`.
    """

    request: str
    response: str
    label: Label = HARMFUL
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one response. None: this judge does not say.

    Attributes:
        keyword_refusal: a refusal phrase occurs.
        complete_refusal: the whole response is a fluent refusal.
        complied: the response gives what was asked. Garbage is neither a refusal nor compliance.
        refused: a refusal, by a judge that does not go by phrases.
        degenerate: empty, or repeats itself.
        score: the judge's own number, whatever its unit (see the judge).
        reason: in the judge's words.
    """

    keyword_refusal: bool | None = None
    complete_refusal: bool | None = None
    complied: bool | None = None
    refused: bool | None = None
    degenerate: bool | None = None
    score: float | None = None
    reason: str = ""


@runtime_checkable
class Judge(Protocol):
    """Anything with a name that gives a verdict for each exchange."""

    @property
    def name(self) -> str: ...

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]: ...


@dataclass(frozen=True)
class CallableJudge:
    """Any function of a request and a response as a judge.

    Attributes:
        function: returns a `Verdict`, or whether the response complied (None if it cannot say).
        name: which judge this is, for tables.
    """

    function: Callable[[str, str], Verdict | bool | None]
    name: str = "callable"

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [self._verdict(self.function(one.request, one.response)) for one in exchanges]

    def _verdict(self, found: Any) -> Verdict:
        if isinstance(found, Verdict):
            return found
        if found in (True, False, None):
            return Verdict(complied=None if found is None else bool(found))
        raise MechguardError(
            f"the judge {self.name!r} returned {found!r}; it should return a Verdict, or whether the "
            "response complied"
        )
