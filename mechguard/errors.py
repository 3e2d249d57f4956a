"""The errors a user can cause. Each says what was found, what was wanted and what to try."""

from __future__ import annotations


class MechguardError(ValueError):
    """A mistake in what was asked, not in the program: one sentence, exit code 2 on the command line."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for one sentence about it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
