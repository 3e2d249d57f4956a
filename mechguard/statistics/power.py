"""Power: how many prompts a difference of two rates needs."""

from __future__ import annotations

from math import ceil, sqrt

from scipy import stats

from mechguard.errors import MechguardError
from mechguard.statistics.intervals import LEVEL

POWER = 0.8


def count_prompts_needed(
    first: float,
    second: float,
    *,
    paired: bool = True,
    agreement: float = 0.0,
    power: float = POWER,
    level: float = LEVEL,
) -> int:
    """Prompts (per group, if not paired) for a two-sided test to see that two rates differ.

    Paired: McNemar's test by Connor 1987 from the shares of prompts that change either way. Unpaired: the
    two-proportion z test (Fleiss, Levin and Paik 2003, without continuity correction).

    Args:
        first: the rate before, a fraction.
        second: the rate after.
        paired: whether the same prompts are asked twice.
        agreement: if paired, the correlation (phi) of a prompt's two outcomes; 0, as if they were
            independent, asks for the most prompts.
        power: the chance of seeing the difference.

    Raises:
        MechguardError: a rate outside [0, 1], no difference, or a correlation these rates cannot have.
    """
    if not (0 <= first <= 1 and 0 <= second <= 1) or first == second:
        raise MechguardError(
            f"rates {first} and {second} were given; give two different rates between 0 and 1"
        )
    z_level, z_power = stats.norm.ppf((1 + level) / 2), stats.norm.ppf(power)
    difference = second - first
    if not paired:
        mean = (first + second) / 2
        spread = z_level * sqrt(2 * mean * (1 - mean))
        spread += z_power * sqrt(first * (1 - first) + second * (1 - second))
        return ceil((spread / difference) ** 2)
    both = first * second + agreement * sqrt(first * (1 - first) * second * (1 - second))
    changed = first + second - 2 * both
    if not max(0.0, first + second - 1) - 1e-12 <= both <= min(first, second) + 1e-12:
        raise MechguardError(
            f"outcomes with rates {first} and {second} cannot correlate with {agreement}; try one nearer to 0"
        )
    spread = z_level * sqrt(changed) + z_power * sqrt(max(changed - difference**2, 0.0))
    return ceil((spread / difference) ** 2)
