"""Maps: the states of several conditions in two or three dimensions, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechguard.activations import Activations
from mechguard.errors import MechguardError
from mechguard.prompts import Prompts
from mechguard.result import Result
from mechguard.storage import versions

AXES = ("x", "y", "z")
MOST_PICTURES = 300  # that a map carries along for its hover boxes
Method = Literal["pca", "lda"]
Points = Float[Tensor, "row axis"]


def map_states(
    conditions: Sequence[Activations], *, method: Method = "pca", pictures: bool = True, seed: int = 0
) -> Result:
    """The states of every layer on three axes, those of all conditions together.

    Each axis is turned so that it correlates positively with that of the layer before.

    Args:
        conditions: states of the same layers, e.g. of the text alone and with a blank image.
        method: "pca", the principal components of the pooled states, or "lda", the axes along which the
            groups (label x condition) differ most for their spread. LDA finds a separation in any set of
            prompts, so it is fitted on one half of them and the map holds the other half only.
        pictures: whether thumbnails of the prompts' pictures come along, in `about`.
        seed: fixes the halves of "lda".

    Returns:
        One row per layer x prompt x condition: `x`, `y`, `z`, `label`, `id`, `text`, `picture` (a key of
        `about["pictures"]`), and `explained`, the share of the layer's variance ("pca": in x and y; "lda":
        of the variance between groups).

    Raises:
        MechguardError: no states, of other layers than each other, or an unknown method.
    """
    if not conditions or any(c.layers != conditions[0].layers for c in conditions):
        raise MechguardError("a map needs at least one set of states, all of the same layers")
    if method not in get_args(Method):
        raise MechguardError(f"method {method!r} is not known; use one of {', '.join(get_args(Method))}")
    fitted, shown = _halves(conditions, seed) if method == "lda" else (conditions, conditions)
    place = AXES_OF[method]
    described, thumbnails = _describe(shown, pictures)
    tables = []
    before: Points | None = None
    for layer in conditions[0].layers:
        points, explained = place(fitted, shown, layer)
        if before is not None:
            points = points * torch.where((points * before).sum(0) < 0, -1.0, 1.0)
        before = points
        table = described.assign(explained=explained)
        for index, axis in enumerate(AXES):
            known = index < points.shape[1]
            table[axis] = points[:, index].numpy().round(4) if known else 0.0
        table.insert(0, "layer", layer)
        tables.append(table)
    about = {**conditions[0].about, "method": method, "conditions": [c.name for c in conditions]}
    about |= {"pictures": thumbnails, "versions": versions()}
    return Result(pd.concat(tables, ignore_index=True), about)


def _principal(
    fitted: Sequence[Activations], shown: Sequence[Activations], layer: int
) -> tuple[Points, float]:
    """Coordinates on the first principal components, and the first two's share of the variance."""
    states = torch.cat([found.at(layer) for found in shown])
    u, s, _ = torch.linalg.svd(states - states.mean(0), full_matrices=False)
    total = float((s**2).sum()) or 1.0
    return u[:, :3] * s[:3], float((s[:2] ** 2).sum()) / total


def _discriminant(
    fitted: Sequence[Activations], shown: Sequence[Activations], layer: int
) -> tuple[Points, float]:
    """Coordinates on the axes of a shrunk LDA of label x condition, of prompts it was not fitted on."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    groups = [f"{found.name} {label}" for found in fitted for label in found.prompts.labels]
    model = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto")
    model.fit(torch.cat([found.at(layer) for found in fitted]).double().numpy(), groups)
    points = model.transform(torch.cat([found.at(layer) for found in shown]).double().numpy())[:, :3]
    return torch.from_numpy(points).float(), float(model.explained_variance_ratio_[:2].sum())


AXES_OF: dict[str, Callable[[Sequence[Activations], Sequence[Activations], int], tuple[Points, float]]] = {
    "pca": _principal,
    "lda": _discriminant,
}


def _halves(conditions: Sequence[Activations], seed: int) -> tuple[list[Activations], list[Activations]]:
    """The states of one half of the prompts, and those of the other."""
    second = {prompt.id for prompt in conditions[0].prompts.split(test=0.5, seed=seed)[1]}
    halves: tuple[list[Activations], list[Activations]] = ([], [])
    for found in conditions:
        inside = [prompt.id in second for prompt in found.prompts]
        for half, wanted in zip(halves, (False, True), strict=True):
            rows = torch.tensor([one == wanted for one in inside])
            kept = [prompt for prompt, one in zip(found.prompts, inside, strict=True) if one == wanted]
            prompts = Prompts(kept, name=found.prompts.name)
            half.append(Activations(found.data[:, rows], found.layers, prompts, found.about))
    return halves


def _describe(conditions: Sequence[Activations], pictures: bool) -> tuple[pd.DataFrame, dict[str, str]]:
    """What is known of every point, and each distinct picture once, as long as there are not too many."""
    drawn: dict[str, str] = {}
    rows = []
    for activations in conditions:
        found = activations.prompts.thumbnails() if pictures else [None] * len(activations.prompts)
        for prompt, uri in zip(activations.prompts, found, strict=True):
            if uri is not None and uri not in drawn and len(drawn) < MOST_PICTURES:
                drawn[uri] = f"p{len(drawn)}"
            known = {"condition": activations.name, "label": prompt.label, "id": prompt.id}
            rows.append({**known, "text": prompt.text, "picture": drawn.get(uri) if uri else None})
    return pd.DataFrame(rows), {key: uri for uri, key in drawn.items()}
