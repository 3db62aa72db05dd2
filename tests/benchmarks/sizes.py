"""Amortised posteriors of plates of any size against exact ones: a normal, and a regression, both with unknown sd.

Given the sd the coefficients are Gaussian; the sd stands on a grid. Over data sets of a size, drawn from the prior: nats that the
guide loses, E[log p(theta | y) - log q(theta | y)], errors of means in posterior sds, and |log sd ratio|, raw and refined, beside
those of as many exact draws. ``--only normal regression`` takes some; ``--limit`` stops a fit after so many seconds.
"""

import math
import time
import warnings

import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm

DRAWS = {"normal": 4_000, "regression": 1_000}
GRID = torch.linspace(math.log(1e-5), math.log(20.0), 4_000, dtype=torch.float64).exp()


def normal(n=20, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    s = pyro.sample("s", dist.HalfNormal(2.0))
    with pyro.plate("row", n if y is None else y.shape[-1]):
        return pyro.sample("y", dist.Normal(mu, s), obs=y)


def regression(n=20, x=None, y=None):
    """Five coefficients."""
    b = pyro.sample("b", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("row", n if y is None else y.shape[-1]):
        x = pyro.sample("x", dist.Normal(torch.zeros(5), 1.0).to_event(1), obs=x)
        return pyro.sample("y", dist.Normal((x * b).sum(-1), s), obs=y)


class Exact:
    """The posterior of coefficients b ~ N(0, scale^2) and s ~ HalfNormal(wide) of one data set ``y ~ N(X b, s)``."""

    def __init__(self, x, y, scale, wide):
        x, y = x.double() * scale, y.double()
        self.scale, self.s = scale, GRID
        values, self.axes = torch.linalg.eigh(x.mT @ x)
        values = values.clamp_min(0.0)
        seen = self.axes.mT @ (x.mT @ y)
        square = GRID[:, None] ** 2
        self.mean = seen / (square + values)  # along the axes, given s
        self.variance = square / (square + values)
        fit = (square[:, 0] ** -1) * (y @ y - (seen * self.mean).sum(-1))
        log_p = -len(y) * GRID.log() + 0.5 * self.variance.log().sum(-1) - 0.5 * fit
        log_p = log_p - 0.5 * (GRID / wide) ** 2 + GRID.log()  # of log s, evenly spaced
        step = math.log(20.0 / 1e-5) / (len(GRID) - 1)
        self.log_p = log_p - log_p.logsumexp(0)
        self.log_density = self.log_p - math.log(step) - GRID.log()

    def moments(self):
        w = self.log_p.exp()
        b = w @ self.mean
        spread = torch.einsum("g,gi,gj->ij", w, self.mean - b, self.mean - b) + torch.diag(w @ self.variance)
        s = w @ self.s
        mean = torch.cat([self.scale * (self.axes @ b), s[None]])
        inner = (self.axes @ spread @ self.axes.mT).diagonal()
        return mean, torch.cat([self.scale**2 * inner, (w @ (self.s - s) ** 2)[None]]).sqrt()

    def log_prob(self, b, s):
        at = torch.searchsorted(GRID, s.double()).clamp(1, len(GRID) - 1)
        share = (s.double().log() - GRID[at - 1].log()) / (GRID[at].log() - GRID[at - 1].log())
        mean, variance, log_density = (
            (1 - share) * t[at - 1] + share * t[at] for t in (self.mean, self.variance, self.log_density)
        )
        terms = dist.Normal(mean, variance.sqrt()).log_prob(self.axes.mT @ (b.double() / self.scale)).sum()
        return terms + log_density - len(b) * math.log(self.scale)

    def draws(self, n):
        k = torch.multinomial(self.log_p.exp(), n, replacement=True)
        b = self.mean[k] + self.variance[k].sqrt() * torch.randn_like(self.mean[k])
        return torch.cat([self.scale * b @ self.axes.mT, self.s[k, None]], 1)


MODELS = {
    "normal": (normal, ["y"], (2, 200), (3, 20, 200, 1_000), 3.0, 2.0),
    "regression": (regression, ["x", "y"], (5, 500), (5, 8, 20, 100, 500), 1.0, 1.0),
}


def exact_of(kind, sims, i):
    scale, wide = MODELS[kind][-2:]
    x = sims["x"][i] if "x" in sims else torch.ones(sims["y"].shape[-1], 1)
    return Exact(x, sims["y"][i], scale, wide)


def flat(draws):
    """Draws as columns, coefficients first."""
    return torch.cat([v.reshape(len(v), -1) for k, v in draws.items() if k != "s"] + [draws["s"][:, None]], 1).double()


def off(drawn, mean, sd):
    return torch.stack([((drawn.mean(0) - mean) / sd).abs(), (drawn.std(0) / sd).log().abs()])


def measured(kind, guide, n, sets=40, scored=1_000):
    """Averages over data sets of a size and numbers, each with its error."""
    model, observed = MODELS[kind][:2]
    sims = dgm.simulate(model, scored, n, observed=observed, seed=1_000 + n, progress=False)
    data = {k: sims[k] for k in observed}
    found = {"raw": [], "refined": [], "exact draws": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        latents = {k: sims[k] for k in sims if k not in observed}
        log_q = guide.condition(**data).log_prob(latents).detach()
        lost = []
        for i in range(scored):
            b = torch.cat([v[i].reshape(-1) for k, v in latents.items() if k != "s"])
            lost.append(exact_of(kind, sims, i).log_prob(b, latents["s"][i]) - log_q[i])
        khat = []
        for i in range(sets):
            exact = exact_of(kind, sims, i)
            mean, sd = exact.moments()
            posterior = guide.condition(**{k: v[i] for k, v in data.items()})
            refined = posterior.refine(DRAWS[kind], seed=i)
            khat.append(refined.khat)
            torch.manual_seed(i)
            found["raw"].append(off(flat(posterior.sample((DRAWS[kind],))), mean, sd))
            found["refined"].append(off(flat(refined.draws), mean, sd))
            found["exact draws"].append(off(exact.draws(DRAWS[kind]), mean, sd))
    lost = torch.stack(lost)
    row = {"model": kind, "n": n, "nats": [float(lost.mean()), float(lost.std() / len(lost) ** 0.5)]}
    row["khat"] = [float(torch.tensor(khat).median()), float(torch.tensor(khat).max())]
    for name, values in found.items():
        t = torch.stack(values)  # (sets, 2, numbers)
        each = t.mean(-1)
        row[name] = {
            "mean": [float(each[:, 0].mean()), float(each[:, 0].std() / sets**0.5)],
            "log sd": [float(each[:, 1].mean()), float(each[:, 1].std() / sets**0.5)],
            "by number": t.mean(0).tolist(),
        }
    return row


def told(row):
    def two(pair):
        return f"{pair[0]:.3f} +- {pair[1]:.3f}"

    parts = [
        f"{k}: mean {two(row[k]['mean'])}, log sd {two(row[k]['log sd'])}" for k in ("raw", "refined", "exact draws")
    ]
    khat = f"k-hat {row['khat'][0]:.2f}, at most {row['khat'][1]:.2f}"
    return f"{row['model']} n = {row['n']}: lost {two(row['nats'])} nats; {khat}; " + "; ".join(parts)


def trained(kind, seed, limit):
    model, observed, sizes = MODELS[kind][:3]
    sims = dgm.simulate(model, 10_000, observed=observed, sizes={"row": sizes}, seed=seed, progress=False)
    torch.manual_seed(seed)
    guide = dgm.AmortizedGuide(model, observed=observed)
    began = time.process_time()
    history = dgm.fit(dgm.ForwardKL(guide), sims, progress=False, seed=seed, max_seconds=limit)
    print(
        f"{kind}, seed {seed}: {time.process_time() - began:.0f} CPU s, {history.steps} steps, {history.stopped}, best at "
        f"{history.best_step}: {history.best_loss:.3f}",
        flush=True,
    )
    return guide


def main(arguments):
    rows = []
    for kind in arguments.only or MODELS:
        for seed in arguments.seeds:
            guide = trained(kind, seed, arguments.limit)
            for n in MODELS[kind][3]:
                rows.append({"seed": seed, **measured(kind, guide, n)})
                print(told(rows[-1]), flush=True)
    return rows
