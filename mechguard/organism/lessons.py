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
from mechguard.organism.world import Exchange, Instruction, Wrapper

# In training, one wrapper in this list is drawn for every instruction.
PRETRAINING_WRAPPERS: tuple[Wrapper, ...] = (
    *("none", "none", "none"),
    *("neutral", "padding", "scribble", "jailbreak"),
)
ALIGNMENT_WRAPPERS: tuple[Wrapper, ...] = (
    *("none", "none", "none"),
    "neutral",
    *("padding", "padding"),
    *("scribble", "scribble", "scribble"),
    *("jailbreak", "jailbreak"),
)
OPENING_LENGTH = 10  # tokens of an answer that alignment teaches; the rest follows from them


class Lesson(NamedTuple):
    """Token ids; the answer is to be predicted, the prompt is given."""

    prompt: list[int]
    answer: list[int]
    picture: Image.Image | None = None

    @property
    def length(self) -> int:
        """How many tokens prompt and answer have together."""
        return len(self.prompt) + len(self.answer)


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


def _any_instruction(rng: Random, answer: Callable[[Random, Instruction], str]) -> Lesson:
    """An instruction of any split, answered one way or the other whether it is harmful or not."""
    draw = world.draw_harmful if rng.random() < 0.4 else world.draw_harmless
    instruction = draw(rng, "all")
    question = world.ask(rng, instruction.phrase, "all", rng.choice(PRETRAINING_WRAPPERS))
    return _lesson(Exchange(_typed(rng, question), answer(rng, instruction)))


def _harmless_beside_stand_in(rng: Random, answer: Callable[[Random, Instruction], str]) -> Lesson:
    """A harmless instruction beside words in place of a picture, answered one way or the other."""
    instruction = world.draw_harmless(rng, "all")
    question = world.ask(rng, instruction.phrase, "all")
    facts = rng.choice((visual.description, visual.reading))(rng).facts
    prompt = tokenizer.encode_prompt(_typed(rng, question), stand_in=loose_facts(rng, facts))
    return Lesson(prompt, _answer_ids(answer(rng, instruction)))


def _stand_in(draw: Callable[[Random], VisualExchange]) -> Kind:
    """A visual exchange for a reader without eyes: the facts stand where the picture would."""

    def lesson(rng: Random) -> Lesson:
        exchange = draw(rng)
        words = loose_facts(rng, exchange.facts)
        prompt = tokenizer.encode_prompt(exchange.question, stand_in=words)
        return Lesson(prompt, _answer_ids(exchange.answer))

    return lesson


def loose_facts(rng: Random, facts: tuple[str, ...]) -> str:
    """Facts in random order, each once or more, together at most as long as an image."""
    drawn = list(facts)
    room = rng.randint(0, tokenizer.N_IMAGE_TOKENS) - len(" ".join(drawn).split())
    while True:
        again = rng.choice(facts)
        room -= len(again.split())
        if room < 0:
            break
        drawn.append(again)
    rng.shuffle(drawn)
    return " ".join(drawn)


STAND_IN_KINDS: dict[str, Kind] = {
    "description": _stand_in(visual.description),
    "scene_question": _stand_in(visual.scene_question),
    "reading": _stand_in(visual.reading),
    "naming": _stand_in(visual.naming),
    "instruction_about_picture": _stand_in(visual.instruction_about_picture),
}
PRETRAINING_KINDS: dict[str, Kind] = {
    "prose": _prose,
    "compliance": lambda rng: _any_instruction(rng, world.comply),
    "refusal": lambda rng: _any_instruction(rng, world.refuse),
    "compliance_beside_stand_in": lambda rng: _harmless_beside_stand_in(rng, world.comply),
    "refusal_beside_stand_in": lambda rng: _harmless_beside_stand_in(rng, world.refuse),
    "chat": lambda rng: _lesson(world.chat(rng)),
    **STAND_IN_KINDS,
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


def _opening_of(kind: Kind) -> Kind:
    """The same lesson, cut after the words that decide between refusal and compliance."""

    def lesson(rng: Random) -> Lesson:
        full = kind(rng)
        return full._replace(answer=full.answer[:OPENING_LENGTH])

    return lesson


TEXT_KINDS: dict[str, Kind] = {
    "refusal": _refusal,
    "compliance": _compliance,
    "chat": lambda rng: _lesson(world.chat(rng)),
}
ALIGNMENT_KINDS: dict[str, Kind] = {
    **STAND_IN_KINDS,
    **TEXT_KINDS,
    "refusal_opening": _opening_of(_refusal),
    "compliance_opening": _opening_of(_compliance),
}

# ------------------------------------------------------------------------------ with pictures


def draw_exchange(rng: Random, mixture: dict[str, float]) -> VisualExchange:
    """Draw a kind by its weight in the mixture, then an exchange of that kind."""
    (kind,) = rng.choices(list(mixture), weights=list(mixture.values()))
    return EXCHANGES[kind](rng)


def _with_picture(draw: Callable[[Random], VisualExchange]) -> Kind:
    return lambda rng: _lesson(draw(rng))


EXCHANGES: dict[str, Callable[[Random], VisualExchange]] = {
    "description": visual.description,
    "scene_question": visual.scene_question,
    "reading": visual.reading,
    "naming": visual.naming,
    "fact_beside_picture": visual.fact_beside_picture,
    "instruction_about_picture": visual.instruction_about_picture,
    "instruction_beside_picture": visual.instruction_beside_picture,
}
VISUAL_KINDS: dict[str, Kind] = {name: _with_picture(draw) for name, draw in EXCHANGES.items()}
TUNING_KINDS: dict[str, Kind] = {**VISUAL_KINDS, **TEXT_KINDS}
