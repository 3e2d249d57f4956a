"""Gates: for which rows a guard is open, decided from one state per row at the end of the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechguard.directions import Directions
from mechguard.errors import MechguardError
from mechguard.interventions import gate_score

Word = Literal["always", "sign", "midpoint", "cosine", "probe"]


@dataclass(frozen=True, eq=False)
class Gate:
    """Open where a state lies far enough along a direction.

    Attributes:
        word: "always"; "sign" (h . v > 0, the paper's); "midpoint" (centred on the anchors' midpoint);
            "cosine" (cos(h, v) > threshold, as CAST's); "probe" (a linear classifier says harmful).
        directions: v, [layer, d_model], one per layer of the guard.
        thresholds: [layer], in units of h . v (of the cosine for "cosine").
    """

    word: Word
    directions: Float[Tensor, "layer d_model"]
    thresholds: Float[Tensor, " layer"]

    def __post_init__(self) -> None:
        if self.word not in get_args(Word):
            raise MechguardError(f"gate={self.word!r} is not known; use one of {', '.join(get_args(Word))}")

    def opens(self, row: int, states: Float[Tensor, "batch d_model"]) -> Bool[Tensor, " batch"]:
        """Which rows are open at the guard's layer number `row`."""
        if self.word == "always":
            return torch.ones(len(states), dtype=torch.bool, device=states.device)
        wide = states.to(torch.float32)
        if self.word == "cosine":
            wide = torch.nn.functional.normalize(wide, dim=-1)
        threshold = self.thresholds[row].to(states.device)
        return gate_score(wide, self.directions[row]) > threshold

    def tensors(self) -> dict[str, Tensor]:
        return {"gate.directions": self.directions, "gate.thresholds": self.thresholds}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Gate:
        """The gate that `tensors` and `word` describe."""
        return cls(options["word"], tensors["gate.directions"], tensors["gate.thresholds"])


def make_gate(word: Word, directions: Directions, rows: list[int], *, threshold: float | None = None) -> Gate:
    """The gate of the first direction at some rows of fitted directions.

    Args:
        threshold: for "sign", "midpoint" and "probe" it is added to the gate's own threshold; for
            "cosine" it is the threshold.

    Raises:
        MechguardError: an unknown word, or a midpoint that the directions do not know.
    """
    basis = directions.data[rows, 0]
    own = torch.zeros(len(rows))
    if word in ("midpoint", "probe"):
        if directions.midpoints is None:
            raise MechguardError(
                f'gate="{word}" needs directions that know their midpoint (fit_directions gives them); '
                'use gate="sign"'
            )
        own = (directions.midpoints[rows] * basis).sum(-1)
    return Gate(word, basis, own + (threshold or 0.0))
