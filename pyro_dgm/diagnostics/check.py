"""``check``: one page in words and one picture about a posterior, from its container alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyro_dgm.core.weights import psis
from pyro_dgm.diagnostics.containers import group, group_attrs, has_group
from pyro_dgm.diagnostics.khat import KHat, khat
from pyro_dgm.diagnostics.loo import loo

__all__ = ["Page", "check"]

_STATISTICS: dict[str, Any] = {"mean": np.mean, "sd": np.std, "least": np.min, "largest": np.max}


@dataclass(frozen=True)
class Page:
    """What :func:`check` found: print it, and draw it with :meth:`picture`.

    Attributes:
        verdict: of :func:`~pyro_dgm.khat`; None for draws without weights (MCMC).
        elpd: corrected elpd in nats, its standard error over data and the largest Pareto k of a datum, by variable.
        predictive: share of predictive data sets whose statistic is above the data's, ``{(site, statistic): share}``.
        warnings: what was said on the way.
        idata: the container.
    """

    verdict: KHat | None
    elpd: dict[str, tuple[float, float, float]]
    predictive: dict[tuple[str, str], float]
    warnings: tuple[str, ...]
    idata: Any

    @property
    def misfits(self) -> list[str]:
        """Statistics of the data that hardly any predictive data set reaches."""
        return [f"{s} of {k}" for (k, s), share in self.predictive.items() if min(share, 1.0 - share) < 0.01]

    def __str__(self) -> str:
        lines = ["1. The posterior"]
        lines += (
            [f"   {self.verdict}"]
            if self.verdict
            else ["   Draws without importance weights: read R-hat, ESS and divergences."]
        )
        lines += ["2. Prediction, leave-one-out"]
        for name, (elpd, error, k) in self.elpd.items():
            lines.append(f"   {name}: elpd {elpd:.2f} +- {error:.2f} nats (over data), largest Pareto k {k:.2f}.")
        lines += [f"   {text}" for text in self.warnings]
        lines += [
            "   No log_likelihood." if not self.elpd and not self.warnings else "",
            "3. Does the model give such data?",
        ]
        for name in dict.fromkeys(k for k, _ in self.predictive):
            shares = ", ".join(f"{s} {share:.2f}" for (k, s), share in self.predictive.items() if k == name)
            lines.append(f"   {name}: share of predictive data sets above the data, by statistic: {shares}.")
        lines += [
            "   No posterior_predictive." if not self.predictive else "",
            "4. What to do next",
            f"   {self._advice()}",
        ]
        return "\n".join(line for line in lines if line)

    def _advice(self) -> str:
        if self.verdict is not None and self.verdict.status == "bad":
            return "First the posterior: train longer, reparameterise, or neutra. Nothing else on this page can be trusted."
        if self.verdict is not None and self.verdict.status == "usable":
            return "resample(idata) and read this page again, or train longer."
        if self.misfits:
            return f"The posterior is fine, the model is not: it does not give the {', '.join(self.misfits)}. Change the model."
        if any(k > 0.7 for *_, k in self.elpd.values()):
            return (
                "Some data are very influential: look at az.plot_khat(loo(idata)), and at a heavier-tailed likelihood."
            )
        return "Use it. A fault that the model shares with its data, or a mode nobody saw, is not on this page."

    def picture(self, path: str | Path) -> None:
        """Four panels: weights, evidence and its gap, Pareto k of each datum, predictive statistics."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 7), layout="constrained")
        panels = figure.subplots(2, 2)
        for draw, ax in zip((_weights, _evidence, _influence, _statistics), panels.ravel(), strict=True):
            draw(self, ax)
        figure.savefig(path, dpi=110)


def check(idata: Any) -> Page:
    """One page about a posterior: verdict of the weights, corrected loo, predictive check, and what to do next.

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
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        elpd = _elpds(idata) if has_group(idata, "log_likelihood") else {}
    predictive = _predictive(idata) if has_group(idata, "posterior_predictive") else {}
    if verdict is None and not elpd and not predictive:
        raise ValueError(
            "check: the container has neither weights nor log_likelihood nor posterior_predictive; see from_svi."
        )
    texts = tuple(dict.fromkeys(str(w.message) for w in said if issubclass(w.category, UserWarning)))
    return Page(verdict, elpd, predictive, texts, idata)


def _elpds(idata: Any) -> dict[str, tuple[float, float, float]]:
    stats = group(idata, "sample_stats")
    correct = "log_q" in stats or group_attrs(idata, "/").get("inference_method") in ("mcmc", "neutra")
    found = {}
    for name in group(idata, "log_likelihood"):
        r = loo(idata, name, correct=correct)
        elpd = r["elpd_loo"] if "elpd_loo" in dir(r) else r.elpd
        found[name] = (float(elpd), float(r.se), float(np.max(np.asarray(r.pareto_k))))
    return found


def _predictive(idata: Any) -> dict[tuple[str, str], float]:
    """Mid-p shares: ties count half."""
    new, data, shares = group(idata, "posterior_predictive"), group(idata, "observed_data"), {}
    for name in sorted(set(new) & set(data)):
        y = np.asarray(data[name], dtype=np.float64)
        there = ~np.isnan(y)
        rows = new[name].reshape(-1, *y.shape)[:, there].astype(np.float64)
        for label, statistic in _STATISTICS.items() if there.any() else ():
            values, at = statistic(rows, axis=1), statistic(y[there])
            shares[name, label] = float((values > at).mean() + 0.5 * (values == at).mean())
    return shares


def _weights(page: Page, ax: Any) -> None:
    if page.verdict is None:
        return _empty(ax, "no importance weights")
    lw = group(page.idata, "sample_stats")["log_weight"].ravel()
    low = np.quantile(lw, 0.01) - 3.0  # a few draws far below the rest would be all that is seen
    ax.hist(np.clip(lw, low, None) - lw.mean(), 60, color="C0", alpha=0.7)
    ax.set(
        title=f"log p - log q: {page.verdict.status}", xlabel="log weight - mean (nats)", ylabel="draws", yscale="log"
    )
    text = (
        f"k-hat {page.verdict.k:.2f} ({page.verdict.threshold:.2f})\nESS {page.verdict.ess:.0f} of {page.verdict.draws}"
    )
    ax.text(0.03, 0.95, text, transform=ax.transAxes, va="top")


def _evidence(page: Page, ax: Any) -> None:
    v = page.verdict
    if v is None:
        return _empty(ax, "no evidence without weights")
    values, errors = [v.elbo, v.log_evidence], [2 * v.elbo_error, 2 * v.log_evidence_error]
    ax.errorbar(values, [1, 0], xerr=errors, fmt="o", color="C1", capsize=4)
    ax.set(
        yticks=[1, 0], yticklabels=["ELBO", "log evidence"], ylim=(-0.6, 1.6), xlabel="nats (bars: 2 standard errors)"
    )
    ax.locator_params(axis="x", nbins=4)
    ax.set_title(f"gap {v.gap:.3f} nats: an estimate of KL(q||p)")


def _influence(page: Page, ax: Any) -> None:
    if not page.elpd:
        return _empty(ax, "no log_likelihood")
    stats = group(page.idata, "sample_stats")
    offset = stats["lp"] - stats["log_q"] if "log_q" in stats else 0.0
    for i, name in enumerate(page.elpd):
        ll = group(page.idata, "log_likelihood")[name]
        rows = ll.reshape(ll.shape[0] * ll.shape[1], -1)[:, :2000].astype(np.float64)
        k = [psis(np.ravel(offset) - column if np.ndim(offset) else -column)[1] for column in rows.T]
        ax.plot(
            np.clip(k, -1.0, 2.0),
            ".",
            color=f"C{i}",
            label=f"{name}: elpd {page.elpd[name][0]:.1f} +- {page.elpd[name][1]:.1f}",
        )
    ax.axhline(0.7, color="k", lw=0.8, ls="--")
    ax.set(title="Pareto k, leaving one datum out", xlabel="datum", ylabel="k (above 0.7: unreliable)")
    ax.legend(frameon=False)


def _statistics(page: Page, ax: Any) -> None:
    if not page.predictive:
        return _empty(ax, "no predictive draws")
    labels = [f"{s} of {k}" for k, s in page.predictive]
    shares = np.array(list(page.predictive.values()))
    colours = ["C3" if min(p, 1 - p) < 0.01 else "C0" for p in shares]
    ax.barh(labels, shares - 0.5, left=0.5, color=colours)
    ax.set(xlim=(0, 1), title="predictive check", xlabel="share of predictive data sets above the data")
    ax.invert_yaxis()


def _empty(ax: Any, text: str) -> None:
    ax.text(0.5, 0.5, text, ha="center", transform=ax.transAxes)
    ax.set_axis_off()
