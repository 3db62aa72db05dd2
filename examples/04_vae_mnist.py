"""A conditional VAE with a flow prior on handwritten digits: p(x | z, digit), p(z | digit) a flow, q(z | x, digit).

Give the path of an ``mnist.npz`` (x_train, y_train, x_test, y_test), or see scikit-learn's 8 x 8 digits. Trained on
binarised images, drawn anew at each step; the scores are bounds on one fixed binarisation of the test images.
"""

import argparse
import pathlib

import matplotlib
import numpy as np
import torch
from torch.nn.functional import one_hot

import pyro_dgm as dgm
from pyro_dgm.evaluate import evidence_bound

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def images(path):
    """Grey levels in [0, 1] and one-hot digits, for training and for testing; and the side of an image."""
    if path:
        data = np.load(path)
        parts = [(data[f"x_{k}"] / 255.0, data[f"y_{k}"]) for k in ("train", "test")]
    else:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(x))
        parts = [(x[rows] / 16.0, y[rows]) for rows in (order[:1500], order[1500:])]
    pairs = [
        (torch.tensor(x.reshape(len(x), -1)).float(), one_hot(torch.tensor(y).long(), 10).float()) for x, y in parts
    ]
    return *pairs, round(pairs[0][0].shape[1] ** 0.5)


def made(pixels, latent, hidden, flow):
    """The pair; with or without a flow as its prior."""
    return dgm.VAE(
        prior=dgm.MAF(latent, 10, transforms=2, hidden_features=(128,)) if flow else dgm.vae.StandardNormal(latent),
        likelihood=dgm.vae.Conditional(pixels, latent + 10, dgm.vae.bernoulli, hidden_features=(hidden,)),
        posterior=dgm.vae.Conditional(latent, pixels + 10, dgm.vae.normal, hidden_features=(hidden,)),
    )


def picture(vae, test, digits, side, path):
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    classes = torch.eye(10).repeat_interleave(10, 0)
    with torch.no_grad():
        prior = vae.prior(classes)
        means = vae.decode(prior.sample(), classes).mean
        again = vae.decode(vae.embed(test[:50], digits[:50]), digits[:50]).mean
    dgm.vae.plot_images(means.reshape(-1, side, side), 10, axes[0])
    axes[0].set_title("generated, one row per digit (means of the pixels)")
    pairs = torch.stack([test[:50].reshape(5, 10, side, side), again.reshape(5, 10, side, side)], 1)
    dgm.vae.plot_images(pairs.reshape(-1, side, side), 10, axes[1])
    axes[1].set_title("test images above their reconstructions")
    figure.savefig(path, dpi=150)


def main(path, epochs, out):
    (train, digits), (grey, test_digits), side = images(path)
    torch.manual_seed(1)
    test = torch.bernoulli(grey)
    latent, hidden, batch = (50, 400, 256) if side == 28 else (10, 128, 100)
    scores = {}
    for name, flow in {"standard normal": False, "flow": True}.items():
        vae = made(train.shape[1], latent, hidden, flow)
        bound = dgm.objectives.Transformed(dgm.STL_ELBO(1)(vae.model, vae.guide), torch.bernoulli)
        dgm.fit(bound, (train, digits), lr=3e-3, batch_size=batch, max_epochs=epochs, seed=0)
        scores[name] = evidence_bound(vae, test[:300], 500, context=test_digits[:300], seed=0)
        print(f"{name} prior: log p(x | digit) >= {scores[name].mean()[0]:.2f} +- {scores[name].mean()[1]:.2f} nats")
    out.mkdir(exist_ok=True)
    picture(vae, test, test_digits, side, out / "vae_digits.png")
    print("picture:", out / "vae_digits.png")
    gain = scores["flow"].value - scores["standard normal"].value
    print(f"gain of the flow prior: {gain.mean():.2f} +- {gain.std() / len(gain) ** 0.5:.2f} nats per image")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", type=pathlib.Path, help="mnist.npz")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--smoke", action="store_true", help="two epochs, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    main(arguments.data, 2 if arguments.smoke else arguments.epochs or (5 if arguments.data else 100), arguments.out)
