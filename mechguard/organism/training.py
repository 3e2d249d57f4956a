"""The training loop: batches of lessons, and AdamW along a schedule."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mechguard.organism.lessons import Lesson
from mechguard.organism.recipe import Schedule

IGNORED = -100  # the label that the loss of transformers leaves out


def pixel_values(pictures: Iterable[Image.Image]) -> Tensor:
    """Pictures as `[picture, 3, size, size]`, equal to the processor's (a test says so)."""
    stacked = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures]) / 255.0
    mean = np.asarray(OPENAI_CLIP_MEAN, dtype=np.float32)
    deviation = np.asarray(OPENAI_CLIP_STD, dtype=np.float32)
    return torch.from_numpy(((stacked - mean) / deviation).transpose(0, 3, 1, 2).copy())


def collate(lessons: list[Lesson]) -> dict[str, Tensor]:
    """Lessons as one batch, padded on the right, with labels on the answers."""
    length = max(len(lesson.prompt) + len(lesson.answer) for lesson in lessons)
    input_ids = torch.zeros(len(lessons), length, dtype=torch.long)
    labels = torch.full((len(lessons), length), IGNORED)
    attention_mask = torch.zeros_like(input_ids)
    for row, lesson in enumerate(lessons):
        tokens = torch.tensor(lesson.prompt + lesson.answer)
        input_ids[row, : len(tokens)] = tokens
        attention_mask[row, : len(tokens)] = 1
        labels[row, len(lesson.prompt) : len(tokens)] = torch.tensor(lesson.answer)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    pictures = [lesson.picture for lesson in lessons if lesson.picture is not None]
    return {**batch, "pixel_values": pixel_values(pictures)} if pictures else batch


def learning_rate(step: int, schedule: Schedule) -> float:
    """The rate at a step counted from one: linear warm-up, then a cosine to a twentieth."""
    warm_up = max(1, int(0.03 * schedule.steps))
    if step < warm_up:
        return schedule.learning_rate * step / warm_up
    done = (step - warm_up) / max(1, schedule.steps - warm_up)
    return schedule.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def optimise(
    parameters: list[nn.Parameter],
    batch_loss: Callable[[], Tensor],
    schedule: Schedule,
    *,
    name: str,
    quiet: bool = False,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Minimise `batch_loss` over the parameters; the mean loss of every 25 steps comes back."""
    optimiser = torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, betas=(0.9, 0.95)
    )
    losses: list[float] = []
    for step in tqdm(range(1, schedule.steps + 1), desc=name, disable=quiet):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, schedule)
        loss = batch_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        after_step(step)
    windows = [losses[start : start + 25] for start in range(0, len(losses), 25)]
    return [round(sum(window) / len(window), 4) for window in windows]
