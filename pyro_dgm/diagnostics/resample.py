"""Importance resampling: draws of a guide turned into draws of the posterior, as far as the weights carry."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from pyro_dgm.core.weights import psis, stratified
from pyro_dgm.diagnostics.containers import group, has_group, picked

__all__ = ["resample"]

_WEIGHTED = ("posterior", "sample_stats", "log_likelihood", "log_prior", "posterior_predictive", "predictions")


def resample(idata: Any, num_samples: int | None = None, *, seed: int | None = None) -> Any:
    r"""A container whose draws are picked in proportion to :math:`w = p(x, \theta) / q(\theta)`, Pareto-smoothed.

    Stratified resampling, in random order. All groups of the posterior are picked together; ``log_weight`` is dropped,
    since it is spent, and the attribute ``resampled`` is set. What is repeated counts once: about ``ess`` draws of
    :func:`~pyro_dgm.khat` are distinct information, so ask for no more than you need.

    Args:
        idata: a container of :func:`~pyro_dgm.from_svi`.
        num_samples: number of draws; None for as many as there are.
        seed: makes the choice reproducible.

    Raises:
        ValueError: if the container has no importance weights.

    Warns:
        UserWarning: if Pareto k is 0.7 or more: the weights then cannot repair the draws.

    References:
        | Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72).

    Example:
        >>> import numpy as np
        >>> x = np.linspace(-2.0, 2.0, 400)[None]
        >>> draws = {"posterior": {"x": x}, "sample_stats": {"log_weight": x}}  # q is uniform, p grows with x
        >>> bool(resample({"groups": draws}, seed=0)["groups"]["posterior"]["x"].mean() > 0.8)
        True
    """
    stats = group(idata, "sample_stats")
    if "log_weight" not in stats:
        raise ValueError(
            "resample: sample_stats has no log_weight. Make the container with from_svi, and resample once."
        )
    log_weight, k = psis(stats["log_weight"])
    if k >= 0.7:
        warnings.warn(
            f"resample: k-hat is {k:.2f}; above 0.7 importance weights do not repair the draws. See khat(idata).",
            stacklevel=2,
        )
    n, rng = num_samples or len(log_weight), np.random.default_rng(seed)
    index = rng.permutation(stratified(np.exp(log_weight), n, rng.random(n)))
    groups = [g for g in _WEIGHTED if has_group(idata, g)]
    return picked(idata, groups, index)
