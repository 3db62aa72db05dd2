r"""How far means and standard deviations of q can be from the posterior's, from the weights alone.

With :math:`D_2 = \log E_q[(p/q)^2]` the chi-square divergence is :math:`e^{D_2} - 1`. By Cauchy and Schwarz
:math:`|E_p f - E_q f| \le \mathrm{sd}_q(f) \sqrt{e^{D_2} - 1}`, and the Wasserstein distance of a coordinate is
:math:`W_2 \le 2\, E_q[(\theta - m)^4]^{1/4} (e^{D_2} - 1)^{1/4}`, which bounds the difference of standard deviations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_dgm.core.weights import log_mean, psis
from pyro_dgm.diagnostics.containers import group

__all__ = ["ErrorBounds", "error_bounds"]


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
    stats = group(idata, "sample_stats")
    if "log_weight" not in stats:
        raise ValueError("error_bounds: sample_stats has no log_weight. Make the container with from_svi.")
    lw = stats["log_weight"].ravel()
    k = psis(lw)[1]
    d2 = max(0.0, 2.0 * (_cubo(lw) - float(lw.mean()))) if k <= 0.7 else np.inf
    chi2 = float(np.expm1(d2)) if d2 < 700.0 else np.inf
    mean, sd = {}, {}
    for name, values in group(idata, "posterior").items():
        x = values.reshape(-1, *values.shape[2:]).astype(np.float64)
        centred = x - x.mean(0)
        mean[name] = centred.std(0) * np.sqrt(chi2)
        sd[name] = 2.0 * (centred**4).mean(0) ** 0.25 * chi2**0.25
    return ErrorBounds(float(d2), mean, sd, k, _verdict(d2))


def _cubo(lw: np.ndarray) -> float:
    """Half the log of the mean squared weight: an upper bound on the log evidence, in nats."""
    return 0.5 * float(log_mean(2.0 * lw))


def _verdict(d2: float) -> str:
    if not np.isfinite(d2):
        return "unknown"
    return "very large" if d2 > 4.6 else "use weights" if d2 > 0.1 else "small"
