"""Attention patterns and values of every head, for any family that calls transformers' attention interface.

While `watched` runs, the decoder's attention is computed by `_attend` below, which is softmax attention
written out, and which can keep chosen positions from seeing others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from mechguard.errors import MechguardError
from mechguard.models import VLM

NAME = "mechguard_watched"


@dataclass(eq=False)
class Watch:
    """What the last query of every layer looked at.

    Attributes:
        layers: the layer of each attention module, by its identity.
        blocked: for some layers, which keys each query may not see.
        patterns: by layer, the share of attention on each position, from the last one.
        values: by layer, what each head reads there.
    """

    layers: dict[int, int]
    blocked: Mapping[int, Bool[Tensor, "batch query key"]] = field(default_factory=dict)
    patterns: dict[int, Float[Tensor, "batch head key"]] = field(default_factory=dict)
    values: dict[int, Float[Tensor, "batch head key d_head"]] = field(default_factory=dict)


_WATCHES: list[Watch] = []  # the innermost `watched` block is the last one


@contextmanager
def watched(
    model: VLM, *, blocked: Mapping[int, Bool[Tensor, "batch query key"]] | None = None
) -> Iterator[Watch]:
    """Watch the attention of every decoder layer, and hide some positions from others.

    Args:
        blocked: by layer, true where a query must not see a key.
    """
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    decoder = model.hf_model.get_submodule(model.parts.decoder)
    layers = model.hf_model.get_submodule(model.parts.layers)
    modules = {}
    for number in range(model.n_layers):
        attention = model.parts.head_writer(layers[number])[0]
        if attention is not None:
            modules[id(getattr(layers[number], attention))] = number
    homes = [decoder, *decoder.modules()]
    configs = {id(module.config): module.config for module in homes if hasattr(module, "config")}
    text_config = model.hf_model.config.get_text_config()
    configs[id(text_config)] = text_config
    before = [(config, config._attn_implementation) for config in configs.values()]
    watch = Watch(modules, blocked or {})
    _WATCHES.append(watch)
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME  # the setter would also reach a vision tower
        yield watch
    finally:
        _WATCHES.pop()
        for config, name in before:
            config._attn_implementation_internal = name


def _attend(
    module: nn.Module,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch group key d_head"],
    value: Float[Tensor, "batch group key d_head"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch query head d_head"], Float[Tensor, "batch head query key"]]:
    if options.get("s_aux") is not None:
        raise MechguardError("attention sinks are not supported; the pattern would not sum to one")
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = _masked(scores, attention_mask, causal=getattr(module, "is_causal", True))
    watch = _WATCHES[-1]
    layer = watch.layers.get(id(module))
    if layer is not None and layer in watch.blocked:
        scores = scores.masked_fill(watch.blocked[layer].unsqueeze(1), torch.finfo(scores.dtype).min)
    pattern = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if layer is not None:
        watch.patterns[layer], watch.values[layer] = pattern[:, :, -1].detach(), value.detach()
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


def _masked(scores: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    if mask is not None:
        allowed = mask[..., : scores.shape[-1]]
        if allowed.dtype == torch.bool:
            return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        return scores + allowed
    if not causal or scores.shape[-2] == 1:
        return scores
    queries, keys = scores.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
    return scores.masked_fill(future, torch.finfo(scores.dtype).min)
