"""Hierarchies of 8 to 10,000 groups: AutoFlow to its verdict, beside exact numbers and NumPyro's NUTS.

Groups of normal data, counts with exposure, or five trials each, centred or not: ``--only poisson:1000 normal:50:n`` takes some rows
(n: non-centred). Exact numbers are by fine grids, over each group and over the two globals. NUTS has four chains of
1,000 draws after 1,000, on the non-centred model; it is left out where NumPyro is not installed. CPU seconds of the process, compilation included, one thread.

``--only subsampled`` has 100,000 groups in subsamples of 500, normal and counts; ``subsampled:poisson:10000`` takes one row, and others
sizes. Peak memory is that of the process, so one row at a time tells it.

``--only slopes:2000 slopes:500:poisson slopes:500:bernoulli`` has groups with an intercept and a slope, six data each.
"""

import math
import resource
import time

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm
from tests.benchmarks import _nuts, _slopes

KINDS, GROUPS = ("normal", "poisson", "binomial"), (8, 50, 200, 1000, 10_000)
NUTS_MOST = 1000  # groups up to which NUTS is run
SUBSAMPLED, AT_ONCE = (("normal", 100_000), ("poisson", 100_000)), 500
GLOBALS = 20_000  # draws of the globals alone


def likelihood(kind, theta, known):
    if kind == "normal":
        return dist.Normal(theta, known)
    if kind == "poisson":
        return dist.Poisson((theta + known.log()).exp())
    return dist.Binomial(5, logits=theta)


def drawn(kind, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    theta = 1.0 + 0.7 * torch.randn(groups, generator=generator)
    known = 0.5 + torch.rand(groups, generator=generator) * (1.0 if kind == "normal" else 4.0)
    pyro.set_rng_seed(seed)
    return known, likelihood(kind, theta, known).sample()


def hierarchy(kind="normal", centred=True, at_once=None):
    def model(known, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(2.0))
        with pyro.plate("group", len(known), subsample_size=at_once) as index:
            if at_once:
                known, y = known[index], y[index]
            if centred:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = pyro.deterministic("theta", mu + tau * pyro.sample("eta", dist.Normal(0.0, 1.0)))
            pyro.sample("y", likelihood(kind, theta, known), obs=y)

    return model


def exact(kind, known, y, loc, sd):
    """Means and sds of mu, log tau and theta, and the log evidence."""
    fine, sides = (301, 21) if len(known) <= 2_000 else (151, 9)
    z = torch.linspace(-7.5, 7.5, fine).double()[:, None]
    log_w = dist.Normal(0.0, 1.0).log_prob(z) + math.log(15.0 / (fine - 1))
    axes = [torch.linspace(-5.0, 5.0, sides).double() * s + m for m, s in zip(loc, sd, strict=True)]
    found = []
    for mu in axes[0]:
        for log_tau in axes[1]:
            theta = mu + log_tau.exp() * z
            each = likelihood(kind, theta, known.double()).log_prob(y.double()) + log_w
            prior = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(2.0).log_prob(log_tau.exp()) + log_tau
            share = each.softmax(0)
            mean = (share * theta).sum(0)
            found.append((each.logsumexp(0).sum() + prior, mean, (share * theta.square()).sum(0)))
    log_p = torch.stack([f[0] for f in found])
    weight = log_p.softmax(0)
    grid = torch.cartesian_prod(*axes)
    mean = weight @ grid
    cell = math.prod(float(a[1] - a[0]) for a in axes)
    theta = weight @ torch.stack([f[1] for f in found])
    square = weight @ torch.stack([f[2] for f in found])
    return (
        mean,
        (weight @ (grid - mean).square()).sqrt(),
        float(log_p.logsumexp(0)) + math.log(cell),
        theta,
        (square - theta**2).sqrt(),
    )


def ours(kind, known, y, centred, seed, at_once=None):
    """CPU seconds, verdict, and draws of mu, log tau and theta."""
    pyro.clear_param_store()
    model = hierarchy(kind, centred, at_once)
    began = time.process_time()
    guide = dgm.AutoFlow(model, structure="plates")
    dgm.fit(dgm.STL_ELBO()(model, guide), (known, y), seed=seed, progress=False)
    fitted = time.process_time()
    idata = dgm.from_svi(model, guide, known, y, seed=seed, prior=0, num_chains=4,
                         num_samples=1000 if len(known) <= 1000 else 250, log_likelihood=False, posterior_predictive=False)  # fmt: skip
    verdict = dgm.khat(idata)
    seconds = (fitted - began, time.process_time() - fitted)
    draws = [torch.as_tensor(idata.posterior[k].values).double() for k in ("mu", "tau", "theta")]
    draws = [d.reshape(-1, *d.shape[2:]) for d in draws]
    outer = torch.stack([draws[0], draws[1].log()], -1)
    return seconds, verdict, outer if at_once is None else guide.plated.outer().sample((GLOBALS,)).double(), draws[2]


def nuts(kind, known, y, seed):
    """CPU seconds of NumPyro's NUTS, and draws of mu and log tau; None where it is not installed."""
    if not _nuts.is_installed():
        return None
    import jax
    import numpyro
    import numpyro.distributions as nd

    known, y = np.asarray(known), np.asarray(y)

    def model():
        mu = numpyro.sample("mu", nd.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", nd.HalfCauchy(2.0))
        with numpyro.plate("group", len(known)):
            theta = mu + tau * numpyro.sample("eta", nd.Normal(0.0, 1.0))
            law = {
                "normal": lambda: nd.Normal(theta, known),
                "poisson": lambda: nd.Poisson(jax.numpy.exp(theta) * known),
                "binomial": lambda: nd.Binomial(5, logits=theta),
            }
            numpyro.sample("y", law[kind](), obs=y)

    run = _nuts.drawn(model, seed, 4)
    return run.seconds, np.stack([run.draws["mu"].ravel(), np.log(run.draws["tau"].ravel())], -1)


def row(kind, groups, centred, seed, at_once=None):
    known, y = drawn(kind, groups, seed)
    seconds, verdict, outer, theta = ours(kind, known, y, centred, seed, at_once)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    loc, sd = outer.mean(0), outer.std(0)
    mean, spread, evidence, of_theta, sd_theta = exact(kind, known, y, loc, sd)
    off = ((loc - mean) / spread).abs().max()
    ratio = (sd / spread).log().abs().max()
    local = (theta.mean(0) - of_theta).abs() / sd_theta
    width = (theta.std(0) / sd_theta).log().abs()
    peer = nuts(kind, known, y, seed) if groups <= NUTS_MOST and at_once is None else None
    name = "centred" if centred else "non-centred"
    last = "" if peer is None else f"{peer[0]:.1f}"
    print(
        f"| {kind} | {groups} | {name if at_once is None else at_once} | {seconds[0]:.1f} + {seconds[1]:.1f} | {verdict.status}, "
        f"{verdict.k:.2f} | {float(off):.3f} / {float(ratio):.3f} | {float(local.quantile(0.99)):.3f} / "
        f"{float(width.quantile(0.99)):.3f} | {verdict.log_evidence - evidence:+.3f} +- {verdict.log_evidence_error:.3f} | "
        f"{last if at_once is None else f'{memory:.1f} GB'} |",
        flush=True,
    )


HEAD = (
    "| data | groups | {} | CPU s: fit + verdict | verdict, k-hat | globals: mean off (sd) / log sd off | groups, 99 %: mean / log "
    "sd | evidence - exact | {} |\n|---|---|---|---|---|---|---|---|---|"
)


def subsampled(only, seeds):
    """Rows of subsampled plates, by names as ``subsampled:normal:10000``."""
    named = [name.split(":")[1:] for name in only if name.startswith("subsampled:")]
    rows = [(kind, int(size[0]) if size else 100_000) for kind, *size in named] or SUBSAMPLED
    print(HEAD.format("subsample", "peak memory"))
    for kind, groups in rows:
        for seed in seeds:
            row(kind, groups, True, seed, AT_ONCE)


def slopes(only, seeds):
    """Rows of groups with two latents, by names as ``slopes:2000`` or ``slopes:500:bernoulli``."""
    print(
        "| data | groups | CPU s: fit + verdict | steps | verdict, k-hat | globals: mean off (sd) / log sd off | groups, 99 %: mean / "
        "log sd | evidence - exact | peak memory |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name in sorted(only):
        _, groups, kind = [*name.split(":"), "normal"][:3]
        for seed in seeds:
            slopes_row(kind, int(groups), seed)


def slopes_row(kind, groups, seed):
    data = _slopes.drawn(kind, groups, seed)
    model = _slopes.model(kind, groups)
    pyro.clear_param_store()
    guide = dgm.AutoFlow(model)
    began = time.process_time()
    history = dgm.fit(dgm.STL_ELBO()(model, guide), data, seed=seed, progress=False)
    fitted = time.process_time()
    idata = dgm.from_svi(model, guide, *data, seed=seed, prior=0, num_chains=4,
                         num_samples=1000 if groups <= 1000 else 250, log_likelihood=False, posterior_predictive=False)  # fmt: skip
    verdict = dgm.khat(idata)
    seconds = (fitted - began, time.process_time() - fitted)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    outer = guide.plated.outer().sample((GLOBALS,)).double()
    local = "| "
    if kind == "normal":
        exact = _slopes.Exact(*data)
        g, weight, evidence = exact.drawn(outer.mean(0))
        loc, sd = exact.groups(g, weight)
        found = [torch.as_tensor(idata.posterior[k].values).double().reshape(-1, groups) for k in ("a", "b")]
        off = (torch.stack([f.mean(0) for f in found], -1) - loc).abs() / sd
        width = (torch.stack([f.std(0) for f in found], -1) / sd).log().abs()
        local = f"| {float(off.quantile(0.99)):.3f} / {float(width.quantile(0.99)):.3f} "
    else:
        g, weight, evidence = _slopes.weighted(kind, guide, data)
    mean = weight @ g
    spread = (weight @ (g - mean).square()).sqrt()
    off, ratio = ((outer.mean(0) - mean) / spread).abs().max(), (outer.std(0) / spread).log().abs().max()
    print(
        f"| {kind} | {groups} | {seconds[0]:.1f} + {seconds[1]:.1f} | {history.steps} | {verdict.status}, {verdict.k:.2f} | "
        f"{float(off):.3f} / {float(ratio):.3f} {local}| {verdict.log_evidence - evidence:+.3f} +- "
        f"{verdict.log_evidence_error:.3f} | {memory:.1f} GB |",
        flush=True,
    )


def main(arguments):
    torch.set_num_threads(1)
    only = set(arguments.only or ())
    if any(name.startswith("subsampled") for name in only):
        subsampled(only, arguments.seeds)
        return
    if any(name.startswith("slopes") for name in only):
        slopes(only, arguments.seeds)
        return
    print(HEAD.format("model", "NUTS, CPU s"))
    for kind in KINDS:
        for groups in GROUPS:
            for centred in (True, False):
                names = {kind, f"{kind}:{groups}", f"{kind}:{groups}:{'c' if centred else 'n'}", str(groups)}
                if not only or only & names:
                    for seed in arguments.seeds:
                        row(kind, groups, centred, seed)
