"""Maps: the states of several conditions in two dimensions, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechguard.activations import Activations
from mechguard.errors import MechguardError
from mechguard.result import Result
from mechguard.storage import versions


def map_states(conditions: Sequence[Activations]) -> Result:
    """Principal components of the pooled states of every layer.

    The axes of a layer are fitted on all conditions together, so that a gap between them is seen; each axis
    is turned so that it correlates positively with that of the layer before, where both see the same rows.

    Args:
        conditions: states of the same layers, e.g. of the text alone and with a blank image.

    Returns:
        One row per layer x prompt x condition: `x`, `y`, `label`, `id`, `text`, and `explained`, the share
        of the layer's variance in both axes.
    """
    if not conditions or any(c.layers != conditions[0].layers for c in conditions):
        raise MechguardError("a map needs at least one set of states, all of the same layers")
    tables = []
    before: Float[Tensor, "row axis"] | None = None
    for layer in conditions[0].layers:
        pooled = torch.cat([activations.at(layer) for activations in conditions])
        points, explained = principal_plane(pooled)
        if before is not None:
            points = points * torch.where((points * before).sum(0) < 0, -1.0, 1.0)
        before = points
        tables.append(_table(conditions, layer, points, explained))
    about = {**conditions[0].about, "conditions": [c.name for c in conditions]}
    return Result(pd.concat(tables, ignore_index=True), {**about, "versions": versions()})


def principal_plane(states: Float[Tensor, "row d_model"]) -> tuple[Float[Tensor, "row axis"], float]:
    """Coordinates on the first two principal components, and their share of the variance."""
    centred = states - states.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    total = float((s**2).sum()) or 1.0
    return u[:, :2] * s[:2], float((s[:2] ** 2).sum()) / total


def _table(
    conditions: Sequence[Activations],
    layer: int,
    points: Float[Tensor, "row axis"],
    explained: float,
) -> pd.DataFrame:
    rows = [
        {"condition": activations.name, "label": p.label, "id": p.id, "text": p.text}
        for activations in conditions
        for p in activations.prompts
    ]
    table = pd.DataFrame(rows)
    table.insert(0, "layer", layer)
    return table.assign(x=points[:, 0].numpy().round(4), y=points[:, 1].numpy().round(4), explained=explained)
