"""Posteriors of posteriordb that have no reference draws beside the checkout: models after its Stan programs, on simulated data.

Two are on the data of posteriordb, which the folder has; the others on data of the same shape, drawn with a fixed seed. Densities
are Stan's up to a constant. No plates: every latent is an event, so that a particle dimension may stand on the left.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints


def drawn_with(seed):
    return np.random.default_rng(seed)


def tensors(**arrays):
    return {k: torch.as_tensor(v, dtype=torch.float64) for k, v in arrays.items()}


# --- Regressions ---


def least_squares(data, beta=None, sigma=None):
    """Flat where no prior is given."""
    x = data["x"]
    flat = dist.ImproperUniform(constraints.real_vector, (), (x.shape[-1],))
    beta = pyro.sample("beta", beta.expand([x.shape[-1]]).to_event(1) if beta else flat)
    sigma = pyro.sample("sigma", sigma or dist.ImproperUniform(constraints.positive, (), ()))
    pyro.sample("y", dist.Normal(beta @ x.mT, sigma[..., None]).to_event(1), obs=data["y"])


def kidscore_momhsiq(data):
    least_squares(data, sigma=dist.HalfCauchy(2.5))


def logmesquite_logvash(data):
    least_squares(data)


def blr(data):
    least_squares(data, dist.Normal(0.0, 10.0), dist.HalfNormal(10.0))


def kidiq(raw):
    x = np.stack([np.ones(raw["N"]), raw["mom_hs"], raw["mom_iq"]], -1)
    return tensors(x=x, y=raw["kid_score"])


def mesquite(raw):
    one, two, high, total = (np.log(raw[k]) for k in ("diam1", "diam2", "canopy_height", "total_height"))
    x = [np.ones(raw["N"]), one + two + high, one + two, one - two, total, raw["group"]]
    return tensors(x=np.stack(x, -1), y=np.log(raw["weight"]))


def sblrc(rng, rows=100, size=5, alike=0.9):
    """Five columns of which any two have a correlation of .9."""
    shared, own = rng.normal(size=(rows, 1)), rng.normal(size=(rows, size))
    x = alike**0.5 * shared + (1.0 - alike) ** 0.5 * own
    return tensors(x=x, y=x.sum(-1) + rng.normal(size=rows))


def half_t(scale):
    return dist.FoldedDistribution(dist.StudentT(3.0, 0.0, scale))


def diamonds(data):
    x = data["x"]
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = pyro.sample("sigma", half_t(10.0))
    mean = intercept[..., None] + b @ x.mT
    pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=data["y"])


def gems(rng, rows=5_000):
    """Log prices of gems: carat and its log, three lengths that follow it, depth, table, and polynomials of three grades."""
    carat = np.exp(rng.normal(-0.4, 0.58, rows))
    lengths = carat[:, None] ** (1.0 / 3.0) * np.array([6.4, 6.4, 3.95]) * np.exp(rng.normal(0.0, 0.012, (rows, 3)))
    depth = 61.7 + 1.4 * rng.normal(size=rows)
    table = 57.5 - 0.5 * (depth - 61.7) + 2.0 * rng.normal(size=rows)
    grades = [contrasts(rng, rows, shares) for shares in GRADES]
    x = np.concatenate([np.stack([carat, np.log(carat), depth, table], -1), lengths, *grades], -1)
    x = (x - x.mean(0)) / x.std(0)
    b = np.concatenate([[-0.3, 1.2, 0.0, -0.01, 0.1, 0.0, 0.05], 0.1 * rng.normal(size=17)])
    return tensors(x=x, y=7.8 + x @ b + 0.13 * rng.normal(size=rows))


# Shares of the grades of cut, colour and clarity.
GRADES = (
    (0.03, 0.09, 0.22, 0.26, 0.40),
    (0.13, 0.18, 0.18, 0.21, 0.15, 0.10, 0.05),
    (0.01, 0.17, 0.24, 0.23, 0.15, 0.09, 0.07, 0.04),
)


def contrasts(rng, rows, shares):
    """Orthogonal polynomials of an ordered grade, as R codes it."""
    levels = np.arange(len(shares), dtype=float)
    basis = np.linalg.qr(np.vander(levels - levels.mean(), increasing=True))[0][:, 1:]
    return basis[rng.choice(len(shares), rows, p=np.asarray(shares) / sum(shares))]


# --- Series ---


def arma11(data):
    y = data["y"]
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))[..., None]
    phi, theta = (pyro.sample(k, dist.Normal(0.0, 2.0))[..., None] for k in ("phi", "theta"))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    before = torch.cat([mu, y[:-1].expand(*mu.shape[:-1], -1)], -1)
    error = followed(-theta, y - mu - phi * before)
    pyro.factor("errors", dist.Normal(0.0, sigma[..., None]).log_prob(error).sum(-1))


def followed(a, c):
    """x_t = a x_{t-1} + c_t from x_0 = c_0, by doubling."""
    reach, x = 1, c
    while reach < c.shape[-1]:
        x = x + a * torch.nn.functional.pad(x, (reach, 0))[..., : c.shape[-1]]
        a, reach = a * a, 2 * reach
    return x


def arma_series(rng, length=200, mu=0.3, phi=0.6, theta=0.3, sigma=0.5):
    error, y = sigma * rng.normal(size=length), np.zeros(length)
    for t in range(length):
        y[t] = mu + phi * (y[t - 1] if t else mu) + theta * (error[t - 1] if t else 0.0) + error[t]
    return tensors(y=y)


def hmm_drive_0(data):
    rows = torch.stack([pyro.sample(f"theta{k + 1}", dist.Dirichlet(data["alpha"][k])) for k in range(2)], -2)
    ordered = dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,))
    rates = [pyro.sample(k, ordered) for k in ("phi", "lambda")]
    prior = dist.Normal(torch.tensor([0.0, 3.0]), 1.0)
    pyro.factor("prior", sum(prior.log_prob(rate).sum(-1) for rate in rates))
    seen = [dist.Exponential(r[..., None, :]).log_prob(data[k][:, None]) for r, k in zip(rates, "uv", strict=True)]
    pyro.factor("path", hidden_path(rows.log(), seen[0] + seen[1]))


def hidden_path(log_move, log_seen):
    """Log density of what is seen, the path summed out by halving; Stan's program gives the first state no prior."""
    m = log_move[..., None, :, :] + log_seen[..., 1:, None, :]
    while m.shape[-3] > 1:
        even = m.shape[-3] // 2 * 2
        first, second = m[..., 0:even:2, :, :], m[..., 1:even:2, :, :]
        product = (first[..., None] + second[..., None, :, :]).logsumexp(-2)
        m = torch.cat([product, m[..., even:, :, :]], -3)
    return (log_seen[..., 0, :, None] + m[..., 0, :, :]).flatten(-2).logsumexp(-1)


def drives(rng, length=416, phi=(0.7, 3.0), lam=(0.6, 2.6), stay=(0.94, 0.9)):
    state = np.zeros(length, int)
    for t in range(1, length):
        state[t] = state[t - 1] if rng.random() < stay[state[t - 1]] else 1 - state[t - 1]
    u, v = (rng.exponential(1.0 / np.asarray(rate)[state]) for rate in (phi, lam))
    return tensors(u=u, v=v, alpha=[[6.0, 3.0], [3.0, 6.0]])


# --- A differential equation ---

DOSE, VOLUME, EVERY, SUBSTEPS = 30.0, 2.0, 0.5, 4


def one_comp_mm_elim_abs(data):
    k_a, k_m, v_m, sigma = (pyro.sample(k, dist.HalfCauchy(1.0)) for k in ("k_a", "K_m", "V_m", "sigma"))
    level = concentrations(k_a, k_m, v_m, len(data["c"]))
    pyro.sample("c", dist.LogNormal(level.clamp_min(1e-300).log(), sigma[..., None]).to_event(1), obs=data["c"])


def concentrations(k_a, k_m, v_m, count):
    """C' = k_a D / V exp(-k_a t) - V_m / V C / (K_m + C) from 0, by Runge and Kutta; at multiples of half a day."""
    h, c, found = EVERY / SUBSTEPS, torch.zeros_like(k_a), []

    def slope(t, c):
        c = c.clamp_min(0.0)
        return DOSE / VOLUME * k_a * (-k_a * t).exp() - v_m / VOLUME * c / (k_m + c)

    for i in range(count * SUBSTEPS):
        one = slope(i * h, c)
        two = slope((i + 0.5) * h, c + 0.5 * h * one)
        three = slope((i + 0.5) * h, c + 0.5 * h * two)
        c = c + h / 6.0 * (one + 2.0 * (two + three) + slope((i + 1) * h, c + h * three))
        found.append(c)
    return torch.stack(found[SUBSTEPS - 1 :: SUBSTEPS], -1)


def doses(rng, count=20):
    level = concentrations(*torch.tensor([0.75, 1.0, 3.0]), count)
    return tensors(c=level.numpy() * np.exp(0.1 * rng.normal(size=count)))


# --- Gaussian processes by basis functions ---

REACH = 1.25  # half the interval of the functions, in units of the span of the times


def accel_gp(data):
    mean = pyro.sample("Intercept", dist.StudentT(3.0, -13.0, 36.0))
    log_sd = pyro.sample("Intercept_sigma", dist.StudentT(3.0, 0.0, 10.0))
    mean, log_sd = mean[..., None] + curve(data["t"], "", 40), log_sd[..., None] + curve(data["t"], "_sigma", 20)
    pyro.sample("y", dist.Normal(mean, log_sd.exp()).to_event(1), obs=data["y"])


def curve(t, name, size):
    """A function whose covariance is about s^2 exp(-d^2 / 2 l^2) (Riutort-Mayol et al. 2023)."""
    sd = pyro.sample(f"sdgp{name}", half_t(36.0))[..., None]
    scale = pyro.sample(f"lscale{name}", dist.InverseGamma(1.124909, 0.0177))[..., None]
    z = pyro.sample(f"zgp{name}", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
    root = torch.arange(1, size + 1, dtype=t.dtype) * math.pi / (2.0 * REACH)
    basis = (root * (t[:, None] + REACH)).sin() / REACH**0.5
    spread = sd * (math.sqrt(2.0 * math.pi) * scale).sqrt() * (-0.25 * scale**2 * root**2).exp()
    return (spread * z) @ basis.mT


def helmets(rng, count=133):
    """An acceleration that is flat, falls, swings back and comes to rest, with noise that grows at the fall."""
    ms = np.sort(np.round(2.4 + 55.2 * rng.beta(1.6, 2.0, count), 1))
    shape = -115.0 * np.exp(-0.5 * ((ms - 20.5) / 3.6) ** 2) + 50.0 * np.exp(-0.5 * ((ms - 32.5) / 4.5) ** 2)
    sd = 1.5 + 24.0 / (1.0 + np.exp(-(ms - 15.0)))
    t = (ms - ms.mean()) / (ms.max() - ms.min())
    return tensors(t=t, y=shape + sd * rng.normal(size=count))


# By name: the model, and its data, drawn or of the posterior of the folder that has the same.
SIMULATED = {
    "diamonds-diamonds": (diamonds, gems),
    "sblrc-blr": (blr, sblrc),
    "arma-arma11": (arma11, arma_series),
    "bball_drive_event_0-hmm_drive_0": (hmm_drive_0, drives),
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs": (one_comp_mm_elim_abs, doses),
    "mcycle_gp-accel_gp": (accel_gp, helmets),
}
OF_THE_FOLDER = {
    "kidiq-kidscore_momhsiq": (kidscore_momhsiq, kidiq, "kidiq-kidscore_momiq"),
    "mesquite-logmesquite_logvash": (logmesquite_logvash, mesquite, "mesquite-logmesquite"),
}

# Latents that are judged by their logarithms: the likelihood stays above zero along K_m ~ V_m and along long scales, so that
# these have no variance.
IN_LOGS = ("K_m", "V_m", "sdgp", "lscale", "sdgp_sigma", "lscale_sigma")
