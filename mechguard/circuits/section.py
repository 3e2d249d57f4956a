"""The circuits of a study: every table of the report's section, each made when it is asked for.

Components are ranked on validation prompts; what they explain is measured on test prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from mechguard.circuits.attribution import attribute, map_attention, measure_attention
from mechguard.circuits.checks import KINDS, Check, rank_components
from mechguard.circuits.decisions import Decision, find_decision
from mechguard.circuits.lens import apply_logit_lens
from mechguard.circuits.patching import correlate, hide_image, patch, patch_paths
from mechguard.directions import Directions
from mechguard.guards.steering import AnyGuard
from mechguard.models import VLM
from mechguard.prompts import HARMFUL, HARMLESS, Prompts
from mechguard.result import Result
from mechguard.statistics import bootstrap_mean

KS = (1, 2, 3, 5, 10)
GENERATED_K = 5


@dataclass(eq=False)
class Section:
    """What the circuits of a model are measured on.

    Attributes:
        layer: whose SSD is split and scored.
        validation: where the decision is found and components are ranked.
        test: where effects and checks are measured.
        image: the image condition beside text.
        guard: what the logit lens and the checks are compared with; None for none.
        limit: at most so many prompts of each label for patching; twice as many for the rest.
        given: where the model decides, if that is known; found in its answers otherwise.
    """

    vlm: VLM
    directions: Directions
    layer: int
    validation: Prompts
    test: Prompts
    image: str = "blank"
    guard: AnyGuard | None = None
    limit: int = 24
    seed: int = 0
    progress: bool = True
    given: Decision | None = None

    @property
    def tables(self) -> dict[str, Callable[[], Result]]:
        """How each table is made, by name, in the order of the report."""
        return {
            "attribution": self.attribution,
            "ranking": self.ranking,
            "attention": self.attention,
            "attention_map": self.attention_map,
            "lens": self.lens,
            "patching": self.patching,
            "patching_estimate": self.patching_estimate,
            "paths": self.paths,
            "checks": self.checks,
        }

    def run(self, keep: Callable[[str, Callable[[], Result]], Result]) -> dict[str, Result]:
        """Every table by name.

        Args:
            keep: gets a name and how to make the table, and gives it, made or read.
        """
        made = {name: keep(name, make) for name, make in self.tables.items()}
        exact, estimate = made["patching"], made["patching_estimate"]
        return {**made, "agreement": keep("agreement", lambda: correlate(exact, estimate))}

    @cached_property
    def decision(self) -> Decision:
        """Where the model decides: as given, or from its own answers to validation prompts as text."""
        if self.given is not None:
            return self.given
        asked = first(self.validation, HARMFUL, 2 * self.limit) + first(
            self.validation, HARMLESS, 2 * self.limit
        )
        return find_decision(self.vlm, asked.with_image("none"))

    def attribution(self) -> Result:
        """Mean values of every component, of harmful and of harmless test prompts, in text and beside it."""
        results = []
        for label in (HARMFUL, HARMLESS):
            for condition in ("text", self.image):
                prompts = first(self.test, label, 2 * self.limit).with_image(condition)
                split = attribute(self.vlm, prompts, self.directions, layer=self.layer)
                results.append(average(split, label=label, seed=self.seed))
        return sum(results[1:], results[0])

    def ranking(self) -> Result:
        """What components write more for harm than for harmless, and more in text than beside a picture."""
        ranked = []
        for position, decision in (("last", None), ("decision", self.decision)):
            for name, ranking in self._rankings(decision).items():
                table = ranking.table.assign(comparison=name, position=position, split="validation")
                ranked.append(Result(table, {**ranking.about, "decision": self.decision.words}))
        return sum(ranked[1:], ranked[0])

    def attention(self) -> Result:
        """Attention to the picture and values taken from it, by head, harmful test prompts."""
        measured = measure_attention(
            self.vlm, self._harmful.with_image(self.image), self.directions, layer=self.layer
        )
        return average(measured, label=HARMFUL, seed=self.seed)

    def attention_map(self) -> Result:
        """Where in the picture each head looks."""
        return map_attention(self.vlm, self._harmful.with_image(self.image))

    def lens(self) -> Result:
        """The logit lens on harmful test prompts: text, beside a picture, and that guarded."""
        conditions: list[tuple[str, AnyGuard | None]] = [("text", None), (self.image, None)]
        conditions += [] if self.guard is None else [(self.image, self.guard)]
        found = [
            apply_logit_lens(
                self.vlm,
                self._harmful.with_image(condition),
                decision=self.decision,
                guard=guard,
                seed=self.seed,
            )
            for condition, guard in conditions
        ]
        return sum(found[1:], found[0])

    def patching(self) -> Result:
        """Exact patching both ways, and the picture hidden, harmful test prompts."""
        prompts = first(self.test, HARMFUL, self.limit).with_image(self.image)
        return self._both_ways("exact") + hide_image(
            self.vlm, prompts, self.directions, layer=self.layer, decision=self.decision, seed=self.seed
        )

    def patching_estimate(self) -> Result:
        """The same places by attribution patching."""
        return self._both_ways("gradient")

    def paths(self) -> Result:
        """From the earlier head that writes most less of the SSD beside the picture, to the SSD."""
        ranked = self._rankings(None)["text - image"].table
        heads = ranked[(ranked["component"] == "head") & (ranked["layer"] < max(self.layer, 1))]
        top = heads.iloc[0]
        prompts = first(self.test, HARMFUL, self.limit)
        return patch_paths(
            self.vlm,
            prompts.with_image("none"),
            prompts.with_image(self.image),
            self.directions,
            head=(int(top["layer"]), int(top["head"])),
            layer=self.layer,
            seed=self.seed,
        )

    def checks(self) -> Result:
        """Taking the top components out of text, giving them back beside a picture, and what a guard does."""
        rankings = self._rankings(self.decision)
        check = Check(
            self.vlm, self.directions, self.layer, self.decision, self.validation, self._harmful,
            image=self.image, seed=self.seed,
        )  # fmt: skip
        parts = rankings["text - image"].table["component"].isin(KINDS).sum()
        ks = [k for k in KS if 2 * k <= parts] or [1]  # as many others must be left to draw from
        found = check.ablate(rankings["harmful - harmless"], ks=ks)
        found += check.restore(rankings["text - image"], ks=ks)
        for k in sorted({min(GENERATED_K, ks[-1]), ks[-1]}):
            found += check.generate(rankings["harmful - harmless"], k=k)
        return found if self.guard is None else found + check.guarded(self.guard)

    @property
    def _harmful(self) -> Prompts:
        return first(self.test, HARMFUL, 2 * self.limit)

    def _rankings(self, decision: Decision | None) -> dict[str, Result]:
        harmful, harmless = (first(self.validation, label, 2 * self.limit) for label in (HARMFUL, HARMLESS))
        text, beside, safe = (
            attribute(self.vlm, prompts, self.directions, layer=self.layer, decision=decision)
            for prompts in (
                harmful.with_image("none"), harmful.with_image(self.image), harmless.with_image("none")
            )
        )  # fmt: skip
        return {
            "harmful - harmless": rank_components(text, safe, seed=self.seed),
            "text - image": rank_components(text, beside, seed=self.seed),
        }

    def _both_ways(self, method: str) -> Result:
        prompts = first(self.test, HARMFUL, self.limit)
        text, beside = prompts.with_image("none"), prompts.with_image(self.image)
        found = [
            patch(
                self.vlm, source, target, self.directions, layer=self.layer, decision=self.decision,
                contrast=self.test.with_label(HARMLESS), method=method, seed=self.seed,  # type: ignore[arg-type]
                progress=self.progress,
            )
            for source, target in ((text, beside), (beside, text))
        ]  # fmt: skip
        return found[0] + found[1]


def average(result: Result, *, label: str, seed: int = 0) -> Result:
    """Means over prompts of a table with one row per prompt, with 95% bootstrap intervals.

    Args:
        label: what the prompts are, for the column `label`.
    """
    table = result.table
    keys = [c for c in ("condition", "component", "layer", "head", "metric") if c in table]
    rows = []
    for key, values in table.groupby(keys, sort=False)["value"]:
        numbers = values.to_numpy()
        low, high = bootstrap_mean(numbers, seed=seed)
        rows.append(
            {**dict(zip(keys, key, strict=True)), "label": label, "value": float(numbers.mean()), "low": low,
             "high": high, "n": len(numbers)}
        )  # fmt: skip
    return Result.from_rows(rows, **{k: v for k, v in result.about.items() if k != "versions"})


def first(prompts: Prompts, label: str, count: int) -> Prompts:
    """The first prompts of a label."""
    return prompts.with_label(label)[:count]  # type: ignore[arg-type]
