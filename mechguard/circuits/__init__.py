"""Circuits: which parts of the model write the safety direction, and what an image does to them.

    attribute -> which heads and MLPs write the SSD     measure_attention -> from the picture or from the text
    patch, hide_image, patch_paths -> what states cause  apply_logit_lens -> from which layer on
    rank_components, Check -> whether a few parts explain it, beside as many random ones
    Section -> all of these on a study's prompts

Everything runs on plain forward hooks over the model as it is, pictures included; `to_transformer_lens` gives
the same weights as a TransformerBridge.
"""

from mechguard.circuits.attribution import attribute, map_attention, measure_attention
from mechguard.circuits.bridge import to_transformer_lens
from mechguard.circuits.checks import Check, rank_components, top_components
from mechguard.circuits.decisions import Decision, find_decision
from mechguard.circuits.lens import apply_logit_lens
from mechguard.circuits.patching import correlate, hide_image, patch, patch_paths
from mechguard.circuits.section import Section

__all__ = [
    "Check",
    "Decision",
    "Section",
    "apply_logit_lens",
    "attribute",
    "correlate",
    "find_decision",
    "hide_image",
    "map_attention",
    "measure_attention",
    "patch",
    "patch_paths",
    "rank_components",
    "to_transformer_lens",
    "top_components",
]
