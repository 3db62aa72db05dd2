"""What the page of ``check`` says by chance, and what it sees: ``--only uniformity ranks chance``.

Uniformity: tests of ranks of 300 simulations x 199 draws of a normal, share rejected at 1 %; ArviZ 1.x's where it is
installed. Ranks: share of data sets whose leave-one-out ranks have p < 0.01. Chance: latents of a flat prior beside some of a
strong one, share above 0.05 and share of pages that name one.
"""

import numpy as np
from scipy import stats

from pyro_dgm.diagnostics.calibration import _by_chi2, ranks
from pyro_dgm.diagnostics.containers import uniform_by_ks, uniform_p
from pyro_dgm.diagnostics.loo import loo_pit
from pyro_dgm.diagnostics.sensitivity import power_scaling

TESTS = {
    "arviz": lambda pit: uniform_p(pit, lambda _: np.nan),
    "chi-square": _by_chi2,
    "kolmogorov-smirnov": uniform_by_ks,
}


def uniformity(rng):
    cases = [("exact", 1.0, 0.0, 3_000), *((f"sd {s}", s, 0.0, 300) for s in (0.7, 0.85, 0.9, 1.15, 1.4))]
    cases += [(f"off by {b}", 1.0, b, 300) for b in (0.2, 0.3, 0.5)]
    for name, scale, bias, repeats in cases:
        for method in ("sbc", "coverage") if not bias else ("sbc",):
            found = []
            for _ in range(repeats):
                truth, draws = rng.normal(size=300), bias + scale * rng.normal(size=(300, 199))
                pit = ranks(draws, truth, rng) if method == "sbc" else ranks(draws**2, truth**2, rng)
                found.append([test(pit) < 0.01 for test in TESTS.values()])
            yield {"what": f"{method}, {name}"} | dict(zip(TESTS, np.mean(found, 0).round(4).tolist(), strict=True))


def normal(y, rng, n=500):
    variance = (len(y) - 1) * y.var(ddof=1) / rng.chisquare(len(y) - 1, n)
    mu, sd = y.mean() + np.sqrt(variance / len(y)) * rng.normal(size=n), np.sqrt(variance)
    law = stats.norm(mu[:, None], sd[:, None])
    return law.logpdf(y), law.rvs((n, len(y)), rng)


def poisson(y, rng, n=500):
    law = stats.poisson(rng.gamma(y.sum() + 1.0, 1.0 / (len(y) + 0.1), n)[:, None])
    return law.logpmf(y), law.rvs((n, len(y)), rng).astype(float)


def of_data(rng):
    cases = {
        "normal": (lambda: rng.normal(2.0, 3.0, 50), normal, 200),
        "Poisson": (lambda: rng.poisson(1.5, 50), poisson, 200),
        "t3 under a normal": (lambda: rng.standard_t(3, 200), normal, 20),
        "negative binomial under a Poisson": (lambda: rng.negative_binomial(2, 0.5, 100), poisson, 20),
        "exponential under a normal": (lambda: rng.exponential(size=100), normal, 20),
    }
    for name, (data, model, repeats) in cases.items():
        found = []
        for _ in range(repeats):
            y = data().astype(float)
            ll, new = model(y, rng)
            groups = {"log_likelihood": ll, "posterior_predictive": new}
            groups = {k: {"y": v[None]} for k, v in groups.items()} | {"observed_data": {"y": y}, "sample_stats": {}}
            found.append(uniform_p(loo_pit({"groups": groups}, "y"), uniform_by_ks) < 0.01)
        yield {"what": f"ranks, {name}", "rejected": float(np.mean(found))}


def chance(rng):
    for strong in (1, 10, 50, 200):
        found = []
        for _ in range(20):
            z, flat = rng.normal(size=(1, 1_000, strong)), rng.normal(size=(1, 1_000, 10))
            flat[..., 5:] = np.exp(flat[..., 5:])
            priors = {"z": -0.5 * (z**2).sum(-1), "flat": 0.0 * flat[..., 0]}
            groups = {"posterior": {"z": z, "flat": flat}, "log_prior": priors, "log_likelihood": {"y": -0.5 * flat**2}}
            said = power_scaling({"groups": groups}, None)
            named = [k for k in said.diagnoses if k.startswith("flat")]
            above = np.mean([v > 0.05 for k, v in said.prior.items() if k.startswith("flat")])
            found.append((above, bool(named), (len(said.diagnoses) - len(named)) / strong))
        names = ("flat above 0.05", "pages that name one", "strong ones named")
        yield {"what": f"chance, {strong} strong priors"} | dict(
            zip(names, np.mean(found, 0).round(3).tolist(), strict=True)
        )


def main(arguments):
    rows = []
    for name, part in {"uniformity": uniformity, "ranks": of_data, "chance": chance}.items():
        if not arguments.only or name in arguments.only:
            for row in part(np.random.default_rng(arguments.seeds[0])):
                rows.append(row)
                print(row, flush=True)
    return rows
