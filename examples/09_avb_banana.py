"""A banana by an implicit guide, whose ELBO is an estimate that ``diagnose`` judges, a flow guide and NUTS; exact on a grid."""

import argparse
import pathlib
import time

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

import pyro_dgm as dgm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIDE, BINS = 6.0, 100


def banana():
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(b - a.square(), 0.3), obs=torch.tensor(-0.5))


def exact(fine=10):
    """The log evidence, and the posterior's mass in every cell of a grid."""
    h = 2 * SIDE / (BINS * fine)
    g = torch.linspace(-SIDE + h / 2, SIDE - h / 2, BINS * fine, dtype=torch.float64)
    a, b = torch.meshgrid(g, g, indexing="ij")
    log_p = dist.Normal(0.0, 1.0).log_prob(a) + dist.Normal(0.0, 2.0).log_prob(b)
    log_p = log_p + dist.Normal(b - a.square(), 0.3).log_prob(torch.tensor(-0.5, dtype=torch.float64))
    log_z = log_p.logsumexp((0, 1)) + 2 * torch.tensor(h).log()
    return float(log_z), (log_p - log_z).exp().mul(h * h).reshape(BINS, fine, BINS, fine).sum((1, 3))


def kl(draws, mass):
    """KL of the draws' histogram to the exact posterior, in nats, corrected for the number of filled cells."""
    x = torch.stack([draws["a"].reshape(-1), draws["b"].reshape(-1)], -1).float()
    q = torch.histogramdd(x, bins=[BINS, BINS], range=[-SIDE, SIDE, -SIDE, SIDE]).hist.double() / len(x)
    full = q > 0
    return float((q[full] * (q[full] / mass[full]).log()).sum() - (full.sum() - 1) / (2 * len(x)))


def by_chance(n, mass):
    """The same number for n independent draws of the exact posterior: what a KL of so few draws must be read against."""
    cell = torch.multinomial(mass.reshape(-1).float(), n, replacement=True)
    a, b = ((i + 0.5) * 2 * SIDE / BINS - SIDE for i in (cell // BINS, cell % BINS))
    return kl({"a": a, "b": b}, mass)


def timed(run):
    began = time.process_time()
    return run(), time.process_time() - began


def implicit(steps):
    objective = dgm.Adversarial_ELBO(banana, guide := dgm.ImplicitGuide(banana))
    dgm.fit(objective, max_steps=steps, seed=0)
    return guide, objective


def flow(steps):
    guide = dgm.AutoFlow(banana)
    dgm.fit(dgm.STL_ELBO()(banana, guide), max_steps=steps, seed=0)
    return guide


def nuts(draws):
    kernel = NUTS(banana, target_accept_prob=0.95)
    chain = MCMC(kernel, num_samples=draws, warmup_steps=draws // 2, disable_progbar=True)
    chain.run()
    return chain.get_samples()


def picture(draws, mass, path):
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.7), sharex=True, sharey=True, layout="constrained")
    grid = torch.linspace(-SIDE, SIDE, BINS)
    for ax, (name, (x, score, chance)) in zip(axes, draws.items(), strict=True):
        ax.contour(grid, grid, mass.T, levels=[1e-5, 1e-4, 1e-3], colors="0.3", linewidths=0.7)
        ax.plot(x["a"][:2000], x["b"][:2000], ".", ms=1.5, alpha=0.5)
        title = f"{name}: KL {score:.3f} nats\n(as many exact draws: {chance:.3f})"
        ax.set(xlim=(-3.2, 3.2), ylim=(-2.5, 5.5), xlabel="a", ylabel="b", title=title)
    figure.savefig(path, dpi=150)


def main(steps, num_nuts, out):
    pyro.set_rng_seed(0)
    log_z, mass = exact()
    (guide, objective), seconds = timed(lambda: implicit(steps))
    found = {"implicit guide": guide.draws(200_000)}
    print(f"implicit guide, {seconds:.0f} CPU s. log evidence {log_z:.3f}\n{objective.diagnose(seed=0)}")
    guide, seconds = timed(lambda: flow(steps))
    found["flow guide"] = guide.draws(200_000)
    print(f"flow guide, {seconds:.0f} CPU s. {dgm.khat(dgm.from_svi(banana, guide, prior=0, seed=0))}")
    found["NUTS"], seconds = timed(lambda: nuts(num_nuts))
    scored = {name: (x, kl(x, mass), by_chance(len(x["a"]), mass)) for name, x in found.items()}
    out.mkdir(exist_ok=True)
    picture(scored, mass, out / "avb_banana.png")
    print(f"NUTS, one chain of {num_nuts}, {seconds:.0f} CPU s. picture:", out / "avb_banana.png")
    for name, (x, score, chance) in scored.items():
        print(f"{name:15s} KL to exact {score:.3f} by {len(x['a']):,} draws; of so many exact draws {chance:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    main(20 if arguments.smoke else None, 100 if arguments.smoke else 2000, arguments.out)
