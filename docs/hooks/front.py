"""Draws docs/assets/front.webp: a model's posterior, a simulator's posterior, a density.

python docs/hooks/front.py
"""

import pathlib

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import make_moons

import pyro_dgm as dgm

PLACE = pathlib.Path(__file__).parents[1] / "assets/front.webp"


def schools(error, effect=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(error)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mu + tau * eta, error), obs=effect)


def model_posterior(ax):
    effect, error = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    guide = dgm.AutoFlow(schools)
    dgm.fit(dgm.STL_ELBO()(schools, guide), (error, effect), seed=0)
    idata = dgm.from_svi(schools, guide, error, effect, num_samples=20_000, seed=0)
    mu, tau = (idata.posterior[name].values.ravel() for name in ("mu", "tau"))
    ax.hexbin(mu, np.log(tau), gridsize=45, cmap="magma", mincnt=1, linewidths=0.1)
    ax.set(xlim=(-10, 18), ylim=(-3, 4), facecolor="black")
    ax.set(
        title=f"a model: the posterior is {dgm.khat(idata).status}",
        xlabel="mean effect",
        ylabel="log of how schools differ",
    )


def predators(birth, death, rng):
    hares, lynx, seen = 30.0, 4.0, []
    for step in range(200):
        grown, caught = birth * hares, 0.028 * hares * lynx
        hares, lynx = hares + 0.1 * (grown - caught), lynx + 0.1 * (0.024 * hares * lynx - death * lynx)
        if step % 20 == 19:
            seen += [hares, lynx]
    return np.maximum(np.array(seen), 1e-3) * rng.lognormal(0.0, 0.6, 20)


def simulator_posterior(ax):
    prior = {"birth": dist.Uniform(0.2, 1.0), "death": dist.Uniform(0.4, 1.4)}
    model = dgm.as_model(predators, prior=prior, observed="seen")
    sims = dgm.simulate(model, 5_000, observed=["seen"], seed=0)
    logs = {name: values.log() if name == "seen" else values for name, values in sims.items()}
    guide = dgm.AmortizedGuide(model, observed=["seen"])
    dgm.fit(dgm.ForwardKL(guide), logs, seed=0)
    seen = torch.as_tensor(predators(0.55, 0.8, np.random.default_rng(5)), dtype=torch.float32).log()
    draws = guide.condition(seen=seen).sample((2_000,))
    ax.plot(sims["birth"][:2_000], sims["death"][:2_000], ".", ms=1.5, color="0.75", label="prior")
    ax.plot(draws["birth"], draws["death"], ".", ms=1.5, color="C1", label="posterior")
    ax.plot(0.55, 0.8, "k*", ms=10, label="truth")
    ax.set(title="a simulator: which parameters it was", xlabel="births of hares", ylabel="deaths of lynx")
    ax.legend(loc="upper right", markerscale=2)


def density(ax):
    x = torch.as_tensor(make_moons(4_000, noise=0.1, random_state=0)[0], dtype=torch.float32)
    flow = dgm.FFJORD(2)
    dgm.fit(dgm.MaximumLikelihood(flow), (x,), max_steps=250, seed=0)
    across, up = torch.linspace(-1.6, 2.6, 240), torch.linspace(-1.1, 1.6, 240)
    grid = torch.stack(torch.meshgrid(across, up, indexing="xy"), -1)
    with torch.no_grad():
        height = flow().log_prob(grid.reshape(-1, 2)).exp().reshape(grid.shape[:2])
    ax.pcolormesh(across, up, height, cmap="magma", rasterized=True)
    ax.plot(*x[:250].T, ".", ms=1.5, color="w")
    ax.set(title="data: their density", xticks=[], yticks=[])


if __name__ == "__main__":
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    for draw, ax in zip((model_posterior, simulator_posterior, density), axes, strict=True):
        draw(ax)
    figure.savefig(PLACE, dpi=130, pil_kwargs={"quality": 80, "method": 6})
