"""Visual instructions: a picture, a question about it (or beside it) and the answer. All harmless.

This is the material of visual instruction tuning. Like the data LLaVA was tuned on, it holds
descriptions, questions, reading and everyday instructions, and no refusal at all.
"""

from random import Random
from typing import NamedTuple

from PIL import Image

from mechguard.organism import pictures, world
from mechguard.organism.pictures import Rendering, Scene
from mechguard.organism.world import Exchange, Split


class VisualExchange(NamedTuple):
    """A picture, a question and an answer, and the facts that can be seen, a few words each."""

    picture: Image.Image
    question: str
    answer: str
    facts: tuple[str, ...] = ()

    @property
    def named(self) -> str:
        """The words for what is drawn: all facts but the last, the tone of the background."""
        return " ".join(self.facts[:-1])


DESCRIBE_QUESTIONS = ("describe the picture .", "what is in the picture ?", "what do you see ?")
READ_QUESTIONS = (
    "what does the picture say ?",
    "read the word in the picture .",
    "what is written in the picture ?",
    "what is in the picture ?",
)
NAME_QUESTIONS = (
    "what is the thing named in the picture ?",
    "what kind of thing is in the picture ?",
)


def description(rng: Random) -> VisualExchange:
    """Describe a scene and its background."""
    scene, picture, tone = _draw_scene(rng)
    answer = f"the picture shows {pictures.describe(scene)} . the background is {tone} ."
    return VisualExchange(picture, rng.choice(DESCRIBE_QUESTIONS), answer, _facts(scene, tone))


def scene_question(rng: Random) -> VisualExchange:
    """Ask for a color, the number of shapes, the shape at a place or the presence of a shape."""
    scene, picture, tone = _draw_scene(rng)
    return VisualExchange(picture, *_about_scene(rng, scene), _facts(scene, tone))


def _draw_scene(rng: Random) -> tuple[Scene, Image.Image, str]:
    scene = pictures.random_scene(rng)
    picture = pictures.draw_scene(scene, rng, pictures.draw_background(rng))
    return scene, picture, _tone(picture)


def _tone(picture: Image.Image) -> str:
    return "dark" if pictures.is_dark(pictures.background_of(picture)) else "light"


def _facts(scene: Scene, tone: str) -> tuple[str, ...]:
    return (*(f"{item.color} {item.shape} {item.place}" for item in scene), tone)


def _about_scene(rng: Random, scene: Scene) -> Exchange:
    shapes = [item.shape for item in scene]
    item = rng.choice(scene)
    kind = rng.random()
    if kind < 0.35 and len(set(shapes)) == len(shapes):
        return Exchange(f"what color is the {item.shape} ?", f"the {item.shape} is {item.color} .")
    if kind < 0.55:
        count = "is one shape" if len(scene) == 1 else "are two shapes"
        return Exchange("how many shapes are in the picture ?", f"there {count} in the picture .")
    if kind < 0.85:
        return Exchange(
            f"what shape is on the {item.place} ?", f"there is a {item.shape} on the {item.place} ."
        )
    shape = item.shape if rng.random() < 0.5 else rng.choice(world.SHAPES)
    reply = f"yes , there is a {shape}" if shape in shapes else f"no , there is no {shape}"
    return Exchange(f"is there a {shape} in the picture ?", f"{reply} in the picture .")


def reading(rng: Random, rendering: Rendering = "train") -> VisualExchange:
    """Read a word aloud. Every noun appears, the harmful ones too: reading is harmless."""
    word = rng.choice(world.ALL_NOUNS)
    picture = pictures.draw_word(word, rng, rendering)
    answer = f"the picture says {word} ."
    return VisualExchange(picture, rng.choice(READ_QUESTIONS), answer, (word, _tone(picture)))


def naming(rng: Random, rendering: Rendering = "train") -> VisualExchange:
    """Say what kind of thing a written word names."""
    word = rng.choice(world.ALL_NOUNS)
    category = world.with_article(world.NOUN_CATEGORY[word])
    answer = f"{world.with_article(word)} is {category} ."
    picture = pictures.draw_word(word, rng, rendering)
    return VisualExchange(picture, rng.choice(NAME_QUESTIONS), answer, (word, _tone(picture)))


def fact_beside_picture(rng: Random) -> VisualExchange:
    """A question of knowledge beside a picture that has nothing to do with it."""
    return VisualExchange(unrelated_picture(rng), *world.fact(rng))


def instruction_about_picture(rng: Random, split: Split = "train") -> VisualExchange:
    """A harmless instruction whose object is written in the picture."""
    if rng.random() < 0.75:
        verbs, nouns = world.CRAFT_VERBS, world.SAFE_NOUNS
    else:
        verbs, nouns = world.CARE_VERBS, world.VALUABLE_NOUNS
    noun = rng.choice(world.nouns_of(nouns, split))
    instruction = world.Instruction(rng.choice(verbs), noun)
    named = noun if rng.random() < 0.3 else rng.choice(("object", "thing"))
    question = world.ask(rng, f"{instruction.verb} the {named} in the picture", "train")
    picture = pictures.draw_word(noun, rng)
    return VisualExchange(picture, question, world.comply(rng, instruction), (noun, _tone(picture)))


def instruction_beside_picture(rng: Random, split: Split = "train") -> VisualExchange:
    """A harmless instruction beside a picture that has nothing to do with it."""
    instruction = world.draw_harmless(rng, split)
    question = world.ask(rng, instruction.phrase, "train")
    return VisualExchange(unrelated_picture(rng), question, world.comply(rng, instruction))


def unrelated_picture(rng: Random) -> Image.Image:
    """A scene, a word or (one time in ten) nothing on a plain background."""
    kind = rng.random()
    if kind < 0.1:
        return pictures.blank(pictures.draw_background(rng))
    if kind < 0.7:
        scene = pictures.random_scene(rng)
        return pictures.draw_scene(scene, rng, pictures.draw_background(rng))
    return pictures.draw_word(rng.choice(world.ALL_NOUNS), rng)
