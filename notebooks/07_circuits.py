# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Circuits: which parts write the safety direction, and what does a picture do to them?
#
# The safety steering direction (SSD) says *that* a picture blurs harmful and harmless. Here we ask *where it
# comes from*: which heads and MLPs write it, which read the picture, what brings refusal back, and whether a
# few parts explain it. Components are ranked on validation prompts; what they explain is measured on test
# prompts, beside as many random components.
#
# The model is the built-in organism. To look at a real one, change `MODEL` and point `MECHGUARD_DATA` at a
# folder of prompts. More prompts (`LIMIT`) give narrower intervals.

# %%
import mechguard as mg
from mechguard import circuits
from mechguard.findings import describe_circuits
from mechguard.study import find_study_prompts

MODEL = "organism"  # or "llava-hf/llava-1.5-7b-hf", with MECHGUARD_DATA naming a folder of prompts
LIMIT = 8
vlm = mg.load(MODEL)
prompts = find_study_prompts(vlm)
validation, test = prompts.validation, prompts.test

ssd = mg.fit_directions(mg.collect(vlm.llm, prompts.anchors), method="svd", rank=1)
separability = mg.measure_separability(mg.collect(vlm, validation.with_image("blank")), ssd)
layer = mg.select_layers(separability, k=1)[0]
section = circuits.Section(vlm, ssd, layer, validation, test, limit=LIMIT)

# %% [markdown]
# ## Where does the model decide?
#
# Refusals and compliances may begin alike, so the first token need not tell them apart. The point is found in
# the model's own answers to validation prompts: the beginning behind which the next token tells most.

# %%
section.decision.words

# %% [markdown]
# ## Who writes the direction?
#
# The state of a layer is a sum of what every part before it wrote, and so is its projection on the SSD. The
# sum is exact. On the left: what is written more for harmful than for harmless requests in text. On the
# right: what is written more in text than beside a blank picture.

# %%
ranking = section.ranking()
mg.plots.head_heatmap(ranking, position="decision")

# %%
mg.plots.attribution_waterfall(ranking.where(comparison="text - image", position="decision"))

# %% [markdown]
# ## Who looks at the picture?

# %%
attention = section.attention()
mg.plots.head_heatmap(attention, metric="attention_image")

# %%
mg.plots.attention_map(section.attention_map())

# %% [markdown]
# What a head writes can be split by the position it was read from; the two parts add up to the whole.

# %%
mg.plots.head_heatmap(attention, metric="value_image")

# %% [markdown]
# ## What brings refusal back?
#
# A state of the text run is put into the run beside the picture, and the other way round. 1 means that this
# one place carries the whole difference in the log-odds of refusal.

# %%
patched = section.patching()
mg.plots.patching(patched)

# %% [markdown]
# The gradient estimates the same from two runs. How far it can be trusted is measured, not assumed.

# %%
agreement = circuits.correlate(patched, section.patching_estimate())
agreement.table

# %%
mg.plots.logit_lens(section.lens())

# %% [markdown]
# ## Do these parts matter?
#
# The top components are held at their mean in text, and given their text values beside the picture, on
# prompts that took no part in the ranking. Grey: as many random components of the same kinds.

# %%
checks = section.checks()
mg.plots.component_checks(checks)

# %% [markdown]
# ## Findings
#
# These sentences are made from the tables above.

# %%
tables = {
    "ranking": ranking,
    "attention": attention,
    "patching": patched,
    "agreement": agreement,
    "checks": checks,
}
print("\n\n".join(describe_circuits(tables)))

# %% [markdown]
# ## In TransformerLens
#
# The same weights as a `TransformerBridge`, with nothing copied. Its hooks and caches work on text; the
# states agree with those above.

# %%
bridge = vlm.llm.to_transformer_lens()
encoded = vlm.llm.encode(list(test[:2].with_image("none")))
_, cache = bridge.run_with_cache(encoded["input_ids"], attention_mask=encoded["attention_mask"])
cache["blocks.0.attn.hook_pattern"].shape
