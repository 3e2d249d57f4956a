"""Figures: every one is a function of a `Result` that returns a plotly figure.

A figure is drawn from the rows as they are: nothing here shows, saves (but `save`) or computes a statistic.
Conditions, guards and labels have the same colour in every figure.
"""

from mechguard.plots.circuits import (
    attention_map,
    attribution_waterfall,
    component_checks,
    head_heatmap,
    logit_lens,
    patching,
)
from mechguard.plots.defences import defences
from mechguard.plots.fronts import pareto
from mechguard.plots.gate_curves import gate_curves
from mechguard.plots.heatmaps import sweep_heatmap
from mechguard.plots.lines import gates, layer_sweep, modality_gap
from mechguard.plots.pages import save, save_all
from mechguard.plots.rates import behaviour
from mechguard.plots.responses import response_table
from mechguard.plots.ridgelines import projection_histogram, projection_ridgeline
from mechguard.plots.shifts import shift_decomposition
from mechguard.plots.state_maps import state_map
from mechguard.plots.tokens import token_view
from mechguard.plots.transfers import angles, transfer_matrix

__all__ = [
    "angles",
    "attention_map",
    "attribution_waterfall",
    "behaviour",
    "component_checks",
    "defences",
    "gate_curves",
    "gates",
    "head_heatmap",
    "layer_sweep",
    "logit_lens",
    "modality_gap",
    "pareto",
    "patching",
    "projection_histogram",
    "projection_ridgeline",
    "response_table",
    "save",
    "save_all",
    "shift_decomposition",
    "state_map",
    "sweep_heatmap",
    "token_view",
    "transfer_matrix",
]
