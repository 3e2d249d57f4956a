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


def transfer() -> Result:
    """The LLM's direction loses beside a picture what the own one keeps, from layer 2 on: it has moved."""
    rows = []
    for view in VIEWS:
        for layer in LAYERS:
            lost = 0.0 if view.endswith("text") else 0.07 * layer
            values = {SSD: 0.97 - lost, "svd, vlm blank": 0.9, "own, held out": 0.96}
            here = {"condition": view, "layer": layer, "split": "test"}
            for direction, value in values.items():
                rows.append({**here, "direction": direction, "metric": "auroc", **interval(value, 0.05)})
                rows.append({**here, "direction": direction, "metric": "dprime", **interval(3 * value)})
                change = {SSD: -lost}.get(direction, 0.0)
                bounds = {"value": change, "low": change - 0.1, "high": change + 0.1, "n": 100}
                if view != VIEWS[0]:
                    against = {"metric": "auroc_change", "against": VIEWS[0]}
                    rows.append({**here, "direction": direction, **against, **bounds})
            over = values["own, held out"] - values[SSD]
            bounds = {"value": over, "low": over - 0.1, "high": over + 0.1, "n": 100}
            recovered = {"direction": "own, held out", "metric": "auroc_recovered", "against": SSD}
            rows.append({**here, **recovered, **bounds})
            shuffled = {"direction": "shuffled labels", "metric": "auroc"}
            rows.append({**here, **shuffled, **interval(0.5, 0.1)})
    return Result(pd.DataFrame(rows))


def angles() -> Result:
    pairs = [("llm text", "vlm text"), ("llm text", "vlm blank"), ("random", "random")]
    values = {"cosine": 0.8, "principal_angle_1": 0.3, "principal_angle_2": 0.6, "subspace_energy": 0.9}
    rows = [
        {"direction": one, "condition": two, "layer": layer, "metric": metric, "split": "fitted"}
        | interval(value, 0.1, n=50)
        for one, two in pairs
        for layer in LAYERS
        for metric, value in values.items()
    ]
    return Result(pd.DataFrame(rows))


def modality_gap() -> Result:
    metrics = (
        "centroid_distance",
        "rmg",
        "cka",
        "safety_share",
        "safety_energy",
        "safety_energy_of_mean",
        "shift_along",
    )
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
    if metric.startswith("safety"):
        return ("random direction",)
    return ("shuffled modality",) if metric == "centroid_distance" else ()


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
    rows += [
        {"condition": view, "layer": layer, "metric": "gate_auroc", "gate": "any threshold", "label": "both"}
        | interval(0.9 + layer / 100)
        | {"split": "test"}
        for view in VIEWS
        for layer in LAYERS
    ]
    return Result(pd.DataFrame(rows))


def gate_curves() -> Result:
    points = [("any threshold", rate, rate**0.3) for rate in (0.0, 0.25, 0.5, 1.0)]
    points += [("sign", 0.0, 0.0), ("midpoint", 0.1, 0.6)]
    rows = [
        {"condition": view, "layer": layer, "gate": gate, "metric": "true_positive_rate", "split": "test"}
        | {"false_positive_rate": rate}
        | interval(value)
        for view in VIEWS
        for layer in LAYERS
        for gate, rate, value in points
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


def many_states() -> Result:
    """A map as large as a map gets: 500 prompts under four conditions, 32 layers."""
    generator = np.random.default_rng(0)
    prompts = pd.DataFrame({"id": [f"p{n}" for n in range(500)], "label": ["harmful", "harmless"] * 250})
    prompts["text"] = [f"How do I do thing number {n}, which takes some words to say?" for n in range(500)]
    conditions = pd.DataFrame({"condition": VIEWS})
    table = prompts.merge(conditions, how="cross").merge(pd.DataFrame({"layer": range(32)}), how="cross")
    table[["x", "y", "z"]] = generator.normal(size=(len(table), 3)) * 50
    return Result(table.assign(explained=0.5))


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


def responses(count: int = 100) -> list[dict[str, Any]]:
    """As many answers as the table says: of the first prompts unguarded, of the last ones with a guard."""
    return [
        {"setting": "test", "condition": condition, "guard": guard, "id": f"{label}-{number}"}
        | {"label": label, "sent": f"{label} question {number} {SCRIPT}", "tokens": 5, "gates": {}}
        | {"response": f"{guard} says {SCRIPT} to question {number}"}
        | {"complied": answered(guard, place, label, number / count)}
        | {"keyword_refusal": guard != "none", "complete_refusal": guard == "vlm_guard"}
        for place, condition in enumerate(CONDITIONS)
        for guard in GUARDS
        for label in LABELS
        for number in range(count)
    ]


def answered(guard: str, place: int, label: str, rank: float) -> bool:
    if label == "harmless":
        return rank < (0.99 if guard == "none" else 0.96)
    attack = ATTACKS[guard][place]
    return rank < attack - 1e-9 if guard == "none" else rank >= 1 - attack - 1e-9


RESULTS = {
    "behaviour": behaviour,
    "separability": separability,
    "modality_gap": modality_gap,
    "transfer": transfer,
    "angles": angles,
    "gates": gates,
    "gate_curves": gate_curves,
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


def circuits() -> dict[str, Result]:
    """Circuits of a model of two layers with two heads each."""
    parts = [("head", 0), ("head", 1), ("mlp", -1)]
    ranking = [
        {"comparison": comparison, "position": position, "component": component, "layer": layer, "head": head,
         "metric": "difference", **interval(0.1 * layer + 0.02 * place), "split": "validation"}
        for comparison in ("harmful - harmless", "text - image")
        for position in ("last", "decision")
        for layer in range(2)
        for place, (component, head) in enumerate(parts)
    ]  # fmt: skip
    patching = [
        {"condition": target, "source": source, "component": "residual", "layer": layer, "head": -1,
         "position": position, "metric": "log_odds_restored", **interval(0.3 * layer)}
        for source, target in (("text", "blank"), ("blank", "text"))
        for layer in range(2)
        for position in ("request", "last")
    ]  # fmt: skip
    lens = [
        {"condition": condition, "guard": guard, "layer": layer, "metric": "log_odds", **interval(0.5)}
        for condition, guard in (("text", "none"), ("blank", "none"), ("blank", "vlm_guard"))
        for layer in (0, 1, "output")
    ]
    where = [
        {"condition": "blank", "layer": layer, "head": 0, "position": 2 * row + column, "row": row,
         "column": column, "value": 0.1 + 0.1 * column + 0.01 * layer, "n": 4}
        for layer in range(2)
        for row in range(2)
        for column in range(2)
    ]  # fmt: skip
    rows = {
        "ranking": ranking,
        "patching": patching,
        "lens": lens,
        "attention_map": where,
        "checks": list(_check_rows()),
    }
    return {name: Result(pd.DataFrame(found), {"model": "pretend"}) for name, found in rows.items()}


def _check_rows() -> Iterator[dict[str, Any]]:
    for check, condition in (("ablate", "text"), ("restore", "blank")):
        shared = {"check": check, "condition": condition, "metric": "refusal", "n": 48}
        yield {**shared, "k": 0, "choice": "none", "value": 1.0, "low": 0.9, "high": 1.0}
        for k in (2, 5):
            for choice, value in (("top", 0.5), ("random", 0.9), ("top - random", -0.4)):
                row = {"k": k, "choice": choice, "value": value, "low": value - 0.2, "high": value + 0.2}
                yield {**shared, **row}
