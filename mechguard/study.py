"""The straight line as one command: from a model to a report.

    prompts -> collect -> fit directions -> (validation) choose layers and alpha -> (test) measure -> report

Every product is a file in the study's folder. A study that was interrupted goes on with what is there; a
folder that was made with other settings is refused.
"""

from __future__ import annotations

import os
import shlex
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from mechguard.activations import Activations
from mechguard.circuits.section import Section
from mechguard.datasets import (
    describe_source,
    load_from_folder,
    packaged_folder,
    skip_unreadable_pictures,
)
from mechguard.directions import Directions, fit_directions
from mechguard.errors import MechguardError
from mechguard.evaluation import evaluate
from mechguard.gap import measure_modality_gap
from mechguard.guards import Guard, measure_gate_curves, measure_gates, projection
from mechguard.loading import load
from mechguard.maps import map_states
from mechguard.models import VLM
from mechguard.overlaps import OverlapWarning, warn_of_shared
from mechguard.prefixes import keeping_answers, sharing_prompts
from mechguard.processes import alone, find_processes
from mechguard.projections import project_states, project_tokens
from mechguard.prompts import Prompts
from mechguard.report import StudyFolder, write_figures, write_report
from mechguard.responses import default_conditions
from mechguard.result import Result
from mechguard.separability import measure_separability, select_layers
from mechguard.storage import hold_folder, parsing, read_json, versions, write_json
from mechguard.sweeps import SETTING, VARIANTS, choose, layer_sets, make_guard, sweep
from mechguard.tracing import collect
from mechguard.transfer import measure_angles, measure_transfer

ALPHAS = (-1.0, 1.0, 2.0)
ROLES = ("anchors", "validation", "malicious", "benign")
SHOWN = 6  # prompts of each label that are read token by token
# Test sets beside malicious and benign prompts -> the names they are looked for under.
TEST_SETS = {
    "jailbreak": ("jailbreak", "jailbreak_instructions"),
    "typographic": ("typographic", "figstep"),
    "questions": ("questions",),
}
ONLY_WITH_PICTURE = ("typographic", "questions")
T = TypeVar("T", Activations, Directions, Guard, Result)


@dataclass(frozen=True)
class StudyPrompts:
    """What a study asks: pairs to fit on, prompts to choose on, prompts to report on."""

    anchors: Prompts
    validation: Prompts
    malicious: Prompts
    benign: Prompts

    @property
    def test(self) -> Prompts:
        return (self.malicious + self.benign).renamed("test")

    @property
    def kept_apart(self) -> list[tuple[Prompts, Prompts]]:
        """The sets that must share no prompt: fitted on, chosen on, reported on."""
        return [
            (self.anchors, self.validation),
            (self.anchors, self.test),
            (self.validation, self.test),
        ]


@dataclass(frozen=True)
class Settings:
    """What determines the numbers of a study, beside the model and the prompts."""

    max_rank: int = 8
    seed: int = 0
    limit: int | None = None
    sweep_limit: int = 25
    random_subspaces: int = 2
    max_new_tokens: int = 48
    alphas: tuple[float, ...] = ALPHAS


@dataclass
class Study:
    """One study in one folder."""

    vlm: VLM
    prompts: StudyPrompts
    settings: Settings
    out: Path
    progress: bool = True
    with_circuits: bool = False
    sources: dict[str, dict[str, str]] = field(default_factory=dict)

    @cached_property
    def conditions(self) -> list[str]:
        """text, blank, and another image: each prompt's own where all have one, else noise."""
        found = default_conditions(self.vlm, self.prompts.test)
        return found if "image" in found or "blank" not in found else [*found, "noise"]

    @property
    def image_conditions(self) -> list[str]:
        return [condition for condition in self.conditions if condition != "text"]

    @property
    def ranks(self) -> list[int]:
        """1, 2, 4, ... as far as the settings, the anchors and the model allow."""
        limit = min(self.settings.max_rank, len(self.prompts.anchors) // 2, self.vlm.d_model)
        return [2**power for power in range(limit.bit_length())]

    @cached_property
    def ssd(self) -> Directions:
        """The safety steering directions of the LLM component, fitted on the anchors."""
        return self._kept(
            Directions,
            "directions/ssd",
            lambda: fit_directions(self.states("anchors", "llm"), method="svd", rank=max(self.ranks)),
        )

    @property
    def _test_views(self) -> list[tuple[str, str, str]]:
        return [("test", "llm", "text"), *[("test", "vlm", condition) for condition in self.conditions]]

    @property
    def _anchor_views(self) -> list[tuple[str, str, str]]:
        pictures = [name for name in self.image_conditions if name != "image"][:1]
        return [("anchors", "llm", "text"), *[("anchors", "vlm", name) for name in ("text", *pictures)]]

    def states(self, role: str, view: str, condition: str = "text") -> Activations:
        """Last-token states of one set of prompts, by the LLM component or the full VLM."""
        model = self.vlm.llm if view == "llm" else self.vlm
        prompts: Prompts = getattr(self.prompts, role)
        return self._kept(
            Activations,
            f"activations/{role}-{view}-{condition}",
            lambda: collect(model, prompts.with_image(condition), progress=self.progress),
        )

    def test_states(self) -> list[Activations]:
        """The test prompts as the LLM and as the VLM see them, under every condition."""
        return [self.states(*view) for view in self._test_views]

    def separability(self) -> Result:
        """On validation with the first image condition (to choose layers), and on test with all."""

        def measure() -> Result:
            seed = self.settings.seed
            chosen_on = self.states("validation", "vlm", self.conditions[-1])
            result = measure_separability(chosen_on, self.ssd, seed=seed, split="validation")
            for activations in self.test_states():
                result = result + measure_separability(activations, self.ssd, seed=seed, split="test")
            return result

        return self._kept(Result, "results/separability", measure)

    def modality_gap(self) -> Result:
        """From the LLM's text states to the VLM's under every condition; text to text must be zero."""

        def measure() -> Result:
            text, *others = self.test_states()
            seed = self.settings.seed
            results = [measure_modality_gap(text, other, directions=self.ssd, seed=seed) for other in others]
            return sum(results[1:], results[0])

        return self._kept(Result, "results/modality_gap", measure)

    def gates(self) -> Result:
        return self._kept(Result, "results/gates", lambda: measure_gates(self.ssd, self.test_states()))

    def gate_curves(self) -> Result:
        def measure() -> Result:
            return measure_gate_curves(self.ssd, self.test_states())

        return self._kept(Result, "results/gate_curves", measure)

    def anchor_states(self) -> list[Activations]:
        """The anchors as the LLM sees them, and the VLM without and with a generated picture."""
        return [self.states(*view) for view in self._anchor_views]

    def transfer(self) -> Result:
        """Directions of the anchors under each view, tested on the test prompts under each condition."""

        def measure() -> Result:
            fitted = [fit_directions(activations, method="svd") for activations in self.anchor_states()]
            return measure_transfer(self.test_states(), fitted, seed=self.settings.seed)

        return self._kept(Result, "results/transfer", measure)

    def angles(self) -> Result:
        """Between the subspaces of the anchors' views."""

        def measure() -> Result:
            rank = min(4, max(self.ranks))
            return measure_angles(self.anchor_states(), rank=rank, seed=self.settings.seed)

        return self._kept(Result, "results/angles", measure)

    def map(self) -> Result:
        return self._kept(Result, "results/states", lambda: map_states(self.test_states()))

    def projections(self) -> Result:
        return self._kept(Result, "results/projections", lambda: project_states(self.ssd, self.test_states()))

    def tokens(self) -> Result:
        """A few test prompts, evenly spread, token by token under every condition."""

        def measure() -> Result:
            few = _spread(self.prompts.malicious) + _spread(self.prompts.benign)
            sent = [few.with_image(condition) for condition in self.conditions]
            return project_tokens(self.vlm, sum(sent[1:], sent[0]), self.ssd)

        return self._kept(Result, "results/tokens", measure)

    def sweep(self) -> Result:
        """On validation: every reading of VLM-Guard by layers and strength, then the best one by rank."""

        def measure() -> Result:
            validation = self.separability().where(split="validation")
            layers = layer_sets(validation, self.vlm.n_layers)
            with sharing_prompts(self.vlm), keeping_answers(self.vlm):
                first = self._swept(layers=layers, alphas=self.settings.alphas)
                best = choose(first)
                by_rank = self._swept(
                    layers=[best["layers"]],
                    alphas=[best["alpha"]],
                    ranks=self.ranks[1:],
                    variants={best["variant"]: VARIANTS[best["variant"]]},
                )
            return first + by_rank.where(guard="vlm_guard")

        return self._kept(Result, "results/sweep", measure, shared=True)

    def _swept(self, **grid: Any) -> Result:
        return sweep(
            self.vlm,
            self.prompts.validation.first(self.settings.sweep_limit),
            self.ssd,
            conditions=self.image_conditions or ["text"],
            max_new_tokens=self.settings.max_new_tokens,
            out=self.out / "results" / "sweep.jsonl",
            progress=self.progress,
            **grid,
        )

    def guard(self) -> Guard:
        """VLM-Guard in the setting that the sweep chose."""
        return self._kept(Guard, "guards/vlm_guard", lambda: make_guard(self.ssd, **self._setting()))

    def behaviour(self) -> Result:
        """Unguarded, projection alone, VLM-Guard, and VLM-Guard with random subspaces, on test."""

        def measure() -> Result:
            guard = self.guard()
            plain = projection(self.ssd.truncated(self._setting()["rank"]), layers=guard.layers)
            controls = [
                guard.randomised(self.settings.seed + number, name=f"random {number + 1}")
                for number in range(self.settings.random_subspaces)
            ]
            if find_processes().leads:
                for saved in (plain, *controls):
                    saved.save(self.out / "guards" / saved.name.replace(" ", "_"))
            return evaluate(
                self.vlm,
                self.prompts.test,
                guards=[None, plain, guard, *controls],
                conditions=self.conditions,
                max_new_tokens=self.settings.max_new_tokens,
                responses=self.out / "responses.jsonl",
                progress=self.progress,
            )

        return self._kept(Result, "results/behaviour", measure, shared=True)

    def circuits(self) -> dict[str, Result]:
        """Which components write the SSD and what the first image condition does to them."""
        validation = self.separability().where(split="validation")
        section = Section(
            self.vlm,
            self.ssd,
            select_layers(validation, k=1)[0],
            self.prompts.validation,
            self.prompts.test,
            image=self.image_conditions[0],
            guard=self.guard(),
            seed=self.settings.seed,
            progress=self.progress,
        )
        return section.run(lambda name, make: self._kept(Result, f"results/circuits_{name}", make))

    def run(self, command: str) -> Path:
        """Make every product that is not there yet, then the figures and the report."""
        started = time.monotonic()
        with tqdm(self._steps(), unit="step", disable=not self.progress) as bar:
            for name, pieces in bar:
                bar.set_description(name)
                self._deal(pieces)
        self._deal([lambda: self._describe(command, time.monotonic() - started)])
        if self.with_circuits:
            self._deal([lambda: write_report(self.out)])  # before a decision that is not found stops it
            self._deal([self.circuits])
            self._deal([lambda: self._describe(command, time.monotonic() - started)])
        self._deal([self._report, self._figures])
        return self.out / "report.html"

    def _steps(self) -> list[tuple[str, list[Callable[[], Any]] | Callable[[], Any]]]:
        """What is made, step after step: pieces that need nothing of each other, or a whole."""
        measures = [
            self.separability,
            self.modality_gap,
            self.angles,
            self.transfer,
            self.map,
            self.tokens,
            self.projections,
            self.gate_curves,
            self.gates,
        ]
        validation = ("validation", "vlm", self.conditions[-1])
        views = [*self._test_views, *self._anchor_views, validation]
        return [
            ("hidden states", [partial(self.states, *view) for view in views]),
            ("directions", lambda: self.ssd),
            ("separability, gap, transfer, maps, gates", measures),
            ("sweep on validation", self.sweep),
            ("behaviour on test", self.behaviour),
        ]

    def _deal(self, pieces: list[Callable[[], Any]] | Callable[[], Any]) -> None:
        """Each piece is made by one of the processes; a whole shares its work by itself."""
        if callable(pieces):
            pieces()
            return
        processes = find_processes()
        with processes.together(), alone():
            for piece in processes.own(pieces):
                piece()

    @cached_property
    def _finished(self) -> StudyFolder:
        return StudyFolder.read(self.out)

    def _report(self) -> None:
        write_report(self._finished)

    def _figures(self) -> None:
        write_figures(self._finished)

    def _setting(self) -> dict[str, Any]:
        chosen = choose(self.sweep())
        return {key: chosen[key] for key in SETTING}

    def _describe(self, command: str, seconds: float) -> None:
        guard = self.guard()
        chosen = choose(self.sweep())
        chosen |= {
            "gate": "always" if guard.gate is None else guard.gate.word,
            "project": VARIANTS[chosen["variant"]].project,
        }
        facts = {
            "model": self.vlm.name,
            "family": self.vlm.family,
            "n_layers": self.vlm.n_layers,
            "d_model": self.vlm.d_model,
            "command": command,
            "conditions": self.conditions,
            "chosen": {**chosen, "source": guard.source, "phase": guard.scope.phase},
            "prompts": {role: len(getattr(self.prompts, role)) for role in ROLES},
            "skipped": {role: list(getattr(self.prompts, role).skipped) for role in ROLES},
            "sources": self.sources,
            "settings": asdict(self.settings),
            "seed": self.settings.seed,
            "seconds": round(seconds, 1),
            "versions": versions(),
        }
        write_json(self.out / "study.json", facts)

    def _kept(self, kind: type[T], name: str, make: Callable[[], T], *, shared: bool = False) -> T:
        """A product of the study: read if it was made before, else made and saved.

        Args:
            shared: all processes make it together; else the first one does, for all.
        """
        path, processes = self.out / name, find_processes()
        there = path.with_name(path.name + ".json").is_file()
        processes.agree()  # all have looked before any of them writes
        with processes.together():
            if not there and (shared or processes.leads):
                with nullcontext() if shared else alone():
                    product = make()
                if processes.leads:
                    product.save(path)
                    return product
        return kind.load(path)


def run_study(
    model: Any,
    *,
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    processor: Any = None,
    max_rank: int = 8,
    seed: int = 0,
    limit: int | None = None,
    max_new_tokens: int = 48,
    circuits: bool = False,
    skip_unreadable: bool = False,
    progress: bool = True,
    command: str | None = None,
) -> Path:
    """Study a model from its hidden states to a guard, and write a report.

    Several processes (`torchrun`) share the work and leave the files of one.

    Args:
        model: whatever `load` takes, or a loaded VLM.
        out: the study's folder; a study that was interrupted there goes on.
        data: a folder with the sets anchors, validation, malicious and benign, as files of those names or
            as public benchmarks; by default the organism's own, for other models MECHGUARD_DATA.
        max_rank: the most safety steering directions per layer that are tried.
        limit: at most so many prompts (pairs, for paired sets) of each set; all by default.
        circuits: also find which components write the safety direction; adds a section to the report.
        skip_unreadable: leave out prompts whose picture cannot be read; study.json lists them.
        command: what the report should print as the way to reproduce it.

    Returns:
        The path of report.html.

    Raises:
        MechguardError: the model or the prompts cannot be read (nothing is written then), or the folder
            holds a study with other settings.

    Warns:
        OverlapWarning: what is fitted or chosen on is also tested on.
    """
    _check_settings(max_rank=max_rank, max_new_tokens=max_new_tokens, limit=limit)
    vlm = model if isinstance(model, VLM) else load(model, processor=processor)
    if circuits and not vlm.takes_images:
        raise MechguardError(
            f"{vlm.name} takes no pictures, so there is nothing for circuits to compare text with"
        )
    prompts = load_study_prompts(find_data_folder(vlm, data), limit, skip_unreadable=skip_unreadable)
    prompts.anchors.pair_indices()  # refuses anchors without pairs before anything is written
    settings = Settings(max_rank=max_rank, seed=seed, limit=limit, max_new_tokens=max_new_tokens)
    folder = Path(out)
    sources = {role: describe_source(role, find_data_folder(vlm, data)) for role in ROLES}
    processes = find_processes()
    shown = progress and processes.leads
    study = Study(vlm, prompts, settings, folder, shown, circuits, sources)
    with processes.hold(hold_folder(folder)), warnings.catch_warnings():
        with processes.together():
            if processes.leads:
                _claim(folder, vlm, prompts, settings)
                warn_of_shared(prompts.kept_apart)
        warnings.simplefilter("ignore", OverlapWarning)  # it has been said, once
        flag = " --circuits" if circuits else ""
        said = command or f"mechguard study {shlex.quote(vlm.name)} --out {folder}{flag}"
        return study.run(said)


def _check_settings(*, max_rank: int, max_new_tokens: int, limit: int | None) -> None:
    least = {"max_rank": 1, "max_new_tokens": 1, "limit": 4}
    given = {"max_rank": max_rank, "max_new_tokens": max_new_tokens, "limit": limit}
    for name, value in given.items():
        if value is not None and value < least[name]:
            raise MechguardError(f"{name}={value} is too small for a study; use {least[name]} or more")


def load_study_prompts(
    folder: Path, limit: int | None = None, *, skip_unreadable: bool = False
) -> StudyPrompts:
    """The four sets of a study from a folder.

    Raises:
        MechguardError: a set is missing, or holds only one label where both are needed, or a picture cannot
            be read.
    """
    found = {role: load_from_folder(role, folder) for role in ROLES}
    check = skip_unreadable_pictures if skip_unreadable else Prompts.check_pictures
    found = {role: check(prompts).first(limit) for role, prompts in found.items()}
    for role, label in (("malicious", "harmful"), ("benign", "harmless")):
        wrong = sum(prompt.label != label for prompt in found[role])
        if wrong:
            raise MechguardError(
                f"{wrong} of {len(found[role])} prompts of the set {role!r} are not {label}; fill the "
                "column `label`"
            )
    labels = set(found["validation"].labels)
    if len(labels) != 2:
        raise MechguardError(
            f"the set 'validation' holds only {labels.pop()} prompts; both labels are needed to choose on"
        )
    return StudyPrompts(**found)


def find_study_prompts(
    vlm: VLM,
    data: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    *,
    skip_unreadable: bool = False,
) -> StudyPrompts:
    """The sets of a study: those of the folder, of MECHGUARD_DATA, or the organism's own.

    Raises:
        MechguardError: no folder, or a set is missing or not what its role wants.
    """
    return load_study_prompts(find_data_folder(vlm, data), limit, skip_unreadable=skip_unreadable)


def find_test_sets(
    vlm: VLM, data: str | os.PathLike[str] | None = None, *, skip_unreadable: bool = False
) -> dict[str, Prompts]:
    """The test sets beside those of a study, where there are some: jailbreak, typographic, questions."""
    found = {}
    for role, names in TEST_SETS.items():
        for name in names:
            with suppress(MechguardError):
                prompts = load_from_folder(name, find_data_folder(vlm, data)).renamed(role)
                found[role] = skip_unreadable_pictures(prompts) if skip_unreadable else prompts
                break
    return found


def find_data_folder(vlm: VLM, data: str | os.PathLike[str] | None) -> Path:
    """Where the prompts of a study are: the given folder, the organism's own, or MECHGUARD_DATA.

    Raises:
        MechguardError: none of them.
    """
    if data is not None:
        return Path(data)
    if vlm.name.split(":")[0] == "organism":
        return packaged_folder("organism")
    if "MECHGUARD_DATA" in os.environ:
        return Path(os.environ["MECHGUARD_DATA"])
    raise MechguardError(
        f"a study of {vlm.name} needs prompts; give --data FOLDER with anchors, validation, malicious and "
        "benign (files of those names, or the public benchmarks), or set MECHGUARD_DATA"
    )


def _spread(prompts: Prompts) -> Prompts:
    """A few prompts, evenly over the set in its order."""
    return prompts[:: max(1, len(prompts) // SHOWN)][:SHOWN]


def _claim(folder: Path, vlm: VLM, prompts: StudyPrompts, settings: Settings) -> None:
    """Write what determines the study's numbers, or refuse a folder that was made with something else."""
    wanted = {
        "model": vlm.name,
        "fingerprint": vlm.fingerprint,
        "settings": {**asdict(settings), "alphas": list(settings.alphas)},
        "prompts": {role: getattr(prompts, role).fingerprint for role in ROLES},
    }
    file = folder / "settings.json"
    if file.is_file():
        with parsing(file, "what a study belongs to"):
            found = dict(read_json(file))
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            raise MechguardError(
                f"{folder} holds a study with another {', '.join(differing)}; give another --out, or "
                "delete that folder"
            )
        return
    write_json(file, wanted)
