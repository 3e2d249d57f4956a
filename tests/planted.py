"""A tiny LLaVA whose circuit is known: one head writes the safety direction, another carries the picture.

Head 2 of layer 1 looks at all tokens alike, finds the harmful nouns and writes the direction. Head 1 of
layer 2 looks at all tokens alike, finds the picture and writes against the direction. Everything else writes
little.
"""

from __future__ import annotations

import tiny
import torch
from torch import Tensor

import mechguard as mg

WRITER, MOVER = (1, 2), (2, 1)
LAYER = 2
SIZE = 8
HARMFUL = ("bomb", "poison")


def token(word: str) -> int:
    return len(tiny.SPECIAL) + tiny.WORDS.index(word)


def model() -> tuple[mg.VLM, mg.Directions]:
    """The model and its safety direction, the same at every layer."""
    hf_model = tiny.llava()
    decoder, projector = hf_model.model.language_model, hf_model.model.multi_modal_projector
    random = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(32, 3, generator=random)).Q.T
    safety, harm, picture = basis
    with torch.no_grad():
        decoder.embed_tokens.weight.copy_(without(decoder.embed_tokens.weight, basis))
        for word in HARMFUL:
            decoder.embed_tokens.weight[token(word)] += 3 * harm
        projector.linear_2.weight.copy_(without(projector.linear_2.weight.T, basis).T)
        projector.linear_2.bias.copy_(2 * picture)
        for layer in decoder.layers:
            layer.self_attn.o_proj.weight *= 0.02
            layer.mlp.down_proj.weight *= 0.02
        plant(decoder, WRITER, harm, 8 * safety)
        plant(decoder, MOVER, picture, -6 * safety)
        hf_model.lm_head.weight *= 0.02
        hf_model.lm_head.weight[token("sorry")] += safety
        hf_model.lm_head.weight[token("sure")] -= safety
    vlm = mg.load(hf_model, processor=tiny.processor())
    return vlm, mg.Directions.from_tensor(safety.expand(3, 1, 32))


def without(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows with what lies along the basis taken out."""
    return rows - rows @ basis.T @ basis


def plant(decoder, head: tuple[int, int], reads: Tensor, writes: Tensor) -> None:
    """Make a head look everywhere alike, read one direction and write another."""
    attention = decoder.layers[head[0]].self_attn
    part = slice(head[1] * SIZE, (head[1] + 1) * SIZE)
    attention.q_proj.weight[part] = 0
    attention.v_proj.weight[part] = 0
    attention.v_proj.weight[part.start] = reads
    attention.o_proj.weight[:, part] = 0
    attention.o_proj.weight[:, part.start] = writes
