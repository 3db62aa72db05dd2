"""One guide for every hierarchy of 2 to 16 groups: trained once on simulations, then a posterior for any table at once.

    mu ~ N(0, 5),   tau ~ HalfNormal(5),   theta_j ~ N(mu, tau),   y_j ~ N(theta_j, sigma_j),   sigma_j known

The guide reads the plate from the model: mu and tau see a summary of all groups, theta_j its own y_j and sigma_j. Importance
weights by the model's own density then say how good it is for these data, and repair what is left.
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

MOST = 16


def model(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("group", sigma.shape[-1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def inputs(n):
    """Data sets of 2 to 16 groups, with errors between 1 and 20."""
    present = torch.arange(MOST) < torch.randint(2, MOST + 1, (n, 1))
    return {"sigma": torch.exp(math.log(20.0) * torch.rand(n, MOST)), "mask": {"y": present, "theta": present}}


def main(smoke, out):
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(model, observed=["y"], args=(torch.ones(MOST),), covariates=["sigma"])
    objective = dgm.ForwardKL(guide, batch_size=64 if smoke else 256, inputs=inputs)
    dgm.fit(objective, max_steps=40 if smoke else 1000, progress=not smoke, seed=0)

    schools = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    tables = {"eight schools": schools, "four of them": (schools[0][:4], schools[1][:4])}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for (name, (y, sigma)), ax in zip(tables.items(), axes, strict=True):
        posterior = guide.condition(y=y, sigma=sigma)
        refined = posterior.refine(2000, seed=0)
        print(f"{name}: {refined}")
        drawn = posterior.sample((2000,))
        for shift, label, d in ((0.0, "amortised", drawn), (0.2, "refined", refined.draws)):
            low, middle, high = torch.quantile(d["theta"], torch.tensor([0.05, 0.5, 0.95]), dim=0)
            at = torch.arange(len(y)) + shift
            ax.errorbar(at, middle, torch.stack([middle - low, high - middle]), fmt="o", ms=4, capsize=2, label=label)
        ax.plot(torch.arange(len(y)) - 0.2, y, "kx", label="datum")
        ax.set(title=f"{name}: 90 % intervals, {refined.ess / refined.proposed:.0%} effective", xlabel="group")
        ax.set_xticks(torch.arange(len(y)))
        ax.legend(frameon=False)
    axes[0].set_ylabel("effect")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "hierarchical_amortized.png", dpi=120)
    print(f"log evidence of the eight schools: {posterior_evidence(guide, *schools)}")


def posterior_evidence(guide, y, sigma):
    refined = guide.condition(y=y, sigma=sigma).refine(2000, seed=1)
    return f"{refined.log_evidence:.2f} +- {refined.log_evidence_error:.2f} nats"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    main(**vars(parser.parse_args()))
