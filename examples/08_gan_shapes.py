"""Eight gaussians: a generator with output noise and one without.

In two dimensions with a latent of two both fit: each starts as the student of a continuous flow. The few draws between
modes are what a continuous map of a normal cannot avoid.

python examples/08_gan_shapes.py [--smoke] [--out out]
"""

import argparse
import math
import pathlib
import warnings

import matplotlib.pyplot as plt
import torch

import pyro_dgm as dgm

ANGLE = torch.arange(8) * math.pi / 4
CENTRES = 2.0 * torch.stack([ANGLE.cos(), ANGLE.sin()], -1)


def eight_gaussians(n):
    return CENTRES[torch.randint(8, (n,))] + 0.1 * torch.randn(n, 2)


def trained(noise, smoke):
    gan = dgm.Adversarial(dgm.Generator(2, noise=noise), dgm.Critic(2), pretrain=50 if smoke else 8000)
    with warnings.catch_warnings():
        if smoke:
            warnings.simplefilter("ignore")  # a few steps cover nothing, and fit says so
        steps = 20 if smoke else 3000
        held_out = (eight_gaussians(500),)
        history = dgm.fit(gan, (eight_gaussians(20_000),), batch_size=256, max_steps=steps, validation=held_out, seed=0)
    return gan, history


@torch.no_grad()
def main(smoke, out):
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    held_out = eight_gaussians(5000)
    axes[0].plot(*held_out[:2000].T, ".", ms=1.5)
    axes[0].set_title("data")
    for ax, (title, noise) in zip(
        axes[1:], {"learned output noise": None, "no output noise": 0.0}.items(), strict=False
    ):
        with torch.enable_grad():
            gan, history = trained(noise, smoke)
        draws = gan.generator().sample((5000,))
        modes = dgm.evaluate.mode_coverage(draws, CENTRES, 0.4)
        score = dgm.evaluate.c2st(held_out, draws, seed=0)
        print(
            f"{title}: modes {8 * modes.covered.value:.0f} of 8, near a mode {modes.quality.value:.3f}, "
            f"C2ST {score.value:.3f} +- {score.standard_error:.3f}, coverage {history.quality[-1][2]:.2f}"
        )
        ax.plot(*draws[:2000].T, ".", ms=1.5, color="C1")
        ax.set_title(f"{title}: C2ST {score.value:.3f}")
    history.plot(axes[3])
    for ax in axes[:3]:
        ax.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal")
    figure.savefig(out / "gan_shapes.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True), torch.manual_seed(0)
    main(arguments.smoke, arguments.out)
