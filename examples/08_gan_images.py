"""Handwritten digits of 8 x 8 pixels by a Wasserstein generator with gradient penalty.

python examples/08_gan_images.py [--smoke] [--out out]
"""

import argparse
import pathlib
import warnings

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import pyro_dgm as dgm


def tiled(images):
    """64 images in 8 rows of 8, with white lines between them."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    return padded.reshape(8, 8, 10, 10).transpose(1, 2).reshape(80, 80)


def main(smoke, out):
    levels = torch.tensor(load_digits().images).float()
    images = dgm.Dequantize(17)(levels)[torch.randperm(len(levels))]
    train, held_out = images[:1297], images[1297:]
    options = {"loss": "wgan-gp", "critic_steps": 3, "pretrain": 50 if smoke else None}
    gan = dgm.Adversarial(dgm.Generator((8, 8)), dgm.Critic((8, 8)), **options)
    with warnings.catch_warnings():
        if smoke:
            warnings.simplefilter("ignore")  # a few steps cover nothing, and fit says so
        steps = 10 if smoke else 1500
        history = dgm.fit(gan, (train,), batch_size=128, max_steps=steps, validation=(held_out,), seed=0)
    draws = gan.generator().sample((500,))
    near = dgm.evaluate.precision_recall_density_coverage(held_out, draws)
    score = dgm.evaluate.c2st(held_out, draws, seed=0)
    print(
        f"C2ST {score.value:.3f} +- {score.standard_error:.3f}, density {near.density.value:.2f}, coverage "
        f"{near.coverage.value:.2f} +- {near.coverage.standard_error:.2f}"
    )
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    titles = "held out", f"draws: C2ST {score.value:.2f}, coverage {near.coverage.value:.2f}"
    for ax, title, rows in zip(axes, titles, (held_out, draws), strict=False):
        ax.imshow(tiled(rows[:64]), cmap="gray_r", vmin=0, vmax=1)
        ax.set(title=title, xticks=[], yticks=[])
    axes[2].plot([q[0] for q in history.quality], [q[2] for q in history.quality], "o-")
    axes[2].set(xlabel="step", ylabel="coverage of held-out rows", ylim=(0, 1.05))
    figure.savefig(out / "gan_images.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True), torch.manual_seed(0)
    main(arguments.smoke, arguments.out)
