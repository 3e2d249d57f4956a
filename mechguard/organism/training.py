"""The training loop: batches of lessons, and AdamW along a schedule.

A stage that was killed goes on from its last `Checkpoint` and ends in the same weights, bit for bit.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mechguard.organism.lessons import Lesson
from mechguard.organism.recipe import Schedule
from mechguard.storage import write_bytes

IGNORED = -100  # the label of tokens that are given, not learned
PARTS = 4  # a batch is cut into so many parts by length, since short lessons padded to long ones cost time


def pixel_values(pictures: Iterable[Image.Image]) -> Tensor:
    """Pictures as `[picture, 3, size, size]`, equal to the processor's (a test says so)."""
    stacked = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures]) / 255.0
    mean = np.asarray(OPENAI_CLIP_MEAN, dtype=np.float32)
    deviation = np.asarray(OPENAI_CLIP_STD, dtype=np.float32)
    return torch.from_numpy(((stacked - mean) / deviation).transpose(0, 3, 1, 2).copy())


def collate(lessons: list[Lesson]) -> dict[str, Tensor]:
    """Lessons as one batch, padded on the right, with labels on the answers.

    There is no attention mask: padding on the right lies in the future of every token that counts.
    """
    length = max(lesson.length for lesson in lessons)
    input_ids = torch.zeros(len(lessons), length, dtype=torch.long)
    labels = torch.full((len(lessons), length), IGNORED)
    for row, lesson in enumerate(lessons):
        input_ids[row, : lesson.length] = torch.tensor(lesson.prompt + lesson.answer)
        labels[row, len(lesson.prompt) : lesson.length] = torch.tensor(lesson.answer)
    batch = {"input_ids": input_ids, "labels": labels}
    pictures = [lesson.picture for lesson in lessons if lesson.picture is not None]
    return {**batch, "pixel_values": pixel_values(pictures)} if pictures else batch


def lesson_losses(model: PreTrainedModel, lessons: list[Lesson]) -> Iterator[Tensor]:
    """The mean loss of the answers' tokens, in parts of similar length that sum to it."""
    total = sum(len(lesson.answer) for lesson in lessons)
    by_length = sorted(lessons, key=lambda lesson: lesson.length)
    size = math.ceil(len(lessons) / PARTS)
    for start in range(0, len(lessons), size):
        batch = collate(by_length[start : start + size])
        labels = batch.pop("labels")[:, 1:]
        hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
        learned = labels != IGNORED
        logits = model.lm_head(hidden[learned])
        yield nn.functional.cross_entropy(logits, labels[learned], reduction="sum") / total


@dataclass
class Checkpoint:
    """Where a stage stands: weights, optimiser, dice and losses, in one file that replaces the last.

    Attributes:
        file: a safetensors file.
        rng: the dice that lessons are drawn with; set back to where they were when a stage goes on.
        seconds: how often it is written at most.
    """

    file: Path
    rng: Random
    seconds: float = 20.0
    written: float = field(default_factory=time.monotonic)

    def restore(self, parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer) -> list[float]:
        """Set everything to where the stage stood; the losses of its steps come back, none for a new one."""
        if not self.file.is_file():
            return []
        with safe_open(self.file, "pt") as found:
            facts = {name: json.loads(value) for name, value in found.metadata().items()}
            version, numbers, gauss = facts["dice"]
            self.rng.setstate((version, tuple(numbers), gauss))
            for place, parameter in enumerate(parameters):
                parameter.data.copy_(found.get_tensor(f"{place}.weights"))
                names = [name for name in found.keys() if name.startswith(f"{place}.state.")]  # noqa: SIM118
                optimiser.state[parameter] = {
                    name.rpartition(".")[2]: found.get_tensor(name) for name in sorted(names)
                }
        return list(facts["losses"])

    def keep(
        self, parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer, losses: list[float]
    ) -> None:
        """Write where the stage stands, if the last time is long enough ago."""
        if time.monotonic() - self.written < self.seconds:
            return
        tensors = {}
        for place, parameter in enumerate(parameters):
            tensors[f"{place}.weights"] = parameter.data.clone()
            for name, value in optimiser.state[parameter].items():
                tensors[f"{place}.state.{name}"] = value.clone()
        facts = {"losses": json.dumps(losses), "dice": json.dumps(self.rng.getstate())}
        write_bytes(self.file, save(tensors, metadata=facts))
        self.written = time.monotonic()


def learning_rate(step: int, schedule: Schedule) -> float:
    """The rate at a step counted from one: linear warm-up, then a cosine to a twentieth."""
    warm_up = max(1, int(0.03 * schedule.steps))
    if step < warm_up:
        return schedule.learning_rate * step / warm_up
    done = (step - warm_up) / max(1, schedule.steps - warm_up)
    return schedule.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def optimise(
    parameters: list[nn.Parameter],
    batch_losses: Callable[[], Iterable[Tensor]],
    schedule: Schedule,
    *,
    name: str,
    quiet: bool = False,
    after_step: Callable[[int], None] = lambda step: None,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Minimise the sum of `batch_losses` over the parameters; the mean loss of every 25 steps comes back.

    Args:
        after_step: called with the number of every step, before the checkpoint is written.
        checkpoint: from which a stage that was killed goes on.
    """
    optimiser = torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, betas=(0.9, 0.95)
    )
    losses = [] if checkpoint is None else checkpoint.restore(parameters, optimiser)
    steps = range(len(losses) + 1, schedule.steps + 1)
    for step in tqdm(steps, desc=name, initial=len(losses), total=schedule.steps, disable=quiet):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, schedule)
        total = 0.0
        for loss in batch_losses():
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(total)
        after_step(step)
        if checkpoint is not None:
            checkpoint.keep(parameters, optimiser, losses)
    windows = [losses[start : start + 25] for start in range(0, len(losses), 25)]
    return [round(sum(window) / len(window), 4) for window in windows]
