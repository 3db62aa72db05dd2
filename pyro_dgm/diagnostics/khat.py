r"""What importance weights :math:`w = p(x, \theta) / q(\theta)` say of a guide's draws: verdict, error bounds, resampling.

**Verdict.** Pareto k alone is none: it passed 15 of 34 deliberately bad fits (a Gaussian that is too wide, shifted by half a
standard deviation, a mean field). The gap between the importance-weighted evidence and the ELBO, an estimate of
:math:`\mathrm{KL}(q\|p)`, caught all of them, but no weight can show a mode that q has never visited. The verdict uses
both, and what :mod:`~pyro_dgm.diagnostics.explore` found.

**Error bounds.** With :math:`D_2 = \log E_q[(p/q)^2]` the chi-square divergence is :math:`e^{D_2} - 1`. By Cauchy and Schwarz
:math:`|E_p f - E_q f| \le \mathrm{sd}_q(f) \sqrt{e^{D_2} - 1}`, and the Wasserstein distance of a coordinate is
:math:`W_2 \le 2\, E_q[(\theta - m)^4]^{1/4} (e^{D_2} - 1)^{1/4}`, which bounds the difference of standard deviations.

**Resampling** picks draws in proportion to w: draws of the posterior, as far as the weights carry.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, Literal

import numpy as np

from pyro_dgm.core.kinds import checked, shown
from pyro_dgm.core.weights import K_LIMIT, LEAST_DRAWS, k_threshold, log_mean, psis, stratified
from pyro_dgm.diagnostics.containers import group, group_attrs, resampled

__all__ = ["ErrorBounds", "Exploration", "KHat", "error_bounds", "judge", "khat", "resample"]

# Thresholds. Unless said otherwise they were set on 105 fits of posteriordb models, of 4,000 draws: 34 bad ones (a mean off by
# more than 0.1 sd, a log sd or the KL by more than 0.1) and 71 good ones. Pareto k >= 0.7 alone fires on 19 and 4 of them.
_GAP = 0.05  # nats; fires on 34 of the bad and 3 of the good, which had not converged
_EQUAL = 0.95  # ESS as a share of the draws, above which k from 0.7 to 1 is let pass: 4 instead of 7 false alarms
_NO_TAIL = 1.5  # nats from ELBO to the largest log weight: no weight above 4.5, so k means nothing. Chosen by hand
_USABLE = 0.1  # ESS as a share of the draws, below which resampling leaves too few. Not measured; chosen by hand
_DRIFT = 0.25  # sd; 512 chains from exact draws drift by 0.12 to 0.16, largest over coordinates
_DRIFT_SD = 0.2  # log sd; fires on 31 and 1
_ACCEPTANCE = 0.4  # share; any of these three fires on 33 and 1
_CORRECTION = 0.1  # sd; fires on 25 and 0
_D2_SMALL = 0.1  # nats; this and the next as in viabel, the package of Huggins et al. (2020)
_D2_LARGE = 4.6  # nats

_ADVICE = {
    "exact": "q is the posterior, up to the draws' error.",
    "good": "Use the draws as they are.",
    "usable": "Draws may be visibly off: resample(idata) while k-hat is below the threshold, or train longer.",
    "bad": "Do not use it. Train longer, try another family or reparameterise the model; check with NUTS.",
}
Status = Literal["exact", "good", "usable", "bad"]


def _log_weights(who: str, idata: Any) -> np.ndarray:
    """All log weights of a container, chains one after another."""
    stats = group(idata, "sample_stats")
    if "log_weight" not in stats:
        raise ValueError(
            f"{who}: sample_stats has no log_weight (log p - log q). Make the container with from_svi, of a guide with a "
            "density, and resample it once at most; an implicit one is judged by Adversarial_ELBO(...).diagnose()."
        )
    return np.asarray(stats["log_weight"], dtype=np.float64).ravel()


# --- Verdict ---


@dataclass(frozen=True)
class Exploration:
    """What short chains and ascents from prior draws found.

    Attributes:
        drift: largest change of a coordinate's mean along the chains, in standard deviations of the guide.
        drift_sd: largest absolute change of a log standard deviation.
        acceptance: share of accepted proposals in the second half.
        other_modes: modes of comparable density that the guide's draws do not reach.
        correction: largest change of a posterior mean by importance weights, in standard deviations.
        unseen: why no chains were run and no modes were looked for; empty where they were.
    """

    drift: float = 0.0
    drift_sd: float = 0.0
    acceptance: float = 1.0
    other_modes: int = 0
    correction: float = 0.0
    unseen: str = ""

    @property
    def moved(self) -> bool:
        """Whether the chains left the guide, by more than they do by chance."""
        return self.drift >= _DRIFT or self.drift_sd >= _DRIFT_SD or self.acceptance < _ACCEPTANCE

    @property
    def contradicts(self) -> bool:
        """Whether something was found that a good guide does not have."""
        return self.moved or self.other_modes > 0 or self.correction >= _CORRECTION


@dataclass(frozen=True, kw_only=True)
class KHat(Exploration):
    r"""The verdict on a variational posterior: what the weights say, and what exploration found.

    Attributes:
        k: Pareto shape of the weights' tail; below ``threshold`` importance estimates converge. Its own error is
            about 0.1 at 4,000 draws. -inf for constant weights; never NaN.
        threshold: :math:`\min(1 - 1/\log_{10} S, 0.7)`.
        ess: effective number of the S draws, :math:`(\sum w)^2 / \sum w^2` after smoothing.
        elbo, elbo_error: mean of log w in nats, and its standard error; a lower bound on the log evidence.
        log_evidence, log_evidence_error: :math:`\log \frac1S \sum w`, and its standard error (nats).
        draws: S.
        status: "exact", "good", "usable" or "bad".
    """

    k: float
    threshold: float
    ess: float
    elbo: float
    elbo_error: float
    log_evidence: float
    log_evidence_error: float
    draws: int
    status: Status

    @property
    def gap(self) -> float:
        r"""Evidence minus ELBO: an estimate of :math:`\mathrm{KL}(q\|p)` in nats."""
        return self.log_evidence - self.elbo

    def _explored(self) -> str:
        if self.other_modes:
            return f"{self.other_modes} more mode(s) were found that it does not cover: warm_start, or NUTS from there."
        moved = f"mean by {self.drift:.2f} sd, log sd by {self.drift_sd:.2f}, acceptance {self.acceptance:.2f}"
        if self.moved:
            return f"Short MCMC leaves it ({moved}): run neutra."
        if self.correction >= _CORRECTION:
            return f"Importance weights move a mean by {self.correction:.2f} sd: use resample."
        if self.unseen:
            return f"No short MCMC was run and no modes were looked for: {self.unseen}."
        return "A mode that no start and no draw has seen stays unseen."

    def attrs(self) -> dict[str, Any]:
        """The numbers, for a container's attributes."""
        return {("khat" if k == "k" else k): v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        return (
            f"posterior: {self.status}. k-hat {self.k:.2f} (threshold {self.threshold:.2f}), ESS {self.ess:.0f} of "
            f"{self.draws}, ELBO {self.elbo:.3f} +- {self.elbo_error:.3f}, log evidence {self.log_evidence:.3f} +- "
            f"{self.log_evidence_error:.3f} nats. {_ADVICE[self.status]} {self._explored()}"
        )


@checked()
def khat(idata: Any) -> KHat:
    """The verdict on the draws of :func:`~pyro_dgm.from_svi`.

    Raises:
        ValueError: if the container has no importance weights (draws of MCMC, of an implicit guide).

    References:
        | Yao et al. (2018), "Yes, but did it work?", arXiv 1802.02538.
        | Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72).

    Example:
        >>> import numpy as np
        >>> stats = {"log_weight": np.random.default_rng(0).normal(-3.0, 0.1, (1, 2000))}
        >>> verdict = khat({"groups": {"sample_stats": stats}})
        >>> verdict.status, round(verdict.elbo, 1)
        ('good', -3.0)
    """
    log_weight = _log_weights("khat", idata)
    attrs = group_attrs(idata, "sample_stats")
    for each in fields(Exploration):
        if not isinstance(attrs.get(each.name, each.default), str if each.name == "unseen" else Real):
            raise TypeError(
                f"khat: the attribute {each.name} of sample_stats is {shown(attrs[each.name])}, expected a number."
            )
    return judge(log_weight, Exploration(**{f.name: attrs[f.name] for f in fields(Exploration) if f.name in attrs}))


def judge(log_weight: np.ndarray, explored: Exploration | None = None) -> KHat:
    """The verdict on log weights of any shape, lowered where exploration contradicts it."""
    explored = explored or Exploration()
    lw = np.asarray(log_weight, dtype=np.float64).ravel()
    n = len(lw)
    finite = lw[np.isfinite(lw)]
    elbo = -math.inf
    ess = 0.0
    k = math.inf
    if len(finite) == n:
        smoothed = lw - log_mean(lw) - math.log(n)
        if n >= LEAST_DRAWS:
            smoothed, k = psis(lw)
        elbo = float(lw.mean())
        ess = float(np.exp(-np.logaddexp.reduce(2.0 * smoothed)))
    evidence = float(log_mean(finite)) + math.log(max(len(finite), 1) / n)
    status = _status(k, k_threshold(n), ess / n, evidence - elbo, float(finite.max(initial=-math.inf)) - elbo)
    if explored.contradicts and status in ("exact", "good"):
        status = "usable"
    return KHat(
        k=k,
        threshold=k_threshold(n),
        ess=ess,
        elbo=elbo,
        elbo_error=float(finite.std() / math.sqrt(n)) if len(finite) else math.inf,
        log_evidence=evidence,
        log_evidence_error=math.sqrt(max(0.0, 1.0 / max(ess, 1.0) - 1.0 / n)),
        draws=n,
        status=status,
        **asdict(explored),
    )


def _status(k: float, threshold: float, ess: float, gap: float, top: float) -> Status:
    """``ess`` is a share of the draws, ``gap`` and ``top`` are evidence and largest log weight above the ELBO."""
    if k == -math.inf:
        return "exact"
    if not (math.isfinite(gap) and math.isfinite(k)):
        return "bad"
    if gap < _GAP and (k < threshold or (ess > _EQUAL and (k < 1.0 or top < _NO_TAIL))):
        return "good"
    if (k < threshold and ess > _USABLE) or (gap < _GAP and k < 1.0):
        return "usable"
    return "bad"


# --- Error bounds ---


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


@checked()
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
    lw = _log_weights("error_bounds", idata)
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


# --- Resampling ---


@checked()
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
    log_weight, k = psis(_log_weights("resample", idata))
    if k >= K_LIMIT:
        warnings.warn(
            f"resample: k-hat is {k:.2f}; above {K_LIMIT} importance weights do not repair the draws. See khat(idata).",
            stacklevel=2,
        )
    n = num_samples or len(log_weight)
    rng = np.random.default_rng(seed)
    return resampled(idata, rng.permutation(stratified(np.exp(log_weight), n, rng.random(n))))
