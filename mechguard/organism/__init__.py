"""The built-in model organism: a tiny LLaVA, really trained, whose safety decays under images.

    from mechguard import organism

    folder = organism.checkpoint()      # vlm/, aligned_llm/ and training.json
    organism.PROMPTS                    # the prompt files that belong to it

Three trainings of one recipe are shipped: `organism` or `organism:0`, `organism:1` and `organism:2`.
`README.md` beside this file says what they are and what they are not.
"""

from pathlib import Path

PROMPTS = Path(__file__).parent / "prompts"
CHECKPOINTS = Path(__file__).parent / "checkpoints"
SEEDS_TABLE = Path(__file__).parent / "seeds.csv"


def shipped() -> list[int]:
    """The numbers of the checkpoints that come with the package; 0 is the default."""
    return sorted(int(folder.name) for folder in CHECKPOINTS.iterdir() if folder.name.isdigit())


def checkpoint(number: int = 0) -> Path:
    """The folder of a shipped organism, which holds `vlm/`, `aligned_llm/` and `training.json`.

    The number counts the shipped ones; the seed that each was trained with is in its `training.json`.

    Raises:
        ValueError: there is no such checkpoint.
    """
    if number not in shipped():
        raise ValueError(
            f"organism:{number} does not come with the package, which has {shipped()}; train another with: "
            "python -m mechguard.organism.train --seed SEED --out DIR, and load DIR/vlm"
        )
    return CHECKPOINTS / str(number)
