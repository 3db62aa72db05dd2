"""Importance weights: their mean, their Pareto smoothing, draws picked in proportion to them, and draws moved to even them out.

Smoothing is done by whichever line of ArviZ is installed, which is imported when asked for.
"""

from __future__ import annotations

import functools
import math
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = [
    "Corrections",
    "K_LIMIT",
    "LEAST_DRAWS",
    "arviz_major",
    "correction",
    "corrections",
    "evidence_error",
    "gumbels_like",
    "k_threshold",
    "log_mean",
    "log_mean_exp",
    "moment_matched",
    "psis",
    "stratified",
]

K_LIMIT = 0.7  # Pareto k above which weights do not help, however many draws: Vehtari et al. (2024), JMLR 25(72)
LEAST_DRAWS = 25  # the tail is the largest fifth, and ArviZ fits no fewer than five
_MOVES = 30  # of moment matching at most, as in R's loo
_CONSTANT = 1e-6  # nats: log weights within this range count as constant; not measured, chosen by hand

# Of the error of a log mean. Set at 1,000 draws on 81 cases with known evidence: guides too narrow, too wide or shifted, targets
# with a tail that the guide lacks (normal mixtures, Laplace, hyperbolic secant, normal-inverse-Gaussian, log gamma). Cases of 200
# repetitions of which 1.96 errors cover less than 95 %: one (by chance), and eight with a cubic factor and 0.75 of the
# largest weight, at 1.1 times the width. docs/diagnostics.md has the coverage of other families.
_HEAVY = 0.6  # Pareto k at which the error is twice that by the central limit theorem
_BEYOND = 2.0  # times the largest weight above the tail's threshold: what a tail without a draw may hold
_WORST = 0.8  # k above which the error no longer grows: it is met where the weights are all but equal
NEARLY_EQUAL = 0.95  # ESS as a share of the draws, above which k from 0.7 on is let pass: 4 instead of 7 false alarms
_WIDE = 3.0  # nats: sd of a few log weights above which their log mean has no error; chosen on the same ground as _FEW
_FEW = (
    8.0  # nats^2; at 16 log weights that are normal with sd 0.3, 1 and 2 the coverage of 1.96 errors is 95, 95 and 95 %
)

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_END = 0.01


@functools.cache
def arviz_major() -> int | None:
    """0 for ArviZ 0.x, 1 for later lines, None where there is none."""
    for name in ("arviz", "arviz-base"):
        try:
            major = int(version(name).split(".")[0])
        except PackageNotFoundError:
            continue
        return min(1, major) if name == "arviz" else 1
    return None


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    r"""Pareto-smoothed log weights (they sum to one) and Pareto k; never NaN.

    Constant weights give k = -inf (an exact guide), weights with NaN or infinity give +inf.

    Raises:
        ValueError: for fewer than 25 draws.
    """
    lw = np.asarray(log_weights, dtype=np.float64).ravel()
    if len(lw) < LEAST_DRAWS:
        raise ValueError(f"Pareto smoothing needs at least {LEAST_DRAWS} draws, got {len(lw)}.")
    finite = lw[np.isfinite(lw)]
    if len(finite) < len(lw):
        return lw - (np.logaddexp.reduce(finite) if len(finite) else 0.0), np.inf
    if np.ptp(lw) < _CONSTANT:
        return np.full_like(lw, -np.log(len(lw))), -np.inf
    smoothed, k = _smooth(lw - lw.max())
    return smoothed - np.logaddexp.reduce(smoothed), k if np.isfinite(k) else np.inf


def _smooth(lw: np.ndarray) -> tuple[np.ndarray, float]:
    if arviz_major() == 0:
        import arviz as az

        smoothed, k = az.psislw(lw)
    else:
        from arviz_stats.base import array_stats

        smoothed, k = array_stats.psislw(-lw)  # takes log-likelihoods: minus the log weights
    return np.asarray(smoothed), float(k)


def k_threshold(draws: int) -> float:
    r"""Pareto k below which estimates from so many draws are reliable: :math:`\min(1 - 1/\log_{10} S, 0.7)`."""
    return min(1.0 - 1.0 / math.log10(max(draws, 11)), K_LIMIT)


def log_mean(log_weights: np.ndarray) -> np.ndarray:
    """Log of the mean weight over the first dimension; minus infinity of none.

    >>> float(log_mean(np.zeros(4))), float(log_mean(np.zeros(0)))
    (0.0, -inf)
    """
    return np.logaddexp.reduce(log_weights, axis=0) - math.log(max(len(log_weights), 1))


def evidence_error(log_weights: np.ndarray, smoothed: np.ndarray, k: float) -> float:
    r"""Standard error of the log of the mean weight, in nats, such that 1.96 of it cover in 95 % of repetitions.

    The larger of the central limit theorem's error by raw and by smoothed weights, :math:`\sqrt{1/\mathrm{ESS} - 1/S}`, times
    :math:`1 + (\hat k / 0.6)^2`, since with heavy tails most repetitions hold no draw of the tail and do not know it; and what
    a tail beyond the largest weight may hold.

    Args:
        log_weights: of S draws, unnormalised.
        smoothed, k: of :func:`psis`.

    Returns:
        The error; infinite where k-hat is 0.7 or more, unless all weights are nearly equal: the log mean is then probably too
        low, by an unknown amount.

    >>> lw = np.random.default_rng(0).normal(-0.005, 0.1, 1000)
    >>> bool(0.1 / 1000**0.5 < evidence_error(lw, *psis(lw)) < 0.15 / 1000**0.5)
    True
    """
    n = len(log_weights)
    if not math.isfinite(k):
        return 0.0 if k < 0 else math.inf
    raw = np.exp(log_weights - np.logaddexp.reduce(log_weights))
    equal = float(np.exp(-np.logaddexp.reduce(2.0 * smoothed))) / n
    if k >= K_LIMIT and equal <= NEARLY_EQUAL:
        return math.inf
    by_smoothed = math.sqrt(max(0.0, 1.0 / equal - 1.0) / n)
    by_raw = float(raw.std()) * math.sqrt(n)
    tail = int(min(0.2 * n, 3.0 * math.sqrt(n)))
    excess = float(raw.max() - np.partition(raw, -tail - 1)[-tail - 1])
    heavy = (min(max(k, 0.0), _WORST) / _HEAVY) ** 2
    return max(by_smoothed, by_raw) * (1.0 + heavy) + _BEYOND * excess


def log_mean_exp(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""Log of the mean weight over the first dimension, and a standard error for few draws, in nats.

    The larger of two errors: by the delta method, and by that of a log-normal mean, :math:`\sqrt{v/n + v^2/(2n - 2)}` with v
    the variance of the n log weights, which also covers what a few of them miss; times Student's quantile over the normal one,
    and growing with v. Infinite where their sd is above 3.

    >>> import torch
    >>> log_mean_exp(torch.tensor([-10.0, 0.0, 0.0]))[1]
    tensor(inf, dtype=torch.float64)
    """
    from scipy.stats import t

    n = len(log_weights)
    log_w = log_weights.double()
    log_of_mean = log_w.logsumexp(0) - math.log(n)
    delta = (log_w - log_of_mean).exp().std(0) / math.sqrt(n)
    v = log_w.var(0)
    log_normal = (v / n + v.square() / (2.0 * max(n - 1, 1))).sqrt()
    error = delta.maximum(log_normal) * (1.0 + v / _FEW) * float(t.ppf(0.975, max(n - 1, 1)) / 1.96)
    return log_of_mean, error.where(v <= _WIDE**2, error.new_tensor(math.inf))


def stratified(weights: np.ndarray, n: int, uniforms: np.ndarray | float) -> np.ndarray:
    """Indices of ``n`` draws in proportion to weights, one from each of ``n`` equal strata, in order.

    Args:
        weights: not negative; they need not sum to one.
        uniforms: in [0, 1), one for each stratum; one number for all makes the draws systematic.

    >>> stratified(np.array([0.5, 0.0, 0.25, 0.25]), 4, 0.5)
    array([0, 0, 2, 3])
    """
    edges = np.cumsum(weights)
    index = np.searchsorted(edges / edges[-1], (np.arange(n) + uniforms) / n)
    return index.clip(max=len(weights) - 1)


def correction(draws: np.ndarray, log_weight: np.ndarray) -> float:
    """Largest change of a mean when draws ``(n, F)`` are importance-weighted, in standard deviations of the draws."""
    if len(log_weight) < LEAST_DRAWS or not draws.size:
        return 0.0
    sd = draws.std(0)
    change = np.abs(np.exp(psis(log_weight)[0]) @ draws - draws.mean(0))
    return float((change[sd > 0] / sd[sd > 0]).max(initial=0.0))


class Corrections(NamedTuple):
    """Largest changes of draws by their weights: of means (in sds), log sds, quantiles from 5 to 95 % (in sds), and of the ends.

    The last are of the shares beyond the 1 % and 99 % quantiles, as sds of a normal law.
    """

    means: float
    sds: float
    quantiles: float
    ends: float


def corrections(draws: np.ndarray, log_weight: np.ndarray) -> Corrections:
    """What importance weights change of draws ``(n, F)``; infinite, but of means, where there are too few for weights.

    >>> x = np.random.default_rng(0).normal(size=(1000, 1))
    >>> [round(size, 1) for size in corrections(x, 0.3 * x[:, 0])]  # weights that move a normal law by .3
    [0.3, 0.0, 0.3, 0.3]
    """
    if len(log_weight) < LEAST_DRAWS:
        return Corrections(0.0, math.inf, math.inf, math.inf)
    draws = draws[:, draws.std(0) > 0]
    if not draws.size:
        return Corrections(0.0, 0.0, 0.0, 0.0)
    weight = np.exp(psis(log_weight)[0])
    sd, moved = draws.std(0), weight @ draws
    spread = np.sqrt(weight @ np.square(draws - moved)) / sd
    place = (_quantiles(draws, weight) - _quantiles(draws, np.full_like(weight, 1.0 / len(weight)))) / sd
    sizes = (moved - draws.mean(0)) / sd, np.log(np.maximum(spread, 1e-12)), place, _ends(draws, weight)
    return Corrections(*(float(np.abs(each).max()) for each in sizes))


def _quantiles(draws: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Of weighted draws, ``(Q, F)``."""
    order = draws.argsort(0)
    below = np.cumsum(weight[order], 0)
    index = np.stack([(below < q).sum(0) for q in _QUANTILES]).clip(max=len(draws) - 1)
    return np.take_along_axis(np.take_along_axis(draws, order, 0), index, 0)


def _ends(draws: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Of the weighted shares beyond the outer percents of the draws, ``(2, F)``."""
    from scipy.special import ndtri

    low, high = np.quantile(draws, [_END, 1.0 - _END], axis=0)
    share = np.stack([weight @ (draws < low), weight @ (draws > high)])
    return np.asarray(ndtri(share.clip(0.1 * _END, 0.999)) - ndtri(_END))


def moment_matched(
    points: np.ndarray, log_q: np.ndarray, log_target: Callable[[np.ndarray], np.ndarray], limit: float
) -> tuple[np.ndarray, np.ndarray, float]:
    r"""Log weights of draws that affine maps move to a target: raw, smoothed, and their Pareto k.

    A draw :math:`x' = A x + b` has the density :math:`q(x) / |\det A|`. In turn the weighted mean, the standard deviations and
    the covariance are taken over, the first of these that makes k smaller, until it is below the limit or none does.

    Args:
        points: draws ``(n, D)``.
        log_q: their log density ``(n,)``.
        log_target: log density of points, up to a constant.
        limit: of k.

    References:
        | Paananen, Piironen, Buerkner & Vehtari (2021), "Implicitly adaptive importance sampling", Statistics and Computing 31.

    >>> x = np.random.default_rng(0).normal(size=(1000, 1))
    >>> weights, _, k = moment_matched(x, -0.5 * x[:, 0] ** 2, lambda x: -0.5 * (x[:, 0] - 3.0) ** 2, 0.5)
    >>> bool(k < 0.5), bool(abs(log_mean(weights)) < 0.05)
    (True, True)
    """
    raw = log_target(points) - log_q
    smoothed, k = psis(raw)
    for _ in range(_MOVES):
        if k <= limit:
            break
        for new, log_det in _affine(points, np.exp(smoothed)):
            trial = log_target(new) - log_q + log_det
            again, lower = psis(trial)
            if lower < k:
                points, log_q, raw, smoothed, k = new, log_q - log_det, trial, again, lower
                break
        else:
            break
    return raw, smoothed, k


def _affine(points: np.ndarray, weights: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    """The draws with the weighted mean, with the standard deviations too, with the covariance; log-determinants of the maps."""
    mean = points.mean(0)
    centred = points - mean
    to = weights @ points
    yield centred + to, 0.0
    apart = points - to
    scale = np.sqrt(weights @ apart**2) / centred.std(0)
    if (scale > 0).all():
        yield centred * scale + to, float(np.log(scale).sum())
    try:
        now, then = (
            np.linalg.cholesky(x) for x in (centred.T @ centred / len(points), (apart * weights[:, None]).T @ apart)
        )
    except np.linalg.LinAlgError:
        return
    log_det = float(np.log(np.diagonal(then)).sum() - np.log(np.diagonal(now)).sum())
    yield centred @ np.linalg.solve(now.T, then.T) + to, log_det


def gumbels_like(x: Tensor) -> Tensor:
    """Standard Gumbel draws: added to log weights, the largest are picked in their proportion, each at most once."""
    return -x.new_empty(x.shape).exponential_().log()
