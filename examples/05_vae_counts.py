"""Counts with a group effect: a single-cell-like matrix of two batches, whose effect on each gene is a global latent.

    shift_g ~ N(0, 0.5)  per gene,    z_i ~ a learned mixture,    x_ig ~ NB(mean = depth_i * softmax(f(z_i) + batch_i shift))_g

The VAE's families stand in an ordinary Pyro model, beside the global latent; the guide is an AutoNormal for it and an
encoder for the local ones. Minibatches are scaled to all cells, and the bound is importance-weighted per cell.
"""

import argparse
import pathlib

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_dgm as dgm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CELLS, GENES, TYPES, LATENT = 1200, 60, 4, 3


def cells():
    """Counts, the batch of each cell (0 or 1), its type, and the true shift of the second batch."""
    torch.manual_seed(3)
    kind, batch = torch.randint(TYPES, (CELLS,)), torch.randint(2, (CELLS, 1)).float()
    profiles, shift = 1.5 * torch.randn(TYPES, GENES), 0.5 * torch.randn(GENES)
    depth = 400 * torch.randn(CELLS, 1).mul(0.3).exp()
    mean = depth * (profiles[kind] + batch * shift).softmax(-1)
    return dgm.vae.negative_binomial(mean.log(), torch.tensor(3.0).log()).sample(), batch, kind, shift


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.prior = dgm.ZukoFlow(dgm.core.zuko.mixtures.GMM(LATENT, components=8))
        self.profile = dgm.core.MLP(LATENT, GENES, (64,))
        self.log_dispersion = nn.Parameter(torch.zeros(GENES))

    def forward(self, x, batch):
        pyro.module("cells", self)
        shift = pyro.sample("shift", dist.Normal(torch.zeros(GENES), 0.5).to_event(1))
        with pyro.plate("cell", CELLS, subsample=torch.arange(len(x))):
            z = pyro.sample("z", self.prior())
            share = (self.profile(z) + batch * shift).log_softmax(-1)
            log_mean = x.sum(-1, keepdim=True).log() + share
            pyro.sample("x", dgm.vae.negative_binomial(log_mean, self.log_dispersion).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.shared = AutoNormal(poutine.block(model, expose=["shift"]), init_scale=0.05)
        self.encoder = dgm.vae.Conditional(LATENT, GENES + 1, dgm.vae.normal, hidden_features=(64,))

    def posterior(self, x, batch):
        return self.encoder(torch.cat([x.log1p(), batch], -1))

    def forward(self, x, batch):
        pyro.module("encoder", self.encoder)
        self.shared(x, batch)
        with pyro.plate("cell", CELLS, subsample=torch.arange(len(x))):
            pyro.sample("z", self.posterior(x, batch))


def agreement(z, label):
    distance = torch.cdist(z, z).fill_diagonal_(torch.inf)
    return float((label[distance.argmin(1)] == label).double().mean())


def main(steps, out):
    x, batch, kind, true = cells()
    torch.manual_seed(0)
    model = Model()
    guide = Guide(model)
    dgm.fit(dgm.IWAE_ELBO(4)(model, guide), (x, batch), lr=5e-3, max_steps=steps, batch_size=200, seed=0)
    with torch.no_grad():
        z = guide.posterior(x, batch).mean
    shift = guide.shared.median(x, batch)["shift"].detach()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    plane = (z - z.mean(0)) @ torch.linalg.svd(z - z.mean(0), full_matrices=False)[2][:2].T
    for b, marker in ((0, "o"), (1, "x")):
        rows = batch[:, 0] == b
        left.scatter(*plane[rows].T, c=kind[rows], cmap="tab10", s=8, marker=marker, linewidths=0.7)
    left.set(title="E[z|x]: type (colour) and batch (marker)", xlabel="first component", ylabel="second component")
    centred = true - true.mean()
    right.plot(centred, shift - shift.mean(), ".")
    right.set(title="batch effect of each gene", xlabel="true (centred)", ylabel="posterior median")
    out.mkdir(exist_ok=True)
    figure.savefig(out / "vae_counts.png", dpi=150)
    print("picture:", out / "vae_counts.png")
    for name, space in (("latent", z), ("raw counts", x.log1p())):
        same = agreement(space, kind), agreement(space, batch[:, 0])
        print(f"{name}: nearest cell of the same type {same[0]:.3f}, of the same batch {same[1]:.3f} (mixed: 0.5)")
    print(f"correlation of the batch effect with the true one: {np.corrcoef(centred, shift)[0, 1]:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    main(20 if arguments.smoke else 1000, arguments.out)
