"""The built-in model organism: a tiny LLaVA, really trained, whose safety decays under images.

    from mechguard import organism

    folder = organism.checkpoint()      # vlm/, aligned_llm/ and training.json
    organism.PROMPTS                    # the prompt files that belong to it

`README.md` beside this file says what it is and what it is not.
"""

from pathlib import Path

DEFAULT_SEED = 0
PROMPTS = Path(__file__).parent / "prompts"
CHECKPOINTS = Path(__file__).parent / "checkpoints"


def shipped_seeds() -> list[int]:
    """The seeds whose weights come with the package."""
    return sorted(int(folder.name.removeprefix("seed")) for folder in CHECKPOINTS.glob("seed*"))


def checkpoint(seed: int = DEFAULT_SEED) -> Path:
    """The folder of a shipped organism, which holds `vlm/`, `aligned_llm/` and `training.json`."""
    seeds = shipped_seeds()
    if seed not in seeds:
        raise ValueError(
            f"the organism of seed {seed} does not come with the package, which has seeds {seeds}; "
            f"train it with: python -m mechguard.organism.train --seed {seed} --out DIR"
        )
    return CHECKPOINTS / f"seed{seed}"
