"""One forward pass with places in it that are read or changed, by plain hooks.

A place is what one part of one decoder layer hands on: "residual" (the state after the layer), "attention"
and "mlp" (what they add to the residual stream, behind post-norms where a family has them), "head" (the heads
side by side, before the output projection), and "input" (the state before the layer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mechguard.errors import MechguardError
from mechguard.models import VLM

Site = Literal["input", "head", "attention", "mlp", "residual"]
Edit = Callable[[Tensor], Tensor]
States = dict["Place", Tensor]


@dataclass(frozen=True)
class Place:
    """Where in the decoder a state is read or changed."""

    site: Site
    layer: int


@contextmanager
def hooked(
    model: VLM,
    *,
    edits: Mapping[Place, Edit] | None = None,
    keep: Iterable[Place] = (),
    read: Edit = lambda state: state,
) -> Iterator[States]:
    """While the block runs, every pass changes the places in `edits` and keeps those in `keep`.

    Args:
        edits: each gets the whole state [batch, pos, width] and gives the new one.
        keep: what is kept, after it was changed.
        read: what of a state is kept.

    Raises:
        MechguardError: a layer has no such part.
    """
    changes, kept = dict(edits or {}), set(keep)
    found: States = {}

    def visit(place: Place, state: Tensor) -> Tensor:
        state = changes[place](state) if place in changes else state
        if place in kept:
            found[place] = read(state)
        return state

    with ExitStack() as stack:
        for place in changes.keys() | kept:
            module = module_of(model, place)
            add = _hook_input if place.site in ("input", "head") else _hook_output
            stack.callback(add(module, place, visit).remove)
        yield found


def run(model: VLM, encoded: dict[str, Tensor]) -> Any:
    """The plain model on an encoded batch, without a cache."""
    return model.hf_model(**encoded, **model.position_ids(encoded), use_cache=False)


def module_of(model: VLM, place: Place) -> nn.Module:
    """The module at whose input or output a place is.

    Raises:
        MechguardError: the layer has no such part.
    """
    layer = model.hf_model.get_submodule(f"{model.parts.layers}.{place.layer}")
    attention, mlp = model.parts.writers(layer)
    names = {
        "input": "",
        "residual": "",
        "attention": attention,
        "mlp": mlp,
        "head": model.parts.head_writer(layer)[1],
    }
    name = names[place.site]
    if name is None:
        raise MechguardError(
            f"layer {place.layer} of {model.name} has no part that is known as {place.site!r}; see "
            "families.py for the names that are tried"
        )
    return layer.get_submodule(name)


def count_heads(model: VLM) -> int:
    """How many attention heads a decoder layer has."""
    return int(model.hf_model.config.get_text_config().num_attention_heads)


def linear_matrix(module: nn.Module, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The matrix [width, out] and the bias [out] of a linear map, read off what it does; float32, CPU."""
    options: dict[str, Any] = {"dtype": dtype, "device": device_of(module)}
    with torch.no_grad():
        bias = module(torch.zeros(1, width, **options)).float().cpu()
        matrix = module(torch.eye(width, **options)).float().cpu() - bias
    return matrix, bias[0]


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are."""
    return next(module.parameters()).device


def head_slice(state: Tensor, head: int, model: VLM) -> slice:
    """The entries of one head among those of all heads side by side."""
    size = state.shape[-1] // count_heads(model)
    return slice(head * size, (head + 1) * size)


def _hook_output(module: nn.Module, place: Place, visit: Callable[[Place, Tensor], Tensor]) -> Any:
    def hook(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (visit(place, output[0]), *output[1:])
        return visit(place, output)

    return module.register_forward_hook(hook)


def _hook_input(module: nn.Module, place: Place, visit: Callable[[Place, Tensor], Tensor]) -> Any:
    def hook(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if given:
            return (visit(place, given[0]), *given[1:]), named
        return given, {**named, "hidden_states": visit(place, named["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)
