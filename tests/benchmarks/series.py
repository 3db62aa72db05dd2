"""Time series of 500 and 2,000 steps: AutoFlow to its verdict, beside exact numbers and NumPyro's NUTS.

A local level and a stochastic volatility: ``--only level:500 volatility:2000`` takes some rows. Exact numbers of the local level are
by the Kalman filter on a grid of the two globals. NUTS has two chains of 1,000 draws after 1,000 on 500 steps and one on 2,000, on the
centred model; it is left out where NumPyro is not installed. CPU seconds of the process, compilation included, one thread.
"""

import math
import resource
import time

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

import pyro_dgm as dgm
from tests.benchmarks import _nuts

KINDS, LENGTHS = ("level", "volatility"), (500, 2000)


def vector(name, length):
    """Latents without a prior of their own: a factor says what they are."""
    return pyro.sample(name, dist.ImproperUniform(constraints.real_vector, (), (length,)))


def local_level(y):
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    step = pyro.sample("step", dist.HalfNormal(1.0))
    level = vector("level", len(y))
    pyro.factor("start", dist.Normal(0.0, step).log_prob(level[..., 0]))
    pyro.factor("walk", dist.Normal(0.0, step[..., None]).log_prob(level.diff(dim=-1)).sum(-1))
    pyro.sample("y", dist.Normal(level, noise[..., None]).to_event(1), obs=y)


def volatility(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    keep = pyro.sample("keep", dist.Beta(20.0, 1.5))
    push = pyro.sample("push", dist.HalfNormal(1.0))
    h = vector("h", len(y))
    off = h - mean[..., None]
    pyro.factor("start", dist.Normal(0.0, push / (1.0 - keep**2).sqrt()).log_prob(off[..., 0]))
    moves = dist.Normal(keep[..., None] * off[..., :-1], push[..., None])
    pyro.factor("walk", moves.log_prob(off[..., 1:]).sum(-1))
    pyro.sample("y", dist.Normal(0.0, (h / 2.0).exp()).to_event(1), obs=y)


MODELS = {"level": local_level, "volatility": volatility}


def drawn_level(length, seed, step=0.3, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    level = (step * torch.randn(length, generator=generator)).cumsum(0)
    return level + noise * torch.randn(length, generator=generator)


def drawn_volatility(length, seed, mean=-1.0, keep=0.95, push=0.25):
    generator = torch.Generator().manual_seed(seed)
    off = push / math.sqrt(1.0 - keep**2) * torch.randn((), generator=generator)
    h = []
    for _ in range(length):
        h.append(mean + off)
        off = keep * off + push * torch.randn((), generator=generator)
    return (torch.stack(h) / 2.0).exp() * torch.randn(length, generator=generator)


DRAWN = {"level": drawn_level, "volatility": drawn_volatility}


def exact_level(y, g):
    """Log density of log noise and log step ``(n, 2)`` and of the data, by a Kalman filter, in nats."""
    noise, step = g.exp().unbind(-1)
    mean, variance, total = torch.zeros_like(noise), torch.zeros_like(noise), torch.zeros_like(noise)
    for value in y:
        variance = variance + step.square()
        scale = variance + noise.square()
        total = total - 0.5 * ((value - mean).square() / scale + scale.log() + math.log(2.0 * math.pi))
        gain = variance / scale
        mean, variance = mean + gain * (value - mean), variance * (1.0 - gain)
    return total + dist.HalfNormal(2.0).log_prob(noise) + dist.HalfNormal(1.0).log_prob(step) + g.sum(-1)


def unconstrained(posterior):
    """Means and sds of the globals in the coordinates in which they are nearly normal, by site."""
    maps = {"mean": lambda x: x, "keep": lambda x: np.log(x / (1.0 - x))}
    globals_ = {k: np.asarray(v).ravel() for k, v in posterior.items() if np.ndim(v) <= 2}
    return {k: (float(m.mean()), float(m.std())) for k, v in globals_.items() for m in [maps.get(k, np.log)(v)]}


def exact_globals(y, loc, sd):
    """Means and sds of log noise and log step, and the log evidence, on a grid around these."""
    axes = [torch.linspace(-5.0, 5.0, 41).double() * s + m for m, s in zip(loc, sd, strict=True)]
    g = torch.cartesian_prod(*axes)
    log_p = exact_level(y.double(), g)
    weight = log_p.softmax(0)
    mean = weight @ g
    cell = math.prod(float(a[1] - a[0]) for a in axes)
    return mean, (weight @ (g - mean).square()).sqrt(), float(log_p.logsumexp(0)) + math.log(cell)


def ours(kind, y, seed):
    """CPU seconds of the fit and of the verdict, the verdict, and means and sds of the globals."""
    pyro.clear_param_store()
    model = MODELS[kind]
    began = time.process_time()
    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO()(model, guide), (y,), seed=seed, progress=False)
    fitted = time.process_time()
    idata = dgm.from_svi(model, guide, y, seed=seed, prior=0, num_chains=4, num_samples=250, log_likelihood=False, posterior_predictive=False)  # fmt: skip
    verdict = dgm.khat(idata)
    seconds = (fitted - began, time.process_time() - fitted)
    return seconds, verdict, unconstrained({k: v.values for k, v in idata.posterior.items()})


def nuts(kind, y, seed, chains):
    """CPU seconds of NumPyro's NUTS, and means and sds of the globals; None where it is not installed."""
    if not _nuts.is_installed():
        return None
    import jax
    import numpyro
    import numpyro.distributions as nd

    y = np.asarray(y)

    def level():
        noise = numpyro.sample("noise", nd.HalfNormal(2.0))
        step = numpyro.sample("step", nd.HalfNormal(1.0))
        numpyro.sample(
            "y", nd.Normal(numpyro.sample("level", nd.GaussianRandomWalk(step, num_steps=len(y))), noise), obs=y
        )

    def vol():
        mean = numpyro.sample("mean", nd.Normal(0.0, 3.0))
        keep = numpyro.sample("keep", nd.Beta(20.0, 1.5))
        push = numpyro.sample("push", nd.HalfNormal(1.0))
        h = numpyro.sample("h", nd.ImproperUniform(nd.constraints.real_vector, (), (len(y),)))
        start = nd.Normal(0.0, push / (1.0 - keep**2) ** 0.5).log_prob(h[0] - mean)
        numpyro.factor("walk", start + nd.Normal(keep * (h[:-1] - mean), push).log_prob(h[1:] - mean).sum())
        numpyro.sample("y", nd.Normal(0.0, jax.numpy.exp(h / 2.0)), obs=y)

    run = _nuts.drawn(level if kind == "level" else vol, seed, chains)
    summary = numpyro.diagnostics.summary({k: v for k, v in run.draws.items() if v.ndim == 2})
    return run.seconds, unconstrained(run.draws), min(float(v["n_eff"]) for v in summary.values())


def _shown(found):
    return ", ".join(f"{k} {m:.3f} +- {s:.3f}" for k, (m, s) in found.items())


def row(kind, length, seed):
    y = DRAWN[kind](length, seed)
    seconds, verdict, found = ours(kind, y, seed)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peer = nuts(kind, y, seed, 2 if length <= 500 else 1)
    off = ""
    if kind == "level":
        loc, sd = zip(*found.values(), strict=True)
        mean, spread, evidence = exact_globals(y, loc, sd)
        far = max(abs(m - float(e)) / float(s) for m, e, s in zip(loc, mean, spread, strict=True))
        wide = max(abs(math.log(s / float(e))) for s, e in zip(sd, spread, strict=True))
        off = f"{far:.3f} / {wide:.3f}; evidence {verdict.log_evidence - evidence:+.3f} +- {verdict.log_evidence_error:.3f}"
    theirs = "" if peer is None else f"{peer[0]:.0f} (ESS {peer[2]:.0f}): {_shown(peer[1])}"
    print(
        f"| {kind} | {length} | {seconds[0]:.1f} + {seconds[1]:.1f} | {verdict.status}, k-hat {verdict.k:.2f}, gap {verdict.gap:.3f} | "
        f"{_shown(found)} | {off} | {memory:.2f} | {theirs} |",
        flush=True,
    )


def main(arguments):
    torch.set_num_threads(1)
    print(
        "| series | steps | CPU s: fit + verdict | verdict | globals | off from exact (sd / log sd) | GiB | NUTS, CPU s |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    only = set(arguments.only or ())
    for kind in KINDS:
        for length in LENGTHS:
            if not only or only & {kind, str(length), f"{kind}:{length}"}:
                for seed in arguments.seeds:
                    row(kind, length, seed)
