"""A hierarchical posterior by a flow and by NUTS: eight schools, with its funnel, each school's effect and the verdict.

The data: the effects of coaching in eight schools (Rubin 1981). Where the spread between schools is small their effects are
tied together: the posterior is a funnel, which no Gaussian has.
"""

import argparse
import pathlib
import textwrap
import time

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

import pyro_dgm as dgm

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
COLORS = {"flow": "#0072B2", "NUTS": "#D55E00", "data": "#767676"}  # blue and vermilion differ for every colour vision
BOXES = [  # words, place, where the arrow goes
    (r"$\mu \sim N(0, 5)$", (0.18, 0.9), (0.42, 0.59)),
    (r"$\tau \sim C^+(5)$", (0.82, 0.9), (0.58, 0.59)),
    (r"$\theta_j \sim N(\mu, \tau)$", (0.5, 0.5), (0.5, 0.19)),
    (r"$y_j \sim N(\theta_j, \sigma_j)$", (0.5, 0.1), (0.5, 0.1)),
]


def eight_schools(error, effect=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(error)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("effect", dist.Normal(theta, error), obs=effect)


def by_nuts(draws):
    mcmc = MCMC(NUTS(eight_schools), num_samples=draws, warmup_steps=max(10, draws // 4))
    mcmc.run(ERROR, EFFECT)  # with a bar
    mu, tau, eta = (mcmc.get_samples()[name].numpy() for name in ("mu", "tau", "eta"))
    return {"mu": mu, "tau": tau, "theta": mu[:, None] + tau[:, None] * eta}


def largest_gap(flow, nuts):
    """Between posterior means, in posterior standard deviations, and NUTS's Monte-Carlo error there."""
    a, b = (np.column_stack(list(draws.values())) for draws in (flow, nuts))
    gaps = np.abs(a.mean(0) - b.mean(0)) / b.std(0)
    return gaps.max(), float(az.mcse(b[None, :, gaps.argmax()])) / b[:, gaps.argmax()].std()


def draw_schools(ax, found):
    rows = np.arange(len(EFFECT))
    ax.errorbar(EFFECT, rows, xerr=ERROR, fmt="D", color=COLORS["data"], lw=1.2, label="data, one standard error")
    for (name, draws), marker, y in zip(found.items(), "os", (rows + 0.22, rows + 0.42), strict=True):
        low, first, middle, last, high = np.quantile(draws["theta"], [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
        ax.hlines(y, low, high, color=COLORS[name], lw=1.5)
        ax.hlines(y, first, last, color=COLORS[name], lw=5)
        ax.plot(middle, y, marker, color=COLORS[name], ms=7, mec="white", label=f"{name}: median, 50 % and 90 %")
    ax.set(ylim=(7.7, -0.4), title="Each school's effect", xlabel="effect of coaching, θ")
    ax.set_yticks(rows + 0.2, "ABCDEFGH")


def picture(found, words, path):
    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    figure, (model, funnel, schools) = plt.subplots(1, 3, figsize=(12.8, 7.2), width_ratios=[1, 1.1, 1.3])
    for said, at, to in BOXES:
        box, arrow = {"boxstyle": "round,pad=0.5", "fc": "0.93"}, {"arrowstyle": "-|>", "fc": "k"}
        model.annotate(said, to, at, ha="center", va="center", fontsize=17, bbox=box, arrowprops=arrow)
    model.set_title("The hierarchy")
    model.axis("off")
    for name, draws in found.items():
        funnel.scatter(draws["theta"][:, 0], draws["tau"], 7, color=COLORS[name], lw=0, alpha=0.5)
    funnel.set(xlim=(-15, 35), ylim=(0.03, 40), yscale="log", title="Its funnel", yticks=[0.1, 1, 10])
    funnel.set(xlabel="effect in school A, θ", ylabel="spread between schools, τ", yticklabels=["0.1", "1", "10"])
    draw_schools(schools, found)
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0.93), ncols=3, frameon=False)
    figure.suptitle("Does coaching help? Eight schools, by a flow and by NUTS", fontsize=21, y=0.98)
    figure.text(0.03, 0.03, textwrap.fill(words, 112), fontsize=14, linespacing=1.4)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.8, bottom=0.28, wspace=0.25)
    figure.savefig(path, dpi=150)


def main(smoke, out):
    out.mkdir(exist_ok=True)
    pyro.set_rng_seed(1)
    guide = dgm.AutoFlow(eight_schools)
    history = dgm.fit(dgm.STL_ELBO()(eight_schools, guide), (ERROR, EFFECT), max_steps=20 if smoke else None)
    idata = dgm.from_svi(eight_schools, guide, ERROR, EFFECT, num_samples=200 if smoke else 4000)
    flow = {name: idata.posterior[name].values[0] for name in ("mu", "tau", "theta")}
    print(az.summary(idata, var_names=list(flow), kind="stats"))
    start = time.perf_counter()
    nuts = by_nuts(20 if smoke else 1000)
    words = "{} Means are at most {:.2f} sd from those of NUTS, whose own error is {:.2f} sd. "
    words = words.format(dgm.khat(idata), *largest_gap(flow, nuts))
    words += f"The flow took {history.seconds:.0f} s, NUTS {time.perf_counter() - start:.0f} s."
    print(words)
    picture({"flow": flow, "NUTS": nuts}, words, out / "eight_schools.png")
    print("picture:", out / "eight_schools.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    main(**vars(parser.parse_args()))
