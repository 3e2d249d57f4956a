"""Whether the parts that attribution names matter: take them out of text, give them back beside a picture.

Attribution is a sum over what parts write; whether the model acts on it is another question. Here the k parts
that it ranks highest are tested on prompts that took no part in the ranking, beside as many parts of the same
kinds drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechguard.circuits.attribution import NOWHERE, layer_number
from mechguard.circuits.decisions import Decision, encode_to_decision
from mechguard.circuits.lens import reaching
from mechguard.circuits.passes import Edit, Place, count_heads, head_slice, hooked, run
from mechguard.circuits.patching import Question, alike, effect_rows
from mechguard.directions import Directions
from mechguard.errors import MechguardError
from mechguard.guards.steering import AnyGuard
from mechguard.judges import AnyJudge, Exchange, find_judge
from mechguard.models import VLM
from mechguard.prompts import Prompts
from mechguard.result import Result
from mechguard.statistics import bootstrap_mean, percentile_interval, resample_indices, wilson_interval

Part = tuple[str, int, int]
"""A component, its layer and its head."""
KINDS = ("head", "mlp")
RANDOM_SETS = 10
BATCH = 64


def rank_components(first: Result, second: Result, *, seed: int = 0) -> Result:
    """Components by how much more they write for one set of prompts than for another.

    Args:
        first: of `attribute`, such as harmful prompts, or text.
        second: the same of other prompts, or of the same ones beside a picture, which are then
            compared pair by pair.

    Returns:
        One row per component, largest mean difference of `value` first, with a 95% bootstrap interval over
        prompts, and `first` and `second`, the two means.
    """
    keys = ["component", "layer", "head"]
    sides = [
        result.table.pivot_table(index="prompt", columns=keys, values="value", aggfunc="sum")
        for result in (first, second)
    ]
    paired = set(sides[0].index) == set(sides[1].index)
    if paired:
        sides[1] = sides[1].loc[sides[0].index]
    own = resample_indices(len(sides[0]), 1000, seed)
    other = own if paired else resample_indices(len(sides[1]), 1000, seed + 1)
    rows = []
    for key in sides[0].columns.intersection(sides[1].columns):
        left, right = (side[key].to_numpy() for side in sides)
        low, high = percentile_interval(left[own].mean(-1) - right[other].mean(-1))
        rows.append(
            {**dict(zip(keys, key, strict=True)), "metric": "difference", "value": left.mean() - right.mean(),
             "low": float(low), "high": float(high), "n": len(left), "first": left.mean(),
             "second": right.mean()}
        )  # fmt: skip
    rows.sort(key=lambda row: -row["value"])
    return Result.from_rows(rows, **{key: first.about.get(key) for key in ("model", "direction", "seed")})


def top_components(ranking: Result, k: int) -> list[Part]:
    """The k heads and MLPs that a ranking puts first.

    Raises:
        MechguardError: it has fewer.
    """
    table = ranking.table
    parts = table[table["component"].isin(KINDS)].head(k)
    if len(parts) < k:
        raise MechguardError(f"the ranking has {len(parts)} heads and MLPs; k={k} is more")
    return [(row.component, int(row.layer), int(row.head)) for row in parts.itertuples()]


@dataclass(frozen=True, eq=False)
class Check:
    """What a check runs on.

    Attributes:
        calibration: prompts whose mean outputs stand in for a part that is taken out.
        held_out: prompts that took no part in the ranking.
        image: the condition in which parts are given back.
    """

    model: VLM
    directions: Directions
    layer: int
    decision: Decision
    calibration: Prompts
    held_out: Prompts
    image: str = "blank"
    seed: int = 0

    def ablate(self, ranking: Result, *, ks: Sequence[int], sets: int = RANDOM_SETS) -> Result:
        """Put the mean output in the place of the top k parts, in text.

        It is the mean over the calibration prompts, at the last token of the prompt and behind it up to where
        the model decides.

        Returns:
            Rows by `k` and `choice`: "top", "random" (the mean over `sets` draws; the interval holds 95% of
            them), "top - random" (paired over prompts, with a bootstrap interval). Metrics as in `patch`
            ("log_odds", "projection"), and "refusal", the share of prompts with positive log-odds. k = 0 is
            the model as it is.
        """
        text = list(self.held_out.with_image("none"))
        edits = self._means()
        return self._compared("ablate", "text", ranking, ks, sets, text, lambda _: edits)

    def restore(self, ranking: Result, *, ks: Sequence[int], sets: int = RANDOM_SETS) -> Result:
        """Give the top k parts, beside a picture, what they give in text, at the same positions.

        Returns:
            Rows as for `ablate`.
        """
        beside = list(self.held_out.with_image(self.image))
        texts = self._texts
        return self._compared(
            "restore", self.image, ranking, ks, sets, beside,
            lambda rows: texts(Prompts([self.held_out[row] for row in rows])),
        )  # fmt: skip

    def guarded(self, guard: AnyGuard) -> Result:
        """What a guard does to the same prompts beside the picture, for comparison."""
        scores = []
        beside = self.held_out.with_image(self.image)
        for rows in alike(beside, beside, BATCH):
            batch = [beside[row] for row in rows]
            place = self._question.place
            with reaching(self.model, batch, self.decision, guard, [place]) as (logits, _):
                odds = self.decision.log_odds(logits[:, -1]).cpu()
            scores.append(torch.stack([odds, odds]))
        measured = self._rows(torch.cat(scores, dim=1).numpy())
        named = {"check": "guard", "condition": self.image, "k": 0, "choice": guard.name}
        return self._result([{**named, **row} for row in measured if row["metric"] != "projection"])

    def generate(
        self,
        ranking: Result,
        *,
        k: int,
        sets: int = 3,
        judge: AnyJudge = "refusal",
        tokens: int = 32,
    ) -> Result:
        """The refusals in whole answers to text, with the top k parts at their mean, and with random ones.

        Answers begin with the decision's prefix, and the parts are changed up to there.

        Returns:
            Rows by `choice`: "none", "top", "random 1", ...; metric "keyword_refusal" with Wilson intervals.
        """
        verdict = find_judge(judge, self.model.folder)
        text = list(self.held_out.with_image("none"))
        edits = self._means()
        top = top_components(ranking, k)
        chosen: dict[str, list[Part]] = {"none": [], "top": top}
        chosen |= {f"random {n + 1}": drawn for n, drawn in enumerate(self._random(top, sets))}
        rows = []
        for choice, parts in chosen.items():
            answers = self._answers(text, parts, edits, tokens)
            pairs = zip(text, answers, strict=True)
            said = verdict.judge([Exchange(p.text, answer, p.label) for p, answer in pairs])
            count = sum(bool(found.keyword_refusal) for found in said)
            low, high = wilson_interval(count, len(answers))
            rows.append({"check": "ablate", "condition": "text", "k": k, "choice": choice,
                         "metric": "keyword_refusal", "value": count / len(answers), "low": low, "high": high,
                         "n": len(answers)})  # fmt: skip
        return self._result(rows)

    @property
    def _question(self) -> Question:
        number = layer_number(self.model, self.layer)
        return Question(self.decision, self.directions.at(number)[0], number)

    @property
    def _size(self) -> int:
        """How many positions are changed: the last one of the prompt, and the decision's prefix."""
        return 1 + len(self.decision.prefix)

    @property
    def _places(self) -> list[Place]:
        layers = [n for n in self.model.parts.running(with_picture=False) if n <= self._question.layer]
        return [Place(kind, n) for n in layers for kind in KINDS]  # type: ignore[arg-type]

    def _means(self) -> dict[Place, Tensor]:
        """The mean output of every part over the calibration prompts as text, from their last token on."""
        found: dict[Place, list[Tensor]] = {}
        for start in range(0, len(self.calibration), BATCH):
            for place, state in self._texts(self.calibration[start : start + BATCH]).items():
                found.setdefault(place, []).append(state)
        return {place: torch.cat(states).mean(0, keepdim=True) for place, states in found.items()}

    def _texts(self, batch: Prompts) -> dict[Place, Tensor]:
        """What every part gives in prompts as text, from their last token to where the model decides."""
        encoded = encode_to_decision(self.model, list(batch.with_image("none")), self.decision)
        size = self._size
        with torch.no_grad(), hooked(self.model, keep=self._places, read=lambda s: s[:, -size:]) as states:
            run(self.model, encoded)
        return dict(states)

    def _compared(
        self,
        check: str,
        condition: str,
        ranking: Result,
        ks: Sequence[int],
        sets: int,
        prompts: list[Any],
        source: Any,
    ) -> Result:
        base = self._scores(prompts, [], source)
        rows = [
            {"check": check, "condition": condition, "k": 0, "choice": "none", **row}
            for row in self._rows(base)
        ]
        for k in ks:
            top = top_components(ranking, k)
            ours = self._scores(prompts, top, source)
            draws = np.stack([self._scores(prompts, parts, source) for parts in self._random(top, sets)])
            named = {"check": check, "condition": condition, "k": k}
            rows += [{**named, "choice": "top", **row} for row in self._rows(ours)]
            rows += [{**named, "choice": "random", **row} for row in _spread(draws)]
            rows += [
                {**named, "choice": "top - random", **row} for row in _difference(ours, draws, self.seed)
            ]
        return self._result(rows)

    def _scores(
        self, prompts: list[Any], parts: list[Part], source: Any
    ) -> Float[np.ndarray, "score prompt"]:
        found = []
        for rows in alike(prompts, prompts, BATCH):
            encoded = encode_to_decision(self.model, [prompts[row] for row in rows], self.decision)
            edits = self._edits(parts, source(rows))
            place = self._question.place
            with torch.no_grad(), hooked(self.model, edits=edits, keep=[place]) as states:
                logits = run(self.model, encoded).logits
            found.append(self._question.answer(logits, states[place]).cpu())
        return torch.cat(found, dim=1).numpy()

    def _edits(self, parts: list[Part], states: dict[Place, Tensor]) -> dict[Place, Edit]:
        """Edits that put given states in the place of these parts, from the last token of the prompt on."""
        wanted: dict[Place, list[int]] = {}
        for component, layer, head in parts:
            wanted.setdefault(Place(component, layer), []).append(head)  # type: ignore[arg-type]
        model, size = self.model, self._size

        def edit(place: Place, heads: list[int]) -> Edit:
            def change(own: Tensor) -> Tensor:
                if own.shape[1] == 1:
                    return own  # a token that is being generated behind the decision
                new = own.clone()
                for head in heads:
                    entries = slice(None) if head == NOWHERE else head_slice(own, head, model)
                    new[:, -size:, entries] = states[place][..., entries].to(own)
                return new

            return change

        return {place: edit(place, heads) for place, heads in wanted.items()}

    def _answers(
        self, prompts: list[Any], parts: list[Part], means: dict[Place, Tensor], tokens: int
    ) -> list[str]:
        answers = []
        for start in range(0, len(prompts), BATCH):
            encoded = encode_to_decision(self.model, prompts[start : start + BATCH], self.decision)
            with torch.no_grad(), hooked(self.model, edits=self._edits(parts, means)):
                ids = self.model.hf_model.generate(**encoded, do_sample=False, max_new_tokens=tokens)
            answers += self.model.decode(ids[:, encoded["input_ids"].shape[1] - len(self.decision.prefix) :])
        return answers

    def _random(self, top: list[Part], sets: int) -> list[list[Part]]:
        """As many heads and MLPs as in `top`, drawn among the others; where too few are left, among heads."""
        random = np.random.default_rng(self.seed)
        heads = range(count_heads(self.model))
        others = {
            "head": [("head", p.layer, h) for p in self._places if p.site == "head" for h in heads],
            "mlp": [("mlp", p.layer, NOWHERE) for p in self._places if p.site == "mlp"],
        }
        others = {kind: [part for part in parts if part not in top] for kind, parts in others.items()}
        draws = []
        for _ in range(sets):
            mlps = min(sum(part[0] == "mlp" for part in top), len(others["mlp"]))
            counts = {"mlp": mlps, "head": min(len(top) - mlps, len(others["head"]))}
            draws.append(
                [
                    others[kind][index]
                    for kind, count in counts.items()
                    for index in random.choice(len(others[kind]), count, replace=False)
                ]
            )
        return draws

    def _rows(self, scores: Float[np.ndarray, "score prompt"]) -> list[dict[str, Any]]:
        rows = effect_rows(scores, None, self.seed)
        refused = int((scores[0] > 0).sum())
        low, high = wilson_interval(refused, scores.shape[1])
        share = refused / scores.shape[1]
        return [*rows, {"metric": "refusal", "value": share, "low": low, "high": high, "n": scores.shape[1]}]

    def _result(self, rows: list[dict[str, Any]]) -> Result:
        return Result.from_rows(
            rows,
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            prompts=self.held_out.fingerprint,
            decision=self.decision.words,
            layer=self._question.layer,
            seed=self.seed,
        )


def _spread(draws: Float[np.ndarray, "draw score prompt"]) -> list[dict[str, Any]]:
    """The mean over random draws, and what 95% of the draws lie between."""
    measured = {
        "log_odds": draws[:, 0].mean(-1),
        "projection": draws[:, 1].mean(-1),
        "refusal": (draws[:, 0] > 0).mean(-1),
    }
    rows = []
    for metric, values in measured.items():
        low, high = percentile_interval(values)
        rows.append({"metric": metric, "value": float(values.mean()), "low": float(low), "high": float(high),
                     "n": draws.shape[2]})  # fmt: skip
    return rows


def _difference(
    top: Float[np.ndarray, "score prompt"], draws: Float[np.ndarray, "draw score prompt"], seed: int
) -> list[dict[str, Any]]:
    """The top parts' effect less the mean random one, prompt by prompt."""
    rows = effect_rows(top - draws.mean(0), None, seed)
    refused = (top[0] > 0) - (draws[:, 0] > 0).mean(0)
    low, high = bootstrap_mean(refused, seed=seed)
    return [*rows, {"metric": "refusal", "value": float(refused.mean()), "low": low, "high": high,
                    "n": len(refused)}]  # fmt: skip
