"""Four families on the same data, one table: what each can answer about density, samples and codes, and what it cannot.

The data are scikit-learn's 8 x 8 digits, 1,797 images of 17 grey levels, made continuous by noise within a level. A flow
and a continuous flow have a density and codes (their latents), a VAE a bound and codes, a GAN draws alone; its output noise
gives it a bound as well, by annealing.
"""

import argparse
import pathlib

import matplotlib
import torch
from torch.distributions import constraints

import pyro_dgm as dgm
from pyro_dgm import evaluate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PIXELS, HELD_OUT = 64, 600
GREY = constraints.independent(constraints.unit_interval, 1)  # without it draws far off are many, and some overflow


def digits():
    """Training images, held-out images and their labels."""
    from sklearn.datasets import load_digits

    x, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    y = dgm.Dequantize(17)(x[order].float(), torch.Generator().manual_seed(1))
    return y[HELD_OUT:], y[:HELD_OUT], labels[order][:HELD_OUT].long()


def likelihood(family, train, steps):
    """A flow, stopped where held-out rows get worse."""
    limits = {"batch_size": 256, "max_steps": steps, "validation": 0.1, "lr": 2e-3}
    dgm.fit(dgm.MaximumLikelihood(family, pretrain=steps), (train,), seed=0, **limits)
    return family


def autoencoder(train, steps):
    c = dgm.vae.Conditional
    vae = dgm.VAE(
        dgm.vae.StandardNormal(16),
        c(PIXELS, 16, dgm.vae.normal, hidden_features=(128,), shared=("log_scale",)),
        c(16, PIXELS, dgm.vae.normal, hidden_features=(128,)),
    )
    limits = {"batch_size": 256, "max_steps": 2 * steps, "validation": 0.1, "lr": 3e-3}
    dgm.fit(dgm.STL_ELBO(4)(vae.model, vae.guide), train, seed=0, **limits)
    return vae


def adversarial(train, steps):
    generator, critic = dgm.Generator(PIXELS), dgm.Critic(PIXELS)
    gan = dgm.Adversarial(generator, critic, pretrain=3 * steps)
    dgm.fit(gan, (train,), batch_size=256, max_steps=2 * steps, seed=0)
    return generator


def bound(estimate):
    """Minus the mean over rows of lower bounds: what -log p(x) is at most."""

    def score(x):
        mean, error = estimate(x).mean()
        return evaluate.Score(-mean, error)

    return score


def main(steps, out):
    train, held_out, labels = digits()
    torch.manual_seed(0)
    flows = dgm.MAF(PIXELS, hidden_features=(128, 128), support=GREY), dgm.FFJORD(PIXELS, support=GREY)
    flow, cnf = (likelihood(f, train, steps) for f in flows)
    vae, generator = autoencoder(train, steps), adversarial(train, steps)
    rows, steps_of_ais = (100, 500) if steps > 100 else (4, 10)
    ais = bound(lambda x: evaluate.ais(generator, x[:rows], num_chains=8, num_steps=steps_of_ais, seed=0))
    codes = {"train": train, "labels": labels, "seed": 0}
    reports = {
        "flow (MAF)": evaluate.report(flow(), held_out, encode=flow.encode, **codes),
        "continuous flow": evaluate.report(cnf(), held_out, encode=cnf.encode, **codes),
        "VAE": evaluate.report(
            vae.generate,
            held_out,
            encode=vae.embed,
            density=bound(lambda x: evaluate.evidence_bound(vae, x, 500)),
            **codes,
        ),
        "GAN": evaluate.report(generator(), held_out, density=ais, **codes),
    }
    print(evaluate.table(reports))
    draws = {"held-out data": held_out[:40], "flow (MAF)": flow().sample((40,)), "continuous flow": cnf().sample((40,)),
             "VAE": vae.generate(40), "GAN": generator().sample((40,))}  # fmt: skip
    figure, axes = plt.subplots(1, 5, figsize=(13, 1.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    for ax, (name, x) in zip(axes, draws.items(), strict=True):
        dgm.vae.plot_images(x.detach().reshape(-1, 8, 8), 10, ax).set_title(name, fontsize=10)
    out.mkdir(exist_ok=True)
    figure.savefig(out / "four_families.png", dpi=130)
    print("picture:", out / "four_families.png")
    print("C2ST:", {name: f"{one['C2ST accuracy']}" for name, one in reports.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    main(20 if arguments.smoke else 1500, arguments.out)
