"""Positions as words: which tokens of a prompt are meant by "last", "image", "text", ..."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechguard.errors import MechguardError
from mechguard.models import VLM
from mechguard.prompts import Prompt

Word = Literal["last", "last_text", "image", "text", "all"]
Position = Word | int | Sequence[int] | Callable[["Row"], Any]


@dataclass(frozen=True)
class Row:
    """The tokens of one prompt, without padding, for a position given as a function.

    Attributes:
        prompt: what they encode.
        ids: [pos].
        words: the tokens as text.
        is_image: [pos], true where image features stand.
    """

    prompt: Prompt
    ids: Int[Tensor, " pos"]
    words: list[str]
    is_image: Bool[Tensor, " pos"]


def mask_positions(
    model: VLM, prompts: Sequence[Prompt], encoded: dict[str, Tensor], position: Position
) -> Bool[Tensor, "batch pos"]:
    """The chosen positions of an encoded batch; never padding.

    Args:
        position: "last" (the last token of what is sent), "last_text" (the last token of the prompt's own
            text, before what the template puts behind it), "image", "text" (all but image), "all"; an
            index or several, counted from the first token, or from the end if negative; or a function of
            a `Row` that gives an index, several, or a mask.

    Raises:
        MechguardError: an unknown word, or an index outside a prompt.
    """
    present = encoded["attention_mask"].bool()
    is_image = model.image_positions(encoded)
    if position == "all":
        return present
    if position == "image":
        return present & is_image
    if position == "text":
        return present & ~is_image
    if position == "last":
        return _from_the_end(present, [0] * len(prompts))
    if position == "last_text":
        return _from_the_end(present, [_tokens_behind(model, prompt) for prompt in prompts])
    if isinstance(position, str):
        raise MechguardError(
            f"position {position!r} is not known; use one of {', '.join(get_args(Word))}, an index, or a "
            "function"
        )
    chosen = torch.zeros_like(present)
    for row, prompt in enumerate(prompts):
        where = present[row].nonzero().flatten()
        wanted = position
        if callable(position):
            there = present[row]
            wanted = position(read_row(model, prompt, encoded["input_ids"][row][there], is_image[row][there]))
        chosen[row, where[_indices(wanted, len(where), prompt)]] = True
    return chosen


def reader(
    mask: Bool[Tensor, "batch pos"],
) -> Callable[[Float[Tensor, "rows pos d_model"]], Float[Tensor, "batch d_model"]]:
    """A function from hidden states to the state at each row's chosen position.

    Where several are chosen it gives their mean, in float32. Rows of the states behind the mask's are
    left out.
    """
    counts, rows = mask.sum(-1), torch.arange(len(mask), device=mask.device)
    single, index = bool((counts == 1).all()), mask.int().argmax(-1)
    weights = mask.float() / counts.unsqueeze(-1)

    def read(hidden: Float[Tensor, "rows pos d_model"]) -> Float[Tensor, "batch d_model"]:
        if single:  # indexing copies, so that the whole layer's output can be freed
            return hidden[rows.to(hidden.device), index.to(hidden.device)]
        own = hidden[: len(mask)].to(torch.float32)
        return torch.einsum("bp,bpd->bd", weights.to(hidden.device), own)

    return read


def check_filled(mask: Bool[Tensor, "batch pos"], prompts: Sequence[Prompt], position: Position) -> None:
    """Refuse prompts in which nothing is chosen.

    Raises:
        MechguardError: a prompt without such a position.
    """
    empty = (~mask.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise MechguardError(
            f"prompt {prompts[empty[0]].id!r} has no position {name_of(position)!r}; image positions need a "
            "picture that stands among the tokens"
        )


def name_of(position: Position) -> str | int | list[int]:
    """How a position is called in `about`."""
    if callable(position):
        return getattr(position, "__name__", "function")
    return position if isinstance(position, (str, int)) else [int(index) for index in position]


def _from_the_end(present: Bool[Tensor, "batch pos"], behind: list[int]) -> Bool[Tensor, "batch pos"]:
    chosen = torch.zeros_like(present)
    for row, count in enumerate(behind):
        chosen[row, present.shape[1] - 1 - count] = True
    return chosen


def _tokens_behind(model: VLM, prompt: Prompt) -> int:
    """How many tokens follow the prompt's own text."""
    (rendered,) = model.render([prompt])
    start = rendered.rfind(prompt.text.strip())
    if start < 0:
        raise MechguardError(
            f"the chat template of {model.name} changes the text of prompt {prompt.id!r}, so its last token "
            "cannot be told; give an index"
        )
    end = start + len(prompt.text.strip())
    encoded = model.tokenizer(rendered, return_offsets_mapping=True, add_special_tokens=False)
    behind = sum(first >= end and last > first for first, last in encoded["offset_mapping"])
    added = model.parts.family.processor_adds if prompt.images else ""
    return behind + len(model.tokenizer(added, add_special_tokens=False)["input_ids"] if added else [])


def read_row(model: VLM, prompt: Prompt, ids: Int[Tensor, " pos"], is_image: Bool[Tensor, " pos"]) -> Row:
    """The tokens of one prompt, without padding."""
    return Row(prompt, ids.cpu(), model.tokenizer.convert_ids_to_tokens(ids.tolist()), is_image.cpu())


def _indices(wanted: Any, length: int, prompt: Prompt) -> list[int]:
    tensor = torch.as_tensor(wanted)
    if tensor.dtype == torch.bool:
        tensor = tensor.nonzero()
    found = [int(index) for index in tensor.flatten().tolist()]
    for index in found:
        if not -length <= index < length:
            raise MechguardError(
                f"position {index} lies outside prompt {prompt.id!r}, which has {length} tokens"
            )
    return found
