"""Which parts write a direction: the projection of a state as an exact sum over the parts that made it.

The residual stream is a running sum, so the state h after layer L is

    h = embedding + sum over layers <= L of (attention heads + attention bias + MLP + what a family adds)

and so is its projection h . v. Norms stand before the parts, not in the sum; where a family norms a part's
output (Gemma 2 and 3, GLM-4V), that norm's scale is taken as it was, which keeps the sum exact. A part's
value says what it writes, not why: what it read may come from any part before it. (Elhage et al. 2021, "A
Mathematical Framework for Transformer Circuits".)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechguard.circuits.decisions import AnyPrompts, Decision, encode_to_decision
from mechguard.circuits.passes import (
    Place,
    Site,
    States,
    count_heads,
    device_of,
    hooked,
    linear_matrix,
    module_of,
    run,
)
from mechguard.circuits.patterns import Watch, watched
from mechguard.directions import Directions
from mechguard.errors import MechguardError
from mechguard.models import VLM
from mechguard.prompts import Prompt, Prompts, as_prompts
from mechguard.result import Result

NOWHERE = -1  # the layer of the embedding, and the head of what is no head
SITES: tuple[Site, ...] = ("input", "attention", "mlp", "residual")
TOLERANCE = 1e-4  # of the size of the state, in float32
BATCH = 16


@dataclass(frozen=True)
class Writer:
    """How the heads of one layer reach the residual stream, for one batch and one direction.

    Attributes:
        read_off: what one unit in each entry of a head adds to the projection.
        bias: what the attention adds whatever its heads do; None without a bias.
    """

    read_off: Float[Tensor, "batch head d_head"]
    bias: Float[Tensor, " batch"] | None


def attribute(
    model: VLM,
    prompts: AnyPrompts,
    directions: Directions,
    *,
    layer: int,
    decision: Decision | None = None,
    batch_size: int = BATCH,
) -> Result:
    """Split the projection of the last-token state of a layer among the parts that wrote it.

    Args:
        model: a VLM, or its `.llm`, which reads the text only.
        directions: the first one of `layer` is meant.
        layer: whose state is split; negative from the end.
        decision: split the state where the model decides instead: behind the prefix that its answers share.

    Returns:
        One row per prompt and part: `prompt` (its id), `component` ("embedding", "head", "mlp",
        "attention_bias", "attention" for a layer without separable heads, "added" for what a family adds
        between layers), `layer`, `head`, `value`. The values of a prompt sum to the projection. The embedding
        is the state before layer 0, picture features included; it has layer -1, and what is no head has
        head -1.

    Raises:
        MechguardError: prompts that share an id, no direction at that layer, or a layer that adds something
            which is neither attention nor MLP.
    """
    sent, layer = _ready(model, prompts, directions, layer)
    rows: list[dict[str, Any]] = []
    for batch in batches(sent, batch_size):
        direction = directions.at(layer)[0].to(model.device)
        with torch.no_grad():
            parts, _ = _split(model, batch, encode_to_decision(model, batch, decision), direction, layer)
        for (component, number, head), values in parts:
            rows += [
                {"prompt": prompt.id, "component": component, "layer": number, "head": head, "value": value}
                for prompt, value in zip(batch, values.tolist(), strict=True)
            ]
    return _result(model, sent, rows, directions, layer)


def measure_attention(
    model: VLM, prompts: AnyPrompts, directions: Directions, *, layer: int, batch_size: int = BATCH
) -> Result:
    """What each head attends to from the last token, and from where it takes what it writes.

    Args:
        directions: the first one of `layer` is meant.
        layer: heads of this layer and those before it are measured.

    Returns:
        Rows per prompt, layer and head: metric "attention_image", the share of attention on image positions
        in [0, 1], and "value_image" and "value_text", the parts of the head's value in `attribute` that it
        reads from image positions and from all others; the two sum to that value.

    Raises:
        MechguardError: as for `attribute`, and for an attention that is no weighted sum of values.
    """
    sent, layer = _ready(model, prompts, directions, layer)
    rows: list[dict[str, Any]] = []
    for batch in batches(sent, batch_size):
        direction = directions.at(layer)[0].to(model.device)
        encoded = model.encode(batch)
        with torch.no_grad(), watched(model) as watch:
            _, writers = _split(model, batch, encoded, direction, layer)
        is_image = model.image_positions(encoded).float()
        for number, (writer, heads) in writers.items():
            pattern, taken = _by_source(watch, number, writer, heads)
            inside = is_image.to(pattern).unsqueeze(1)
            found = {
                "attention_image": (pattern * inside).sum(-1),
                "value_image": (taken * inside).sum(-1),
                "value_text": (taken * (1 - inside)).sum(-1),
            }
            rows += [
                {"prompt": prompt.id, "layer": number, "head": head, "metric": metric, "value": value}
                for metric, values in found.items()
                for prompt, line in zip(batch, values.tolist(), strict=True)
                for head, value in enumerate(line)
            ]
    return _result(model, sent, rows, directions, layer)


def map_attention(model: VLM, prompts: AnyPrompts, *, batch_size: int = BATCH) -> Result:
    """Where in the picture each head looks from the last token, on average over prompts.

    Returns:
        One row per layer, head and image token: `position` (counted within the picture), `row` and `column`
        of its patch (row -1 for a token that is no patch, such as CLIP's class token), and `value`, the mean
        share of attention on it.

    Raises:
        MechguardError: prompts without a picture, or with different numbers of image tokens.
    """
    sent = model.prepare(as_prompts(prompts))
    total: dict[int, Tensor] = {}
    grid: list[tuple[int, int]] = []
    for batch in batches(sent, batch_size):
        encoded = model.encode(batch)
        is_image = model.image_positions(encoded)
        counts = set(is_image.sum(-1).tolist())
        if len(counts) != 1 or 0 in counts or (grid and len(grid) not in counts):
            raise MechguardError(
                "the map of attention needs prompts with pictures of one size; these have "
                f"{sorted(counts)} image tokens"
            )
        grid = _grid(model, encoded, counts.pop())
        with torch.no_grad(), watched(model) as watch:
            run(model, encoded)
        for number, pattern in watch.patterns.items():
            where = is_image.to(pattern.device).unsqueeze(1).expand_as(pattern)
            seen = pattern[where].reshape(*pattern.shape[:2], -1).float().sum(0).cpu()
            total[number] = total.get(number, torch.zeros(())) + seen
    rows = [
        {"layer": number, "head": head, "position": position, "row": grid[position][0],
         "column": grid[position][1], "value": share / len(sent), "n": len(sent)}
        for number, pattern in sorted(total.items())
        for head, shares in enumerate(pattern.tolist())
        for position, share in enumerate(shares)
    ]  # fmt: skip
    rows = [{"condition": sent.condition, **row} for row in rows]
    return Result.from_rows(rows, model=model.name, prompts=sent.fingerprint, metric="attention")


def batches(prompts: Prompts, size: int) -> Iterator[list[Prompt]]:
    """Prompts in their order, never with different numbers of pictures in one batch."""
    batch: list[Prompt] = []
    for prompt in prompts:
        if batch and (len(batch) == size or len(prompt.images) != len(batch[0].images)):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def layer_number(model: VLM, layer: int) -> int:
    """A layer counted from 0.

    Raises:
        MechguardError: the model has no such layer.
    """
    number = layer + model.n_layers * (layer < 0)
    if not 0 <= number < model.n_layers:
        raise MechguardError(
            f"layer {layer} is outside {model.name}, which has layers 0-{model.n_layers - 1}; use -1 for "
            "the last"
        )
    return number


def _ready(model: VLM, prompts: AnyPrompts, directions: Directions, layer: int) -> tuple[Prompts, int]:
    sent = model.prepare(as_prompts(prompts))
    if not len(sent):
        raise MechguardError(f"there are no prompts in {sent.name!r}")
    if len({prompt.id for prompt in sent}) < len(sent):
        raise MechguardError(f"prompts of {sent.name!r} share an id; rows are told apart by it")
    if directions.d_model != model.d_model:
        raise MechguardError(
            f"directions of d_model {directions.d_model} do not fit {model.name} of d_model {model.d_model}"
        )
    number = layer_number(model, layer)
    directions.at(number)
    return sent, number


def _result(
    model: VLM, sent: Prompts, rows: list[dict[str, Any]], directions: Directions, layer: int
) -> Result:
    return Result.from_rows(
        [{"condition": sent.condition, **row} for row in rows],
        model=model.name,
        fingerprint=model.fingerprint,
        view=model.view,
        prompts=sent.fingerprint,
        direction=directions.name,
        layer=layer,
    )


Part = tuple[tuple[str, int, int], Float[Tensor, " batch"]]
Writers = dict[int, tuple[Writer, Float[Tensor, "batch head d_head"]]]


def _split(
    model: VLM, batch: list[Prompt], encoded: dict[str, Tensor], direction: Tensor, last: int
) -> tuple[list[Part], Writers]:
    """The parts of the projection, and for every layer how its heads write and what they gave."""
    running = [n for n in model.parts.running(with_picture=bool(batch[0].images)) if n <= last]
    with_heads = [n for n in running if _separable(model, n)]
    places = [Place(site, n) for n in running for site in SITES]
    with hooked(model, keep=[*places, *(Place("head", n) for n in with_heads)], read=_last) as states:
        run(model, encoded)
    direction = direction.float().cpu()
    parts: list[Part] = [(("embedding", NOWHERE, NOWHERE), states[Place("input", running[0])] @ direction)]
    writers: Writers = {}
    for index, number in enumerate(running):
        before = states[Place("residual", running[index - 1])] if index else states[Place("input", number)]
        added = states[Place("input", number)] - before
        if added.any():
            parts.append((("added", number - 1, NOWHERE), added @ direction))
        _check_layer(model, number, states)
        if number in with_heads:
            writer, heads = _writer(model, number, states, direction)
            writers[number] = writer, heads
            values = (heads * writer.read_off).sum(-1)
            parts += [(("head", number, head), values[:, head]) for head in range(values.shape[1])]
            if writer.bias is not None:
                parts.append((("attention_bias", number, NOWHERE), writer.bias))
        else:
            parts.append((("attention", number, NOWHERE), states[Place("attention", number)] @ direction))
        parts.append((("mlp", number, NOWHERE), states[Place("mlp", number)] @ direction))
    return parts, writers


def _last(state: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch width"]:
    return state[:, -1].float().cpu()


def _separable(model: VLM, layer: int) -> bool:
    """Whether the layer has heads side by side before an output projection."""
    module = model.hf_model.get_submodule(f"{model.parts.layers}.{layer}")
    return model.parts.head_writer(module)[1] is not None


def _check_layer(model: VLM, layer: int, states: States) -> None:
    """The layer must add what attention and MLP write, and nothing else."""
    read = {site: states[Place(site, layer)] for site in SITES}
    missing = read["residual"] - read["input"] - read["attention"] - read["mlp"]
    size = max(float(state.abs().max()) for state in read.values())
    if float(missing.abs().max()) > _tolerance(model) * max(size, 1.0):
        raise MechguardError(
            f"layer {layer} of {model.family} adds something that is neither its attention nor its MLP "
            f"(up to {float(missing.abs().max()):.2g}, in states of {size:.2g}), so its state cannot be "
            "split; families.py says which modules write"
        )


def _tolerance(model: VLM) -> float:
    """How far off sums may be, as a share of the states: half precision keeps two or three digits."""
    return TOLERANCE if model.hf_model.dtype == torch.float32 else 100 * TOLERANCE


def _writer(
    model: VLM, layer: int, states: States, direction: Tensor
) -> tuple[Writer, Float[Tensor, "batch head d_head"]]:
    heads = states[Place("head", layer)]
    projection = module_of(model, Place("head", layer))
    matrix, bias = linear_matrix(projection, heads.shape[-1], model.hf_model.dtype)
    attention = heads @ matrix + bias
    scaled = _scale(model, layer, attention, states[Place("attention", layer)]) * direction
    read_off = (scaled @ matrix.T).unflatten(-1, (count_heads(model), -1))
    whole = scaled @ bias if bias.any() else None
    return Writer(read_off, whole), heads.unflatten(-1, (count_heads(model), -1))


def _scale(
    model: VLM, layer: int, attention: Float[Tensor, "batch d_model"], written: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "batch d_model"]:
    """What a post-norm multiplied each entry of the attention's output by; ones without a post-norm.

    An RMS norm multiplies by its weights and by one number per position: the weights are what it gives for
    ones, the number is what fits its output.
    """
    module = model.hf_model.get_submodule(f"{model.parts.layers}.{layer}")
    if model.parts.writers(module)[0] == model.parts.head_writer(module)[0]:
        return torch.ones_like(attention)
    norm = module_of(model, Place("attention", layer))
    ones = torch.ones(1, model.d_model, dtype=model.hf_model.dtype, device=device_of(norm))
    weights = norm(ones).float().cpu()
    scaled = attention * weights
    number = (written * scaled).sum(-1, keepdim=True) / (scaled * scaled).sum(-1, keepdim=True)
    off = float((number * scaled - written).abs().max())
    if off > 10 * _tolerance(model) * max(1.0, float(written.abs().max())):
        raise MechguardError(
            f"the norm behind the attention of layer {layer} of {model.family} is not an RMS norm, so its "
            "heads cannot be told apart"
        )
    return number * weights


def _by_source(
    watch: Watch, layer: int, writer: Writer, heads: Float[Tensor, "batch head d_head"]
) -> tuple[Float[Tensor, "batch head key"], Float[Tensor, "batch head key"]]:
    """The attention on every position, and what of the head's value comes from there."""
    if layer not in watch.patterns:
        raise MechguardError(
            f"the attention of layer {layer} does not go through transformers' attention interface, so its "
            "pattern cannot be read"
        )
    pattern, values = watch.patterns[layer].float().cpu(), watch.values[layer].float().cpu()
    mixed = torch.einsum("bhk,bhkd->bhd", pattern, values)
    if not torch.allclose(mixed, heads, atol=1e-2 * float(heads.abs().max() + 1e-6)):
        raise MechguardError(
            f"the heads of layer {layer} do more than weigh values by attention, so what they write cannot "
            "be split by position"
        )
    return pattern, pattern * torch.einsum("bhkd,bhd->bhk", values, writer.read_off)


def _grid(model: VLM, encoded: dict[str, Tensor], count: int) -> list[tuple[int, int]]:
    """The row and column of each image token; a single row where the shape is not known."""
    if "image_grid_thw" in encoded:
        _, height, width = encoded["image_grid_thw"][0].tolist()
        shrink = round((height * width / count) ** 0.5)
        columns = width // max(shrink, 1)
        return [(index // columns, index % columns) for index in range(count)]
    side, classes = round(count**0.5), 0
    if side * side != count:
        side, classes = round((count - 1) ** 0.5), 1
    if side * side + classes != count:
        return [(0, index) for index in range(count)]
    patches = [(index // side, index % side) for index in range(side * side)]
    return [(NOWHERE, NOWHERE)] * classes + patches
