"""How long to train, and at which rate.

Without a limit, training goes in up to three rounds, of 300, 600 and 1,200 steps. A round warms up over 30 steps and follows a
cosine to 1 % of its rate; the next round starts lower and runs twice as long. A round that brings nothing is the last.
With a limit there is one round of that length.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

__all__ = ["Limits", "rate_at", "round_length"]

_FIRST_ROUND, _ROUNDS, _WARM_UP, _FLOOR = 300, 3, 30, 0.01


@dataclass
class Limits:
    """Steps and seconds after which a fit ends, whichever comes first."""

    max_steps: int | None
    max_seconds: float | None
    began: float = field(default_factory=time.perf_counter)

    def begin(self) -> None:
        """Start the clock: preparations (imports, a first run) do not count."""
        self.began = time.perf_counter()

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


def rate_at(step: int, progress: float, index: int) -> float:
    """Factor on the learning rate at ``step`` of round ``index`` with this share of the round done."""
    warm = min(1.0, (step + 1) / _WARM_UP)
    cosine = _FLOOR + (1.0 - _FLOOR) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return warm * cosine * max(0.2, 1.0 - 0.2 * index)
