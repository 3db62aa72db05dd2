"""A default AutoFlow to its verdict against its peers, on the reference posteriors, in one process and one thread.

``--only units``: CPU seconds of ``fit``, ``from_svi`` and ``khat`` with their defaults over those of 300 steps of stock SVI with
``AutoNormal`` and 16 vectorised particles, on the same model in the same run.
``--only draws``: CPU seconds to 1,000 and to 10,000 effective draws, of AutoFlow and of NUTS by NumPyro and by nutpie with four
chains each, on models whose log densities are first found to be the same. Compilation counts. Needs NumPyro and nutpie.
Other words of ``--only`` are parts of names.
A first fit, first steps and first chains of a small model come before, so that what a process does once is in none.

Needs the folder ``../shared/posteriordb`` beside the checkout, as ``posteriordb`` does. float64.
"""

import math
import sys
import time

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_dgm as dgm
from tests.benchmarks import _nuts
from tests.benchmarks.posteriordb import errors, references

PARTS = ("units", "draws")
MOST_DIM = 30  # the bar on the worst ratio is for posteriors of at most so many dimensions
COUNTS = (1_000, 10_000)  # effective draws
CHAINS = 4
MOST_RHAT = 1.01  # Vehtari et al. (2021); an ESS of chains that differ more is none, and such a peer has no time
METHODS = ("AutoFlow", "NumPyro", "nutpie")
JUDGED = 1_000  # draws of a default container, of which a verdict's ESS is
DRAWS_HEAD = (
    "| posterior | D | AutoFlow: fit + verdict | to 1,000 / 10,000 | NumPyro: compilation + warm-up + sampling | to 1,000 / 10,000 | "
    "nutpie: the same | to 1,000 / 10,000 | mean errors of the three | first at 1,000 / 10,000 |\n" + "|---" * 10 + "|"
)


def stock_steps(model, args, seed=0, steps=300):
    """CPU seconds of so many steps of stock SVI, the first with its set-up."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    began = time.process_time()
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(16, vectorize_particles=True))
    for _ in range(steps):
        svi.step(*args)
    return time.process_time() - began


def default_fit(model, args, seed=0):
    """CPU seconds to the end of the fit, and to the verdict; the history, the verdict and the guide."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    began = time.process_time()
    guide = dgm.AutoFlow(model)
    history = dgm.fit(dgm.STL_ELBO()(model, guide), args, progress=False, seed=seed)
    fitted = time.process_time()
    verdict = dgm.khat(dgm.from_svi(model, guide, *args, seed=seed, container="dict"))
    return fitted - began, time.process_time() - fitted, history, verdict, guide


def warmed_up(x):
    """A model of one latent."""
    pyro.sample("x", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=x)


def unit_row(p, name, seed):
    before = stock_steps(p.model, (p.data,), seed)
    fit, verdict, history, found, _ = default_fit(p.model, (p.data,), seed)
    unit = 0.5 * (before + stock_steps(p.model, (p.data,), seed))
    return {"posterior": name, "seed": seed, "dim": p.dim, "unit": unit, "fit": fit, "verdict": verdict, "steps": history.steps,
            "ratio": (fit + verdict) / unit, "khat": found.k, "gap": found.gap, "status": found.status}  # fmt: skip


def units(posteriors, seeds):
    """The table of ratios, with their median and the worst."""
    stock_steps(warmed_up, (torch.tensor(0.5),), steps=5)
    default_fit(warmed_up, (torch.tensor(0.5),))
    print(
        f"{'posterior':42s}{'D':>4s}{'stock s':>9s}{'fit s':>8s}{'verdict s':>11s}{'steps':>7s}{'ratio':>7s}  verdict"
    )
    rows = []
    for name, p in posteriors:
        for seed in seeds:
            rows.append(r := unit_row(p, name, seed))
            print(f"{r['posterior']:42s}{r['dim']:4d}{r['unit']:9.2f}{r['fit']:8.2f}{r['verdict']:11.2f}{r['steps']:7d}"
                  f"{r['ratio']:7.2f}  {r['status']} (k-hat {r['khat']:.2f}, gap {r['gap']:.3f})", flush=True)  # fmt: skip
    ratios = [r["ratio"] for r in rows if r["dim"] <= MOST_DIM]
    if ratios:
        print(f"units: median {np.median(ratios):.2f}, worst {max(ratios):.2f} of {len(ratios)} rows (D <= {MOST_DIM})")
    return rows


def posterior_draws(p, guide, found, count, seed):
    """CPU seconds of so many draws, and the draws; of a usable fit more, from which they are picked by weight."""
    began = time.process_time()
    wanted = count if found.status == "good" else math.ceil(count * JUDGED / found.ess)
    container = dgm.from_svi(p.model, guide, p.data, num_samples=wanted, check=False, prior=0, log_likelihood=False,
                             posterior_predictive=False, seed=seed, container="dict")  # fmt: skip
    if found.status != "good":
        container = dgm.resample(container, count, seed=seed)
    draws = {k: torch.as_tensor(v[0]) for k, v in container["groups"]["posterior"].items()}
    return time.process_time() - began, draws


def by_flow(p, seed):
    """The times of AutoFlow, infinite where its verdict is bad, and the errors of the most draws."""
    fit, verdict, _, found, guide = default_fit(p.model, (p.data,), seed)
    judged = {"judged": fit + verdict, "status": found.status, "khat": found.k, "ess": found.ess}
    if found.status == "bad":
        return judged | {"seconds": [math.inf] * len(COUNTS)}
    drawn = [posterior_draws(p, guide, found, count, seed) for count in COUNTS]
    return judged | {"seconds": [fit + verdict + s for s, _ in drawn]} | errors(p, drawn[-1][1])


def by_chains(p, run):
    """The times of a peer, with its ESS, R-hat and the errors of all its draws."""
    draws = {k: torch.as_tensor(v.copy()).flatten(0, 1) for k, v in run.draws.items()}
    spent = {"compiling": run.compiling, "warm_up": run.warm_up, "sampling": run.sampling}
    mixed = {"seconds": [run.seconds_to(c) for c in COUNTS], "ess": run.ess(), "rhat": run.rhat()}
    return spent | mixed | errors(p, draws)


def draws_row(p, name, seed):
    from tests.benchmarks._peers_numpyro import written

    model = written(p, name)
    return {"posterior": name, "seed": seed, "dim": p.dim, "AutoFlow": by_flow(p, seed),
            "NumPyro": by_chains(p, _nuts.drawn(model, seed, CHAINS)),
            "nutpie": by_chains(p, _nuts.drawn_by_nutpie(model, seed, CHAINS))}  # fmt: skip


def time_of(row, method, at):
    """CPU seconds to one of the counts, none (infinite) of chains that did not mix."""
    return math.inf if row[method].get("rhat", 1.0) > MOST_RHAT else row[method]["seconds"][at]


def chains_cell(found):
    mixed = "" if found["rhat"] <= MOST_RHAT else f", R-hat {found['rhat']:.3f}"
    spent = " + ".join(f"{found[k]:.1f}" for k in ("compiling", "warm_up", "sampling"))
    return f"{spent} (ESS {found['ess']:.0f}{mixed}) | {times_cell(found)}"


def times_cell(found):
    return " / ".join(f"{s:.1f}" if math.isfinite(s) else "-" for s in found["seconds"])


def errors_cell(row):
    return ", ".join(f"{row[m]['mean']:.2f}" if "mean" in row[m] else "-" for m in METHODS)


def first(row, at):
    return min(METHODS, key=lambda method: time_of(row, method, at))


def draws_line(r):
    flow = r["AutoFlow"]
    judged = (
        f"{flow['judged']:.1f}, {flow['status']} (k-hat {flow['khat']:.2f}, ESS {flow['ess']:.0f}) | {times_cell(flow)}"
    )
    peers = f"{chains_cell(r['NumPyro'])} | {chains_cell(r['nutpie'])}"
    return f"| {r['posterior']} | {r['dim']} | {judged} | {peers} | {errors_cell(r)} | {first(r, 0)} / {first(r, 1)} |"


def draws(posteriors, seeds):
    """The table of times to effective draws, and on how many AutoFlow is ahead."""
    if not (_nuts.is_installed("numpyro") and _nuts.is_installed("nutpie")):
        sys.exit("draws: numpyro and nutpie are not installed")
    warm_up_peers()
    print(DRAWS_HEAD)
    rows = []
    for name, p in posteriors:
        for seed in seeds:
            rows.append(r := draws_row(p, name, seed))
            print(draws_line(r), flush=True)
    for at, count in enumerate(COUNTS):
        told(rows, at, count)
    return rows


def warm_up_peers():
    from tests.benchmarks._peers_numpyro import warmed_up as of_numpyro

    default_fit(warmed_up, (torch.tensor(0.5),))
    _nuts.drawn(of_numpyro, 0, CHAINS)
    _nuts.drawn_by_nutpie(of_numpyro, 0, CHAINS)


def told(rows, at, count):
    """A line of how the rows compare at a count."""
    ours = np.array([time_of(r, "AutoFlow", at) for r in rows])
    peers = {m: np.array([time_of(r, m, at) for r in rows]) for m in ("NumPyro", "nutpie")}
    better = np.minimum(peers["NumPyro"], peers["nutpie"])
    ratios = [f"{np.nanmedian(ours / peers[m]):.2f} of {m}'s" for m in peers]
    ahead = [f"of {m} on {(ours < peers[m]).sum()}" for m in peers]
    print(f"{count} draws: AutoFlow is ahead of the better peer on {(ours < better).sum()} of {len(rows)}, {', '.join(ahead)}; "
          f"its time is in the median {', '.join(ratios)}, {np.nanmedian(ours / better):.2f} of the better's")  # fmt: skip


def main(arguments):
    words = arguments.only or []
    posteriors = references([w for w in words if w not in PARTS])
    tables = {"units": units, "draws": draws}
    chosen = [k for k in PARTS if k in words] or PARTS
    return [row for k in chosen for row in tables[k](posteriors, arguments.seeds)]
