"""The paper's protocol as one run: settings x conditions x guards, the same prompts paired across all.

    choose settings on validation -> answer everything (stored as it comes) -> judge -> quality -> tables

Three settings of malicious instructions (MaliciousInstruct; jailbreak templates; MM-Harmful Bench), benign
sets for over-refusal, and visual questions where there are some; for the organism its own counterparts. A
run is a folder; one that was killed goes on where it stopped and ends in the same tables. Judging reads the
stored responses and can be repeated with other judges without a model (`judging.judge_run`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from mechguard.comparison import METHODS, Comparison, Method
from mechguard.datasets import load_from_folder, skip_unreadable_pictures
from mechguard.errors import MechguardError
from mechguard.guards.steering import AnyGuard
from mechguard.judges import REFUSAL_OPENINGS, AnyJudge
from mechguard.judging import RESPONSES, judge_run
from mechguard.models import VLM
from mechguard.prompts import Label, Prompts
from mechguard.quality import measure_perplexity, measure_quality
from mechguard.responses import gather_responses
from mechguard.result import Result
from mechguard.storage import file_name, hold_folder, parsing, read_json, versions, write_json
from mechguard.study import find_data_folder

# A white picture is the blank one; it is answered once.
CONDITIONS = ("text", "blank", "grey", "black", "noise", "image", "typographic")
# The organism's alphabet has no words for a typographic attack, but for a set of its own.
ORGANISM_CONDITIONS = CONDITIONS[:-1]
GUARDS = (
    "vlm_guard, stream",
    "vlm_guard, at the prompt",
    "vlm_guard, reading A",
    "projection",
    "self_reminder",
    "goal_priority",
)
ALPHAS = (1.0, 2.0)  # strengths that are tried on validation
JUDGES = ("refusal", "arditi", "qi", "coherence")
PERPLEXITIES = "perplexities.jsonl"


@dataclass(frozen=True)
class Setting:
    """A set of prompts in the protocol.

    Attributes:
        sources: names of sets or files in the data folder, best first.
        label: the only label that is kept; None keeps both.
        conditions: the image conditions that mean something for it.
        needed: whether a run without it is refused.
    """

    sources: tuple[str, ...]
    label: Label | None
    conditions: tuple[str, ...] = CONDITIONS
    needed: bool = False


ABOUT_A_PICTURE = ("text", "blank", "image")  # its request is whole only beside its own picture
SETTINGS: dict[str, Setting] = {
    "malicious": Setting(("malicious_instruct", "malicious"), "harmful", needed=True),
    "jailbreak": Setting(("jailbreak_instructions", "jailbreak"), "harmful"),
    "multimodal": Setting(("mm_harmful_bench", "typographic"), "harmful", ABOUT_A_PICTURE),
    "benign": Setting(("benign",), "harmless", needed=True),
    "over_refusal": Setting(("xstest",), "harmless"),
    "benign_multimodal": Setting(("llava_bench_coco", "typographic"), "harmless", ABOUT_A_PICTURE),
    "questions": Setting(("questions",), "harmless", ("image",)),
}


@dataclass(frozen=True)
class Options:
    """What determines the numbers of a run, beside the model and the prompts.

    Attributes:
        guards: names in `comparison.METHODS`.
        conditions: image conditions, as far as a setting has them.
        limit: at most so many prompts of each setting.
        validation_limit: at most so many validation prompts of each label.
        controls: random directions beside every guard that acts along some.
        max_new_tokens: tokens per answer.
        seed: fixes every random choice.
    """

    guards: tuple[str, ...] = GUARDS
    conditions: tuple[str, ...] = CONDITIONS
    limit: int | None = 100
    validation_limit: int = 25
    controls: int = 1
    max_new_tokens: int = 48
    seed: int = 0


@dataclass
class Protocol:
    """One run in one folder.

    Attributes:
        vlm: the model.
        anchors: pairs that guards are fitted on.
        validation: prompts that their settings are chosen on.
        settings: prompts that are reported, by setting.
        out: the folder.
        options: see `Options`.
        reference: whose language model gives perplexities; the model's own by default.
    """

    vlm: VLM
    anchors: Prompts
    validation: Prompts
    settings: Mapping[str, Prompts]
    out: Path
    options: Options
    reference: VLM | None = None
    progress: bool = True

    @cached_property
    def comparison(self) -> Comparison:
        """How guards are fitted and chosen."""
        return Comparison(
            self.vlm,
            self.anchors,
            self.validation,
            {},
            self.out / "choosing",
            methods={name: _with_alphas(METHODS[name]) for name in self.options.guards},
            conditions=("text", "blank") if self.vlm.takes_images else ("text",),
            limit=self.options.validation_limit,
            seed=self.options.seed,
            max_new_tokens=self.options.max_new_tokens,
            progress=self.progress,
        )

    def conditions(self, name: str) -> list[str]:
        """The image conditions of one setting."""
        words = [word for word in SETTINGS[name].conditions if word in self.options.conditions]
        if not self.vlm.takes_images:
            return [word for word in words if word == "text"]
        owned = all(prompt.own_image is not None for prompt in self.settings[name])
        return [word for word in words if word != "image" or owned]

    def guards(self) -> list[AnyGuard | None]:
        """No guard, then each in its chosen setting, beside its controls; also saved in the folder."""
        self.comparison.claim()
        chosen = self.comparison.choose()
        found = self.comparison.guards(chosen, controls=self.options.controls, shuffled=False)
        for name, _, guard in found:
            if guard is not None:
                guard.save(self.out / "guards" / file_name(name))
        write_json(self.out / "chosen.json", chosen)
        return [guard for _, _, guard in found]

    def answer(self) -> pd.DataFrame:
        """Every response: setting x condition x guard x prompt."""
        guards = self.guards()
        tables = []
        for name in tqdm(self.settings, desc="settings", disable=not self.progress):
            if conditions := self.conditions(name):
                table = gather_responses(
                    self.vlm,
                    self.settings[name].renamed(name),
                    guards=guards,
                    conditions=conditions,
                    max_new_tokens=self.options.max_new_tokens,
                    first_token=True,
                    refusal_openings=REFUSAL_OPENINGS,
                    out=self.out / RESPONSES,
                    progress=self.progress,
                )
                tables.append(table)
        return pd.concat(tables, ignore_index=True)

    def run(self, judges: Sequence[AnyJudge]) -> Result:
        """Answer, judge, measure quality; the tables are written to `results/`."""
        with hold_folder(self.out):
            return self._run(judges)

    def _run(self, judges: Sequence[AnyJudge]) -> Result:
        self._claim()
        responses = self.answer()
        table = judge_run(self.out, judges, progress=self.progress)
        reference = self.reference or self.vlm
        nll = measure_perplexity(reference, responses, out=self.out / PERPLEXITIES, progress=self.progress)
        quality = measure_quality(
            responses.merge(nll, on="key"),
            model=self.vlm.name,
            fingerprint=self.vlm.fingerprint,
            reference=reference.name,
            seed=self.options.seed,
        )
        quality.save(self.out / "results" / "quality")
        _measure_costs(responses).save(self.out / "costs")
        return table

    def _claim(self) -> None:
        """Bind the folder to this model, these prompts and options.

        Raises:
            MechguardError: it holds another run.
        """
        sets = {"anchors": self.anchors, "validation": self.validation, **self.settings}
        facts: dict[str, Any] = {
            "model": self.vlm.name,
            "fingerprint": self.vlm.fingerprint,
            "reference": None if self.reference is None else self.reference.fingerprint,
            "prompts": {name: [len(prompts), prompts.fingerprint] for name, prompts in sets.items()},
            "conditions": {name: self.conditions(name) for name in self.settings},
            "skipped": {name: list(one.skipped) for name, one in sets.items() if one.skipped},
            "missing": [name for name in SETTINGS if name not in self.settings],
            "options": {key: _as_json(value) for key, value in asdict(self.options).items()},
        }
        place = self.out / "protocol.json"
        if place.is_file():
            with parsing(place, "what a run belongs to"):
                found = dict(read_json(place))
            if differing := [key for key in facts if found.get(key) != facts[key]]:
                raise MechguardError(
                    f"{self.out} holds a run with another {', '.join(differing)}; give another folder"
                )
            return
        self.out.mkdir(parents=True, exist_ok=True)
        if self.vlm.folder is not None and (self.vlm.folder / "judge.json").is_file():
            shutil.copyfile(self.vlm.folder / "judge.json", self.out / "judge.json")
        write_json(place, {**facts, "versions": versions()})


def run_protocol(
    model: VLM,
    *,
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    judges: Sequence[AnyJudge] = JUDGES,
    reference: VLM | None = None,
    options: Options | None = None,
    skip_unreadable: bool = False,
    progress: bool = True,
) -> Result:
    """Run the protocol of the paper, or go on with it.

    Args:
        model: the model to evaluate.
        out: the run's folder.
        data: where the sets are: public benchmarks, or files of the names in `SETTINGS`, beside `anchors` and
            `validation`. The organism's own by default, for other models MECHGUARD_DATA.
        judges: the first one's table is `results/behaviour`; see `judge_run`.
        reference: whose language model gives perplexities; the model's own by default.
        options: see `Options`.
        skip_unreadable: leave out prompts whose picture cannot be read; protocol.json lists them.

    Returns:
        Rows setting x condition x guard x metric x judge.

    Raises:
        MechguardError: sets are missing, or the folder holds another run.
    """
    torch.manual_seed((options or Options()).seed)
    folder = find_data_folder(model, data)
    chosen = options or default_options(model)
    if unknown := sorted(set(chosen.guards) - set(METHODS)):
        raise MechguardError(f"guard {unknown[0]!r} is not known; use some of {', '.join(METHODS)}")
    protocol = Protocol(
        model,
        load_from_folder("anchors", folder),
        load_from_folder("validation", folder),
        load_settings(folder, chosen.limit, skip_unreadable=skip_unreadable),
        Path(out),
        chosen,
        reference,
        progress,
    )
    return protocol.run(judges)


def default_options(model: VLM) -> Options:
    """`Options` for a model; for the organism half as many prompts, under conditions it has words for."""
    if model.name.split(":")[0] == "organism":
        return Options(conditions=ORGANISM_CONDITIONS, limit=50)
    return Options()


def load_settings(
    folder: Path, limit: int | None = None, *, skip_unreadable: bool = False
) -> dict[str, Prompts]:
    """The settings that a data folder has.

    Raises:
        MechguardError: a needed one is missing, or a picture cannot be read.
    """
    found = {}
    for name, setting in SETTINGS.items():
        prompts = _first_found(setting, folder)
        if prompts is not None and setting.label is not None:
            prompts = prompts.with_label(setting.label)
        if prompts:
            check = skip_unreadable_pictures if skip_unreadable else Prompts.check_pictures
            prompts = check(prompts)
        if prompts:
            found[name] = prompts.first(limit).renamed(name)
        elif setting.needed:
            load_from_folder(setting.sources[-1], folder)  # says what is wanted
            raise MechguardError(f"{folder} holds no {setting.label} prompts for the setting {name!r}")
    return found


def _first_found(setting: Setting, folder: Path) -> Prompts | None:
    for source in setting.sources:
        with contextlib.suppress(MechguardError):
            return load_from_folder(source, folder)
    return None


def _with_alphas(method: Method) -> Method:
    """The method with the strengths that the protocol tries, for those that have a strength."""
    return replace(method, alphas=ALPHAS) if len(method.alphas) > 1 else method


def _measure_costs(responses: pd.DataFrame) -> Result:
    """Tokens and seconds per response; the only table that differs between two runs."""
    cells = responses.groupby(["setting", "condition", "guard"], sort=False)[["tokens", "seconds"]].mean()
    return Result(cells.reset_index(), {})


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return None if isinstance(value, float) and value != value else value
