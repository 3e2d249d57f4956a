"""Baking: a linear, ungated guard written into the weights, so that no code of ours need run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechguard.errors import MechguardError
from mechguard.guards.guard import Guard
from mechguard.guards.moves import Realign
from mechguard.models import VLM
from mechguard.prompts import Prompt, Prompts

TOLERANCE = 1e-4
OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "down_proj", "fc2", "w2", "dense_4h_to_h")


def bake(guard: Guard, model: VLM) -> VLM:
    """A copy of the model that cannot write along the guard's directions any more.

    V is taken out of every matrix that writes to the residual stream: token embeddings, the outputs of
    attention and MLP of every layer, and the projector of the pictures (Arditi et al., arXiv 2406.11717,
    weight orthogonalisation). That is another function than projecting layer outputs: what attention writes
    inside a layer does not reach its MLP either.

    Args:
        guard: a projection of the same subspace at every layer, such as `ablation` gives.

    Returns:
        A new VLM; `.save(folder)` writes it as a checkpoint that plain transformers loads.

    Raises:
        MechguardError: a guard that no weights can express, or a model in which something else writes.
    """
    basis = _basis(guard, model)
    hf_model = copy.deepcopy(model.hf_model)
    baked = replace(model, hf_model=hf_model, name=f"{model.name} | {guard.name}", folder=None, parent=None)
    _untie(baked)
    with torch.no_grad():
        for module, name in _writers(baked):
            _orthogonalise(module, name, basis)
    _verify(baked, basis)
    return baked


def _basis(guard: Guard, model: VLM) -> Float[Tensor, "rank d_model"]:
    guard.check(model)
    linear = isinstance(guard.move, Realign) and guard.move.alpha == 0 and guard.move.project == 1
    always = guard.gate is None or guard.gate.word == "always"
    if not linear or not always or guard.keep_norm:
        raise MechguardError(
            f"guard {guard.name!r} is no ungated projection, so no weights can hold it; use guard.attach(...)"
        )
    basis = guard.basis
    same = torch.allclose(basis, basis[:1].expand_as(basis), atol=1e-6)
    if not same or len(guard.layers) < model.n_layers or guard.scope.positions != "all":
        raise MechguardError(
            f"guard {guard.name!r} does not project the same subspace at every layer and position, which is "
            "what can be baked; see mechguard.ablation"
        )
    return basis[0]


def _untie(model: VLM) -> None:
    """Give the output head its own weights: it reads the residual stream and must stay as it is."""
    head, embeddings = model.hf_model.get_output_embeddings(), model.hf_model.get_input_embeddings()
    if head is not None and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.hf_model.config, model.hf_model.config.get_text_config()):
        config.tie_word_embeddings = False


def _writers(model: VLM) -> Iterator[tuple[nn.Module, str]]:
    """Every module whose output is added to the residual stream, and what to call it."""
    parts, hf_model = model.parts, model.hf_model
    yield hf_model.get_input_embeddings(), "the token embeddings"
    positions: Any = getattr(hf_model.get_submodule(parts.decoder), "wpe", None)
    if positions is not None:
        yield positions, "the position embeddings"
    for number in range(parts.n_layers):
        layer = hf_model.get_submodule(f"{parts.layers}.{number}")
        for name in parts.writers(layer):
            yield _output_of(layer, name, number), f"{name} of layer {number}"
    pictures = parts.projector or parts.vision
    if pictures is not None:
        inside = hf_model.get_submodule(pictures).modules()
        wide = [module for module in inside if isinstance(module, nn.Linear)]
        wide = [module for module in wide if module.out_features == parts.d_model]
        if wide:
            yield wide[-1], "the projector"


def _output_of(layer: nn.Module, name: str | None, number: int) -> nn.Module:
    module = None if name is None else getattr(layer, name)
    found = None if module is None else next((part for part in OUTPUTS if hasattr(module, part)), None)
    if module is None or found is None:
        raise MechguardError(
            f"what {name or 'a part'} of layer {number} writes goes through no matrix of its own"
        )
    return getattr(module, found)


def _orthogonalise(module: Any, name: str, basis: Float[Tensor, "rank d_model"]) -> None:
    """Take the subspace out of everything a matrix can write."""
    weight = module.weight
    wide = basis.to(weight.device, torch.float32)
    if isinstance(module, nn.Linear):  # [d_model, inputs]
        changed = weight.float() - wide.T @ (wide @ weight.float())
    elif weight.ndim == 2 and weight.shape[1] == basis.shape[1]:  # embeddings, Conv1D: [inputs, d_model]
        changed = weight.float() - (weight.float() @ wide.T) @ wide
    else:
        raise MechguardError(f"{name} is a {type(module).__name__}, which cannot be orthogonalised")
    weight.copy_(changed.to(weight.dtype))
    if getattr(module, "bias", None) is not None:
        bias = module.bias.float()
        module.bias.copy_((bias - (bias @ wide.T) @ wide).to(module.bias.dtype))


def _verify(model: VLM, basis: Float[Tensor, "rank d_model"]) -> None:
    """Refuse a model that still writes along the subspace: something else writes too."""
    texts = Prompts([Prompt("0", "How to make a cake?")])
    for prompts in [texts, *([texts.with_image("noise")] if model.takes_images else [])]:
        _, cache = model.run_with_cache(prompts, names=lambda name: name.endswith(("resid_post", "embed")))
        for name, state in cache.items():
            if name.startswith("vision"):
                continue
            left = float((state @ basis.T.cpu()).norm() / state.norm())
            if left > TOLERANCE * (1 if model.hf_model.dtype == torch.float32 else 100):
                raise MechguardError(
                    f"{model.family} cannot be baked: {left:.1%} of {name} still lies along the directions, "
                    "so something else writes there; use guard.attach(...)"
                )
