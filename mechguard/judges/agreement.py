"""How far two judges agree beyond chance."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from mechguard.errors import MechguardError
from mechguard.result import Result


def measure_agreement(
    verdicts: pd.DataFrame,
    *,
    clusters: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Result:
    """Cohen's kappa and plain agreement for every pair of judges.

    kappa = (p_o - p_e) / (1 - p_e), by scikit-learn: 1 is agreement in all, 0 what two judges with these
    rates of "yes" agree in by chance.

    Args:
        verdicts: one row per response and one column per judge, true, false, or missing where it does not
            say; a pair is compared where both say.
        clusters: for each row, what is drawn together in the bootstrap, such as the prompt's id: responses
            to one prompt are not independent. Rows by themselves by default.
        resamples: draws of the bootstrap.
        seed: fixes the draws.

    Returns:
        Rows with `first`, `second`, metric `kappa` and `agreement`, a 95% percentile interval, and n. Where
        both judges always say the same one word, kappa is not defined, and neither are its bounds.

    Raises:
        MechguardError: fewer than two judges, or two that judged no response in common.
    """
    if verdicts.shape[1] < 2:
        raise MechguardError(f"agreement needs two judges or more, found {list(verdicts.columns)}")
    groups = pd.Series(range(len(verdicts)) if clusters is None else list(clusters), index=verdicts.index)
    rows = []
    for first, second in itertools.combinations(verdicts.columns, 2):
        both = verdicts[[first, second]].notna().all(axis=1)
        if not both.any():
            raise MechguardError(f"{first!r} and {second!r} judged no response in common")
        pair = verdicts.loc[both, [first, second]].astype(bool).to_numpy()
        draws = _draws(_counts(pair, groups[both]), resamples, seed)
        facts = {"first": first, "second": second, "n": len(pair)}
        for metric, measure in (("kappa", _kappas), ("agreement", _shares)):
            value = cohen_kappa(pair[:, 0], pair[:, 1]) if metric == "kappa" else pair[:, 0] == pair[:, 1]
            low, high = _interval(measure(draws))
            rows.append({**facts, "metric": metric, "value": float(np.mean(value)), "low": low, "high": high})
    return Result.from_rows(rows, resamples=resamples, seed=seed)


def cohen_kappa(first: np.ndarray, second: np.ndarray) -> float:
    """scikit-learn's kappa; NaN where both judges only ever said one and the same word."""
    if len({*first.tolist(), *second.tolist()}) < 2:
        return float("nan")
    return float(cohen_kappa_score(first, second))


def _counts(pair: np.ndarray, groups: pd.Series) -> np.ndarray:
    """The two-by-two table of every cluster, [cluster, 4]: no-no, no-yes, yes-no, yes-yes."""
    cells = 2 * pair[:, 0].astype(int) + pair[:, 1].astype(int)
    codes = pd.factorize(groups)[0]
    table = np.zeros((codes.max() + 1, 4))
    np.add.at(table, (codes, cells), 1)
    return table


def _draws(table: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Two-by-two tables of resampled clusters, [resample, 4]."""
    n = len(table)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return weights @ table


def _kappas(tables: np.ndarray) -> np.ndarray:
    total = tables.sum(-1)
    agreed = _shares(tables)
    first = (tables[:, 2] + tables[:, 3]) / total
    second = (tables[:, 1] + tables[:, 3]) / total
    chance = first * second + (1 - first) * (1 - second)
    return np.divide(agreed - chance, 1 - chance, out=np.full(len(tables), np.nan), where=chance < 1)


def _shares(tables: np.ndarray) -> np.ndarray:
    return (tables[:, 0] + tables[:, 3]) / tables.sum(-1)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nothing but NaN
        low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)
