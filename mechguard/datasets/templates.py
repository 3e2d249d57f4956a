"""Jailbreak templates, brought to the form with `{query}` that `Prompts.with_template` takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from mechguard.datasets.files import Row
from mechguard.datasets.readers import Files, Table, find_rows
from mechguard.datasets.records import NOT_STATED, Origin, Source
from mechguard.prompts import Prompt, Prompts

PLACEHOLDER = re.compile(r"\[INSERT PROMPT HERE\]", re.IGNORECASE)
FAMILIES = 5  # of the jailbreak setting of VLM-Guard: 5 templates x 20 questions


@dataclass(frozen=True, kw_only=True)
class TemplateSet(Source):
    """A public set of jailbreak templates.

    Attributes:
        text: the column of the template.
    """

    text: str = "text"

    def load(self, files: Files) -> list[tuple[str, str]]:
        """(family, template) in the order of the file; the family is "" where there is none.

        Templates that want the request in a code (base64, rot13, ...) are left out: `{query}` cannot say so.
        """
        rows = [row for row in find_rows(files["templates"]) if not _wants_code(row)]
        return [(row.get("key") or "", as_template(row[self.text])) for row in rows]


def as_template(text: str) -> str:
    """A template with `{query}` for upstream's placeholder, or behind its text where it has none."""
    marked = PLACEHOLDER.sub("{query}", text)
    return marked if "{query}" in marked else f"{marked}\n\n{{query}}"


def apply_templates(questions: Prompts, templates: Mapping[str, str] | Iterable[str]) -> Prompts:
    """Every question in every template, template by template.

    Args:
        questions: what is asked; labels and pictures stay.
        templates: with `{query}`, by name or numbered from 1. The name becomes the category.
    """
    named = templates if isinstance(templates, Mapping) else dict(_numbered(templates))
    filled = [
        replace(prompt, id=f"{prompt.id}-{name}", category=name, pair=_pair(prompt, name))
        for name, template in named.items()
        for prompt in questions.with_template(template)
    ]
    return Prompts(filled, name=questions.name)


def read_jailbreaks(name: str, files: Files) -> list[Prompt]:
    """The first template of each of the first five families, each with all questions.

    5 templates x 20 questions is the size of VLM-Guard's setting; which five its authors took is not known.
    """
    first: dict[str, str] = {}
    for family, template in TEMPLATES["goal_priority"].load(files):
        first.setdefault(family, template)
    chosen = dict(list(first.items())[:FAMILIES])
    return list(apply_templates(Prompts(Table("question")(name, files)), chosen))


def _wants_code(row: Row) -> bool:
    return any(row.values.get(flag) for flag in ("base64", "replace"))


def _numbered(templates: Iterable[str]) -> list[tuple[str, str]]:
    several = [templates] if isinstance(templates, str) else list(templates)
    return [(f"template {number}", template) for number, template in enumerate(several, start=1)]


def _pair(prompt: Prompt, name: str) -> str | None:
    return None if prompt.pair is None else f"{prompt.pair}-{name}"


GPTFUZZ = Origin(
    licence="MIT",
    source="https://github.com/sherdencooper/GPTFuzz",
    citation="Yu et al. 2023, arXiv 2309.10253",
)
SELF_REMINDER = Origin(
    licence="MIT",
    source="https://github.com/yjw1029/Self-Reminder-Data",
    citation="Xie et al. 2023, Nature Machine Intelligence 5, 1486-1496",
)
GOAL_PRIORITY = Origin(
    licence=NOT_STATED,
    source="https://github.com/thu-coai/JailbreakDefense_GoalPriority",
    citation="Zhang et al. 2023, arXiv 2311.09096",
)
GOAL_PRIORITY_TEMPLATES = (
    "jailbreak_templates/goalpriority_jailbreak_templates.json",
    "data/test/jailbreak_templates.json",
)


def _set(name: str, what: str, paths: tuple[str, ...], text: str, origin: Origin) -> TemplateSet:
    return TemplateSet(name=name, what=what, files={"templates": paths}, text=text, origin=origin)


TEMPLATES: dict[str, TemplateSet] = {
    record.name: record
    for record in (
        _set(
            "gptfuzzer",
            "hand-written jailbreaks from the web (GPTFuzzer's seeds)",
            ("jailbreak_templates/GPTFuzzer.csv", "datasets/prompts/GPTFuzzer.csv"),
            "text",
            GPTFUZZ,
        ),
        _set(
            "gptfuzzer_short",
            "the short seeds of GPTFuzzer",
            ("jailbreak_templates/seed_short_25.csv", "datasets/prompts/seed_short_25.csv"),
            "text",
            GPTFUZZ,
        ),
        _set(
            "self_reminder",
            "jailbreaks that Self-Reminder was tested on",
            ("jailbreak_templates/self_reminder_jailbreak_prompts.csv", "data/jailbreak_prompts.csv"),
            "prompt",
            SELF_REMINDER,
        ),
        _set(
            "self_reminder_itw",
            "jailbreaks in the wild that Self-Reminder was tested on",
            ("jailbreak_templates/self_reminder_jailbreak_prompts_itw.csv", "data/jailbreak_prompts_itw.csv"),
            "prompt",
            SELF_REMINDER,
        ),
        _set(
            "goal_priority",
            "jailbreaks of eight families that Goal Priority was tested on",
            GOAL_PRIORITY_TEMPLATES,
            "prompt",
            GOAL_PRIORITY,
        ),
    )
}
