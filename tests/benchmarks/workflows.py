"""``dgm.workflow`` on 500 data sets of four models, beside exact posteriors: is what it lets pass right?

``--only counts`` takes one model of ``counts`` (two coefficients of Poisson counts, exact on a grid), ``hierarchy`` (mean, sd and
effects of eight groups, exact on a grid of the sd), ``two_moons`` (two crescents) and ``slcp`` (five parameters, four modes); of
these two 8,000 exact draws are taken, one second each of slcp. ``--count`` is the number of data sets: one in twenty is planted,
half of these from a wider prior (of two_moons: from the prior's edge), half with a contaminated datum. ``--sizes`` are the simulations of a training. Each model has two guides: with the default training, and
stopped after 300 steps.

Errors are the largest over all parameters: of a mean in exact standard deviations, and of a log standard deviation. 1,000
draws have an error of .03 in each. Data sets beyond .2 sd are run again with 4,000 draws, which tells a fault from chance.
Seconds are CPU seconds.
"""

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm
from tests.benchmarks import counts
from tests.benchmarks._sbi_tasks import exact_posterior, points, slcp, two_moons

BAR = 0.2  # sd
PLANTED = 20  # one in so many data sets
SHORT = 300  # steps of the guide that is trained too little
GROUPS, NOISE = 8, 2.0


def hierarchy(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(3.0))
    with pyro.plate("group", GROUPS, dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        return pyro.sample("y", dist.Normal(theta, NOISE), obs=y)


def of_hierarchy(y, points=4000):
    """Mean and sd of mu, tau and the effects: all but tau are normal given tau, which stands on a grid."""
    tau = (torch.arange(points, dtype=torch.float64) + 0.5) * (24.0 / points)
    variance = tau.square() + NOISE**2
    precision = 1.0 / 25.0 + GROUPS / variance
    mu = y.sum() / variance / precision
    log_p = -0.5 * (tau / 3.0).square() - 0.5 * GROUPS * variance.log() - 0.5 * y.square().sum() / variance
    weight = (log_p + 0.5 * precision * mu.square() - 0.5 * precision.log()).softmax(0)
    share = tau.square() / variance  # of a group's own datum
    theta = share * y[:, None] + (1.0 - share) * mu
    within = share * NOISE**2 + (1.0 - share).square() / precision
    means = torch.cat([mu[None], tau[None], theta])
    variances = torch.cat([1.0 / precision[None], torch.zeros(1, points), within.expand(GROUPS, -1)])
    mean = (weight * means).sum(1)
    return mean, ((weight * (variances + means.square())).sum(1) - mean.square()).sqrt()


def of_counts(y):
    middle, curvature = counts.mode(y)
    grid = middle + counts.GRID @ torch.linalg.cholesky(torch.linalg.inv(curvature)).mT
    weight = counts.log_joint(grid, y).softmax(0)
    mean = weight @ grid
    return mean, (weight @ (grid - mean).square()).sqrt()


def by_draws(task, x):
    draws = exact_posterior(task, x.float(), 8000).double()
    return draws.mean(0), draws.std(0)


class Case(NamedTuple):
    """A model, the name of its data, mean and sd of its parameters side by side, and its prior's and its data's disturbance."""

    model: Callable
    data: str
    exact: Callable
    wide: Callable
    contaminated: Callable


def outlier(shift):
    """The last number of the data is moved."""

    def moved(data):
        data = data.clone()
        data[..., -1] += shift
        return data

    return moved


def wide_counts(n):
    at = 6.0 * torch.randn(n, 2, dtype=torch.float64).clamp(-1.0, 1.0)
    return dist.Poisson((at @ counts.DESIGN.mT).exp().float()).sample()


def wide_hierarchy(n):
    return (
        15.0 * torch.randn(n, 1)
        + 9.0 * torch.randn(n, 1).abs() * torch.randn(n, GROUPS)
        + NOISE * torch.randn(n, GROUPS)
    )


def wide_slcp(n):
    """Points in a box that is wider by half, of all scales there are."""
    at = torch.rand(n, 5) * 6.0 - 3.0
    at[:, :2] *= 1.2
    return points(at).sample()


def edge_of_moons(n):
    at = (0.95 + 0.05 * torch.rand(n, 2)) * (2.0 * torch.randint(2, (n, 2)) - 1.0)
    return (
        pyro.poutine.trace(pyro.poutine.condition(pyro.plate("n", n)(two_moons), {"theta": at}))
        .get_trace()
        .nodes["data"]["value"]
    )


CASES = {
    "counts": Case(counts.model, "y", of_counts, wide_counts, outlier(30.0)),
    "hierarchy": Case(hierarchy, "y", of_hierarchy, wide_hierarchy, outlier(25.0)),
    "two_moons": Case(two_moons, "data", partial(by_draws, "two_moons"), edge_of_moons, outlier(0.02)),
    "slcp": Case(slcp, "data", partial(by_draws, "slcp"), wide_slcp, outlier(4.0)),
}


def data_sets(case, count):
    """Of the prior, the last one in twenty planted; and which these are."""
    data = dgm.simulate(case.model, count, observed=[case.data], seed=4711, progress=False)[case.data].clone()
    planted = count // PLANTED
    torch.manual_seed(4711)
    if planted:
        half = planted // 2
        data[count - planted : count - half] = case.wide(planted - half)
        data[count - half :] = case.contaminated(data[count - half :])
    return data, torch.arange(count) >= count - planted


def trained(case, size, steps, seed):
    sims = dgm.simulate(case.model, size, observed=[case.data], seed=seed, progress=False)
    torch.manual_seed(seed)
    guide = dgm.AmortizedGuide(case.model, observed=[case.data])
    began = time.process_time()
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=steps, progress=False, seed=seed)
    return guide, time.process_time() - began


def errors(found, truth):
    """Of means in sd and of log sds, ``(M,)`` each: the largest over the parameters."""
    draws = torch.cat([v.double().reshape(*v.shape[:2], -1) for v in found.draws.values()], -1)
    mean, sd = truth
    return ((draws.mean(1) - mean) / sd).abs().amax(1), (draws.std(1) / sd).log().abs().amax(1)


def judged(guide, case, data, truth, planted, num_samples=1000):
    """A line for each status, and the data sets beyond the bar with their errors once more by 4,000 draws."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = dgm.workflow(guide, {case.data: data}, num_samples=num_samples, seed=0, progress=False)
    pace = (time.process_time() - cpu) / (time.perf_counter() - wall)
    off, off_sd = errors(found, truth)
    rows = []
    for status in dict.fromkeys(found.status):
        at = torch.tensor(found.where(status))
        beyond = at[off[at] > BAR]
        rows.append({
            "status": status,
            "data sets": len(at),
            "planted": int(planted[at].sum()),
            "seconds each": round(pace * sum(found.seconds[i] for i in at) / len(at), 3),
            "mean error": round(float(off[at].mean()), 3),
            "largest": round(float(off[at].max()), 3),
            "log sd error": round(float(off_sd[at].mean()), 3),
            "largest log sd": round(float(off_sd[at].max()), 3),
            "beyond": [again(guide, case, data, truth, found, off, int(i)) for i in beyond] if status != "refused" else len(beyond),
        })  # fmt: skip
    return rows, time.process_time() - cpu


def again(guide, case, data, truth, found, off, i):
    """One data set once more."""
    more = dgm.workflow(guide, {case.data: data[i : i + 1]}, num_samples=4000, seed=1, progress=False)
    error = errors(more, [t[i : i + 1] for t in truth])[0]
    return {
        "place": i,
        "error": round(float(off[i]), 3),
        "khat": round(found.khat[i], 2),
        "gap": round(found.gap[i], 3),
        "ess": round(found.ess[i]),
        "with 4,000": [more.status[0], round(float(error), 3)],
    }


def main(arguments):
    warnings.simplefilter("ignore")
    rows = []
    for name in arguments.only or CASES:
        case = CASES[name]
        data, planted = data_sets(case, arguments.count or 500)
        truth = [torch.stack(t) for t in zip(*(case.exact(x.double()) for x in data), strict=True)]
        for steps in (None, SHORT):
            for size in arguments.sizes:
                for seed in arguments.seeds:
                    rows += one(name, case, data, planted, truth, steps, size, seed)
    return rows


def one(name, case, data, planted, truth, steps, size, seed):
    guide, training = trained(case, size, steps, seed)
    found, seconds = judged(guide, case, data, truth, planted)
    head = {
        "model": name,
        "simulations": size,
        "steps": steps or "default",
        "seed": seed,
        "training": round(training, 1),
    }
    print(head | {"seconds of all": round(seconds, 1)}, flush=True)
    for row in found:
        print("   ", row, flush=True)
    return [head | row for row in found]
