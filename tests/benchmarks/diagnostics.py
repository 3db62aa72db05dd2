"""Posterior diagnostics: speed of conversion, leave-one-out of six fits of eight schools, power of calibration.

Exact values of eight schools by quadrature: elpd -30.742, log evidence -31.311.
"""

import time
import warnings

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam

import pyro_dgm as dgm

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
ELPD = -30.742


def non_centred(error, effect=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(error)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mu + tau * eta, error), obs=effect)


def centred(error, effect=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(error)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, error), obs=effect)


near = pyro.poutine.reparam(centred, config={"theta": LocScaleReparam(centered=0.2)})
FITS = [
    ("non-centred", non_centred, AutoMultivariateNormal),
    ("non-centred", non_centred, AutoNormal),
    ("0.2-centred", near, AutoMultivariateNormal),
    ("0.2-centred", near, AutoLowRankMultivariateNormal),
    ("centred", centred, AutoMultivariateNormal),
    ("centred", centred, AutoNormal),
    ("centred", centred, dgm.AutoFlow),
]


def fitted(model, make, seed):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = make(model)
    if make is dgm.AutoFlow:
        dgm.fit(dgm.STL_ELBO()(model, guide), (ERROR, EFFECT), progress=False, seed=seed)
        return guide
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.997}),
              Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=1))  # fmt: skip
    for _ in range(1_500):
        svi.step(ERROR, EFFECT)
    return guide


def loo_rows(seeds):
    import arviz as az

    print(
        f"{'model':14s}{'guide':34s}{'seed':>4s}{'k-hat':>7s}{'k_i':>6s}{'ELBO':>9s}{'evidence':>10s}{'az.loo':>9s}{'loo':>9s}{'mcse':>7s}"
    )
    for seed in seeds:
        for name, model, make in FITS:
            guide = fitted(model, make, seed)
            idata = dgm.from_svi(
                model, guide, ERROR, EFFECT, num_samples=4_000, prior=0, seed=1, check=False, posterior_predictive=False
            )
            verdict, result, naive = dgm.khat(idata), dgm.loo(idata), az.loo(idata)
            row = {"model": name, "guide": make.__name__, "seed": seed, "khat": verdict.k, "k_i": float(result.pareto_k.max()),
                   "elbo": verdict.elbo, "log_evidence": verdict.log_evidence, "naive": float(naive.elpd_loo),
                   "corrected": float(result.elpd_loo), "mcse": result.mcse,
                   "warned": bool(result.pareto_k.max() > 0.7 or verdict.status == "bad")}  # fmt: skip
            print(f"{name:14s}{make.__name__:34s}{seed:4d}{row['khat']:7.2f}{row['k_i']:6.2f}{row['elbo']:9.2f}{row['log_evidence']:10.2f}"
                  f"{row['naive']:9.2f}{row['corrected']:9.2f}{row['mcse']:7.2f}{'  warned' if row['warned'] else ''}", flush=True)  # fmt: skip
            yield row


def broadcasts_not(error, effect=None):
    """The same posterior, in a model that runs many draws by torch.vmap only."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    eta = pyro.sample("eta", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
    with pyro.plate("school", 8):
        pyro.sample("effect", dist.Normal(mu + tau * torch.stack([eta[i] for i in range(8)]), error), obs=effect)


def speed_rows(draws=4_000):
    """Posterior, log-likelihood, predictive and prior draws; the loop is timed on a tenth of the draws, per draw."""
    for name, model in (("plate", non_centred), ("vmap", broadcasts_not)):
        pyro.clear_param_store()
        guide = AutoNormal(model)
        dgm.from_svi(model, guide, ERROR, EFFECT, num_samples=50, prior=5, check=False)  # imports ArviZ
        cost = {}
        for parallel, n in (("auto", draws), (False, draws // 10)):
            start = time.process_time()
            dgm.from_svi(
                model, guide, ERROR, EFFECT, num_samples=n, prior=n, parallel=parallel, check=False, container="dict"
            )
            cost[parallel] = (time.process_time() - start) / n
        row = {"way": name, "draws": draws, "seconds": cost["auto"] * draws, "one_by_one": cost[False] * draws}
        print(f"{name:6s} {draws} draws: {row['seconds']:.3f} CPU s together, {row['one_by_one']:.1f} one by one, "
              f"ratio {row['one_by_one'] / row['seconds']:.0f}", flush=True)  # fmt: skip
        yield row


def calibration_rows(seeds):
    """A conjugate plane normal, 300 simulations x 199 draws; p-values of three methods."""
    from tests.diagnostics.test_calibration import Amortised, model

    faults = {
        "exact": (1.0, 0.0),
        "sd x 0.7": (0.7, 0.0),
        "sd x 1.4": (1.4, 0.0),
        "bias 0.5 sd": (1.0, 0.5),
        "sd x 0.85": (0.85, 0.0),
    }
    for name, fault in faults.items():
        for seed in seeds:
            p = {
                f.__name__: f(model, Amortised(*fault), observed=["x"], seed=seed).p_value
                for f in (dgm.sbc, dgm.coverage, dgm.tarp)
            }
            print(f"{name:12s} seed {seed}: " + ", ".join(f"{k} p = {v:.1e}" for k, v in p.items()), flush=True)
            yield {"fault": name, "seed": seed, **p}


def main(arguments):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parts = {
        "speed": speed_rows,
        "loo": lambda: loo_rows(arguments.seeds),
        "calibration": lambda: calibration_rows(arguments.seeds),
    }
    rows = [{"part": k, **row} for k, make in parts.items() if k in (arguments.only or parts) for row in make()]
    good = [r for r in rows if r["part"] == "loo" and not r["warned"]]
    if good:
        print(f"fits without a warning: largest |corrected - {ELPD}| {max(abs(r['corrected'] - ELPD) for r in good):.3f}, "
              f"largest |az.loo - {ELPD}| {max(abs(r['naive'] - ELPD) for r in good):.3f}")  # fmt: skip
    return rows
