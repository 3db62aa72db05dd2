"""Where a loop stands between its checks, and how long it waits for a better state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Patience", "Standing"]

# Not measured; chosen by hand.
_PATIENCE = (
    500,
    0.25,
)  # steps without a lower held-out loss, and share of the whole way: a rate that falls brings gains late


class Patience(NamedTuple):
    """How long a fit goes on without improvement: so many checks, and so much of the whole way."""

    checks: int
    share: float

    @classmethod
    def of(cls, checks: int | None, every: int, held_out: bool) -> Patience | None:
        """What was asked for; otherwise the usual where data are held out, and none where they are not."""
        if checks is not None:
            return cls(checks, 0.0)
        return cls(-(-_PATIENCE[0] // every), _PATIENCE[1]) if held_out else None


@dataclass
class Standing:
    """Where a loop stands, beside its history: its round, what the checks of that round found, and steps that were lost.

    Attributes:
        round, round_began: the round's index and first step.
        round_best, previous_best: the lowest score in the round, and in the one before.
        stale: checks in a row without improvement.
        stale_from: share of the whole way at the last improvement.
        lost: steps in a row that were not finite.
        halved: times that the rate was halved.
        checked_at: the step of the last check.
        lowest: the lowest score of all checks; the state that is kept may be a later one, within the noise.
    """

    round: int = 0
    round_began: int = 0
    round_best: float = math.inf
    previous_best: float = math.inf
    stale: int = 0
    stale_from: float = 0.0
    lost: int = 0
    halved: int = 0
    checked_at: int = 0
    lowest: float = math.inf
