# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Separability, layer by layer, and its controls
#
# A classifier finds a direction that separates almost any two groups when there are more dimensions than
# prompts. So every number here stands beside what it would be by chance: held-out prompts, shuffled labels,
# random directions.

# %%
import mechguard as mg
from mechguard.study import find_study_prompts

MODEL = "organism"  # or "llava-hf/llava-1.5-7b-hf", with MECHGUARD_DATA naming a folder of prompts
vlm = mg.load(MODEL)
prompts = find_study_prompts(vlm)
ssd = mg.fit_directions(mg.collect(vlm.llm, prompts.anchors))
test = (prompts.malicious + prompts.benign).renamed("test")

# %% [markdown]
# ## Along the language model's direction, and along the states' own
#
# Left: the projection on the direction fitted on the language model's text states (other prompts, other
# words). Right: on the states' own mean difference, fitted on the other half of the pairs. If a line falls
# on the left but not on the right, the distinction has *moved*; if it falls on both, it has *weakened*, or
# *collapsed* where nothing is left.

# %%
states = [mg.collect(vlm.llm, test)]
states += [mg.collect(vlm, test.with_image(condition)) for condition in ("none", "blank")]
results = [mg.measure_separability(found, ssd) for found in states]
separability = sum(results[1:], results[0])
mg.plots.layer_sweep(separability)

# %% [markdown]
# The AUROC cannot rise above 1. d' can: it measures the distance of the two groups in units of their
# spread.

# %%
mg.plots.layer_sweep(separability, metric="dprime")

# %% [markdown]
# ## The prompts themselves
#
# Before any average: how the projections are distributed, and where a gate would open. The paper's gate
# asks for the sign; the other one for the side of the midpoint between the anchors' means.

# %%
projections = mg.project_states(ssd, states)
mg.plots.projection_ridgeline(projections)

# %%
mg.plots.gates(mg.measure_gates(ssd, states))

# %% [markdown]
# ## A control that must find nothing
#
# The same states with labels dealt anew, prompt by prompt. What is left of the curve is what looking costs.

# %%
shuffled = states[-1].shuffled(seed=1)
nothing = mg.measure_separability(shuffled, ssd)
mg.plots.layer_sweep(nothing)

# %% [markdown]
# ## A map with held-out axes
#
# Linear discriminants are fitted on one half of the prompts; the map shows the other half. Axes fitted on
# the prompts that they show would separate anything.

# %%
mg.plots.state_map(mg.map_states(states[1:], method="lda"))

# %% [markdown]
# ## Moved, weakened or collapsed?
#
# Two lines with two bands do not answer that: the same prompts were asked throughout, so the answer is in
# paired differences. Below 0 in *auroc_change*, a direction tells less beside the picture than in text; above
# 0 in *auroc_recovered*, the states' own direction tells more there than the language model's. The
# intervals hold for all layers at once, so a layer may be picked because it stands out.

# %%
transfer = mg.measure_transfer(states[1:], [ssd])
mg.plots.transfer_matrix(transfer)

# %%
changes = transfer.where(condition=states[-1].name).table
changes = changes[changes["metric"].isin(["auroc_change", "auroc_recovered"])]
changes[["metric", "direction", "condition", "layer", "value", "low", "high"]].round(3)

# %%
lost = changes[(changes["metric"] == "auroc_change") & (changes["high"] < 0)]
for direction, rows in lost.groupby("direction", sort=False):
    print(f"{direction}: tells less beside the blank picture at layers {sorted(rows['layer'])}")
gained = changes[(changes["metric"] == "auroc_recovered") & (changes["low"] > 0)]
print(f"the own direction is shown to tell more there at layers {sorted(gained['layer']) or 'none'}")
