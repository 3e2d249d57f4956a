"""Whether the direction of harm survives an image: every direction, applied to the states of every condition.

A matrix layer x fitted on x tested on. Three numbers per layer tell a direction that *moved* from one that
*collapsed*, all of the same prompts, as paired differences:

    auroc_change, LLM's direction, image - text     below 0: this direction lost its grip
    auroc_change, own direction, image - text       below 0: no direction tells as well as one did in text
    auroc_recovered, own - LLM's direction, image   above 0: another direction still tells

Angles are between the directions themselves: cosines and principal angles of what was fitted under either
condition, and the share of the differences' energy that the subspace holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import linalg, special

from mechguard.activations import Activations
from mechguard.directions import Directions
from mechguard.errors import MechguardError
from mechguard.overlaps import warn_of_fitted
from mechguard.result import Result
from mechguard.separability import (
    OWN,
    RANDOM,
    SHUFFLED,
    Half,
    measure_halves,
    name_clusters,
    own_halves,
    project_halves,
)
from mechguard.statistics import (
    auroc,
    bootstrap_draws,
    dprime,
    expanded_interval,
    expanded_t,
    percentile_interval,
    permuted_measure,
    resample_weights,
    simultaneous_interval,
)

MEASURED = {"auroc": auroc, "dprime": dprime}
TINY = 1e-6  # how near to 0 or 1 log-odds are taken
CHANGE, RECOVERED = "auroc_change", "auroc_recovered"
Bases = Float[ndarray, "draws rank d_model"]
Band = tuple[Float[ndarray, " layer"], Float[ndarray, " layer"], Float[ndarray, " layer"]]


def measure_transfer(
    states: Sequence[Activations],
    directions: Sequence[Directions] = (),
    *,
    clusters: str | Sequence[Any] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    split: str = "test",
) -> Result:
    """How well each direction separates harmful from harmless under each condition.

    Args:
        states: the same prompts under several conditions; the first, the text alone, is what the others are
            compared with.
        directions: fitted on other prompts, e.g. on anchors as the LLM and the VLM see them without and with
            a picture; the first is the LLM's safety steering direction. Without any, a mean difference is
            fitted on each of `states`, held out by pair.
        clusters: as in `measure_separability`.

    Returns:
        Rows layer x `direction` (fitted on) x `condition` (tested on): `auroc` and `dprime` with pointwise
        95% intervals, their shuffled-label null, `auroc_change` against the first condition and
        `auroc_recovered`, the own direction over the first one. The intervals of these two hold for all
        layers at once, so that a layer may be picked because it stands out.

    Raises:
        MechguardError: other prompts or layers in some condition, or a single label.
    """
    if len(states) < 2:
        raise MechguardError("a transfer needs the states of two conditions or more, the text first")
    for activations in states:
        activations.groups()
        for fitted in directions:
            warn_of_fitted(activations.prompts, {fitted.name: fitted.about})
    names = name_clusters(states[0].prompts, clusters)
    draws: dict[str, Any] = {"resamples": resamples, "seed": seed}
    lines = _lines(states, directions, seed)
    rows: list[dict[str, Any]] = []
    for (direction, place), halves in lines.items():
        here = {"condition": states[place].name, "direction": direction}
        for metric, measure in MEASURED.items():
            band = measure_halves(measure, halves, names, **draws)
            rows += _rows(states[0].layers, band, **here, metric=metric)
        if place:
            before = lines[direction, 0]
            change = _contrast(before, halves, names, **draws)
            rows += _rows(states[0].layers, change, **here, metric=CHANGE, against=states[0].name)
    first = next(iter(lines))[0]
    for place, activations in enumerate(states):
        here = {"condition": activations.name}
        if OWN in {name for name, _ in lines}:
            own = lines[OWN, place]
            given = [_restricted(lines[first, place][0], half) for half in own]
            recovered = _contrast(given, own, names, **draws)
            rows += _rows(states[0].layers, recovered, **here, direction=OWN, metric=RECOVERED, against=first)
        rows += _null_rows(states[0].layers, lines[first, place][0], here, **draws)
    for row in rows:
        row.update(n=len(states[0].prompts), split=split)
    about = {**states[0].about, "conditions": [one.name for one in states], "first": first}
    return Result.from_rows(rows, **about, seed=seed, resamples=resamples)


def measure_angles(
    states: Sequence[Activations],
    *,
    rank: int = 1,
    resamples: int = 200,
    seed: int = 0,
    split: str = "fitted",
) -> Result:
    """The angles between the safety steering subspaces of several conditions, with their noise taken out.

    Fitted on each condition: the first `rank` right singular vectors of the paired differences, as the SSD.
    The column `value` is the plain estimate; noise turns fitted subspaces apart, so the intervals are
    corrected for it by the bootstrap over pairs (on the cosines, squared for the angles) and widened to
    hold `value`.

    Args:
        states: the same pairs under several conditions.
        rank: how many directions per layer.

    Returns:
        Rows layer x `direction` (of one condition) x `condition` (of another): `cosine` of the first
        directions and `principal_angle_1`, `_2`, ... in degrees, smallest first; and `subspace_energy` of
        each, the share of the differences' sum of squares in the first `rank` directions. The null,
        `direction` "random", is of random subspaces of equal rank.

    Raises:
        MechguardError: other pairs or layers in some condition, no pairs, or a rank that does not exist.
    """
    if len(states) < 2:
        raise MechguardError("angles need the states of two conditions or more")
    differences = [activations.differences().double().numpy() for activations in states]
    pairs, width = differences[0].shape[1:]
    _check_alike(states)
    if not 1 <= rank <= min(pairs, width):
        raise MechguardError(f"rank {rank} does not exist on {pairs} pairs; use 1 to {min(pairs, width)}")
    rows: list[dict[str, Any]] = []
    for index, layer in enumerate(states[0].layers):
        found = [_resampled_bases(one[index], rank, resamples, seed) for one in differences]
        for name, (_, energies) in zip((s.name for s in states), found, strict=True):
            here = {"condition": name, "direction": name, "layer": layer}
            rows.append({**here, "metric": "subspace_energy", **_corrected_share(energies, pairs)})
        for (one, a), (two, b) in combinations(zip((s.name for s in states), found, strict=True), 2):
            here = {"condition": two, "direction": one, "layer": layer}
            rows += [{**here, **row} for row in _angle_rows(a[0], b[0], pairs)]
        rows += [
            {"condition": RANDOM, "direction": RANDOM, "layer": layer, **row}
            for row in _random_rows(rank, width, resamples, seed)
        ]
    for row in rows:
        row.update(n=pairs, split=split)
    return Result.from_rows(rows, **states[0].about, rank=rank, seed=seed, resamples=resamples)


def _lines(
    states: Sequence[Activations], directions: Sequence[Directions], seed: int
) -> dict[tuple[str, int], list[Half]]:
    """The projections of every condition (by its place) along every direction."""
    found: dict[tuple[str, int], list[Half]] = {}
    for direction in directions:
        for place, activations in enumerate(states):
            found[direction.name, place] = project_halves(activations, direction)
    if not directions:
        for fitted in states:
            for place, activations in enumerate(states):
                halves = own_halves(activations, fitted=fitted, seed=seed)
                found[f"{fitted.name}, held out", place] = halves
        return found
    _check_alike(states)
    for place, activations in enumerate(states):
        found[OWN, place] = own_halves(activations, seed=seed)
    return found


def _check_alike(states: Sequence[Activations]) -> None:
    for activations in states[1:]:
        same = [p.id for p in activations.prompts] == [p.id for p in states[0].prompts]
        if not same or activations.layers != states[0].layers:
            raise MechguardError(
                f"{states[0]!r} and {activations!r} hold different prompts or layers; collect the same "
                f"prompts "
                "under each condition"
            )


def _restricted(whole: Half, half: Half) -> Half:
    """The same scores for the prompts of one half only."""
    scores = whole.scores[:, np.searchsorted(whole.rows, half.rows)]
    return Half(half.rows, scores, half.harmful, half.harmless, half.paired)


def _contrast(
    first: list[Half], second: list[Half], clusters: list[str] | None, *, resamples: int, seed: int
) -> Band:
    """AUROC of the second less that of the first, of the same prompts and resamples; the mean over halves."""
    bands = []
    for before, after in zip(first, second, strict=True):
        options: dict[str, Any] = {
            "paired": before.paired,
            "resamples": resamples,
            "seed": seed,
            "clusters": before.clusters(clusters),
        }
        draws = [bootstrap_draws(auroc, *half.groups, **options) for half in (after, before)]
        value = auroc(*after.groups) - auroc(*before.groups)
        low, high = simultaneous_interval(value, draws[0][0] - draws[1][0], draws[0][1])
        bands.append((value, low, high))
    value, low, high = np.mean(bands, axis=0)
    return value, low, high


def _null_rows(
    layers: list[int], half: Half, here: dict[str, Any], *, resamples: int, seed: int
) -> Iterator[dict[str, Any]]:
    draws = permuted_measure(auroc, *half.groups, permutations=resamples, seed=seed, paired=half.paired)
    band = (draws.mean(-1), *percentile_interval(draws))
    yield from _rows(layers, band, **here, direction=SHUFFLED, metric="auroc")


def _rows(layers: list[int], band: Band, **here: Any) -> list[dict[str, Any]]:
    return [
        {"layer": layer, **here, "value": float(value), "low": float(low), "high": float(high)}
        for layer, value, low, high in zip(layers, *band, strict=True)
    ]


def _resampled_bases(
    differences: Float[ndarray, "pair d_model"], rank: int, resamples: int, seed: int
) -> tuple[Bases, Float[ndarray, " draws"]]:
    """Bases of the differences as they are and of resamples of pairs, harmful positive, and their energies.

    All rows lie in the span of one singular value decomposition, so each resample is a small problem there.
    """
    u, s, vt = np.linalg.svd(differences, full_matrices=False)
    inside = u * s
    pairs = len(differences)
    bases, energies = [], []
    blocks = [np.ones((1, pairs)), *resample_weights(np.arange(pairs), resamples, seed)]
    for weights in blocks:
        moments = np.einsum("rn,na,nb->rab", weights, inside, inside, optimize=True)
        found = [linalg.eigh(one, subset_by_index=(len(one) - rank, len(one) - 1)) for one in moments]
        values, vectors = (np.stack(parts) for parts in zip(*found, strict=True))
        top = vectors[:, :, ::-1].transpose(0, 2, 1)
        gaps = weights @ inside
        signs = np.where(np.einsum("rkn,rn->rk", top, gaps) < 0, -1.0, 1.0)
        bases.append(top * signs[:, :, None] @ vt)
        total = np.maximum(np.trace(moments, axis1=1, axis2=2), np.finfo(float).tiny)
        energies.append(values.sum(1) / total)
    return np.concatenate(bases), np.concatenate(energies)


def _angle_rows(first: Bases, second: Bases, pairs: int) -> Iterator[dict[str, Any]]:
    cosines = np.einsum("rd,rd->r", first[:, 0], second[:, 0])
    yield {"metric": "cosine", **_corrected(cosines, pairs)}
    squares = principal_cosines(first, second) ** 2
    for number, draws in enumerate(squares.T, 1):
        yield {"metric": f"principal_angle_{number}", **_corrected_share(draws, pairs, _degrees)}


def principal_cosines(first: Bases, second: Bases) -> Float[ndarray, "draws rank"]:
    """Cosines of the principal angles between subspaces given by orthonormal rows, largest first."""
    products = np.einsum("rad,rbd->rab", first, second)
    return np.linalg.svd(products, compute_uv=False).clip(0, 1)


def _random_rows(rank: int, width: int, resamples: int, seed: int) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(seed)
    drawn = np.linalg.qr(random.normal(size=(2, resamples, width, rank)))[0].transpose(0, 1, 3, 2)
    cosines = np.einsum("rd,rd->r", drawn[0][:, 0], drawn[1][:, 0])
    angles = _degrees(principal_cosines(drawn[0], drawn[1]) ** 2)
    found = {"cosine": cosines, **{f"principal_angle_{i}": a for i, a in enumerate(angles.T, 1)}}
    for metric, draws in found.items():
        low, high = percentile_interval(draws)
        yield {"metric": metric, "value": float(draws.mean()), "low": float(low), "high": float(high)}


def _corrected(draws: Float[ndarray, " draws"], pairs: int) -> dict[str, float]:
    """A cosine with an interval about what it is biased from.

    Resamples are off from the estimate as it is off from the truth, and spread as it does: the percentile
    interval, moved twice as far back as they are off.
    """
    estimate, resampled = draws[0], draws[1:]
    low, high = expanded_interval(resampled, pairs)
    off = 2 * (resampled.mean() - estimate)
    ends = [float(np.clip(end, -1, 1)) for end in (low - off, high - off, estimate)]
    return {"value": ends[2], "low": min(ends), "high": max(ends)}


def _corrected_share(
    draws: Float[ndarray, " draws"], pairs: int, scale: Callable[[Any], Any] = float
) -> dict[str, float]:
    """A share, from 0 to 1, with the same correction: Student's t of the bootstrap's bias and error.

    On the plain scale it is too narrow in the middle and on that of log-odds near the ends, so the interval
    holds both.

    Args:
        scale: what is made of the share, e.g. an angle of a squared cosine.
    """
    ends = [draws[0]]
    for there, back in ((np.asarray, np.asarray), (special.logit, special.expit)):
        estimate, *_ = resampled = there(draws.clip(TINY, 1 - TINY))
        off, error = resampled[1:].mean() - estimate, resampled[1:].std(ddof=1)
        reach = expanded_t(pairs) * error if pairs > 1 else np.inf
        ends += [back(estimate - off - reach), back(estimate - off + reach)]
    low, high = (scale(np.clip(end, 0, 1)) for end in (min(ends), max(ends)))
    return {"value": float(scale(draws[0])), "low": float(min(low, high)), "high": float(max(low, high))}


def _degrees(squared_cosines: Any) -> Any:
    return np.degrees(np.arccos(np.sqrt(np.clip(squared_cosines, 0, 1))))
