"""The only traces: collect hidden states, and generate under a guard.

One batch is one forward pass: every layer is read in it, and a guard acts inside it. Prompts are sorted by
length, so that little padding is computed, and come back in their own order.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from traceback import clear_frames
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechguard.activations import Activations
from mechguard.errors import MechguardError, PictureError, first_line
from mechguard.guards import Guard
from mechguard.guards.steering import AnyGuard, States, Steering
from mechguard.kv_cache import roomy_cache
from mechguard.models import VLM
from mechguard.positions import Position, check_filled, mask_positions, name_of, reader
from mechguard.prefixes import (
    Prefix,
    continues,
    kept_answers,
    name_batch,
    only_last,
    read_prefix,
    shared_prompts,
)
from mechguard.processes import find_processes
from mechguard.prompts import Prompt, Prompts, as_prompts
from mechguard.shards import Store, hash_texts, shard_size_for
from mechguard.storage import digest

# "auto" starts from so many numbers in one position's states, and halves when memory runs out: small
# models are bound by the cost of a step, large ones by memory.
AUTO_BATCH_NUMBERS = 65536
AUTO_BATCH_LIMITS = (16, 256)
GREEDY = {"do_sample", "max_new_tokens"}  # settings of a generation that says nothing else
READING_TOKENS = 32  # for what the VLM reads off a picture
BatchSize = int | Literal["auto"]
AnyPrompts = Prompts | Prompt | str | Sequence[Prompt | str]
T = TypeVar("T")


@dataclass(frozen=True)
class Response:
    """What a model answered to one prompt.

    Attributes:
        text: the generated text, without special tokens.
        tokens: how many tokens were generated.
        ids: the generated token ids, up to and with the end of the sequence.
        gates: for each layer of the guard, whether this row's gate was open.
        extra_passes: forward passes of this row beyond those of a plain answer: the language model's over the
            text, or over every token if it reads along, and those that read the picture first.
    """

    text: str
    tokens: int
    ids: tuple[int, ...] = ()
    gates: dict[int, bool] = field(default_factory=dict)
    extra_passes: int = 0


def collect(
    model: VLM,
    prompts: AnyPrompts,
    *,
    layers: Sequence[int] | Literal["all"] = "all",
    position: Position = "last",
    guard: AnyGuard | None = None,
    teacher: VLM | None = None,
    batch_size: BatchSize = "auto",
    out: str | os.PathLike[str] | None = None,
    shard_size: int | Literal["auto"] = "auto",
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
        out: a folder. The states go there shard by shard and stay there (see `shards`): memory does not grow
            with the number of prompts. The same call again goes on where it was interrupted, and several
            processes (`torchrun`) share the shards.
        shard_size: prompts in a shard of `out`; "auto" takes about 64 MB.

    Returns:
        float32 [layer, prompt, d_model], on the CPU, or in `out`.

    Raises:
        MechguardError: no prompts, a layer outside the model, pictures for a text-only model; a folder
            `out` that another process is filling, that holds states of something else, or a damaged file.
    """
    sent = _ready(model, prompts, guard)
    chosen = _layer_numbers(model, layers)
    teacher = teacher or model.llm
    processes = find_processes()

    def read(some: Prompts, label: str) -> Float[Tensor, "layer prompt d_model"]:
        def work(rows: list[int]) -> Float[Tensor, "layer batch d_model"]:
            batch = [some[row] for row in rows]
            return _trace_states(model, batch, chosen, position, _steering_parts(guard), teacher)

        data = torch.empty(len(chosen), len(some), model.d_model)
        shown = progress and processes.leads
        for rows, states in _in_batches(work, model, some, batch_size, label, shown):
            data[:, rows] = states.to("cpu", torch.float32)
        return data

    label = f"collect {model.view} {sent.condition}"
    about = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "view": model.view,
        "condition": sent.condition,
        "position": name_of(position),
        "guard": "none" if guard is None else guard.name,
        "prompts": sent.fingerprint,
        **({"skipped": list(sent.skipped)} if sent.skipped else {}),
    }
    if out is None:
        return Activations(read(sent, label), chosen, sent, about)
    store = Store(
        Path(out),
        identity=_identity(model, sent, chosen, position, guard, teacher),
        facts={"layers": chosen, "name": sent.name, "about": about},
        prompts=sent.as_lines(),
        shape=(len(chosen), len(sent), model.d_model),
        size=_shard_size(shard_size, len(chosen), model.d_model),
        processes=processes,
    )

    def read_shard(number: int, span: range) -> Float[Tensor, "layer prompt d_model"]:
        some = sent[span.start : span.stop]
        states = read(some, f"{label}, shard {number + 1} of {len(store.spans)}")
        return Activations(states, chosen, some, about).data  # looked at before it is written

    return Activations(store.fill(read_shard), chosen, sent, about)


def predict_next_tokens(
    model: VLM,
    prompts: AnyPrompts,
    *,
    guard: AnyGuard | None = None,
    teacher: VLM | None = None,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> Float[Tensor, "prompt vocabulary"]:
    """The log-probabilities of the first token of the answer to every prompt, float32, on the CPU.

    See `collect` for the arguments.
    """
    sent = _ready(model, prompts, guard)
    found: dict[int, Tensor] = {}

    def work(rows: list[int]) -> Float[Tensor, "batch vocabulary"]:
        batch = [sent[row] for row in rows]
        logits = _trace_logits(model, batch, _steering_parts(guard), teacher or model.llm)
        _check_numbers(logits.isnan().any(-1), batch)
        return logits

    label = f"predict {sent.condition} {'none' if guard is None else guard.name}"
    for rows, logits in _in_batches(work, model, sent, batch_size, label, progress):
        found.update(zip(rows, logits.log_softmax(-1), strict=True))
    return torch.stack([found[row] for row in range(len(sent))])


def score_next_tokens(
    model: VLM,
    prompts: AnyPrompts,
    guards: Sequence[AnyGuard | None],
    score: Callable[[Float[Tensor, "batch vocabulary"]], Float[Tensor, " batch"]],
    *,
    teacher: VLM | None = None,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> Float[Tensor, "guard prompt"]:
    """A score of the first token of the answer to every prompt, under each of many guards.

    The same numbers as from `predict_next_tokens`, guard by guard, but what the passes share is computed once
    (see `prefixes`).

    Args:
        score: from log-probabilities to one number a row.

    Raises:
        MechguardError: as `collect`, or a guard that sends other prompts than it was given.
    """
    sent = model.prepare(as_prompts(prompts))
    for guard in guards:
        if _ready(model, prompts, guard) != sent:
            raise MechguardError("guards that change prompts share no pass; use predict_next_tokens")
    parts = [_steering_parts(guard) for guard in guards]
    found = torch.empty(len(parts), len(sent))

    def work(rows: list[int]) -> Float[Tensor, "guard batch"]:
        logits = _shared_logits(model, [sent[row] for row in rows], parts, teacher or model.llm)
        return torch.stack([score(one.log_softmax(-1)) for one in logits])

    label = f"score {sent.condition}, {len(parts)} guards"
    for rows, scores in _in_batches(work, model, sent, batch_size, label, progress):
        found[:, rows] = scores
    return found


def generate(
    model: VLM,
    prompts: AnyPrompts,
    *,
    guard: AnyGuard | None = None,
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
    guard: AnyGuard | None = None,
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
    sent = as_prompts(prompts)
    found: dict[int, Response] = {}
    batches = respond_in_batches(
        model,
        sent,
        guard=guard,
        teacher=teacher,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        **options,
    )
    for rows, responses in batches:
        found.update(zip(rows, responses, strict=True))
    return [found[row] for row in range(len(sent))]


def respond_in_batches(
    model: VLM,
    prompts: AnyPrompts,
    *,
    guard: AnyGuard | None = None,
    teacher: VLM | None = None,
    max_new_tokens: int = 64,
    batch_size: BatchSize = "auto",
    known: Container[int] = (),
    progress: bool = True,
    **options: Any,
) -> Iterator[tuple[list[int], list[Response]]]:
    """The responses batch by batch, each with the rows of `prompts` that it answers.

    Which prompts share a batch depends on all of them and not on `known`, so that what was interrupted goes
    on with the same batches and gives the same texts.

    Args:
        known: rows that need no answer; a batch of nothing else is left out.

    See `respond` for the other arguments.
    """
    if max_new_tokens < 1:
        raise MechguardError(f"max_new_tokens={max_new_tokens} generates nothing; use 1 or more")
    sent = _ready(model, prompts, guard)
    model.want_weights("generating")
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, **options}
    parts = _steering_parts(guard)
    _check_settings(parts, settings, teacher is None or teacher is model.llm)

    def work(rows: list[int]) -> list[Response]:
        batch = [sent[row] for row in rows]
        if not parts:
            return _unsteered(model, batch, list(range(len(batch))), settings)
        return _guarded_responses(model, batch, parts, teacher or model.llm, settings)

    label = f"generate {sent.condition} {'none' if guard is None else guard.name}"
    yield from _in_batches(work, model, sent, batch_size, label, progress, known)


class _Watch:
    """A logits processor that changes nothing and remembers the rows whose logits were no numbers."""

    def __init__(self) -> None:
        self.bad: Tensor | None = None

    def __call__(
        self, _: Int[Tensor, "rows pos"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        bad = scores.isnan().any(-1)
        self.bad = bad if self.bad is None else self.bad | bad
        return scores

    def check(self, batch: Sequence[Prompt], *, shared_pass: bool = False) -> None:
        """Refuse what was written from NaN; under beams a prompt has several rows."""
        if self.bad is not None:
            own = self.bad[: len(batch)] if shared_pass else self.bad
            _check_numbers(own.view(len(batch), -1).any(-1), batch)


def _check_numbers(bad: Bool[Tensor, " batch"], batch: Sequence[Prompt]) -> None:
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        listed = ", ".join(batch[row].id for row in rows[:20])
        raise MechguardError(
            f"the model answers {len(rows)} prompts with NaN ({listed}); load it in float32 or bfloat16, or "
            "leave them out with prompts.filter(...)"
        )


def _ready(model: VLM, given: AnyPrompts, guard: AnyGuard | None) -> Prompts:
    prompts = as_prompts(given)
    if len(prompts) == 0:
        raise MechguardError(f"there are no prompts in {prompts.name!r}")
    if guard is not None:
        guard.check(model)
        prompts = guard.wrap(prompts)
    return model.prepare(prompts)


def _steering_parts(guard: AnyGuard | None) -> tuple[Guard, ...]:
    """The guards that act on states."""
    return () if guard is None else tuple(part for part in guard.parts if part.move is not None)


def _check_settings(guards: Sequence[Guard], settings: dict[str, Any], own_teacher: bool) -> None:
    streams = any(guard.source == "llm-stream" for guard in guards)
    if streams and not own_teacher:
        raise MechguardError(
            'source="llm-stream" reads the model\'s own LLM in the same pass; use source="llm" with '
            "another teacher"
        )
    if guards and settings.get("num_beams", 1) > 1:
        raise MechguardError("a traced guard cannot follow beams; use `with guard.attach(vlm): ...`")
    if streams and settings["do_sample"]:
        raise MechguardError(
            'source="llm-stream" cannot follow sampled tokens in a trace; use `with guard.attach(vlm, '
            'prompts): ...`, or source="llm"'
        )


def _identity(
    model: VLM, sent: Prompts, layers: list[int], position: Position, guard: AnyGuard | None, teacher: VLM
) -> dict[str, Any]:
    """What the states in a store belong to."""
    place = name_of(position)
    if callable(position):
        place = f"{place} {hash_texts([_source(position)])}"
    return {
        "model": model.fingerprint,
        "view": model.view,
        "prompts": sent.fingerprint,
        "rendering": hash_texts(model.render([prompt])[0] for prompt in sent),
        "layers": layers,
        "position": place,
        "guard": "none" if guard is None else f"{guard.name} {guard.fingerprint}",
        "teacher": "none" if guard is None else teacher.fingerprint,
    }


def _source(function: Callable[..., Any]) -> str:
    """The text of a function, to recognise it by."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        raise MechguardError(
            "a position whose source cannot be read cannot be recognised again; define it in a file, or "
            "collect without out="
        ) from None


def _shard_size(asked: int | Literal["auto"], n_layers: int, d_model: int) -> int:
    if asked == "auto":
        return shard_size_for(n_layers, d_model)
    if asked < 1:
        raise MechguardError(f"shard_size={asked} is not a size; give 1 or more")
    return asked


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
    model: VLM,
    prompts: Prompts,
    batch_size: BatchSize,
    label: str,
    progress: bool,
    known: Container[int] = (),
) -> Iterator[tuple[list[int], T]]:
    """Run `work` over rows sorted by their number of tokens, halving the batch when memory runs out.

    A batch that holds nothing but `known` rows is left out.

    Prompts with different numbers of pictures never share a batch: some families pad the pictures, or run
    other layers where there is none.
    """
    size = _batch_size(model.d_model, batch_size)
    groups = _groups(model, prompts)
    with tqdm(total=len(prompts), desc=label, unit="prompt", disable=not progress, leave=False) as bar:
        for group in groups:
            start, limit = 0, _equal(len(group), size)
            while start < len(group):
                rows = group[start : start + limit]
                if all(row in known for row in rows):
                    bar.update(len(rows))
                    start += len(rows)
                    continue
                try:
                    result = _attempt(work, rows, prompts)
                except torch.OutOfMemoryError as error:
                    if batch_size != "auto" or limit == 1:
                        raise MechguardError(
                            f"memory ran out on a batch of {len(rows)} prompts ({first_line(error)}); use "
                            'batch_size="auto" or a smaller one, dtype="bfloat16", or device_map="auto"'
                        ) from error
                    size = limit = limit // 2
                    warnings.warn(f"out of memory: batches of {limit} from here on", stacklevel=3)
                    continue
                yield rows, result
                bar.update(len(rows))
                start += len(rows)


def _attempt(work: Callable[[list[int]], T], rows: list[int], prompts: Prompts) -> T:
    """Run one batch; say of a picture that cannot be read which others cannot either."""
    try:
        return work(rows)
    except PictureError:
        prompts.check_pictures()
        raise
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # how the CPU's allocator says it
            raise torch.OutOfMemoryError(str(error)) from error
        raise


def plan_batches(model: VLM, prompts: Prompts, batch_size: BatchSize) -> list[list[int]]:
    """The rows of each batch, as they are sent as long as memory does not run out."""
    size = _batch_size(model.d_model, batch_size)
    return [
        group[start : start + _equal(len(group), size)]
        for group in _groups(model, prompts)
        for start in range(0, len(group), _equal(len(group), size))
    ]


def _groups(model: VLM, prompts: Prompts) -> list[list[int]]:
    """Rows sorted by length, those with different numbers of pictures apart."""
    lengths = model.count_tokens(prompts)
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    counts = [len(prompt.images) for prompt in prompts]
    return [[row for row in order if counts[row] == count] for count in sorted(set(counts))]


def _equal(count: int, size: int) -> int:
    """The size of batches of equal size."""
    return math.ceil(count / math.ceil(count / size))


def _batch_size(width: int, asked: BatchSize) -> int:
    if asked == "auto":
        smallest, largest = AUTO_BATCH_LIMITS
        return min(max(AUTO_BATCH_NUMBERS // width, smallest), largest)
    if asked < 1:
        raise MechguardError(f"batch_size={asked} is not a size; give 1 or more")
    return asked


def _trace_states(
    model: VLM,
    batch: Sequence[Prompt],
    layers: list[int],
    position: Position,
    guards: Sequence[Guard],
    teacher: VLM,
) -> Float[Tensor, "layer batch d_model"]:
    """All wanted layers of one batch in one trace that stops behind the last of them."""
    steering, encoded = _begin(model, batch, guards, teacher)
    mask = mask_positions(model, batch, encoded, position)[: len(batch)]
    check_filled(mask, batch, position)
    read = reader(mask)
    encoded |= model.position_ids(encoded)
    wanted = set(layers)
    runs = set(model.parts.running(with_picture=any(prompt.images for prompt in batch)))
    walked = list(enumerate(model.traced_layers))[: max(layers) + 1]
    traced, door = model.traced, model.door
    device = "cpu" if model.remote else model.device  # where layers that lie on several meet
    stops: list[BaseException] = []
    with torch.no_grad(), traced.trace(**encoded, use_cache=False, **door) as tracer:
        found = []
        state: Tensor = torch.empty(0)
        for number, layer in walked:
            if number in runs:
                if steering is not None and number in steering.layers:
                    layer.output = steering(number, layer.output)
                state = layer.output
            if number in wanted:
                found.append(read(state).to(device, torch.float32))
        states = torch.stack(found).save()  # type: ignore[attr-defined]
        try:
            tracer.stop()
        except Exception as stop:
            stops.append(stop)
            raise
    _release(stops)
    return states.to("cpu")


def _release(stops: list[BaseException]) -> None:
    """Free what stopped a trace.

    It and the frames that it went through hold each other, and with them hidden states, which otherwise stay
    until garbage is collected: three of [batch, pos, d_model] for every batch.
    """
    while stops:
        stop = stops.pop()
        clear_frames(stop.__traceback__)
        stop.__traceback__ = None


def _trace_logits(
    model: VLM, batch: Sequence[Prompt], guards: Sequence[Guard], teacher: VLM
) -> Float[Tensor, "batch vocabulary"]:
    steering, encoded = _begin(model, batch, guards, teacher)
    encoded |= model.position_ids(encoded)
    runs = model.parts.running(with_picture=any(prompt.images for prompt in batch))
    steered = [
        (number, model.traced_layers[number])
        for number in runs
        if steering is not None and number in steering.layers
    ]
    traced, door, rows, last = model.traced, model.door, len(batch), model.last_logits
    with torch.no_grad(), traced.trace(**encoded, **last, use_cache=False, **door):
        for number, layer in steered:
            layer.output = steering(number, layer.output)  # type: ignore[misc]
        logits = traced.output.logits[:rows, -1].to("cpu", torch.float32).save()
    return logits


def _shared_logits(
    model: VLM, batch: Sequence[Prompt], settings: Sequence[tuple[Guard, ...]], teacher: VLM
) -> Iterator[Float[Tensor, "batch vocabulary"]]:
    """The logits under each of several guards, on the CPU; what they share is computed once."""
    encoded = model.encode_once(batch)
    inputs = {**encoded, **model.position_ids(encoded)}
    prefixes: dict[bool, Prefix | None] = {}

    def prefix_of(guards: Sequence[Guard]) -> Prefix | None:
        for last in (True, False) if only_last(guards) else (False,):
            if last not in prefixes:
                prefixes[last] = read_prefix(model, inputs, last=last)
            if prefixes[last] is not None:
                return prefixes[last]
        return None

    read: dict[str | None, States] = {}
    for guards in settings:
        prefix = prefix_of(guards)
        if prefix is None:
            yield _trace_logits(model, batch, guards, teacher)
            continue
        states = _supervising_states(model, batch, guards, teacher, read)
        where = [mask_positions(model, batch, encoded, guard.scope.positions) for guard in guards]
        with torch.no_grad():
            logits = prefix.logits(Steering(guards, where, teacher_states=states)) if guards else prefix.plain
        yield logits.to("cpu", torch.float32)


def _plain_responses(model: VLM, batch: Sequence[Prompt], settings: dict[str, Any]) -> list[Response]:
    encoded, watch = _encode(model, batch, list(range(len(batch))), (), settings), _Watch()
    settings = _with_processors(_with_cache(model, encoded, settings), watch)
    with torch.no_grad():
        sequences = model.hf_model.generate(**encoded, **settings)
    watch.check(batch)
    return _as_responses(model, sequences[:, encoded["input_ids"].shape[1] :], {})


def _guarded_responses(
    model: VLM, batch: Sequence[Prompt], guards: Sequence[Guard], teacher: VLM, settings: dict[str, Any]
) -> list[Response]:
    """Answers under guards; rows whose gates are all closed are answered without them, if the text tells.

    Sampled batches stay together, for each token is drawn row by row.
    """
    if settings["do_sample"] or not all(guard.supervised and guard.gated for guard in guards):
        return _steered_responses(model, batch, guards, teacher, settings)
    read = _supervise(model, batch, guards, teacher)
    gates = read.gates(guards)
    opened = torch.stack(list(gates.values())).any(0)
    steered, closed = (torch.nonzero(mask).flatten().tolist() for mask in (opened, ~opened))
    found: dict[int, Response] = {}
    if steered:
        answers = _steered_responses(model, batch, guards, teacher, settings, read, steered)
        found.update(zip(steered, answers, strict=True))
    shut = dict.fromkeys(gates, False)
    for row, answer in zip(closed, _unsteered(model, batch, closed, settings), strict=True):
        found[row] = replace(answer, gates=shut, extra_passes=read.passes[row])
    return [found[row] for row in range(len(batch))]


def _unsteered(
    model: VLM, batch: Sequence[Prompt], rows: list[int], settings: dict[str, Any]
) -> list[Response]:
    """The plain answers of some rows of a batch; of the whole batch, where it is answered plainly anyway."""
    kept = kept_answers(model) if set(settings) == GREEDY else None
    if not rows:
        return []
    if kept is None:
        return _plain_responses(model, [batch[row] for row in rows], settings)
    key = digest(name_batch(model, batch), settings)
    answers = kept.get(key, lambda: _plain_responses(model, batch, settings), len(rows))
    return [answers[row] for row in rows]


def _steered_responses(
    model: VLM,
    batch: Sequence[Prompt],
    guards: Sequence[Guard],
    teacher: VLM,
    settings: dict[str, Any],
    read: _Supervision | None = None,
    rows: list[int] | None = None,
) -> list[Response]:
    """The answers to some rows of a batch; to all of them by default."""
    steering, encoded = _begin(model, batch, guards, teacher, settings, read, rows)
    assert steering is not None
    batch = batch if rows is None else [batch[row] for row in rows]
    watch = _Watch()
    following = [_same_tokens] if steering.shared_pass else []
    settings = _with_processors(_with_cache(model, encoded, settings), watch, *following)
    only_prompt = all(guard.scope.phase == "prompt" for guard in guards)
    steps = slice(1) if only_prompt else slice(None)
    runs = model.parts.running(with_picture=any(prompt.images for prompt in batch))
    steered = [(number, model.traced_layers[number]) for number in runs if number in steering.layers]
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
    watch.check(batch, shared_pass=steering.shared_pass)
    generated = sequences[: len(batch), encoded["input_ids"].shape[1] :]
    answers = _as_responses(model, generated, steering.gates)
    streams = steering.shared_pass
    return [
        replace(answer, extra_passes=passes + (answer.tokens if streams else 0))
        for answer, passes in zip(answers, steering.extra_passes, strict=True)
    ]


def _with_processors(settings: dict[str, Any], *own: Callable[..., Tensor]) -> dict[str, Any]:
    return {**settings, "logits_processor": [*settings.get("logits_processor", ()), *own]}


def _begin(
    model: VLM,
    batch: Sequence[Prompt],
    guards: Sequence[Guard],
    teacher: VLM,
    settings: dict[str, Any] | None = None,
    read: _Supervision | None = None,
    rows: list[int] | None = None,
) -> tuple[Steering | None, dict[str, Any]]:
    """Encode a batch and, for guards, bring in what supervises them.

    Args:
        settings: of a generation; None for a single pass.
        read: what supervises the batch, if it was read before.
        rows: those of the batch that are wanted; all by default.
    """
    rows = list(range(len(batch))) if rows is None else rows
    if not guards:
        return None, _encode(model, batch, rows, guards, settings)
    streams = any(guard.source == "llm-stream" for guard in guards)
    read = read or _supervise(model, batch, guards, teacher, states=not streams)
    sent = [*batch, *read.texts] if streams else batch
    taken = [*rows, *(len(batch) + row for row in rows)] if streams else rows
    encoded = _encode(model, sent, taken, guards, settings)
    batch, read, sent = [batch[row] for row in rows], read.of(rows), [sent[row] for row in taken]
    states = None if streams else read.states
    where = [mask_positions(model, sent, encoded, guard.scope.positions)[: len(batch)] for guard in guards]
    steering = Steering(guards, where, teacher_states=states, shared_pass=streams)
    steering.extra_passes = read.passes
    return steering, encoded


def _encode(
    model: VLM,
    batch: Sequence[Prompt],
    rows: list[int],
    guards: Sequence[Guard],
    settings: dict[str, Any] | None,
) -> dict[str, Any]:
    """Rows of a batch encoded; where prompts are shared, with the keys and values of all tokens but one."""
    shared = shared_prompts()
    found = None
    if settings is not None and shared is not None and only_last(guards) and continues(settings):
        found = shared.inputs(model, batch, rows, room=settings["max_new_tokens"])
    return model.encode_once([batch[row] for row in rows]) if found is None else found


def _with_cache(model: VLM, encoded: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a generation, with a cache that does not copy itself at every token."""
    return settings if "past_key_values" in encoded else {**roomy_cache(model.hf_model, settings), **settings}


@dataclass(frozen=True)
class _Supervision:
    """What supervises the rows of a batch.

    Attributes:
        texts: what the language model reads; none if it is not asked.
        passes: how many forward passes of each row it took.
        states: the language model's, at the end of its texts, by layer; None where the texts ride along.
    """

    texts: list[Prompt]
    passes: list[int]
    states: States | None = None

    def of(self, rows: list[int]) -> _Supervision:
        """The same for some rows."""
        states = self.states and {layer: found[rows] for layer, found in self.states.items()}
        texts = [self.texts[row] for row in rows] if self.texts else []
        return _Supervision(texts, [self.passes[row] for row in rows], states)

    def gates(self, guards: Sequence[Guard]) -> dict[int, Bool[Tensor, " batch"]]:
        """For each layer, the rows for which some guard opens."""
        assert self.states is not None
        found: dict[int, Bool[Tensor, " batch"]] = {}
        for guard in guards:
            for layer in guard.layers:
                query = self.states[layer]
                opened = guard.on(query.device).opens(layer, query)
                found[layer] = found[layer] | opened if layer in found else opened
        return dict(sorted(found.items()))


def _supervise(
    model: VLM, batch: Sequence[Prompt], guards: Sequence[Guard], teacher: VLM, *, states: bool = True
) -> _Supervision:
    supervised = [guard for guard in guards if guard.supervised]
    if not supervised:
        return _Supervision([], [0] * len(batch))
    texts, passes = _supervising_texts(model, batch, supervised)
    if not states:
        return _Supervision(texts, passes)
    layers = sorted({layer for guard in supervised for layer in guard.layers})
    return _Supervision(texts, [count + 1 for count in passes], _read_states(model, texts, layers, teacher))


def _read_states(model: VLM, texts: Sequence[Prompt], layers: list[int], teacher: VLM) -> States:
    """What the teacher's states are at the end of each text."""
    _check_teacher(teacher, model, layers)

    def read() -> Float[Tensor, "layer batch d_model"]:
        return _trace_states(teacher, texts, layers, "last", (), teacher).to(model.device)

    shared = shared_prompts()
    if shared is None or teacher is not model.llm:
        found = read()
    else:
        found = shared.states(model, digest(name_batch(teacher, texts), layers), read)
    return dict(zip(layers, found, strict=True))


def _supervising_states(
    model: VLM, batch: Sequence[Prompt], guards: Sequence[Guard], teacher: VLM, read: dict[str | None, States]
) -> States | None:
    """The teacher's states at all layers; `read` holds those of the same texts."""
    supervised = [guard for guard in guards if guard.supervised]
    if not supervised:
        return None
    question = supervised[0].reads
    if question not in read:
        texts, _ = _supervising_texts(model, batch, supervised)
        layers = list(range(min(teacher.n_layers, model.n_layers)))
        read[question] = _read_states(model, texts, layers, teacher)
    _check_teacher(teacher, model, sorted({layer for guard in supervised for layer in guard.layers}))
    return read[question]


def _supervising_texts(
    model: VLM, batch: Sequence[Prompt], guards: Sequence[Guard]
) -> tuple[list[Prompt], list[int]]:
    """What the language model reads: the text, behind what the VLM reads off the picture if asked to.

    Also how many forward passes of each row that reading took.
    """
    questions = {guard.reads for guard in guards}
    if len(questions) > 1:
        raise MechguardError("guards that act together must supervise from the same text; `reads` differs")
    question = questions.pop()
    texts = list(Prompts(batch).with_image("none"))
    passes = [0] * len(batch)
    if question is None:
        return texts, passes
    pictured = [row for row, prompt in enumerate(batch) if prompt.images]
    asked = [replace(batch[row], text=question) for row in pictured]
    settings = {"do_sample": False, "max_new_tokens": READING_TOKENS}
    read = _plain_responses(model, asked, settings) if asked else []
    for row, answer in zip(pictured, read, strict=True):
        texts[row] = replace(texts[row], text=f"{answer.text} {texts[row].text}")
        passes[row] = answer.tokens
    return texts, passes


def _check_teacher(teacher: VLM, model: VLM, layers: list[int]) -> None:
    if teacher.d_model != model.d_model or teacher.n_layers <= max(layers):
        raise MechguardError(
            f"the teacher {teacher.name} has {teacher.n_layers} layers of d_model {teacher.d_model}, but "
            f"the guard wants layers {layers} of d_model {model.d_model}; take an LLM of the same "
            "architecture"
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
    lengths = _lengths(generated, model.hf_model.generation_config.eos_token_id)
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


def _lengths(generated: Int[Tensor, "batch pos"], ends: int | list[int] | None) -> list[int]:
    """How many tokens each row wrote, up to and with the first that ends it."""
    stops = torch.as_tensor([] if ends is None else ends, device=generated.device).flatten()
    before = torch.isin(generated, stops).int().cumsum(-1) == 0
    return (before.sum(-1) + 1).clamp_max(generated.shape[1]).tolist()
