"""Moves: what a guard does to a hidden state, as pure functions of tensors.

Each move is fitted tensors and a few numbers. Called with the states h of one layer, in float32, it returns
what becomes of them. q is what supervises: the state itself, the last prompt token's, or the language model's
(see `Guard.source`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mechguard.directions import Directions
from mechguard.errors import MechguardError
from mechguard.interventions import component

States = Float[Tensor, "batch pos d_model"]
Query = Float[Tensor, "batch one_or_pos d_model"]
Coefficient = Literal["fixed", "cosine", "linear", "trust"]


class Move(Protocol):
    """What every move can do; `kind` names it in files."""

    kind: ClassVar[str]

    def __call__(self, row: int, hidden: States, query: Query) -> States: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def options(self) -> dict[str, Any]: ...
    def randomised(self, seed: int) -> Move: ...


@dataclass(frozen=True, eq=False)
class Realign:
    """h' = h + alpha (q - center) V^T V - project (h - center) V^T V: VLM-Guard's, and its kin.

    Attributes:
        basis: V, [layer, rank, d_model], orthonormal rows.
        alpha: 0 adds nothing, 1 restores q's own component.
        project: how much of h's own component is taken out first, 1 (or True) for all of it.
        centers: [layer, d_model], about which components are taken; None for the origin.
    """

    kind: ClassVar[str] = "realign"
    basis: Float[Tensor, "layer rank d_model"]
    alpha: float = 1.0
    project: float = 1.0
    centers: Float[Tensor, "layer d_model"] | None = None

    def __call__(self, row: int, hidden: States, query: Query) -> States:
        # It runs at every token, and what it costs there is the number of operations.
        moved, project = hidden, float(self.project)
        if query is hidden:
            project -= self.alpha
        elif self.alpha:
            moved = torch.add(moved, self._along(query, row), alpha=self.alpha)
        return torch.add(moved, self._along(hidden, row), alpha=-project) if project else moved

    def _along(self, states: Tensor, row: int) -> Tensor:
        return component(self._centred(states, row), self.basis[row])

    def _centred(self, states: Tensor, row: int) -> Tensor:
        return states if self.centers is None else states - self.centers[row]

    def tensors(self) -> dict[str, Tensor]:
        centers = {} if self.centers is None else {"move.centers": self.centers}
        return {"move.basis": self.basis, **centers}

    def options(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "project": self.project}

    def randomised(self, seed: int) -> Realign:
        """The same with a random subspace of equal rank."""
        layers = list(range(len(self.basis)))
        return replace(self, basis=Directions(self.basis, layers, "guard").randomised(seed).data)


@dataclass(frozen=True, eq=False)
class Add:
    """h' = h + a sum of vectors, each with a coefficient that may depend on the state.

    Attributes:
        vectors: [layer, count, d_model], with their lengths.
        alpha: strength; its sign says whether along or against.
        coefficient: "fixed": alpha. "cosine": alpha clip(cos(h - c, v), 0, 1) ||h|| / ||v|| (ASTRA).
            "linear": alpha clip(slope (q . u - c . u) + offset, low, high) with u = v / ||v|| (AdaSteer).
            "trust": alpha relu((c - q) . u) / ||v||, no longer than radius ||h|| (MARS).
        centers: [layer, d_model], the reference c; None for the origin.
        slopes, offsets: [layer, count], for "linear".
        bounds: low and high, for "linear".
        radius: for "trust".
    """

    kind: ClassVar[str] = "add"
    vectors: Float[Tensor, "layer count d_model"]
    alpha: float = 1.0
    coefficient: Coefficient = "fixed"
    centers: Float[Tensor, "layer d_model"] | None = None
    slopes: Float[Tensor, "layer count"] | None = None
    offsets: Float[Tensor, "layer count"] | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    radius: float = 1.0

    def __post_init__(self) -> None:
        if self.coefficient not in get_args(Coefficient):
            words = ", ".join(get_args(Coefficient))
            raise MechguardError(f"coefficient={self.coefficient!r} is not known; use one of {words}")

    def __call__(self, row: int, hidden: States, query: Query) -> States:
        shift = torch.zeros_like(hidden)
        for number, vector in enumerate(self.vectors[row]):
            shift = shift + self._weight(row, number, hidden, query) * vector
        if self.coefficient != "trust":
            return hidden + shift
        limit = self.radius * hidden.norm(dim=-1, keepdim=True)
        length = shift.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return hidden + shift * torch.minimum(torch.ones_like(length), limit / length)

    def _weight(self, row: int, number: int, hidden: States, query: Query) -> Tensor:
        """[batch, pos or 1, 1]"""
        vector, center = self.vectors[row, number], _at(self.centers, row)
        length = vector.norm().clamp_min(1e-12)
        unit = vector / length
        if self.coefficient == "fixed":
            return torch.full_like(hidden[..., :1], self.alpha)
        if self.coefficient == "cosine":
            cosine = torch.nn.functional.cosine_similarity(hidden - center, unit, dim=-1).clamp(0, 1)
            return self.alpha * (cosine * hidden.norm(dim=-1) / length).unsqueeze(-1)
        along = ((query - center) @ unit).unsqueeze(-1)
        if self.coefficient == "trust":
            return self.alpha * (-along).clamp_min(0) / length
        assert self.slopes is not None
        assert self.offsets is not None
        weight = self.slopes[row, number] * along + self.offsets[row, number]
        return self.alpha * weight.clamp(*self.bounds)

    def tensors(self) -> dict[str, Tensor]:
        found = {
            "vectors": self.vectors,
            "centers": self.centers,
            "slopes": self.slopes,
            "offsets": self.offsets,
        }
        return {f"move.{name}": tensor for name, tensor in found.items() if tensor is not None}

    def options(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "coefficient": self.coefficient,
            "bounds": list(self.bounds),
            "radius": self.radius,
        }

    def randomised(self, seed: int) -> Add:
        """The same with random vectors of equal lengths."""
        draw = torch.randn(self.vectors.shape, generator=torch.Generator().manual_seed(seed))
        lengths = self.vectors.norm(dim=-1, keepdim=True)
        return replace(self, vectors=torch.nn.functional.normalize(draw, dim=-1) * lengths)


@dataclass(frozen=True, eq=False)
class Restore:
    """h' = h + alpha (q - h_last): a part of the way from its row's last state to q, alike at all positions.

    With the language model's state as q this takes out the shift that the picture of this very sample makes
    (CMRM, sample level).
    """

    kind: ClassVar[str] = "restore"
    alpha: float = 1.0

    def __call__(self, row: int, hidden: States, query: Query) -> States:
        return hidden + self.alpha * (query - hidden[:, -1:])

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def options(self) -> dict[str, Any]:
        return {"alpha": self.alpha}

    def randomised(self, seed: int) -> Restore:
        """There is nothing to draw: it has no subspace."""
        raise MechguardError("this guard has no subspace or vector, so there is no random one of its kind")


@dataclass(frozen=True, eq=False)
class Multiply:
    """h' = h + alpha h M: a fitted matrix (AlphaSteer, NullSteer).

    Attributes:
        matrices: M, [layer, d_model, d_model], applied to row vectors.
    """

    kind: ClassVar[str] = "multiply"
    matrices: Float[Tensor, "layer d_model d_model"]
    alpha: float = 1.0

    def __call__(self, row: int, hidden: States, query: Query) -> States:
        return hidden + self.alpha * hidden @ self.matrices[row]

    def tensors(self) -> dict[str, Tensor]:
        return {"move.matrices": self.matrices}

    def options(self) -> dict[str, Any]:
        return {"alpha": self.alpha}

    def randomised(self, seed: int) -> Multiply:
        """The same map into random directions: its outputs are turned by a random rotation."""
        size = self.matrices.shape[-1]
        draw = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
        return replace(self, matrices=self.matrices @ torch.linalg.qr(draw).Q)


MOVES: dict[str, Any] = {move.kind: move for move in (Realign, Add, Restore, Multiply)}


def read_move(kind: str, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Move:
    """The move that a file describes."""
    if kind not in MOVES:
        raise MechguardError(f"the move {kind!r} is not known; this file was made by another version")
    own = {name.removeprefix("move."): value for name, value in tensors.items() if name.startswith("move.")}
    numbers = dict(options)
    if "bounds" in numbers:
        numbers["bounds"] = tuple(numbers["bounds"])
    return MOVES[kind](**own, **numbers)


def _at(centers: Tensor | None, row: int) -> Tensor | float:
    return 0.0 if centers is None else centers[row]
