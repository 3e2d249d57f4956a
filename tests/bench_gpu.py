"""What mechguard reaches on an accelerator, beside plain transformers and the card's own ceilings.

python tests/bench_gpu.py --out gpu.json     # the shape of LLaVA-1.5-7B, random weights, bfloat16
python tests/bench_gpu.py --small            # toy size on the CPU, to see that the script runs

Ratios are medians of pieces of work timed in turns in one process. The ceilings are measured on the same
device: a large matrix product, and a copy. Random weights cost what trained ones do. Needs no network.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import scale_plan
import tiny
import torch
from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

import mechguard as mg
from mechguard.storage import write_json
from mechguard.tracing import plan_batches

VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
TEXT = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
SMALL_VISION = VISION | {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
}
SMALL_TEXT = TEXT | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
}


def build(small: bool, device: str) -> mg.VLM:
    """A LLaVA with random weights on the device, and a real processor over a toy vocabulary."""
    vision = SMALL_VISION if small else VISION
    side = vision["image_size"]
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config={"model_type": "llama", **(SMALL_TEXT if small else TEXT)},
        image_token_index=tiny.SPECIAL.index("<image>"),
        image_seq_length=(side // vision["patch_size"]) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(usual)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 3
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tiny.tokenizer(),
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny.CHAT_TEMPLATE,
    )
    return mg.load(model, processor=processor)


def write_prompts(count: int) -> mg.Prompts:
    """Pairs of prompts of 20 to 60 tokens."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        text = " ".join(draw.choices(tiny.WORDS, k=draw.randint(20, 60)))
        label = "harmful" if number % 2 else "harmless"
        rows.append(mg.Prompt(str(number), text, label, pair=str(number // 2)))
    return mg.Prompts(rows, name="bench")


def seconds(work: Callable[[], object], device: str) -> float:
    """How long a piece of work takes until the device has done it."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def compare(
    name: str, work: Callable[[], object], plain: Callable[[], object], rounds: int, device: str
) -> dict[str, Any]:
    """The ratio of two pieces of work, timed in turns so that a slow moment hits both."""
    work(), plain()  # warm
    pairs = [(seconds(work, device), seconds(plain, device)) for _ in range(rounds)]
    ratios = [ours / theirs for ours, theirs in pairs]
    low, high = np.percentile(ratios, [2.5, 97.5])
    spent = float(np.median([ours for ours, _ in pairs]))
    ratio = float(np.median(ratios))
    return {"name": name, "ratio": ratio, "low": low, "high": high, "n": rounds, "seconds": spent}


def measure_ceilings(small: bool, device: str) -> dict[str, float]:
    """FLOP/s of a large matrix product, and bytes/s of a copy (read and written), both medians."""
    size = 512 if small else 8192
    dtype = torch.float32 if small else torch.bfloat16
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.empty((1 << 22) if small else (1 << 30), device=device, dtype=torch.uint8)
    there = torch.empty_like(b)
    product = np.median([seconds(lambda: a @ a, device) for _ in range(20)])
    copy = np.median([seconds(lambda: there.copy_(b), device) for _ in range(20)])
    return {"matmul_flops": 2 * size**3 / product, "copy_bandwidth": 2 * b.numel() / copy}


def run_floor(vlm: mg.VLM, prompts: mg.Prompts, batch: int, *, head: bool) -> None:
    """The decoder, with pictures, over batches sorted by length: nothing kept; with the head if asked."""
    model = vlm.hf_model if head else vlm.hf_model.model
    for rows in plan_batches(vlm, prompts, batch):
        with torch.no_grad():
            model(**vlm.encode([prompts[row] for row in rows]), use_cache=False)


def peak_memory(work: Callable[[], object], device: str) -> float | None:
    """Bytes that a piece of work holds at most beyond what was held before it."""
    if device != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return float(torch.cuda.max_memory_allocated() - before)


def answer_plain(vlm: mg.VLM, prompts: mg.Prompts, batch: int, settings: dict[str, Any]) -> None:
    """Plain generation over the same batches."""
    for rows in plan_batches(vlm, prompts, batch):
        with torch.no_grad():
            vlm.hf_model.generate(**vlm.encode([prompts[row] for row in rows]), **settings)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="toy size on the CPU")
    parser.add_argument("--out", default="gpu.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="tokens per answer")
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        raise SystemExit("no accelerator was found; --small tries the script on the CPU")
    device = "cpu" if options.small else "cuda"
    vlm = build(options.small, device)
    texts = write_prompts(options.prompts)
    blank = texts.with_image("blank")
    quiet = {"progress": False, "batch_size": options.batch}
    ssd = mg.fit_directions(mg.collect(vlm.llm, texts, **quiet), rank=4)
    guard = mg.projection(ssd, layers=range(vlm.n_layers))
    baked = mg.ablation(mg.fit_directions(mg.collect(vlm.llm, texts, **quiet)), layer=1).bake(vlm)
    answers = {"do_sample": False, "max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
    asked = blank[: 4 * options.batch]

    def hooked() -> None:
        with guard.attach(vlm):
            answer_plain(vlm, asked, options.batch, answers)

    def plainly() -> None:
        answer_plain(vlm, asked, options.batch, answers)

    def traced() -> None:
        mg.generate(vlm, asked, guard=guard, **quiet, **answers)

    strengths = (0.5, 1.0, 1.5)
    cells = [(layer, alpha) for layer in range(0, vlm.n_layers, 8) for alpha in strengths]

    def sweep() -> None:
        for layer, alpha in cells:
            cell = mg.vlm_guard(ssd, layers=[layer], alpha=alpha, source="last", gate="always")
            mg.predict_next_tokens(vlm, asked, guard=cell, **quiet)

    def passes() -> None:
        for _ in cells:
            run_floor(vlm, asked, options.batch, head=True)

    def collected() -> object:
        return mg.collect(vlm, blank, **quiet)

    def floor(head: bool = False) -> None:
        run_floor(vlm, blank, options.batch, head=head)

    cases = {
        "collect, last token of all layers / decoder alone, sorted": (collected, floor),
        "collect / plain forward, sorted": (collected, lambda: floor(head=True)),
        "collect, text alone / decoder alone, sorted": (
            lambda: mg.collect(vlm.llm, texts, **quiet),
            lambda: run_floor(vlm, texts, options.batch, head=False),
        ),
        "guarded generate, hooks, rank 4, all layers / plain generate": (hooked, plainly),
        "guarded generate, traced / plain generate": (traced, plainly),
        "guarded generate, baked / plain generate": (
            lambda: answer_plain(baked, asked, options.batch, answers),
            plainly,
        ),
        f"sweep of {len(cells)} cells, first-token scores / one plain pass per cell": (sweep, passes),
    }
    rows = []
    for name, works in cases.items():
        rows.append(compare(name, *works, options.rounds, device))
        row = rows[-1]
        print(f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}] n={row['n']}  {name}", flush=True)
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "small": options.small,
        "memory": torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None,
        "torch": torch.__version__,
        **measure_ceilings(options.small, device),
        "memory_ratio": memory_ratio(collected, floor, device),
        **measure_shares(vlm, blank, asked, rows, options),
        "rows": rows,
    }
    for name in ("collect_per_second", "generate_per_second"):
        print(f"{found[name]:,.1f} {'prompts' if name.startswith('collect') else 'tokens'}/s")
    found["collect_share"] = found.pop("collect_flops") / found["matmul_flops"]
    found["generate_share"] = found.pop("generate_bytes") / found["copy_bandwidth"]
    print(f"collect reaches {found['collect_share']:.1%} of the matrix product's FLOP/s")
    print(f"guarded generate reaches {found['generate_share']:.1%} of the copy's bytes/s")
    write_json(options.out, found)


def memory_ratio(work: Callable[[], object], plain: Callable[[], object], device: str) -> float | None:
    """Peak memory of one piece of work over another's; None where it is not counted."""
    ours, theirs = peak_memory(work, device), peak_memory(plain, device)
    return None if ours is None or theirs is None else ours / theirs


def measure_shares(
    vlm: mg.VLM, blank: mg.Prompts, asked: mg.Prompts, rows: list[dict[str, Any]], options: Any
) -> dict[str, float]:
    """Prompts/s and FLOP/s of collecting, tokens/s and bytes/s of traced guarded generation."""
    shape = shape_of(vlm)
    spent = {row["name"].split(" / ")[0]: row["seconds"] for row in rows}
    collect, generate = spent["collect, last token of all layers"], spent["guarded generate, traced"]
    # what the prompts need without their padding
    lengths = [int(vlm.encode([prompt])["input_ids"].shape[1]) for prompt in blank]
    flops = sum(shape.prompt_flops(length, picture=True, head=0) for length in lengths)
    steps = len(plan_batches(vlm, asked, options.batch)) * options.tokens
    context = lengths[0] + options.tokens // 2
    weights = scale_plan.BYTES * (shape.weights - shape.vision_weights)
    moved = steps * (weights + options.batch * shape.kv_bytes * context)
    return {
        "collect_per_second": len(blank) / collect,
        "collect_flops": flops / collect,
        "generate_per_second": len(asked) * options.tokens / generate,
        "generate_bytes": moved / generate,
    }


def shape_of(vlm: mg.VLM) -> scale_plan.Shape:
    """The sizes by which the plan counts."""
    text, vision = vlm.hf_model.config.get_text_config(), vlm.hf_model.config.vision_config
    return replace(
        scale_plan.SHAPES["7B"],
        name=vlm.name,
        layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        mlp=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        vocabulary=text.vocab_size,
        image_tokens=vlm.hf_model.config.image_seq_length,
        vision_layers=vision.num_hidden_layers,
        vision_d_model=vision.hidden_size,
        vision_mlp=vision.intermediate_size,
    )


if __name__ == "__main__":
    main()
