"""Activations: the hidden states of prompts, layer by layer, labelled, without a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechguard.cards import draw_card, draw_line
from mechguard.errors import MechguardError
from mechguard.prompts import HARMFUL, Label, Prompt, Prompts, as_label, read_row
from mechguard.shards import StoredStates, is_store, read_store
from mechguard.storage import check_numbers, load_tensors, parsing, save_tensors

KIND = "activations"


@dataclass(frozen=True, eq=False)
class Activations:
    """Hidden states after decoder layers (the residual stream, before the final norm).

    Attributes:
        data: float32 [layer, prompt, d_model]; where they were collected to disk, a `shards.StoredStates`,
            which reads what is asked of it.
        layers: the decoder layer of each row of `data`, counted from 0.
        prompts: what was sent, in the order of `data`.
        about: model, view ("llm" or "vlm"), condition, position, fingerprint.
    """

    data: Float[Tensor, "layer prompt d_model"]
    layers: list[int]
    prompts: Prompts
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.data.ndim != 3:
            raise MechguardError(
                f"activations have shape {tuple(self.data.shape)}; wanted [layer, prompt, d_model]"
            )
        wanted = (len(self.layers), len(self.prompts))
        if tuple(self.data.shape[:2]) != wanted:
            raise MechguardError(
                f"activations of shape {tuple(self.data.shape)} do not fit {wanted[0]} layers and "
                f"{wanted[1]} prompts"
            )
        # What lies on disk was looked at when it was collected.
        if not isinstance(self.data, StoredStates) and not torch.isfinite(self.data).all():
            raise MechguardError(_describe_nonfinite(self.data, self.layers, self.prompts))

    @classmethod
    def from_tensor(
        cls,
        data: Any,
        *,
        labels: Sequence[Any],
        pairs: Sequence[Any] | None = None,
        layers: Sequence[int] | None = None,
    ) -> Activations:
        """Wrap states that come from elsewhere.

        Args:
            data: [layer, prompt, d_model], anything `torch.as_tensor` takes.
            labels: one per prompt: harmful/harmless, 1/0, true/false.
            pairs: one per prompt, shared by one harmful and one harmless prompt.
            layers: the layer number of each row of `data`; 0, 1, ... by default.
        """
        tensor = torch.as_tensor(data).detach().to("cpu", torch.float32)
        if tensor.ndim != 3 or len(labels) != tensor.shape[1]:
            raise MechguardError(
                f"states of shape {tuple(tensor.shape)} do not fit {len(labels)} labels; wanted "
                "[layer, prompt, d_model] with one label per prompt"
            )
        if pairs is not None and len(pairs) != len(labels):
            raise MechguardError(f"{len(pairs)} pairs do not fit {len(labels)} prompts")
        prompts = [
            Prompt(
                id=str(index),
                text="",
                label=as_label(_plain(label)),
                pair=None if pairs is None else str(pairs[index]),
            )
            for index, label in enumerate(labels)
        ]
        numbers = list(range(tensor.shape[0])) if layers is None else [int(n) for n in layers]
        return cls(tensor, numbers, Prompts(prompts, name="tensor"), {"model": "tensor"})

    @property
    def labels(self) -> np.ndarray[Any, Any]:
        """ "harmful" or "harmless", one per prompt."""
        return np.array(self.prompts.labels)

    @property
    def pairs(self) -> list[str | None]:
        return [prompt.pair for prompt in self.prompts]

    @property
    def d_model(self) -> int:
        return int(self.data.shape[2])

    @property
    def condition(self) -> str:
        return str(self.about.get("condition", self.prompts.condition))

    @property
    def name(self) -> str:
        """How results call these states: the view and the condition, e.g. "llm text", "vlm blank"."""
        return " ".join(map(str, filter(None, [self.about.get("view"), self.condition])))

    def at(self, layer: int) -> Float[Tensor, "prompt d_model"]:
        """The states after one decoder layer."""
        if layer not in self.layers:
            raise MechguardError(f"layer {layer} was not collected; these layers were: {self.layers}")
        return self.data[self.layers.index(layer)]

    def with_label(self, label: Label) -> Float[Tensor, "layer prompt d_model"]:
        """The states of the harmful or of the harmless prompts."""
        return self.data[:, torch.as_tensor(self.labels == label)]

    def groups(self) -> tuple[Float[Tensor, "layer a d_model"], Float[Tensor, "layer b d_model"], bool]:
        """Harmful states, harmless states, and whether they are aligned pair by pair.

        Raises:
            MechguardError: one of the groups is empty.
        """
        labels = set(self.labels.tolist())
        if len(labels) != 2:
            found = f"only {labels.pop()}" if labels else "no"
            raise MechguardError(
                f"{found} prompts in {self.prompts.name!r}; harmful and harmless ones are needed"
            )
        if all(pair is not None for pair in self.pairs):
            harmful, harmless = self.prompts.pair_indices()
            return self.data[:, harmful], self.data[:, harmless], True
        return self.with_label(HARMFUL), self.with_label("harmless"), False

    def differences(self) -> Float[Tensor, "layer pair d_model"]:
        """A^l = H^l(harmful) - H^l(harmless), pair by pair.

        Raises:
            MechguardError: prompts without pairs.
        """
        harmful, harmless = self.prompts.pair_indices()
        return self.data[:, harmful] - self.data[:, harmless]

    def shuffled(self, seed: int = 0) -> Activations:
        """The same states with labels and pairs dealt anew: a control, in which there is nothing to find."""
        order = np.random.default_rng(seed).permutation(len(self.prompts)).tolist()
        dealt = [
            replace(self.prompts[there], label=here.label, pair=here.pair)
            for here, there in zip(self.prompts, order, strict=True)
        ]
        about = {**self.about, "control": f"shuffled labels, seed {seed}"}
        return Activations(self.data[:, order], self.layers, Prompts(dealt, name=self.prompts.name), about)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `path.safetensors` and `path.json` (prompts, layers, about)."""
        facts = {
            "layers": self.layers,
            "name": self.prompts.name,
            "about": {**self.about, "condition": self.condition},
            "prompts": self.prompts.to_rows(),
        }
        return save_tensors(path, KIND, {"data": self.data}, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, check: bool = True) -> Activations:
        """Read saved activations; pictures come back as their description only.

        Args:
            path: a file of `save`, or a folder of `collect(..., out=...)`, whose states stay on disk.
            check: of a folder, compare every shard with its checksum now; otherwise when it is first read.

        Raises:
            MechguardError: something is missing, not finished, or not what was written.
        """
        with parsing(path, KIND):
            if is_store(Path(path)):
                data, facts, rows = read_store(Path(path), check=check)
            else:
                tensors, facts = load_tensors(path, KIND)
                data, rows = check_numbers(tensors["data"]), facts["prompts"]  # type: ignore[assignment]
            prompts = Prompts(map(read_row, rows), name=str(facts["name"]))
            layers = [int(layer) for layer in facts["layers"]]
            return cls(data, layers, prompts, dict(facts["about"]))

    def __repr__(self) -> str:
        layers, prompts, width = self.data.shape
        return f"Activations({self.name!r}, layer={layers}, prompt={prompts}, d_model={width})"

    def _repr_html_(self) -> str:
        norms = [float(states.norm(dim=-1).mean()) for states in self.data]
        facts = {
            "shape": "layer {} x prompt {} x d_model {}, float32".format(*self.data.shape),
            "layers": f"{self.layers[0]} to {self.layers[-1]}" if self.layers else None,
            "position": self.about.get("position"),
            "prompts": repr(self.prompts),
            "model": self.about.get("model"),
            "guard": self.about.get("guard"),
        }
        line = draw_line(norms) if norms else ""
        preview = f"<div>mean norm by layer {line} {norms[0]:.3g} to {norms[-1]:.3g}</div>" if norms else ""
        following = ("mg.fit_directions(...)", "mg.measure_separability(...)", "mg.map_states([...])")
        return draw_card(f"Activations: {self.name}", facts, preview=preview, following=following)


def _describe_nonfinite(
    data: Float[Tensor, "layer prompt d_model"], layers: Sequence[int], prompts: Prompts
) -> str:
    """Which prompts have states that are no numbers, and from which layer on."""
    bad = ~torch.isfinite(data).all(-1)
    rows = bad.any(0).nonzero().flatten().tolist()
    first = layers[int(bad.any(1).nonzero()[0])]
    listed = ", ".join(prompts[row].id for row in rows[:20]) + (", ..." if len(rows) > 20 else "")
    return (
        f"activations contain NaN or infinity: {len(rows)} of {len(prompts)} prompts ({listed}), from layer "
        f"{first} on; load the model in float32 or bfloat16, or leave these prompts out (prompts.filter)"
    )


def _plain(label: Any) -> Any:
    return label.item() if hasattr(label, "item") else label
