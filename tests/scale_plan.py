"""What a study costs at full size: tokens, FLOPs, bytes and hours, from shapes and stated assumptions.

python tests/scale_plan.py                    # the tables of docs/scale.md
python tests/scale_plan.py --measured gpu.json   # with what tests/bench_gpu.py found on a card
python tests/scale_plan.py --prompts 1000000 --conditions 2 --guards 0

A forward pass over T tokens multiplies every weight of the decoder once per token (2 N T FLOPs) and attends
(4 L d T^2, masked half counted in). A decoding step reads the weights once for the whole batch and every
row's keys and values; it takes the longer of FLOPs / (peak x share) and bytes / (bandwidth x share).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

BYTES = 2  # a weight, key or value in bfloat16
STATE_BYTES = 4  # states are kept in float32


@dataclass(frozen=True)
class Shape:
    """The sizes of a VLM: a decoder, and a vision encoder that fills `image_tokens` positions."""

    name: str
    layers: int
    d_model: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    image_tokens: int = 576
    vision_layers: int = 24
    vision_d_model: int = 1024
    vision_mlp: int = 4096

    @property
    def kv_width(self) -> int:
        return self.d_model // self.heads * self.kv_heads

    @property
    def layer_weights(self) -> int:
        """Weights of a decoder layer: queries and output, keys and values, and a gated MLP."""
        attention = 2 * self.d_model**2 + 2 * self.d_model * self.kv_width
        return attention + 3 * self.d_model * self.mlp

    @property
    def weights(self) -> int:
        """All weights: decoder, embeddings and head, and the vision encoder."""
        return self.layers * self.layer_weights + 2 * self.vocabulary * self.d_model + self.vision_weights

    @property
    def vision_weights(self) -> int:
        width = self.vision_d_model
        return self.vision_layers * (4 * width**2 + 2 * width * self.vision_mlp) + 2 * width * self.d_model

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values per position."""
        return 2 * self.layers * self.kv_width * BYTES

    def prompt_flops(self, tokens: int, *, picture: bool, head: int = 1) -> float:
        """One prompt through the model; the head reads `head` positions."""
        flops = 2.0 * self.layers * self.layer_weights * tokens + 2.0 * self.vocabulary * self.d_model * head
        flops += 4.0 * self.layers * self.d_model * tokens**2
        if picture:
            seen = self.image_tokens + 1
            flops += 2.0 * self.vision_weights * seen
            flops += 4.0 * self.vision_layers * self.vision_d_model * seen**2
        return flops

    def step_flops(self, context: int) -> float:
        """One generated token of one row."""
        weights = self.layers * self.layer_weights + self.vocabulary * self.d_model
        return 2.0 * weights + 4.0 * self.layers * self.d_model * context


@dataclass(frozen=True)
class Card:
    """An accelerator and how much of it is reached.

    Attributes:
        flops: dense bfloat16 FLOP/s, from the data sheet.
        bandwidth: bytes/s of its memory, from the data sheet.
        memory: bytes.
        prefill: the share of `flops` that reading prompts reaches.
        decode: the share of `bandwidth` that generating reaches.
        source: where the two shares come from.
    """

    name: str = "H100 SXM 80 GB"
    flops: float = 989e12
    bandwidth: float = 3.35e12
    memory: float = 80e9
    prefill: float = 0.4
    decode: float = 0.25
    source: str = "assumed"


@dataclass(frozen=True)
class Study:
    """How much is asked.

    Attributes:
        pictured: how many of the conditions have a picture.
        reading: how many of the guards let the language model read along (`source="llm-stream"`).
        text_tokens: of a prompt with its template.
        answer_tokens: of an answer.
    """

    prompts: int = 1000
    conditions: int = 10
    pictured: int = 9
    guards: int = 20
    reading: int = 10
    text_tokens: int = 80
    answer_tokens: int = 64


SHAPES = {
    "7B": Shape("LLaVA-1.5-7B", 32, 4096, 11008, 32, 32, 32064),
    "70B": Shape("a LLaVA around Llama-3-70B", 80, 8192, 28672, 64, 8, 128256),
}
CARDS_PER_COPY = {"7B": 1, "70B": 4}


def rows_at_once(shape: Shape, study: Study, card: Card, cards: int) -> int:
    """How many answers fit beside the weights, a tenth of the memory left alone; at most 256."""
    context = shape.image_tokens + study.text_tokens + study.answer_tokens
    free = 0.9 * cards * card.memory - BYTES * shape.weights
    return int(min(max(free // (shape.kv_bytes * context), 0), 256))


def plan(shape: Shape, study: Study, card: Card, cards: int) -> pd.DataFrame:
    """Tokens, FLOPs, hours and what binds, stage by stage.

    With several cards for one copy of the model (`device_map="auto"`) the layers run one card after the
    other, so a copy is as fast as one card.
    """
    rows = rows_at_once(shape, study, card, cards)
    if rows < 1:
        raise SystemExit(f"{shape.name} does not fit on {cards} x {card.name}; give more cards")
    texts = study.conditions - study.pictured
    seen = shape.image_tokens + study.text_tokens
    reads = {
        "collect, language model": (study.prompts, 0, 0),
        "collect, all conditions": (study.prompts * texts, study.prompts * study.pictured, 0),
        "evaluate, prompts": (
            study.prompts * texts * (study.guards + 1),
            study.prompts * study.pictured * (study.guards + 1),
            1,
        ),
        # Once for the gates, once along with the picture's rows; as if every gate opened.
        "evaluate, prompts read along": (2 * study.prompts * study.conditions * study.reading, 0, 1),
    }
    found = []
    for stage, (plain, pictured, head) in reads.items():
        flops = plain * shape.prompt_flops(study.text_tokens, picture=False, head=head)
        flops += pictured * shape.prompt_flops(seen, picture=True, head=head)
        hours = flops / (card.flops * card.prefill) / 3600
        found.append((stage, plain * study.text_tokens + pictured * seen, flops, hours, "compute"))
    answers = study.prompts * study.conditions
    for stage, count, context in (
        ("evaluate, answers", answers * (study.guards + 1), seen),
        ("evaluate, answers read along", answers * study.reading, study.text_tokens),
    ):
        found.append((stage, *decode(shape, study, card, rows, count, context)))
    table = pd.DataFrame(found, columns=["stage", "tokens", "flops", "hours", "bound"])
    table["gpu_hours"] = table["hours"] * cards
    return table


def decode(
    shape: Shape, study: Study, card: Card, rows: int, answers: int, context: int
) -> tuple[float, float, float, str]:
    """Tokens, FLOPs and hours of generating, and whether arithmetic or memory binds it."""
    middle = context + study.answer_tokens // 2
    flops = shape.step_flops(middle)
    arithmetic = rows * flops / (card.flops * card.prefill)
    memory = (BYTES * shape.weights + rows * shape.kv_bytes * middle) / (card.bandwidth * card.decode)
    tokens = answers * study.answer_tokens
    hours = tokens / rows * max(arithmetic, memory) / 3600
    return tokens, tokens * flops, hours, "memory" if memory > arithmetic else "compute"


def as_markdown(name: str, shape: Shape, study: Study, card: Card, cards: int) -> str:
    """One model's table, its totals and its sizes."""
    table = plan(shape, study, card, cards)
    total = table[["tokens", "flops", "gpu_hours"]].sum()
    stored = study.prompts * (study.conditions + 1) * shape.layers * shape.d_model * STATE_BYTES
    lines = [
        f"**{name}: {shape.name}**, {shape.weights / 1e9:.1f} billion weights, {cards} x {card.name} a copy, "
        f"{rows_at_once(shape, study, card, cards)} answers at once, {stored / 1e9:.1f} GB of states on disk",
        "",
        "| stage | million tokens | PFLOP | bound by | GPU hours |",
        "|---|---|---|---|---|",
        *(
            f"| {row.stage} | {row.tokens / 1e6:,.2f} | {row.flops / 1e15:,.0f} | {row.bound} | "
            f"{row.gpu_hours:,.3f} |"
            for row in table.itertuples()
        ),
        f"| all | {total.tokens / 1e6:,.2f} | {total.flops / 1e15:,.0f} |  | {total.gpu_hours:,.3f} |",
    ]
    return "\n".join(lines)


def with_measured(card: Card, path: Path) -> Card:
    """The card as `tests/bench_gpu.py` found it: its own ceilings, and the shares that were reached."""
    found = json.loads(path.read_text())
    if found.get("small"):
        raise SystemExit(f"{path} was measured at toy size, which says nothing about a card; run it in full")
    return replace(
        card,
        name=found["device"],
        flops=found["matmul_flops"],
        bandwidth=found["copy_bandwidth"],
        memory=found["memory"],
        prefill=found["collect_share"],
        decode=found["generate_share"],
        source=f"measured, {path.name}",
    )


def render(study: Study, card: Card, shapes: Iterable[str] = SHAPES) -> str:
    """All tables as text."""
    head = (
        f"{study.prompts:,} prompts x {study.conditions} conditions ({study.pictured} with a picture) x "
        f"{study.guards} guards and none, {study.reading} of them reading along; {study.text_tokens} text "
        f"tokens, {study.answer_tokens} answer tokens. {card.name}: {card.flops / 1e12:,.0f} TFLOP/s, "
        f"{card.bandwidth / 1e12:.2f} TB/s; reading reaches {card.prefill:.0%} of the first, generating "
        f"{card.decode:.0%} of the second ({card.source})."
    )
    tables = [as_markdown(name, SHAPES[name], study, card, CARDS_PER_COPY[name]) for name in shapes]
    return "\n\n".join([head, *tables])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = Study()
    for name in vars(usual):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(usual, name))
    parser.add_argument("--measured", type=Path, help="what tests/bench_gpu.py wrote")
    options = vars(parser.parse_args())
    measured = options.pop("measured")
    options["pictured"] = min(options["pictured"], options["conditions"])
    options["reading"] = min(options["reading"], options["guards"])
    card = with_measured(Card(), measured) if measured else Card()
    print(render(Study(**options), card))


if __name__ == "__main__":
    main()
