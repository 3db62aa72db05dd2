"""One guide for every table of 5 to 200 rows: a Bayesian regression that is trained once, against scikit-learn.

    a ~ N(0, 2),   b ~ N(0, 1)^3,   s ~ HalfNormal(1),   x_i ~ N(0, 1)^3,   y_i ~ N(a + b x_i, s)

Simulations have 200 rows; a part of the rows is a simulation with fewer, so one guide learns all sizes. With few rows a
posterior knows how little it knows: its predictions are scored on new rows beside those of BayesianRidge and least squares.
"""

import argparse
import pathlib

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from sklearn.linear_model import BayesianRidge, LinearRegression

import pyro_dgm as dgm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INPUTS = 3


def model(n=200, x=None, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(INPUTS), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("row", n if y is None else y.shape[-1]):
        x = pyro.sample("x", dist.Normal(torch.zeros(INPUTS), 1.0).to_event(1), obs=x)
        return pyro.sample("y", dist.Normal(a + (x * b).sum(-1), s), obs=y)


def log_scores(guide, x, y, new_x, new_y):
    """Mean log predictive density of new rows: ours, BayesianRidge, least squares."""
    draws = guide.condition(x=x, y=y).sample((2000,))
    mean = draws["a"][:, None] + draws["b"] @ new_x.T
    ours = dist.Normal(mean, draws["s"][:, None]).log_prob(new_y).logsumexp(0) - torch.tensor(2000.0).log()
    ridge_mean, ridge_sd = BayesianRidge().fit(x.numpy(), y.numpy()).predict(new_x.numpy(), return_std=True)
    ridge = dist.Normal(torch.tensor(ridge_mean), torch.tensor(ridge_sd)).log_prob(new_y)
    least = LinearRegression().fit(x.numpy(), y.numpy())
    squares = (y - torch.tensor(least.predict(x.numpy()))).square().sum()
    sd = (squares / max(1, len(y) - INPUTS - 1)).sqrt().clamp_min(1e-3)
    return [
        ours.mean(),
        ridge.mean(),
        dist.Normal(torch.tensor(least.predict(new_x.numpy())), sd).log_prob(new_y).mean(),
    ]


def main(smoke, out):
    torch.manual_seed(0)
    sims = dgm.simulate(model, 500 if smoke else 10_000, observed=["x", "y"], seed=0, progress=not smoke)
    guide = dgm.AmortizedGuide(model, observed=["x", "y"])
    dgm.fit(dgm.ForwardKL(guide), sims, max_steps=20 if smoke else None, progress=not smoke, seed=0)
    sizes = (5, 8, 20, 200)
    medians: list[list[float]] = []
    for n in sizes:
        tables = dgm.simulate(model, 3 if smoke else 50, n + 200, observed=["x", "y"], seed=n, progress=False)
        rows = zip(tables["x"], tables["y"], strict=True)
        scores = torch.tensor([log_scores(guide, x[:n], y[:n], x[n:], y[n:]) for x, y in rows])
        medians.append(scores.median(0).values.tolist())
        ours, ridge, least = medians[-1]
        share = float((scores[:, 0] > scores[:, 1]).double().mean())
        print(
            f"{n:>3} rows: median log score {ours:.2f}, BayesianRidge {ridge:.2f} (ours better in {share:.0%}), OLS {least:.2f}"
        )
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.plot(sizes, medians, "o-", label=["amortised posterior", "BayesianRidge", "least squares"])
    ax.set(xscale="log", xlabel="rows", ylabel="log score of a new row, nats", title="One guide for all sizes")
    ax.legend(frameon=False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "regression_any_size.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    main(**vars(parser.parse_args()))
