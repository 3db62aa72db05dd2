"""A conditional generator: x is a ring whose radius, and the place of its gap, follow the context.

python examples/08_gan_conditional.py [--smoke] [--out out]
"""

import argparse
import math
import pathlib
import warnings

import matplotlib.pyplot as plt
import torch

import pyro_dgm as dgm


def arcs(context):
    """Three quarters of a circle of radius 1 + c, starting at the angle pi c."""
    angle = math.pi * (context + 1.5 * torch.rand_like(context))
    points = (1.0 + context) * torch.cat([angle.cos(), angle.sin()], -1)
    return points + 0.05 * torch.randn(len(context), 2)


def main(smoke, out):
    context = torch.rand(20_000, 1)
    gan = dgm.Adversarial(
        dgm.Generator(2, context_features=1), dgm.Critic(2, context_features=1), pretrain=50 if smoke else 8000
    )
    with warnings.catch_warnings():
        if smoke:
            warnings.simplefilter("ignore")  # a few steps cover nothing, and fit says so
        steps = 20 if smoke else 2000
        dgm.fit(gan, (arcs(context), context), batch_size=256, max_steps=steps, seed=0)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
    for ax, value in zip(axes, (0.0, 0.5, 1.0), strict=True):
        c = torch.full((2000, 1), value)
        data, draws = arcs(c), gan.generator(c).sample()
        score = dgm.evaluate.c2st(data, draws, seed=0)
        print(f"context {value}: C2ST {score.value:.3f} +- {score.standard_error:.3f}")
        ax.plot(*data[:500].T, ".", ms=2, label="data"), ax.plot(*draws[:500].T, ".", ms=2, label="draws")
        ax.set(title=f"c = {value}: C2ST {score.value:.3f}", xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), aspect="equal")
    axes[0].legend(frameon=False)
    figure.savefig(out / "gan_conditional.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True), torch.manual_seed(0)
    main(arguments.smoke, arguments.out)
