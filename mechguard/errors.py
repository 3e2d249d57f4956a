"""The errors a user can cause. Each says what was found, what was wanted and what to try."""

from __future__ import annotations


class MechguardError(ValueError):
    """A mistake in what was asked, not in the program: one sentence, exit code 2 on the command line."""
