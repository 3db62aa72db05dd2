"""Sixty patients, one guide: the concentration of a drug after a tablet, and each patient's posterior judged and repaired.

One compartment with absorption (Bateman 1910): c(t) = D ka / (V ka - CL) (exp(-CL t / V) - exp(-ka t)). The number at the end is
the share of true rates inside the 90 % intervals of all patients.
"""

import argparse
import pathlib

import matplotlib
import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HOURS = torch.tensor([0.5, 1.0, 2.0, 4.0, 6.0, 9.0, 12.0, 24.0])
DOSE = 100.0  # mg
MIDDLE = torch.tensor([1.0, 5.0, 40.0]).log()  # absorption per hour, clearance in litres per hour, volume in litres


def concentration(log_rates, hours):
    """In mg per litre, ``(*batch, len(hours))``."""
    absorbed, cleared, volume = (x[..., None] for x in log_rates.exp().unbind(-1))
    lost = cleared / volume
    return DOSE / volume * absorbed / (absorbed - lost) * ((-lost * hours).exp() - (-absorbed * hours).exp())


def model(y=None):
    log_rates = pyro.sample("log_rates", dist.Normal(MIDDLE, 0.4).to_event(1))
    mean = concentration(log_rates, HOURS).clamp_min(1e-6).log()
    return pyro.sample("y", dist.Normal(mean, 0.15).to_event(1), obs=y)


def picture(found, patients, path):
    hours = torch.linspace(0.1, 24.0, 100)
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.4), layout="constrained", sharex=True)
    for i, ax in enumerate(axes.ravel()):
        curves = concentration(found.draws["log_rates"][i], hours)
        low, high = curves.quantile(torch.tensor([0.05, 0.95]), 0)
        ax.fill_between(hours, low, high, alpha=0.3)
        ax.plot(HOURS, patients["y"][i].exp(), "k.")
        ax.set(title=f"patient {i}: {found.status[i]}", ylim=(0.0, None))
    figure.supxlabel("hours after the tablet")
    figure.supylabel("mg per litre, 90 % of the curves")
    figure.savefig(path, dpi=120)


def main(smoke, out):
    out.mkdir(exist_ok=True)
    pyro.set_rng_seed(0)
    simulations = dgm.simulate(model, 500 if smoke else 10_000, observed=["y"], seed=0)
    guide = dgm.AmortizedGuide(model, observed=["y"])
    dgm.fit(dgm.ForwardKL(guide), simulations, max_steps=60 if smoke else None, seed=0)

    patients = dgm.simulate(model, 8 if smoke else 60, observed=["y"], seed=1)
    found = dgm.workflow(guide, {"y": patients["y"]}, num_samples=200 if smoke else 1_000, seed=0)
    print(found)
    print(found.table())
    low, high = found.draws["log_rates"].quantile(torch.tensor([0.05, 0.95]), 1)
    inside = ((low < patients["log_rates"]) & (patients["log_rates"] < high)).double().mean()
    picture(found, patients, out / "patients.png")
    print(f"true rates inside their 90 % intervals: {inside:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    main(arguments.smoke, arguments.out)
