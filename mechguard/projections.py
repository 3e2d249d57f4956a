"""Projections: every prompt, and every token of a prompt, on the first direction of each layer.

    s = h . v_1, in the units of the hidden states; harmful is the positive side

What a gate sees, before anything is averaged over prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isqrt

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechguard.activations import Activations
from mechguard.directions import Directions
from mechguard.errors import MechguardError
from mechguard.models import VLM
from mechguard.positions import read_row
from mechguard.prompts import Prompt, Prompts
from mechguard.result import Result
from mechguard.storage import versions
from mechguard.thumbnails import draw_thumbnail

PICTURE_SIDE = 224  # pixels at which a token view shows its picture


def gate_thresholds(directions: Directions, layers: Sequence[int]) -> dict[str, Float[Tensor, " layer"]]:
    """Above which projection a gate opens: "sign" at zero, "midpoint" halfway between the anchors' means."""
    thresholds = {"sign": torch.zeros(len(layers))}
    if directions.midpoints is not None:
        rows = [directions.layers.index(layer) for layer in layers]
        thresholds["midpoint"] = (directions.midpoints[rows] * directions.data[rows, 0]).sum(-1)
    return thresholds


def project_states(directions: Directions, states: Sequence[Activations], *, split: str = "test") -> Result:
    """The projection of every prompt's state on the first direction of its layer, under every condition.

    Args:
        directions: fitted elsewhere, e.g. the LLM's safety steering directions.
        states: of the same layers, one set per condition.

    Returns:
        Rows layer x condition x prompt with metric "projection" (`value`), and rows layer x gate with metric
        "gate_threshold". `scaled` is the same in standard deviations of the layer's projections from the
        midpoint gate (from their mean, where the directions have no midpoints), so that layers compare.

    Raises:
        MechguardError: no states, or of other layers than each other.
    """
    if not states or any(found.layers != states[0].layers for found in states):
        raise MechguardError("projections need at least one set of states, all of the same layers")
    layers = states[0].layers
    thresholds = gate_thresholds(directions, layers)
    scores = [directions.project(found).numpy() for found in states]
    pooled = np.concatenate(scores, axis=1)
    centre = thresholds["midpoint"].numpy() if "midpoint" in thresholds else pooled.mean(1)
    spread = pooled.std(1).clip(1e-12)
    tables = []
    for row, layer in enumerate(layers):
        found = [_rows_of(one, score[row]) for one, score in zip(states, scores, strict=True)]
        gates = {"gate": list(thresholds), "value": [float(values[row]) for values in thresholds.values()]}
        drawn = pd.DataFrame(gates).assign(metric="gate_threshold")
        table = pd.concat([*found, drawn], ignore_index=True)
        table.insert(0, "layer", layer)
        tables.append(table.assign(scaled=((table["value"] - centre[row]) / spread[row]).round(4)))
    table = pd.concat(tables, ignore_index=True).assign(direction=directions.name, split=split)
    return Result(table, {**states[0].about, "directions": directions.name, "versions": versions()})


def project_tokens(model: VLM, prompts: Prompts, directions: Directions, *, split: str = "test") -> Result:
    """The projection of every token and every image patch on the first direction of each layer.

    One pass for each prompt: meant for a few prompts.

    Args:
        prompts: with or without a picture, also mixed: `few + few.with_image("blank")`.

    Returns:
        Rows prompt x layer x position: `token`, `is_image`, `patch_row` and `patch_column` (none for words,
        and where a picture's tokens form no square), `value`. `about["pictures"]` holds the pictures.

    Raises:
        MechguardError: directions of another width or without some layer of the model.
    """
    if directions.d_model != model.d_model:
        raise MechguardError(
            f"directions of d_model {directions.d_model} do not fit {model.name} of d_model {model.d_model}"
        )
    sent = model.prepare(prompts)
    tables = [_project_prompt(model, prompt, directions) for prompt in sent]
    table = pd.concat(tables, ignore_index=True)
    table = table.assign(metric="projection", direction=directions.name, split=split)
    pictures = {
        _picture_key(prompt): draw_thumbnail(prompt.pictures((PICTURE_SIDE,) * 2)[0], side=PICTURE_SIDE)
        for prompt in sent
        if prompt.images
    }
    about = {"model": model.name, "fingerprint": model.fingerprint, "directions": directions.name}
    return Result(table, {**about, "pictures": pictures, "versions": versions()})


def _rows_of(states: Activations, scores: Float[np.ndarray, " prompt"]) -> pd.DataFrame:
    facts = {
        "condition": states.name,
        "metric": "projection",
        "id": [prompt.id for prompt in states.prompts],
        "label": states.prompts.labels,
        "value": scores.astype(float).round(5),
    }
    return pd.DataFrame(facts)


def _project_prompt(model: VLM, prompt: Prompt, directions: Directions) -> pd.DataFrame:
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.n_layers)]
    _, cache = model.run_with_cache([prompt], names=names)
    row = read_row(model, prompt, cache.tokens[0], cache.is_image[0])
    places = list(_patch_places(row.is_image.tolist()))
    known = {
        "id": prompt.id,
        "label": prompt.label,
        "condition": " ".join([model.view, prompt.condition]),
        "pos": range(len(row.words)),
        "token": row.words,
        "is_image": row.is_image.tolist(),
        "patch_row": [place[0] for place in places],
        "patch_column": [place[1] for place in places],
        "picture": _picture_key(prompt) if prompt.images else None,
    }
    tables = []
    for layer, name in enumerate(names):
        if name in cache:
            scores = cache[name][0] @ directions.at(layer)[0]
            tables.append(pd.DataFrame({**known, "layer": layer, "value": scores.numpy().astype(float)}))
    return pd.concat(tables, ignore_index=True).round({"value": 5})


def _patch_places(is_image: Sequence[bool]) -> Iterator[tuple[float, float]]:
    """Row and column of every image token; none for words, and where the tokens form no square."""
    count = sum(is_image)
    extra = count - isqrt(count) ** 2  # a vision tower's class token stands first
    side = isqrt(count) if extra in (0, 1) else 0
    seen = -extra
    for image in is_image:
        known = image and side and seen >= 0
        yield divmod(seen, side) if known else (float("nan"), float("nan"))
        seen += image


def _picture_key(prompt: Prompt) -> str:
    """Pictures that a condition generates for all prompts alike share a name."""
    word = prompt.condition
    return word if word in ("blank", "white", "grey", "black") else f"{word} {prompt.id}"
