"""What our manners cost: LearnedDistribution against raw zuko, an SVI step against ZukoToPyro, import against import.

Both sides run in turns in one process, one thread; the figure is the ratio of medians, with its spread over rounds.
"""

import statistics
import subprocess
import sys
import time

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.optim import Adam

import pyro_dgm as dgm
from pyro_dgm.core import zuko
from pyro_dgm.train.fit import Asked, begun
from tests.compat_cells import DATA, conjugate

BATCH = 4096


def ratio(ours, theirs, rounds=61, calls=1):
    """Median ratio over rounds in which both run, and the middle half of the rounds' ratios."""

    def seconds(f):
        began = time.perf_counter()
        for _ in range(calls):
            f()
        return time.perf_counter() - began

    for f in (ours, theirs, ours, theirs):
        f()
    ratios = []
    for i in range(rounds):
        pair = (seconds(ours), seconds(theirs)) if i % 2 else (seconds(theirs), seconds(ours))[::-1]
        ratios.append(pair[0] / pair[1])
    quarters = statistics.quantiles(ratios, n=4)
    return {"ratio": statistics.median(ratios), "low": quarters[0], "high": quarters[2]}


SIZES = {"hidden_features": (64, 64), "activation": torch.nn.SiLU}


def densities():
    for name, layers in {"RealNVP": 6, "MAF": 3, "NSF": 3}.items():
        for features in (2, 8, 32):
            ours, x = getattr(dgm, name)(features), torch.randn(BATCH, features)
            raw = getattr(zuko.flows, name)(features, transforms=layers, **SIZES)
            yield f"log_prob {name} D={features}", ratio(lambda: ours().log_prob(x), lambda: raw().log_prob(x))
            if name != "NSF" or features < 32:  # 32 passes of splines at this batch: gigabytes of graph
                yield (
                    f"rsample {name} D={features}",
                    ratio(lambda: ours().rsample((BATCH,)), lambda: raw().rsample((BATCH,))),
                )


def inverse_maf(features):
    """An inverse autoregressive flow, all of it zuko's."""
    flow = zuko.flows.MAF(features, transforms=3, **SIZES)
    return zuko.lazy.Flow(flow.transform.inv, flow.base)


def svi_step():
    """The same guide, by AutoFlow and by hand around ZukoToPyro; 64 particles, Trace_ELBO."""
    guide = dgm.AutoFlow(conjugate, lambda D: dgm.MAF(D, fast="sampling")).setup(DATA)
    flow = inverse_maf(2)

    class Wrapped(AutoContinuous):
        """The guide a user would write: the same machinery, the flow wrapped by ZukoToPyro."""

        def get_posterior(self, *args):
            pyro.module("wrapped", flow)
            return ZukoToPyro(flow())

    steps = [
        SVI(conjugate, g, Adam({"lr": 1e-4}), Trace_ELBO(64, vectorize_particles=True)).step
        for g in (guide, Wrapped(conjugate))
    ]
    yield (
        "SVI step, AutoFlow against an AutoContinuous of ZukoToPyro",
        ratio(*[lambda s=s: s(DATA) for s in steps], rounds=61, calls=10),
    )

    for features in (2, 8, 32):
        yield f"SVI step, family against ZukoToPyro in the same guide, D={features}", same_guide(features)


def same_guide(features):
    """One guide of a Gaussian model in D dimensions, with a family or with a wrapped zuko flow; their parameters agree."""
    family = dgm.MAF(features, fast="sampling")
    flow = inverse_maf(features)

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(features), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def by_hand(x):
        pyro.module("flow", flow)
        pyro.sample("z", ZukoToPyro(flow()))

    def ours(x):
        pyro.module("family", family)
        pyro.sample("z", family())

    elbo = lambda: Trace_ELBO(64, vectorize_particles=True)
    steps = [SVI(model, guide, Adam({"lr": 1e-4}), elbo()).step for guide in (ours, by_hand)]
    x = torch.ones(features)
    return ratio(*[lambda s=s: s(x) for s in steps], rounds=61, calls=10)


def imports():
    def run(code):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    yield "import pyro_dgm against import pyro, zuko", ratio(run("import pyro_dgm"), run("import pyro, zuko"), rounds=7)


def fit_step():
    for d in (2, 8, 32):
        yield f"a step of fit against a bare loop, NSF D={d}, batch 256", fit_row(d)


def fit_row(d):
    """Steps of ``fit``, checks included, against a bare loop of the same objective: shuffled batches, clipping, Adam."""
    x = torch.randn(20_000, d)
    objectives = [dgm.MaximumLikelihood(dgm.NSF(d)) for _ in range(2)]
    bare = objectives[1]
    bare.prepare(iter([(x,)] * 3))
    optimizer = torch.optim.Adam(bare.parameters(), 1e-3, fused=True)
    order = iter(())

    def theirs():
        nonlocal order
        index = next(order, None)
        if index is None:
            order = iter(torch.randperm(len(x)).split(256))
            index = next(order)
        optimizer.zero_grad()
        loss = bare(x[index])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bare.parameters(), 10.0)
        optimizer.step()
        loss.item()

    asked = Asked(objectives[0], x, batch_size=256, max_steps=10**6, validation=0.0, progress=False)
    with begun(asked) as (loop, saved):
        loop.begin(saved)
        return ratio(loop.advance, theirs, rounds=41, calls=20)


def main(arguments):
    torch.set_num_threads(1)
    rows = {}
    for part in (densities, svi_step, fit_step, imports):
        if arguments.only and part.__name__ not in arguments.only:
            continue
        for name, result in part():
            rows[name] = result
            print(f"{name:66s} {result['ratio']:.3f}  [{result['low']:.3f}, {result['high']:.3f}]", flush=True)
    return rows
