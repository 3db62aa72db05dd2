"""Two posteriors that defeat a single Gaussian: a sign that the data leave open, and a funnel; and what the verdict says.

The first has two modes, one flow each; its exact density is known on a grid. The second is the centred eight schools
(Rubin 1981), as it is and with the parameterisation changed by Pyro's AutoReparam.
"""

import argparse
import pathlib

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.reparam import AutoReparam

import pyro_dgm as dgm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
SQUARES = torch.tensor([3.1, 4.9, 3.7, 4.4, 4.2])


def open_sign(squares):
    """The data show a^2 alone; the prior has a slight preference for positive a."""
    a = pyro.sample("a", dist.Normal(0.1, 1.5))
    with pyro.plate("row", len(squares)):
        pyro.sample("squares", dist.Normal(a.square(), 0.8), obs=squares)


def funnel(error, effect):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(error)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, error), obs=effect)


def posterior(model, data, steps):
    pyro.clear_param_store()
    guide = dgm.AutoFlow(model)
    dgm.fit(dgm.STL_ELBO()(model, guide), data, max_steps=steps, seed=0)
    return guide, dgm.from_svi(model, guide, *data, num_samples=4000, seed=0)


def exact_sign():
    """The normalised posterior density of a, on a grid."""
    grid = torch.linspace(-3.0, 3.0, 1201, dtype=torch.float64)
    log_p = dist.Normal(0.1, 1.5).log_prob(grid) + dist.Normal(grid[:, None].square(), 0.8).log_prob(SQUARES).sum(-1)
    return grid, log_p.softmax(0) / (grid[1] - grid[0])


def picture(sign, schools, path):
    grid, density = exact_sign()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.hist(
        sign.posterior.a.values.ravel(), bins=120, range=(-3, 3), density=True, color="C0", alpha=0.5, label="flows"
    )
    left.plot(grid, density, "k", lw=1, label="exact")
    left.set(xlabel="a", ylabel="posterior density", title="A sign that the data leave open")
    left.legend(frameon=False)
    for (name, idata), color in zip(schools.items(), ("C1", "C2"), strict=True):
        tau, theta = idata.posterior.tau.values.ravel(), idata.posterior.theta.values[..., 0].ravel()
        right.plot(theta[:1500], np.log(tau[:1500]), ".", ms=2, alpha=0.5, color=color, label=name)
    right.set(xlabel="effect in the first school", ylabel="log tau", title="A funnel, in two parameterisations")
    right.legend(frameon=False, markerscale=5)
    figure.savefig(path, dpi=150)


def main(steps, out):
    guide, sign = posterior(open_sign, (SQUARES,), steps)
    grid, density = exact_sign()
    exact = float(density[grid > 0].sum() * (grid[1] - grid[0]))
    share = float((sign.posterior.a > 0).mean())
    print(f"two modes: {guide.modes} flows. {dgm.khat(sign)}")
    schools = {}
    for name, model in {"centred": funnel, "AutoReparam": pyro.poutine.reparam(funnel, config=AutoReparam())}.items():
        _, schools[name] = posterior(model, (ERROR, EFFECT), steps)
        again = dgm.resample(schools[name], seed=0)
        print(f"{name}: {dgm.khat(schools[name])}")
        print(f"  mean of mu {float(schools[name].posterior.mu.mean()):.2f}, resampled {float(again.posterior.mu.mean()):.2f}"
              " (quadrature: 4.40)")  # fmt: skip
    out.mkdir(exist_ok=True)
    picture(sign, schools, out / "hard_posteriors.png")
    print("picture:", out / "hard_posteriors.png")
    print(f"P(a > 0) = {share:.3f}, exact {exact:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    main(50 if arguments.smoke else None, arguments.out)
