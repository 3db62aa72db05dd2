"""Real posteriors with reference draws: AutoFlow by default, and stock guides and NUTS on the same models.

Needs the folder ``../shared/posteriordb`` beside the checkout (or ``--folder``). float64, one thread, CPU seconds.
Columns: k-hat; largest |mean - reference| / sd; largest |log(sd / reference sd)|; bridge-sampled evidence - ELBO;
seconds; effective draws per second (of the fit, or of NUTS' slowest coordinate); the verdict. A fit is within the bars with k < 0.7, both errors < 0.1 and |evidence - ELBO| < 0.1 together.
"""

import pathlib
import signal
import sys
import time
import warnings
from contextlib import contextmanager

import arviz as az
import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.optim import ClippedAdam

import pyro_dgm as dgm

FOLDER = pathlib.Path(__file__).parents[3] / "shared" / "posteriordb"
STOCK = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal, "AutoIAFNormal": AutoIAFNormal}
HEAD = f"{'posterior':42s}{'method':>24s}{'D':>4s}{'k-hat':>7s}{'mean':>9s}{'sd':>7s}{'KL':>9s}{'CPU s':>7s}{'ESS/s':>7s}  verdict"


def by_flow(model, data, seed):
    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO()(model, guide), (data,), progress=False, seed=seed)
    return guide


def by_stock(make_guide):
    def fit(model, data, seed):
        guide = make_guide(model)
        svi = SVI(
            model, guide, ClippedAdam({"lr": 1e-2, "lrd": 0.01 ** (1 / 2000)}), Trace_ELBO(16, vectorize_particles=True)
        )
        for _ in range(2_000):
            svi.step(data)
        return guide

    return fit


def judged(p, guide):
    """Scores of a guide against the reference."""
    idata = dgm.from_svi(p.model, guide, p.data, num_samples=4_000, prior=0, log_likelihood=False,
                         posterior_predictive=False, container="dict")  # fmt: skip
    latents = [k for k, *_ in p.sites]
    draws = {k: torch.as_tensor(idata["groups"]["posterior"][k][0]) for k in latents}
    verdict = dgm.khat(idata)
    return {
        **errors(p, draws),
        "khat": verdict.k,
        **({} if p.logZ is None else {"kl": p.logZ - verdict.elbo}),
        "ess": verdict.ess,
        "verdict": verdict.status,
    }


def errors(p, draws):
    matrix = p.matrix(draws)
    mean = np.abs(matrix.mean(0) - p.ref_mean) / p.ref_sd
    return {"mean": float(mean.max()), "sd": float(np.abs(np.log(matrix.std(0) / p.ref_sd)).max())}


def by_nuts(p, seed):
    chains = []
    for chain in range(4):
        pyro.set_rng_seed(100 * seed + chain)
        mcmc = MCMC(NUTS(p.model), num_samples=1_000, warmup_steps=1_000, disable_progbar=True)
        mcmc.run(p.data)
        chains.append(mcmc.get_samples())
    ess = az.ess({k: torch.stack([c[k] for c in chains]).numpy() for k in chains[0]})
    smallest = min(float(v.min()) for v in ess.data_vars.values())
    return {**errors(p, {k: torch.cat([c[k] for c in chains]) for k in chains[0]}), "ess": smallest, "verdict": "-"}


@contextmanager
def at_most(cpu_seconds):
    """Ends a row after so many CPU seconds (None: never)."""

    def stop(signum, frame):
        raise TimeoutError(f"stopped after {cpu_seconds} CPU seconds")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds or 0.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def row(p, name, method, seed, limit, also=None):
    """One fit and its scores; ``also(p, guide, scores)`` gives more of them."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    began = time.process_time()
    result = {"posterior": name, "method": method, "dim": p.dim, "seed": seed}
    try:
        if method == "NUTS":
            with at_most(limit):
                result |= by_nuts(p, seed)
            result["seconds"] = time.process_time() - began
        else:
            guide = (by_flow if method == "AutoFlow" else by_stock(STOCK[method]))(p.model, p.data, seed)
            result["seconds"] = time.process_time() - began
            result |= judged(p, guide)
            result |= {} if also is None else also(p, guide, result | {"within": within(result)})
    except Exception as error:  # a row that fails is a result
        result |= {"error": f"{type(error).__name__}: {error}"[:200], "verdict": "failed"}
    return result | {"within": within(result)}


def within(r):
    return "error" not in r and bool(
        r.get("khat", 0.0) < 0.7 and r.get("mean", 9) < 0.1 and r.get("sd", 9) < 0.1 and abs(r.get("kl", 0.0)) < 0.1
    )


def line(r):
    number = lambda key, width, digits: f"{r[key]:{width}.{digits}f}" if key in r else " " * (width - 1) + "-"
    r = r | ({"rate": r["ess"] / r["seconds"]} if "ess" in r else {})
    return (
        f"{r['posterior']:42s}{r['method']:>24s}{r['dim']:4d}{number('khat', 7, 2)}{number('mean', 9, 3)}{number('sd', 7, 3)}"
        f"{number('kl', 9, 4)}{number('seconds', 7, 1)}{number('rate', 7, 0)}  {r['verdict']}{'' if r['within'] else ' *'}{' ' + r['error'] if 'error' in r else ''}"
    )


def references(words):
    """Names and reference posteriors, those with one of the words in their name, or all; float64 and one thread from here on."""
    if not FOLDER.exists():
        sys.exit(f"{FOLDER} is not here: the reference posteriors are not part of the project")
    sys.path.insert(0, str(FOLDER))
    import kit

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    return [(n, kit.load(n)) for n in kit.names() if not words or any(w in n for w in words)]


def main(arguments):
    rows, only = [], arguments.only or []
    methods = [m for m in only if m in (*STOCK, "NUTS", "AutoFlow")] or ["AutoFlow"]
    chosen = references(set(only) - set(methods))
    print(HEAD)
    for name, p in chosen:
        for method in methods:
            for seed in arguments.seeds:
                rows.append(row(p, name, method, seed, arguments.limit))
                print(line(rows[-1]), flush=True)
    for method in methods:
        mine = [r for r in rows if r["method"] == method]
        seconds = [r["seconds"] for r in mine if "seconds" in r]
        print(f"{method}: {sum(r['within'] for r in mine)} of {len(mine)} within the bars, median {np.median(seconds):.1f} CPU s, "
              f"largest {max(seconds):.1f}")  # fmt: skip
    return rows
