"""Guards: an intervention, where it applies and when, as an object that can be saved.

A guard is a pure function of tensors. Whoever runs the model (a trace here, a hook elsewhere) asks it two
things at each of its layers: which rows are open (`gate`), and what their states become (`steer`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechguard.activations import Activations
from mechguard.directions import Directions
from mechguard.errors import MechguardError
from mechguard.interventions import apply_where, gate_score, realign
from mechguard.models import VLM
from mechguard.result import Result
from mechguard.statistics import wilson_interval
from mechguard.storage import load_tensors, save_tensors

KIND = "guard"
Gate = Literal["always", "sign", "midpoint"]
Source = Literal["own", "last", "llm", "llm-stream"]
Positions = Literal["last", "last_text", "all", "image", "text"]
Phase = Literal["prompt", "generated", "both"]


@dataclass(frozen=True)
class Scope:
    """Where and when a guard acts.

    Attributes:
        positions: which positions of the prompt: the last, the last of the prompt's own text, all, those of
            the image, those of the text.
        phase: at the prompt, at every generated token, or both.
    """

    positions: Positions = "last"
    phase: Phase = "both"

    def __post_init__(self) -> None:
        _one_of("positions", self.positions, Positions)
        _one_of("phase", self.phase, Phase)


@dataclass(frozen=True, eq=False)
class Guard:
    """h*(Q) = h(Q) + g (alpha h(q) V^T V - [project] h(Q) V^T V) at some layers (arXiv 2502.10486).

    Attributes:
        name: how tables call it.
        layers: the decoder layers it acts on.
        basis: V, float32 [layer, rank, d_model], orthonormal rows.
        gate_directions: v_1 of the gate, [layer, d_model].
        gate_centers: [layer, d_model], the gate's threshold point; None for the uncentred gate.
        alpha: strength of the realignment; 0 adds nothing, 1 restores h(q)'s own component.
        project: whether the component of h(Q) along V is removed first.
        gate: "always", "sign" (h(q) . v_1 > 0), or "midpoint" (centred on the anchors' midpoint).
        source: what h(q) is: "own" (each position itself), "last" (the last prompt token of the same
            pass, broadcast: reading A), "llm" (the LLM component's last token of the same text query:
            reading B), or "llm-stream" (the same, but the LLM reads the generated tokens along).
        scope: positions and phase.
        about: what the directions were fitted on.
    """

    name: str
    layers: tuple[int, ...]
    basis: Float[Tensor, "layer rank d_model"]
    gate_directions: Float[Tensor, "layer d_model"]
    gate_centers: Float[Tensor, "layer d_model"] | None = None
    alpha: float = 1.0
    project: bool = True
    gate: Gate = "midpoint"
    source: Source = "llm-stream"
    scope: Scope = field(default_factory=Scope)
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("gate", self.gate, Gate)
        _one_of("source", self.source, Source)
        if not self.layers:
            raise MechguardError(f"guard {self.name!r} has no layers; give at least one")
        if self.gate == "midpoint" and self.gate_centers is None:
            raise MechguardError(
                'gate="midpoint" needs directions that know their midpoint (fit_directions gives them); '
                'use gate="sign"'
            )

    @property
    def rank(self) -> int:
        return int(self.basis.shape[1])

    @property
    def needs_teacher(self) -> bool:
        """Whether h(q) comes from the LLM."""
        return self.source in ("llm", "llm-stream")

    def opens(self, layer: int, query: Float[Tensor, "batch d_model"]) -> Bool[Tensor, " batch"]:
        """The gate, row by row, from the state that supervises at the end of the prompt."""
        if self.gate == "always":
            return torch.ones(len(query), dtype=torch.bool, device=query.device)
        index = self.layers.index(layer)
        center = self.gate_centers[index] if self.gate == "midpoint" else None  # type: ignore[index]
        return gate_score(query, self.gate_directions[index], center) > 0

    def steer(
        self,
        layer: int,
        hidden: Float[Tensor, "batch pos d_model"],
        query: Float[
            Tensor,
            (
                batch  # pos d_model
            ),
        ],
        mask: Bool[Tensor, "batch pos"],
    ) -> Float[Tensor, "batch pos d_model"]:
        """The states after the intervention; positions outside the mask stay bit for bit."""
        basis = self.basis[self.layers.index(layer)]
        changed = realign(hidden, query, basis, alpha=self.alpha, project=self.project)
        return apply_where(mask, changed, hidden)

    def acts(self, phase: Literal["prompt", "generated"]) -> bool:
        """Whether the guard acts in this phase."""
        return self.scope.phase in (phase, "both")

    def renamed(self, name: str) -> Guard:
        """The same guard under another name."""
        return replace(self, name=name)

    def on(self, device: torch.device) -> Guard:
        """The same guard with its tensors on a device."""
        centers = self.gate_centers
        return replace(
            self,
            basis=self.basis.to(device),
            gate_directions=self.gate_directions.to(device),
            gate_centers=None if centers is None else centers.to(device),
        )

    def randomised(self, seed: int = 0, *, name: str = "random") -> Guard:
        """The control: the same gate, strength, layers and rank, but a random subspace."""
        drawn = Directions(self.basis, list(self.layers), "guard").randomised(seed)
        about = {**self.about, "control": f"random subspace, seed {seed}"}
        return replace(self, name=name, basis=drawn.data, about=about)

    def check(self, model: VLM) -> None:
        """Refuse a model this guard was not made for.

        Raises:
            MechguardError: other width, missing layers, other weights, or no LLM to supervise.
        """
        if self.basis.shape[2] != model.d_model or max(self.layers) >= model.n_layers:
            raise MechguardError(
                f"guard {self.name!r} acts on layers {list(self.layers)} of d_model {self.basis.shape[2]}, "
                f"but {model.name} has layers 0-{model.n_layers - 1} of d_model {model.d_model}; fit a "
                "guard on this model"
            )
        fitted_on = self.about.get("fingerprint")
        if fitted_on is not None and not model.recognises(fitted_on):
            raise MechguardError(
                f"guard {self.name!r} was made for {self.about.get('model', 'another model')}, whose "
                f"weights are not those of {model.name}; fit it on this model, or use "
                "guard.rebound(model) if both are meant"
            )

    def rebound(self, model: VLM) -> Guard:
        """The same guard, declared to fit another model of the same shape."""
        return replace(self, about={**self.about, "model": model.name, "fingerprint": model.fingerprint})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `path.safetensors` and `path.json`, with the model it was made for."""
        tensors = {"basis": self.basis, "gate_directions": self.gate_directions}
        if self.gate_centers is not None:
            tensors["gate_centers"] = self.gate_centers
        return save_tensors(path, KIND, tensors, self._facts())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Guard:
        """Read a saved guard.

        Raises:
            MechguardError: it is not a guard, or was altered.
        """
        tensors, facts = load_tensors(path, KIND)
        return cls(
            name=facts["name"],
            layers=tuple(facts["layers"]),
            basis=tensors["basis"],
            gate_directions=tensors["gate_directions"],
            gate_centers=tensors.get("gate_centers"),
            alpha=facts["alpha"],
            project=facts["project"],
            gate=facts["gate"],
            source=facts["source"],
            scope=Scope(**facts["scope"]),
            about=facts["about"],
        )

    def _facts(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "layers": list(self.layers),
            "alpha": self.alpha,
            "project": self.project,
            "gate": self.gate,
            "source": self.source,
            "scope": {"positions": self.scope.positions, "phase": self.scope.phase},
            "about": self.about,
        }

    def __repr__(self) -> str:
        return (
            f"Guard({self.name!r}, layers={list(self.layers)}, rank={self.rank}, alpha={self.alpha}, "
            f"project={self.project}, gate={self.gate!r}, source={self.source!r}, "
            f"positions={self.scope.positions!r}, phase={self.scope.phase!r})"
        )

    def _repr_html_(self) -> str:
        return f"<p><code>{escape(repr(self))}</code>: mg.generate(vlm, prompts, guard=guard)</p>"


def vlm_guard(
    directions: Directions,
    *,
    layers: Sequence[int],
    alpha: float = 1.0,
    project: bool = True,
    gate: Gate = "midpoint",
    source: Source = "llm-stream",
    scope: Scope | None = None,
    name: str = "vlm_guard",
) -> Guard:
    """VLM-Guard (arXiv 2502.10486, equations 3-5): projection, gate and realignment.

    Args:
        directions: the SSD, fitted on the LLM's text states.
        layers: L_G; negative numbers count from the last fitted layer.
        alpha: strength of the realignment.
        project: remove the VLM's own component along the SSD first (equation 3).
        gate: see `Guard`; rows whose gate is closed are left alone.
        source: see `Guard`; "last" is reading A, "llm" and "llm-stream" are reading B. In the
            organism's validation sweep the stream gave the most complete refusals.
        scope: the last position at the prompt and every generated token, by default.

    Raises:
        MechguardError: a layer without a direction, or a gate without its midpoint.
    """
    chosen = tuple(sorted({_layer(layer, directions) for layer in layers}))
    rows = [directions.layers.index(layer) for layer in chosen]
    basis = directions.data[rows]
    return Guard(
        name=name,
        layers=chosen,
        basis=basis,
        gate_directions=basis[:, 0],
        gate_centers=None if directions.midpoints is None else directions.midpoints[rows],
        alpha=alpha,
        project=project,
        gate=gate,
        source=source,
        scope=scope or Scope(),
        about={**directions.about, "directions": directions.name},
    )


def projection(directions: Directions, *, layers: Sequence[int], scope: Scope | None = None) -> Guard:
    """The projection step of VLM-Guard alone, ungated: h - h V^T V."""
    return vlm_guard(
        directions,
        layers=layers,
        alpha=0.0,
        project=True,
        gate="always",
        source="own",
        scope=scope or Scope("all", "both"),
        name="projection",
    )


def measure_gates(directions: Directions, states: Sequence[Activations], *, split: str = "test") -> Result:
    """How often the gate of each layer would open, uncentred and centred, by label and condition.

    Returns a `Result` with metric `gate_open` and the columns `gate` and `label`; 95% Wilson intervals.
    """
    rows = []
    for activations in states:
        scores = directions.project(activations)
        for gate, thresholds in _thresholds(directions, activations.layers).items():
            opened = scores > thresholds.unsqueeze(1)
            rows += _firing_rows(opened, activations, gate, split)
    about = states[0].about if states else {}
    return Result.from_rows(rows, **{**about, "directions": directions.name})


def _thresholds(directions: Directions, layers: list[int]) -> dict[str, Float[Tensor, " layer"]]:
    gates = {"sign": torch.zeros(len(layers))}
    if directions.midpoints is not None:
        rows = [directions.layers.index(layer) for layer in layers]
        gates["midpoint"] = (directions.midpoints[rows] * directions.data[rows, 0]).sum(-1)
    return gates


def _firing_rows(
    opened: Bool[Tensor, "layer prompt"], activations: Activations, gate: str, split: str
) -> list[dict[str, Any]]:
    table = pd.DataFrame(opened.T.numpy(), columns=activations.layers)
    counts = table.groupby(activations.labels).agg(["sum", "count"])
    rows = []
    for label, row in counts.iterrows():
        for layer in activations.layers:
            hits, n = int(row[(layer, "sum")]), int(row[(layer, "count")])
            low, high = wilson_interval(hits, n)
            rows.append(
                {
                    "condition": activations.name,
                    "layer": layer,
                    "metric": "gate_open",
                    "value": hits / n,
                    "low": low,
                    "high": high,
                    "n": n,
                    "split": split,
                    "gate": gate,
                    "label": label,
                }
            )
    return rows


def _layer(layer: int, directions: Directions) -> int:
    number = layer if layer >= 0 else max(directions.layers) + 1 + layer
    directions.at(number)
    return int(number)


def _one_of(field_name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise MechguardError(
            f"{field_name}={value!r} is not known; use one of {', '.join(get_args(choices))}"
        )
