"""A flow and three generators with planted faults, judged by every score: what each score sees, and what it cannot.

The data are eight Gaussians on a ring, of known density. The faults: a mode left out, modes too narrow (what an
adversarial generator without noise does), and copies of the training data.
"""

import argparse
import math
import pathlib

import matplotlib
import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ANGLE = torch.arange(8) * math.pi / 4
MODES = 2.0 * torch.stack([ANGLE.cos(), ANGLE.sin()], -1)


def ring():
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(8)), dist.Normal(MODES, torch.tensor(0.3)).to_event(1))


class Likelihood(torch.nn.Module):
    """The objective: the mean negative log density of a batch."""

    def __init__(self, family):
        super().__init__()
        self.family = family

    def forward(self, x):
        return -self.family().log_prob(x).mean()


def flow_of(train, steps):
    family = dgm.NSF(2, hidden_features=(32, 32)).standardize(train)
    dgm.fit(Likelihood(family), train, max_steps=steps, batch_size=256, lr=3e-3, progress=False, seed=0)
    return family()


def generators(train):
    """Draws without a density: a network's place is taken by a function of three normal numbers."""

    def pick(points, z):
        return points[(len(points) * dist.Normal(0.0, 1.0).cdf(z[..., 2])).long().clamp(max=len(points) - 1)]

    faults = {
        "narrow modes": lambda z: pick(MODES, z) + 0.15 * z[..., :2],
        "a mode left out": lambda z: pick(MODES[:7], z) + 0.3 * z[..., :2],
        "copies": lambda z: pick(train, z) + 0.01 * z[..., :2],
    }
    noise = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    return {name: dgm.ImplicitDistribution(push, noise, 2) for name, push in faults.items()}


def picture(draws, reports, path):
    shown = ["C2ST accuracy", "precision", "recall", "coverage", "memorization"]
    figure, axes = plt.subplots(2, len(draws), figsize=(3 * len(draws), 5.5), layout="constrained")
    for (top, bottom), (name, x) in zip(axes.T, draws.items(), strict=True):
        top.plot(*x[:1500].T, ".", ms=2, alpha=0.5)
        top.set(title=name, xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), xticks=[], yticks=[], aspect="equal")
        if name in reports:
            value, error = zip(*(reports[name][s] for s in shown), strict=True)
            bottom.errorbar(value, range(len(shown)), xerr=error, fmt="o")
            bottom.axvline(0.5, color="k", lw=0.5)
            bottom.set(xlim=(0.3, 1.05), ylim=(len(shown) - 0.5, -0.5), yticks=range(len(shown)), yticklabels=shown)
        else:
            bottom.axis("off")
    figure.savefig(path, dpi=110)


def main(smoke, out):
    pyro.set_rng_seed(0)
    n, truth = 300 if smoke else 2000, ring()
    train, held_out = truth.sample((n,)), truth.sample((n,))
    models = {"flow": flow_of(train, 20 if smoke else 800), **generators(train)}
    reports = {name: dgm.evaluate.report(model, held_out, train=train, seed=1) for name, model in models.items()}
    print(dgm.evaluate.table(reports))
    draws = {"data": held_out} | {name: model.sample((n,)) for name, model in models.items()}
    for name, x in draws.items():
        covered, quality, imbalance = dgm.evaluate.mode_coverage(x, MODES, 1.0, seed=0)
        print(f"{name}: modes covered {covered}, near a mode {quality}, imbalance {imbalance}")
    out.mkdir(exist_ok=True)
    picture(draws, reports, out / "evaluate.png")
    print("picture:", out / "evaluate.png")
    print(f"KL(data || flow) = {dgm.evaluate.kl_divergence(truth, models['flow'])} nats")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few steps and few draws")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    main(arguments.smoke, arguments.out)
