"""Intervals, nulls, tests and power. NumPy arrays and tables in, numbers out; no models."""

from mechguard.statistics.comparisons import (
    adjust_holm,
    compare_outcomes,
    mcnemar_p,
    paired_difference,
)
from mechguard.statistics.intervals import (
    LEVEL,
    Clusters,
    bootstrap_draws,
    bootstrap_mean,
    bootstrap_measure,
    bootstrap_rate,
    expanded_interval,
    expanded_t,
    independent_difference,
    percentile_interval,
    resample_indices,
    resample_weights,
    reverse_interval,
    simultaneous_interval,
    wilson_interval,
)
from mechguard.statistics.measures import (
    MEASURES,
    Measure,
    Weights,
    auroc,
    dprime,
    fisher,
    overlap,
)
from mechguard.statistics.nulls import permuted_measure, swapped_labels
from mechguard.statistics.power import count_prompts_needed
from mechguard.statistics.states import measure_probe, measure_silhouette, probe_hits

__all__ = [
    "LEVEL",
    "MEASURES",
    "Clusters",
    "Measure",
    "Weights",
    "adjust_holm",
    "auroc",
    "bootstrap_draws",
    "bootstrap_mean",
    "bootstrap_measure",
    "bootstrap_rate",
    "compare_outcomes",
    "count_prompts_needed",
    "dprime",
    "expanded_interval",
    "expanded_t",
    "fisher",
    "independent_difference",
    "mcnemar_p",
    "measure_probe",
    "measure_silhouette",
    "overlap",
    "paired_difference",
    "percentile_interval",
    "permuted_measure",
    "probe_hits",
    "resample_indices",
    "resample_weights",
    "reverse_interval",
    "simultaneous_interval",
    "swapped_labels",
    "wilson_interval",
]
