"""Figures: every one is a function of a `Result` that returns a plotly figure.

A figure is drawn from the rows as they are: nothing here shows, saves (but `save`) or computes a statistic.
Conditions, guards and labels have the same colour in every figure.
"""

from mechguard.plots.defences import defences
from mechguard.plots.fronts import pareto
from mechguard.plots.heatmaps import sweep_heatmap
from mechguard.plots.lines import gates, layer_sweep, modality_gap
from mechguard.plots.pages import save
from mechguard.plots.rates import behaviour
from mechguard.plots.responses import response_table
from mechguard.plots.ridgelines import projection_histogram, projection_ridgeline
from mechguard.plots.state_maps import state_map
from mechguard.plots.tokens import token_view

__all__ = [
    "behaviour",
    "defences",
    "gates",
    "layer_sweep",
    "modality_gap",
    "pareto",
    "projection_histogram",
    "projection_ridgeline",
    "response_table",
    "save",
    "state_map",
    "sweep_heatmap",
    "token_view",
]
