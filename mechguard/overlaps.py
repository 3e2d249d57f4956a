"""Whether the same request stands in two sets: what is fitted on must not be what is tested on.

Texts are compared with case, white space and punctuation folded. Two requests with the same text are still
different where each owns a picture and the pictures differ: one fixed text beside many pictures (FigStep,
MM-SafetyBench) is many requests. A request inside a template is another text, and is not recognised.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechguard.prompts import CONDITIONS, FIGSTEP_TEXT, Prompt, Prompts

if TYPE_CHECKING:
    from PIL.Image import Image

FITTED = "fitted_texts"  # where `about` keeps the marks of what directions were fitted on
EXAMPLES = 2
# A mark is what is remembered of a request: a hash of its text, and of its picture if it owns one.
Mark = tuple[str, str | None]


class OverlapWarning(UserWarning):
    """The same request is used to fit or choose, and to test."""


def normalise(text: str) -> str:
    """The text in lower case with every run of white space and punctuation as one blank."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", folded).strip()


def find_overlaps(a: Prompts, b: Prompts) -> list[tuple[str, str]]:
    """Which prompts of `a` are also in `b`, whatever their labels.

    Returns:
        Pairs of ids (one of `a`, the first that matches it of `b`), at most one for each prompt of `a`.
    """
    known = _index(_marked(b))
    pairs = ((name, _match(mark, known)) for mark, name in _marked(a))
    return [(mine, other) for mine, other in pairs if other is not None]


def count_overlaps(sets: Mapping[str, Prompts]) -> dict[str, dict[str, int]]:
    """How many prompts of each set are also in each other set: counts[one][other]."""
    marked = {name: _marked(prompts) for name, prompts in sets.items()}
    known = {name: _index(several) for name, several in marked.items()}
    return {
        one: {other: sum(_match(mark, known[other]) is not None for mark, _ in marked[one]) for other in sets}
        for one in sets
    }


def find_repeats(prompts: Prompts) -> list[tuple[str, str]]:
    """Which prompts repeat an earlier one of the same set: pairs of ids (the later, the earlier)."""
    known: dict[str, dict[str | None, str]] = {}
    pairs = []
    for mark, name in _marked(prompts):
        earlier = _match(mark, known)
        if earlier is not None:
            pairs.append((name, earlier))
        known.setdefault(mark[0], {}).setdefault(mark[1], name)
    return pairs


def mark_texts(prompts: Prompts) -> list[str]:
    """Short hashes of the requests, to recognise them again without keeping them; none for empty texts."""
    marks = {mark for mark, _ in _marked(prompts)}
    return sorted(text if picture is None else f"{text}:{picture}" for text, picture in marks)


def find_marked(marks: Iterable[str], prompts: Prompts) -> list[str]:
    """The ids of the prompts that `mark_texts` has marked."""
    known = _index((_read_mark(mark), mark) for mark in marks)
    return [name for mark, name in _marked(prompts) if _match(mark, known) is not None]


def warn_of_fitted(tested: Prompts, fitted: Mapping[str, Mapping[str, Any]], *, stacklevel: int = 3) -> None:
    """Warn, once, where prompts are tested on what was fitted on them.

    Args:
        tested: the prompts of the test.
        fitted: the name of each direction or guard, and its `about`.
        stacklevel: as in `warnings.warn`; 3 is the caller of the function that calls this one.
    """
    found = {name: find_marked(about.get(FITTED, ()), tested) for name, about in fitted.items()}
    guilty = {name: ids for name, ids in found.items() if ids}
    if not guilty:
        return
    ids = list(dict.fromkeys(one for several in guilty.values() for one in several))
    names = ", ".join(guilty)
    warnings.warn(
        f"{len(ids)} of the {len(tested)} prompts of {tested.name!r} (such as {_examples(ids)}) are among "
        f"those that {names} was fitted on, which makes the test too kind; split the prompts by pair with "
        "prompts.split(), or test on another set",
        OverlapWarning,
        stacklevel=stacklevel,
    )


def warn_of_shared(uses: Iterable[tuple[Prompts, Prompts]], *, stacklevel: int = 3) -> None:
    """Warn, once, where sets that are used for different things hold the same requests.

    Args:
        uses: pairs of sets that should share nothing.
        stacklevel: as in `warnings.warn`.
    """
    shared = [(a, b, find_overlaps(a, b)) for a, b in uses]
    said = [
        f"{len(pairs)} of the {len(a)} prompts of {a.name!r} are also in {b.name!r} (such as "
        f"{', '.join(f'{mine} = {other}' for mine, other in pairs[:EXAMPLES])})"
        for a, b, pairs in shared
        if pairs
    ]
    if said:
        warnings.warn(
            f"{'; '.join(said)}: what is fitted or chosen on a prompt must not be tested on it, so take "
            "those prompts out of one of the sets",
            OverlapWarning,
            stacklevel=stacklevel,
        )


def _marked(prompts: Prompts) -> list[tuple[Mark, str]]:
    return [(mark, prompt.id) for prompt in prompts if (mark := _mark(prompt)) is not None]


def _mark(prompt: Prompt) -> Mark | None:
    text, picture = normalise(prompt.text), _mark_picture(prompt)
    if not text or (picture is None and prompt.text == FIGSTEP_TEXT):
        return None  # nothing is known of what is asked
    return _hash(text, 12), picture


def _mark_picture(prompt: Prompt) -> str | None:
    """A hash of the pictures that are sent, or else owned; None for none and for generated ones."""
    own = prompt.own_image if isinstance(prompt.own_image, (tuple, list)) else (prompt.own_image,)
    for pictures in (prompt.images, own):
        names = [name for name in map(_picture_name, pictures) if name is not None]
        if names:
            return _hash(" ".join(names), 8)
    return None


def _picture_name(picture: Image | str | Path | None) -> str | None:
    if picture is None or (isinstance(picture, str) and picture in CONDITIONS):
        return None
    if isinstance(picture, (str, Path)):  # by its file's name: the same set may lie in several places
        return Path(picture).name.lower()
    return f"picture:{hashlib.sha256(picture.tobytes()).hexdigest()[:16]}"  # as saved activations name it


def _read_mark(mark: str) -> Mark:
    text, _, picture = mark.partition(":")
    return text, picture or None


def _index(marked: Iterable[tuple[Mark, str]]) -> dict[str, dict[str | None, str]]:
    known: dict[str, dict[str | None, str]] = {}
    for (text, picture), name in marked:
        known.setdefault(text, {}).setdefault(picture, name)
    return known


def _match(mark: Mark, known: Mapping[str, Mapping[str | None, str]]) -> str | None:
    """The first with the same text whose picture does not say otherwise."""
    text, picture = mark
    if text not in known:
        return None
    if picture is None:
        return next(iter(known[text].values()))
    return known[text].get(picture, known[text].get(None))


def _hash(text: str, length: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def _examples(ids: list[str]) -> str:
    return " and ".join(repr(one) for one in ids[:EXAMPLES])
