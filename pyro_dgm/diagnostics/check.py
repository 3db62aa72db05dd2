r"""What a container alone gives: one page and one picture (``check``), and bounds of errors.

**Error bounds.** With :math:`D_2 = \log E_q[(p/q)^2]` the chi-square divergence is :math:`e^{D_2} - 1`. By Cauchy and Schwarz
:math:`|E_p f - E_q f| \le \mathrm{sd}_q(f) \sqrt{e^{D_2} - 1}`, and the Wasserstein distance of a coordinate is
:math:`W_2 \le 2\, E_q[(\theta - m)^4]^{1/4} (e^{D_2} - 1)^{1/4}`, which bounds the difference of standard deviations.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_dgm.core.kinds import checked
from pyro_dgm.core.weights import K_LIMIT, log_mean, psis
from pyro_dgm.diagnostics.containers import fault_of, group, has_group, log_weights_of, uniform_by_ks, uniform_p
from pyro_dgm.diagnostics.khat import KHat, Rows, khat
from pyro_dgm.diagnostics.loo import elpd_of, loo, loo_pit
from pyro_dgm.diagnostics.sensitivity import Sensitivity, power_scaling

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ErrorBounds", "Report", "check", "error_bounds"]

_STATISTICS: dict[str, Callable[..., Any]] = {"mean": np.mean, "sd": np.std, "least": np.min, "largest": np.max}
_RARE = 0.01  # share of predictive data sets, on either side, below which data are unusual; chosen by hand
_LEAST_RANKS = 8  # data of a variable below which nothing is said of their ranks; chosen by hand
_D2_SMALL = 0.1  # nats; this and the next as in viabel, the package of Huggins et al. (2020)
_D2_LARGE = 4.6  # nats
_KS = 1.63  # times 1/sqrt(n): the distance that uniform numbers exceed once in 100
_SHOWN = 2000  # data of a variable in the picture; chosen by hand


@dataclass(frozen=True)
class Report:
    """What :func:`check` found: print it, and draw it with :meth:`picture`.

    Attributes:
        verdict: of :func:`~pyro_dgm.khat`; None for draws without weights (MCMC).
        elpd: corrected elpd in nats, its standard error over data and the largest Pareto k of a datum, by variable.
        pareto_k: of every datum, leaving it out, by variable.
        predictive: share of predictive data sets whose statistic is above the data's, ``{(site, statistic): share}``.
        pit: rank of each datum among its leave-one-out predictions, in (0, 1), by variable; uniform where they are right.
        pit_p: p-value of that, by variable: of ArviZ 1.x's test, or by Kolmogorov and Smirnov.
        sensitivity: of the latents to powers of prior and likelihood, and what is said of each: ``sensitivity.diagnoses``.
        warnings: what was said on the way.
        idata: the container.
    """

    verdict: KHat | None
    elpd: dict[str, tuple[float, float, float]]
    pareto_k: dict[str, np.ndarray]
    predictive: dict[tuple[str, str], float]
    pit: dict[str, np.ndarray]
    pit_p: dict[str, float]
    sensitivity: Sensitivity
    warnings: tuple[str, ...]
    idata: Any

    @property
    def misfits(self) -> list[str]:
        """Statistics of the data that hardly any predictive data set reaches, and data whose ranks are not uniform."""
        rare = [f"{statistic} of {site}" for (site, statistic), share in self.predictive.items() if _is_rare(share)]
        return rare + [
            f"spread of {k} (predictions are {fault_of(self.pit[k])})" for k, p in self.pit_p.items() if p < _RARE
        ]

    def __str__(self) -> str:
        parts = {
            "1. The posterior": [
                str(self.verdict or "Draws without importance weights: read R-hat, ESS and divergences.")
            ],
            "2. Prediction, leave-one-out": self._prediction() or [self._no_prediction()],
            "3. Does the model give such data?": self._predictive_check() or ["No posterior_predictive."],
            "4. How much do prior and data decide?": self.sensitivity.lines(),
            "5. What to do next": [self._advice()],
        }
        return "\n".join(line for title, lines in parts.items() for line in [title, *(f"   {text}" for text in lines)])

    def _prediction(self) -> list[str]:
        values = [
            f"{name}: elpd {elpd:.2f} +- {error:.2f} nats (over data), largest Pareto k {k:.2f}."
            for name, (elpd, error, k) in self.elpd.items()
        ]
        return [*values, *self.warnings]

    def _no_prediction(self) -> str:
        if self.verdict is None or not self.verdict.independent:
            return "No log_likelihood."
        return "Rows share no latent, so that what is left out is predicted by the prior alone: its elpd is the log evidence."

    def _predictive_check(self) -> list[str]:
        lines = []
        for name in dict.fromkeys(site for site, _ in self.predictive):
            shares = ", ".join(f"{s} {share:.2f}" for (site, s), share in self.predictive.items() if site == name)
            lines.append(f"{name}: share of predictive data sets above the data, by statistic: {shares}.")
            if name in self.pit_p:
                p = self.pit_p[name]
                fault = (
                    f"not uniform: predictions are {fault_of(self.pit[name])}"
                    if p < _RARE
                    else "uniform, as they should be"
                )
                lines.append(f"{name}: ranks of the data among leave-one-out predictions: p = {p:.2g}, {fault}.")
        return lines

    def _advice(self) -> str:
        verdict = self.verdict
        if verdict is not None and verdict.status == "bad":
            return f"First the posterior. {verdict.next_step} Nothing else on this page can be trusted."
        if verdict is not None and verdict.status == "usable":
            return f"{verdict.next_step} Then read this page again."
        if self.misfits:
            return f"The posterior is fine, the model is not: it does not give the {', '.join(self.misfits)}. Change the model."
        if any(k > K_LIMIT for *_, k in self.elpd.values()):
            return (
                "Some data are very influential, which no better guide changes: look at az.plot_khat(loo(idata)), leave them out "
                "once, and try a likelihood with heavier tails."
            )
        if self.sensitivity.diagnoses:
            scaled = ", ".join(self.sensitivity.scaled)
            return f"Use it if the prior of {scaled} was meant: it decides with the data, or against them."
        return "Use it. A fault that the model shares with its data, or a mode nobody saw, is not on this page."

    def picture(self, path: str | Path) -> None:
        """Panels: weights, evidence and its gap, Pareto k of each datum, predictive statistics, ranks, sensitivities."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(16, 7), layout="constrained")
        panels = figure.subplots(2, 3)
        drawn = (_weights, _evidence, _influence, _statistics, _ranks, _sensitivity)
        for draw, ax in zip(drawn, panels.flat, strict=True):
            draw(self, ax)
        figure.savefig(path, dpi=110)


@checked()
def check(idata: Any) -> Report:
    """One page about a posterior: verdict, corrected loo, predictive check, sensitivity to prior and data, and what to do next.

    Args:
        idata: a container of :func:`~pyro_dgm.from_svi`, :func:`~pyro_dgm.from_pyro_mcmc` or others of this package.

    Raises:
        ValueError: if there is nothing to judge: no weights, no log-likelihood and no predictive draws.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("item", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> x = torch.tensor([-1.0, 0.0, 1.0])
        >>> start = pyro.infer.autoguide.init_to_value(values={"mu": torch.tensor(0.0)})
        >>> guide = dgm.AutoFlow(model, init_loc_fn=start, init_scale=0.5).setup(x)  # the exact posterior
        >>> print(str(check(dgm.from_svi(model, guide, x, seed=0))).splitlines()[-1])
           Use it. A fault that the model shares with its data, or a mode nobody saw, is not on this page.
    """
    weighted = has_group(idata, "sample_stats") and "log_weight" in group(idata, "sample_stats")
    verdict = khat(idata) if weighted else None
    independent = verdict is not None and verdict.independent
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results = _loo_by_variable(idata) if has_group(idata, "log_likelihood") and not independent else {}
    predictive = _predictive(idata) if has_group(idata, "posterior_predictive") else {}
    if verdict is None and not results and not predictive:
        raise ValueError(
            "check: the container has neither weights nor log_likelihood nor posterior_predictive; see from_svi."
        )
    pareto_k = {name: np.asarray(result.pareto_k).ravel() for name, result in results.items()}
    elpd = {name: (elpd_of(r), float(r.se), float(pareto_k[name].max())) for name, r in results.items()}
    texts = tuple(dict.fromkeys(str(w.message) for w in said if issubclass(w.category, UserWarning)))
    pit = _ranked(idata) if results and predictive else {}
    pit_p = {name: uniform_p(ranks, uniform_by_ks) for name, ranks in pit.items()}
    return Report(verdict, elpd, pareto_k, predictive, pit, pit_p, power_scaling(idata, verdict), texts, idata)


def _loo_by_variable(idata: Any) -> dict[str, Any]:
    correct = "log_q" in group(idata, "sample_stats")
    return {name: loo(idata, name, correct=correct) for name in group(idata, "log_likelihood")}


def _predictive(idata: Any) -> dict[tuple[str, str], float]:
    """Mid-p shares: ties count half."""
    new = group(idata, "posterior_predictive")
    data = group(idata, "observed_data")
    shares = {}
    for name in sorted(set(new) & set(data)):
        y = np.asarray(data[name], dtype=np.float64)
        there = ~np.isnan(y)
        if not there.any():
            continue
        rows = new[name].reshape(-1, *y.shape)[:, there].astype(np.float64)
        for label, statistic in _STATISTICS.items():
            values = statistic(rows, axis=1)
            at = statistic(y[there])
            shares[name, label] = float((values > at).mean() + 0.5 * (values == at).mean())
    return shares


def _ranked(idata: Any) -> dict[str, np.ndarray]:
    """Ranks of data among leave-one-out predictions, of variables of some data."""
    ranks = {name: loo_pit(idata, name) for name in group(idata, "log_likelihood")}
    return {name: each for name, each in ranks.items() if len(each) >= _LEAST_RANKS}


def _is_rare(share: float) -> bool:
    return min(share, 1.0 - share) < _RARE


# --- The four panels ---


def _weights(report: Report, ax: Axes) -> None:
    v = report.verdict
    if v is None:
        return _empty(ax, "no importance weights")
    if v.rows is not None and v.independent:
        return _row_khats(v.rows, v, ax)
    lw = group(report.idata, "sample_stats")["log_weight"].ravel()
    low = np.quantile(lw, 0.01) - 3.0  # a few draws far below the rest would be all that is seen
    ax.hist(np.clip(lw, low, None) - lw.mean(), 60, color="C0", alpha=0.7)
    ax.set(title=f"log p - log q: {v.status}", xlabel="log weight - mean (nats)", ylabel="draws", yscale="log")
    text = f"k-hat {v.k:.2f} ({v.threshold:.2f})\nESS {v.ess:.0f} of {v.draws}"
    if v.rows is not None:
        text += f"\nrows given {v.rows.given}:\n{v.rows.shares[0]} good"
    ax.text(0.03, 0.95, text, transform=ax.transAxes, va="top")


def _row_khats(rows: Rows, v: KHat, ax: Axes) -> None:
    """Rows have weights of their own; those of all rows together are never of use."""
    ax.hist(np.clip(np.asarray(rows.k), -1.0, 2.0), 40, color="C0", alpha=0.7)
    ax.axvline(v.threshold, color="k", lw=0.8, ls="--")
    ax.set(
        title=f"{rows.total} rows of plate '{rows.plate}': {v.status}",
        xlabel="k-hat of a row, clipped to (-1, 2)",
        ylabel="rows",
    )
    shares = "\n".join(f"{share} {what}" for share, what in zip(rows.shares, ("good", "usable", "bad"), strict=True))
    ax.text(0.03, 0.95, shares, transform=ax.transAxes, va="top")


def _evidence(report: Report, ax: Axes) -> None:
    v = report.verdict
    if v is None:
        return _empty(ax, "no evidence without weights")
    known = np.isfinite(v.log_evidence_error)
    errors = [2 * v.elbo_error, 2 * v.log_evidence_error if known else 0.0]
    ax.errorbar([v.elbo, v.log_evidence], [1, 0], xerr=errors, fmt="o", color="C1", capsize=4)
    name = "log evidence" if known else "log evidence,\nerror unknown"
    ax.set(yticks=[1, 0], yticklabels=["ELBO", name], ylim=(-0.6, 1.6))
    ax.set(xlabel="nats (bars: 2 standard errors)", title=f"gap {v.gap:.3f} nats: an estimate of KL(q||p)")
    ax.locator_params(axis="x", nbins=4)


def _influence(report: Report, ax: Axes) -> None:
    v = report.verdict
    if v is not None and v.rows is not None and v.independent:
        ax.plot(np.asarray(v.rows.gap), ".")
        ax.set(title="gap of each row that was looked at", xlabel="row", ylabel="KL(q||p) (nats)")
        return None
    if not report.elpd:
        return _empty(ax, "no log_likelihood")
    for name, (elpd, error, _) in report.elpd.items():
        k = report.pareto_k[name][:_SHOWN]
        ax.plot(np.clip(k, -1.0, 2.0), ".", label=f"{name}: elpd {elpd:.1f} +- {error:.1f}")
    ax.axhline(K_LIMIT, color="k", lw=0.8, ls="--")
    ax.set(title="Pareto k, leaving one datum out", xlabel="datum", ylabel=f"k (above {K_LIMIT}: unreliable)")
    of_text = {"handlelength": 0, "handletextpad": 0, "markerscale": 0}  # a marker would be read as a datum
    ax.legend(frameon=False, labelcolor="linecolor", **of_text)
    ax.locator_params(axis="x", integer=True)


def _statistics(report: Report, ax: Axes) -> None:
    if not report.predictive:
        return _empty(ax, "no predictive draws")
    labels = [f"{statistic} of {site}" for site, statistic in report.predictive]
    shares = np.array(list(report.predictive.values()))
    ax.barh(labels, shares - 0.5, left=0.5, color=["C3" if _is_rare(p) else "C0" for p in shares])
    ax.set(xlim=(0, 1), title="predictive check", xlabel="share of predictive data sets above the data")
    ax.invert_yaxis()


def _ranks(report: Report, ax: Axes) -> None:
    """ECDF minus that of uniform ranks, with the two lines that Kolmogorov and Smirnov reject beyond at 1 %."""
    if not report.pit:
        return _empty(ax, "no ranks of data")
    for name, pit in report.pit.items():
        x = np.sort(pit)
        ax.step(x, np.arange(1, len(x) + 1) / len(x) - x, where="post", label=f"{name}: p = {report.pit_p[name]:.2g}")
    beyond = _KS / np.sqrt(min(map(len, report.pit.values())))
    for y in (-beyond, beyond):
        ax.axhline(y, color="k", lw=0.8, ls="--")
    ax.set(title="leave-one-out ranks of the data", xlabel="rank", ylabel="ECDF minus that of uniform ranks")
    ax.legend(frameon=False)


def _sensitivity(report: Report, ax: Axes) -> None:
    report.sensitivity.panel(ax)


def _empty(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, ha="center", transform=ax.transAxes)
    ax.set_axis_off()


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
