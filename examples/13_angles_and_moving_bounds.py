"""An animal's heading near +-pi, and the lifetime of a lamp below an unknown limit: supports that a vector of numbers has not.

The heading lives on a circle, and its data lie on both sides of the cut; the lifetime's upper bound is a latent itself.
Both are compared with quadrature.
"""

import argparse
import math
import pathlib

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEADINGS = torch.tensor([3.0, -3.0, 3.1, -2.8, 2.6])
MEASURED = torch.tensor(1.2)


def heading(x):
    phi = pyro.sample("phi", dist.VonMises(0.0, 0.3))
    with pyro.plate("fix", len(x)):
        pyro.sample("x", dist.VonMises(phi, 3.0), obs=x)


def lifetime(y):
    limit = pyro.sample("limit", dist.HalfNormal(2.0))
    x = pyro.sample("x", dist.Uniform(torch.zeros_like(limit), limit))
    pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def posterior(model, data, steps):
    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO()(model, guide), (data,), seed=0, max_steps=steps)
    idata = dgm.from_svi(model, guide, data, num_samples=4_000, seed=0, prior=0)
    return idata["posterior"], dgm.khat(idata)


def heading_by_quadrature():
    """Log evidence, and the density on a grid of the circle."""
    phi = torch.linspace(-math.pi, math.pi, 2_001)[:-1].double()
    log_p = dist.VonMises(0.0, 0.3).log_prob(phi) + dist.VonMises(phi, 3.0).log_prob(HEADINGS[:, None]).sum(0)
    evidence = log_p.exp().sum() * 2 * math.pi / len(phi)
    return evidence.log().item(), phi.numpy(), (log_p.exp() / evidence).numpy()


def lifetime_by_quadrature():
    """Log evidence, and the density of the limit on a grid."""
    limit = torch.linspace(1e-4, 10.0, 4_001).double()
    cdf = torch.distributions.Normal(MEASURED, 0.5).cdf
    inside = (cdf(limit) - cdf(torch.zeros(()))) / limit  # the integral over the lifetime
    p = dist.HalfNormal(2.0).log_prob(limit).exp() * inside
    evidence = torch.trapezoid(p, limit)
    return evidence.log().item(), limit.numpy(), (p / evidence).numpy()


def main(smoke, out):
    steps = 150 if smoke else None
    angle, on_circle = posterior(heading, HEADINGS, steps)
    lamp, below = posterior(lifetime, MEASURED, steps)
    exact = [heading_by_quadrature(), lifetime_by_quadrature()]
    for name, verdict, (evidence, *_) in zip(("heading", "lifetime"), (on_circle, below), exact, strict=True):
        print(f"{name}: {verdict.status}, log evidence {verdict.log_evidence:.3f} (exact {evidence:.3f})")
    figure = plt.figure(figsize=(10, 4))
    circle = figure.add_subplot(1, 2, 1, projection="polar")
    edges = np.linspace(-math.pi, math.pi, 73)
    height, _ = np.histogram(angle["phi"].values.ravel(), edges, density=True)
    circle.bar(edges[:-1], height, width=np.diff(edges), align="edge", color="tab:blue", alpha=0.4, label="draws")
    circle.plot(exact[0][1], exact[0][2], color="black", label="exact")
    circle.set_yticks([0.5, 1.0, 1.5])
    circle.set_title("heading, data on both sides of $\\pm\\pi$")
    line = figure.add_subplot(1, 2, 2)
    line.hist(
        lamp["limit"].values.ravel(), np.linspace(0, 8, 65), density=True, color="tab:blue", alpha=0.4, label="draws"
    )
    line.plot(exact[1][1], exact[1][2], color="black", label="exact")
    line.set(xlim=(0, 8), xlabel="limit", title="upper bound of a lifetime")
    line.legend()
    figure.tight_layout()
    figure.savefig(out / "13_angles_and_moving_bounds.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    main(options.smoke, options.out)
