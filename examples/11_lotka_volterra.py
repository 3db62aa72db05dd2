"""Lynx and hares: learn the posterior of an ODE's rates for any data once, ask it for the real series, and refine it.

Pelts that the Hudson's Bay Company took in 1900-1920, in thousands (Howard 2009; Carpenter 2018, "Predator-prey population
dynamics: the Lotka-Volterra model in Stan"). The number at the end is the share of the data in 90 % predictive intervals.
"""

import argparse
import pathlib

import matplotlib
import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm
from pyro_dgm.diagnostics import misspecification

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HARE = "30 47.2 70.2 77.4 36.3 20.6 18.1 21.4 22 25.4 27.1 40.3 57 76.6 52.3 19.5 11.2 7.6 14.6 16.2 24.7"
LYNX = "4 6.1 9.8 35.2 59.4 41.7 19 13 8.3 9.1 7.4 8 12.3 19.5 45.7 51.1 29.7 15.8 9.7 10.1 8.6"
PELTS = torch.tensor([[float(v) for v in row.split()] for row in (HARE, LYNX)]).T.log()
STEP = 0.1


def slope(z, rate):
    """Of the logarithms of hares and lynx: birth - hunt * lynx, and growth * hares - death."""
    birth, hunt, death, growth = rate.unbind(-1)
    hare, lynx = z.unbind(-1)
    return torch.stack([birth - hunt * lynx.exp(), growth * hare.exp() - death], -1)


def populations(start, rate):
    """Logarithms in 21 years, ``(*batch, 21, 2)``, by Runge-Kutta steps of the fourth order."""
    z, years = start, [start]
    for step in range(1, round(20 / STEP) + 1):
        a = slope(z, rate)
        b = slope(z + STEP / 2 * a, rate)
        c = slope(z + STEP / 2 * b, rate)
        z = z + STEP / 6 * (a + 2 * b + 2 * c + slope(z + STEP * c, rate))
        if step % round(1 / STEP) == 0:
            years.append(z)
    return torch.stack(years, -2)


def model(pelts=None):
    middle = torch.tensor([0.6, 0.03, 0.8, 0.025]).log()
    rate = pyro.sample("rate", dist.LogNormal(middle, 0.5).to_event(1))
    start = pyro.sample("start", dist.Normal(torch.tensor([30.0, 6.0]).log(), 0.5).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.7))
    mean = populations(start, rate)
    return pyro.sample("pelts", dist.Normal(mean, noise[..., None, None]).to_event(2), obs=pelts)


def picture(draws, predicted, path):
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for i, (ax, name) in enumerate(zip(axes, ("hares", "lynx"), strict=False)):
        low, mid, high = predicted[..., i].exp().quantile(torch.tensor([0.05, 0.5, 0.95]), 0)
        ax.fill_between(range(1900, 1921), low, high, alpha=0.3, color=f"C{i}", label="90 % predictive")
        ax.plot(range(1900, 1921), mid, color=f"C{i}")
        ax.plot(range(1900, 1921), PELTS[:, i].exp(), "ko", ms=4, label="pelts (thousands)")
        ax.set(title=name, ylim=(0, 1.6 * float(PELTS[:, i].exp().max())), xticks=range(1900, 1921, 5))
        ax.legend(frameon=False, fontsize=8)
    axes[2].plot(draws["rate"][:1500, 0], draws["rate"][:1500, 2], ".", ms=2, color="C2")
    axes[2].set(title="posterior", xlabel="birth of hares (1 / year)", ylabel="death of lynx (1 / year)")
    figure.savefig(path, dpi=120)


def main(smoke, out):
    out.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    sims = dgm.simulate(model, 1_000 if smoke else 20_000, observed=["pelts"], seed=0)
    print(sims)
    guide = dgm.AmortizedGuide(model, observed=["pelts"])
    dgm.fit(dgm.ForwardKL(guide), sims, seed=0, max_steps=50 if smoke else None)
    print("in the simulator's range:", misspecification(sims, pelts=PELTS))
    refined = guide.condition(pelts=PELTS).refine(100 if smoke else 4_000, steps=10 if smoke else None, seed=0)
    print(refined)
    for name, value in refined.draws.items():
        numbers = [[round(v, 3) for v in f(0).reshape(-1).tolist()] for f in (value.mean, value.std)]
        print(f"{name:6s} mean {numbers[0]} sd {numbers[1]}")
    torch.manual_seed(0)
    draws = refined.draws
    mean = populations(draws["start"], draws["rate"])
    predicted = mean + draws["noise"][:, None, None] * torch.randn_like(mean)
    low, high = predicted.quantile(torch.tensor([0.05, 0.95]), 0)
    picture(draws, predicted, out / "lotka_volterra.png")
    print(
        f"in 90 % predictive intervals: {((PELTS > low) & (PELTS < high)).float().mean():.0%} of {PELTS.numel()} numbers"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    main(arguments.smoke, arguments.out)
