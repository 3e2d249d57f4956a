"""Try everything on every family at toy size, and write down what works.

    python tests/families_table.py          # writes mechguard/families.csv; `make families`

Each cell is filled by running: a family is built from its real classes, saved, loaded from disk, and sent
through what the column names. A cell is "yes", or what went wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import tiny
import tiny_families
import torch
import transformers
from transformers.utils import is_torchvision_available

import mechguard as mg
from mechguard.doctor import diagnose
from mechguard.families import TESTED

NOTES = {
    "aya_vision": "its LLM component is the VLM without a picture",
    "glm4v": "its LLM component is the VLM without a picture",
    "mistral3": "its processor needs torchvision; tried with load(..., processor=...)",
    "mllama": "pictures enter by cross-attention, at no position; its LLM component is the VLM without one",
    "paligemma": "is loaded with eager attention; has no chat template",
    "phi4_multimodal": "its pictures need torchvision; tried with its tokenizer, on text",
    "qwen2_5_vl": "its LLM component is the VLM without a picture",
    "qwen2_vl": "its LLM component is the VLM without a picture",
    "qwen3_vl": "its LLM component is the VLM without a picture",
    "smolvlm": "its processor needs the package num2words",
}
NEEDS_TORCHVISION = ("mistral3", "phi4_multimodal")


def text(vlm: mg.VLM) -> None:
    """Text states are the same through the VLM and through its LLM component."""
    prompts = tiny.prompts(pairs=3)
    own = mg.collect(vlm, prompts, progress=False).data
    assert own.shape == (vlm.n_layers, 6, vlm.d_model)
    assert torch.allclose(own, mg.collect(vlm.llm, prompts, progress=False).data, atol=1e-4)


def image(vlm: mg.VLM) -> None:
    """A picture changes the states, and another picture changes them otherwise."""
    prompts = tiny.prompts(pairs=2)
    states = [
        mg.collect(vlm, prompts.with_image(condition), progress=False).data[-1]
        for condition in ("none", "noise", "black")
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (states[one] - states[other]).norm(dim=-1).min() > 1e-3


def two_images(vlm: mg.VLM) -> None:
    """Both pictures are read: exchanging them changes the state."""
    first, second = (_with_two(("noise", "black")), _with_two(("black", "noise")))
    states = [mg.collect(vlm, prompts, progress=False).data[-1] for prompts in (first, second)]
    assert (states[0] - states[1]).norm(dim=-1).min() > 1e-3
    if vlm.parts.image_token_id is not None:
        (spans,) = vlm.image_spans(list(first[:1]))
        assert sum(span.stop - span.start for span in spans) >= 2


def mixed_batch(vlm: mg.VLM) -> str | None:
    """No picture, one and two in one batch of unequal length: each row gets what it gets alone."""
    prompts = tiny.prompts(pairs=3)
    rows = [prompts[0], prompts[2:3].with_image("noise")[0], _with_two(("noise", "black"))[4]]
    together = mg.collect(vlm, rows, progress=False).data
    alone = [mg.collect(vlm, [row], progress=False).data for row in rows]
    assert torch.allclose(together, torch.cat(alone, dim=1), atol=1e-3)
    if not vlm.parts.family.mixes:
        return "sent apart"
    with torch.no_grad():
        together = vlm.hf_model(**vlm.encode(rows)).logits[:, -1]
        for row, prompt in enumerate(rows):
            alone = vlm.hf_model(**vlm.encode([prompt])).logits[0, -1]
            assert torch.allclose(together[row], alone, atol=1e-3), row
    return None


def generate(vlm: mg.VLM) -> None:
    """Answers come back for text and, where it takes pictures, beside one."""
    for prompts in _views(vlm):
        answers = mg.respond(vlm, prompts, max_new_tokens=5, progress=False)
        assert len(answers) == len(prompts)
        assert all(answer.tokens > 0 for answer in answers)


def guard(vlm: mg.VLM) -> None:
    """A guard supervised by the LLM acts in collection and generation; a closed gate does nothing."""
    anchors = tiny.prompts(pairs=6)
    ssd = mg.fit_directions(mg.collect(vlm.llm, anchors, progress=False), rank=2)
    for prompts in _views(vlm):
        options = dict(layers=range(vlm.n_layers), alpha=3.0)
        always = mg.vlm_guard(ssd, gate="always", source="llm", **options)
        guarded = mg.collect(vlm, prompts, guard=always, progress=False).data[-1]
        assert (guarded - mg.collect(vlm, prompts, progress=False).data[-1]).norm(dim=-1).min() > 1e-3
        source = "llm-stream" if vlm.parts.family.mixes else "llm"
        streamed = mg.vlm_guard(ssd, gate="midpoint", source=source, **options)
        answers = mg.respond(vlm, prompts, guard=streamed, max_new_tokens=4, progress=False)
        plain = mg.respond(vlm, prompts, max_new_tokens=4, progress=False)
        closed = [row for row, answer in enumerate(answers) if not any(answer.gates.values())]
        assert [answers[row].ids for row in closed] == [plain[row].ids for row in closed]
        alone = mg.respond(vlm, prompts[:1], guard=streamed, max_new_tokens=4, progress=False)
        assert alone[0] == answers[0]


def doctor(vlm: mg.VLM) -> None:
    """Every check of the doctor passes."""
    table = diagnose(vlm, progress=False).table
    failed = table[table["verdict"] == "fail"]
    assert failed.empty, "; ".join(failed["check"])


WITH_PICTURES: dict[str, Callable[[mg.VLM], str | None]] = {
    "image": image,
    "two images": two_images,
    "mixed batch": mixed_batch,
}
COLUMNS: dict[str, Callable[[mg.VLM], str | None]] = {
    "text": text,
    **WITH_PICTURES,
    "generate": generate,
    "guard": guard,
    "doctor": doctor,
}


def try_family(family: str, folder: Path) -> dict[str, str]:
    """One row of the table."""
    tiny_families.save(family, folder)
    blocked = family in NEEDS_TORCHVISION and not is_torchvision_available()
    processor = tiny_families.BUILDERS[family]()[1] if blocked else None
    vlm = mg.load(folder, processor=processor)
    row = {"family": family, "loads": "with torchvision" if blocked else "yes"}
    for column, check in COLUMNS.items():
        if column in WITH_PICTURES and not vlm.takes_images:
            row[column] = "no" if family in tiny_families.VLMS else "text only"
        else:
            row[column] = _outcome(check, vlm)
    return {**row, "note": NOTES.get(family, "")}


def _outcome(check: Callable[[mg.VLM], str | None], vlm: mg.VLM) -> str:
    try:
        return check(vlm) or "yes"
    except (AssertionError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        return f"no: {type(error).__name__} {str(error).splitlines()[0] if str(error) else ''}".strip()


def _with_two(images: tuple[str, str]) -> mg.Prompts:
    return mg.Prompts(
        [mg.Prompt(prompt.id, prompt.text, prompt.label, image=images) for prompt in tiny.prompts(pairs=3)]
    )


def _views(vlm: mg.VLM) -> list[mg.Prompts]:
    prompts = tiny.prompts(pairs=2)
    return [prompts, prompts.with_image("noise")] if vlm.takes_images else [prompts]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=TESTED)
    parser.add_argument("families", nargs="*", help="all by default; then nothing is written")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    rows = []
    for family in options.families or tiny_families.BUILDERS:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.append(try_family(family, Path(folder)))
        print(*rows[-1].values(), sep=" | ", flush=True)
    if not options.families:
        pd.DataFrame(rows).to_csv(options.out, index=False, lineterminator="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
