"""Does the verdict catch bad fits of large models? Faults planted in posteriors of 100 to 2,000 latents, and the fits as they are.

A fault counts as caught where the verdict is "usable" or "bad"; a fit as it is that is called either is a false alarm. Chosen so
that each fault is one that a user would mind: half a standard deviation of a global, 30 % of a width, a tenth of the elements.
"""

import math
import warnings
from copy import deepcopy

import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm
from tests.benchmarks import hierarchies, scaling
from tests.benchmarks._verdict_truth import container, fitted


def groups(kind, count):
    return lambda: (hierarchies.hierarchy(kind), hierarchies.drawn(kind, count, seed=count))


def slopes():
    """Intercepts and slopes of 85 groups, correlated."""
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(85, 12, generator=generator), torch.randn(85, 2, 1, generator=generator)
    y = 1.0 + z[:, 0] + (0.5 + 0.4 * z[:, 1]) * x + 0.7 * torch.randn(85, 12, generator=generator)

    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
        corr = pyro.sample("corr", dist.LKJCholesky(2, torch.tensor(2.0)))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))[..., None, None]
        with pyro.plate("group", 85, dim=-2):
            tril = (tau[..., None] * corr)[..., None, None, :, :]
            b = pyro.sample("b", dist.MultivariateNormal(mu[..., None, None, :], scale_tril=tril))
            with pyro.plate("row", 12, dim=-1):
                pyro.sample("y", dist.Normal(b[..., 0] + b[..., 1] * x, sigma), obs=y)

    return model, (x, y)


def funnel():
    """A hundred dimensions."""

    def model():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(99), (v / 2).exp()[..., None]).to_event(1))

    return model, ()


def normal():
    """A normal law of 200 dimensions, of scales from .01 to 100."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(200, 200, generator=generator)).Q
    root = torch.linalg.qr((turn * torch.logspace(-2, 2, 200)).mT).R.mT
    tril = root * root.diagonal().sign()

    def model():
        pyro.sample("x", dist.MultivariateNormal(torch.ones(200), scale_tril=tril))

    return model, ()


def logistic(d):
    """Slopes of 500 rows: no start is exact, and a gap of a nat is spread over all of them."""
    return lambda: scaling.logistic(d)[:2]


POSTERIORS = {"normal groups: 200": groups("normal", 200), "counts of groups: 1,000": groups("poisson", 1000),
              "trials of groups: 200": groups("binomial", 200), "slopes: 85": slopes, "funnel: 100": funnel, "normal: 200": normal,
              "slopes of rows: 100": logistic(100), "slopes of rows: 300": logistic(300)}  # fmt: skip


def of_globals(shift, log_scale):
    def plant(guide):
        guide._posterior.affine.add_(guide._posterior.affine.new_tensor([[shift], [log_scale]]))

    return plant


def of_elements(share, shift=0.0, narrow=1.0, wide=1.0, answer=0.0):
    """A share of the elements: moved by so many sds, also for each sd of a global; their sds divided and multiplied."""

    def plant(guide):
        for group in guide.plated.groups:
            some = slice(math.ceil(share * len(group)))
            root = group.log_root[some][..., 0].exp()
            group.shift[some][..., 0].add_(shift * (1.0 + root.square()).sqrt() / root)
            group.shift[some][..., 1].add_(answer * (1.0 + root.square()).sqrt() / root)
            group.log_root[some][..., 0].copy_(0.5 * (narrow**2 * (1.0 + root.square()) - 1.0).log())
            group.scale[some].mul_(wide)

    return plant


FAULTS = {"globals moved by half a sd": of_globals(0.5, 0.0), "globals too narrow (.7)": of_globals(0.0, math.log(0.7)),
          "globals too wide (1.5)": of_globals(0.0, math.log(1.5))}  # fmt: skip
OF_ELEMENTS = {"elements moved by half a sd": of_elements(1.0, shift=0.5), "elements too narrow (.5)": of_elements(1.0, narrow=2.0),
               "elements too wide (1.5)": of_elements(1.0, wide=1.5),
               "a tenth of the elements moved by a sd": of_elements(0.1, shift=1.0),
               "elements that answer to a global wrongly": of_elements(1.0, answer=1.0)}  # fmt: skip


def of_latents(shift=0.0, scale=1.0, share=0.0, mixed=0.0):
    """Of one flow over all: some latents (the last, or a share) moved by so many sds, wider; the last two correlated."""

    def plant(guide):
        whitened = guide._posterior.components[0]
        some = slice(math.floor((1.0 - share) * len(whitened.loc)) if share else -1, None)
        sd = whitened.scale_tril.norm(dim=-1)
        whitened.loc[some] += shift * sd[some]
        whitened.scale_tril[some] *= scale
        pair = whitened.scale_tril[-1] / sd[-1], whitened.scale_tril[-2] / sd[-2]
        whitened.scale_tril[-1] = sd[-1] * (math.sqrt(1.0 - mixed**2) * pair[0] + mixed * pair[1])

    return plant


OF_LATENTS = {"one latent moved by .3 sd": of_latents(shift=0.3), "one latent too narrow (.75)": of_latents(scale=0.75),
              "two latents correlated by .5": of_latents(mixed=0.5),
              "a quarter of the latents moved by .15 sd": of_latents(shift=0.15, share=0.25),
              "all latents too narrow (.88)": of_latents(scale=0.88, share=1.0)}  # fmt: skip


DRAWS = 1_000


def verdict(model, args, guide):
    return dgm.khat(container(model, guide, args, DRAWS))


def rows_of(name):
    pyro.set_rng_seed(20)
    model, args = POSTERIORS[name]()
    guide = fitted(model, args)
    yield name, "none", verdict(model, args, guide)
    kept = deepcopy(guide._posterior.state_dict())
    for fault, plant in (FAULTS | (OF_ELEMENTS if guide.follows_plates else OF_LATENTS)).items():
        with torch.no_grad():
            plant(guide)
        yield name, fault, verdict(model, args, guide)
        guide._posterior.load_state_dict(kept)
    if args:
        stale = (*args[:-1], args[-1].flip(0))
        yield name, "data of other groups", verdict(model, stale, guide)


def main(arguments):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts = {"caught": 0, "faults": 0, "false alarms": 0, "fits": 0}
    print(f"{'posterior':26s}{'fault':44s}{'k-hat':>7s}{'gap':>9s}{'rows good':>11s}  verdict")
    for name in arguments.only or POSTERIORS:
        for _, fault, v in rows_of(name):
            fine = f"{v.rows.fine:.0%}" if v.rows else ""
            print(f"{name:26s}{fault:44s}{v.k:7.2f}{v.gap:9.3f}{fine:>11s}  {v.status}", flush=True)
            alarm = v.status in ("usable", "bad")
            counts["fits" if fault == "none" else "faults"] += 1
            counts["false alarms" if fault == "none" else "caught"] += alarm
    print(", ".join(f"{k} {n}" for k, n in counts.items()))
