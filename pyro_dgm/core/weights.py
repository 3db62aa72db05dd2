"""Importance weights: their mean, their Pareto smoothing, and draws picked in proportion to them.

Smoothing is done by whichever line of ArviZ is installed, which is imported when asked for.
"""

from __future__ import annotations

import functools
import math
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["K_LIMIT", "LEAST_DRAWS", "arviz_major", "k_threshold", "log_mean", "log_mean_exp", "psis", "stratified"]

K_LIMIT = 0.7  # Pareto k above which weights do not help, however many draws: Vehtari et al. (2024), JMLR 25(72)
LEAST_DRAWS = 25  # the tail is the largest fifth, and ArviZ fits no fewer than five
_CONSTANT = 1e-6  # nats: log weights within this range count as constant; not measured, chosen by hand


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


def log_mean_exp(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the mean weight over the first dimension, and its standard error by the delta method."""
    n = len(log_weights)
    log_w = log_weights.double()
    log_of_mean = log_w.logsumexp(0) - math.log(n)
    relative = (log_w - log_of_mean).exp()
    return log_of_mean, relative.std(0) / math.sqrt(n)


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
