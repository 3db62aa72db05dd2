r"""Two cheap numbers that say how near draws are to data, for use while training: energy distance and coverage.

They carry no error and no test: ``evaluate.energy_distance`` and ``evaluate.precision_recall_density_coverage`` do.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NEIGHBOURS", "coverage_of", "energy_of", "expected_coverage"]

NEIGHBOURS = 5


def energy_of(real: Tensor, draws: Tensor) -> float:
    r""":math:`2 E|x-y| - E|x-x'| - E|y-y'|` of rows, unbiased: below zero in about half of all cases where the laws agree.

    >>> x = torch.arange(4.0)[:, None]
    >>> round(energy_of(x, x + 100.0), 3)  # 200 less twice the mean distance of two different rows, 5/3
    196.667
    """
    n, m = len(real), len(draws)
    within = torch.cdist(real, real).sum() / (n * (n - 1)) + torch.cdist(draws, draws).sum() / (m * (m - 1))
    return float(2.0 * torch.cdist(real, draws).mean() - within)


def coverage_of(real: Tensor, draws: Tensor) -> float:
    """Share of real rows whose ball, which reaches to the fifth nearest other real row, holds a draw (Naeem et al. 2020).

    >>> x = torch.arange(20.0)[:, None]
    >>> coverage_of(x, x), coverage_of(x, x + 100.0)
    (1.0, 0.0)
    """
    reach = torch.cdist(real, real).topk(NEIGHBOURS + 1, largest=False).values[:, -1]
    return float((torch.cdist(real, draws).amin(1) <= reach).float().mean())


def expected_coverage(rows: int) -> float:
    r"""Coverage on average where the laws agree and both samples have as many rows: :math:`1 - \prod_i (N-i)/(2N-i)`.

    >>> round(expected_coverage(500), 3)
    0.969
    """
    missed = 1.0
    for i in range(1, NEIGHBOURS + 1):
        missed *= (rows - i) / (2 * rows - i)
    return 1.0 - missed
