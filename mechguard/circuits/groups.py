"""Which token of one prompt is which token of another, and what part of the prompt it belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechguard.circuits.decisions import Decision, encode_to_decision
from mechguard.models import VLM
from mechguard.prompts import Prompt, Prompts

ABSENT = -1
GROUPS = ("image", "harmful word", "request", "template", "last", "answer")
Groups = dict[str, Bool[Tensor, "batch pos"]]
Encoded = dict[str, Tensor]


def align(model: VLM, source: Encoded, target: Encoded) -> Int[Tensor, "batch pos"]:
    """For every position of the target, the position of the same token in the source, or -1.

    Equal tokens at the end and at the beginning belong together; what is left between them does if there is
    as much of it on both sides. Image tokens belong together if both have as many.
    """
    images = model.image_positions(source), model.image_positions(target)
    found = torch.full_like(target["input_ids"], ABSENT)
    for row in range(len(found)):
        sides = [
            [
                (place, int(encoded["input_ids"][row, place]), bool(image[row, place]))
                for place in encoded["attention_mask"][row].nonzero().flatten().tolist()
            ]
            for encoded, image in zip((source, target), images, strict=True)
        ]
        for here, there in _matched(*sides):
            found[row, there] = here
    return found


def find_groups(
    model: VLM,
    batch: Sequence[Prompt],
    encoded: Encoded,
    decision: Decision | None = None,
    *,
    contrast: Prompts | None = None,
) -> Groups:
    """The positions of each part of an encoded batch.

    Args:
        contrast: harmless prompts; words of a prompt that its partner there (or, without a partner, none
            of them) has are its "harmful word", apart from the rest of its "request".

    Returns:
        Masks by name: "image", "harmful word", "request", "template" (the chat template, and what a family
        puts around pictures), "last" (the last token of the prompt), "answer" (the decision's prefix).
    """
    texts = list(Prompts(batch).with_image("none"))
    plain = encode_to_decision(model, texts, decision)
    words = torch.stack(
        [_marked(model, prompt, plain["input_ids"].shape[1], decision, contrast) for prompt in texts]
    ).to(encoded["input_ids"].device)
    places = align(model, plain, encoded)
    kinds = torch.where(places < 0, 0, words.gather(1, places.clamp_min(0)))
    present = encoded["attention_mask"].bool()
    is_image = model.image_positions(encoded)
    order = torch.arange(present.shape[1], device=present.device).expand_as(present)
    end = present.shape[1] - (0 if decision is None else len(decision.prefix))
    answer, last = order >= end, order == end - 1
    text = present & ~is_image & ~answer & ~last
    return {
        "image": present & is_image,
        "harmful word": text & (kinds == 2),
        "request": text & (kinds == 1),
        "template": text & (kinds == 0),
        "last": last,
        "answer": answer,
    }


Token = tuple[int, int, bool]
"""A position, its token id, and whether image features stand there."""


def _matched(source: list[Token], target: list[Token]) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    source, target = list(source), list(target)
    for end in (-1, 0):
        while source and target and source[end][1:] == target[end][1:] and not source[end][2]:
            pairs.append((source.pop(end)[0], target.pop(end)[0]))
    with_picture = [any(token[2] for token in side) for side in (source, target)]
    for image in (True, False):
        left = [[token[0] for token in side if token[2] == image] for side in (source, target)]
        if len(left[0]) == len(left[1]) and (image or with_picture[0] == with_picture[1]):
            pairs += list(zip(*left, strict=True))
    return pairs


def _marked(
    model: VLM, prompt: Prompt, width: int, decision: Decision | None, contrast: Prompts | None
) -> Int[Tensor, " pos"]:
    """For the prompt as text alone: 2 on harmful words, 1 on the rest of the request, 0 elsewhere."""
    marked = torch.zeros(width, dtype=torch.long)
    (rendered,) = model.render([prompt])
    start = rendered.rfind(prompt.text.strip())
    if start < 0:
        return marked  # the template changes the text, so its words cannot be found
    stop = start + len(prompt.text.strip())
    harmful = _harmful_words(prompt, contrast)
    spans = [
        (start + word.start(), start + word.end())
        for word in re.finditer(r"\w+", prompt.text.strip())
        if word[0].lower() in harmful
    ]
    encoded = model.tokenizer(rendered, return_offsets_mapping=True, add_special_tokens=False)
    offsets = encoded["offset_mapping"]
    begin = width - (0 if decision is None else len(decision.prefix)) - len(offsets)
    for place, (first, last) in enumerate(offsets):
        if last > first and first >= start and last <= stop:
            inside = any(first < end and last > head for head, end in spans)
            marked[begin + place] = 2 if inside else 1
    return marked


def _harmful_words(prompt: Prompt, contrast: Prompts | None) -> set[str]:
    if contrast is None:
        return set()
    partners = [other for other in contrast if prompt.pair is not None and other.pair == prompt.pair]
    harmless = {word for other in partners or contrast for word in _words(other.text)}
    return set(_words(prompt.text)) - harmless


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
