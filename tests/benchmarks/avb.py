"""ImplicitGuide under Adversarial_ELBO (every seed) beside AutoFlow under STL_ELBO (the first), both with their defaults.

Rows: banana, bimodal (2-D, exact on a grid), d2, d10, d30 (conjugate Gaussians; KL of the normal with the moments of 50,000
draws). ``KL`` is KL(q || p) in nats; in 2-D by a histogram of 400,000 draws,
whose value for exact draws is 0.001 or less. ``ELBO`` is, for the implicit guide, an estimate and no bound.
"""

import time
import warnings

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import kl_divergence

import pyro_dgm as dgm

HEAD = f"{'case':9s}{'guide':15s}{'seed':>5s}{'KL':>9s}{'ELBO':>10s}{'log Z':>9s}{'a < 0':>7s}{'steps':>7s}{'CPU s':>7s}  verdict"


def banana():
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(b - a.square(), 0.3), obs=torch.tensor(-0.5))


def bimodal():
    a, b = pyro.sample("a", dist.Normal(0.0, 2.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a.square() + 0.5 * b, 0.5), obs=torch.tensor(3.0))


def on_grid(model, side=6.0, bins=150, fine=8):
    """Log evidence and the posterior's mass in each of bins x bins cells."""
    h = 2 * side / (bins * fine)
    g = torch.linspace(-side + h / 2, side - h / 2, bins * fine, dtype=torch.float64)
    a, b = torch.meshgrid(g, g, indexing="ij")
    trace = pyro.poutine.trace(pyro.poutine.condition(model, {"a": a, "b": b})).get_trace()
    log_p = sum(s["fn"].log_prob(s["value"]) for s in trace.nodes.values() if s["type"] == "sample")
    log_z = float(log_p.logsumexp((0, 1))) + 2 * torch.tensor(h).log().item()
    mass = (log_p - log_z).exp().mul(h * h).reshape(bins, fine, bins, fine).sum((1, 3))
    return log_z, mass


def histogram_kl(draws, mass, side=6.0):
    """KL of the draws' histogram against cell masses, with the Miller-Madow correction."""
    bins = len(mass)
    counts = torch.histogramdd(draws.float(), bins=[bins, bins], range=[-side, side, -side, side]).hist.double()
    q, full = counts / len(draws), counts > 0
    kl = (q[full] * (q[full] / mass[full].clamp_min(1e-300)).log()).sum() - (full.sum() - 1) / (2 * len(draws))
    return float(kl) if full.any() and q.sum() > 0.999 else float("inf")


def conjugate(d):
    """z ~ N(0, I), y ~ N(A z, 0.49 I): the model, and the exact posterior and log evidence."""
    source = torch.Generator().manual_seed(0)
    a, y = torch.randn(d, d, generator=source) / d**0.5, torch.randn(d, generator=source)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(d), 1.0).to_event(1))
        pyro.sample("y", dist.Normal((a @ z[..., None])[..., 0], 0.7).to_event(1), obs=y)

    covariance = torch.linalg.inv(torch.eye(d) + a.T @ a / 0.49)
    exact = dist.MultivariateNormal(covariance @ (a.T @ y) / 0.49, covariance)
    return model, exact, float(dist.MultivariateNormal(torch.zeros(d), a @ a.T + 0.49 * torch.eye(d)).log_prob(y))


def fitted(model, kind, seed):
    pyro.clear_param_store()
    guide = dgm.AutoFlow(model) if kind == "AutoFlow" else dgm.ImplicitGuide(model)
    objective = dgm.STL_ELBO()(model, guide) if kind == "AutoFlow" else dgm.Adversarial_ELBO(model, guide)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        began = time.process_time()
        history = dgm.fit(objective, progress=False, seed=seed)
        cpu = time.process_time() - began
    if kind == "AutoFlow":
        with torch.no_grad():
            elbo = -float(dgm.STL_ELBO(4000)(model, guide)())
        verdict = dgm.khat(dgm.from_svi(model, guide, prior=0, seed=0, container="dict")).status
    else:
        elbo, found = objective.estimate()[0], objective.diagnose(seed=0)
        verdict = "believed" if found.ok else "; ".join(found.faults)
    lost = any("misses" in str(w.message) for w in told)
    return guide, elbo, cpu, history, verdict + (" (warned: mode lost)" if lost else "")


def row(case, kind, seed):
    left = float("nan")
    if case in ("banana", "bimodal"):
        model = {"banana": banana, "bimodal": bimodal}[case]
        log_z, mass = on_grid(model)
    else:
        model, exact, log_z = conjugate(int(case.strip("d")))
    guide, elbo, cpu, history, verdict = fitted(model, kind, seed)
    if case in ("banana", "bimodal"):
        draws = guide.draws(400_000)
        left = float((draws["a"] < 0).float().mean())
        kl = histogram_kl(torch.stack([draws["a"], draws["b"]], -1), mass)
    else:
        z = guide.draws(50_000)["z"]
        kl = float(kl_divergence(dist.MultivariateNormal(z.mean(0), z.T.cov()), exact))
    print(
        f"{case:9s}{kind:15s}{seed:5d}{kl:9.4f}{elbo:10.3f}{log_z:9.3f}{left:7.3f}{history.steps:7d}{cpu:7.1f}  {verdict}",
        flush=True,
    )
    return {"case": case, "guide": kind, "seed": seed, "kl": kl, "elbo": elbo, "log_z": log_z, "left": left, "cpu": cpu}


def main(arguments):
    torch.set_num_threads(1)
    print(HEAD, flush=True)
    rows = []
    for case in arguments.only or ["banana", "bimodal", "d2", "d10", "d30"]:
        rows += [row(case, "ImplicitGuide", seed) for seed in arguments.seeds]
        rows += [row(case, "AutoFlow", arguments.seeds[0])]
    return rows
