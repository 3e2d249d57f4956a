"""Guards at work on one batch: the gates that were decided, and who supervises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

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
        self.reading_passes = [0] * len(self.where[0])  # forward passes of each row that read its picture
        self.held: States = {}
        self.decided: dict[tuple[int, int], Bool[Tensor, " batch"]] = {}

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
        own, text = (hidden[:count], hidden[count:]) if self.shared_pass else (hidden, hidden[:0])
        for number, guard in enumerate(self.guards):
            if layer in guard.layers:
                own = self._steered(number, guard, layer, own, text)
        return torch.cat([own, text])

    def _steered(self, number: int, guard: Guard, layer: int, own: Tensor, text: Tensor) -> Tensor:
        query = self._query(guard, layer, own, text)
        phase: Literal["prompt", "generated"] = "generated"
        where = torch.ones_like(own[..., 0], dtype=torch.bool)
        if (number, layer) not in self.decided:
            self.decided[number, layer] = guard.opens(layer, query[:, -1])
            phase, where = "prompt", self.where[number].to(own.device)
        if not guard.acts(phase):
            return own
        return guard.steer(layer, own, query, where & self.decided[number, layer].unsqueeze(1))

    def _query(self, guard: Guard, layer: int, own: Tensor, text: Tensor) -> Float[Tensor, "batch _ d_model"]:
        if guard.supervised:
            spoken = text[:, -1:]
            if self.teacher_states is not None:
                spoken = self.teacher_states[layer].to(own.device).unsqueeze(1)
            # "llm" is the state at the end of the text, held for every token.
            return spoken if guard.source == "llm-stream" else self.held.setdefault(layer, spoken)
        return own[:, -1:] if guard.source == "last" else own
