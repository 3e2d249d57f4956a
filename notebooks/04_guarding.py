# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Guarding: projection, gate, realignment, and when projection alone fails
#
# VLM-Guard at a layer is `h* = h + g (alpha h(q) VᵀV - h VᵀV)`. Three parts: take the component along the
# safety directions V out (*projection*); put the language model's own component in (*realignment*); do so
# only for prompts that look harmful (*gate*). We add them one by one.

# %%
import mechguard as mg
from mechguard.study import find_study_prompts

MODEL = "organism"  # or "llava-hf/llava-1.5-7b-hf", with MECHGUARD_DATA naming a folder of prompts
vlm = mg.load(MODEL)
prompts = find_study_prompts(vlm)
ssd = mg.fit_directions(mg.collect(vlm.llm, prompts.anchors), rank=4)
test = (prompts.malicious[:30] + prompts.benign[:30]).renamed("test")

# %% [markdown]
# ## Layers are chosen on validation prompts

# %%
blank = mg.collect(vlm, prompts.validation.with_image("blank"))
layers = mg.select_layers(mg.measure_separability(blank, ssd, split="validation"), k=3)
layers

# %% [markdown]
# ## Does the gate open for the right prompts?
#
# It is decided by the language model's state of the text: harmful (solid) should be open, harmless (dotted)
# closed.

# %%
text = mg.collect(vlm.llm, prompts.validation)
mg.plots.gates(mg.measure_gates(ssd, [text, blank], split="validation"))

# %% [markdown]
# ## How much, and where
#
# A small grid on validation prompts. Reading A supervises by the last token of the same pass; reading B by
# the language model, at the prompt, with one state held for every token, or reading the answer along
# (*stream*). One written rule chooses: most complete refusals among the settings that keep benign compliance.

# %%
few = prompts.validation.with_label("harmful")[:8] + prompts.validation.with_label("harmless")[:8]
grid = mg.sweep(vlm, few, ssd, layers=[layers[-1:], layers], alphas=[1.0, 2.0], conditions=["blank"])
mg.plots.sweep_heatmap(grid, metric="complete_refusal")

# %%
chosen = mg.choose(grid)
{key: chosen[key] for key in ("variant", "layers", "alpha", "rank")}

# %% [markdown]
# ## One part at a time
#
# On test prompts, in the setting that was chosen: *projection* alone, for every prompt; *realign* without
# projection; all of VLM-Guard; and all of it in a random subspace of the same rank.

# %%
from dataclasses import replace

from mechguard.sweeps import make_guard

guard = make_guard(ssd, **{key: chosen[key] for key in ("variant", "layers", "alpha", "rank")})
guards = [
    None,
    mg.projection(ssd.truncated(guard.rank), layers=guard.layers),
    replace(guard, move=replace(guard.move, project=0.0)).renamed("realign"),
    guard,
    guard.randomised(),
]
table = mg.evaluate(vlm, test, guards=guards, conditions=["text", "blank"], responses="responses.jsonl")
mg.plots.behaviour(table)

# %% [markdown]
# Projection removes the component along the directions from *every* state, and the language model refuses
# by that component: removing it is known as ablating refusal (Arditi et al., arXiv 2406.11717). Compare the
# complete refusals of *projection* with those of *none* above. Attack success alone need not show it: an
# answer that is neither a refusal nor of use counts as neither. In the README's demo, with more directions at
# more layers, projection lowers attack success, and leaves neither refusals nor help.

# %%
import pandas as pd

responses = mg.Result(pd.read_json("responses.jsonl", lines=True))
mg.plots.response_table(responses, guard="projection", condition="blank", count=5)

# %%
mg.plots.response_table(responses, guard="vlm_guard", condition="blank", count=5)
