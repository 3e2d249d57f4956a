"""Directions along which harmful and harmless states differ, one subspace per layer.

The safety steering direction (SSD) of VLM-Guard (arXiv 2502.10486) is `method="svd"`: A = U S V^T of the
paired differences A^l = H^l(q-) - H^l(q+), not centred; the first `rank` rows of V^T. A singular vector
has no sign of its own: each is turned so that harmful lies on its positive side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechguard.activations import Activations
from mechguard.cards import draw_card, draw_line
from mechguard.errors import MechguardError
from mechguard.moments import Layer, can_stream, fit_layer
from mechguard.overlaps import FITTED, mark_texts
from mechguard.prompts import HARMFUL
from mechguard.shards import StoredStates
from mechguard.storage import check_numbers, load_tensors, parsing, save_tensors

KIND = "directions"
Method = Literal["svd", "mean_difference", "pca", "lda", "logistic"]
Group = Float[Tensor, "prompt d_model"]
SHRINKAGE = "auto"  # Ledoit-Wolf: d_model is usually far above the number of prompts.


@dataclass(frozen=True, eq=False)
class Directions:
    """An orthonormal basis per layer, harmful positive.

    Attributes:
        data: float32 [layer, rank, d_model]; rows of a layer are orthonormal.
        layers: the decoder layer of each entry of `data`.
        method: how it was fitted.
        midpoints: [layer, d_model], halfway between the harmful and the harmless mean, where a centred
            gate has its threshold; None if unknown.
        about: what it was fitted on; `fitted_texts` are short hashes of the prompts, by which a test on
            the same prompts is noticed.
    """

    data: Float[Tensor, "layer rank d_model"]
    layers: list[int]
    method: str
    midpoints: Float[Tensor, "layer d_model"] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.data.ndim != 3 or len(self.layers) != self.data.shape[0]:
            raise MechguardError(
                f"directions of shape {tuple(self.data.shape)} do not fit {len(self.layers)} layers; "
                "wanted [layer, rank, d_model]"
            )
        if not torch.isfinite(self.data).all():
            raise MechguardError("directions contain NaN or infinity; fit them again")
        if not 1 <= self.rank <= self.d_model:
            raise MechguardError(f"rank {self.rank} is not between 1 and d_model {self.d_model}")
        centers = self.midpoints
        if centers is not None and (
            tuple(centers.shape) != (len(self.layers), self.d_model) or not torch.isfinite(centers).all()
        ):
            raise MechguardError(
                f"midpoints of shape {tuple(centers.shape)} do not fit; wanted numbers of shape "
                f"({len(self.layers)}, {self.d_model})"
            )

    @classmethod
    def from_tensor(cls, data: Any, *, layers: Sequence[int] | None = None) -> Directions:
        """Wrap directions that come from elsewhere; rows are made orthonormal, their signs kept.

        Args:
            data: [layer, rank, d_model], or [layer, d_model] for rank 1.
            layers: the layer of each entry; 0, 1, ... by default.
        """
        tensor = torch.as_tensor(data).detach().to("cpu", torch.float32)
        tensor = tensor.unsqueeze(1) if tensor.ndim == 2 else tensor
        numbers = list(range(tensor.shape[0])) if layers is None else [int(n) for n in layers]
        if tensor.ndim != 3 or not torch.isfinite(tensor).all():
            return cls(tensor, numbers, "tensor")  # refused there, with the reason
        return cls(_orthonormal(tensor), numbers, "tensor")

    @property
    def rank(self) -> int:
        return int(self.data.shape[1])

    @property
    def d_model(self) -> int:
        return int(self.data.shape[2])

    @property
    def name(self) -> str:
        """How results call it: the method and the states it was fitted on, e.g. "svd, llm text"."""
        return ", ".join(map(str, filter(None, [self.method, self.about.get("fitted_on")])))

    def at(self, layer: int) -> Float[Tensor, "rank d_model"]:
        """The basis of one layer."""
        if layer not in self.layers:
            raise MechguardError(
                f"layer {layer} has no direction; directions were fitted at layers {self.layers}"
            )
        return self.data[self.layers.index(layer)]

    def project(self, activations: Activations) -> Float[Tensor, "layer prompt"]:
        """The projection of every state on the first direction of its layer, h . v_1."""
        basis = torch.stack([self.at(layer)[0] for layer in activations.layers])
        if self.d_model != activations.d_model:
            raise MechguardError(
                f"directions of d_model {self.d_model} do not fit states of d_model {activations.d_model}"
            )
        return _along(activations.data, basis)

    def truncated(self, rank: int) -> Directions:
        """The first `rank` directions of every layer."""
        if not 1 <= rank <= self.rank:
            raise MechguardError(f"rank {rank} was asked for; these directions have rank {self.rank}")
        return Directions(self.data[:, :rank], self.layers, self.method, self.midpoints, self.about)

    def __or__(self, other: Directions) -> Directions:
        """The span of both, layer by layer: the own directions first, then what the other adds."""
        both = torch.cat([self.data, self._aligned(other)], dim=1)
        return self._derived(_orthonormal(both), f"{self.name} | {other.name}")

    def __sub__(self, other: Directions) -> Directions:
        """The own directions without what lies in the span of the other.

        Raises:
            MechguardError: nothing is left.
        """
        basis = self._aligned(other)
        inside = torch.einsum("lrd,lkd,lke->lre", self.data, basis, basis)
        rest = self.data - inside
        if (rest.norm(dim=-1) < 1e-4).any():
            raise MechguardError(f"{self.name} lies in the span of {other.name}; nothing is left")
        return self._derived(_orthonormal(rest), f"{self.name} - {other.name}")

    def __neg__(self) -> Directions:
        """The same subspaces, harmful negative."""
        return self._derived(-self.data, f"-{self.name}")

    def _aligned(self, other: Directions) -> Float[Tensor, "layer rank d_model"]:
        if other.d_model != self.d_model:
            raise MechguardError(f"directions of d_model {self.d_model} and {other.d_model} do not combine")
        return torch.stack([other.at(layer) for layer in self.layers])

    def _derived(self, data: Float[Tensor, "layer rank d_model"], method: str) -> Directions:
        about = {key: value for key, value in self.about.items() if key != "fitted_on"}
        return Directions(data, self.layers, method, self.midpoints, about)

    def randomised(self, seed: int = 0) -> Directions:
        """Random orthonormal subspaces of the same rank at the same layers: the control."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.data.shape, generator=generator)
        about = {**self.about, "fitted_on": f"random, seed {seed}"}
        about.pop(FITTED, None)
        return Directions(_orthonormal(drawn), self.layers, "random", self.midpoints, about)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `path.safetensors` and `path.json`."""
        tensors = {"data": self.data}
        if self.midpoints is not None:
            tensors["midpoints"] = self.midpoints
        facts = {"layers": self.layers, "method": self.method, "about": self.about}
        return save_tensors(path, KIND, tensors, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Directions:
        """Read saved directions."""
        tensors, facts = load_tensors(path, KIND)
        with parsing(path, KIND):
            midpoints = tensors.get("midpoints")
            return cls(
                check_numbers(tensors["data"]),
                [int(layer) for layer in facts["layers"]],
                str(facts["method"]),
                None if midpoints is None else check_numbers(midpoints),
                dict(facts["about"]),
            )

    def __repr__(self) -> str:
        layers, rank, width = self.data.shape
        return f"Directions({self.name!r}, layer={layers}, rank={rank}, d_model={width})"

    def _repr_html_(self) -> str:
        first = self.data[:, 0]
        near = (first @ first.T).diagonal(1).tolist()
        facts = {
            "shape": "layer {} x rank {} x d_model {}, orthonormal rows, harmful positive".format(
                *self.data.shape
            ),
            "method": self.method,
            "fitted on": self.about.get("fitted_on"),
            "pairs or prompts": self.about.get("n"),
            "model": self.about.get("model"),
            "midpoints": "yes: a gate can be centred" if self.midpoints is not None else "none",
        }
        preview = (
            f"<div>cosine of each layer's first direction with the next layer's {draw_line(near)} "
            f"{near[0]:.2f} to {near[-1]:.2f}</div>"
            if near
            else ""
        )
        following = ("mg.vlm_guard(ssd, layers=...)", "mg.measure_separability(states, ssd)")
        return draw_card(f"Directions: {self.name}", facts, preview=preview, following=following)


def fit_directions(activations: Activations, *, method: Method = "svd", rank: int = 1) -> Directions:
    """Fit the directions that separate harmful from harmless, layer by layer.

    Args:
        activations: states of harmful and harmless prompts; `svd` and `pca` need pairs.
        method: "svd" (VLM-Guard's SSD), "mean_difference", "pca" (of the centred differences), "lda"
            (shrunk covariance) or "logistic" (L2-regularised).
        rank: how many directions; more than one only for "svd" and "pca".

    Raises:
        MechguardError: an unknown method, a rank that does not exist, or missing pairs.
    """
    if method not in METHODS:
        raise MechguardError(f"method {method!r} is not known; use one of {', '.join(METHODS)}")
    harmful, harmless, paired = activations.groups()
    if method in PAIRED and not paired:
        activations.prompts.pair_indices()  # refuses what has no pair
    limit = 1
    if method in PAIRED:
        limit = min(harmful.shape[1] - (method == "pca"), activations.d_model)
    if not 1 <= rank <= limit:
        raise MechguardError(
            f"rank {rank} does not exist for method {method!r} on these states; use 1 to {limit}"
        )
    bases, means = _fit_layers(harmful, harmless, method, rank)
    midpoints = (means[0] + means[1]) / 2
    gap = means[0] - means[1]
    about = {**activations.about, "fitted_on": activations.name, "n": harmful.shape[1]}
    if marks := mark_texts(activations.prompts):  # states from elsewhere have no texts
        about[FITTED] = marks
    return Directions(_face(bases, gap), activations.layers, method, midpoints, about)


def _fit_layers(
    harmful: Float[Tensor, "layer a d_model"],
    harmless: Float[Tensor, "layer b d_model"],
    method: Method,
    rank: int,
) -> tuple[Float[Tensor, "layer rank d_model"], Float[Tensor, "two layer d_model"]]:
    """Bases and the means of both labels. States on disk of more prompts than d_model are added up piece by
    piece, except for "logistic", which needs a whole layer at once."""
    many = min(harmful.shape[1], harmless.shape[1]) > harmful.shape[2]
    if many and can_stream(method) and isinstance(harmful, StoredStates):
        assert isinstance(harmless, StoredStates)
        layers = [Layer(harmful, harmless, index) for index in range(harmful.shape[0])]
        bases, means = zip(*(fit_layer(layer, method, rank) for layer in layers), strict=True)
        return torch.stack(bases), torch.stack([torch.stack(both) for both in means], dim=1).float()
    fit = METHODS[method]
    found = torch.stack([fit(bad, good, rank) for bad, good in zip(harmful, harmless, strict=True)])
    return found, torch.stack([harmful.mean(1), harmless.mean(1)])


def cross_project(
    fitted: Activations, tested: Activations | None = None, *, seed: int = 0
) -> list[tuple[Int[Tensor, " half"], Float[Tensor, "layer half"]]]:
    """Projections of each half of the prompts on the mean difference of the *other* half.

    Args:
        fitted: states that the two directions are fitted on, a half of the pairs each.
        tested: states of the same prompts that are projected; the same states by default.

    Returns:
        For either half, its prompts' indices and their projections, centred on the other half's midpoint: no
        prompt is scored by a direction it took part in, be it under another condition.

    Raises:
        MechguardError: the two hold different prompts or layers.
    """
    tested = fitted if tested is None else tested
    if [p.id for p in fitted.prompts] != [p.id for p in tested.prompts] or fitted.layers != tested.layers:
        raise MechguardError(
            f"{fitted!r} and {tested!r} hold different prompts or layers; collect the same prompts twice"
        )
    first, _ = fitted.prompts.split(test=0.5, seed=seed)
    members = {prompt.id for prompt in first}
    in_first = torch.tensor([prompt.id in members for prompt in fitted.prompts])
    is_harmful = torch.as_tensor(fitted.labels == HARMFUL)
    halves = []
    for half in (~in_first, in_first):
        bad = fitted.data[:, ~half & is_harmful].mean(1)
        good = fitted.data[:, ~half & ~is_harmful].mean(1)
        unit = torch.nn.functional.normalize(bad - good, dim=-1)
        midpoint = torch.einsum("ld,ld->l", (bad + good) / 2, unit)
        scores = _along(tested.data[:, half], unit) - midpoint.unsqueeze(1)
        halves.append((half.nonzero().squeeze(1), scores))
    return halves


def held_out_projections(activations: Activations, *, seed: int = 0) -> Float[Tensor, "layer prompt"]:
    """Projections on the states' own mean difference, fitted on the other half of the pairs."""
    scores = torch.empty(activations.data.shape[:2])
    for rows, projections in cross_project(activations, seed=seed):
        scores[:, rows] = projections
    return scores


def _along(
    states: Float[Tensor, "layer prompt d_model"], vectors: Float[Tensor, "layer d_model"]
) -> Float[Tensor, "layer prompt"]:
    """The projection of every state on its layer's vector; of states on disk one layer is held at a time."""
    if isinstance(states, StoredStates):
        pairs = zip(states, vectors.unsqueeze(1), strict=True)
        return torch.cat([torch.einsum("lpd,ld->lp", layer[None], vector) for layer, vector in pairs])
    return torch.einsum("lpd,ld->lp", states, vectors)


def _svd(harmful: Group, harmless: Group, rank: int) -> Float[Tensor, "rank d_model"]:
    return torch.linalg.svd(harmful - harmless, full_matrices=False).Vh[:rank]


def _pca(harmful: Group, harmless: Group, rank: int) -> Float[Tensor, "rank d_model"]:
    differences = harmful - harmless
    return torch.linalg.svd(differences - differences.mean(0), full_matrices=False).Vh[:rank]


def _mean_difference(harmful: Group, harmless: Group, rank: int) -> Float[Tensor, "rank d_model"]:
    return _unit(harmful.mean(0) - harmless.mean(0))


def _lda(harmful: Group, harmless: Group, rank: int) -> Float[Tensor, "rank d_model"]:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE)
    return _weights(model, harmful, harmless)


def _logistic(harmful: Group, harmless: Group, rank: int) -> Float[Tensor, "rank d_model"]:
    from sklearn.linear_model import LogisticRegression

    return _weights(LogisticRegression(max_iter=2000), harmful, harmless)


def _weights(model: Any, harmful: Group, harmless: Group) -> Float[Tensor, "one d_model"]:
    states = torch.cat([harmful, harmless]).numpy()
    labels = [1] * len(harmful) + [0] * len(harmless)
    model.fit(states, labels)
    return _unit(torch.as_tensor(model.coef_[0], dtype=torch.float32))


def _unit(vector: Float[Tensor, " d_model"]) -> Float[Tensor, "one d_model"]:
    return torch.nn.functional.normalize(vector, dim=0).unsqueeze(0)


def _face(
    bases: Float[Tensor, "layer rank d_model"], gap: Float[Tensor, "layer d_model"]
) -> Float[Tensor, "layer rank d_model"]:
    """Turn every direction so that the mean difference harmful - harmless projects positively on it."""
    projections = torch.einsum("lrd,ld->lr", bases, gap)
    return bases * torch.where(projections < 0, -1.0, 1.0).unsqueeze(-1)


def _orthonormal(
    rows: Float[Tensor, "layer rank d_model"],
) -> Float[Tensor, "layer rank d_model"]:
    if rows.shape[1] > rows.shape[2]:
        raise MechguardError(f"rank {rows.shape[1]} is above d_model {rows.shape[2]}")
    q, r = torch.linalg.qr(rows.transpose(1, 2))
    diagonal = torch.diagonal(r, dim1=-2, dim2=-1)
    if (diagonal.abs() < 1e-6 * rows.norm(dim=-1).clamp_min(1e-30)).any():
        raise MechguardError("directions are zero or linearly dependent; no basis can be made of them")
    return (q * diagonal.sign().unsqueeze(1)).transpose(1, 2).contiguous()


METHODS: dict[str, Callable[[Group, Group, int], Float[Tensor, "rank d_model"]]] = {
    "svd": _svd,
    "mean_difference": _mean_difference,
    "pca": _pca,
    "lda": _lda,
    "logistic": _logistic,
}
PAIRED = ("svd", "pca")
