"""The mathematics of steering: pure functions of tensors, no models, no files.

Notation of VLM-Guard (arXiv 2502.10486): V [rank, d_model] holds the safety steering directions of a
layer as orthonormal rows; h(Q) are the states that are changed, h(q) the state that supervises them.

    projection    h(Q) - h(Q) V^T V
    realignment   h(Q) + alpha * g * h(q) V^T V,    g = 1 if h(q) . v_1 > 0 else 0

Projecting first and realigning from h(q) exchanges the component of h(Q) along V for that of h(q).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def component(
    hidden: Float[Tensor, "*rows d_model"], basis: Float[Tensor, "rank d_model"]
) -> Float[Tensor, "*rows d_model"]:
    """The part of `hidden` that lies in the span of the orthonormal rows of `basis`: h V^T V."""
    return torch.nn.functional.linear(hidden, basis) @ basis


def project_out(
    hidden: Float[Tensor, "*rows d_model"],
    basis: Float[Tensor, "rank d_model"],
    strength: float = 1.0,
) -> Float[Tensor, "*rows d_model"]:
    """Remove what lies in the subspace: h - strength * h V^T V.

    `strength` has no unit: 0 leaves h alone, 1 makes it orthogonal to the basis, 2 reflects it.
    """
    return hidden - strength * component(hidden, basis)


def realign(
    hidden: Float[Tensor, "batch pos d_model"],
    query: Float[
        Tensor,
        (
            batch  # pos d_model
        ),
    ],
    basis: Float[Tensor, "rank d_model"],
    *,
    alpha: float,
    project: bool,
) -> Float[Tensor, "batch pos d_model"]:
    """Add alpha times the component of `query`, after removing that of `hidden` if `project`.

    The sum is taken in float32 and returned in the dtype of `hidden`. With `query = hidden`,
    `alpha = -1` and no projection this is `project_out`.
    """
    wide = basis.to(device=hidden.device, dtype=torch.float32)
    shift = alpha * component(query.to(wide), wide)
    if project:
        shift = shift - component(hidden.to(wide), wide)
    return (hidden.to(wide) + shift).to(hidden.dtype)


def gate_score(
    query: Float[Tensor, "batch d_model"],
    direction: Float[Tensor, " d_model"],
    center: Float[Tensor, " d_model"] | None = None,
) -> Float[Tensor, " batch"]:
    """How far each row lies on the harmful side: (h(q) - center) . v, in units of the hidden state.

    Without `center` this is the paper's gate; with the midpoint of the anchors it is centred.
    """
    wide = direction.to(device=query.device, dtype=torch.float32)
    scores = query.to(wide) @ wide
    return scores if center is None else scores - center.to(wide) @ wide


def apply_where(
    mask: Bool[Tensor, "batch pos"],
    changed: Float[Tensor, "batch pos d_model"],
    hidden: Float[Tensor, "batch pos d_model"],
) -> Float[Tensor, "batch pos d_model"]:
    """`changed` where the mask is true, `hidden` bit for bit elsewhere."""
    return torch.where(mask.unsqueeze(-1), changed, hidden)
