r"""What tells two samples apart, row by row: distances to the nearest rows, and a classifier.

Are draws where the data are, everywhere the data are, and no copies of them? Can a network that was trained to do so tell the two
samples apart?
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_dgm.core.kinds import checked, shown
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

if TYPE_CHECKING:
    from sklearn.base import ClassifierMixin

__all__ = [
    "ModeCoverage",
    "NeighbourCoverage",
    "c2st",
    "memorization",
    "mode_coverage",
    "precision_recall_density_coverage",
]

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


_FEWEST_ROWS = 40  # of a sample, half of which train; not measured, chosen by hand
_HIDDEN = (64, 64)  # not measured, chosen by hand
_RATE = 5e-3  # not measured, chosen by hand with the patience
_PATIENCE = (
    300  # steps without a gain; a network that stops after 90 does not see modes of half the width (tests/evaluate)
)


@checked(seed=0)
def c2st(
    x: ArrayLike, y: ArrayLike, *, classifier: ClassifierMixin | None = None, seed: int | None = None
) -> JudgedScore:
    r"""Accuracy with which a classifier tells held-out rows of x from rows of y: 0.5 if p = q, 1 if they are disjoint.

    One half of the rows trains, the other tests. On the test half the labels are exchangeable under p = q whatever
    the classifier has learned, so the number of hits is hypergeometric: the p-value is Fisher's and exact. (Accuracy
    averaged over folds has no such distribution, since each fold's test rows train the others; a binomial null is then
    approximate.) The accuracy is a **lower bound** on the best classifier's, :math:`\tfrac12 + \tfrac12 \mathrm{TV}(p, q)`.

    Args:
        x: draws of one distribution, shape ``(N, *event)``; rows are flattened.
        y: draws of the other; the larger sample is thinned at random to the size of the smaller.
        classifier: any unfitted scikit-learn classifier. None takes a perceptron of two layers of 64 on standardised
            rows, stopped when a tenth of its half has gained nothing for 300 steps.
        seed: of thinning, split and training; None draws one from torch's global stream.

    Returns:
        ``value, standard_error``, and ``.p_value``, ``.null`` (1,000 draws of the accuracy under p = q). The
        error is that of the test half; with new training halves the spread was 1.5 times as large at 400 rows.

    Raises:
        ValueError: for NaN, rows of different length, fewer than 40 rows.
        ImportError: without scikit-learn.

    Note:
        It says that the samples differ, not how much it matters: an invisible fault in the fifth digit of every row
        (a constant column, rounding) gives 1. Cost: 0.2 to 1 s.

    References:
        | Lopez-Paz & Oquab (2017), "Revisiting classifier two-sample tests", section 3.

    Example:
        >>> x, y = torch.randn(2000, 2), torch.randn(2000, 2) + torch.tensor([1.0, 0.0])
        >>> score = c2st(x, y, seed=0)  # the best accuracy is Phi(1/2) = 0.691
        >>> bool(abs(score.value - 0.68) < 0.05), score.p_value < 1e-6
        (True, True)
    """
    x, y = (rows.cpu().numpy() for rows in same_rows("c2st", x=x, y=y))
    n = min(len(x), len(y))
    if n < _FEWEST_ROWS:
        raise ValueError(
            f"c2st: the smaller sample has {n} rows, expected at least {_FEWEST_ROWS} to train and to test."
        )
    rng = np.random.default_rng(int(torch.randint(2**31, ())) if seed is None else seed)
    rows = np.concatenate([rng.permutation(x)[:n], rng.permutation(y)[:n]])
    label = np.repeat([0, 1], n)
    order = rng.permutation(2 * n)
    train = order[:n]
    test = order[n:]
    fitted = _classifier(classifier, n, rng).fit(rows[train], label[train])
    return _judged(np.asarray(fitted.predict(rows[test])), label[test], rng)


def _classifier(given: ClassifierMixin | None, n: int, rng: np.random.Generator) -> ClassifierMixin:
    try:
        from sklearn.base import clone
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("c2st needs scikit-learn: pip install 'pyro_dgm[evaluate]'.") from error
    if given is not None:
        if isinstance(given, type) or not (hasattr(given, "fit") and hasattr(given, "predict")):
            raise TypeError(f"c2st: classifier is {shown(given)}, expected a classifier of scikit-learn, or None.")
        return clone(given)
    epochs = max(10, _PATIENCE // max(1, n // 200))  # of n rows in batches of 200
    network = MLPClassifier(
        _HIDDEN,
        learning_rate_init=_RATE,
        early_stopping=True,
        n_iter_no_change=epochs,
        max_iter=100 * epochs,
        random_state=int(rng.integers(2**31)),
    )
    return make_pipeline(StandardScaler(), network)


def _judged(said: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> JudgedScore:
    """Accuracy on the test half; its distribution under exchangeable labels, given how often the classifier says 1."""
    from scipy.stats import hypergeom

    n = len(label)
    ones = int(label.sum())
    claims = int(said.sum())
    hits = int(said @ label)
    null = hypergeom(n, ones, claims)  # of the hits
    rest = n - ones - claims  # right are the hits, and the zeros that were not called one: rest + hits
    value = (2 * hits + rest) / n
    draws = (2 * null.rvs(1_000, random_state=rng) + rest) / n
    return JudgedScore(value, (value * (1 - value) / n) ** 0.5, float(null.sf(hits - 1)), torch.as_tensor(draws))
