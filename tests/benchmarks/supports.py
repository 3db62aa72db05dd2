"""AutoFlow with its defaults on models with plates, subsampled data, enumerated sites, simplex, ordered and LKJ supports,
an ODE, float32 and float64, against exact posteriors or long NUTS runs of Pyro on the same model.

Columns: largest |mean - reference| / sd and |log(sd / reference sd)| over all coordinates; k-hat; CPU seconds; verdict.
A reference by NUTS (4 chains of 1,000) has an error of its own of about 0.03 sd.
"""

import time
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

import pyro_dgm as dgm

HEAD = f"{'model':44s}{'dtype':>9s}{'reference':>11s}{'mean':>7s}{'sd':>7s}{'k-hat':>7s}{'CPU s':>7s}  verdict"


def draws_of(distribution):
    return distribution.sample((40_000,))


def hierarchy():
    """Nested plates: 6 groups with intercepts, 20 rows each."""
    group, x = torch.arange(6).repeat_interleave(20), torch.randn(120)
    y = 0.5 * torch.randn(6)[group] + 1.2 * x + 0.7 * torch.randn(120)

    def model(x, y):
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("tau", dist.HalfNormal(1.0))
        slope, sigma = pyro.sample("slope", dist.Normal(0.0, 2.0)), pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("group", 6):
            a = pyro.sample("a", dist.Normal(mu, tau))
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(a[..., group] + slope * x, sigma), obs=y)

    return model, (x, y), None


def matrix_product():
    """Logistic regression written with x @ b, which does not broadcast over draws."""
    x = torch.randn(150, 5)
    y = torch.bernoulli(torch.sigmoid(x @ torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0])))

    def model(x, y):
        b = pyro.sample("b", dist.Normal(torch.zeros(5), 2.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=x @ b), obs=y)

    return model, (x, y), None


def subsampled():
    """A conjugate mean of 2,000 rows, 200 of which are seen in a step."""
    y = 3.0 + 2.0 * torch.randn(2000)

    def model(y, size=200):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("row", len(y), subsample_size=size) as i:
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y[i])

    precision = 0.01 + 2000 / 4.0
    return model, (y,), {"mu": draws_of(dist.Normal(y.sum() / 4.0 / precision, precision**-0.5))}


def enumerated_mixture():
    """Two normal components; assignments are summed out."""
    y = torch.cat([0.7 * torch.randn(60) - 1.0, 0.7 * torch.randn(40) + 1.0])

    def model(y):
        w = pyro.sample("w", dist.Beta(2.0, 2.0))
        low, gap = pyro.sample("low", dist.Normal(-1.0, 1.0)), pyro.sample("gap", dist.LogNormal(0.5, 0.5))
        with pyro.plate("row", len(y)):
            k = pyro.sample("k", dist.Bernoulli(w), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(low + gap * k, 0.7), obs=y)

    return model, (y,), None


def hidden_markov():
    """Two hidden states over 25 steps, summed out by pyro.markov; exact by the forward algorithm on a grid."""
    y = torch.cat([torch.randn(12), 2.5 + torch.randn(13)])
    stay_prior, gap_prior = dist.Beta(8.0, 2.0), dist.LogNormal(0.5, 0.5)

    def model(y):
        stay, gap, k = pyro.sample("stay", stay_prior), pyro.sample("gap", gap_prior), torch.zeros(())
        for t in pyro.markov(range(len(y))):
            k = pyro.sample(
                f"k{t}", dist.Bernoulli(torch.where(k == 1, stay, 1.0 - stay)), infer={"enumerate": "parallel"}
            )
            pyro.sample(f"y{t}", dist.Normal(gap * k, 1.0), obs=y[t])

    stay, gap = torch.meshgrid(torch.linspace(5e-4, 1.0 - 5e-4, 600), torch.linspace(5e-3, 6.0, 600), indexing="ij")
    step = torch.stack([torch.stack([stay, 1.0 - stay], -1), torch.stack([1.0 - stay, stay], -1)], -2).log()
    alpha = step[..., 0, :]
    for t, value in enumerate(y):
        alpha = alpha if t == 0 else (alpha[..., None] + step).logsumexp(-2)
        alpha = alpha + dist.Normal(torch.stack([0.0 * gap, gap], -1), 1.0).log_prob(value)
    density = (alpha.logsumexp(-1) + stay_prior.log_prob(stay) + gap_prior.log_prob(gap)).flatten().softmax(0)
    cells = density.multinomial(40_000, replacement=True)
    return model, (y,), {"stay": stay.flatten()[cells], "gap": gap.flatten()[cells]}


def simplex():
    """Dirichlet prior, counts: conjugate."""
    counts = torch.tensor([3.0, 0.0, 11.0, 6.0])

    def model(counts):
        p = pyro.sample("p", dist.Dirichlet(torch.full((4,), 0.8)))
        pyro.sample("n", dist.Multinomial(20, p), obs=counts)

    return model, (counts,), {"p": draws_of(dist.Dirichlet(counts + 0.8))}


def ordered():
    """Ordinal regression with three ordered cut points."""
    x = torch.randn(120)
    y = (1.3 * x + dist.Logistic(0.0, 1.0).sample((120,)) > torch.tensor([[-1.0], [0.5], [2.0]])).sum(0)

    def model(x, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        base = dist.Normal(torch.zeros(3), 2.0).to_event(1)
        cuts = pyro.sample("cuts", dist.TransformedDistribution(base, dist.transforms.OrderedTransform()))
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.OrderedLogistic(slope * x, cuts), obs=y)

    return model, (x, y), None


def correlation():
    """A covariance with an LKJ prior on the correlation of three series."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.3, 0.4, 0.9]])
    y = torch.randn(60, 3) @ root.T

    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(torch.full((3,), 2.0)).to_event(1))
        corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale[..., None] * corr), obs=y)

    return model, (y,), None


def ordinary_differential_equation():
    """Logistic growth by 20 Runge-Kutta steps, lognormal noise; NUTS has the closed solution, which is 1e-4 away."""
    times = torch.arange(1.0, 11.0)
    y = 8.0 / (1.0 + 15.0 * torch.exp(-0.9 * times)) * torch.exp(0.1 * torch.randn(10))

    def slope(y, rate, top):
        return rate * y * (1.0 - y / top)

    def integrated(state, rate, top):
        path = []
        for step in range(20):
            a = slope(state, rate, top)
            b = slope(state + 0.25 * a, rate, top)
            c = slope(state + 0.25 * b, rate, top)
            state = state + 0.5 / 6.0 * (a + 2.0 * b + 2.0 * c + slope(state + 0.5 * c, rate, top))
            path += [state] * (step % 2)
        return torch.cat(path, -1) if state.dim() else torch.stack(path)

    def closed(state, rate, top):
        return top / (1.0 + (top / state - 1.0) * torch.exp(-rate * times.to(rate)))

    def model(y, solve=integrated):
        rate, top = pyro.sample("rate", dist.LogNormal(0.0, 1.0)), pyro.sample("top", dist.LogNormal(2.0, 1.0))
        sigma, start = pyro.sample("sigma", dist.HalfNormal(0.5)), pyro.sample("start", dist.LogNormal(-1.0, 1.0))
        with pyro.plate("time", 10):
            pyro.sample("y", dist.LogNormal(solve(start, rate, top).clamp_min(1e-8).log(), sigma), obs=y)

    return model, (y,), partial(model, solve=closed)


def counts():
    """Eight Poisson rates with a gamma prior, in a plate: conjugate."""
    y = torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 40.0])

    def model(y):
        with pyro.plate("site", len(y)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    return model, (y,), {"rate": draws_of(dist.Gamma(2.0 + y, 1.5))}


def interval():
    """A proportion near one: conjugate."""

    def model(n):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("n", dist.Binomial(50, p), obs=n)

    return model, (torch.tensor(49.0),), {"p": draws_of(dist.Beta(50.0, 2.0))}


def untouched():
    """A latent that the data do not touch keeps its prior; a Student-t one here."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("free", dist.Gamma(3.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    exact = {"mu": draws_of(dist.Normal(1.0, 0.5**0.5)), "free": draws_of(dist.Gamma(3.0, 1.0))}
    return model, (torch.tensor(2.0),), exact


def unscaled():
    """A linear regression on raw units: a slope of 1e-3, an intercept of 5e3, a covariate of 1e5; known noise."""
    x = 1e5 * (1.0 + 0.2 * torch.rand(80))
    y = 5e3 + 1e-3 * x + 10.0 * torch.randn(80)

    def model(x, y):
        a = pyro.sample("a", dist.Normal(0.0, 1e4))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Normal(a + b * x, 10.0), obs=y)

    design = torch.stack([torch.ones(80), x]).double()
    precision = design @ design.T / 100.0 + torch.tensor([1e-8, 1.0]).diag().double()
    exact = torch.distributions.MultivariateNormal(
        torch.linalg.solve(precision, design @ y.double() / 100.0), precision_matrix=precision
    )
    a, b = exact.sample((40_000,)).unbind(-1)
    return model, (x, y), {"a": a, "b": b}


MODELS = [hierarchy, matrix_product, subsampled, enumerated_mixture, hidden_markov, simplex, ordered, correlation,
          ordinary_differential_equation, counts, interval, untouched, unscaled]  # fmt: skip
ONLY_DOUBLE = {"unscaled"}  # a - b * mean(x) cancels below float32


def by_nuts(model, args):
    chains = []
    for chain in range(4):
        pyro.set_rng_seed(chain)
        mcmc = MCMC(NUTS(model, max_plate_nesting=1), num_samples=1000, warmup_steps=500, disable_progbar=True)
        mcmc.run(*args)
        chains.append(mcmc.get_samples())
    return {k: torch.cat([c[k] for c in chains]) for k in chains[0]}


def flat(draws):
    return torch.cat([torch.as_tensor(v).double().reshape(len(v), -1) for v in draws.values()], -1)


def fitted(make, dtype, model, args, reference):
    """One fit in ``dtype`` on the data that were made in float64, compared with the reference."""
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()
    args = [a.to(dtype) if a.is_floating_point() else a for a in args]
    began = time.process_time()
    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO()(model, guide), tuple(args), progress=False, seed=0)
    seconds = time.process_time() - began
    whole = partial(model, size=None) if make is subsampled else model
    idata = dgm.from_svi(whole, guide, *args, num_samples=4000, prior=0, posterior_predictive=False, log_likelihood=False,
                         seed=0, container="dict")  # fmt: skip
    verdict, theirs = dgm.khat(idata), flat(reference)
    ours = flat({k: idata["groups"]["posterior"][k][0] for k in reference})
    moving = theirs.std(0) > 1e-6
    mean = ((ours.mean(0) - theirs.mean(0)) / theirs.std(0))[moving].abs().max()
    sd = (ours.std(0) / theirs.std(0)).log()[moving].abs().max()
    return {"model": make.__name__, "dtype": str(dtype)[6:], "mean": float(mean), "sd": float(sd), "khat": verdict.k,
            "seconds": seconds, "verdict": verdict.status}  # fmt: skip


def rows_of(make):
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(20)
    model, args, exact = make()  # exact draws by site, a model for NUTS to run instead, or None
    reference = exact if isinstance(exact, dict) else by_nuts(exact or model, args)
    for dtype in (torch.float64,) if make.__name__ in ONLY_DOUBLE else (torch.float64, torch.float32):
        yield {**fitted(make, dtype, model, args, reference), "reference": "exact" if exact is reference else "NUTS"}


def main(arguments):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    print(HEAD)
    for make in MODELS:
        if arguments.only and make.__name__ not in arguments.only:
            continue
        for r in rows_of(make):
            rows.append(r)
            print(f"{r['model']:44s}{r['dtype']:>9s}{r['reference']:>11s}{r['mean']:7.3f}{r['sd']:7.3f}{r['khat']:7.2f}"
                  f"{r['seconds']:7.1f}  {r['verdict']}", flush=True)  # fmt: skip
    return rows
