# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Quickstart: where does a VLM lose its safety, and can it be given back?
#
# A vision-language model is built around a language model that was taught to refuse harmful requests. Here
# we watch what a blank picture does to that refusal, look for the layers where it happens, and bring the
# language model's own judgement back at inference with VLM-Guard (arXiv 2502.10486).
#
# The model is the built-in organism: a tiny LLaVA, really trained, that loads in a second. To look at a
# real one, change `MODEL` and point `MECHGUARD_DATA` at a folder of prompts.

# %%
import mechguard as mg
from mechguard.study import find_study_prompts

MODEL = "organism"  # or "llava-hf/llava-1.5-7b-hf", with MECHGUARD_DATA naming a folder of prompts
vlm = mg.load(MODEL)
prompts = find_study_prompts(vlm)
vlm

# %% [markdown]
# ## Prompts
#
# The anchors are pairs of a harmful and a harmless request that differ in little else. Validation prompts
# choose, test prompts report; their nouns and phrasings do not overlap.

# %%
prompts.anchors

# %% [markdown]
# ## The safety steering direction of the language model
#
# `vlm.llm` is the language model inside: the same weights, reading text only. One traced forward pass a
# batch reads the hidden state after every layer. The direction at a layer is the first right singular
# vector of the differences of the pairs; the four first ones span the subspace that the guard will use.

# %%
ssd = mg.fit_directions(mg.collect(vlm.llm, prompts.anchors), method="svd", rank=4)
ssd

# %% [markdown]
# ## The modality gap
#
# The same prompts, with and without a blank picture. The grey band is what exchanging the two at random
# would give.

# %%
text = mg.collect(vlm.llm, prompts.validation)
blank = mg.collect(vlm, prompts.validation.with_image("blank"))
gap = mg.measure_modality_gap(text, blank, directions=ssd, split="validation")
mg.plots.modality_gap(gap, metrics=["centroid_distance", "rmg", "safety_share"])

# %% [markdown]
# ## Separability, layer by layer
#
# How well does the projection on the language model's direction still tell harmful from harmless? Beside
# it: the states' own direction, held out by pair, random directions, and shuffled labels.

# %%
separability = mg.measure_separability(text, ssd, split="validation")
separability += mg.measure_separability(blank, ssd, split="validation")
mg.plots.layer_sweep(separability)

# %% [markdown]
# Every point below is a prompt; an arrow goes from its state as text to its state beside the picture. Drag
# the slider, or press play.

# %%
mg.plots.state_map(mg.map_states([text, blank]))

# %% [markdown]
# ## VLM-Guard
#
# Project the VLM's own component along the directions out, and put the language model's in its place, on
# the rows whose gate is open. At which layers and how strongly is for validation prompts to say: a small
# grid, and one written rule that also looks at what harmless prompts lose.

# %%
few = prompts.validation.first(25)
best = mg.select_layers(separability.where(condition=blank.name), k=3)
grid = mg.sweep(
    vlm,
    few,
    ssd,
    layers=[best, list(range(vlm.n_layers))],
    alphas=[1.0, 2.0],
    ranks=[ssd.rank],
    variants={"vlm_guard": lambda ssd, layers, alpha: mg.vlm_guard(ssd, layers=layers, alpha=alpha)},
    conditions=["blank"],
)
mg.plots.sweep_heatmap(grid, metric="complete_refusal")

# %%
chosen = mg.choose(grid)
guard = mg.vlm_guard(ssd, layers=chosen["layers"], alpha=chosen["alpha"])
guard

# %% [markdown]
# Now the test prompts, which took no part so far. The control is the same guard in a random subspace.

# %%
test = prompts.malicious[:40] + prompts.benign[:40]
table = mg.evaluate(vlm, test, guards=[None, guard, guard.randomised()], conditions=["text", "blank"])
mg.plots.behaviour(table)

# %%
harm = table.where(metric="attack_success", condition="blank").table
harm[["guard", "value", "low", "high", "n"]]

# %% [markdown]
# What came out is in the table, intervals and all: read the guard's row against the row without a guard
# *and* against the random one. `mechguard study organism --out runs/organism` does all of this with more
# prompts, a wider grid and own pictures, and writes a report.
