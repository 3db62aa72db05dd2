"""Handwritten digits with few labels, and with missing pixels (scikit-learn's 8 x 8 images, binarised at half grey).

1. 100 labels: a classifier trained on them alone, and one inside a VAE that sees the other 1,400 images without labels.
2. Half of each test image is hidden: imputed by a VAE that was trained on images with gaps, against the mean image and the
   nearest training image, by the log likelihood of the hidden pixels.
"""

import argparse
import pathlib

import matplotlib
import torch
from torch import nn

import pyro_dgm as dgm
from pyro_dgm.evaluate import evidence_bound
from pyro_dgm.vae import SemiSupervised

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PIXELS, LATENT = 64, 10


def digits():
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order] > 7.5).float(), y[order].long()


def network(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 128), nn.SiLU(), nn.Dropout(0.2), nn.Linear(128, outputs))


def accuracies(x, y, steps):
    """Accuracy on the last 297 images of a classifier with 100 labels, without and with 1,400 unlabelled images."""
    c, found = dgm.vae.Conditional, {}
    for name, rows in {"labels alone": 100, "with the unlabelled": 1500}.items():
        torch.manual_seed(0)
        vae = dgm.vae.SemiSupervisedVAE(
            dgm.vae.StandardNormal(LATENT),
            c(PIXELS, LATENT + 10, dgm.vae.bernoulli, hidden_features=(128,)),
            c(LATENT, PIXELS + 10, dgm.vae.normal, hidden_features=(128,)),
            c((), PIXELS, dgm.vae.categorical(10), network=network(PIXELS, 10)),
            classes=10,
        )
        seen = torch.where(torch.arange(rows) < 100, y[:rows], -1)
        objective = SemiSupervised(vae, weight=15.0) if rows > 100 else vae.classification
        dgm.fit(objective, (x[:rows], seen), lr=3e-3, max_steps=steps, batch_size=min(rows, 300), seed=0)
        vae.eval()
        found[name] = float((vae.classify(x[1500:]).argmax(-1) == y[1500:]).double().mean())
        print(f"accuracy, {name}: {found[name]:.3f} +- {(found[name] * (1 - found[name]) / 297) ** 0.5:.3f}")
    return found


def with_gaps(x, steps):
    """A VAE whose encoder also takes the mask, trained on images in which a random share is hidden."""
    c = dgm.vae.Conditional
    vae = dgm.VAE(
        dgm.vae.StandardNormal(LATENT),
        c(PIXELS, LATENT, dgm.vae.bernoulli, hidden_features=(128,)),
        c(LATENT, 2 * PIXELS, dgm.vae.normal, hidden_features=(128,)),
    )
    masks = torch.rand(len(x), PIXELS) < torch.rand(len(x), 1)
    objective = dgm.STL_ELBO(4)(vae.model, vae.guide)
    dgm.fit(objective, (x, None, masks), lr=3e-3, max_steps=steps, batch_size=300, seed=0)
    return vae


def hidden_scores(vae, train, test, mask):
    """Log likelihood of the hidden pixels per image: the VAE's bound of p(all) / p(seen), and two smoothed guesses."""
    full = evidence_bound(vae, test, 1000, mask=torch.ones_like(mask), seed=0).value
    seen = evidence_bound(vae, test, 1000, mask=mask, seed=0).value
    nearest = train[((test[:, None] - train[None]).abs() * mask[:, None]).sum(-1).argmin(1)]
    flips = float((nearest != test)[~mask].double().mean())  # known from these very images: in the guess's favour
    guesses = {"mean image": train.mean(0).clamp(1e-3, 1 - 1e-3), "nearest image": nearest * (1 - 2 * flips) + flips}
    hidden = {k: (torch.distributions.Bernoulli(p).log_prob(test) * ~mask).sum(-1).double() for k, p in guesses.items()}
    return {"VAE": full - seen, **hidden}


def main(steps, out):
    x, y = digits()
    accuracies(x, y, steps)
    vae, test = with_gaps(x[:1500], 2 * steps), x[1500:]
    mask = torch.ones_like(test, dtype=torch.bool)
    mask[:, 32:] = False
    scores = hidden_scores(vae, x[:1500], test, mask)
    for name, score in scores.items():
        print(f"hidden half, {name}: {score.mean():.2f} +- {score.std() / len(score) ** 0.5:.2f} nats per image")
    draws = dgm.vae.impute(vae, test[:10], mask[:10], num_samples=4, seed=0)
    shown = torch.cat([test[:10], torch.where(mask[:10], test[:10], 0.4), *draws]).reshape(-1, 8, 8)
    out.mkdir(exist_ok=True)
    axes = dgm.vae.plot_images(shown, 10, plt.subplots(figsize=(6, 3.8), layout="constrained")[1])
    axes.set_title("images, their upper halves, and four imputations each", fontsize=10)
    axes.figure.savefig(out / "vae_labels.png", dpi=150)
    print("picture:", out / "vae_labels.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    main(20 if arguments.smoke else 1500, arguments.out)
