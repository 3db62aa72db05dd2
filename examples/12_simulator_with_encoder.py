"""A chaotic population without a density: the posterior of its parameters through an encoder of the series.

The Ricker map with noise, N[t + 1] = r N[t] exp(-N[t] + s e[t]), of which counts y[t] ~ Poisson(phi N[t]) are seen (Wood 2010,
"Statistical inference for noisy nonlinear ecological dynamic systems", Nature 466). Its noise is integrated by simulating.
The number at the end is how well the posteriors of 300 new series are calibrated.
"""

import argparse
import pathlib

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_dgm as dgm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

YEARS = 60
LOW, HIGH = torch.tensor([2.5, 0.05, 4.0]), torch.tensor([4.5, 0.6, 16.0])  # log r, s, phi


def model(y=None):
    log_r, s, phi = pyro.sample("theta", dist.Uniform(LOW, HIGH).to_event(1)).unbind(-1)
    n, counts = torch.ones_like(log_r), []
    for _ in range(YEARS):
        n = n * (log_r - n + s * torch.randn_like(n)).exp()
        counts.append(torch.poisson(phi * n))
    return pyro.sample("y", dist.Delta(torch.stack(counts, -1).log1p(), event_dim=1), obs=y)


class Series(nn.Module):
    """Two convolutions, and the mean and largest of what they see along the years: ``(N, 60) -> (N, 64)``."""

    def __init__(self):
        super().__init__()
        self.see = nn.Sequential(nn.Conv1d(1, 24, 5), nn.SiLU(), nn.Conv1d(24, 32, 3), nn.SiLU())

    def forward(self, y):
        seen = self.see(y.unsqueeze(-2))
        return torch.cat([seen.mean(-1), seen.amax(-1)], -1)


def picture(result, truth, posterior, path):
    draws = posterior.sample((100,))["theta"]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for i, (ax, name) in enumerate(zip(axes, ("log r", "s", "phi"), strict=True)):
        mean, sd = draws[..., i].mean(0), draws[..., i].std(0)
        ax.errorbar(truth[:, i], mean, yerr=sd, fmt=".", color=f"C{i}", lw=0.6, alpha=0.7)
        ax.plot([LOW[i], HIGH[i]], [LOW[i], HIGH[i]], color="k", lw=0.8)
        ax.set(title=name, xlabel="truth", ylabel="posterior mean and sd")
    figure.suptitle(f"new series: sbc p = {result.p_value:.2g}")
    figure.savefig(path, dpi=120)


def main(smoke, out):
    out.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    sims = dgm.simulate(model, 1_000 if smoke else 20_000, observed=["y"], seed=0)
    held_out = dgm.simulate(model, 20 if smoke else 300, observed=["y"], seed=1)
    print(sims)
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(model, observed=["y"], encoder=Series())
    history = dgm.fit(dgm.ForwardKL(guide), sims, seed=0, max_steps=30 if smoke else None)
    print(f"{history.steps} steps, held-out loss {history.best_loss:.3f} nats (prior {(HIGH - LOW).log().sum():.3f})")
    draws = 19 if smoke else 199
    result = dgm.sbc(None, guide, simulations=held_out, num_draws=draws, seed=0)
    cover = dgm.coverage(None, guide, simulations=held_out[: 3 if smoke else 300], num_draws=draws, seed=0)
    result.picture(out / "ricker_sbc.png")
    picture(result, held_out["theta"], guide.condition(y=held_out["y"]), out / "ricker.png")
    print(result, cover, sep="\n")
    share, error = cover.covered(0.9)
    print(f"truths in 90 % regions: {share:.3f} +- {error:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    main(arguments.smoke, arguments.out)
