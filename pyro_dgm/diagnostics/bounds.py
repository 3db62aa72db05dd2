r"""What importance weights :math:`w = p(x, \theta) / q(\theta)` give beside a verdict: bounds of errors, and other draws.

**Error bounds.** With :math:`D_2 = \log E_q[(p/q)^2]` the chi-square divergence is :math:`e^{D_2} - 1`. By Cauchy and Schwarz
:math:`|E_p f - E_q f| \le \mathrm{sd}_q(f) \sqrt{e^{D_2} - 1}`, and the Wasserstein distance of a coordinate is
:math:`W_2 \le 2\, E_q[(\theta - m)^4]^{1/4} (e^{D_2} - 1)^{1/4}`, which bounds the difference of standard deviations.

**Resampling** picks draws in proportion to w: draws of the posterior, as far as the weights carry.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_dgm.core.weights import K_LIMIT, log_mean, psis, stratified
from pyro_dgm.diagnostics.containers import group, log_weights_of, resampled

__all__ = ["ErrorBounds", "error_bounds", "resample"]

_D2_SMALL = 0.1  # nats; this and the next as in viabel, the package of Huggins et al. (2020)
_D2_LARGE = 4.6  # nats


@dataclass(frozen=True)
class ErrorBounds:
    r"""Bounds by variable, in the variable's units; infinite where they cannot be had.

    Attributes:
        d2: the bound :math:`2 (\mathrm{CUBO}_2 - \mathrm{ELBO}) \ge D_2(p \| q)`, in nats.
        mean: bounds on the error of posterior means, ``{variable: array}``.
        sd: bounds on the error of posterior standard deviations.
        khat: Pareto k of the weights.
        verdict: "small", "use weights", "very large" or "unknown".
    """

    d2: float
    mean: dict[str, np.ndarray]
    sd: dict[str, np.ndarray]
    khat: float
    verdict: str

    def __str__(self) -> str:
        if self.verdict == "unknown":
            return f"error bounds: unknown, since k-hat {self.khat:.2f} is above 0.7 and no second moment can be estimated."
        worst = ", ".join(f"{k} {np.max(v):.3g}" for k, v in self.mean.items())
        return f"error bounds: {self.verdict} (D2 <= {self.d2:.3g} nats). Means are off by at most: {worst}."


def error_bounds(idata: Any) -> ErrorBounds:
    r"""Bounds on the errors of posterior means and standard deviations of a guide's draws.

    They are bounds: the errors themselves are usually far smaller. They rest on estimates of :math:`E_q w^2` and of the
    ELBO, so they hold up to those estimates' error, and nothing is said where Pareto k is above 0.7.

    Args:
        idata: a container of :func:`~pyro_dgm.from_svi`.

    Raises:
        ValueError: if the container has no importance weights.

    References:
        | Huggins, Kasprzak, Campbell & Broderick (2020), "Validated variational inference via practical posterior error
          bounds", AISTATS sections 3-4; their package viabel has the same bounds, over all coordinates
          together. The bound of the mean here is half of theirs.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(1, 20_000))  # q = N(0, 1), p = N(0.1, 1)
        >>> groups = {"posterior": {"x": x}, "sample_stats": {"log_weight": 0.1 * x - 0.005}}
        >>> bounds = error_bounds({"groups": groups})
        >>> bool(0.1 < bounds.mean["x"] < 0.15), bounds.verdict  # the mean is off by 0.1
        (True, 'small')
    """
    lw = log_weights_of("error_bounds", idata)
    k = psis(lw)[1]
    d2 = math.inf
    if k <= K_LIMIT:
        upper = 0.5 * float(log_mean(2.0 * lw))  # CUBO_2, in nats: an upper bound on the log evidence
        d2 = max(0.0, 2.0 * (upper - float(lw.mean())))
    chi2 = math.expm1(d2) if d2 < 700.0 else math.inf  # float64 ends at exp(709)
    mean = {}
    sd = {}
    for name, values in group(idata, "posterior").items():
        x = values.reshape(-1, *values.shape[2:]).astype(np.float64)
        centred = x - x.mean(0)
        mean[name] = centred.std(0) * np.sqrt(chi2)
        sd[name] = 2.0 * (centred**4).mean(0) ** 0.25 * chi2**0.25
    return ErrorBounds(d2, mean, sd, k, _size_of(d2))


def _size_of(d2: float) -> str:
    if d2 == math.inf:
        return "unknown"
    if d2 > _D2_LARGE:
        return "very large"
    return "use weights" if d2 > _D2_SMALL else "small"


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
    log_weight, k = psis(log_weights_of("resample", idata))
    if k >= K_LIMIT:
        warnings.warn(
            f"resample: k-hat is {k:.2f}; above {K_LIMIT} importance weights do not repair the draws. See khat(idata).",
            stacklevel=2,
        )
    n = num_samples or len(log_weight)
    rng = np.random.default_rng(seed)
    return resampled(idata, rng.permutation(stratified(np.exp(log_weight), n, rng.random(n))))
