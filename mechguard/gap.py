"""The modality gap: how far the states of a prompt move when an image enters.

X are the states of the text alone, Y those of the same prompts with an image, row by row. Everything is
computed from the Gram matrices X X^T, Y Y^T and X Y^T, so that resampling prompts costs n^2, not n d_model.

Sources: centroid distance and cone, Liang et al., "Mind the Gap", NeurIPS 2022; RMG, Schrodi et al. 2024;
linear CKA, Kornblith et al. 2019; the shift's safety share in the manner of ShiftDC, arXiv 2502.13095.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from mechguard.activations import Activations
from mechguard.directions import Directions
from mechguard.errors import MechguardError
from mechguard.result import Result
from mechguard.statistics import percentile_interval, resample_indices, wilson_interval

OBSERVED, SWAPPED = "observed", "shuffled modality"
FOLDS = 5
Gram = Float[ndarray, "n n"]


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
        a = np.sqrt(np.diag(self.xx)).clip(1e-12)
        b = np.sqrt(np.diag(self.yy)).clip(1e-12)
        return Grams(self.xx / np.outer(a, a), self.yy / np.outer(b, b), self.xy / np.outer(a, b))

    def take(self, rows: Int[ndarray, " m"]) -> Grams:
        """The prompts in `rows`, with repeats."""
        grid = np.ix_(rows, rows)
        return Grams(self.xx[grid], self.yy[grid], self.xy[grid])

    def swapped(self, rows: ndarray) -> Grams:
        """The same prompts with text and image exchanged where `rows` is true."""
        both = np.block([[self.xx, self.xy], [self.xy.T, self.yy]])
        n = len(self.xx)
        first = np.where(rows, np.arange(n) + n, np.arange(n))
        second = np.where(rows, np.arange(n), np.arange(n) + n)
        return Grams(both[np.ix_(first, first)], both[np.ix_(second, second)], both[np.ix_(first, second)])


def centroid_distance(grams: Grams) -> float:
    """||mu_X - mu_Y||, in units of the hidden state (or none, on unit-length states)."""
    squared = grams.xx.mean() + grams.yy.mean() - 2 * grams.xy.mean()
    return float(np.sqrt(max(squared, 0.0)))


def cosine_gap(grams: Grams) -> float:
    """1 - cos(mu_X, mu_Y)."""
    return float(1 - grams.xy.mean() / np.sqrt(max(grams.xx.mean() * grams.yy.mean(), 1e-24)))


def cone(cosines: Gram, distinct: ndarray) -> float:
    """Mean cosine between the states of two different prompts of one modality."""
    return float(cosines[distinct].mean())


def rmg(cosines: Grams, distinct: ndarray) -> float:
    """Relative modality gap with d = 1 - (cos + 1) / 2: the mean distance of a prompt's two states
    over itself plus the mean distance within the modalities; 1/2 when both are alike."""
    between = float((1 - np.diag(cosines.xy)).mean()) / 2
    within = (1 - cone(cosines.xx, distinct) + 1 - cone(cosines.yy, distinct)) / 4
    return between / max(between + within, 1e-12)


def cka(grams: Grams) -> float:
    """Linear CKA of the centred states, ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F); 1 when alike."""
    x, y = _centred(grams.xx), _centred(grams.yy)
    return float((x * y).sum() / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-24))


def shift_norm_ratio(grams: Grams) -> float:
    """Mean ||h(x, image) - h(x)|| over mean ||h(x)||."""
    squared = np.diag(grams.xx) + np.diag(grams.yy) - 2 * np.diag(grams.xy)
    return float(np.sqrt(squared.clip(0)).mean() / np.sqrt(np.diag(grams.xx)).mean().clip(1e-12))


def shift_consistency(grams: Grams) -> float:
    """Mean cosine between each prompt's shift and the mean shift; 1 when all move alike."""
    inner = grams.xx + grams.yy - grams.xy - grams.xy.T
    lengths = np.sqrt(np.diag(inner).clip(1e-24))
    mean_length = np.sqrt(max(inner.mean(), 1e-24))
    return float((inner.mean(1) / lengths / mean_length).mean())


Metric = Callable[[Grams, Grams, ndarray], float]
METRICS: dict[str, Metric] = {
    "centroid_distance": lambda raw, cosines, distinct: centroid_distance(raw),
    "centroid_distance_normalised": lambda raw, cosines, distinct: centroid_distance(cosines),
    "cosine_gap": lambda raw, cosines, distinct: cosine_gap(raw),
    "cone_text": lambda raw, cosines, distinct: cone(cosines.xx, distinct),
    "cone_image": lambda raw, cosines, distinct: cone(cosines.yy, distinct),
    "rmg": lambda raw, cosines, distinct: rmg(cosines, distinct),
    "cka": lambda raw, cosines, distinct: cka(raw),
    "shift_norm_ratio": lambda raw, cosines, distinct: shift_norm_ratio(raw),
    "shift_consistency": lambda raw, cosines, distinct: shift_consistency(raw),
}
# What exchanging a prompt's two states at random would leave, were there no gap.
NULL_METRICS = ("centroid_distance", "centroid_distance_normalised", "cosine_gap", "shift_consistency")


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
    grams = Grams.of(x, y)
    observed = _all_metrics(grams, ~np.eye(len(x), dtype=bool))
    draws = [
        _all_metrics(grams.take(rows), rows[:, None] != rows[None, :])
        for rows in resample_indices(len(x), resamples, seed)
    ]
    result = [_row(OBSERVED, name, observed[name], [d[name] for d in draws]) for name in METRICS]
    result.append(_accuracy_row(x, y))
    if nulls:
        coins = np.random.default_rng(seed).integers(0, 2, (resamples, len(x))).astype(bool)
        null = [_all_metrics(grams.swapped(coin), ~np.eye(len(x), dtype=bool)) for coin in coins]
        for name in NULL_METRICS:
            values = [draw[name] for draw in null]
            result.append(_row(SWAPPED, name, float(np.mean(values)), values))
    return result


def _all_metrics(raw: Grams, distinct: ndarray) -> dict[str, float]:
    cosines = raw.normalised()
    return {name: metric(raw, cosines, distinct) for name, metric in METRICS.items()}


def _row(direction: str, metric: str, value: float, draws: list[float]) -> dict[str, Any]:
    low, high = percentile_interval(np.array(draws))
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
        _row(OBSERVED, "safety_share", float(shares.mean()), draws.tolist()),
        _row("random direction", "safety_share", float(random.mean()), random.tolist()),
    ]


def _centred(gram: Gram) -> Gram:
    rows = gram.mean(0, keepdims=True)
    return np.asarray(gram - rows - rows.T + gram.mean())
