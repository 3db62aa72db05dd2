r"""Does the model repeat its training data? Distances to the training set, of draws and of held-out data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_dgm.evaluate.rows import exactly_centred, featured, same_features, squared_distances
from pyro_dgm.evaluate.score import JudgedScore, grouped, random_source, share_above

__all__ = ["memorization"]

_CHUNK = 10_000_000


def memorization(
    draws: Any,
    train: Any,
    held_out: Any,
    *,
    features: Callable[[Tensor], Tensor] | None = None,
    num_permutations: int = 1000,
    seed: int | None = None,
) -> JudgedScore:
    r"""Chance that a draw lies nearer to the training data than a held-out datum does: 0.5 is right, 1 is copying.

    :math:`P(d(y) < d(x)) + \tfrac12 P(d(y) = d(x))` with d the distance to the nearest training row, y a draw, x a
    held-out row: a Mann-Whitney statistic. No unit. Given the training data both distances are independent draws, so the
    permutation test of "the model is the distribution of the data" is exact; it looks at large values only.

    Args:
        draws: draws of the model, shape ``(M, *event)``.
        train: what it was trained on, shape ``(N, *event)``.
        held_out: data it has not seen, shape ``(H, *event)``, from the same distribution as ``train``.
        features: ``(batch, *event) -> (batch, D)``, where Euclidean distances are to be taken; None for the rows.
        num_permutations: B of the test.
        seed: of the permutations.

    Returns:
        ``value, standard_error`` (for this training set), and ``.p_value``, ``.null``. Unbiased.

    Raises:
        ValueError: for NaN, fewer than two rows, rows of different length.

    Note:
        Below 0.5 means that draws are farther from the data than data are: a poor model, and one that copies a tenth
        of its draws and spoils the rest may average to 0.5. Look at the nearest neighbours too. Cost: N (M + H) D.

    References:
        | Meehan et al. (2020), "A non-parametric test to detect data-copying in generative models", section 3.

    Example:
        >>> train, held_out = torch.randn(500, 4), torch.randn(500, 4)
        >>> value, error = memorization(torch.randn(500, 4), train, held_out)
        >>> abs(value - 0.5) < 5 * error
        True
        >>> memorization(train + 0.01 * torch.randn(500, 4), train, held_out).value > 0.95
        True
    """
    samples = {"draws": draws, "train": train, "held_out": held_out}
    y, seen, x = same_features("memorization", **{k: featured(features, v) for k, v in samples.items()})
    seen, y, x = exactly_centred(seen, y, x)
    ours, theirs = _nearest(y, seen), _nearest(x, seen)
    by_draw, by_datum = _share_larger(ours, theirs), _share_larger(-theirs, -ours)
    error = (by_draw.var() / len(y) + by_datum.var() / len(x)).sqrt()
    first = grouped(len(y), len(x), num_permutations, random_source(seed)).double()
    values = _mann_whitney(first, torch.cat([ours, theirs]), len(y), len(x))
    return JudgedScore(float(values[0]), float(error), share_above(values), values[1:])


def _nearest(rows: Tensor, data: Tensor) -> Tensor:
    """Squared distance of each row to the nearest datum."""
    step = max(1, _CHUNK // len(data))
    return torch.cat([squared_distances(part, data).min(-1).values for part in rows.split(step)]).cpu()


def _share_larger(a: Tensor, b: Tensor) -> Tensor:
    """For each of a the share of b that is larger; equal ones count half."""
    ordered = b.sort().values
    above = len(b) - torch.searchsorted(ordered, a, right=True)
    not_below = len(b) - torch.searchsorted(ordered, a)
    return 0.5 * (above + not_below).double() / len(b)


def _mann_whitney(first: Tensor, distance: Tensor, n: int, m: int) -> Tensor:
    """The share of pairs in which the first group's distance is the smaller, for each column of ``first``."""
    larger = _share_larger(distance, distance) * (n + m) - 0.5  # how many of the others are larger
    return ((first * larger[:, None]).sum(0) - 0.5 * n * (n - 1)) / (n * m)
