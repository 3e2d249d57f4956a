"""A guard: a move, a gate, a scope and layers, as an object that can be saved.

A guard is a pure function of tensors. Whoever runs the model (a trace, or a hook) asks it two things at each
of its layers: which rows are open (`opens`), and what their states become (`steer`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechguard.cards import draw_card
from mechguard.errors import MechguardError
from mechguard.guards.gates import Gate
from mechguard.guards.moves import Move, Query, Realign, read_move
from mechguard.interventions import apply_where
from mechguard.models import VLM
from mechguard.prompts import Prompt, Prompts
from mechguard.storage import check_numbers, digest, load_tensors, parsing, save_tensors

KIND, CHAIN = "guard", "chain of guards"
NARROW = ("gate.thresholds", "move.slopes", "move.offsets")  # tensors without a d_model
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
        one_of("positions", self.positions, Positions)
        one_of("phase", self.phase, Phase)


@dataclass(frozen=True, eq=False)
class Guard:
    """h' = move(h, q) where the gate is open, at some layers and positions.

    Attributes:
        name: how tables call it.
        layers: the decoder layers it acts on; none for a guard of prompts.
        move: what becomes of a state; None for a guard of prompts.
        gate: which rows are open; None means all.
        source: what q is: "own" (each position itself), "last" (the last prompt token of the same pass,
            broadcast), "llm" (the language model's last token of the same text query), or "llm-stream" (the
            same, but the language model reads the generated tokens along).
        scope: positions and phase.
        keep_norm: whether a moved state is scaled back to its own length.
        template: what is put around every prompt, with {query}; for a guard of prompts.
        answer_mark: what stands before the part of an answer that counts; None if all of it does.
        reads: a question; its answer by the VLM about the picture joins the text that the language model
            supervises from. One more answer per prompt with a picture.
        about: what it was fitted on.
    """

    name: str
    layers: tuple[int, ...]
    move: Move | None
    gate: Gate | None = None
    source: Source = "own"
    scope: Scope = field(default_factory=Scope)
    keep_norm: bool = False
    template: str | None = None
    answer_mark: str | None = None
    reads: str | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("source", self.source, Source)
        if (self.move is None) != (self.template is not None):
            raise MechguardError(f"guard {self.name!r} wants either a move or a template")
        if self.move is not None and not self.layers:
            raise MechguardError(f"guard {self.name!r} has no layers; give at least one")
        tensors = self._tensors()
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise MechguardError(f"guard {self.name!r} holds NaN or infinity in {name}; fit it again")
            if len(tensor) != len(self.layers):
                raise MechguardError(
                    f"guard {self.name!r} has {len(self.layers)} layers, but {name} has {len(tensor)}"
                )

    @property
    def parts(self) -> tuple[Guard, ...]:
        """The guards that act, in their order; a guard by itself is one."""
        return (self,)

    @property
    def basis(self) -> Float[Tensor, "layer rank d_model"]:
        """V, for a guard that acts in a subspace."""
        if not isinstance(self.move, Realign):
            raise MechguardError(f"guard {self.name!r} does not act in a subspace")
        return self.move.basis

    @property
    def rank(self) -> int | None:
        """The number of directions it acts in; None where that does not apply."""
        return int(self.move.basis.shape[1]) if isinstance(self.move, Realign) else None

    @property
    def d_model(self) -> int | None:
        """The width of the states it was made for; None if it fits any."""
        wide = [tensor for name, tensor in self._tensors().items() if name not in NARROW]
        return int(wide[0].shape[-1]) if wide else None

    @property
    def fingerprint(self) -> str:
        """A hash of what it does: its tensors and settings, without its name."""
        facts = {key: value for key, value in self._facts().items() if key not in ("name", "about")}
        sums = {
            name: hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
            for name, tensor in self._tensors().items()
        }
        return digest(facts, sums)

    @property
    def supervised(self) -> bool:
        """Whether q comes from the language model."""
        return self.source in ("llm", "llm-stream")

    @property
    def gated(self) -> bool:
        """Whether it may leave some rows alone."""
        return self.gate is not None and self.gate.word != "always"

    def opens(self, layer: int, query: Float[Tensor, "batch d_model"]) -> Bool[Tensor, " batch"]:
        """The gate, row by row, from the state that supervises at the end of the prompt."""
        if self.gate is None:
            return torch.ones(len(query), dtype=torch.bool, device=query.device)
        return self.gate.opens(self.layers.index(layer), query)

    def steer(
        self,
        layer: int,
        hidden: Float[Tensor, "batch pos d_model"],
        query: Query,
        mask: Bool[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The states after the intervention; positions outside the mask stay bit for bit.

        Without a mask it acts on all of them.
        The sum is taken in float32 and returned in the dtype of `hidden`.
        """
        if self.move is None:
            return hidden
        wide = hidden.to(torch.float32)
        supervising = wide if query is hidden else query.to(wide)
        moved = self.move(self.layers.index(layer), wide, supervising)
        if self.keep_norm:
            moved = moved * (
                wide.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            )
        moved = moved.to(hidden.dtype)
        return moved if mask is None else apply_where(mask.to(hidden.device), moved, hidden)

    def acts(self, phase: Literal["prompt", "generated"]) -> bool:
        """Whether the guard acts in this phase."""
        return self.scope.phase in (phase, "both")

    def counted(self, answer: str) -> str:
        """The part of an answer that counts."""
        return answer if self.answer_mark is None else answer.rpartition(self.answer_mark)[2].strip()

    def wrap(self, prompts: Prompts) -> Prompts:
        """The prompts as this guard sends them."""
        return prompts if self.template is None else prompts.with_template(self.template)

    def renamed(self, name: str) -> Guard:
        """The same guard under another name."""
        return replace(self, name=name)

    def on(self, device: torch.device) -> Guard:
        """The same guard with its tensors on a device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def randomised(self, seed: int = 0, *, name: str = "random") -> Guard:
        """The control: the same gate, strength, layers and rank, but random directions.

        Raises:
            MechguardError: a guard without directions.
        """
        if self.move is None:
            raise MechguardError(f"guard {self.name!r} changes prompts, so it has no random control")
        about = {**self.about, "control": f"random directions, seed {seed}"}
        return replace(self, name=name, move=self.move.randomised(seed), about=about)

    def __or__(self, other: Guard | Chain) -> Chain:
        """Both guards, one after the other at every layer."""
        return Chain((*self.parts, *other.parts))

    def check(self, model: VLM) -> None:
        """Refuse a model this guard was not made for.

        Raises:
            MechguardError: other width, missing layers, or other weights; weights that are elsewhere.
        """
        if self.move is not None:
            model.want_weights(f"guard {self.name!r}")
        wrong_width = self.d_model is not None and self.d_model != model.d_model
        if wrong_width or max(self.layers, default=0) >= model.n_layers or min(self.layers, default=0) < 0:
            raise MechguardError(
                f"guard {self.name!r} acts on layers {list(self.layers)} of d_model {self.d_model}, "
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

    def attach(
        self, model: VLM, prompts: Prompts | Sequence[Prompt] = (), *, teacher: VLM | None = None
    ) -> AbstractContextManager[Any]:
        """Guard the plain Hugging Face model while a block runs, whoever calls it.

            with guard.attach(vlm) as hf_model:
                hf_model.generate(**inputs)

        A prompt is a forward pass with an empty cache; gates are decided at its end. Left padding.

        Args:
            prompts: what will be sent, row by row; needed where the language model supervises.
            teacher: that language model; the model's own by default.

        Raises:
            MechguardError: a guard that does not fit the model, or that needs the prompts.
        """
        from mechguard.guards.hooks import attached

        return attached(self.parts, model, list(prompts), teacher=teacher)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `path.safetensors` and `path.json`, with the model it was made for."""
        return save_tensors(path, KIND, self._tensors(), self._facts())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Guard:
        """Read a saved guard.

        Raises:
            MechguardError: it is not a guard, or was altered.
        """
        tensors, facts = load_tensors(path, KIND)
        with parsing(path, KIND):
            return cls._read(tensors, facts)

    def bake(self, model: VLM) -> VLM:
        """A copy of the model with this guard in its weights; see `baking.bake`."""
        from mechguard.guards.baking import bake

        return bake(self, model)

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Upload the guard to the Hugging Face hub; see `hub.push_guard`."""
        from mechguard.guards.hub import push_guard

        return push_guard(self, repo, **options)

    @classmethod
    def from_hub(cls, repo: str, *, revision: str | None = None) -> Guard:
        """Download a guard from the Hugging Face hub."""
        from mechguard.guards.hub import load_guard_from_hub

        return load_guard_from_hub(repo, revision=revision)

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Guard:
        move, gate = facts["move"], facts["gate"]
        tensors = {name: check_numbers(tensor) for name, tensor in tensors.items()}
        for name in ("name", "template", "answer_mark", "reads"):
            if not (isinstance(facts[name], str) or (facts[name] is None and name != "name")):
                raise MechguardError(f"the {name} of a guard is {str(facts[name])[:80]!r}; wanted text")
        found = cls(
            name=facts["name"],
            layers=tuple(int(layer) for layer in facts["layers"]),
            move=None if move is None else read_move(move["kind"], tensors, move["options"]),
            gate=None if gate is None else Gate.read(tensors, gate),
            source=facts["source"],
            scope=Scope(**facts["scope"]),
            keep_norm=bool(facts["keep_norm"]),
            template=facts["template"],
            answer_mark=facts["answer_mark"],
            reads=facts["reads"],
            about=dict(facts["about"]),
        )
        found._try()
        return found

    def _try(self) -> None:
        """Act on nothing once: tensors and numbers that do not fit each other fail here.

        Raises:
            MechguardError: the outcome is not a state.
        """
        hidden = torch.zeros(1, 2, self.d_model or 1)
        where = torch.ones(1, 2, dtype=torch.bool)
        for layer in self.layers if self.move is not None else ():
            opened = self.opens(layer, hidden[:, 0])
            moved = self.steer(layer, hidden, hidden[:, :1], where)
            if opened.shape != (1,) or moved.shape != hidden.shape or not torch.isfinite(moved).all():
                raise MechguardError(f"guard {self.name!r} makes no state of a state at layer {layer}")

    def _tensors(self) -> dict[str, Tensor]:
        own = {} if self.move is None else self.move.tensors()
        return own if self.gate is None else {**own, **self.gate.tensors()}

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Guard:
        tensors = {name: change(tensor) for name, tensor in self._tensors().items()}
        move = self.move and read_move(self.move.kind, tensors, self.move.options())
        gate = self.gate and Gate.read(tensors, {"word": self.gate.word})
        return replace(self, move=move, gate=gate)

    def _facts(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "layers": list(self.layers),
            "move": None if self.move is None else {"kind": self.move.kind, "options": self.move.options()},
            "gate": None if self.gate is None else {"word": self.gate.word},
            "source": self.source,
            "scope": {"positions": self.scope.positions, "phase": self.scope.phase},
            "keep_norm": self.keep_norm,
            "template": self.template,
            "answer_mark": self.answer_mark,
            "reads": self.reads,
            "about": self.about,
        }

    def __repr__(self) -> str:
        if self.move is None:
            return f"Guard({self.name!r}, template={self.template!r})"
        options = ", ".join(f"{key}={value!r}" for key, value in self.move.options().items())
        gate = "always" if self.gate is None else self.gate.word
        rank = "" if self.rank is None else f"rank={self.rank}, "
        return (
            f"Guard({self.name!r}, layers={list(self.layers)}, move={self.move.kind!r}, {rank}{options}, "
            f"gate={gate!r}, source={self.source!r}, positions={self.scope.positions!r}, "
            f"phase={self.scope.phase!r})"
        )

    def _repr_html_(self) -> str:
        following = ("mg.generate(vlm, prompts, guard=guard)", "guard.randomised()", "guard.save(...)")
        return draw_card(f"Guard: {self.name}", self._said(), following=following)

    def _said(self) -> dict[str, Any]:
        """What a card tells."""
        if self.move is None:
            return {"puts around every prompt": self.template, "model": self.about.get("model")}
        options = self.move.options()
        return {
            "layers": ", ".join(map(str, self.layers)),
            "move": " ".join([self.move.kind, *(f"{key}={value}" for key, value in options.items())]),
            "rank": self.rank,
            "gate": "always open" if self.gate is None else self.gate.word,
            "q comes from": self.source,
            "acts on": f"positions: {self.scope.positions}, phase: {self.scope.phase}",
            "made for": self.about.get("model"),
            "control": self.about.get("control"),
        }


@dataclass(frozen=True, eq=False)
class Chain:
    """Several guards, one after the other at every layer they share.

    Attributes:
        parts: the guards, in their order.
    """

    parts: tuple[Guard, ...]
    own_name: str | None = None

    @property
    def name(self) -> str:
        return self.own_name or " | ".join(guard.name for guard in self.parts)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for guard in self.parts for layer in guard.layers}))

    @property
    def about(self) -> dict[str, Any]:
        return {"guards": [guard.about for guard in self.parts]}

    @property
    def fingerprint(self) -> str:
        """A hash of what the guards do, in their order."""
        return digest([guard.fingerprint for guard in self.parts])

    def counted(self, answer: str) -> str:
        """The part of an answer that counts."""
        for guard in self.parts:
            answer = guard.counted(answer)
        return answer

    def renamed(self, name: str) -> Chain:
        """The same guards under another name."""
        return replace(self, own_name=name)

    def check(self, model: VLM) -> None:
        """Refuse a model that one of the guards was not made for."""
        for guard in self.parts:
            guard.check(model)

    def wrap(self, prompts: Prompts) -> Prompts:
        """The prompts as these guards send them."""
        for guard in self.parts:
            prompts = guard.wrap(prompts)
        return prompts

    def attach(
        self, model: VLM, prompts: Prompts | Sequence[Prompt] = (), *, teacher: VLM | None = None
    ) -> AbstractContextManager[Any]:
        """Guard the plain Hugging Face model while a block runs, whoever calls it.

            with guard.attach(vlm) as hf_model:
                hf_model.generate(**inputs)

        A prompt is a forward pass with an empty cache; gates are decided at its end. Left padding.

        Args:
            prompts: what will be sent, row by row; needed where the language model supervises.
            teacher: that language model; the model's own by default.

        Raises:
            MechguardError: a guard that does not fit the model, or that needs the prompts.
        """
        from mechguard.guards.hooks import attached

        return attached(self.parts, model, list(prompts), teacher=teacher)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `path.safetensors` and `path.json`."""
        tensors = {
            f"{number}.{name}": tensor
            for number, guard in enumerate(self.parts)
            for name, tensor in guard._tensors().items()
        }
        facts = {"name": self.own_name, "guards": [guard._facts() for guard in self.parts]}
        return save_tensors(path, CHAIN, tensors, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Chain:
        """Read saved guards.

        Raises:
            MechguardError: it is not a chain of guards, or was altered.
        """
        tensors, facts = load_tensors(path, CHAIN)
        parts = []
        with parsing(path, CHAIN):
            for number, guard in enumerate(facts["guards"]):
                own = {
                    name.partition(".")[2]: value
                    for name, value in tensors.items()
                    if name.startswith(f"{number}.")
                }
                parts.append(Guard._read(own, guard))
            return cls(tuple(parts), None if facts["name"] is None else str(facts["name"]))

    def __or__(self, other: Guard | Chain) -> Chain:
        return Chain((*self.parts, *other.parts))

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.parts))})"

    def _repr_html_(self) -> str:
        cards = "".join(guard._repr_html_() for guard in self.parts)
        return draw_card(f"Guards in a chain: {self.name}", {}, preview=cards)


def one_of(field_name: str, value: str, choices: Any) -> None:
    """Refuse a word that is not among the choices of a Literal."""
    if value not in get_args(choices):
        raise MechguardError(
            f"{field_name}={value!r} is not known; use one of {', '.join(get_args(choices))}"
        )
