"""The shift that an image makes, in its safety-relevant part and the rest."""

from __future__ import annotations

import plotly.graph_objects as go

from mechguard.errors import MechguardError
from mechguard.plots.lines import INTERVAL_COLUMNS, modality_gap
from mechguard.plots.style import draws, headed, sample, table_of
from mechguard.result import Result

# The panels, in reading order: which way, how far in all, and how much of it concerns safety.
DECOMPOSITION = (
    "shift_along",
    "shift_along_relative",
    "shift_across",
    "safety_share",
    "safety_energy",
    "safety_energy_of_mean",
)
TITLE = "What the image's shift does to safety, by layer"


@draws
def shift_decomposition(result: Result) -> go.Figure:
    """The shift along the safety directions and outside them at every layer, one panel per metric.

    Args:
        result: of `measure_modality_gap` with directions.

    Raises:
        MechguardError: the result is not a modality-gap table of one split, or was made without directions.
    """
    made_by = "measure_modality_gap"
    table = table_of(result, "shift_decomposition", "direction", *INTERVAL_COLUMNS, made_by=made_by)
    metrics = [metric for metric in DECOMPOSITION if metric in set(table["metric"])]
    if not metrics:
        raise MechguardError(
            "shift_decomposition found no part of the shift along a direction; give measure_modality_gap "
            "directions=..."
        )
    figure = modality_gap(result, metrics=metrics)
    shown = table[table["metric"].isin(metrics)]
    subtitle = f"{sample(shown)}; bands: 95% intervals; grey: random directions"
    return headed(figure, TITLE, subtitle)
