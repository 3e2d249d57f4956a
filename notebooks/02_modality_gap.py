# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # The modality gap: what a picture does to the states of a text
#
# Ask the same question twice, once as text and once beside a picture that has nothing to do with it. The
# language model inside gets the same words, and yet its hidden states move. How far, in which direction,
# and is the safety direction part of it?

# %%
import mechguard as mg
from mechguard.study import find_study_prompts

MODEL = "organism"  # or "llava-hf/llava-1.5-7b-hf", with MECHGUARD_DATA naming a folder of prompts
vlm = mg.load(MODEL)
prompts = find_study_prompts(vlm)
asked = prompts.validation

# %% [markdown]
# ## Four ways to send the same prompts
#
# The language model alone; the full VLM without a picture, which must give the same states; with a blank
# picture; with noise.

# %%
llm = mg.collect(vlm.llm, asked)
pictured = [mg.collect(vlm, asked.with_image(condition)) for condition in ("none", "blank", "noise")]
pictured[1]

# %% [markdown]
# ## How far the states move
#
# Each panel has its own scale. The line from text to text is a check: it must lie at nothing (or at one,
# for a similarity). Bands are 95% intervals over prompts; grey is what exchanging text and picture at
# random, prompt by prompt, would leave.

# %%
ssd = mg.fit_directions(mg.collect(vlm.llm, prompts.anchors))
gaps = [mg.measure_modality_gap(llm, other, directions=ssd, split="validation") for other in pictured]
gap = sum(gaps[1:], gaps[0])
measures = ["centroid_distance", "cosine_gap", "rmg", "cka", "shift_consistency", "modality_accuracy"]
mg.plots.modality_gap(gap, metrics=measures)

# %% [markdown]
# ## What the shift does to safety
#
# A shift can be large and still leave the safety direction alone. *Safety share* is the part of it that lies
# along that direction; its grey band is the share along random directions. The first panel says which way:
# down is towards harmless.

# %%
mg.plots.shift_decomposition(gap)

# %%
shares = gap.where(metric="safety_share", condition=f"{llm.name} -> vlm blank").table
wide = shares.pivot_table(index="layer", columns="direction", values=["value", "low", "high"])
wide.round(3)

# %% [markdown]
# ## The same, prompt by prompt
#
# Principal components of all states of a layer together. Arrows go from text to picture: do they point the
# same way (a shift of the whole cloud), or does each prompt go its own?

# %%
mg.plots.state_map(mg.map_states([pictured[0], *pictured[1:]]))

# %%
mg.plots.state_map(mg.map_states([pictured[0], pictured[1]]), dimensions=3)

# %% [markdown]
# ## Where in the sequence
#
# One prompt, token by token and patch by patch, coloured by the projection on the safety direction. The
# direction was fitted at the last token; elsewhere it is a way of reading, not a measurement.

# %%
few = asked[:2]
tokens = mg.project_tokens(vlm, few + few.with_image("noise"), ssd, split="validation")
mg.plots.token_view(tokens, condition="vlm noise")

# %% [markdown]
# Distances say that something moved. Whether harmful and harmless are still told apart is another question:
# it is that of the [next notebook](03_separability.py).
