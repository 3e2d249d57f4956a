"""What is known of something that others publish: what it is, where its files may lie, whom to thank.

A path counts from the data folder or from any folder in it; its first part may be that folder's own name.
So a collection of benchmarks, a folder of checkouts and a single checkout all serve. Of several paths the
first that is there is read. A path with * stands for several files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mechguard.datasets.readers import PICTURES, Files, Reader, warn_of_flaws
from mechguard.prompts import Prompts

NOT_STATED = "no licence stated"


@dataclass(frozen=True)
class Origin:
    """Where something comes from.

    Attributes:
        licence: of the data, as its authors state it.
        source: where to get it.
        citation: whom to cite.
    """

    licence: str
    source: str
    citation: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files that others publish.

    Attributes:
        name: what a user types.
        what: one phrase.
        files: what a file is for -> the paths where it may lie, best first. Pictures may be missing.
    """

    name: str
    what: str
    files: Mapping[str, tuple[str, ...]]
    origin: Origin

    def locate(self, folder: Path) -> Files | None:
        """Where its files lie in a data folder; None where a needed one is missing.

        The needed files come from one folder; pictures may lie beside it, as in a checkout of their own.
        """
        roots = [folder, *sorted(child for child in folder.iterdir() if child.is_dir())]
        for root in roots:
            found = {part: _first(root, paths) for part, paths in self.files.items()}
            if all(paths for part, paths in found.items() if part != PICTURES):
                places = self.files.get(PICTURES, ())
                pictures = (_first(place, places) for place in (root, *roots))
                return found | {PICTURES: next(filter(None, pictures), [])}
        return None

    @property
    def wanted(self) -> str:
        """The paths it needs, in words."""
        needed = [" or ".join(paths) for part, paths in self.files.items() if part != PICTURES]
        return ", and ".join(needed)


@dataclass(frozen=True, kw_only=True)
class Benchmark(Source):
    """A public set of prompts.

    Attributes:
        read: from the name and the files to prompts.
        roles: the roles of a study that it can play -> how many of its prompts then, None for all.
    """

    read: Reader
    roles: Mapping[str, int | None] = field(default_factory=dict)

    def load(self, files: Files) -> Prompts:
        """The prompts in the files that `locate` found; warns of missing pictures and repeated rows."""
        prompts = self.read(self.name, files)
        looked_in = " or ".join(self.files[PICTURES]) if PICTURES in self.files else None
        warn_of_flaws(self.name, prompts, pictures_from=looked_in)
        return Prompts(prompts, name=self.name)


def _first(root: Path, paths: tuple[str, ...]) -> list[Path]:
    for path in paths:
        own, _, rest = path.partition("/")
        for pattern in (path, rest if own == root.resolve().name else path):
            if found := sorted(root.glob(pattern)):
                return found
    return []
