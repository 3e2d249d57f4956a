"""Guards at work on one batch: the gates that were decided, and who supervises."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechguard.guards.guard import Chain, Guard

States = dict[int, Float[Tensor, "batch d_model"]]
AnyGuard = Guard | Chain


class Steering:
    """Some guards over one batch; remembers the gates that were decided at the end of the prompt.

    Where the supervising language model shares the pass, the batch holds 2B rows: B of the VLM, then the
    same B as text only. Otherwise its states come from outside, for each step.
    """

    def __init__(
        self,
        guards: Sequence[Guard],
        where: Sequence[Bool[Tensor, "batch pos"]],
        *,
        teacher_states: States | None = None,
        shared_pass: bool = False,
    ) -> None:
        self.guards = [guard.on(mask.device) for guard, mask in zip(guards, where, strict=True)]
        self.where = list(where)
        self.teacher_states = teacher_states
        self.shared_pass = shared_pass
        self.extra_passes = [0] * len(self.where[0])  # of each row, before its own
        self.held: States = {}
        self.decided: dict[tuple[int, int], Bool[Tensor, " batch"]] = {}
        self.alike: dict[tuple[int, int], bool | None] = {}  # all rows open, all closed, or None

    @property
    def layers(self) -> set[int]:
        """The layers at which there is something to do."""
        return {layer for guard in self.guards for layer in guard.layers}

    @property
    def gates(self) -> dict[int, Bool[Tensor, " batch"]]:
        """For each layer, the rows for which some guard was open."""
        found: dict[int, Bool[Tensor, " batch"]] = {}
        for (_, layer), opened in sorted(self.decided.items()):
            found[layer] = found[layer] | opened if layer in found else opened
        return found

    def __call__(
        self, layer: int, hidden: Float[Tensor, "rows pos d_model"]
    ) -> Float[Tensor, "rows pos d_model"]:
        """The states after the guards; the first call of a layer is the prompt."""
        count = len(self.where[0])
        own, text = (hidden[:count], hidden[count:]) if self.shared_pass else (hidden, None)
        for number, guard in enumerate(self.guards):
            if layer in guard.layers:
                own = self._steered(number, guard, layer, own, text)
        return own if text is None else torch.cat([own, text])

    def _steered(self, number: int, guard: Guard, layer: int, own: Tensor, text: Tensor | None) -> Tensor:
        if (number, layer) in self.decided:
            return self._next_token(number, guard, layer, own, text)
        query = self._query(guard, layer, own, text)
        opened = self.decided[number, layer] = guard.opens(layer, query[:, -1])
        if not guard.acts("prompt"):
            return own
        # The prompt's last positions, where the others are known already.
        where = self.where[number][:, -own.shape[1] :].to(own.device)
        return guard.steer(layer, own, query, where & opened.unsqueeze(1))

    def _next_token(self, number: int, guard: Guard, layer: int, own: Tensor, text: Tensor | None) -> Tensor:
        if not guard.acts("generated"):
            return own
        opened = self.decided[number, layer]
        if (number, layer) not in self.alike:  # asked once: on a GPU the answer has to be waited for
            some, every = bool(opened.any()), bool(opened.all())
            self.alike[number, layer] = some if some == every else None
        if self.alike[number, layer] is False:
            return own
        query = self._query(guard, layer, own, text)
        if self.alike[number, layer]:
            return guard.steer(layer, own, query)
        return guard.steer(layer, own, query, opened.unsqueeze(1).expand(own.shape[:2]))

    def _query(
        self, guard: Guard, layer: int, own: Tensor, text: Tensor | None
    ) -> Float[Tensor, "batch _ d_model"]:
        if not guard.supervised:
            return own[:, -1:] if guard.source == "last" else own
        if guard.source == "llm" and layer in self.held:
            return self.held[layer]  # the state at the end of the text, held for every token
        if self.teacher_states is not None:
            spoken = self.teacher_states[layer].to(own.device).unsqueeze(1)
        else:
            assert text is not None
            spoken = text[:, -1:]
        return self.held.setdefault(layer, spoken) if guard.source == "llm" else spoken
