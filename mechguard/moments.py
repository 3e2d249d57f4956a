"""Moments: directions from sums over states that are read piece by piece.

A layer of a large store need not fit into memory. Means and, for the methods that need them, products of
d_model x d_model are added up in float64 while the pieces go by; what is fitted from them is what the same
method gives on all states at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mechguard.shards import StoredStates

PIECE = 4096  # prompts of either label that are held at once
Means = tuple[Float64[Tensor, " d_model"], Float64[Tensor, " d_model"]]


@dataclass(frozen=True)
class Layer:
    """One layer of the harmful and of the harmless states of a store, pair by pair where they are paired."""

    harmful: StoredStates
    harmless: StoredStates
    index: int

    def pieces(self, states: StoredStates) -> Iterator[Float64[Tensor, "prompt d_model"]]:
        """The states of one label, piece by piece."""
        for start in range(0, states.shape[1], PIECE):
            yield states.chosen(1, slice(start, start + PIECE)).at(self.index).double()

    def differences(
        self,
    ) -> Iterator[tuple[Float64[Tensor, "pair d_model"], Float64[Tensor, "pair d_model"]]]:
        """The harmful states of some pairs, and the harmless ones."""
        yield from zip(self.pieces(self.harmful), self.pieces(self.harmless), strict=True)


def can_stream(method: str) -> bool:
    """Whether a method can be fitted from sums."""
    return method in ("svd", "pca", "mean_difference", "lda")


def fit_layer(layer: Layer, method: str, rank: int) -> tuple[Float[Tensor, "rank d_model"], Means]:
    """The directions of one layer and the two means; one pass over its states, two for "lda"."""
    if method == "mean_difference":
        means = _mean(layer, layer.harmful), _mean(layer, layer.harmless)
        basis = (means[0] - means[1]).unsqueeze(0)
    elif method == "lda":
        means = _mean(layer, layer.harmful), _mean(layer, layer.harmless)
        basis = _discriminant(layer, means).unsqueeze(0)
    else:
        products, means = _products(layer)
        shift = means[0] - means[1]
        if method == "pca":
            products = products - layer.harmful.shape[1] * torch.outer(shift, shift)
        basis = _leading(products, rank)
    return torch.nn.functional.normalize(basis, dim=-1).float(), means


def _mean(layer: Layer, states: StoredStates) -> Float64[Tensor, " d_model"]:
    total = torch.zeros(states.shape[2], dtype=torch.float64)
    for piece in layer.pieces(states):
        total += piece.sum(0)
    return total / states.shape[1]


def _products(layer: Layer) -> tuple[Float64[Tensor, "d_model d_model"], Means]:
    """The sum of the outer products of the differences, and the means."""
    width, n = layer.harmful.shape[2], layer.harmful.shape[1]
    products = torch.zeros(width, width, dtype=torch.float64)
    sums = torch.zeros(2, width, dtype=torch.float64)
    for bad, good in layer.differences():
        difference = bad - good
        products.addmm_(difference.T, difference)
        sums += torch.stack([bad.sum(0), good.sum(0)])
    return products, (sums[0] / n, sums[1] / n)


def _leading(products: Float64[Tensor, "d_model d_model"], rank: int) -> Float64[Tensor, "rank d_model"]:
    """The eigenvectors of the largest eigenvalues: the right singular vectors of the differences."""
    from scipy.linalg import eigh

    width = len(products)
    _, vectors = eigh(products.numpy(), subset_by_index=[width - rank, width - 1])
    return torch.as_tensor(vectors.T[::-1].copy())


def _discriminant(layer: Layer, means: Means) -> Float64[Tensor, " d_model"]:
    """Fisher's direction with the covariance that scikit-learn's LDA shrinks (`shrinkage="auto"`)."""
    counts = layer.harmful.shape[1], layer.harmless.shape[1]
    covariance = sum(
        count / sum(counts) * _shrunk(layer, states, mean)
        for count, states, mean in zip(counts, (layer.harmful, layer.harmless), means, strict=True)
    )
    weights = np.linalg.lstsq(np.asarray(covariance), (means[0] - means[1]).numpy(), rcond=None)[0]
    return torch.as_tensor(weights)


def _shrunk(
    layer: Layer, states: StoredStates, mean: Float64[Tensor, " d_model"]
) -> Float64[Tensor, "d_model d_model"]:
    """Ledoit and Wolf's covariance of one label, on standardised features, scaled back.

    Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices".
    """
    n, width = states.shape[1], states.shape[2]
    products = torch.zeros(width, width, dtype=torch.float64)
    for piece in layer.pieces(states):
        products.addmm_((piece - mean).T, piece - mean)
    covariance = products / n
    scale = covariance.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    standard = covariance / torch.outer(scale, scale)
    fourth = sum(float(((((piece - mean) / scale) ** 2).sum(1) ** 2).sum()) for piece in layer.pieces(states))
    level = float(standard.diagonal().mean())
    square = float((standard**2).sum())
    spread = (square - 2 * level * float(standard.diagonal().sum()) + width * level**2) / width
    noise = min((fourth / n - square) / (n * width), spread)
    shrinkage = noise / spread if noise > 0 else 0.0
    target = shrinkage * level * torch.eye(width, dtype=torch.float64)
    return ((1 - shrinkage) * standard + target) * torch.outer(scale, scale)
