"""Guards: an intervention, where it applies and when, as an object to save, combine and compare."""

from mechguard.guards.gates import Gate
from mechguard.guards.guard import Chain, Guard, Phase, Positions, Scope, Source
from mechguard.guards.methods import (
    ablation,
    activation_addition,
    adasteer,
    alpha_steer,
    astra,
    cast,
    cmrm,
    cmrm_sample,
    inferaligner,
    mars,
    projection,
    shift_dc,
    tbop,
    vlm_guard,
)
from mechguard.guards.moves import Add, Multiply, Realign, Restore
from mechguard.guards.prompting import goal_priority, self_reminder
from mechguard.guards.report import measure_gate_curves, measure_gates

__all__ = [
    "Add",
    "Chain",
    "Gate",
    "Guard",
    "Multiply",
    "Phase",
    "Positions",
    "Realign",
    "Restore",
    "Scope",
    "Source",
    "ablation",
    "activation_addition",
    "adasteer",
    "alpha_steer",
    "astra",
    "cast",
    "cmrm",
    "cmrm_sample",
    "goal_priority",
    "inferaligner",
    "mars",
    "measure_gate_curves",
    "measure_gates",
    "projection",
    "self_reminder",
    "shift_dc",
    "tbop",
    "vlm_guard",
]
