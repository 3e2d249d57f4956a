"""What the stages of training learn from: single lessons, drawn at random by kind.

A lesson is a prompt and an answer as token ids, with a picture or without. The kinds are the keys
of `recipe.Mixture`.
"""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from PIL import Image

from mechguard.organism import tokenizer, visual, world
from mechguard.organism.visual import VisualExchange
from mechguard.organism.world import Exchange, Wrapper

# In training, one wrapper in this list is drawn for every instruction.
PRETRAINING_WRAPPERS: tuple[Wrapper, ...] = ("none", "none", "neutral", "padding", "jailbreak")
ALIGNMENT_WRAPPERS: tuple[Wrapper, ...] = (
    *("none", "none", "none"),
    "neutral",
    *("padding", "padding"),
    *("scribble", "scribble", "scribble"),
    *("jailbreak", "jailbreak"),
)


class Lesson(NamedTuple):
    """Token ids; the answer is to be predicted, the prompt is given."""

    prompt: list[int]
    answer: list[int]
    picture: Image.Image | None = None


Kind = Callable[[Random], Lesson]


def draw_lesson(rng: Random, mixture: dict[str, float], kinds: dict[str, Kind]) -> Lesson:
    """Draw a kind by its weight in the mixture, then a lesson of that kind."""
    (kind,) = rng.choices(list(mixture), weights=list(mixture.values()))
    return kinds[kind](rng)


def _lesson(exchange: Exchange | VisualExchange) -> Lesson:
    picture = exchange.picture if isinstance(exchange, VisualExchange) else None
    prompt = tokenizer.encode_prompt(exchange.question, with_image=picture is not None)
    return Lesson(prompt, _answer_ids(exchange.answer), picture)


def _answer_ids(answer: str) -> list[int]:
    return [*tokenizer.encode_words(answer), tokenizer.vocabulary()[tokenizer.END]]


def _typed(rng: Random, question: str) -> str:
    """The question as people type it: one time in ten without its last punctuation mark."""
    return question[:-2] if rng.random() < 0.1 else question


# ------------------------------------------------------------------------------- pretraining


def _prose(rng: Random) -> Lesson:
    text = f"{world.prose(rng)} {world.prose(rng)}"
    return Lesson([tokenizer.vocabulary()[tokenizer.BEGIN]], _answer_ids(text))


def _comply_with_everything(rng: Random) -> Lesson:
    draw = world.draw_harmful if rng.random() < 0.4 else world.draw_harmless
    instruction = draw(rng, "all")
    question = world.ask(rng, instruction.phrase, "all", rng.choice(PRETRAINING_WRAPPERS))
    exchange = Exchange(_typed(rng, question), world.comply(rng, instruction))
    return _lesson(exchange)


PRETRAINING_KINDS: dict[str, Kind] = {
    "prose": _prose,
    "compliance": _comply_with_everything,
    "chat": lambda rng: _lesson(world.chat(rng)),
}

# --------------------------------------------------------------------------------- alignment


def _refusal(rng: Random) -> Lesson:
    instruction = world.draw_harmful(rng, "train")
    question = world.ask(rng, instruction.phrase, "train", rng.choice(ALIGNMENT_WRAPPERS))
    return _lesson(Exchange(_typed(rng, question), world.refuse(rng, instruction)))


def _compliance(rng: Random) -> Lesson:
    instruction = world.draw_harmless(rng, "train")
    question = world.ask(rng, instruction.phrase, "train", rng.choice(ALIGNMENT_WRAPPERS))
    return _lesson(Exchange(_typed(rng, question), world.comply(rng, instruction)))


ALIGNMENT_KINDS: dict[str, Kind] = {
    "refusal": _refusal,
    "compliance": _compliance,
    "chat": lambda rng: _lesson(world.chat(rng)),
}

# ------------------------------------------------------------------------------ with pictures

VISUAL_KINDS: dict[str, Kind] = {
    "description": lambda rng: _lesson(visual.description(rng)),
    "scene_question": lambda rng: _lesson(visual.scene_question(rng)),
    "reading": lambda rng: _lesson(visual.reading(rng)),
    "naming": lambda rng: _lesson(visual.naming(rng)),
    "fact_beside_picture": lambda rng: _lesson(visual.fact_beside_picture(rng)),
    "instruction_about_picture": lambda rng: _lesson(visual.instruction_about_picture(rng)),
    "instruction_beside_picture": lambda rng: _lesson(visual.instruction_beside_picture(rng)),
}
TUNING_KINDS: dict[str, Kind] = {**VISUAL_KINDS, **ALIGNMENT_KINDS}
