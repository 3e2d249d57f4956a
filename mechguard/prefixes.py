"""What several guarded passes over the same prompts share is computed once.

    a guard at layer l            the stream up to l is that of the plain pass: go on from there
    a guard at the last position  no other position sees it: their keys and values stay, and a guarded pass
                                  is one token through the layers above l
    answers after such a guard    the prompt's keys and values are the same for every setting
    rows that a guard leaves alone  are answered as without it

The plain pass tells whether a model allows this: its logits must be those of the parts put together again.
Where they are not (features that enter between layers, as in Qwen3-VL; a prompt that is read in both
directions, as in PaliGemma; logits that are scaled behind the head) there is no prefix, and the caller makes
full passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechguard.guards.guard import Guard
from mechguard.guards.steering import Steering
from mechguard.kv_cache import OPTIONS, grows, take_rows, with_room
from mechguard.models import VLM
from mechguard.prompts import Prompt, Prompts
from mechguard.storage import digest

LIMIT = 2**31  # bytes of keys and values that a sweep keeps
# What stands at every token, and is cut with the tokens.
BY_TOKEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
Logits = Float[Tensor, "batch vocabulary"]


_SHARED: ContextVar[PromptCache | None] = ContextVar("shared_prompts", default=None)
_ANSWERS: ContextVar[AnswerCache | None] = ContextVar("kept_answers", default=None)


def name_batch(model: VLM, batch: Sequence[Prompt]) -> str:
    """What tells a batch from others: its pictures, and the strings that this model is sent."""
    return digest(model.view, Prompts(batch).fingerprint, model.render(batch))


def only_last(guards: Sequence[Guard]) -> bool:
    """Whether guards leave every position of the prompt but the last as it is."""
    return all(guard.scope.phase == "generated" or guard.scope.positions == "last" for guard in guards)


@dataclass
class _Call:
    """How a layer was called, and what it gave."""

    layer: Any
    hidden: Tensor
    rest: tuple[Any, ...]
    options: dict[str, Any]
    output: Tensor


class Prefix:
    """The plain pass over one batch, layer by layer, from which guarded passes go on.

    Attributes:
        plain: the plain logits at the last position.
    """

    def __init__(self, model: VLM, calls: dict[int, _Call], plain: Logits, cache: Any = None) -> None:
        self.plain = plain
        self._model = model
        self._calls = calls
        self._cache = cache

    def logits(self, steering: Steering) -> Logits:
        """The logits of the answer's first token under guards."""
        acting = [number for number in self._calls if number in steering.layers]
        if not acting:
            return self.plain
        cache = None if self._cache is None else with_room(self._cache, 0)
        hidden = steering(acting[0], self._calls[acting[0]].output)
        for number, call in self._calls.items():
            if number <= acting[0]:
                continue
            given = {"past_key_values": cache} if "past_key_values" in call.options else {}
            hidden = _first(call.layer(hidden, *call.rest, **{**call.options, **given}))
            if number in steering.layers:
                hidden = steering(number, hidden)
        return _head(self._model, hidden)


def read_prefix(model: VLM, encoded: dict[str, Any], *, last: bool) -> Prefix | None:
    """The prefix of a batch, or None where this model does not allow one.

    Args:
        encoded: as it would be sent, with position ids if any.
        last: for guards at the last position only; its states and the others' keys and values are kept,
            instead of the states of all positions.
    """
    found = _read_last(model, encoded) if last else _read_whole(model, encoded)
    if found is None:
        return None
    calls = list(found._calls.values())
    chained = all(after.hidden is before.output for before, after in pairwise(calls))
    return found if chained and _agree(_head(model, calls[-1].output), found.plain) else None


def _read_whole(model: VLM, encoded: dict[str, Any]) -> Prefix:
    with torch.no_grad(), _listening(model) as calls:
        plain = model.hf_model(**encoded, **model.last_logits, use_cache=False).logits[:, -1]
    return Prefix(model, calls, plain)


def _read_last(model: VLM, encoded: dict[str, Any]) -> Prefix | None:
    before = {name: value[..., :-1] if name in BY_TOKEN else value for name, value in encoded.items()}
    final = {"input_ids": encoded["input_ids"][..., -1:], "attention_mask": encoded["attention_mask"]}
    if "position_ids" in encoded:
        final["position_ids"] = encoded["position_ids"][..., -1:]
    with torch.no_grad():
        cache = model.hf_model(**before, **model.last_logits, use_cache=True).past_key_values
        if not grows(cache):
            return None
        try:
            with _listening(model) as calls:
                own = with_room(cache, 0)
                step = model.hf_model(**final, past_key_values=own, use_cache=True).logits[:, -1]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a family whose positions `generate` alone knows how to continue (Qwen-VL)
            return None
        plain = model.hf_model(**encoded, **model.last_logits, use_cache=False).logits[:, -1]
    return Prefix(model, calls, step, cache) if _agree(step, plain) else None


@contextmanager
def _listening(model: VLM) -> Iterator[dict[int, _Call]]:
    """The calls of the decoder layers while a block runs, in their order."""
    calls: dict[int, _Call] = {}
    layers = model.hf_model.get_submodule(model.parts.layers)

    def at(number: int) -> Callable[..., None]:
        def hook(layer: Any, given: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            named = {name: value for name, value in options.items() if name != "hidden_states"}
            hidden = options["hidden_states"] if not given else given[0]
            calls[number] = _Call(layer, hidden, given[1:], named, _first(output))

        return hook

    handles = [layer.register_forward_hook(at(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class PromptCache:
    """The keys and values of prompts up to their last token, by what was sent; and what supervises them.

    Prompts that find no more room are read anew every time, in the same way.

    Attributes:
        hf_model: whose they are.
        limit: how many bytes are kept.
        size: how many there are.
    """

    hf_model: Any
    limit: int = LIMIT
    size: int = 0
    known: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)

    def states(self, model: VLM, key: str, read: Callable[[], Tensor]) -> Tensor:
        """The language model's states at the end of some texts.

        Args:
            key: says which texts and layers.
            read: reads them.
        """
        if model.hf_model is not self.hf_model:
            return read()
        if key in self.read:
            return self.read[key]
        found = read()
        size = found.numel() * found.element_size()
        if self.size + size <= self.limit:
            self.read[key] = found
            self.size += size
        return found

    def inputs(
        self, model: VLM, batch: Sequence[Prompt], rows: list[int], *, room: int
    ) -> dict[str, Any] | None:
        """What to give `generate`: tokens, mask, keys and values; None where this model does not allow it.

        The whole batch is read once, whatever rows of it are wanted.

        Args:
            room: how many tokens will be generated.
        """
        if model.hf_model is not self.hf_model:
            return None
        key = name_batch(model, batch)
        if key in self.known:
            held = self.known[key]
        else:
            held = _read_cache(model, model.encode_once(batch))
            size = 0 if held is None else _bytes_of(held["past_key_values"])
            if self.size + size <= self.limit:
                self.known[key] = held
                self.size += size
        return None if held is None else _with_copy(held, room, rows)


@contextmanager
def sharing_prompts(model: VLM, *, limit: int = LIMIT) -> Iterator[PromptCache]:
    """While a block runs, answers of this model to the same prompts share the prompts' keys and values.

    For settings that leave all positions of the prompt but the last as they are; others make full passes.
    """
    active = _SHARED.get()
    if active is not None and active.hf_model is model.hf_model:
        yield active
        return
    token = _SHARED.set(PromptCache(model.hf_model, limit))
    try:
        yield _SHARED.get()  # type: ignore[misc]
    finally:
        _SHARED.reset(token)


def shared_prompts() -> PromptCache | None:
    """The cache of the block that runs, if one does."""
    return _SHARED.get()


@dataclass
class AnswerCache:
    """The plain answers to batches, for the rows that guards leave alone.

    Attributes:
        hf_model: whose they are.
        spared: seconds that it would have taken to write again what was taken from here.
    """

    hf_model: Any
    spared: float = 0.0
    known: dict[str, tuple[list[Any], float]] = field(default_factory=dict)

    def get(self, key: str, write: Callable[[], list[Any]], rows: int) -> list[Any]:
        """The answers to a batch, of which so many rows are wanted."""
        started = time.monotonic()
        if key not in self.known:
            answers = write()
            self.known[key] = answers, time.monotonic() - started
            return answers
        answers, seconds = self.known[key]
        self.spared += seconds * rows / len(answers)
        return answers


@contextmanager
def keeping_answers(model: VLM) -> Iterator[AnswerCache]:
    """While a block runs, this model's plain answers are kept, batch by batch."""
    active = _ANSWERS.get()
    if active is not None and active.hf_model is model.hf_model:
        yield active
        return
    token = _ANSWERS.set(kept := AnswerCache(model.hf_model))
    try:
        yield kept
    finally:
        _ANSWERS.reset(token)


def kept_answers(model: VLM) -> AnswerCache | None:
    """The cache of the block that runs, if one does for this model."""
    kept = _ANSWERS.get()
    return kept if kept is not None and kept.hf_model is model.hf_model else None


def continues(settings: dict[str, Any]) -> bool:
    """Whether a generation with these settings can go on from a prompt's keys and values."""
    one = all(settings.get(name, 1) == 1 for name in ("num_beams", "num_return_sequences"))
    return one and not OPTIONS & set(settings)


def _read_cache(model: VLM, encoded: dict[str, Any]) -> dict[str, Any] | None:
    """Tokens, mask, and the cache that `generate` itself makes of all tokens but the last."""
    before = {name: value[..., :-1] if name in BY_TOKEN else value for name, value in encoded.items()}
    tokens = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    if tokens["input_ids"].shape[1] < 2 or (model.hf_model.generation_config.num_beams or 1) > 1:
        return None
    settings: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 1,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with torch.no_grad():
        cache = model.hf_model.generate(**before, **settings).past_key_values
        if not grows(cache):
            return None
        held = {**tokens, "past_key_values": cache}
        every = list(range(len(tokens["input_ids"])))
        found = model.hf_model.generate(**_with_copy(held, 1, every), **settings).logits[0]
        wanted = model.hf_model.generate(**encoded, **settings).logits[0]
    return held if _agree(found, wanted) else None


def _with_copy(held: dict[str, Any], room: int, rows: list[int]) -> dict[str, Any]:
    cache = held["past_key_values"]
    if len(rows) < len(held["input_ids"]):
        held = {name: value[rows] for name, value in held.items() if name != "past_key_values"}
        cache = take_rows(cache, rows)
    return {**held, "past_key_values": with_room(cache, room)}


def _bytes_of(cache: Any) -> int:
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _head(model: VLM, hidden: Float[Tensor, "batch pos d_model"]) -> Logits:
    final = hidden[:, -1:]
    if model.parts.norm is not None:
        final = model.hf_model.get_submodule(model.parts.norm)(final)
    return model.hf_model.get_output_embeddings()(final)[:, -1]


def _agree(found: Logits, wanted: Logits) -> bool:
    """Equal but for rounding; half precision keeps about three digits."""
    close = 1e-4 if wanted.dtype == torch.float32 else 3e-2
    return bool((found - wanted).abs().max() <= close * wanted.abs().max())


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
