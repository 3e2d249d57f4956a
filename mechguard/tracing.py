"""The only traces: collect hidden states, and generate under a guard.

One batch is one forward pass: every layer is read in it, and a guard acts inside it. Prompts are sorted by
length, so that little padding is computed, and come back in their own order.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechguard.activations import Activations
from mechguard.errors import MechguardError
from mechguard.guards import Guard
from mechguard.models import VLM
from mechguard.positions import Position, check_filled, mask_positions, name_of, reader
from mechguard.prompts import Prompt, Prompts, as_prompts

# "auto" starts from so many numbers in one position's states, and halves when memory runs out: small
# models are bound by the cost of a step, large ones by memory.
AUTO_BATCH_NUMBERS = 65536
AUTO_BATCH_LIMITS = (16, 256)
BatchSize = int | Literal["auto"]
AnyPrompts = Prompts | Prompt | str | Sequence[Prompt | str]
States = dict[int, Float[Tensor, "batch d_model"]]
T = TypeVar("T")


@dataclass(frozen=True)
class Response:
    """What a model answered to one prompt.

    Attributes:
        text: the generated text, without special tokens.
        tokens: how many tokens were generated.
        ids: the generated token ids, up to and with the end of the sequence.
        gates: for each layer of the guard, whether this row's gate was open.
    """

    text: str
    tokens: int
    ids: tuple[int, ...] = ()
    gates: dict[int, bool] = field(default_factory=dict)


def collect(
    model: VLM,
    prompts: AnyPrompts,
    *,
    layers: Sequence[int] | Literal["all"] = "all",
    position: Position = "last",
    guard: Guard | None = None,
    teacher: VLM | None = None,
    batch_size: BatchSize = "auto",
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Activations:
    """Read the hidden state after every decoder layer at one position of every prompt.

    A layer that is skipped on text alone (the cross-attention layers of Mllama) gives the state before it.

    Args:
        model: a VLM, or its `.llm`, which reads the text only.
        prompts: Prompts, or one or several texts.
        layers: decoder layers, negative from the end; "all" by default.
        position: "last", "last_text", an index, or a function of a prompt's tokens (see
            `positions.mask_positions`); where that means several positions ("image", "text", "all", a
            list), their mean.
        guard: acts in the same pass, at the prompt; states are read after it.
        teacher: who supervises the guard; the model's own LLM component by default.
        batch_size: "auto" halves on out-of-memory.
        out: also save the activations there.

    Returns:
        float32 [layer, prompt, d_model], on the CPU.

    Raises:
        MechguardError: no prompts, a layer outside the model, pictures for a text-only model.
    """
    sent = _ready(model, prompts, guard)
    chosen = _layer_numbers(model, layers)
    teacher = teacher or model.llm
    data = torch.empty(len(chosen), len(sent), model.d_model)

    def work(rows: list[int]) -> Float[Tensor, "layer batch d_model"]:
        batch = [sent[row] for row in rows]
        return _trace_states(model, batch, chosen, position, guard, teacher)

    label = f"collect {model.view} {sent.condition}"
    for rows, states in _in_batches(work, sent, model.d_model, batch_size, label, progress):
        data[:, rows] = states.to("cpu", torch.float32)
    about = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "view": model.view,
        "condition": sent.condition,
        "position": name_of(position),
        "guard": "none" if guard is None else guard.name,
        "prompts": sent.fingerprint,
    }
    activations = Activations(data, chosen, sent, about)
    if out is not None:
        activations.save(out)
    return activations


def generate(
    model: VLM,
    prompts: AnyPrompts,
    *,
    guard: Guard | None = None,
    teacher: VLM | None = None,
    max_new_tokens: int = 64,
    batch_size: BatchSize = "auto",
    progress: bool = True,
    **options: Any,
) -> list[str]:
    """Answer every prompt, greedily unless `options` for Hugging Face's `generate` say otherwise.

    See `respond` for the arguments; this returns the texts alone.
    """
    responses = respond(
        model,
        prompts,
        guard=guard,
        teacher=teacher,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        **options,
    )
    return [response.text for response in responses]


def respond(
    model: VLM,
    prompts: AnyPrompts,
    *,
    guard: Guard | None = None,
    teacher: VLM | None = None,
    max_new_tokens: int = 64,
    batch_size: BatchSize = "auto",
    progress: bool = True,
    **options: Any,
) -> list[Response]:
    """Answer every prompt and say which gates opened.

    Args:
        guard: acts inside the traced generation; the gate of a row is decided once, at the end of its
            prompt, so that a batch gives each row what it gets alone.
        teacher: who supervises the guard; the model's own LLM component by default. "llm-stream"
            needs the own one: its rows ride along in the same pass.
        options: passed to Hugging Face's `generate`, over `do_sample=False`.

    Raises:
        MechguardError: no prompts, a guard for another model, pictures for a text-only model.
    """
    if max_new_tokens < 1:
        raise MechguardError(f"max_new_tokens={max_new_tokens} generates nothing; use 1 or more")
    sent = _ready(model, prompts, guard)
    streams = guard is not None and guard.source == "llm-stream"
    if streams and teacher is not None and teacher is not model.llm:
        raise MechguardError(
            'source="llm-stream" reads the model\'s own LLM in the same pass; use source="llm" with '
            "another teacher"
        )
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, **options}

    def work(rows: list[int]) -> list[Response]:
        batch = [sent[row] for row in rows]
        if guard is None:
            return _plain_responses(model, batch, settings)
        return _guarded_responses(model, batch, guard, teacher or model.llm, settings)

    found: dict[int, Response] = {}
    label = f"generate {sent.condition} {'none' if guard is None else guard.name}"
    for rows, responses in _in_batches(work, sent, model.d_model, batch_size, label, progress):
        found.update(zip(rows, responses, strict=True))
    return [found[row] for row in range(len(sent))]


class _Steering:
    """One guard over one batch: remembers the gates that were decided at the end of the prompt.

    When the teacher streams, the batch holds 2B rows: B of the VLM, then the same B as text only.
    """

    def __init__(self, guard: Guard, where: Bool[Tensor, "batch pos"], teacher_states: States | None) -> None:
        self.guard = guard.on(where.device)
        self.where = where
        self.teacher_states = teacher_states
        self.streams = guard.source == "llm-stream"
        self.gates: dict[int, Bool[Tensor, " batch"]] = {}

    def __call__(
        self, layer: int, hidden: Float[Tensor, "rows pos d_model"]
    ) -> Float[Tensor, "rows pos d_model"]:
        """The states after the guard; the first call of a layer is the prompt."""
        count = len(self.where)
        own, text = (hidden[:count], hidden[count:]) if self.streams else (hidden, hidden[:0])
        query = self._query(layer, own, text)
        if layer not in self.gates:
            self.gates[layer] = self.guard.opens(layer, query[:, -1])
            phase: Literal["prompt", "generated"] = "prompt"
            where = self.where
        else:
            phase = "generated"
            where = torch.ones_like(own[..., 0], dtype=torch.bool)
        if not self.guard.acts(phase):
            return hidden
        mask = where & self.gates[layer].unsqueeze(1)
        return torch.cat([self.guard.steer(layer, own, query, mask), text])

    def _query(self, layer: int, own: Tensor, text: Tensor) -> Float[Tensor, "batch _ d_model"]:
        if self.teacher_states is not None:
            return self.teacher_states[layer].unsqueeze(1)
        if self.streams:
            return text[:, -1:]
        return own[:, -1:] if self.guard.source == "last" else own


def _ready(model: VLM, given: AnyPrompts, guard: Guard | None) -> Prompts:
    prompts = as_prompts(given)
    if len(prompts) == 0:
        raise MechguardError(f"there are no prompts in {prompts.name!r}")
    if guard is not None:
        guard.check(model)
    return model.prepare(prompts)


def _layer_numbers(model: VLM, layers: Sequence[int] | Literal["all"]) -> list[int]:
    if layers == "all":
        return list(range(model.n_layers))
    chosen = []
    for layer in layers:
        number = int(layer) + model.n_layers * (int(layer) < 0)
        if not 0 <= number < model.n_layers:
            raise MechguardError(
                f"layer {layer} is outside {model.name}, which has layers 0-{model.n_layers - 1}; use "
                "-1 for the last"
            )
        chosen.append(number)
    if not chosen:
        raise MechguardError('no layers were asked for; give at least one, or "all"')
    return sorted(set(chosen))


def _in_batches(
    work: Callable[[list[int]], T],
    prompts: Prompts,
    width: int,
    batch_size: BatchSize,
    label: str,
    progress: bool,
) -> Iterator[tuple[list[int], T]]:
    """Run `work` over rows sorted by length, halving the batch when memory runs out.

    Prompts with different numbers of pictures never share a batch: some families pad the pictures, or run
    other layers where there is none.
    """
    size = _auto_batch_size(width) if batch_size == "auto" else batch_size
    if size < 1:
        raise MechguardError(f"batch_size={batch_size} is not a size; give 1 or more")
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].text))
    counts = [len(prompt.images) for prompt in prompts]
    groups = [[row for row in order if counts[row] == count] for count in sorted(set(counts))]
    with tqdm(total=len(order), desc=label, unit="prompt", disable=not progress, leave=False) as bar:
        for group in groups:
            start, limit = 0, math.ceil(len(group) / math.ceil(len(group) / size))  # of equal size
            while start < len(group):
                rows = group[start : start + limit]
                try:
                    result = work(rows)
                except torch.OutOfMemoryError:
                    if batch_size != "auto" or limit == 1:
                        raise
                    size = limit = limit // 2
                    warnings.warn(f"out of memory: batches of {limit} from here on", stacklevel=3)
                    continue
                yield rows, result
                bar.update(len(rows))
                start += len(rows)


def _auto_batch_size(width: int) -> int:
    smallest, largest = AUTO_BATCH_LIMITS
    return min(max(AUTO_BATCH_NUMBERS // width, smallest), largest)


def _trace_states(
    model: VLM,
    batch: Sequence[Prompt],
    layers: list[int],
    position: Position,
    guard: Guard | None,
    teacher: VLM,
) -> Float[Tensor, "layer batch d_model"]:
    """All wanted layers of one batch in one trace that stops behind the last of them."""
    steering, encoded = _begin(model, batch, guard, teacher)
    mask = mask_positions(model, batch, encoded, position)[: len(batch)]
    check_filled(mask, batch, position)
    read = reader(mask)
    encoded |= model.position_ids(encoded)
    wanted = set(layers)
    runs = set(model.parts.running(with_picture=any(prompt.images for prompt in batch)))
    walked = list(enumerate(model.traced_layers))[: max(layers) + 1]
    traced = model.traced
    with torch.no_grad(), traced.trace(**encoded, use_cache=False) as tracer:
        found = []
        state: Tensor = torch.empty(0)
        for number, layer in walked:
            if number in runs:
                if steering is not None and number in steering.guard.layers:
                    layer.output = steering(number, layer.output)
                state = layer.output
            if number in wanted:
                found.append(read(state).to("cpu", torch.float32))
        states = torch.stack(found).save()  # type: ignore[attr-defined]
        tracer.stop()
    return states


def _plain_responses(model: VLM, batch: Sequence[Prompt], settings: dict[str, Any]) -> list[Response]:
    encoded = model.encode(batch)
    with torch.no_grad():
        sequences = model.hf_model.generate(**encoded, **settings)
    return _as_responses(model, sequences[:, encoded["input_ids"].shape[1] :], {})


def _guarded_responses(
    model: VLM, batch: Sequence[Prompt], guard: Guard, teacher: VLM, settings: dict[str, Any]
) -> list[Response]:
    steering, encoded = _begin(model, batch, guard, teacher)
    assert steering is not None
    if steering.streams:
        settings = {**settings, "logits_processor": [_same_tokens]}
    steps = slice(1) if guard.scope.phase == "prompt" else slice(None)
    runs = model.parts.running(with_picture=any(prompt.images for prompt in batch))
    steered = [(number, model.traced_layers[number]) for number in guard.layers if number in runs]
    traced = model.traced
    with torch.no_grad(), warnings.catch_warnings():
        # An answer that ends early is how an open loop over its tokens ends.
        warnings.filterwarnings("ignore", message=".*was never reached")
        with traced.generate(**settings) as tracer:
            with tracer.invoke(**encoded):
                for _ in tracer.iter[steps]:
                    for number, layer in steered:
                        layer.output = steering(number, layer.output)
            # In an invoke of its own: after an early end nothing behind the loop would run.
            with tracer.invoke():
                sequences = tracer.result.save()
    generated = sequences[: len(batch), encoded["input_ids"].shape[1] :]
    return _as_responses(model, generated, steering.gates)


def _begin(
    model: VLM, batch: Sequence[Prompt], guard: Guard | None, teacher: VLM
) -> tuple[_Steering | None, dict[str, Tensor]]:
    """Encode a batch and, for a guard, bring in what supervises it."""
    if guard is None:
        return None, model.encode(batch)
    texts = list(Prompts(batch).with_image("none"))
    streams = guard.source == "llm-stream"
    rows = [*batch, *texts] if streams else list(batch)
    encoded = model.encode(rows)
    states = None
    if guard.source == "llm":
        _check_teacher(teacher, model, guard)
        found = _trace_states(teacher, texts, list(guard.layers), "last", None, teacher)
        states = dict(zip(guard.layers, found.to(model.device), strict=True))
    where = mask_positions(model, rows, encoded, guard.scope.positions)[: len(batch)]
    return _Steering(guard, where, states), encoded


def _check_teacher(teacher: VLM, model: VLM, guard: Guard) -> None:
    if teacher.d_model != model.d_model or teacher.n_layers <= max(guard.layers):
        raise MechguardError(
            f"the teacher {teacher.name} has {teacher.n_layers} layers of d_model {teacher.d_model}, but "
            f"guard {guard.name!r} wants layers {list(guard.layers)} of d_model {model.d_model}; take an LLM "
            "of the same architecture"
        )


def _same_tokens(
    _: Int[Tensor, "rows pos"], scores: Float[Tensor, "rows vocabulary"]
) -> Float[Tensor, "rows vocabulary"]:
    """Make the text-only rows of a streaming teacher read the tokens that the VLM's rows write."""
    own = scores[: len(scores) // 2]
    return torch.cat([own, own])


def _as_responses(
    model: VLM, generated: Int[Tensor, "batch pos"], gates: dict[int, Bool[Tensor, " batch"]]
) -> list[Response]:
    pad = model.tokenizer.pad_token_id
    lengths = (generated != pad).sum(-1).tolist()
    texts = model.decode(generated)
    return [
        Response(
            text,
            length,
            tuple(generated[row, :length].tolist()),
            {layer: bool(opened[row]) for layer, opened in gates.items()},
        )
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True))
    ]
