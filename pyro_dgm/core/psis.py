"""Pareto smoothing of importance weights, by whichever line of ArviZ is installed (imported when asked for)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import numpy as np

__all__ = ["arviz_major", "psis"]


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
