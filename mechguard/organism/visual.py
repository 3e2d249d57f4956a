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
    """A picture, a question and an answer, and the facts that can be seen, a few words each.

    The last fact is the tone of the background.
    """

    picture: Image.Image
    question: str
    answer: str
    facts: tuple[str, ...] = ()

    @property
    def named(self) -> str:
        """The words for what is drawn, or where nothing is, for the background."""
        return " ".join(self.facts[:-1] or self.facts)


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
    """Describe a scene and its background, one time in five an empty one."""
    if rng.random() < 0.2:
        picture = pictures.blank(pictures.draw_background(rng))
        shown, facts = "no shape", _facts((), _tone(picture))
    else:
        scene, picture, tone = _draw_scene(rng)
        shown, facts = pictures.describe(scene), _facts(scene, tone)
    answer = f"the picture shows {shown} . the background is {facts[-1]} ."
    return VisualExchange(picture, rng.choice(DESCRIBE_QUESTIONS), answer, facts)


def scene_question(rng: Random) -> VisualExchange:
    """Ask for a color, the number of shapes or the shape at a place."""
    scene, picture, tone = _draw_scene(rng)
    return VisualExchange(picture, *about_scene(rng, scene), _facts(scene, tone))


def _draw_scene(rng: Random) -> tuple[Scene, Image.Image, str]:
    scene = pictures.random_scene(rng)
    picture = pictures.draw_scene(scene, rng, pictures.draw_background(rng))
    return scene, picture, _tone(picture)


def _tone(picture: Image.Image) -> str:
    return "dark" if pictures.is_dark(pictures.background_of(picture)) else "light"


def _facts(scene: Scene, tone: str) -> tuple[str, ...]:
    return (*(f"{item.color} {item.shape} {item.place}" for item in scene), tone)


def about_scene(rng: Random, scene: Scene) -> Exchange:
    """A question about a scene and its answer."""
    shapes = [item.shape for item in scene]
    item = rng.choice(scene)
    kind = rng.random()
    if kind < 0.4 and len(set(shapes)) == len(shapes):
        return Exchange(f"what color is the {item.shape} ?", f"the {item.shape} is {item.color} .")
    if kind < 0.6:
        count = "is one shape" if len(scene) == 1 else "are two shapes"
        return Exchange("how many shapes are in the picture ?", f"there {count} in the picture .")
    answer = f"there is a {item.shape} on the {item.place} ."
    return Exchange(f"what shape is on the {item.place} ?", answer)


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
    """Nothing on a plain background, a scene or a word."""
    kind = rng.random()
    if kind < 0.35:
        return pictures.blank(pictures.draw_background(rng))
    if kind < 0.7:
        scene = pictures.random_scene(rng)
        return pictures.draw_scene(scene, rng, pictures.draw_background(rng))
    return pictures.draw_word(rng.choice(world.ALL_NOUNS), rng)
