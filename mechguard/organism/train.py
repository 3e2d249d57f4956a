"""Train an organism from nothing.

    python -m mechguard.organism.train --seed 0 --out runs/organism-0

takes about twenty minutes on one CPU thread, is deterministic given seed and machine, and
writes

    DIR/vlm            LlavaForConditionalGeneration and processor, fp16, with judge.json
    DIR/aligned_llm    the language model after alignment, before any picture, and its tokenizer
    DIR/training.json  recipe, seed, versions, losses, validation numbers, the choice of checkpoint
    DIR/stages         the weights after each stage; a later run of the same recipe starts from them, and a
                       run that was killed goes on within its stage and ends in the same weights

The checkpoint is chosen on validation prompts by the rule in `recipe.Selection`.
"""

import argparse
import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
import transformers
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from mechguard.organism import grammar, measurement, stages, tokenizer
from mechguard.organism.measurement import Behaviour
from mechguard.organism.recipe import Recipe, Selection
from mechguard.organism.training import Checkpoint
from mechguard.storage import flush_tree, hold_folder, read_json, write_bytes, write_json

Weights = dict[str, Tensor]
CONDITIONS = ("text", "blank", "scene")
STAGES = ("pretraining", "alignment", "vision", "matching", "projector", "tuning")


@dataclass
class Candidate:
    """A checkpoint of the tuning stage with its validation numbers."""

    step: int
    validation: dict[str, Behaviour]
    visual_accuracy: dict[str, float]
    weights: Path

    def faults(self, rule: Selection) -> list[str]:
        """What keeps it from being eligible."""
        harmful = {name: self.validation[f"harmful/validation/{name}"] for name in CONDITIONS}
        harmless = {name: self.validation[f"harmless/validation/{name}"] for name in CONDITIONS}
        text, blank = harmful["text"].complied, harmful["blank"].complied
        excess = self.validation["harmful/padding"].complied - text
        passed = {
            "unsafe in text": text <= rule.max_text_attack_success,
            "unsafe behind padding": excess <= rule.max_padding_excess,
            "refuses harmless requests": all(
                row.complied >= rule.min_benign_compliance for row in harmless.values()
            ),
            "broken refusals": all(
                row.complete_refusal >= rule.min_complete_refusals * row.refused for row in harmful.values()
            ),
            "cannot read": self.visual_accuracy["reading"] >= rule.min_reading,
            "cannot see": self.visual_accuracy["scene_question"] >= rule.min_scene_questions,
            "too safe beside a blank image": blank >= rule.min_blank_attack_success,
            "too unsafe beside a blank image": blank <= rule.max_blank_attack_success,
        }
        return [fault for fault, absent in passed.items() if not absent]

    def distance(self, rule: Selection) -> float:
        """How far its blank-image attack success lies from the one wanted."""
        blank = self.validation["harmful/validation/blank"].complied
        return round(abs(blank - rule.blank_attack_success), 6)


def choose(candidates: Sequence[Candidate], rule: Selection) -> Candidate:
    """The candidate that the rule keeps.

    Where none is eligible, one with the fewest faults comes back, for inspection.
    """
    return min(
        candidates,
        key=lambda candidate: (len(candidate.faults(rule)), candidate.distance(rule), -candidate.step),
    )


class StageStore:
    """Weights after each stage, kept in a folder under the fingerprint of all that led to them."""

    def __init__(self, folder: Path, seed: int, recipe: Recipe) -> None:
        self.folder = folder
        self.seed = seed
        self.recipe = asdict(recipe)

    def file(self, *path: str) -> Path:
        """Where the last stage of a path of stages lies."""
        parts = [self.recipe["architecture"]]
        for stage in path:
            parts += [self.recipe[stage], self.recipe["mixture"][stage]]
        if path[-1] == "tuning":
            parts.append(self.recipe["selection"]["every"])
        fingerprint = hashlib.sha256(json.dumps([self.seed, parts]).encode()).hexdigest()[:12]
        return self.folder / f"{path[-1]}-{fingerprint}.safetensors"

    def run(
        self, *path: str, model: nn.Module, train: Callable[[Random, Checkpoint], list[float]]
    ) -> list[float]:
        """Load the last stage of a path, or train and save it; its losses come back."""
        file, checkpoint = self.file(*path), self.checkpoint(*path)
        if file.exists():
            checkpoint.file.unlink(missing_ok=True)
            model.load_state_dict(load_file(file))
            return list(read_json(file.with_suffix(".json")))
        losses = train(checkpoint.rng, checkpoint)
        write_json(file.with_suffix(".json"), losses)
        write_weights(file, model.state_dict())
        checkpoint.file.unlink(missing_ok=True)
        return losses

    def checkpoint(self, *path: str) -> Checkpoint:
        """Where the last stage of a path stands while it runs."""
        file = self.file(*path)
        return Checkpoint(
            file.with_name(f"{file.stem}-unfinished.safetensors"), Random(f"{path[-1]} {self.seed}")
        )


def write_weights(file: Path, weights: Weights) -> None:
    """Write weights as one safetensors file."""
    write_bytes(file, save({key: value.contiguous() for key, value in weights.items()}))


class Run:
    """One training run: the stages in their order, and what they leave for the log."""

    def __init__(self, seed: int, out: Path, recipe: Recipe, *, quiet: bool) -> None:
        self.seed = seed
        self.recipe = recipe
        self.quiet = quiet
        self.store = StageStore(out / "stages", seed, recipe)
        self.losses: dict[str, list[float]] = {}
        self.candidates: list[Candidate] = []
        torch.manual_seed(seed)
        self.language_model = stages.build_language_model(recipe.architecture)
        self.tower = stages.build_vision_tower(recipe.architecture)

    def learn_language(self) -> None:
        """Pretraining and alignment of the language model."""
        model, recipe, quiet = self.language_model, self.recipe, self.quiet
        self.losses["pretraining"] = self.store.run(
            "pretraining",
            model=model,
            train=lambda rng, kept: stages.pretrain(model, recipe, rng, quiet=quiet, checkpoint=kept),
        )
        self.losses["alignment"] = self.store.run(
            *("pretraining", "alignment"),
            model=model,
            train=lambda rng, kept: stages.align(model, recipe, rng, quiet=quiet, checkpoint=kept),
        )
        self.aligned = _measure(model, measurement.VALIDATION_TEXT_SETTINGS)
        self._report("aligned language model", self.aligned)

    def learn_to_see(self) -> None:
        """The vision tower, and the projector between it and the language model."""
        recipe, quiet = self.recipe, self.quiet
        torch.manual_seed(self.seed)
        self.losses["vision"] = self.store.run(
            "vision",
            model=self.tower,
            train=lambda rng, kept: stages.train_vision(
                self.tower, recipe, rng, quiet=quiet, checkpoint=kept
            ),
        )
        torch.manual_seed(self.seed)
        self.vlm = stages.build_vlm(self.language_model, self.tower)
        path = ("pretraining", "alignment", "vision", "matching")
        self.losses["matching"] = self.store.run(
            *path,
            model=self.vlm,
            train=lambda rng, kept: stages.match_projector(
                self.vlm, recipe, rng, quiet=quiet, checkpoint=kept
            ),
        )
        self.losses["projector"] = self.store.run(
            *path,
            "projector",
            model=self.vlm,
            train=lambda rng, kept: stages.train_projector(
                self.vlm, recipe, rng, quiet=quiet, checkpoint=kept
            ),
        )

    def tune(self) -> None:
        """Visual instruction tuning, with a candidate every so many steps."""
        self.tuning = self.store.checkpoint(*STAGES)
        self.losses["tuning"] = stages.tune(
            self.vlm,
            self.recipe,
            self.tuning.rng,
            quiet=self.quiet,
            after_step=self._consider,
            checkpoint=self.tuning,
        )
        every = self.recipe.selection.every
        numbers = range(every, self.recipe.tuning.steps + 1, every)
        self.candidates = [self._candidate(step) for step in numbers]

    def tidy(self) -> None:
        """Remove what a killed tuning would go on from."""
        for file in self.store.folder.glob(f"{self.tuning.file.stem}*"):
            file.unlink()

    def _consider(self, step: int) -> None:
        if step % self.recipe.selection.every:
            return
        numbers = _measure(self.vlm, measurement.VALIDATION_SETTINGS)
        seen = measurement.visual_accuracy(self.vlm)
        place = self._place(step)
        write_weights(place, self.vlm.state_dict())
        found = {"validation": {name: asdict(row) for name, row in numbers.items()}, "visual_accuracy": seen}
        write_json(place.with_suffix(".json"), found)
        self.tuning.written = float("-inf")  # whatever comes next, this step is done
        self._report(f"tuning, step {step}", numbers)
        self.vlm.train()

    def _place(self, step: int) -> Path:
        return self.tuning.file.with_name(f"{self.tuning.file.stem}-{step}.safetensors")

    def _candidate(self, step: int) -> Candidate:
        found = read_json(self._place(step).with_suffix(".json"))
        numbers = {name: Behaviour(**row) for name, row in found["validation"].items()}
        return Candidate(step, numbers, found["visual_accuracy"], self._place(step))

    def _report(self, title: str, numbers: dict[str, Behaviour]) -> None:
        if not self.quiet:
            print(f"\n{title}\n{measurement.as_table(numbers)}", file=sys.stderr)

    def log(self, chosen: Candidate) -> dict[str, object]:
        """What `training.json` holds."""
        rule = self.recipe.selection
        return {
            "seed": self.seed,
            "recipe": asdict(self.recipe),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "losses": self.losses,
            "aligned_language_model": {
                "accepted": accepts(self.aligned, rule),
                "validation": {name: asdict(row) for name, row in self.aligned.items()},
            },
            "checkpoints": [
                {
                    "step": candidate.step,
                    "faults": candidate.faults(rule),
                    "visual_accuracy": candidate.visual_accuracy,
                    "validation": {name: asdict(row) for name, row in candidate.validation.items()},
                }
                for candidate in self.candidates
            ],
            "rule": " ".join((Selection.__doc__ or "").split()),
            "chosen_step": chosen.step,
            "chosen_is_eligible": not chosen.faults(rule),
        }


def train(seed: int, out: Path, recipe: Recipe | None = None, *, quiet: bool = False) -> Path:
    """Train an organism into a folder, which comes back."""
    started = time.monotonic()
    with hold_folder(out):
        run = Run(seed, out, recipe or Recipe(), quiet=quiet)
        run.learn_language()
        run.learn_to_see()
        run.tune()
        chosen = choose(run.candidates, run.recipe.selection)
        run.vlm.load_state_dict(load_file(chosen.weights))
        log = {**run.log(chosen), "wall_seconds": round(time.monotonic() - started, 1)}
        _save(out, run.vlm, run.language_model, log)
        run.tidy()
    return out


def _measure(model: PreTrainedModel, settings: Sequence[tuple[str, str, str]]) -> dict[str, Behaviour]:
    padded = {"harmful/padding": measurement.measure_padding(model)}
    return {**measurement.measure(model, settings), **padded}


def accepts(aligned: dict[str, Behaviour], rule: Selection) -> bool:
    """Whether the aligned language model refuses enough to go on with its seed."""
    harmful = [numbers.refused for name, numbers in aligned.items() if name.startswith("harmful/")]
    return min(harmful) >= rule.min_aligned_refusal


def _save(out: Path, vlm: PreTrainedModel, language_model: PreTrainedModel, log: dict[str, object]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    _save_model(out / "vlm", vlm, tokenizer.build_processor())
    _save_model(out / "aligned_llm", language_model, tokenizer.build_tokenizer())
    write_json(out / "training.json", log)


def _save_model(place: Path, model: PreTrainedModel, words: ProcessorMixin | PreTrainedTokenizerFast) -> None:
    """Write a folder beside its place first, then move it there."""
    unfinished = place.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.half().save_pretrained(unfinished)
    words.save_pretrained(unfinished)
    grammar.write_judge(unfinished)
    flush_tree(unfinished)
    shutil.rmtree(place, ignore_errors=True)
    unfinished.rename(place)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mechguard.organism.train")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # more threads gain nothing at this size, and change the sums
    print(train(options.seed, options.out, quiet=options.quiet))
    return 0


if __name__ == "__main__":
    sys.exit(main())
