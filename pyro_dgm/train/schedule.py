"""How long to train, and at which rate.

Without a limit, training goes in up to three rounds, of 300, 600 and 1,200 steps. A round warms up over 30 steps and follows a
cosine to 1 % of its rate; the next round starts lower and runs twice as long. A round that brings nothing is the last.
With a limit there is one round of that length.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Limits", "Schedule", "constant", "cosine", "rate_at", "round_length", "warm_up"]

Schedule = Callable[[int, float], float]  # (step, share of the way that is done) to a factor on the learning rate

# Not measured; chosen by hand.
_FIRST_ROUND = 300  # steps
_ROUNDS = 3
_WARM_UP = 30  # steps
_FLOOR = 0.01  # of a round's rate, at its end
_LOWER = 0.2  # by which each round's rate is lower than that of the round before, as a share of the first


@dataclass
class Limits:
    """Steps and seconds after which training ends, whichever comes first."""

    max_steps: int | None
    max_seconds: float | None
    began: float = field(default_factory=time.perf_counter)

    def begin(self) -> None:
        """Start the clock: what was done before (imports, a first run) does not count."""
        self.began = time.perf_counter()

    def spend(self, seconds: float) -> None:
        """Take seconds off, which were used before the clock starts."""
        if self.max_seconds is not None:
            self.max_seconds = max(self.max_seconds - seconds, 1e-9)

    @property
    def open(self) -> bool:
        """Whether neither limit was given."""
        return self.max_steps is None and self.max_seconds is None

    def progress(self, step: int) -> float:
        """Share of the budget that is used."""
        steps = step / self.max_steps if self.max_steps else 0.0
        return max(steps, self.seconds() / self.max_seconds if self.max_seconds else 0.0)

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began


def round_length(index: int) -> int | None:
    """Length of the ``index``-th round of an open fit; None after the last."""
    return _FIRST_ROUND * 2**index if index < _ROUNDS else None


def constant(step: int, progress: float) -> float:
    """A learning rate that stays."""
    return 1.0


def warm_up(step: int) -> float:
    """Factor on a learning rate that rises over the first 30 steps, and is 1 from then on."""
    return min(1.0, (step + 1) / _WARM_UP)


def cosine(progress: float, floor: float) -> float:
    """Factor on a learning rate that falls from 1 to ``floor`` along half a cosine."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def rate_at(step: int, progress: float, index: int) -> float:
    """Factor on the learning rate at ``step`` of round ``index`` with this share of the round done."""
    return warm_up(step) * cosine(progress, _FLOOR) * max(0.2, 1.0 - _LOWER * index)
