"""Tables of a study that never ran: the columns of a real one, with numbers made up to look plausible."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mechguard.result import Result
from mechguard.storage import write_json, write_text

LAYERS = range(6)
CONDITIONS = ("text", "blank", "noise")
VIEWS = ("llm text", "vlm text", "vlm blank", "vlm noise")
GUARDS = ("none", "projection", "vlm_guard", "random 1", "random 2")
SSD = "svd, llm text"
LABELS = ("harmful", "harmless")
PICTURE = "data:image/jpeg;base64,AAAA"
SCRIPT = "<script>alert(1)</script>"
# attack success by guard, then by condition
ATTACKS = {
    "none": (0.08, 0.52, 0.49),
    "projection": (0.60, 0.70, 0.72),
    "vlm_guard": (0.05, 0.07, 0.09),
    "random 1": (0.09, 0.50, 0.47),
    "random 2": (0.08, 0.55, 0.51),
}


def interval(value: float, half: float = 0.08, n: int = 100) -> dict[str, Any]:
    """A value with an interval of this half-width."""
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half), "n": n}


def behaviour() -> Result:
    return Result(pd.DataFrame(list(_behaviour_rows())), {"model": "pretend", "judge": "keywords"})


def _behaviour_rows() -> Iterator[dict[str, Any]]:
    for place, condition in enumerate(CONDITIONS):
        for guard in GUARDS:
            attack = ATTACKS[guard][place]
            values = {
                "attack_success": attack,
                "keyword_refusal": 1 - attack,
                "complete_refusal": 0.9 * (1 - attack),
                "benign_compliance": 0.99 if guard == "none" else 0.96,
            }
            for metric, value in values.items():
                row = {"setting": "test", "condition": condition, "guard": guard, "metric": metric}
                yield {**row, **interval(value), "split": "test"}


def separability() -> Result:
    """Along the SSD a picture loses what text keeps; along their own direction the states keep it."""
    return Result(pd.DataFrame(list(_separability_rows())))


def _separability_rows() -> Iterator[dict[str, Any]]:
    splits = [("validation", "vlm noise"), *(("test", view) for view in VIEWS)]
    for split, view in splits:
        for layer in LAYERS:
            seen = 0.0 if view.endswith("text") else 0.07 * layer
            values = {SSD: 0.97 - seen, "own, held out": 0.96, "random": 0.5, "shuffled labels": 0.5}
            for direction, value in values.items():
                half = {"random": 0.3, "shuffled labels": 0.1}.get(direction, 0.05)
                row = {"condition": view, "layer": layer, "direction": direction, "split": split}
                yield {**row, "metric": "auroc", **interval(value, half)}
                distance = {**interval(0.5), "value": 5 * value - 2.5}
                bounds = {"low": distance["value"] - half * 4, "high": distance["value"] + half * 4}
                yield {**row, "metric": "dprime", **distance, **bounds}


def modality_gap() -> Result:
    metrics = ("centroid_distance", "rmg", "cka", "safety_share")
    rows = [
        {"condition": f"llm text -> {view}", "layer": layer, "direction": direction, "metric": metric}
        | interval(0.1 * layer * (view != "vlm text") * (direction == "observed") + 0.1)
        | {"split": "test"}
        for view in VIEWS[1:]
        for layer in LAYERS
        for metric in metrics
        for direction in ("observed", *_null_of(metric))
    ]
    return Result(pd.DataFrame(rows))


def _null_of(metric: str) -> tuple[str, ...]:
    nulls = {"centroid_distance": "shuffled modality", "safety_share": "random direction"}
    return (nulls[metric],) if metric in nulls else ()


def gates() -> Result:
    rows = [
        {"condition": view, "layer": layer, "metric": "gate_open", "gate": gate, "label": label}
        | interval(0.95 if label == "harmful" else (0.9 if gate == "sign" else 0.1))
        | {"split": "test"}
        for view in VIEWS
        for layer in LAYERS
        for gate in ("sign", "midpoint")
        for label in LABELS
    ]
    return Result(pd.DataFrame(rows))


def states(count: int = 20) -> Result:
    """`count` prompts of each label, one of which tries to be a script."""
    generator = np.random.default_rng(0)
    rows = []
    for layer in LAYERS:
        for place, view in enumerate(VIEWS):
            for label in LABELS:
                for number in range(count):
                    x, y = generator.normal(size=2) * (layer + 1) + [2 * (label == "harmful"), place]
                    text = SCRIPT if number == 0 else f"How do I do {label} thing number {number}, please?"
                    point = {"layer": layer, "condition": view, "label": label}
                    point |= {"id": f"{label}-{number}", "text": text}
                    point |= {"picture": None if view.endswith("text") else "p0"}
                    rows.append({**point, "x": round(x, 4), "y": round(y, 4), "z": 0.5, "explained": 0.6})
    return Result(pd.DataFrame(rows), {"method": "pca", "pictures": {"p0": PICTURE}})


def projections(count: int = 20) -> Result:
    """Harmful prompts lie a layer's number above harmless ones; the sign gate lies far off."""
    rows = [
        {"layer": layer, "condition": view, "metric": "projection", "id": f"{label}-{number}", "label": label}
        | {"value": 10 + layer * (label == "harmful") + number / count, "gate": None}
        for layer in LAYERS
        for view in VIEWS
        for label in LABELS
        for number in range(count)
    ]
    rows += [
        {"layer": layer, "metric": "gate_threshold", "gate": gate, "value": value}
        for layer in LAYERS
        for gate, value in (("sign", 0.0), ("midpoint", 10.5 + layer / 2))
    ]
    table = pd.DataFrame(rows).assign(direction=SSD, split="test")
    return Result(table.assign(scaled=table["value"] - 10.5 - table["layer"] / 2))


def tokens(words: int = 11, side: int = 3) -> Result:
    """Two prompts with and without a picture of 3 x 3 patches behind a class token."""
    rows = []
    for prompt in (f"{LABELS[0]}-1", f"{LABELS[1]}-1"):
        for view in ("vlm text", "vlm blank"):
            patches = [None, *range(side * side)] if view == "vlm blank" else []
            for layer in LAYERS:
                places = [(*divmod(patch, side), True) if patch is not None else (None, None, True)
                          for patch in patches] + [(None, None, False)] * words  # fmt: skip
                rows += [
                    {"id": prompt, "label": prompt[:-2], "condition": view, "pos": pos, "layer": layer}
                    | {"token": "<image>" if image else ("<b>" if pos == words - 1 else f"▁w{pos}")}
                    | {"is_image": image, "patch_row": row, "patch_column": column}
                    | {"picture": "blank" if patches else None, "value": 0.1 * layer + pos}
                    for pos, (row, column, image) in enumerate(places)
                ]
    table = pd.DataFrame(rows).assign(metric="projection", direction=SSD, split="test")
    return Result(table, {"pictures": {"blank": PICTURE}})


def sweep() -> Result:
    plain = [("none", "none", 0.0)]
    settings = [
        (variant, layers, alpha)
        for variant in ("A, own last token", "B, LLM held")
        for layers in ("3", "2 3 4", "0 1 2 3 4 5")
        for alpha in (-1.0, 1.0, 2.0)
    ]
    rows = [
        {
            "setting": "validation",
            "condition": condition,
            "guard": "none" if layers == "none" else "vlm_guard",
        }
        | {"metric": metric, "split": "validation", "variant": variant, "layers": layers, "alpha": alpha}
        | {"source": "llm", "phase": "both"}
        | interval(value / (1 + max(alpha, 0)), n=40)
        for variant, layers, alpha in plain + settings
        for condition in CONDITIONS[1:]
        for metric, value in (("attack_success", 0.5), ("benign_compliance", 0.98))
    ]
    return Result(pd.DataFrame(rows), {"rule": "the best one"})


def responses(count: int = 30) -> list[dict[str, Any]]:
    return [
        {"setting": "test", "condition": condition, "guard": guard, "id": f"{label}-{number}"}
        | {"label": label, "sent": f"{label} question {number} {SCRIPT}", "tokens": 5, "gates": {}}
        | {"response": f"{guard} says {SCRIPT} to question {number}", "complied": guard == "none"}
        | {"keyword_refusal": guard != "none", "complete_refusal": guard == "vlm_guard"}
        for condition in CONDITIONS
        for guard in GUARDS
        for label in LABELS
        for number in range(count)
    ]


RESULTS = {
    "behaviour": behaviour,
    "separability": separability,
    "modality_gap": modality_gap,
    "gates": gates,
    "sweep": sweep,
    "states": states,
    "projections": projections,
    "tokens": tokens,
}


def write_study(folder: Path, *, leave_out: tuple[str, ...] = ()) -> Path:
    """Write the folder of a study, without some of its results if asked."""
    for name, make in RESULTS.items():
        if name not in leave_out:
            make().save(folder / "results" / name)
    if "responses" not in leave_out:
        lines = [json.dumps(row) for row in responses()]
        write_text(folder / "responses.jsonl", "\n".join(lines) + "\n")
    if "study" not in leave_out:
        write_json(folder / "study.json", FACTS)
    return folder


FACTS: dict[str, Any] = {
    "model": f"pretend {SCRIPT}",
    "command": "mechguard study pretend --out runs/pretend",
    "seed": 0,
    "chosen": {
        "variant": "B, LLM held",
        "layers": [2, 3, 4],
        "alpha": 1.0,
        "benign_compliance_kept": True,
        "rule": "the lowest attack success",
        "gate": "midpoint",
    },
    "prompts": {"anchors": 200, "validation": 80, "malicious": 100, "benign": 100},
    "sources": {
        "anchors": {
            "what": "pairs by hand",
            "source": "a journal",
            "licence": "MIT",
            "citation": "<b>Doe 2024</b>",
        }
    },
    "settings": {"rank": 1, "limit": None},
    "seconds": 93.2,
    "versions": {"python": "3.11", "torch": "2.13.0"},
}
