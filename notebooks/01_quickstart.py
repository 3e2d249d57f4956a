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
# we watch that refusal weaken when a blank picture enters, find the layers where it happens, and bring the
# language model's own judgement back at inference with VLM-Guard (arXiv 2502.10486).
#
# The model is the built-in organism: a tiny LLaVA, really trained, that loads in a second. To look at a real
# one, change `MODEL` and point `MECHGUARD_DATA` at a folder of prompts.

# %%
import mechguard as mg

MODEL = "organism"  # or "llava-hf/llava-1.5-7b-hf", or a folder
vlm = mg.load(MODEL)
vlm

# %% [markdown]
# ## Prompts
#
# The anchors are pairs of a harmful and a harmless request that differ in little else. Validation prompts
# choose, test prompts report; their nouns and phrasings do not overlap.

# %%
anchors = mg.load_prompts("organism/anchors")
validation = mg.load_prompts("organism/validation")
test = mg.load_prompts("organism/malicious") + mg.load_prompts("organism/benign")
anchors

# %% [markdown]
# ## The safety steering direction of the language model
#
# `vlm.llm` is the language model inside: the same weights, reading text only. One traced forward pass a
# batch reads the hidden state after every layer.

# %%
ssd = mg.fit_directions(mg.collect(vlm.llm, anchors), method="svd", rank=1)
ssd

# %% [markdown]
# ## The modality gap
#
# The same prompts, with and without a blank picture. The grey band is what exchanging the two at random
# would give.

# %%
text = mg.collect(vlm.llm, validation)
blank = mg.collect(vlm, validation.with_image("blank"))
gap = mg.measure_modality_gap(text, blank, directions=ssd, split="validation")
mg.plots.modality_gap(gap)

# %% [markdown]
# ## Separability, layer by layer
#
# How well does the projection on the language model's direction still tell harmful from harmless? Beside it:
# the states' own direction, held out by pair, random directions, and shuffled labels.

# %%
separability = mg.measure_separability(text, ssd, split="validation")
separability += mg.measure_separability(blank, ssd, split="validation")
mg.plots.layer_sweep(separability)

# %%
mg.plots.state_map(mg.map_states([text, blank]))

# %% [markdown]
# ## VLM-Guard
#
# Project the VLM's own component along the direction out, and put the language model's in its place, on
# the rows whose gate is open. The control is the same guard with a random direction.

# %%
layers = mg.select_layers(separability, k=3)
guard = mg.vlm_guard(ssd, layers=layers)
table = mg.evaluate(vlm, test, guards=[None, guard, guard.randomised()], conditions=["text", "blank"])
table.where(metric=["attack_success", "benign_compliance"]).table

# %%
mg.plots.behaviour(table)

# %% [markdown]
# What came out is in the table, intervals and all. The layers and the strength here are a first guess;
# `mechguard study organism --out runs/organism` chooses them on validation prompts and writes a report.
