"""Two real posteriors that are not Gaussian, by a flow and by NUTS: eight schools, and a robust regression.

The data: the effects of coaching in eight schools (Rubin 1981), and the loss of ammonia in 21 days of a plant
(Brownlee 1965), where a Student-t likelihood must find by itself how heavy its tails are.
"""

import argparse
import pathlib

import arviz as az
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

import pyro_dgm as dgm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
AIR = torch.tensor([80, 80, 75, 62, 62, 62, 62, 62, 58, 58, 58, 58, 58, 58, 50, 50, 50, 50, 50, 56, 70.0])
WATER = torch.tensor([27, 27, 25, 24, 22, 23, 24, 24, 23, 18, 18, 17, 18, 19, 18, 18, 19, 19, 20, 20, 20.0])
ACID = torch.tensor([89, 88, 90, 87, 87, 87, 93, 93, 87, 80, 89, 88, 82, 93, 89, 86, 72, 79, 80, 82, 91.0])
LOSS = torch.tensor([42, 37, 37, 28, 18, 18, 19, 20, 15, 14, 14, 13, 11, 12, 8, 7, 8, 8, 9, 15, 15.0])
DAYS = torch.stack([AIR, WATER, ACID], -1)


def eight_schools(error, effect=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(error)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("effect", dist.Normal(theta, error), obs=effect)


def stack_loss(x, loss=None):
    z = (x - x.mean(0)) / x.std(0)
    level = pyro.sample("level", dist.Normal(20.0, 20.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    df = pyro.sample("df", dist.Gamma(2.0, 0.1))
    with pyro.plate("day", len(x)):
        mean = level + (z * slope).sum(-1)
        pyro.sample("loss", dist.StudentT(df, mean, sigma), obs=loss)


def by_nuts(model, data, draws):
    mcmc = MCMC(NUTS(model), num_samples=draws, warmup_steps=draws // 4, num_chains=2)
    mcmc.run(*data)
    return mcmc.get_samples()


def compare(idata, nuts):
    """Largest difference of posterior means between flow and NUTS, in posterior standard deviations."""
    worst = 0.0
    for name, draws in nuts.items():
        flow = idata.posterior[name].values[0].reshape(-1, *draws.shape[1:])
        worst = max(worst, float(np.abs((flow.mean(0) - draws.numpy().mean(0)) / draws.numpy().std(0)).max()))
    return worst


def picture(idata, nuts, names, path):
    figure, axes = plt.subplots(1, len(names) + 1, figsize=(4 * (len(names) + 1), 3.5), layout="constrained")
    for ax, name in zip(axes, names, strict=False):
        flow, other = idata.posterior[name].values[0], nuts[name].numpy()
        edges = np.linspace(*np.quantile(np.concatenate([flow, other]), [0.002, 0.99]), 40)
        ax.hist(flow, edges, density=True, alpha=0.5, label="flow")
        ax.hist(other, edges, density=True, histtype="step", color="k", label="NUTS")
        ax.set(xlabel=name, yticks=[])
    axes[0].legend(frameon=False)
    az.plot_ppc(idata, ax=axes[-1], num_pp_samples=100, random_seed=0)
    figure.savefig(path, dpi=120)


def main(smoke, out):
    out.mkdir(exist_ok=True)
    problems = {
        "eight_schools": (eight_schools, (ERROR, EFFECT), ["mu", "tau"]),
        "stack_loss": (stack_loss, (DAYS, LOSS), ["sigma", "df"]),
    }
    for title, (model, data, shown) in problems.items():
        pyro.set_rng_seed(1)
        guide = dgm.AutoFlow(model)
        dgm.fit(dgm.STL_ELBO()(model, guide), data, max_steps=20 if smoke else None)
        idata = dgm.from_svi(model, guide, *data, num_samples=200 if smoke else 4000)
        print(f"\n{title}\n", az.summary(idata, kind="stats"), "\n", dgm.khat(idata), sep="")
        nuts = by_nuts(model, data, 20 if smoke else 2000)
        print(f"posterior means: at most {compare(idata, nuts):.3f} sd from NUTS")
        picture(idata, nuts, shown, out / f"{title}.png")
        print("picture:", out / f"{title}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    main(arguments.smoke, arguments.out)
