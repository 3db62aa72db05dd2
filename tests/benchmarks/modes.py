"""Separated modes of unequal weights and widths: what the default fit finds, and what chains with it as their proposal do.

K modes in D dimensions, the nearest two ten units apart, widths of half to one and a half units. ``--only 16:20`` takes K:D. Columns: modes of
the fitted guide and of the explored one; largest error of a weight, and of a weight in its standard errors; R-hat; shares of
accepted jumps and local moves; CPU seconds of the fit (200 steps), of ``explore`` with its defaults, and of Pyro's NUTS for 64 chains of as many
draws after 200 steps of warm-up, from draws of the prior: eight chains are run, the rest is computed. NUTS' chains stay in the modes in which they start, so
they tell no weights, however many there are.
"""

import time
import warnings
from itertools import combinations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import init_to_value

import pyro_dgm as dgm

NUTS_CHAINS = 8
CASES = ((2, 2), (4, 2), (4, 10), (8, 5), (16, 20))


def mixture(modes, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    place = torch.randn(modes, dim, generator=generator)
    place *= 10.0 / min((place[i] - place[j]).norm() for i, j in combinations(range(modes), 2))
    sd = 0.5 + torch.rand(modes, dim, generator=generator)
    weight = 0.2 + torch.rand(modes, generator=generator)
    weight /= weight.sum()

    def model():
        prior = dist.Normal(torch.zeros(dim), float(place.abs().max())).to_event(1)
        x = pyro.sample("x", prior)
        density = dist.MixtureSameFamily(dist.Categorical(weight), dist.Normal(place, sd).to_event(1))
        pyro.factor("f", density.log_prob(x) - prior.log_prob(x))

    return model, place, weight


def nuts_seconds(model):
    """CPU seconds of 64 chains, by eight of them."""
    began = time.process_time()
    for seed in range(NUTS_CHAINS):
        pyro.set_rng_seed(seed)
        start = {"x": poutine.trace(model).get_trace().nodes["x"]["value"]}
        kernel = NUTS(model, init_strategy=init_to_value(values=start))
        MCMC(kernel, num_samples=100, warmup_steps=200, disable_progbar=True).run()
    return (time.process_time() - began) * 64 / NUTS_CHAINS


def row(modes, dim, seed):
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    model, place, weight = mixture(modes, dim, seed)
    guide, began = dgm.AutoFlow(model), time.process_time()
    dgm.fit(dgm.STL_ELBO()(model, guide), (), progress=False, seed=seed, max_steps=200)
    fitted = time.process_time() - began
    found = dgm.explore(
        model, guide, seed=seed, progress=False, log_likelihood=False, posterior_predictive=False, container="dict"
    )
    explored = time.process_time() - began - fitted
    x = torch.as_tensor(found.idata["groups"]["posterior"]["x"])
    cell = torch.cdist(x, place.expand(len(x), -1, -1)).argmin(-1)
    by_chain = torch.nn.functional.one_hot(cell, modes).double().mean(1)
    off = (by_chain.mean(0) - weight).abs()
    errors = off / (by_chain.std(0) / len(by_chain) ** 0.5).clamp_min(1e-3)
    return {"modes": modes, "dim": dim, "seed": seed, "before": guide.modes, "after": found.guide.modes, "off": float(off.max()),
            "errors": float(errors.max()), "rhat": found.rhat, "jumps": found.jumps, "moves": found.moves,
            "fit": fitted, "explore": explored, "nuts": nuts_seconds(model)}  # fmt: skip


def main(arguments):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = [tuple(map(int, each.split(":"))) for each in arguments.only or []] or CASES
    print(
        f"{'K':>3s}{'D':>4s}{'seed':>5s}{'modes':>9s}{'weight':>8s}{'in se':>7s}{'R-hat':>7s}{'jumps':>7s}{'moves':>7s}{'fit s':>7s}{'CPU s':>7s}{'NUTS s':>8s}"
    )
    rows = []
    for modes, dim in cases:
        for seed in arguments.seeds:
            rows.append(r := row(modes, dim, seed))
            print(f"{modes:3d}{dim:4d}{seed:5d}{r['before']:4d} ->{r['after']:2d}{r['off']:8.4f}{r['errors']:7.1f}{r['rhat']:7.3f}"
                  f"{r['jumps']:7.2f}{r['moves']:7.2f}{r['fit']:7.1f}{r['explore']:7.1f}{r['nuts']:8.0f}", flush=True)  # fmt: skip
    return rows
