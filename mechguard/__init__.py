"""mechguard: see where a vision-language model loses its safety, and give it back at inference.

    model -> prompts -> Activations -> Directions -> Guard -> Result -> Figure

Names are imported when they are first used, so that `import mechguard` loads neither torch nor nnsight.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Before torch starts its threads: threads that spin for long while they wait make small models many times
# slower whenever another program uses a core. A short spin costs nothing when the cores are free.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"

# public name -> the module that holds it
_HOMES = {
    "load": "loading",
    "VLM": "models",
    "load_prompts": "datasets",
    "load_templates": "datasets",
    "list_benchmarks": "datasets",
    "find_overlaps": "overlaps",
    "Prompt": "prompts",
    "Prompts": "prompts",
    "collect": "tracing",
    "generate": "tracing",
    "respond": "tracing",
    "predict_next_tokens": "tracing",
    "Response": "tracing",
    "Activations": "activations",
    "fit_directions": "directions",
    "Directions": "directions",
    "measure_separability": "separability",
    "select_layers": "separability",
    "measure_modality_gap": "gap",
    "measure_transfer": "transfer",
    "measure_angles": "transfer",
    "compare_outcomes": "statistics",
    "count_prompts_needed": "statistics",
    "map_states": "maps",
    "project_states": "projections",
    "project_tokens": "projections",
    "vlm_guard": "guards",
    "projection": "guards",
    "Guard": "guards",
    "ablation": "guards",
    "activation_addition": "guards",
    "adasteer": "guards",
    "alpha_steer": "guards",
    "astra": "guards",
    "cast": "guards",
    "cmrm": "guards",
    "cmrm_sample": "guards",
    "goal_priority": "guards",
    "inferaligner": "guards",
    "mars": "guards",
    "self_reminder": "guards",
    "shift_dc": "guards",
    "tbop": "guards",
    "Chain": "guards",
    "Scope": "guards",
    "measure_gates": "guards",
    "measure_gate_curves": "guards",
    "evaluate": "evaluation",
    "diagnose": "doctor",
    "RefusalJudge": "judges",
    "find_judge": "judges",
    "measure_agreement": "judges",
    "export_sample": "judges",
    "read_labels": "judges",
    "gather_responses": "responses",
    "read_responses": "responses",
    "measure_perplexity": "quality",
    "measure_quality": "quality",
    "run_protocol": "protocol",
    "judge_run": "judging",
    "export_inspect_log": "inspect_logs",
    "compare_guards": "comparison",
    "search_guards": "searches",
    "sweep": "sweeps",
    "sweep_first_token": "sweeps",
    "choose": "sweeps",
    "Result": "result",
    "write_report": "report",
    "explore": "explorer",
    "run_study": "study",
    "MechguardError": "errors",
}
_ROOMS = ("plots", "organism", "datasets", "guards", "circuits", "judges")
__all__ = [*_HOMES, *_ROOMS]

if TYPE_CHECKING:
    from mechguard.activations import Activations
    from mechguard.comparison import compare_guards
    from mechguard.datasets import list_benchmarks, load_prompts, load_templates
    from mechguard.directions import Directions, fit_directions
    from mechguard.doctor import diagnose
    from mechguard.errors import MechguardError
    from mechguard.evaluation import evaluate
    from mechguard.explorer import explore
    from mechguard.gap import measure_modality_gap
    from mechguard.guards import (
        Chain,
        Guard,
        Scope,
        ablation,
        activation_addition,
        adasteer,
        alpha_steer,
        astra,
        cast,
        cmrm,
        cmrm_sample,
        goal_priority,
        inferaligner,
        mars,
        measure_gate_curves,
        measure_gates,
        projection,
        self_reminder,
        shift_dc,
        tbop,
        vlm_guard,
    )
    from mechguard.inspect_logs import export_inspect_log
    from mechguard.judges import RefusalJudge, export_sample, find_judge, measure_agreement, read_labels
    from mechguard.judging import judge_run
    from mechguard.loading import load
    from mechguard.maps import map_states
    from mechguard.models import VLM
    from mechguard.overlaps import find_overlaps
    from mechguard.projections import project_states, project_tokens
    from mechguard.prompts import Prompt, Prompts
    from mechguard.protocol import run_protocol
    from mechguard.quality import measure_perplexity, measure_quality
    from mechguard.report import write_report
    from mechguard.responses import gather_responses, read_responses
    from mechguard.result import Result
    from mechguard.searches import search_guards
    from mechguard.separability import measure_separability, select_layers
    from mechguard.statistics import compare_outcomes, count_prompts_needed
    from mechguard.study import run_study
    from mechguard.sweeps import choose, sweep, sweep_first_token
    from mechguard.tracing import Response, collect, generate, predict_next_tokens, respond
    from mechguard.transfer import measure_angles, measure_transfer


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"mechguard.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'mechguard' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mechguard.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
