r"""Two cheap numbers that say how near draws are to data, for use while training: energy distance and coverage.

They carry no error and no test: ``evaluate.energy_distance`` and ``evaluate.precision_recall_density_coverage`` do.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NEIGHBOURS", "expected_coverage", "sample_quality"]

NEIGHBOURS = 5


def sample_quality(real: Tensor, draws: Tensor) -> tuple[float, float]:
    r"""Energy distance of rows to draws, and the coverage of rows as a share of that of equal distributions.

    The first is :math:`2 E|x-y| - E|x-x'| - E|y-y'|`, unbiased: of equal distributions below zero in about half of all cases.
    Coverage is the share of rows whose ball, which reaches to the fifth nearest other row, holds a draw (Naeem et al. 2020).

    >>> x = torch.arange(20.0)[:, None]
    >>> round(sample_quality(x, x + 100.0)[0], 3)  # 200 less twice the mean distance of two different rows, 7
    186.0
    >>> sample_quality(x, x + 100.0)[1], round(sample_quality(x, x)[1] * expected_coverage(20), 3)
    (0.0, 1.0)
    """
    n, m = len(real), len(draws)
    within, across = torch.cdist(real, real), torch.cdist(real, draws)
    spread = within.sum() / (n * (n - 1)) + torch.cdist(draws, draws).sum() / (m * (m - 1))
    reach = within.topk(NEIGHBOURS + 1, largest=False).values[:, -1]
    covered = (across.amin(1) <= reach).float().mean()
    return float(2.0 * across.mean() - spread), float(covered) / expected_coverage(n)


def expected_coverage(rows: int) -> float:
    r"""Mean coverage of two samples of one distribution, with as many rows each: :math:`1 - \prod_i (N-i)/(2N-i)`.

    >>> round(expected_coverage(500), 3)
    0.969
    """
    missed = 1.0
    for i in range(1, NEIGHBOURS + 1):
        missed *= (rows - i) / (2 * rows - i)
    return 1.0 - missed
