# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Comparing defences
#
# Methods differ in what they add to a state, when, and for whom. Here they are fitted on the same states
# and stand on one table: attack success, complete refusals, and what harmless prompts lose. Each method
# should also beat itself with random directions, or it does what any push of its size would do.

# %%
import mechguard as mg
from mechguard.study import find_study_prompts

MODEL = "organism"  # or "llava-hf/llava-1.5-7b-hf", with MECHGUARD_DATA naming a folder of prompts
vlm = mg.load(MODEL)
prompts = find_study_prompts(vlm)
test = (prompts.malicious[:25] + prompts.benign[:25]).renamed("test")
text = mg.collect(vlm.llm, prompts.anchors)
blank = mg.collect(vlm, prompts.anchors.with_image("blank"))
ssd = mg.fit_directions(text, rank=4)

# %% [markdown]
# ## A few methods with first-guess settings
#
# VLM-Guard has the strength that validation chose in the [notebook before](04_guarding.py), the others have
# strength 1. Each docstring gives the formula, the paper, and what we are unsure of: try `mg.cast?`.

# %%
validation = mg.collect(vlm, prompts.validation.with_image("blank"))
layers = mg.select_layers(mg.measure_separability(validation, ssd, split="validation"), k=3)
guards = [
    mg.vlm_guard(ssd, layers=layers, alpha=2.0),
    mg.activation_addition(text, layers=layers[-1:]),
    mg.inferaligner(text, layers=layers),
    mg.cast(text, layers=layers),
    mg.astra(text, layers=layers),
    mg.cmrm(text, blank, layers=layers),
    mg.self_reminder(),
]
controls = [guard.randomised(name=f"{guard.name}; random") for guard in guards if guard.move is not None]
table = mg.evaluate(vlm, test, guards=[None, *guards, *controls], conditions=["blank"])

# %% [markdown]
# ## Safety against helpfulness
#
# Down and to the right is good. The stairs join the methods that no other one beats in both; hollow marks
# are controls.

# %%
mg.plots.pareto(table)

# %%
mg.plots.defences(table)

# %% [markdown]
# Few points are apart by their intervals at this number of prompts, and the settings were not tuned.
# `mechguard compare organism --out runs/defences` chooses settings for each method on validation prompts by
# one written rule, adds shuffled labels as a second control, and uses all test prompts.

# %%
wide = table.table.pivot_table(index="guard", columns="metric", values="value", sort=False)
wide[["attack_success", "complete_refusal", "benign_compliance"]].round(2)
