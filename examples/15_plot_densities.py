"""Pictures of learned densities: a curve, two dimensions, a table, images, and the way from noise to data.

python examples/15_plot_densities.py [--smoke] [--out out]
"""

import argparse
import math
import pathlib

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits, load_wine, make_moons

import pyro_dgm as dgm


def waiting_times(n):
    """Minutes between eruptions: two kinds."""
    long = torch.rand(n) < 0.64
    return torch.where(long, 80.0 + 6.0 * torch.randn(n), 54.5 + 6.0 * torch.randn(n))[:, None]


def eight_gaussians(n):
    angle = torch.randint(8, (n,)) * math.pi / 4
    return 3.0 * torch.stack([angle.cos(), angle.sin()], -1) + 0.35 * torch.randn(n, 2)


def moons(n):
    return torch.tensor(make_moons(n, noise=0.08, random_state=n)[0]).float()


def fitted(flow, data, smoke, steps):
    pretrain = 20 if smoke else 2000
    dgm.fit(
        dgm.MaximumLikelihood(flow, pretrain=pretrain), (data,), max_steps=3 if smoke else steps, batch_size=512, seed=0
    )
    return flow


def curve(smoke, out):
    flow = fitted(dgm.FFJORD(1), waiting_times(4000), smoke, 100)
    figure = dgm.evaluate.plot_density(flow, waiting_times(500), names=["minutes until the next eruption"], seed=0)
    figure.savefig(out / "density_curve.png", dpi=150)


def plane(smoke, out):
    for make, flow, steps in ((eight_gaussians, dgm.FFJORD(2), 300), (moons, dgm.NSF(2), 1500)):
        fitted(flow, make(8000), smoke, steps)
        held_out = make(1000)
        figure = dgm.evaluate.plot_density(flow, held_out, seed=0)
        figure.savefig(out / f"density_{make.__name__}.png", dpi=150)
        figure = dgm.evaluate.plot_trajectories(flow, seed=0)
        figure.savefig(out / f"trajectories_{make.__name__}.png", dpi=150)
        score = dgm.evaluate.held_out_score(flow(), held_out)
        print(f"{make.__name__}: {score} nats")


def table(smoke, out):
    """Five columns of 178 wines."""
    wine = load_wine()
    columns = [0, 4, 6, 9, 12]
    rounding = torch.tensor([0.01, 1.0, 0.01, 0.01, 1.0])  # of the columns, undone
    rows = torch.tensor(wine.data[:, columns]).float()[torch.randperm(178)] + rounding * (torch.rand(178, 5) - 0.5)
    flow = dgm.NSF(5)
    dgm.fit(
        dgm.MaximumLikelihood(flow, pretrain=20 if smoke else 2000),
        (rows[:120],),
        max_steps=3 if smoke else 500,
        seed=0,
    )
    names = [wine.feature_names[c].replace("_", " ") for c in columns]
    dgm.evaluate.plot_density(flow, rows[120:], names=names, seed=0).savefig(out / "density_table.png", dpi=130)
    print(f"wines: {dgm.evaluate.held_out_score(flow(), rows[120:])} nats")


def images(smoke, out):
    """Digits of 8 x 8 pixels above draws of a flow over them."""
    digits = torch.tensor(load_digits().images).float()
    flow = dgm.RealNVP(
        (8, 8), support=torch.distributions.constraints.unit_interval, transforms=8, hidden_features=(128, 128)
    )
    fitted(flow, dgm.Dequantize(levels=17)(digits), smoke, 1500)
    figure, axes = plt.subplots(2, 1, figsize=(6, 4), layout="constrained")
    for ax, shown, title in zip(axes, (digits[:30] / 16.0, flow().sample((30,))), ("data", "draws"), strict=True):
        dgm.vae.plot_images(shown, 10, ax).set_title(title)
    figure.savefig(out / "density_images.png", dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True), torch.manual_seed(0)
    for part in (curve, plane, table, images):
        part(arguments.smoke, arguments.out)
