"""Comparisons: every method on one table, each with its own settings, each beside its controls.

Settings are chosen method by method on validation prompts by the rule of `sweeps`; the chosen ones are then
measured on test prompts, beside the same guard with random directions and with directions fitted on shuffled
labels. Every finished cell is a line in a file, so that a comparison that was killed goes on where it
stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from mechguard import guards
from mechguard.activations import Activations
from mechguard.directions import fit_directions
from mechguard.errors import MechguardError
from mechguard.evaluation import evaluate
from mechguard.guards.steering import AnyGuard
from mechguard.models import VLM
from mechguard.prompts import Prompts
from mechguard.result import UNGUARDED, Result
from mechguard.separability import measure_separability
from mechguard.statistics import bootstrap_mean
from mechguard.storage import append_line, digest, hold_folder, read_json, read_lines, write_json
from mechguard.sweeps import RULE, choose, format_layers, layer_sets, parse_layers
from mechguard.tracing import collect, predict_next_tokens

ALPHAS = (0.5, 1.0, 2.0)
RANKS = (1, 4)
CONTROLS = 2  # random draws beside every method


@dataclass(frozen=True)
class States:
    """What methods are fitted on.

    Attributes:
        text: the anchors as the language model reads them.
        image: the anchors beside a blank image, as the VLM sees them.
    """

    text: Activations
    image: Activations

    def shuffled(self, seed: int) -> States:
        """The same states with labels and pairs dealt anew: what fitting finds where there is nothing.

        Swapping labels within pairs would leave an uncentred SVD as it is, for it does not know signs.
        """
        return States(self.text.shuffled(seed), self.image.shuffled(seed))


Setting = dict[str, Any]
Make = Callable[[States, Setting], AnyGuard]


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        make: the guard of one setting (`layers`, `alpha`, `rank`), fitted on some states.
        alphas: strengths that are tried.
        ranks: ranks that are tried, for methods with a subspace.
        controlled: whether random directions and shuffled labels mean something for it.
    """

    make: Make
    alphas: Sequence[float] = ALPHAS
    ranks: Sequence[int] = (1,)
    controlled: bool = True


def _vlm_guard(source: guards.Source) -> Make:
    def make(states: States, setting: Setting) -> AnyGuard:
        ssd = fit_directions(states.text, rank=setting["rank"])
        return guards.vlm_guard(ssd, layers=setting["layers"], alpha=setting["alpha"], source=source)

    return make


def _on_text(method: Callable[..., AnyGuard]) -> Make:
    return lambda states, setting: method(states.text, layers=setting["layers"], alpha=setting["alpha"])


def _on_both(method: Callable[..., AnyGuard]) -> Make:
    return lambda states, setting: method(
        states.text, states.image, layers=setting["layers"], alpha=setting["alpha"]
    )


METHODS: dict[str, Method] = {
    "vlm_guard, stream": Method(_vlm_guard("llm-stream"), ranks=RANKS),
    "vlm_guard, at the prompt": Method(_vlm_guard("llm"), ranks=RANKS),
    "vlm_guard, reading A": Method(_vlm_guard("last"), ranks=RANKS),
    "projection": Method(
        lambda states, setting: guards.projection(
            fit_directions(states.text, rank=setting["rank"]), layers=setting["layers"]
        ),
        alphas=(1.0,),
        ranks=RANKS,
    ),
    "activation_addition": Method(_on_text(guards.activation_addition)),
    "inferaligner": Method(_on_text(guards.inferaligner)),
    "cast": Method(_on_text(guards.cast)),
    "cmrm": Method(_on_both(guards.cmrm)),
    "cmrm_sample": Method(_on_text(guards.cmrm_sample), controlled=False),
    "shift_dc": Method(_on_text(guards.shift_dc)),
    "astra": Method(_on_text(guards.astra)),
    "adasteer": Method(_on_both(guards.adasteer)),
    "tbop": Method(
        lambda states, setting: guards.tbop(
            states.text, states.image, layers=setting["layers"], rank=setting["rank"]
        ),
        alphas=(1.0,),
        ranks=RANKS,
    ),
    "mars": Method(_on_both(guards.mars)),
    "alpha_steer": Method(_on_text(guards.alpha_steer)),
    "self_reminder": Method(lambda states, setting: guards.self_reminder(), alphas=(1.0,), controlled=False),
    "goal_priority": Method(lambda states, setting: guards.goal_priority(), alphas=(1.0,), controlled=False),
}


@dataclass
class Comparison:
    """One comparison in one folder.

    Attributes:
        vlm: the model.
        anchors: pairs that methods are fitted on.
        validation: harmful and harmless prompts that settings are chosen on.
        tests: prompts that are reported, by the name of their setting.
        out: the folder.
        methods: which are compared; `METHODS` by default.
        conditions: image conditions; "image" where every prompt owns a picture.
        only: conditions of single test sets, such as prompts that mean nothing without their picture.
        limit: at most so many validation prompts of each label.
        limit_tests: at most so many prompts of each label of a test set; all by default.
    """

    vlm: VLM
    anchors: Prompts
    validation: Prompts
    tests: Mapping[str, Prompts]
    out: Path
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    conditions: Sequence[str] = ("text", "blank", "image")
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)
    limit: int = 25
    limit_tests: int | None = None
    seed: int = 0
    max_new_tokens: int = 48
    progress: bool = True

    @cached_property
    def states(self) -> States:
        """The anchors' states."""
        text = collect(self.vlm.llm, self.anchors, progress=self.progress)
        return States(text, collect(self.vlm, self.anchors.with_image("blank"), progress=self.progress))

    @cached_property
    def layer_sets(self) -> list[list[int]]:
        """The best layer, the three best, and all, by d' of the SSD on validation text."""
        ssd = fit_directions(self.states.text)
        states = collect(self.vlm.llm, self.validation, progress=self.progress)
        separability = measure_separability(states, ssd, resamples=50)
        return layer_sets(separability, self.vlm.n_layers, sizes=(1, 3))

    def settings(self, method: Method) -> list[Setting]:
        """Every setting of a method that is tried."""
        if method.make(self.states, {"layers": [0], "alpha": 1.0, "rank": 1}).layers == ():
            return [{"layers": [], "alpha": 1.0, "rank": 1}]  # a guard of prompts has none
        return [
            {"layers": layers, "alpha": alpha, "rank": rank}
            for rank, layers, alpha in product(method.ranks, self.layer_sets, method.alphas)
        ]

    def choose(self) -> dict[str, Setting]:
        """The setting of every method, by `RULE` on validation prompts."""
        prompts = self.validation.first(self.limit)
        plain = self._cell("validation", UNGUARDED, {}, lambda: self._rates(prompts, None))
        chosen = {}
        for name, method in tqdm(self.methods.items(), desc="methods", disable=not self.progress):
            tables = [self._as_sweep(plain, {"variant": UNGUARDED, "layers": "", "alpha": 0.0, "rank": 0})]
            for setting in self.settings(method):
                rows = self._cell(
                    "validation",
                    name,
                    setting,
                    partial(self._tried, prompts, method, setting),
                )
                facts = {**setting, "variant": name, "layers": format_layers(setting["layers"])}
                tables.append(self._as_sweep(rows, facts))
            best = choose(Result(pd.concat(tables, ignore_index=True), {}))
            layers = parse_layers(best["layers"]) if isinstance(best["layers"], str) else best["layers"]
            chosen[name] = {"layers": layers, "alpha": best["alpha"], "rank": best["rank"]}
        return chosen

    def run(self) -> Result:
        """Choose on validation, report on test; the table is also written to the folder."""
        with hold_folder(self.out):
            return self._run()

    def _run(self) -> Result:
        self.claim()
        chosen = self.choose()
        rows = []
        for name, setting, guard in self.guards(chosen):
            key = {"guard": name, **setting}
            found = self._cell("test", name, key, partial(self._tested, guard))
            rows += [{**row, "guard": name, "layers": format_layers(setting["layers"])} for row in found]
        about = {
            "model": self.vlm.name,
            "fingerprint": self.vlm.fingerprint,
            "rule": RULE,
            "chosen": chosen,
            "layer_sets": self.layer_sets,
            "n_validation": len(self.validation.first(self.limit)),
            "seed": self.seed,
        }
        result = Result.from_rows(rows, **about)
        result.save(self.out / "defences")
        return result

    def guards(
        self, chosen: Mapping[str, Setting], *, controls: int = CONTROLS, shuffled: bool = True
    ) -> list[tuple[str, Setting, AnyGuard | None]]:
        """No guard, then every method in its chosen setting with its controls beside it.

        Args:
            chosen: of `choose`.
            controls: random draws beside every method that can have them.
            shuffled: whether a fit on shuffled labels stands beside it too.
        """
        found: list[tuple[str, Setting, AnyGuard | None]] = [
            (UNGUARDED, {"layers": [], "alpha": 0.0, "rank": 0}, None)
        ]
        for name, setting in chosen.items():
            method = self.methods[name]
            guard = method.make(self.states, setting).renamed(name)
            found.append((name, setting, guard))
            if not method.controlled or isinstance(guard, guards.Chain):
                continue
            for draw in range(1, controls + 1):
                control = guard.randomised(self.seed + draw)
                found.append((f"{name}; random {draw}", setting, control.renamed(f"{name}; random {draw}")))
            if shuffled:
                fitted = method.make(self.states.shuffled(self.seed), setting)
                found.append((f"{name}; shuffled", setting, fitted.renamed(f"{name}; shuffled")))
        return found

    def _tried(self, prompts: Prompts, method: Method, setting: Setting) -> list[dict[str, Any]]:
        return self._rates(prompts, method.make(self.states, setting))

    def _rates(self, prompts: Prompts, guard: AnyGuard | None) -> list[dict[str, Any]]:
        conditions = [word for word in self.conditions if word != "image"] or ["text"]
        return self._evaluated(prompts, guard, conditions, "validation")

    def _tested(self, guard: AnyGuard | None) -> list[dict[str, Any]]:
        rows = []
        for name, everything in self.tests.items():
            prompts = everything.first(self.limit_tests)
            owned = all(prompt.own_image is not None for prompt in prompts)
            asked = self.only.get(name, self.conditions)
            conditions = [word for word in asked if word != "image" or owned]
            rows += self._evaluated(prompts.renamed(name), guard, conditions, "test")
            if guard is not None:
                rows += self._divergence(prompts.renamed(name), guard, conditions)
        return rows

    def _evaluated(
        self, prompts: Prompts, guard: AnyGuard | None, conditions: Sequence[str], split: str
    ) -> list[dict[str, Any]]:
        result = evaluate(
            self.vlm,
            prompts,
            guards=[guard],
            conditions=list(conditions),
            max_new_tokens=self.max_new_tokens,
            split=split,
            progress=False,
        )
        return json.loads(result.table.to_json(orient="records"))

    def _divergence(
        self, prompts: Prompts, guard: AnyGuard, conditions: Sequence[str]
    ) -> list[dict[str, Any]]:
        """KL of the first token from the unguarded model to the guarded one, in nats, harmless prompts."""
        harmless = prompts.with_label("harmless")
        rows = []
        for condition in conditions if len(harmless) else ():
            sent = harmless.with_image(condition)
            plain = predict_next_tokens(self.vlm, sent, progress=False)
            guarded = predict_next_tokens(self.vlm, sent, guard=guard, progress=False)
            values = (plain.exp() * (plain - guarded)).sum(-1)
            low, high = bootstrap_mean(values.numpy(), seed=self.seed)
            facts = {"setting": prompts.name, "condition": condition, "metric": "kl_first_token"}
            numbers = {"value": float(values.mean()), "low": low, "high": high, "n": len(sent)}
            rows.append({**facts, **numbers, "split": "test"})
        return rows

    def _as_sweep(self, rows: list[dict[str, Any]], facts: dict[str, Any]) -> pd.DataFrame:
        return pd.DataFrame(rows).assign(**facts)

    def _cell(
        self, stage: str, name: str, key: dict[str, Any], measure: Callable[[], list[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """The rows of one cell, from the file if they are there."""
        mark = digest(stage, name, key)
        if mark not in self._known:
            self._known[mark] = measure()
            line = {"cell": mark, "stage": stage, "guard": name, "setting": key, "rows": self._known[mark]}
            append_line(self.out / "cells.jsonl", line)
        return self._known[mark]

    @cached_property
    def _known(self) -> dict[str, list[dict[str, Any]]]:
        lines = read_lines(self.out / "cells.jsonl", needed=("cell", "rows"), adding=True)
        return {line["cell"]: line["rows"] for line in lines}

    def claim(self) -> None:
        """Bind the folder to this model and these prompts.

        Raises:
            MechguardError: it holds another comparison.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        sets = {"anchors": self.anchors, "validation": self.validation, **self.tests}
        facts = {
            "fingerprint": self.vlm.fingerprint,
            "prompts": {name: prompts.fingerprint for name, prompts in sets.items()},
            "methods": list(self.methods),
            "conditions": list(self.conditions),
            "only": {name: list(words) for name, words in self.only.items()},
            "limit": self.limit,
            "limit_tests": self.limit_tests,
            "seed": self.seed,
            "max_new_tokens": self.max_new_tokens,
        }
        place = self.out / "comparison.json"
        if place.is_file() and read_json(place) != facts:
            raise MechguardError(
                f"{self.out} holds another comparison (another model, prompts or settings); give another "
                "folder"
            )
        write_json(place, facts)


def compare_guards(
    model: VLM,
    *,
    anchors: Prompts,
    validation: Prompts,
    tests: Mapping[str, Prompts],
    out: str | os.PathLike[str],
    methods: Sequence[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Result:
    """VLM-Guard and its neighbours on one table, with controls.

    Args:
        anchors: harmful and harmless pairs that methods are fitted on.
        validation: prompts that layers, strengths and ranks are chosen on.
        tests: prompts that are reported, by the name of their setting.
        out: a folder; a comparison that was interrupted there goes on.
        methods: names in `METHODS`; all by default.
        settings: `conditions`, `only`, `limit`, `limit_tests`, `seed`, `max_new_tokens` (see `Comparison`).

    Returns:
        Rows setting x condition x guard x metric, among them `visual_accuracy` for questions with answers and
        `kl_first_token` for harmless prompts; controls are guards named "METHOD; random 1",
        "METHOD; shuffled".

    Raises:
        MechguardError: an unknown method, or a folder that holds another comparison.
    """
    unknown = sorted(set(methods or ()) - set(METHODS))
    if unknown:
        raise MechguardError(f"method {unknown[0]!r} is not known; use some of {', '.join(METHODS)}")
    chosen = {name: METHODS[name] for name in (methods or METHODS)}
    torch.manual_seed(settings.get("seed", 0))
    comparison = Comparison(
        model, anchors, validation, tests, Path(out), chosen, progress=progress, **settings
    )
    return comparison.run()
