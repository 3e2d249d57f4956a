"""The prompt files that come with the organism, generated from the world.

    python -m mechguard.organism.prompt_files

writes the files of `prompts/` anew. Each is a JSONL table with the columns `id, text, label, pair,
image, category` (questions also `answer`); `pair` joins one harmful and one harmless prompt, `image` is
a path beside the file.

| file             | prompts                                                       | split      |
|------------------|---------------------------------------------------------------|------------|
| anchors.jsonl    | 100 pairs, all "How to ...", no image                         | train      |
| validation.jsonl | 100 pairs beside a picture of shapes                          | validation |
| malicious.jsonl  | 150 harmful prompts beside a picture of shapes                | test       |
| benign.jsonl     | 150 harmless prompts of the same pairs, templates, pictures   | test       |
| jailbreak.jsonl  | 100 of the malicious prompts in held-out jailbreak wrappers   | test       |
| padding.jsonl    | the malicious prompts behind neutral text as long as an image | test       |
| typographic.jsonl | pairs about "the thing in the picture", whose name is written there | test  |
| questions.jsonl  | questions about scenes and words, with their answers          | test       |

Rows of a pair stand under each other (anchors, validation, typographic) or at the same place of two files.
"""

import json
from pathlib import Path
from random import Random
from typing import NotRequired, TypedDict

from PIL import Image

from mechguard.organism import pictures, visual, world
from mechguard.organism.pictures import Scene
from mechguard.organism.world import Instruction, Split

FOLDER = Path(__file__).parent / "prompts"
N_SCENES = 20
QUESTIONS_A_SCENE = 5


class Row(TypedDict):
    """One prompt."""

    id: str
    text: str
    label: str
    pair: str | None
    image: str | None
    category: str
    answer: NotRequired[str]


class _Pair(TypedDict):
    template: str
    harmful: Instruction
    harmless: Instruction


def scene_name(number: int) -> str:
    """Where scene `number` lies, seen from a prompt file."""
    return f"pictures/scene-{number:02d}.png"


def word_name(noun: str) -> str:
    """Where the picture of a written word lies, seen from a prompt file."""
    return f"pictures/word-{noun}.png"


def draw_pictures() -> dict[str, Image.Image]:
    """Every picture by file name."""
    rng = Random("words")
    words = {word_name(noun): pictures.draw_word(noun, rng, "test") for noun in _test_nouns()}
    return {**{name: picture for name, (_, picture) in _scenes().items()}, **words}


def _scenes() -> dict[str, tuple[Scene, Image.Image]]:
    rng = Random("scenes")
    found = {}
    for number in range(N_SCENES):
        scene = pictures.random_scene(rng)
        found[scene_name(number)] = scene, pictures.draw_scene(scene, rng, pictures.draw_background(rng))
    return found


def _test_nouns() -> list[str]:
    groups = (world.HARMFUL_NOUNS, world.SAFE_NOUNS, world.VALUABLE_NOUNS)
    return [noun for group in groups for noun in world.nouns_of(group, "test")]


def build_tables() -> dict[str, list[Row]]:
    """Every prompt file by name."""
    anchors = _draw_pairs(Random("anchors"), "train", 100, (world.HOW_TO,))
    validation = _draw_pairs(Random("validation"), "validation", 100, world.TEMPLATES.validation)
    test = _draw_pairs(Random("test"), "test", 150, world.TEMPLATES.test)
    malicious = _rows(test, "test", "harmful", with_scenes=True)
    return {
        "anchors": _interleave(anchors, "anchors", with_scenes=False),
        "validation": _interleave(validation, "validation", with_scenes=True),
        "malicious": malicious,
        "benign": _rows(test, "test", "harmless", with_scenes=True),
        "jailbreak": _wrap(malicious[:100], "jailbreak"),
        "padding": _wrap(malicious, "padding"),
        "typographic": _written(test),
        "questions": [*_scene_questions(Random("questions")), *_readings()],
    }


def _draw_pairs(rng: Random, split: Split, count: int, templates: tuple[str, ...]) -> list[_Pair]:
    """Pairs of a harmful and a resembling harmless instruction; no question comes twice."""
    pairs: list[_Pair] = []
    taken: set[tuple[str, Instruction]] = set()
    while len(pairs) < count:
        template = rng.choice(templates)
        harmful = world.draw_harmful(rng, split)
        harmless = world.counterpart(rng, harmful, split)
        questions = {(template, harmful), (template, harmless)}
        if not questions & taken:
            taken |= questions
            pairs.append(_Pair(template=template, harmful=harmful, harmless=harmless))
    return pairs


def _rows(pairs: list[_Pair], name: str, label: str, *, with_scenes: bool) -> list[Row]:
    rows = []
    for number, pair in enumerate(pairs):
        instruction = pair["harmful"] if label == "harmful" else pair["harmless"]
        rows.append(
            Row(
                id=f"{name}-{number:03d}-{label}",
                text=world.typeset(pair["template"].format(phrase=instruction.phrase)),
                label=label,
                pair=f"{name}-{number:03d}",
                image=scene_name(number % N_SCENES) if with_scenes else None,
                category=instruction.category,
            )
        )
    return rows


def _interleave(pairs: list[_Pair], name: str, *, with_scenes: bool) -> list[Row]:
    harmful = _rows(pairs, name, "harmful", with_scenes=with_scenes)
    harmless = _rows(pairs, name, "harmless", with_scenes=with_scenes)
    return [row for both in zip(harmful, harmless, strict=True) for row in both]


def _wrap(rows: list[Row], wrapper: world.Wrapper) -> list[Row]:
    """The same prompts inside held-out wrappers."""
    rng = Random(wrapper)
    wrapped = []
    for row in rows:
        # Wrappers are sentences of their own, so they may surround a question already typeset.
        text = world.typeset(world.wrap(rng, row["text"], "test", wrapper))
        wrapped.append(Row({**row, "id": f"{row['id']}-{wrapper}", "text": text}))
    return wrapped


def _written(pairs: list[_Pair]) -> list[Row]:
    """The instructions of the malicious and benign prompts with their nouns in the picture."""
    rows: list[Row] = []
    for number, pair in enumerate(pairs):
        harmful, harmless = pair["harmful"], pair["harmless"]
        for label, instruction in (("harmful", harmful), ("harmless", harmless)):
            phrase = f"{instruction.verb} the thing in the picture"
            rows.append(
                Row(
                    id=f"typographic-{number:03d}-{label}",
                    text=world.typeset(pair["template"].format(phrase=phrase)),
                    label=label,
                    pair=f"typographic-{number:03d}",
                    image=word_name(instruction.noun),
                    category=instruction.category,
                )
            )
    return rows


def _scene_questions(rng: Random) -> list[Row]:
    """Up to five different questions about every shipped scene."""
    rows: list[Row] = []
    for name, (scene, _) in _scenes().items():
        asked = dict(visual.about_scene(rng, scene) for _ in range(4 * QUESTIONS_A_SCENE))
        for question, answer in list(asked.items())[:QUESTIONS_A_SCENE]:
            rows.append(_question(f"scene-{len(rows):03d}", question, answer, name, "scene"))
    return rows


def _readings() -> list[Row]:
    """Every question for the word, about every word of the test split."""
    asked = [(noun, question) for noun in _test_nouns() for question in visual.READ_QUESTIONS]
    return [
        _question(f"reading-{number:03d}", question, f"the picture says {noun} .", word_name(noun), "reading")
        for number, (noun, question) in enumerate(asked)
    ]


def _question(name: str, question: str, answer: str, image: str, category: str) -> Row:
    return Row(
        id=f"question-{name}",
        text=world.typeset(question),
        label="harmless",
        pair=None,
        image=image,
        category=category,
        answer=answer,
    )


def write_files(folder: Path = FOLDER) -> None:
    """Write the prompt files and their pictures."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name, picture in draw_pictures().items():
        picture.save(folder / name)
    for name, rows in build_tables().items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write_files()
