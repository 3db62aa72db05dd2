"""A deep Markov model: z_t ~ p(z_t | z_{t-1}) by a network, x_t ~ p(x_t | z_t), and a posterior that reads the whole series.

The families of a VAE in a plate over series and ``pyro.markov`` over time (Krishnan, Shalit & Sontag 2017). The data are noisy
angles of pendulums with unknown starts and speeds; the last steps are forecast.
"""

import argparse
import pathlib

import matplotlib
import pyro
import torch
from torch import nn

import pyro_dgm as dgm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TIMES, LATENT, SERIES = 24, 3, 300


def pendulums(n, seed):
    """Angle with noise, shape (n, TIMES, 1); the speed is hidden."""
    generator = torch.Generator().manual_seed(seed)
    angle, speed = 2.0 * torch.rand(n, generator=generator) - 1.0, 2.0 * torch.rand(n, generator=generator) - 1.0
    path = []
    for _ in range(TIMES):
        for _ in range(10):
            speed = speed - 0.06 * torch.sin(angle)
            angle = angle + 0.06 * speed
        path.append(angle.clone())
    return torch.stack(path, 1)[..., None] + 0.05 * torch.randn(n, TIMES, 1, generator=generator)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.transition = dgm.vae.Conditional(LATENT, LATENT, self.small_step, hidden_features=(64,))
        self.emission = dgm.vae.Conditional(1, LATENT, dgm.vae.normal, shared=("log_scale",), hidden_features=(32,))
        self.start = dgm.vae.StandardNormal(LATENT)

    @staticmethod
    def small_step(loc, log_scale):
        return dgm.vae.normal(loc, log_scale - 2.0)

    def forward(self, x):
        pyro.module("dmm", self)
        with pyro.plate("series", len(x), dim=-1):
            z = pyro.sample("z_0", self.start())
            for t in pyro.markov(range(TIMES)):
                if t:
                    z = pyro.sample(f"z_{t}", self.transition(z))
                pyro.sample(f"x_{t}", self.emission(z), obs=None if t >= x.shape[1] else x[:, t])


class Guide(nn.Module):  # q(z_t | z_{t-1}, the series from t on), by a recurrent network that runs backwards
    def __init__(self):
        super().__init__()
        self.reader = nn.GRU(1, 32, batch_first=True)
        self.step = dgm.vae.Conditional(LATENT, 32 + LATENT, dgm.vae.normal, hidden_features=(64,))

    def forward(self, x):
        pyro.module("reader", self)
        future = self.reader(x.flip(1))[0].flip(1)
        with pyro.plate("series", len(x), dim=-1):
            z = x.new_zeros(len(x), LATENT)
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", self.step(dgm.core.broadcast_cat(future[:, t], z)))


def forecast(model, guide, x, seen, draws=100):
    """Draws of the series after the first ``seen`` steps, shape (draws, n, TIMES)."""
    predict = pyro.infer.Predictive(model, guide=guide, num_samples=draws, parallel=True)
    with torch.no_grad():
        found = predict(x[:, :seen])
    return torch.cat([found[f"x_{t}"].reshape(draws, len(x), 1) for t in range(seen, TIMES)], -1)


def main(steps, out):
    train, test, seen = pendulums(SERIES, 0), pendulums(100, 1), 14
    torch.manual_seed(0)
    model, guide = Model(), Guide()
    bound = dgm.objectives.WeightedKL_ELBO(warmup_steps=steps // 3)(model, guide)
    dgm.fit(bound, train, lr=5e-3, max_steps=steps, batch_size=75, seed=0)
    with torch.no_grad():
        nats = -float(dgm.IWAE_ELBO(20)(model, guide)(test)) / len(test) / TIMES
    drawn, truth = forecast(model, guide, test, seen), test[:, seen:, 0]
    low, high = drawn.quantile(0.05, 0), drawn.quantile(0.95, 0)
    error, naive = (drawn.median(0).values - truth).abs().mean(), (test[:, seen - 1] - truth).abs().mean()
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
    for i, ax in enumerate(axes):
        ax.plot(test[i, :, 0], "k.", ms=4, label="series")
        ax.fill_between(range(seen, TIMES), low[i], high[i], alpha=0.4, label="90 % of forecasts")
        ax.set(xlabel="time", ylabel="" if i else "angle")
    axes[0].legend(frameon=False, fontsize=8)
    out.mkdir(exist_ok=True)
    figure.savefig(out / "deep_markov.png", dpi=150)
    print("picture:", out / "deep_markov.png")
    inside = float(((truth > low) & (truth < high)).double().mean())
    print(f"bound (20 draws) {nats:.3f} nats per step; share of values inside the 90 % bands {inside:.3f}")
    print(f"mean absolute error of the forecast {error:.3f}, of the last value {naive:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    main(5 if arguments.smoke else 600, arguments.out)
