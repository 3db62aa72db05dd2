"""A trained generator as the prior of fields on a grid of which some pixels were measured: against the exact normal posterior.

``python -m tests.benchmarks gan --only kriging --seeds 0 1``. Two errors are told apart. "law": moments of many draws of the
generator, in the formula of the exact answer, which is what a perfect inference with it gives where it is normal. "AutoFlow": its
posterior under the model with this generator, against the exact answer and against that formula ("of the law").
Means in exact posterior sds, sds relative to the exact ones, over the pixels that were not measured.
"""

import statistics
import time
import warnings

import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm

SIDE, ROWS, STEPS, ERROR = 8, 4_000, 300, 0.1
FIELDS = 3  # measured, of each mask


def distances(stretch=1.0):
    """Of pixels, columns stretched."""
    grid = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).double()
    grid[:, 1] *= stretch
    return torch.cdist(grid, grid)


KERNELS = {
    "exponential": lambda d: torch.exp(-d),
    "Matern 3/2": lambda d: (1.0 + 3.0**0.5 * d) * torch.exp(-(3.0**0.5) * d),
    "Matern 5/2": lambda d: (1.0 + 5.0**0.5 * d + 5.0 / 3.0 * d * d) * torch.exp(-(5.0**0.5) * d),
    "squared exponential": lambda d: torch.exp(-0.5 * d * d),
}
# Kernel, length scale in pixels, sd of the pixel's own noise, and how much one direction is stretched.
TUNED = {
    "Matern 3/2, length 3": ("Matern 3/2", 3.0, 0.0, 1.0),
    "squared exponential, length 2, nugget .05": ("squared exponential", 2.0, 0.05, 1.0),
}
LAWS = {  # nothing was set by them
    "exponential, length 6": ("exponential", 6.0, 0.0, 1.0),
    "Matern 3/2, length 1.5": ("Matern 3/2", 1.5, 0.0, 1.0),
    "Matern 5/2, length 4, nugget .2": ("Matern 5/2", 4.0, 0.2, 1.0),
    "squared exponential, length 3, nugget .1": ("squared exponential", 3.0, 0.1, 1.0),
    "squared exponential, length 1.5": ("squared exponential", 1.5, 0.0, 1.0),
    "Matern 3/2, lengths 5 and 2": ("Matern 3/2", 5.0, 0.0, 2.5),
}


def covariance(kernel, length, nugget, stretch):
    return KERNELS[kernel](distances(stretch) / length) + (nugget**2 + 1e-10) * torch.eye(SIDE**2).double()


def mean_field():
    along = torch.arange(SIDE).double()
    return (torch.sin(along / 2.0)[:, None] + 0.3 * along).reshape(-1)


def fields(n, mean, cov):
    return (mean + torch.randn(n, len(mean)).double() @ torch.linalg.cholesky(cov).mT).float()


def masks(seed):
    """Pixels that are measured: the upper half, and 32, 16 and 6 at random."""
    order = torch.randperm(SIDE**2, generator=torch.Generator().manual_seed(seed))
    return [torch.arange(SIDE**2 // 2), *(order[:k].sort().values for k in (32, 16, 6))]


def hidden(seen):
    return torch.tensor(sorted(set(range(SIDE**2)) - set(seen.tolist())))


def given(mean, cov, seen, y, error):
    """The normal posterior of the pixels that were not measured: means and sds."""
    noisy = cov[seen][:, seen] + error**2 * torch.eye(len(seen)).double()
    gain, rest = cov[:, seen] @ torch.linalg.inv(noisy), hidden(seen)
    return (mean + gain @ (y.double() - mean[seen]))[rest], (cov - gain @ cov[seen]).diagonal()[rest].sqrt()


def measured(mean, cov, seen, seed, error):
    with torch.random.fork_rng():
        torch.manual_seed(1_000 + seed)
        truth = fields(1, mean, cov)[0]
        return truth[seen] + error * torch.randn(len(seen))


def off(found, exact):
    """Errors of means in exact sds, and ratios of sds."""
    return (found[0] - exact[0]).abs() / exact[1], found[1] / exact[1]


def summary(name, found):
    """Over fields: the mean error with its standard error, the largest, the mean ratio of sds and its range."""
    means, ratios = zip(*found, strict=True)
    each = [m.mean().item() for m in means]
    spread = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else float("nan")
    ratio = torch.cat(ratios)
    return {
        f"{name}: means off": f"{statistics.mean(each):.3f} +- {spread:.3f}, at most {torch.cat(means).max():.2f}",
        "sds": f"{ratio.mean():.3f} [{ratio.min():.2f}, {ratio.max():.2f}]",
    }


def trained(x, support=None):
    generator = dgm.Generator((SIDE, SIDE), support=support)
    gan = dgm.Adversarial(generator, dgm.Critic((SIDE, SIDE)))
    began = time.process_time()
    dgm.fit(gan, (x.reshape(-1, SIDE, SIDE),), batch_size=256, max_steps=STEPS, progress=False)
    return generator.requires_grad_(False).eval(), round(time.process_time() - began, 1)


def moments(generator, into=lambda x: x, n=200_000):
    x = into(generator.draw(n).reshape(n, -1)).double()
    return x.mean(0), x.T.cov()


def model(y, generator, seen, error, into):
    x = generator.sample_site("x")
    pyro.sample("y", dist.Normal(into(x.flatten(-2)[..., seen]), error).to_event(1), obs=y)


def by_autoflow(y, generator, seen, error, into):
    """Means and sds of the pixels that were not measured, k-hat, and CPU seconds."""
    pyro.clear_param_store()
    data, began = (y, generator, seen, error, into), time.process_time()
    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO()(model, guide), data, progress=False)
    seconds = time.process_time() - began
    idata = dgm.from_svi(model, guide, *data, num_samples=4_000, prior=0, posterior_predictive=False)
    x = into(torch.as_tensor(idata.posterior["x"].values).reshape(-1, SIDE**2))[:, hidden(seen)].double()
    return (x.mean(0), x.std(0)), dgm.khat(idata).k, seconds


def compared(generator, mean, cov, seed, error=ERROR, into=lambda x: x):
    """The law of many fields; AutoFlow of one field of each mask."""
    own, law, flow, both, ks, seconds = moments(generator, into), [], [], [], [], []
    for i in range(FIELDS):
        for j, seen in enumerate(masks(10 * seed + i)):
            y = measured(mean, cov, seen, 100 * seed + 10 * i + j, error)
            exact, formula = given(mean, cov, seen, y, error), given(*own, seen, y, error)
            law.append(off(formula, exact))
            if i == 0:
                posterior, k, spent = by_autoflow(y, generator, seen, error, into)
                flow.append(off(posterior, exact)), both.append(off(posterior, formula))
                ks.append(k), seconds.append(spent)
    guided = {"k-hat": f"{max(ks):.2f}", "CPU s of a guide": round(statistics.mean(seconds), 1)}
    return summary("law", law) | summary("AutoFlow", flow) | summary("of the law", both) | guided


def kriging(laws, seeds, rows=ROWS):
    mean = mean_field()
    for name, law in laws.items():
        for seed in seeds:
            torch.manual_seed(seed)
            cov = covariance(*law)
            generator, seconds = trained(fields(rows, mean, cov))
            yield {"row": name, "fields": rows, "seed": seed, "CPU s": seconds} | compared(generator, mean, cov, seed)


def lognormal(seeds, rows=ROWS):
    """exp of a field, whose logarithms are measured: with the support stated, and without."""
    cov, mean = covariance("Matern 3/2", 3.0, 0.1, 1.0) * 0.25, 0.5 * mean_field()
    for support in (dist.constraints.independent(dist.constraints.positive, 2), None):
        for seed in seeds:
            torch.manual_seed(seed)
            generator, seconds = trained(fields(rows, mean, cov).exp(), support)
            row = {
                "row": f"exp of a field, support {'stated' if support else 'not stated'}",
                "seed": seed,
                "CPU s": seconds,
            }
            yield row | compared(generator, mean, cov, seed, 0.5 * ERROR, lambda x: x.clamp_min(1e-3).log())


def rows_of(seeds):
    warnings.simplefilter("ignore")
    yield from kriging(TUNED, seeds)
    yield from kriging(LAWS, seeds)
    yield from kriging({"Matern 3/2, length 3": TUNED["Matern 3/2, length 3"]}, seeds, rows=1_500)
    yield from lognormal(seeds)
