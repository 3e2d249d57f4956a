"""The gallery: one picture for every family of plots, and the page that shows them (README.md beside this).

    make figures        # studies the organism into figures/demo, then runs this
    python figures/gallery.py pareto gates      # these pictures only

Pictures are drawn from the tables of that study and from the tables committed here; n is read from them, and
captions.toml holds what is said of each.
"""

from __future__ import annotations

import io
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
CAPTIONS = tomllib.loads((FOLDER / "captions.toml").read_text())
COLOURS = 255  # of a picture: enough for flat colours, a third of the bytes
LAYER = 4  # where a figure shows one layer: the one the study's circuits are about
RESPONSES = "responses"
GAP = ["centroid_distance", "cosine_gap", "rmg", "cka", "shift_consistency", "modality_accuracy"]
OPENING = """# Gallery

One picture for every family of plots, of the built-in organism: a small LLaVA, really trained, whose
refusals weaken beside a picture. What is shown is true of this one model
([model card](../mechguard/organism/README.md)).

```bash
make figures     # studies the organism into figures/demo, draws these pictures and writes this page
make defences    # the tables behind the comparison of defences and of VLM-Guard's options
```

Intervals are 95%: Wilson's for rates, a bootstrap over pairs of prompts for measures of states. Every
picture is also a page to play with, with sliders, hover and the table behind it:
`mg.plots.save(figure, "name")`.
"""


class Picture(NamedTuple):
    """One picture: its name, the study's table (or a committed .csv), and how it is drawn from that."""

    name: str
    table: str
    draw: Callable[[mg.Result], go.Figure]


def draw_waterfall(ranking: mg.Result) -> go.Figure:
    return plots.attribution_waterfall(ranking.where(comparison="text - image", position="decision"))


def draw_responses(responses: mg.Result) -> go.Figure:
    return plots.response_table(responses, guard="vlm_guard", condition="image", count=8)


PICTURES = (
    Picture("headline", "behaviour", plots.behaviour),
    Picture("layer_sweep", "separability", plots.layer_sweep),
    Picture("transfer_matrix", "transfer", plots.transfer_matrix),
    Picture("angles", "angles", plots.angles),
    Picture("modality_gap", "modality_gap", partial(plots.modality_gap, metrics=GAP)),
    Picture("shift_decomposition", "modality_gap", plots.shift_decomposition),
    Picture("state_map", "states", lambda states: plots.state_map(states.where(layer=LAYER))),
    Picture("projection_ridgeline", "projections", plots.projection_ridgeline),
    Picture("projection_histogram", "projections", partial(plots.projection_histogram, layer=LAYER)),
    Picture("token_view", "tokens", partial(plots.token_view, layer=LAYER)),
    Picture("gates", "gates", plots.gates),
    Picture("gate_curves", "gate_curves", plots.gate_curves),
    Picture("sweep_heatmap", "sweep", partial(plots.sweep_heatmap, metric="complete_refusal")),
    Picture("alternatives", "alternatives.csv", partial(plots.sweep_heatmap, metric="complete_refusal")),
    Picture("pareto", "behaviour", plots.pareto),
    Picture("defences", "defences.csv", plots.defences),
    Picture("response_table", RESPONSES, draw_responses),
    Picture("head_heatmap", "circuits_ranking", partial(plots.head_heatmap, position="decision")),
    Picture("attribution_waterfall", "circuits_ranking", draw_waterfall),
    Picture("attention_map", "circuits_attention_map", plots.attention_map),
    Picture("patching", "circuits_patching", plots.patching),
    Picture("logit_lens", "circuits_lens", plots.logit_lens),
    Picture("component_checks", "circuits_checks", plots.component_checks),
)


def read(picture: Picture, study: StudyFolder) -> mg.Result:
    """The table a picture is drawn from."""
    if picture.table.endswith(".csv"):
        return mg.Result.load(FOLDER / picture.table.removesuffix(".csv"))
    return mg.Result(study.responses) if picture.table == RESPONSES else study.reported(picture.table)


def rests_on(table: pd.DataFrame) -> str:
    """n, as the table says it."""
    if "n" in table and table["n"].notna().any():
        low, high = int(table["n"].min()), int(table["n"].max())
        return f"n = {low}" if low == high else f"n = {low} to {high}"
    return f"n = {table['id'].nunique()} prompts"


def describe(picture: Picture, table: pd.DataFrame) -> str:
    """A picture's place on the page."""
    caption = CAPTIONS[picture.name]
    committed = picture.table.endswith(".csv")
    stored = "demo/responses.jsonl" if picture.table == RESPONSES else f"demo/results/{picture.table}.csv"
    return (
        f"## {caption['title']}\n\n![{caption['title']}]({picture.name}.png)\n\n{caption['shows']}\n"
        f"{rests_on(table)}.\n\n`{caption['code']}`, of `figures/{picture.table if committed else stored}`: "
        f"`make {'defences' if committed else 'figures'}`\n"
    )


def compressed(png: bytes) -> bytes:
    """The picture in few colours, without a visible difference."""
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


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
