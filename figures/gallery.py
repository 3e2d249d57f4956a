"""The gallery: one picture for every family of plots, and the page that shows them (README.md beside this).

    make figures        # studies the organism into figures/demo, then runs this

Pictures are drawn from the tables of that study and from the tables committed here; n is read from them.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from PIL import Image

import mechguard as mg
from mechguard import plots
from mechguard.plots.pages import draw_pictures
from mechguard.report import StudyFolder
from mechguard.storage import write_bytes, write_text

FOLDER = Path(__file__).parent
STUDY = FOLDER / "demo"
COLOURS = 255  # of a picture: enough for flat colours, a third of the bytes
LAYER = 4  # where a figure shows one layer: the one the study's circuits are about
OPENING = """# Gallery

One picture for every family of plots, of the built-in organism: a small LLaVA, really trained, whose refusals weaken
beside a picture. What is shown is true of this one model ([model card](../mechguard/organism/README.md)).

```bash
make figures     # studies the organism into figures/demo, draws these pictures and writes this page
make defences    # the tables behind the comparison of defences and of VLM-Guard's options
```

Intervals are 95%: Wilson's for rates, a bootstrap over pairs of prompts for measures of states. Every picture is also a
page to play with, with sliders, hover and the table behind it: `mg.plots.save(figure, "name")`.
"""


@dataclass(frozen=True)
class Picture:
    """One picture of the gallery.

    Attributes:
        name: of its file, and of nothing else.
        table: the table of the study it is drawn from; a committed one if it ends in .csv.
        draw: from that table to the figure.
        code: the same as a reader would write it, of a `result`.
        title: what it is about.
        shows: what is seen, with its interval and its control.
    """

    name: str
    table: str
    draw: Callable[[mg.Result], go.Figure]
    code: str
    title: str
    shows: str


PICTURES = (
    Picture(
        "headline", "behaviour", plots.behaviour, "behaviour(result)", "What is answered",
        "Attack success, complete refusals and benign compliance under each image condition. Control: the same guard in "
        "two random subspaces of equal rank.",
    ),
    Picture(
        "layer_sweep", "separability", plots.layer_sweep, "layer_sweep(result)", "Harmful against harmless, layer by layer",
        "AUROC of the projection on the language model's direction (left) and on the states' own, held-out direction "
        "(right); bands are intervals. Controls: shuffled labels and random directions (grey).",
    ),
    Picture(
        "transfer_matrix", "transfer", plots.transfer_matrix, "transfer_matrix(result)", "Does the direction transfer?",
        "AUROC of every direction (rows) under every condition (panels). Control: the states' own direction, held out; "
        "0.5 is chance.",
    ),
    Picture(
        "angles", "angles", plots.angles, "angles(result)", "How far directions turn",
        "Cosines and principal angles between what was fitted on text and beside a picture, with intervals.",
    ),
    Picture(
        "modality_gap", "modality_gap",
        partial(plots.modality_gap, metrics=["centroid_distance", "cosine_gap", "rmg", "cka", "shift_consistency",
                                             "modality_accuracy"]),
        'modality_gap(result, metrics=["rmg", "cka", ...])', "The modality gap, by several measures",
        "From each prompt as text to the same prompt beside a picture. Checks: the line from text to text. Control: text "
        "and picture exchanged at random, prompt by prompt (grey).",
    ),
    Picture(
        "shift_decomposition", "modality_gap", plots.shift_decomposition, "shift_decomposition(result)",
        "How much of the shift is about safety",
        "The picture's shift along the safety directions and outside them. Control: random directions of equal rank (grey).",
    ),
    Picture(
        "state_map", "states", lambda result: plots.state_map(result.where(layer=LAYER)),
        "state_map(result)", "Where the states are",
        f"Each prompt at layer {LAYER} as text and beside pictures, on two principal components; arrows go from text to "
        "picture. A map, not a measurement: it has no interval.",
    ),
    Picture(
        "projection_ridgeline", "projections", plots.projection_ridgeline, "projection_ridgeline(result)",
        "The prompts themselves, before any average",
        "Projections on the safety direction, a ridge per layer, harmful over harmless; marks are where a gate opens.",
    ),
    Picture(
        "projection_histogram", "projections", partial(plots.projection_histogram, layer=LAYER),
        "projection_histogram(result, layer=4)", "One layer of it", "Projections at one layer, with the gates.",
    ),
    Picture(
        "token_view", "tokens", partial(plots.token_view, layer=LAYER), "token_view(result)", "Token by token, patch by patch",
        "One prompt beside a picture, coloured by the projection on the safety direction. The direction was fitted at the "
        "last token: elsewhere this is a way of reading, not a measurement.",
    ),
    Picture(
        "gates", "gates", plots.gates, "gates(result)", "Which gate opens for whom",
        "Share of prompts for which the paper's uncentred gate and the centred one open, with intervals. Control: harmless "
        "prompts, for which it should stay closed.",
    ),
    Picture(
        "gate_curves", "gate_curves", plots.gate_curves, "gate_curves(result)", "Any threshold of the gate",
        "Harmful prompts let through against harmless ones stopped, at every threshold, by layer.",
    ),
    Picture(
        "sweep_heatmap", "sweep", partial(plots.sweep_heatmap, metric="complete_refusal"),
        'sweep_heatmap(result, metric="complete_refusal")', "Settings, on validation prompts",
        "Complete refusals by layers and strength, for each reading of VLM-Guard. On validation: what is chosen here is "
        "measured on test prompts.",
    ),
    Picture(
        "alternatives", "alternatives.csv", partial(plots.sweep_heatmap, metric="complete_refusal"),
        'sweep_heatmap(result, metric="complete_refusal")', "VLM-Guard with one option changed",
        "The default and each option changed by itself, on validation prompts.",
    ),
    Picture(
        "pareto", "behaviour", plots.pareto, "pareto(result)", "Safety against helpfulness",
        "Attack success against benign compliance; whiskers are intervals. Down and to the right is good. Control: random "
        "subspaces (hollow).",
    ),
    Picture(
        "defences", "defences.csv", plots.defences, "defences(result)", "Defences compared",
        "Every method in the setting that validation chose for it. Controls beside each: random directions and a fit on "
        "shuffled labels.",
    ),
    Picture(
        "response_table", "responses", lambda result: plots.response_table(
            result, guard="vlm_guard", condition="image", count=8),
        'response_table(result, guard="vlm_guard", condition="image")', "Answers before and after",
        "Harmful prompts evenly spread over the test set, whatever was answered; the requests and answers are templates of "
        "a toy language.",
    ),
    Picture(
        "head_heatmap", "circuits_ranking", partial(plots.head_heatmap, position="decision"),
        'head_heatmap(result, position="decision")', "Which heads write the safety direction",
        "Left: more for harmful than for harmless requests in text. Right: more in text than beside a blank picture. "
        "Ranked on validation prompts.",
    ),
    Picture(
        "attribution_waterfall", "circuits_ranking",
        lambda result: plots.attribution_waterfall(result.where(comparison="text - image", position="decision")),
        'attribution_waterfall(result.where(comparison="text - image", position="decision"))', "The same as a sum",
        "What each part writes more in text than beside the picture; the bars add up to the whole, exactly.",
    ),
    Picture(
        "attention_map", "circuits_attention_map", plots.attention_map, "attention_map(result)", "Where the heads look",
        "Attention from the last token to the patches of the picture, by head.",
    ),
    Picture(
        "patching", "circuits_patching", plots.patching, "patching(result)", "What brings refusal back",
        "Text states put into the run beside a picture, layer by part of the prompt: the share of the difference in "
        "refusal log-odds that one state carries. 1 is all of it.",
    ),
    Picture(
        "logit_lens", "circuits_lens", plots.logit_lens, "logit_lens(result)", "From which layer on refusal is likely",
        "Log-odds of refusal if the model stopped at a layer, with intervals. Early layers need not speak the language of "
        "the last.",
    ),
    Picture(
        "component_checks", "circuits_checks", plots.component_checks, "component_checks(result)", "Do these parts matter?",
        "The top parts removed in text, or given their text values beside the picture, on test prompts. Control: as many "
        "random parts of the same kinds (grey).",
    ),
)  # fmt: skip


def read(picture: Picture, study: StudyFolder) -> mg.Result:
    """The table a picture is drawn from."""
    if picture.table.endswith(".csv"):
        return mg.Result.load(FOLDER / picture.table.removesuffix(".csv"))
    if picture.table == "responses":
        return mg.Result(study.responses)
    return study.reported(picture.table)


def rests_on(table: pd.DataFrame) -> str:
    """n, as the table says it."""
    if "n" in table and table["n"].notna().any():
        low, high = int(table["n"].min()), int(table["n"].max())
        return f"n = {low}" if low == high else f"n = {low} to {high}"
    return f"n = {table['id'].nunique()} prompts"


def compressed(png: bytes) -> bytes:
    """The picture in few colours, without a visible difference."""
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def describe(picture: Picture, table: pd.DataFrame) -> str:
    """A picture's place on the page."""
    where = picture.table if picture.table.endswith(".csv") else f"demo/results/{picture.table}.csv"
    where = "demo/responses.jsonl" if picture.table == "responses" else where
    command = "make defences" if picture.table.endswith(".csv") else "make figures"
    return (
        f"## {picture.title}\n\n![{picture.title}]({picture.name}.png)\n\n{picture.shows} {rests_on(table)}. "
        f"`mg.plots.{picture.code}`, from `figures/{where}` (`{command}`).\n"
    )


def main(names: list[str]) -> None:
    """Draw the pictures of these names, by default all, and write the page."""
    study = StudyFolder.read(STUDY)
    results = {picture.name: read(picture, study) for picture in PICTURES}
    wanted = [picture for picture in PICTURES if not names or picture.name in names]
    drawn = draw_pictures([picture.draw(results[picture.name]) for picture in wanted], ["png"])
    for picture, files in zip(wanted, drawn, strict=True):
        if "png" not in files:
            sys.exit('pictures need kaleido and a Chromium: pip install "mechguard[images]"')
        write_bytes(FOLDER / f"{picture.name}.png", compressed(files["png"]))
    page = [OPENING, *(describe(picture, results[picture.name].table) for picture in PICTURES)]
    write_text(FOLDER / "README.md", "\n".join(page))


if __name__ == "__main__":
    main(sys.argv[1:])
