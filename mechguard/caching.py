"""A cache of states under TransformerLens's names, for a few prompts at all positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechguard.errors import MechguardError

Names = str | Sequence[str] | Callable[[str], bool] | None
Hook = tuple[str, Any, str]
"""A hook name, the traced module, and whether its "input" or "output" is meant."""


@dataclass(frozen=True, eq=False)
class ActivationCache(Mapping[str, Tensor]):
    """States by hook name, float32 on the CPU.

    Decoder states are [batch, pos, d_model], left-padded like `tokens`; states of the vision encoder
    have whatever rows its pictures, tiles or patches make.

    Attributes:
        states: by full name, e.g. "blocks.3.hook_resid_post".
        tokens: [batch, pos].
        present: [batch, pos], false on padding.
        is_image: [batch, pos], true where image features stand.
    """

    states: dict[str, Tensor]
    tokens: Int[Tensor, "batch pos"]
    present: Bool[Tensor, "batch pos"]
    is_image: Bool[Tensor, "batch pos"]

    def __getitem__(self, name: str | tuple[str, int]) -> Tensor:
        """A state by its full name, or by word and layer: `cache["resid_post", 3]`, `cache["embed"]`.

        Raises:
            KeyError: there is no such state.
        """
        full = full_name(name)
        if full not in self.states:
            raise KeyError(f"no state {full!r} in the cache; it holds {', '.join(self.states)}")
        return self.states[full]

    def __iter__(self) -> Iterator[str]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)

    def stack_activation(self, word: str) -> Tensor:
        """The same state of every layer that is in the cache: [layer, batch, pos, d_model].

        Args:
            word: e.g. "resid_post".

        Raises:
            KeyError: no layer has it.
        """
        found = [state for name, state in self.states.items() if _is_of_a_layer(name, word)]
        if not found:
            raise KeyError(f"no layer has a state {word!r} in the cache; it holds {', '.join(self.states)}")
        return torch.stack(found)

    def to(self, device: str | torch.device) -> ActivationCache:
        """The same cache on a device."""
        moved = {name: state.to(device) for name, state in self.states.items()}
        return ActivationCache(
            moved, self.tokens.to(device), self.present.to(device), self.is_image.to(device)
        )

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.tokens.shape))
        return f"ActivationCache({len(self)} states, batch x pos = {shape})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{' x '.join(map(str, state.shape))}</td></tr>"
            for name, state in self.states.items()
        )
        return f"<p><code>{escape(repr(self))}</code></p><table>{rows}</table>"


def full_name(name: str | tuple[str, int]) -> str:
    """TransformerLens's shorthands as full names: ("resid_post", 3), "embed"."""
    if isinstance(name, tuple):
        word, layer = name
        return f"blocks.{layer}.hook_{word}"
    return f"hook_{name}" if name == "embed" else name


def select_names(known: Sequence[str], wanted: Names) -> list[str]:
    """The hook names that are wanted, in the order of the forward pass.

    Raises:
        MechguardError: a name that the model does not have, or none left.
    """
    if wanted is None:
        return list(known)
    if callable(wanted):
        chosen = [name for name in known if wanted(name)]
    else:
        asked = [full_name(name) for name in ([wanted] if isinstance(wanted, str) else wanted)]
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise MechguardError(
                f"there is no state {unknown[0]!r} here; vlm.hook_names() lists all, and those of the vision "
                "encoder need a picture"
            )
        chosen = [name for name in known if name in asked]
    if not chosen:
        raise MechguardError("no state was asked for; vlm.hook_names() lists what there is")
    return chosen


def read_states(
    traced: Any, hooks: Sequence[Hook], encoded: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and states of one traced pass; the hooks stand in the order of the forward pass."""
    with torch.no_grad(), traced.trace(**encoded, use_cache=False):
        found = []
        for _, module, side in hooks:
            value = module.input if side == "input" else module.output
            found.append((value[0] if isinstance(value, tuple) else value).clone())
        states = list(found).save()  # type: ignore[attr-defined]
        logits = traced.output.logits.save()
    names = [name for name, _, _ in hooks]
    cpu = [state.detach().to("cpu", torch.float32) for state in states]
    return logits.detach().to("cpu", torch.float32), dict(zip(names, cpu, strict=True))


def _is_of_a_layer(name: str, word: str) -> bool:
    return name.startswith("blocks.") and name.endswith(f".hook_{word}")
