"""Importance weights: their mean, their Pareto smoothing, and draws picked in proportion to them.

Smoothing is done by whichever line of ArviZ is installed, which is imported when asked for.
"""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["arviz_major", "log_mean", "log_mean_exp", "psis", "stratified"]


def arviz_major() -> int | None:
    """0 for ArviZ 0.x, 1 for later lines, None where there is none."""
    for name in ("arviz", "arviz-base"):
        try:
            return min(1, int(version(name).split(".")[0])) if name == "arviz" else 1
        except PackageNotFoundError:
            continue
    return None


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    r"""Pareto-smoothed log weights (they sum to one) and Pareto k; never NaN.

    Constant weights give k = -inf (an exact guide), weights with NaN or infinity give +inf.

    Raises:
        ValueError: for fewer than 25 draws.
    """
    lw = np.asarray(log_weights, dtype=np.float64).ravel()
    if len(lw) < 25:
        raise ValueError(f"Pareto smoothing needs at least 25 draws, got {len(lw)}.")
    if not np.isfinite(lw).all():
        return lw - _logsumexp(lw[np.isfinite(lw)]), np.inf
    if np.ptp(lw) < 1e-6:
        return np.full_like(lw, -np.log(len(lw))), -np.inf
    smoothed, k = _smooth(lw - lw.max())
    return smoothed - _logsumexp(smoothed), float(k) if np.isfinite(k) else np.inf


def _smooth(lw: np.ndarray) -> tuple[np.ndarray, float]:
    if arviz_major() == 0:
        import arviz as az

        smoothed, k = az.psislw(lw)
        return np.asarray(smoothed), float(k)
    from arviz_stats.base import array_stats  # takes log-likelihoods: minus the log weights

    smoothed, k = array_stats.psislw(-lw)
    return np.asarray(smoothed), float(k)


def _logsumexp(x: np.ndarray) -> float:
    return float(np.logaddexp.reduce(x)) if len(x) else 0.0


def log_mean(log_weights: np.ndarray) -> Any:
    """Log of the mean weight over the first dimension; minus infinity of none.

    >>> float(log_mean(np.zeros(4))), float(log_mean(np.zeros(0)))
    (0.0, -inf)
    """
    return np.logaddexp.reduce(log_weights, axis=0) - math.log(max(len(log_weights), 1))


def log_mean_exp(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the mean weight over the first dimension, and its standard error by the delta method."""
    n, log_w = len(log_weights), log_weights.double()
    log_of_mean = log_w.logsumexp(0) - math.log(n)
    relative = (log_w - log_of_mean).exp()
    return log_of_mean, relative.std(0) / math.sqrt(n)


def stratified(weights: np.ndarray, n: int, uniforms: Any) -> np.ndarray:
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
