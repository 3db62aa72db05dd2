r"""What distances to the nearest rows tell: are draws where the data are, everywhere the data are, and no copies of them?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import as_tensor_like
from pyro_dgm.evaluate.score import (
    CHUNK,
    Features,
    JudgedScore,
    Score,
    exactly_centred,
    grouped,
    jackknife,
    judged,
    random_source,
    same_rows,
    squared_distances,
)

__all__ = ["ModeCoverage", "NeighbourCoverage", "memorization", "mode_coverage", "precision_recall_density_coverage"]

_BLOCKS = 10  # of the jackknife of the four shares, each a pass over all pairs; not measured, chosen by hand
_HIT_SHARE = 0.1  # of the draws that a mode should have, for it to count as hit; not measured, chosen by hand


class NeighbourCoverage(NamedTuple):
    """Four scores, each a pair; see :func:`precision_recall_density_coverage`."""

    precision: Score
    recall: Score
    density: Score
    coverage: Score


@checked()
def precision_recall_density_coverage(real: ArrayLike, draws: ArrayLike, *, neighbours: int = 5) -> NeighbourCoverage:
    r"""Shares of rows that lie in the k-nearest-neighbour balls of the other sample.

    With :math:`B_k(x_i)` the ball around a row that reaches to its k-th nearest neighbour in its own sample:

    - *precision*: share of draws in any ball of the data; *recall*: share of data in any ball of the draws
      (Kynkaanniemi et al. 2019, eq. 1-2);
    - *density*: mean over draws of (number of balls of the data that hold it) / k, may exceed 1; *coverage*: share of
      the data's balls that hold a draw (Naeem et al. 2020, eq. 3-4).

    No unit. Where p = q and N = M, density is 1 on average and coverage :math:`1 - \prod_{i=1}^{k}
    \frac{N-i}{2N-i} \approx 1 - 2^{-k}`; precision and recall depend on the distribution (Naeem et al., eq. 6). All
    depend on N, M and k: compare models at equal ones.

    Args:
        real: held-out data, shape ``(N, *event)``, or its features.
        draws: draws of the model, shape ``(M, *event)``.
        neighbours: k.

    Returns:
        :class:`NeighbourCoverage` of four ``(value, standard_error)``; errors by the block jackknife over both samples,
        1.2 to 2 times too large where measured.

    Raises:
        ValueError: for NaN, rows of different length, not more than k rows in a sample (in nine tenths of it).

    Note:
        One outlier has a huge ball, so precision and recall flatter; density and coverage do not. Euclidean distances
        say little about raw images: pass features. Cost: 10 (N + M)^2 D
        operations, nine tenths of them for the errors: about 7 s at N = M = 5,000.

    References:
        | Kynkaanniemi et al. (2019), "Improved precision and recall metric", arXiv 1904.06991.
        | Naeem et al. (2020), "Reliable fidelity and diversity metrics", arXiv 2002.09797.

    Example:
        >>> scores = precision_recall_density_coverage(torch.randn(500, 2), torch.randn(500, 2))
        >>> abs(scores.coverage.value - (1 - 2**-5)) < 5 * scores.coverage.standard_error
        True
    """
    a, b = same_rows("precision_recall_density_coverage", real=real, draws=draws)
    n = min(len(a), len(b))
    most = n - -(-n // _BLOCKS) - 1  # the jackknife leaves a block out
    if not 1 <= neighbours <= most:
        raise ValueError(
            f"precision_recall_density_coverage: {neighbours} neighbours of {n} rows, expected from 1 to {most}."
        )
    values = _in_balls(a, b, neighbours)
    errors = jackknife(lambda a, b: _in_balls(a, b, neighbours), a, b, count=_BLOCKS)
    return NeighbourCoverage(*(Score(float(v), float(e)) for v, e in zip(values, errors, strict=True)))


def _in_balls(real: Tensor, draws: Tensor, k: int) -> Tensor:
    """Precision, recall, density and coverage in one pass over the distances between the samples."""
    real, draws = exactly_centred(real, draws)
    reach = _nearest(real, real, k + 1)  # the row itself is the first
    reach_draws = _nearest(draws, draws, k + 1)
    holding = torch.zeros(len(draws), device=real.device)
    recalled, covered = [], []
    step = max(1, CHUNK // len(draws))
    for rows, radius in zip(real.split(step), reach.split(step), strict=True):
        d = squared_distances(rows, draws)
        inside = d <= radius[:, None]
        holding += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((d <= reach_draws).any(1))
    shares = [holding.gt(0), torch.cat(recalled), holding / k, torch.cat(covered)]
    return torch.stack([s.double().mean() for s in shares])


def _nearest(rows: Tensor, data: Tensor, k: int = 1) -> Tensor:
    """Squared distance of each row to the k-th nearest datum."""
    parts = rows.split(max(1, CHUNK // len(data)))
    return torch.cat([squared_distances(part, data).topk(k, largest=False).values[:, -1] for part in parts])


class ModeCoverage(NamedTuple):
    """Three scores, each a pair; see :func:`mode_coverage`."""

    covered: Score
    quality: Score
    imbalance: Score


@checked(num_bootstrap=1)
def mode_coverage(
    draws: ArrayLike,
    centres: ArrayLike,
    radius: float,
    *,
    weights: ArrayLike | None = None,
    num_bootstrap: int = 200,
    seed: int | None = None,
) -> ModeCoverage:
    r"""For a distribution with known modes: share of modes hit, share of draws near a mode, and how masses differ.

    A draw belongs to the nearest centre if that is within ``radius``. *covered* is the share of modes with at least one
    tenth of the draws that they should have, *quality* the share of draws that belong to any, and *imbalance* the total
    variation :math:`\tfrac12 \sum_j |\hat w_j - w_j|` of the masses of those. No unit. Imbalance is biased upwards, by about
    :math:`\sum_j \sqrt{w_j (1 - w_j) / 2 \pi M}`, where the masses are right.

    Args:
        draws: shape ``(M, *event)``.
        centres: shape ``(K, *event)``.
        radius: in the data's units; three or four standard deviations of a mode.
        weights: the true masses, shape ``(K,)``; None for equal ones.
        num_bootstrap: repetitions of the bootstrap that gives the errors.
        seed: of the bootstrap.

    Returns:
        :class:`ModeCoverage` of three ``(value, standard_error)``.

    Raises:
        ValueError: for NaN, rows of different length, a radius that is not positive, weights that are no masses.

    Example:
        >>> centres = torch.tensor([[-2.0], [2.0]])
        >>> one_mode = -2.0 + 0.1 * torch.randn(1000, 1)
        >>> covered, quality, imbalance = mode_coverage(one_mode, centres, radius=0.5)
        >>> covered.value, quality.value, imbalance.value
        (0.5, 1.0, 0.5)
    """
    rows, modes = same_rows("mode_coverage", draws=draws, centres=centres)
    if not radius > 0:
        raise ValueError(f"mode_coverage: radius is {radius}, expected a positive number in the data's units.")
    n, k = len(rows), len(modes)
    equal = torch.ones(k, dtype=torch.float64)
    mass = equal if weights is None else as_tensor_like("mode_coverage", "weights", weights, equal)
    if mass.shape != (k,) or not (mass > 0).all():
        raise ValueError(f"mode_coverage: weights have shape {tuple(mass.shape)}, expected ({k},) positive masses.")
    distance, nearest = torch.cdist(rows, modes).min(-1)
    label = torch.where(distance <= radius, nearest, k).cpu()
    share = torch.bincount(label, minlength=k + 1).double() / n
    again = torch.multinomial(share.float().expand(num_bootstrap, -1), n, True, generator=random_source(seed))
    repeated = torch.stack([torch.bincount(labels, minlength=k + 1) for labels in again]).double() / n
    values = _modes(share[None], mass)[0]
    errors = _modes(repeated, mass).std(0)
    return ModeCoverage(*(Score(float(v), float(e)) for v, e in zip(values, errors, strict=True)))


def _modes(share: Tensor, mass: Tensor) -> Tensor:
    """Covered, quality, imbalance from shares ``(B, K + 1)``, the last column being far from all modes."""
    mass = mass / mass.sum()
    near = share[:, :-1]
    quality = 1.0 - share[:, -1]
    covered = (near >= _HIT_SHARE * mass).double().mean(-1)
    among = near / quality.clamp(min=1e-12)[:, None]
    imbalance = torch.where(quality > 0, 0.5 * (among - mass).abs().sum(-1), torch.ones(()).double())
    return torch.stack([covered, quality, imbalance], -1)


@checked()
def memorization(
    draws: ArrayLike,
    train: ArrayLike,
    held_out: ArrayLike,
    *,
    features: Features | None = None,
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
    rows = same_rows("memorization", features, train=train, draws=draws, held_out=held_out)
    seen, y, x = exactly_centred(*rows)
    first = grouped(len(y), len(x), num_permutations, random_source(seed))
    return _mann_whitney(_nearest(y, seen).cpu(), _nearest(x, seen).cpu(), first)


def _mann_whitney(ours: Tensor, theirs: Tensor, first: Tensor) -> JudgedScore:
    """The share of pairs in which ours is the smaller, by sums of ranks, and its error by shares of single rows."""
    from scipy.stats import rankdata  # mannwhitneyu gives neither an error nor the null

    n, m = len(ours), len(theirs)
    rank = torch.from_numpy(rankdata(torch.cat([ours, theirs])))
    share_below_ours = (rank[:n] - torch.from_numpy(rankdata(ours))) / m
    share_below_theirs = (rank[n:] - torch.from_numpy(rankdata(theirs))) / n
    error = (share_below_ours.var() / n + share_below_theirs.var() / m).sqrt()
    sums = rank @ first.double()
    values = 1.0 - (sums - 0.5 * n * (n + 1)) / (n * m)
    return judged("memorization", values, error)
