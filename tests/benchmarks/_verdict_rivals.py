"""Verdicts of others on the same draws and weights, written from their code or paper: none of them needs more than these.

Each says "good" or not. NumPyro 0.20's ``psis_diagnostic`` is Pareto k of 1,000 draws, with .7 for unreliable; viabel 0.5 calls a fit
whose k is below .7 good where its bound on D2 is below .1 nats; sbi 0.27 calls one good where Pareto k is below .5 ("psis"), or where
q explains more than half of the variance of p at draws of q ("prop"). The workflow of Li et al. (2024) for an amortised guide
accepts its draws where the data are within the 95 % of the simulations, by Mahalanobis distance, and k is below .7.
"""

import numpy as np

import pyro_dgm as dgm
from pyro_dgm.core.weights import K_LIMIT, psis

NAMES = {"k-hat < 0.7 (NumPyro)": "k", "viabel, D2 < 0.1": "viabel", "viabel, D2 < 4.6": "viabel_weak",
         "sbi, psis < 0.5": "sbi_psis", "sbi, psis < 1": "sbi_psis_weak", "sbi, prop > 0.5": "sbi_prop"}  # fmt: skip


def rivals(idata):
    """By name, whether each calls the fit good."""
    stats = idata["groups"]["sample_stats"]
    lw = np.asarray(stats["log_weight"]).ravel()
    k, level = psis(lw)[1], dgm.error_bounds(idata).verdict
    return {"k": bool(k < K_LIMIT), "viabel": level == "small",
            "viabel_weak": level in ("small", "use weights"), "sbi_psis": bool(k < 0.5), "sbi_psis_weak": bool(k < 1.0),
            "sbi_prop": bool(explained(*(np.asarray(stats[n]).ravel() for n in ("lp", "log_q"))) > 0.5)}  # fmt: skip


def explained(lp, log_q):
    """R squared of p by a multiple of q; both are divided by their largest, without which theirs is 0 / 0 in most posteriors."""
    x, y = np.exp(log_q - log_q.max()), np.exp(lp - lp.max())
    left = y - x * (x @ y) / (x @ x)
    total = ((y - y.mean()) ** 2).sum()
    return 1.0 - float((left**2).sum() / total) if total > 0 else 0.0


def within_simulations(summaries, observed):
    """Whether a data set's summaries are nearer to the simulations' mean than 95 % of these are, by Mahalanobis distance."""
    centred = summaries - summaries.mean(0)
    inverse = np.linalg.pinv(np.cov(centred, rowvar=False))
    distance = lambda x: ((x @ inverse) * x).sum(-1)
    return bool(distance(observed - summaries.mean(0)) <= np.quantile(distance(centred), 0.95))
