"""The modality gap: how far the states of a prompt move when an image enters.

X are the states of the text alone, Y those of the same prompts with an image, row by row. Every metric is a
function of the Gram matrices X X^T, Y Y^T and X Y^T and of weights over the prompts. A bootstrap resample is
one row of weights, so that all resamples of a metric cost a few products of small matrices.

Sources: centroid distance and cone, Liang et al., "Mind the Gap", NeurIPS 2022; RMG, Schrodi et al. 2024;
linear CKA, Kornblith et al. 2019; the shift's safety share in the manner of ShiftDC, arXiv 2502.13095.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from mechguard.activations import Activations
from mechguard.directions import Directions
from mechguard.errors import MechguardError
from mechguard.result import Result
from mechguard.statistics import percentile_interval, resample_indices, wilson_interval

OBSERVED, SWAPPED = "observed", "shuffled modality"
FOLDS = 5
TINY = 1e-12
Gram = Float[ndarray, "n n"]
Weights = Float[ndarray, "draws n"]  # rows that sum to one
Draws = Float[ndarray, " draws"]


@dataclass(frozen=True)
class Grams:
    """Inner products of the text states X and the image states Y of the same n prompts."""

    xx: Gram
    yy: Gram
    xy: Gram

    @classmethod
    def of(cls, x: Float[ndarray, "n d_model"], y: Float[ndarray, "n d_model"]) -> Grams:
        return cls(x @ x.T, y @ y.T, x @ y.T)

    def normalised(self) -> Grams:
        """The same for states scaled to unit length: cosines."""
        a = np.sqrt(np.diag(self.xx)).clip(TINY)
        b = np.sqrt(np.diag(self.yy)).clip(TINY)
        return Grams(self.xx / np.outer(a, a), self.yy / np.outer(b, b), self.xy / np.outer(a, b))

    @property
    def shift(self) -> Gram:
        """Inner products of the shifts h(x, image) - h(x)."""
        return self.xx + self.yy - self.xy - self.xy.T


def form(gram: Gram, weights: Weights) -> Draws:
    """w^T K w for every row of weights: the squared length (or inner product) of weighted means."""
    return np.einsum("rn,rn->r", weights @ gram, weights)


def centroid_distance(grams: Grams, weights: Weights) -> Draws:
    """||mu_X - mu_Y||, in units of the hidden state (or none, on unit-length states)."""
    return np.sqrt(form(grams.shift, weights).clip(0))


def cosine_gap(grams: Grams, weights: Weights) -> Draws:
    """1 - cos(mu_X, mu_Y)."""
    lengths = np.sqrt((form(grams.xx, weights) * form(grams.yy, weights)).clip(TINY))
    return np.asarray(1 - form(grams.xy, weights) / lengths)


def cone(cosines: Gram, weights: Weights) -> Draws:
    """Mean cosine between the states of two different prompts of one modality."""
    same = weights**2
    return np.asarray((form(cosines, weights) - same @ np.diag(cosines)) / (1 - same.sum(1)).clip(TINY))


def rmg(cosines: Grams, weights: Weights) -> Draws:
    """Relative modality gap with d = 1 - (cos + 1) / 2: the mean distance of a prompt's two states
    over itself plus the mean distance within the modalities; 1/2 when both are alike."""
    between = weights @ (1 - np.diag(cosines.xy)) / 2
    within = (2 - cone(cosines.xx, weights) - cone(cosines.yy, weights)) / 4
    return np.asarray(between / (between + within).clip(TINY))


def cka(grams: Grams, weights: Weights) -> Draws:
    """Linear CKA of the centred states, ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F); 1 when alike."""
    alignment = _centred_product(grams.xx, grams.yy, weights)
    own = _centred_product(grams.xx, grams.xx, weights) * _centred_product(grams.yy, grams.yy, weights)
    return np.asarray(alignment / np.sqrt(own.clip(TINY**2)))


def shift_norm_ratio(grams: Grams, weights: Weights) -> Draws:
    """Mean ||h(x, image) - h(x)|| over mean ||h(x)||."""
    shifts = weights @ np.sqrt(np.diag(grams.shift).clip(0))
    return np.asarray(shifts / (weights @ np.sqrt(np.diag(grams.xx))).clip(TINY))


def shift_consistency(grams: Grams, weights: Weights) -> Draws:
    """Mean cosine between each prompt's shift and the mean shift; 1 when all move alike."""
    return _consistency(grams.shift, weights, weights)


def _consistency(shift: Gram, signed: Weights, weights: Weights) -> Draws:
    """Mean cosine with the mean of shifts that are weighted and, in `signed`, perhaps turned round."""
    lengths = np.sqrt(np.diag(shift).clip(TINY))
    means = np.sqrt(form(shift, signed).clip(TINY))
    return np.asarray(np.einsum("rn,rn->r", signed @ shift, signed / lengths) / means)


def _centred_product(a: Gram, b: Gram, weights: Weights) -> Draws:
    """The weighted sum of products of two Gram matrices, each centred on its weighted mean."""
    crossed = np.einsum("rn,rn,rn->r", weights, weights @ a, weights @ b)
    return form(a * b, weights) - 2 * crossed + form(a, weights) * form(b, weights)


METRICS: dict[str, Callable[[Grams, Grams, Weights], Draws]] = {
    "centroid_distance": lambda raw, cosines, weights: centroid_distance(raw, weights),
    "centroid_distance_normalised": lambda raw, cosines, weights: centroid_distance(cosines, weights),
    "cosine_gap": lambda raw, cosines, weights: cosine_gap(raw, weights),
    "cone_text": lambda raw, cosines, weights: cone(cosines.xx, weights),
    "cone_image": lambda raw, cosines, weights: cone(cosines.yy, weights),
    "rmg": lambda raw, cosines, weights: rmg(cosines, weights),
    "cka": lambda raw, cosines, weights: cka(raw, weights),
    "shift_norm_ratio": lambda raw, cosines, weights: shift_norm_ratio(raw, weights),
    "shift_consistency": lambda raw, cosines, weights: shift_consistency(raw, weights),
}
# What exchanging a prompt's two states at random would leave, were there no gap: with signs s, the mean
# shift is that of s_i (y_i - x_i).
NULLS: dict[str, Callable[[Grams, Grams, Weights], Draws]] = {
    "centroid_distance": lambda raw, cosines, signed: centroid_distance(raw, signed),
    "centroid_distance_normalised": lambda raw, cosines, signed: centroid_distance(cosines, signed),
    "shift_consistency": lambda raw, cosines, signed: _consistency(raw.shift, signed, signed),
}


def measure_modality_gap(
    text: Activations,
    image: Activations,
    *,
    directions: Directions | None = None,
    nulls: bool = True,
    resamples: int = 200,
    seed: int = 0,
    split: str = "test",
) -> Result:
    """The gap between the states of the same prompts without and with an image, layer by layer.

    Args:
        text: states of the text alone (of the LLM, or of the VLM without a picture).
        image: states of the same prompts, in the same order, with a picture.
        directions: if given, also `safety_share`, the mean |shift . v_1| / ||shift||, beside the same
            share along random directions.
        nulls: also what the distances would be if text and image were exchanged at random per prompt.
        resamples: bootstrap resamples of prompts, and random exchanges.

    Returns:
        Rows layer x metric x direction ("observed" or the null), with 95% intervals over prompts.

    Raises:
        MechguardError: the two do not hold the same prompts at the same layers.
    """
    _check_same(text, image)
    rows: list[dict[str, Any]] = []
    for layer in text.layers:
        x, y = text.at(layer).double().numpy(), image.at(layer).double().numpy()
        found = _layer_rows(x, y, nulls, resamples, seed)
        if directions is not None:
            found += _share_rows(y - x, directions.at(layer)[0].numpy(), resamples, seed)
        rows += [{"layer": layer, **row} for row in found]
    n = len(text.prompts)
    for row in rows:
        row.setdefault("n", n)
        row.update(condition=f"{text.name} -> {image.name}", split=split)
    return Result.from_rows(rows, **image.about, text=text.name, seed=seed, resamples=resamples)


def _check_same(text: Activations, image: Activations) -> None:
    if [p.id for p in text.prompts] != [p.id for p in image.prompts]:
        raise MechguardError(
            f"{text!r} and {image!r} hold different prompts; collect the same prompts twice, the second "
            "time .with_image(...)"
        )
    if text.layers != image.layers or text.d_model != image.d_model:
        raise MechguardError(f"{text!r} and {image!r} do not hold the same layers")


def _layer_rows(
    x: Float[ndarray, "n d_model"],
    y: Float[ndarray, "n d_model"],
    nulls: bool,
    resamples: int,
    seed: int,
) -> list[dict[str, Any]]:
    n = len(x)
    raw = Grams.of(x, y)
    cosines = raw.normalised()
    once = np.full((1, n), 1 / n)
    counts = np.stack([np.bincount(rows, minlength=n) for rows in resample_indices(n, resamples, seed)])
    result = [
        _row(OBSERVED, name, float(metric(raw, cosines, once)[0]), metric(raw, cosines, counts / n))
        for name, metric in METRICS.items()
    ]
    result.append(_accuracy_row(x, y))
    if nulls:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (resamples, n))
        draws = {name: null(raw, cosines, signs / n) for name, null in NULLS.items()}
        result += [_row(SWAPPED, name, float(values.mean()), values) for name, values in draws.items()]
    return result


def _row(direction: str, metric: str, value: float, draws: Draws) -> dict[str, Any]:
    low, high = percentile_interval(draws)
    return {
        "direction": direction,
        "metric": metric,
        "value": value,
        "low": float(low),
        "high": float(high),
    }


def _accuracy_row(x: Float[ndarray, "n d_model"], y: Float[ndarray, "n d_model"]) -> dict[str, Any]:
    """How often a linear classifier tells the modality of a prompt it was not fitted on."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n = len(x)
    modality, prompt = np.repeat([0, 1], n), np.tile(np.arange(n), 2)
    predicted = cross_val_predict(
        make_pipeline(StandardScaler(), RidgeClassifier()),
        np.concatenate([x, y]),
        modality,
        groups=prompt,
        cv=GroupKFold(min(FOLDS, n)),
    )
    hits = int((predicted == modality).sum())
    low, high = wilson_interval(hits, 2 * n)
    row = {"direction": OBSERVED, "metric": "modality_accuracy", "value": hits / (2 * n)}
    return {**row, "low": low, "high": high, "n": 2 * n}


def _share_rows(
    shift: Float[ndarray, "n d_model"], direction: Float[ndarray, " d_model"], resamples: int, seed: int
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(resamples, shift.shape[1], generator=generator).double().numpy()
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    lengths = np.linalg.norm(shift, axis=1).clip(1e-12)
    shares = np.abs(shift @ direction) / lengths
    random = (np.abs(shift @ drawn.T) / lengths[:, None]).mean(0)
    draws = shares[resample_indices(len(shares), resamples, seed)].mean(1)
    return [
        _row(OBSERVED, "safety_share", float(shares.mean()), draws),
        _row("random direction", "safety_share", float(random.mean()), random),
    ]
