"""What every function of this folder returns, and the errors that need more than one line: jackknife, permutation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["JudgedScore", "Score", "blocks", "grouped", "jackknife", "mean_score", "random_source", "share_above"]


class Score(NamedTuple):
    """A number with its Monte-Carlo standard error; a pair, so that ``value, error = score`` reads it.

    >>> value, error = Score(1.25, 0.01)
    >>> print(Score(1.25, 0.01))
    1.25 +- 0.01
    """

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.4g} +- {self.standard_error:.2g}"


class JudgedScore(Score):
    """A score of "are these two samples from one distribution?", still a pair, with its verdict as attributes.

    Attributes:
        p_value: chance of a score as large or larger where both samples come from one distribution.
        null: draws of the score under that hypothesis; their mean is the score of a perfect model.

    >>> value, error = JudgedScore(0.6, 0.1, 0.02, torch.zeros(3))
    >>> print(JudgedScore(0.6, 0.1, 0.02, torch.zeros(3)))
    0.6 +- 0.1 (p = 0.02)
    """

    p_value: float
    null: Tensor

    def __new__(
        cls, value: float, standard_error: float, p_value: float = float("nan"), null: Tensor | None = None
    ) -> JudgedScore:
        self = super().__new__(cls, value, standard_error)
        self.p_value, self.null = p_value, torch.empty(0) if null is None else null
        return self

    def __str__(self) -> str:
        return f"{super().__str__()} (p = {self.p_value:.2g})"

    def __repr__(self) -> str:
        return f"JudgedScore({self.value}, {self.standard_error}, p_value={self.p_value})"


def mean_score(values: Tensor) -> Score:
    """The mean over rows and its standard error; an infinite row makes both infinite."""
    values = values.double()
    if not values.isfinite().all():
        return Score(float(values.mean()), float("inf"))
    return Score(float(values.mean()), float(values.std() / len(values) ** 0.5))


def random_source(seed: int | None) -> torch.Generator | None:
    """A generator for the seed; None takes torch's global stream."""
    return None if seed is None else torch.Generator().manual_seed(seed)


def grouped(n: int, m: int, num_permutations: int, generator: torch.Generator | None) -> Tensor:
    """Who is in the first group: ``(n + m, 1 + B)``, the true assignment and B random ones, as 0 and 1."""
    if num_permutations < 19:
        raise ValueError(f"num_permutations is {num_permutations}; below 19 no p-value can reach 0.05. Use 200.")
    first = torch.zeros(num_permutations + 1, n + m, dtype=torch.bool, device="cpu")
    first[0, :n] = True
    order = torch.rand(num_permutations, n + m, generator=generator, device="cpu").argsort(-1)
    first[1:].scatter_(1, order[:, :n], True)
    return first.T.contiguous()


def share_above(values: Tensor) -> float:
    """The permutation p-value of ``values[0]`` among all: exact, and never zero."""
    return float((values[1:] >= values[0]).sum() + 1) / len(values)


def blocks(n: int, count: int) -> list[Tensor]:
    """For each of ``count`` interleaved blocks of n rows, the rows that are left without it."""
    rows = torch.arange(n)
    return [rows[rows % count != b] for b in range(count)]


def jackknife(statistic: Callable[..., Tensor], *samples: Tensor, count: int = 20) -> Tensor:
    r"""Standard errors of ``statistic(*samples)`` by leaving out one of ``count`` blocks of every sample.

    :math:`\frac{B-1}{B}\sum_b (s_b - \bar s)^2`, with relative error about :math:`1/\sqrt{2B}`; conservative where
    the statistic is degenerate (two samples of one distribution).
    """
    count = min(count, *(len(s) for s in samples))
    without = zip(*(blocks(len(s), count) for s in samples), strict=True)
    values = torch.stack([
        statistic(*(s[rows.to(s.device)] for s, rows in zip(samples, kept, strict=True))) for kept in without
    ])  # fmt: skip
    return ((count - 1) * values.double().var(0, unbiased=False)).sqrt()
