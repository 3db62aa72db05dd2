"""Continuous flows: toys and trajectories, transport with and without regularisation, a conditional flow on irises.

python examples/03_continuous_flows.py [--smoke] [--out out]
"""

import argparse
import math
import pathlib

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_iris

import pyro_dgm as dgm


def eight_gaussians(n):
    angle = torch.randint(8, (n,)) * math.pi / 4
    return 2.0 * torch.stack([angle.cos(), angle.sin()], -1) + 0.25 * torch.randn(n, 2)


def pinwheel(n):
    r, t = 1.0 + 0.3 * torch.randn(n), 0.1 * torch.randn(n)
    a = 2 * math.pi / 5 * torch.randint(5, (n,)) + 0.25 * r.exp()
    return 2.0 * torch.stack([r * a.cos() + t * a.sin(), -r * a.sin() + t * a.cos()], -1)


def fitted(flow, data, smoke, **options):
    objective = dgm.MaximumLikelihood(flow, **{"pretrain": 2000} | options | ({"pretrain": 10} if smoke else {}))
    dgm.fit(objective, data, batch_size=min(512, len(data[0])), max_steps=2 if smoke else 200, seed=0)
    return flow


@torch.no_grad()
def paths(flow, n, steps=96):
    """Trajectories from noise to data in the data's units, shape (steps + 1, n, 2), and their transport cost."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    track, cost = [x], 0.0
    for i in range(steps):  # the midpoint rule is enough for a picture
        t = torch.full((n, 1), i / steps)
        velocity = flow.velocity(t + 0.5 / steps, x + 0.5 / steps * flow.velocity(t, x))
        x, cost = x + velocity / steps, cost + 0.5 * velocity.square().sum(-1).mean() / steps
        track.append(x)
    return flow.standard.transform()(torch.stack(track)), cost


@torch.no_grad()
def toys(smoke, out):
    figure, grid = plt.subplots(2, 4, figsize=(13, 6.5), layout="constrained")
    for axes, make in zip(grid, (eight_gaussians, pinwheel), strict=True):
        with torch.enable_grad():
            flow = fitted(dgm.FFJORD(2), (make(5000),), smoke)
        x, side = make(2000), 20 if smoke else 90
        low, high = x.min(0)[0] - 0.5, x.max(0)[0] + 0.5
        points = torch.cartesian_prod(*[torch.linspace(a, b, side) for a, b in zip(low, high, strict=True)])
        box = (low[0], high[0], low[1], high[1])
        axes[0].plot(*x.T, ".", ms=1.5)
        axes[1].imshow(flow().log_prob(points).exp().reshape(side, side).T, origin="lower", extent=box, aspect="auto")
        axes[2].plot(*flow().sample((2000,)).T, ".", ms=1.5, color="C1")
        track, _ = paths(flow, 60)
        axes[3].plot(track[..., 0], track[..., 1], lw=0.6, color="0.5")
        axes[3].plot(*track[0].T, ".", ms=3), axes[3].plot(*track[-1].T, ".", color="C1")
        score = -flow().log_prob(x)
        print(f"{make.__name__}: {score.mean():.3f} +- {score.std() / 2000**0.5:.3f} nats, {flow.solver.steps} steps")
    for ax, title in zip(grid[0], ("data", "density", "draws", "trajectories, noise to data"), strict=True):
        ax.set_title(title)
    figure.savefig(out / "continuous_toys.png", dpi=100)


def transport(smoke, out):
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.7), layout="constrained", sharex=True, sharey=True)
    titles = {"without costs": {"kinetic": 0.0}, "with transport and HJB cost": {"transport": 0.1, "hjb": 0.1}}
    for ax, (title, costs) in zip(axes, titles.items(), strict=True):
        flow = fitted(dgm.OTFlow(2, hidden_features=128), (eight_gaussians(5000),), smoke, pretrain=1, **costs)
        track, cost = paths(flow, 100)
        ax.plot(track[..., 0], track[..., 1], lw=0.6, color="0.5"), ax.plot(*track[-1].T, ".", color="C1")
        ax.set_title(f"{title}: {cost:.2f}")
        print(f"OTFlow {title}: transport cost {cost:.2f}, {-flow().log_prob(eight_gaussians(2000)).mean():.3f} nats")
    figure.savefig(out / "continuous_transport.png", dpi=100)


def irises(smoke, out):
    """Petal length and width given species and sepal length: a density for every context."""
    table = load_iris(as_frame=True).frame.sample(frac=1.0, random_state=0).values
    x = torch.tensor(table[:, 2:4]).float() + 0.1 * (torch.rand(150, 2) - 0.5)  # undo the rounding to 0.1 cm
    species = torch.nn.functional.one_hot(torch.tensor(table[:, 4]).long(), 3)
    context = torch.cat([species, torch.tensor(table[:, :1]) - 5.8], -1).float()
    flow = fitted(dgm.FFJORD(2, 4, hidden_features=8), (x[:120], context[:120]), smoke, kinetic=0.1, pretrain=300)
    score = -flow(context[120:]).log_prob(x[120:]).detach()
    print(f"irises, 30 held out: {score.mean():.2f} +- {score.std() / 30**0.5:.2f} nats")
    figure, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for k, name in enumerate(load_iris().target_names):
        rows = species[:, k] == 1
        ax.plot(*flow(context[rows]).sample((20,)).reshape(-1, 2).T, ".", ms=2, alpha=0.3, color=f"C{k}")
        ax.plot(*x[rows].T, "o", ms=4, mec="k", color=f"C{k}", label=name)
    ax.set(xlabel="petal length (cm)", ylabel="petal width (cm)", title="data (large), conditional draws (small)")
    ax.legend(frameon=False), figure.savefig(out / "continuous_irises.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True), torch.manual_seed(0)
    for part in (toys, transport, irises):
        part(arguments.smoke, arguments.out)
