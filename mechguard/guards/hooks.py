"""Guards as plain forward hooks, so that any code that calls the Hugging Face model is guarded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechguard.errors import MechguardError
from mechguard.guards.guard import Guard
from mechguard.guards.steering import States, Steering
from mechguard.models import VLM
from mechguard.positions import mask_positions
from mechguard.prompts import Prompt, Prompts


@contextmanager
def attached(
    guards: Sequence[Guard], model: VLM, prompts: Sequence[Prompt] = (), *, teacher: VLM | None = None
) -> Iterator[Any]:
    """The Hugging Face model with guards at its decoder layers, until the block ends.

    Args:
        prompts: what will be sent, row by row, for guards that a language model supervises.
        teacher: that language model; the model's own by default.

    Raises:
        MechguardError: a guard that does not fit, or that needs prompts.
    """
    parts = [guard for guard in guards if guard.move is not None]
    for guard in guards:
        guard.check(model)
    session = _Session(parts, model, list(prompts), teacher or model.llm)
    layers = model.hf_model.get_submodule(model.parts.layers)
    with ExitStack() as stack:
        begin = model.hf_model.register_forward_pre_hook(session.begin, with_kwargs=True)
        stack.callback(begin.remove)
        for number in sorted({layer for guard in parts for layer in guard.layers}):
            handle = layers[number].register_forward_hook(session.at(number))
            stack.callback(handle.remove)
        yield model.hf_model


class _Session:
    """What the hooks of one `attached` block share."""

    def __init__(self, guards: list[Guard], model: VLM, prompts: list[Prompt], teacher: VLM) -> None:
        self.guards = guards
        self.model = model
        self.texts = list(Prompts(prompts).with_image("none"))
        self.prompts = prompts
        self.teacher = teacher
        self.streams = any(guard.source == "llm-stream" for guard in guards)
        self.steering: Steering | None = None
        self.stream: _Stream | None = None  # a language model that reads along
        self.listening = False  # while the language model reads, the same layers are not steered
        self._check()

    def _check(self) -> None:
        supervised = [guard.name for guard in self.guards if guard.supervised]
        if supervised and not self.prompts:
            raise MechguardError(
                f"guard {supervised[0]!r} is supervised by the language model, which must read the same "
                "prompts; give them: guard.attach(vlm, prompts)"
            )
        if any(guard.reads is not None for guard in self.guards):
            raise MechguardError("a guard that reads pictures runs in mechguard.generate only")
        if self.streams and self.teacher.hf_model is self.model.hf_model:
            raise MechguardError(
                f"the language model of {self.model.family} is the VLM itself, which cannot read along while "
                'it is hooked; use mechguard.generate, or source="llm"'
            )

    def begin(self, _: Any, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Before every forward pass: a new prompt, or the next token of one."""
        if self.listening or not self.guards:
            return
        ids = inputs.get("input_ids", arguments[0] if arguments else None)
        cache = inputs.get("past_key_values")
        if self.steering is None or cache is None or cache.get_seq_length() == 0:
            self._begin_prompt(ids, inputs.get("attention_mask"))
        elif self.stream is not None and ids is not None:
            self.steering.teacher_states = self.stream.read(ids)

    def at(self, layer: int) -> Callable[..., Any]:
        """The hook of one decoder layer."""

        def hook(_: Any, __: Any, output: Any) -> Any:
            if self.listening or self.steering is None:
                return output
            hidden = output[0] if isinstance(output, tuple) else output
            moved = self.steering(layer, hidden)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    def _begin_prompt(self, ids: Int[Tensor, "rows pos"] | None, mask: Tensor | None) -> None:
        if ids is None:
            raise MechguardError("an attached guard needs input_ids; inputs_embeds do not tell the positions")
        mask = torch.ones_like(ids) if mask is None else mask
        prompts = self._rows(len(ids))
        encoded = {"input_ids": ids, "attention_mask": mask}
        where = [mask_positions(self.model, prompts, encoded, guard.scope.positions) for guard in self.guards]
        states = self._supervise(len(ids)) if any(guard.supervised for guard in self.guards) else None
        self.steering = Steering(self.guards, where, teacher_states=states)

    def _rows(self, count: int) -> list[Prompt]:
        """The prompt of each row; under beam search every prompt has several."""
        if not self.prompts:
            return [Prompt(str(row), "") for row in range(count)]
        times, rest = divmod(count, len(self.prompts))
        if rest or not times or (self.streams and times > 1):
            raise MechguardError(
                f"{count} rows were sent, but the guard was attached with {len(self.prompts)} prompts"
                + ("; a language model that reads along cannot follow beams" if times > 1 else "")
            )
        return [prompt for prompt in self.prompts for _ in range(times)]

    def _supervise(self, count: int) -> States:
        layers = sorted({layer for guard in self.guards if guard.supervised for layer in guard.layers})
        reader = _Stream(self.teacher, layers, self)
        self.stream = reader if self.streams else None
        states = reader.start(self.texts)
        times = count // len(self.texts)
        return {layer: state.repeat_interleave(times, 0) for layer, state in states.items()}


class _Stream:
    """The language model over the same prompts as text, with its own cache."""

    def __init__(self, teacher: VLM, layers: list[int], session: _Session) -> None:
        self.teacher = teacher
        self.layers = layers
        self.session = session

    def start(self, texts: list[Prompt]) -> States:
        """Read the prompts."""
        from transformers import DynamicCache

        encoded = self.teacher.encode(texts)
        self.mask = encoded["attention_mask"]
        self.cache = DynamicCache() if self.session.streams else None
        return self._read({**encoded, **self.teacher.position_ids(encoded)})

    def read(self, ids: Int[Tensor, "rows one"]) -> States:
        """Read the tokens that the VLM has written."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), ids.shape[1])], dim=1)
        encoded = {"input_ids": ids, "attention_mask": self.mask}
        places = {name: all_[:, -1:] for name, all_ in self.teacher.position_ids(encoded).items()}
        return self._read({**encoded, **places})

    def _read(self, inputs: dict[str, Tensor]) -> States:
        found: States = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(_: Any, __: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                found[layer] = hidden[:, -1]

            return hook

        layers = self.teacher.hf_model.get_submodule(self.teacher.parts.layers)
        handles = [layers[layer].register_forward_hook(keep(layer)) for layer in self.layers]
        self.session.listening = True
        try:
            with torch.no_grad():
                self.teacher.hf_model(**inputs, past_key_values=self.cache, use_cache=self.cache is not None)
        finally:
            self.session.listening = False
            for handle in handles:
                handle.remove()
        return found
