"""Models whose latents have bounds that are latents themselves, or live on a circle, with their posteriors by quadrature.

The reference knows nothing of the package: each model has a map from the unit cube to its latents, by quantiles of the prior
(with a weight where a density is not uniform there), and the mean over a fine grid of the cube gives evidence and moments.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch

NORMAL = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)


@dataclass
class Case:
    """A model with data; ``cube(t)`` gives latents and the log of weight times likelihood on the unit cube ``(N, d)``."""

    model: Any
    data: tuple
    dims: int
    cube: Any

    def reference(self):
        """Log evidence, and mean and sd of every latent (of its cosine and sine for an angle)."""
        n = {1: 20_000, 2: 600, 3: 130}[self.dims]
        ticks = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        t = torch.cartesian_prod(*[ticks] * self.dims).reshape(-1, self.dims)
        latents, log_w = self.cube(t, *[d.double() if torch.is_tensor(d) else d for d in self.data])
        w = log_w.softmax(0)
        moments = {}
        for name, value in seen(latents).items():
            mean = (w * value).sum()
            moments[name] = (mean.item(), (w * (value - mean).square()).sum().sqrt().item())
        return (log_w.logsumexp(0) - math.log(len(t))).item(), moments


def seen(latents):
    """Columns to compare; names that start with ``angle`` by cosine and sine."""
    out = {}
    for name, value in latents.items():
        value = torch.as_tensor(value).double()
        columns = value.reshape(len(value), -1).unbind(-1)
        for i, v in enumerate(columns):
            at = f"{name}[{i}]" if len(columns) > 1 else name
            out |= {f"cos {at}": v.cos(), f"sin {at}": v.sin()} if name.startswith("angle") else {at: v}
    return out


def normal(x, loc, scale):
    return torch.distributions.Normal(loc, scale).log_prob(x)


def von_mises(x, loc, k):
    return dist.VonMises(loc, k).log_prob(x)


def halfnormal(t, scale):
    return scale * NORMAL.icdf(0.5 + 0.5 * t)


# --- bounds that are latents -------------------------------------------------------------------------------------------


def below_a_latent(y):
    top = pyro.sample("top", dist.HalfNormal(2.0))
    x = pyro.sample("x", dist.Uniform(torch.zeros_like(top), top))
    pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def below_a_latent_cube(t, y):
    top = halfnormal(t[:, 0], 2.0)
    return {"top": top, "x": t[:, 1] * top}, normal(y, t[:, 1] * top, 0.5)


def window(y):
    centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
    x = pyro.sample("x", dist.Uniform(centre, centre + 1.0))
    pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def window_cube(t, y):
    centre = NORMAL.icdf(t[:, 0])
    return {"centre": centre, "x": centre + t[:, 1]}, normal(y, centre + t[:, 1], 0.5)


def pareto(y):
    low = pyro.sample("low", dist.LogNormal(0.0, 0.5))
    x = pyro.sample("x", dist.Pareto(low, 3.0))
    pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def pareto_cube(t, y):
    low = (0.5 * NORMAL.icdf(t[:, 0])).exp()
    x = low * (1.0 - t[:, 1]) ** (-1.0 / 3.0)
    return {"low": low, "x": x}, normal(y, x, 0.5)


def stairs(y):
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    b = pyro.sample("b", dist.Uniform(a, 1.0))
    pyro.sample("y", dist.Normal(torch.stack([a, b], -1), 0.2).to_event(1), obs=y)


def stairs_cube(t, y):
    a = t[:, 0]
    b = a + (1.0 - a) * t[:, 1]
    return {"a": a, "b": b}, normal(y[0], a, 0.2) + normal(y[1], b, 0.2)


def two_sided(y):
    low = pyro.sample("low", dist.Normal(-1.0, 0.5))
    width = pyro.sample("width", dist.LogNormal(0.5, 0.5))
    x = pyro.sample("x", dist.AffineBeta(2.0, 2.0, low, width))
    pyro.sample("y", dist.Normal(x, 0.3), obs=y)


def two_sided_cube(t, y):
    low, width = -1.0 + 0.5 * NORMAL.icdf(t[:, 0]), (0.5 + 0.5 * NORMAL.icdf(t[:, 1])).exp()
    x, s = low + width * t[:, 2], t[:, 2]
    return {"low": low, "width": width, "x": x}, (6.0 * s * (1.0 - s)).log() + normal(y, x, 0.3)


def plate_below_a_latent(y):
    top = pyro.sample("top", dist.LogNormal(0.0, 0.5))
    with pyro.plate("group", 2):
        x = pyro.sample("x", dist.Uniform(0.0, top))
        pyro.sample("y", dist.Normal(x, 0.3), obs=y)


def plate_below_a_latent_cube(t, y):
    top = (0.5 * NORMAL.icdf(t[:, 0])).exp()
    x = top[:, None] * t[:, 1:]
    return {"top": top, "x": x}, normal(y, x, 0.3).sum(-1)


# --- circles -----------------------------------------------------------------------------------------------------------


def angle(x, loc, k0, k):
    phi = pyro.sample("angle", dist.VonMises(torch.tensor(loc), torch.tensor(k0)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.VonMises(phi, torch.tensor(k)), obs=x)


def angle_cube(t, x, loc, k0, k):
    phi = 2.0 * math.pi * (t[:, 0] - 0.5)
    prior = math.log(2.0 * math.pi) + von_mises(phi, torch.tensor(loc), torch.tensor(k0))
    return {"angle": phi}, prior + von_mises(x[:, None], phi, torch.tensor(k)).sum(0)


def spread_angle(x):
    k = pyro.sample("k", dist.LogNormal(1.0, 0.5))
    phi = pyro.sample("angle", dist.VonMises(0.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.VonMises(phi, k), obs=x)


def spread_angle_cube(t, x):
    k, phi = (1.0 + 0.5 * NORMAL.icdf(t[:, 0])).exp(), 2.0 * math.pi * (t[:, 1] - 0.5)
    prior = math.log(2.0 * math.pi) + von_mises(phi, torch.tensor(0.0), torch.tensor(0.5))
    return {"k": k, "angle": phi}, prior + sum(von_mises(v, phi, k) for v in x)


TORUS = dist.SineBivariateVonMises(0.5, -2.5, 2.0, 3.0, correlation=0.6)


def torus(x):
    pair = pyro.sample("angles", TORUS)
    with pyro.plate("side", 2):
        pyro.sample("x", dist.VonMises(pair, 2.0), obs=x)


def torus_cube(t, x):
    pair = 2.0 * math.pi * (t - 0.5)
    prior = 2.0 * math.log(2.0 * math.pi) + TORUS.log_prob(pair)
    return {"angles": pair}, prior + von_mises(x, pair, torch.tensor(2.0)).sum(-1)


TWO_WINDS = dist.MixtureSameFamily(
    dist.Categorical(torch.tensor([0.4, 0.6])), dist.VonMises(torch.tensor([2.8, -1.5]), torch.tensor([4.0, 2.0]))
)


def mixed_angle(x):
    phi = pyro.sample("angle", TWO_WINDS)
    pyro.sample("x", dist.VonMises(phi, 0.8), obs=x)


def mixed_angle_cube(t, x):
    phi = 2.0 * math.pi * (t[:, 0] - 0.5)
    return {"angle": phi}, math.log(2.0 * math.pi) + TWO_WINDS.log_prob(phi) + von_mises(x, phi, torch.tensor(0.8))


def directions(x):
    mean = pyro.sample("angle", dist.VonMises(0.0, 0.2))
    with pyro.plate("place", 2):
        phi = pyro.sample("angles", dist.VonMises(mean, 2.0))
        pyro.sample("x", dist.VonMises(phi, 3.0), obs=x)


def directions_cube(t, x):
    phi, two = 2.0 * math.pi * (t - 0.5), torch.tensor(2.0)
    prior = 3.0 * math.log(2.0 * math.pi) + von_mises(phi[:, 0], torch.tensor(0.0), torch.tensor(0.2))
    local = von_mises(phi[:, 1:], phi[:, :1], two) + von_mises(x, phi[:, 1:], torch.tensor(3.0))
    return {"angle": phi[:, 0], "angles": phi[:, 1:]}, prior + local.sum(-1)


T = torch.tensor
CASES = {
    "below a latent": Case(below_a_latent, (T(1.2),), 2, below_a_latent_cube),
    "window": Case(window, (T(1.2),), 2, window_cube),
    "pareto": Case(pareto, (T(1.2),), 2, pareto_cube),
    "stairs": Case(stairs, (T([0.7, 0.6]),), 2, stairs_cube),
    "two sided": Case(two_sided, (T(0.4),), 3, two_sided_cube),
    "plate below a latent": Case(plate_below_a_latent, (T([0.5, 1.4]),), 3, plate_below_a_latent_cube),
    "angle at the seam": Case(angle, (T([3.0, -3.0, 3.1, -2.8]), 3.0, 2.0, 4.0), 1, angle_cube),
    "angle, diffuse": Case(angle, (T([3.0]), 3.0, 0.3, 0.7), 1, angle_cube),
    "angle far from its prior": Case(angle, (T([3.1, -3.0, -2.9]), 0.0, 0.1, 6.0), 1, angle_cube),
    "angle and spread": Case(spread_angle, (T([2.9, -3.0, 2.2, 2.6]),), 2, spread_angle_cube),
    "torus": Case(torus, (T([1.0, 3.0]),), 2, torus_cube),
    "mixture of angles": Case(mixed_angle, (T(-2.9),), 1, mixed_angle_cube),
    "directions": Case(directions, (T([3.0, -2.6]),), 3, directions_cube),
}
MOVING = list(itertools.islice(CASES, 6))
