"""A likelihood learned from a simulator, one datum at a time, inside a hierarchy that the simulator knows nothing of.

A detector counts decays. A conditional flow learns p(x | rate), which nobody wrote down; beside it a ratio learns it too.
"""

import argparse
import pathlib

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

import pyro_dgm as dgm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOW, HIGH = -2.0, 3.0  # of the log rates that were simulated: the learned likelihood knows nothing outside


def simulator(log_rate):
    """Time until 3 pulses are counted: gamma waiting times, a dead time after each, and jitter of the clock."""
    waiting = dist.Gamma(1.0, log_rate.exp()[..., None]).expand([*log_rate.shape, 3]).sample().sum(-1)
    dead = 0.1 * torch.rand(*log_rate.shape, 3).sum(-1)
    return (waiting + dead).log() + 0.1 * torch.randn(log_rate.shape)


def learn(steps, n=20_000):
    """The likelihood of one datum given one log rate, as a flow and as a ratio."""
    log_rate = LOW + (HIGH - LOW) * torch.rand(n, 1)
    x = simulator(log_rate)
    flow = dgm.NSF(1, context_features=1, transforms=2, hidden_features=(32, 32))
    dgm.fit(dgm.MaximumLikelihood(flow), (x, log_rate), batch_size=512, max_steps=steps, validation=0.1, seed=0)
    ratio = dgm.DensityRatio(1, context_features=1)
    dgm.fit(dgm.LogisticRegression(ratio), (x, log_rate), batch_size=512, max_steps=2 * steps, validation=0.1, seed=0)
    print("ratio:", ratio.check(x, log_rate.roll(1, 0)))
    return flow.requires_grad_(False), ratio.requires_grad_(False)


def hierarchy(learned, x):
    """Log rates of J groups around a common one, each seen through a few data: x has shape (n, J)."""
    mu, tau = pyro.sample("mu", dist.Normal(0.5, 0.7)), pyro.sample("tau", dist.HalfNormal(0.4))
    with pyro.plate("group", x.shape[-1]):
        log_rate = pyro.sample("log_rate", dist.Normal(mu, tau))
        with pyro.plate("datum", len(x)):
            if isinstance(learned, dgm.DensityRatio):
                pyro.factor("x", learned(x[..., None], log_rate[..., None]))
            else:
                pyro.sample("x", learned(log_rate[..., None]), obs=x[..., None])


def posteriors(learned, x, steps, draws):
    """By a flow guide for both, and by NUTS for the first: draws of every site."""
    found = {}
    for name, likelihood in learned.items():
        guide = dgm.AutoFlow(hierarchy)
        dgm.fit(dgm.STL_ELBO()(hierarchy, guide), (likelihood, x), max_steps=steps, seed=0)
        found[f"{name}, flow guide"] = guide.draws(4000, likelihood, x)
    chain = MCMC(NUTS(hierarchy), num_samples=draws, warmup_steps=draws // 2)
    chain.run(learned["likelihood"], x)
    return found | {"likelihood, NUTS": chain.get_samples()}


def picture(flow, found, truth, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    grid = torch.linspace(-4.0, 4.0, 400)
    for log_rate, color in ((-1.0, "C0"), (0.5, "C1"), (2.0, "C2")):
        drawn = simulator(torch.full((20_000,), log_rate))
        left.hist(drawn.numpy(), bins=120, range=(-4, 4), density=True, color=color, alpha=0.35)
        left.plot(
            grid,
            flow(torch.tensor([log_rate])).log_prob(grid[:, None]).exp(),
            color=color,
            label=f"log rate {log_rate}",
        )
    left.set(xlabel="x, log time", ylabel="density", title="Simulations and the learned likelihood")
    left.legend(frameon=False)
    for i, (name, draws) in enumerate(found.items()):
        low, mid, high = np.quantile(draws["log_rate"].numpy(), [0.05, 0.5, 0.95], axis=0)
        right.errorbar(np.arange(len(truth)) + 0.2 * (i - 1), mid, [mid - low, high - mid], fmt="o", ms=3, label=name)
    right.plot(np.arange(len(truth)), truth, "k_", ms=18, label="truth")
    right.set(xlabel="group", ylabel="log rate (90 % interval)", title="Inside a hierarchy")
    right.legend(frameon=False, fontsize=7, ncols=2, loc="upper center")
    right.set_ylim(top=right.get_ylim()[1] + 0.8)
    figure.savefig(path, dpi=150)


def main(steps, draws, groups, out):
    pyro.set_rng_seed(0)
    flow, ratio = learn(2 * steps)
    truth = 0.8 + 0.5 * torch.randn(groups)
    x = simulator(truth.expand(4, groups))
    found = posteriors({"likelihood": flow, "ratio": ratio}, x, steps, draws)
    out.mkdir(exist_ok=True)
    picture(flow, found, truth, out / "learned_likelihood.png")
    for name, d in found.items():
        low, high = d["log_rate"].quantile(0.05, 0), d["log_rate"].quantile(0.95, 0)
        print(f"{name:24s} mu {d['mu'].mean():.2f} (sd {d['mu'].std():.2f}), tau {d['tau'].mean():.2f}, "
              f"{int(((low < truth) & (truth < high)).sum())} of {groups} truths in their 90 % intervals")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    main(*((15, 20, 3) if arguments.smoke else (300, 200, 8)), arguments.out)
