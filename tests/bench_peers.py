"""Last-token states of all layers by another library, timed in turns with the plain sorted forward.

    PYTHON tests/bench_peers.py NAME ROUNDS       # prints the ratios as one JSON list

Started by bench.py, with the interpreter of an environment that has the library (`make bench-peers`). Every
library gets the prompts sorted by length, in batches of 16, as ours has.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import bench_models
import numpy as np
import torch

LAYERS = range(bench_models.N_LAYERS)
Read = Callable[[dict[str, Any], list[str]], object]


def batches() -> Iterator[list[str]]:
    rows = sorted(bench_models.texts(bench_models.PROMPTS), key=lambda text: len(text.split()))
    for start in range(0, len(rows), bench_models.BATCH):
        yield rows[start : start + bench_models.BATCH]


def nnsight(model: Any, tokenizer: Any) -> Read:
    from nnsight import TransformersModel

    traced = TransformersModel(model, task="text-generation", tokenizer=tokenizer)

    def read(encoded: dict[str, Any], _: list[str]) -> object:
        with traced.trace(**encoded):
            states = torch.stack([layer.output[:, -1] for layer in traced.model.layers]).save()
        return states

    return read


def transformer_lens(model: Any, tokenizer: Any, *, everything: bool = False) -> Read:
    import transformer_lens.model_bridge.sources.transformers.helpers as helpers
    from transformer_lens.model_bridge import TransformerBridge

    helpers._ensure_torchvision = lambda: False  # it would install packages
    model.config.architectures = [type(model).__name__]
    tokenizer.init_kwargs |= {"name_or_path": "bench", "add_bos_token": True}  # or it is fetched again
    bridge = TransformerBridge.boot_transformers("bench", hf_model=model, tokenizer=tokenizer, device="cpu")
    names = None if everything else [f"blocks.{layer}.hook_resid_post" for layer in LAYERS]

    def read(encoded: dict[str, Any], _: list[str]) -> object:
        options = {} if names is None else {"names_filter": names}
        _, cache = bridge.run_with_cache(
            encoded["input_ids"], attention_mask=encoded["attention_mask"], **options
        )
        return torch.stack([cache[f"blocks.{layer}.hook_resid_post"][:, -1] for layer in LAYERS])

    return read


def transformer_lens_full_cache(model: Any, tokenizer: Any) -> Read:
    return transformer_lens(model, tokenizer, everything=True)


def steering_vectors(model: Any, _: Any) -> Read:
    from steering_vectors import record_activations

    def read(encoded: dict[str, Any], _: list[str]) -> object:
        with record_activations(model) as recorded:
            model(**encoded)
        return torch.stack([recorded[layer][0][:, -1] for layer in LAYERS])

    return read


def repeng(model: Any, tokenizer: Any) -> Read:
    sys.modules["gguf"] = types.ModuleType("gguf")  # for files of vectors, which are not timed
    np.float_ = np.float64  # it is written for numpy 1, and names this in annotations
    from repeng.extract import batched_get_hiddens

    def read(_: dict[str, Any], rows: list[str]) -> object:
        return batched_get_hiddens(model, tokenizer, rows, list(LAYERS), bench_models.BATCH)

    return read


def pyvene(model: Any, _: Any) -> Read:
    import pyvene

    collected = pyvene.IntervenableModel(
        pyvene.IntervenableConfig(
            [
                {"layer": layer, "component": "block_output", "intervention_type": pyvene.CollectIntervention}
                for layer in LAYERS
            ],
            model_type=type(model),
        ),
        model=model,
    )

    def read(encoded: dict[str, Any], _: list[str]) -> object:
        last = encoded["input_ids"].shape[1] - 1
        (_, states), _ = collected(encoded, unit_locations={"base": last})
        return torch.stack([state[:, 0] for state in states])

    return read


LIBRARIES = {
    one.__name__: one
    for one in (nnsight, transformer_lens, transformer_lens_full_cache, steering_vectors, repeng, pyvene)
}


def main() -> None:
    name, rounds = sys.argv[1], int(sys.argv[2])
    plain_model, tokenizer = bench_models.llama(), bench_models.tokenizer()
    read = LIBRARIES[name](bench_models.llama(), tokenizer)

    def run(work: Read) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            for rows in batches():
                work(dict(tokenizer(rows, return_tensors="pt", padding=True)), rows)
        return time.perf_counter() - started

    def plain(encoded: dict[str, Any], _: list[str]) -> object:
        return plain_model(**encoded)

    run(read), run(plain)  # warm
    print(json.dumps([run(read) / run(plain) for _ in range(rounds)]))


if __name__ == "__main__":
    main()
