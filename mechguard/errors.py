"""The errors a user can cause. Each says what was found, what was wanted and what to try."""

from __future__ import annotations


class MechguardError(ValueError):
    """A mistake in what was asked, not in the program: one sentence, exit code 2 on the command line."""


class DiskError(MechguardError, OSError):
    """A file could not be written: the disk is full, or the place is not ours to write to."""


class PictureError(MechguardError):
    """A picture file is missing, or is not a picture."""


class OtherProcessError(MechguardError):
    """Another process of the same run failed, and says itself why."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for one sentence about it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
