"""GANs: a step against a plain PyTorch loop, modes and quality of two targets against the source paper's settings, digits,
generators with networks of users' kinds, conditionals of a generator that serves as a prior, also of fields on a grid (kriging.py).

``--only ring grid ring-paper grid-paper networks step digits prior kriging``; one thread. ``--seeds 0 1 2 3 4`` for all but the step.
"""

import itertools
import math
import statistics
import time
import warnings

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.model_selection import cross_val_predict
from torch import nn
from torch.distributions import constraints
from torch.nn.functional import softplus

import pyro_dgm as dgm
from pyro_dgm.core import Standardize
from tests.benchmarks import kriging

SD, RADIUS = 0.1, 0.4  # of a mode; within four standard deviations a draw belongs to it


def ring_centres():
    angle = torch.arange(8) * math.pi / 4
    return 2.0 * torch.stack([angle.cos(), angle.sin()], -1)


def grid_centres():
    return 2.0 * (torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0)) - 2.0)


TARGETS = {"8 gaussians": ring_centres, "5 x 5 grid": grid_centres}


def draws_of(centres, n):
    return centres[torch.randint(len(centres), (n,))] + SD * torch.randn(n, 2)


def judged(draws, held_out, centres):
    found = dgm.evaluate.mode_coverage(draws, centres, RADIUS)
    score = dgm.evaluate.c2st(held_out, draws, seed=0)
    trees = dgm.evaluate.c2st(held_out, draws, classifier=HistGradientBoostingClassifier(), seed=0)
    return {
        "modes": round(found.covered.value * len(centres)), "near a mode": found.quality.value,
        "C2ST": score.value, "C2ST by trees": trees.value,
    }  # fmt: skip


# --- modes and quality -----------------------------------------------------------------------------------------------

STEPS, BATCH = 3000, 256


def with_default(x):
    gan = trained(x, dgm.Generator(2))
    return lambda n: gan.generator().sample((n,))


def trained(x, generator):
    gan = dgm.Adversarial(generator, dgm.Critic(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dgm.fit(gan, (x,), batch_size=BATCH, max_steps=STEPS, progress=False)
    return gan


def layers(inputs, outputs, width=128, depth=3, activation=nn.ReLU):
    hidden = [(nn.Linear(width if i else inputs, width), activation()) for i in range(depth)]
    return nn.Sequential(*itertools.chain(*hidden), nn.Linear(width, outputs))


def source_paper(x, clip):
    """Saturating minimax loss of sigmoids, Adam(2e-4, 0.5) (clip=None); or the clipped Wasserstein loss, RMSprop(5e-5), 5 critic steps."""
    units = Standardize(2).fit(x)
    u, g, d = units(x), layers(2, 2), layers(2, 1)
    make = (
        (lambda p: torch.optim.Adam(p, 2e-4, (0.5, 0.999)))
        if clip is None
        else (lambda p: torch.optim.RMSprop(p, 5e-5))
    )
    opt_g, opt_d = make(g.parameters()), make(d.parameters())
    for _ in range(STEPS):
        for _ in range(1 if clip is None else 5):
            real, fake = d(u[torch.randint(len(u), (BATCH,))]), d(g(torch.randn(BATCH, 2)).detach())
            loss = softplus(-real).mean() + softplus(fake).mean() if clip is None else fake.mean() - real.mean()
            opt_d.zero_grad(), loss.backward(), opt_d.step()
            if clip is not None:
                with torch.no_grad():
                    [p.clamp_(-clip, clip) for p in d.parameters()]
        fake = d(g(torch.randn(BATCH, 2)))
        opt_g.zero_grad(), (-softplus(fake) if clip is None else -fake).mean().backward(), opt_g.step()
    return lambda n: units.transform()(g(torch.randn(n, 2))).detach()


METHODS = {
    "pyro_dgm default": with_default,
    "saturating (source paper)": lambda x: source_paper(x, None),
    "WGAN, clip 0.01 (source paper)": lambda x: source_paper(x, 0.01),
}


def modes(target, methods, seeds):
    for method in methods:
        for seed in seeds:
            torch.manual_seed(seed)
            centres, began = TARGETS[target](), time.process_time()
            sampler = METHODS[method](draws_of(centres, 20_000))
            seconds = time.process_time() - began
            row = judged(sampler(5_000), draws_of(centres, 5_000), centres)
            yield {"row": f"{target}, {method}", "seed": seed, "CPU s": round(seconds, 1)} | row


# --- networks of users' kinds ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """h + W relu(V h)."""

    def __init__(self, width):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, h):
        return h + self.branch(h)


def residual(inputs, outputs, width=64, blocks=3):
    return nn.Sequential(nn.Linear(inputs, width), *[Residual(width) for _ in range(blocks)], nn.Linear(width, outputs))


NETWORKS = {  # latents, and a network of inputs and outputs
    "2 x 128 ReLU": (8, lambda i, o: layers(i, o, 128, 2)),
    "3 x 32 LeakyReLU": (2, lambda i, o: layers(i, o, 32, 3, lambda: nn.LeakyReLU(0.2))),
    "residual, 3 blocks of 64": (4, residual),
    "3 x 256 ReLU": (16, lambda i, o: layers(i, o, 256)),
    "4 x 64 LeakyReLU": (32, lambda i, o: layers(i, o, 64, 4, lambda: nn.LeakyReLU(0.2))),
}


def pinwheel(n, arms=5):
    """Five arms that are bent, as of Johnson et al. (2016, arXiv 1603.06277)."""
    along, across = 1.0 + 0.3 * torch.randn(n), 0.05 * torch.randn(n)
    turn = torch.randint(arms, (n,)) * (2.0 * math.pi / arms) + 0.25 * along.exp()
    return torch.stack([along * turn.cos() - across * turn.sin(), along * turn.sin() + across * turn.cos()], -1)


def unequal(n):
    """Eight gaussians on a ring, the rarest with a share of 1/36."""
    which = torch.multinomial(torch.arange(1.0, 9.0), n, replacement=True)
    return ring_centres()[which] + SD * torch.randn(n, 2)


OTHER_TARGETS = {"pinwheel": pinwheel, "unequal weights": unequal}  # nothing was tuned on them


def networks(targets, seeds):
    """Shares near a mode after each part of the recipe; of targets without modes, draws near rows as the recipe counts them."""
    for target, (name, (latents, make)), seed in itertools.product(targets, NETWORKS.items(), seeds):
        torch.manual_seed(seed)
        draw = OTHER_TARGETS.get(target) or (lambda n, target=target: draws_of(TARGETS[target](), n))
        x, began = draw(20_000), time.process_time()
        gan = trained(x, dgm.Generator(2, make(latents, 2), latents))
        row = {
            "row": f"{target}, {name}, {latents} latents",
            "seed": seed,
            "CPU s": round(time.process_time() - began, 1),
        }
        draws = gan.generator().sample((5_000,))
        if target in TARGETS:
            row |= judged(draws, draw(5_000), TARGETS[target]())
        else:
            row["C2ST"] = dgm.evaluate.c2st(draw(5_000), draws, seed=0).value
        yield row | {"near rows": str(gan.distilled), "at the end": gan.distilled.share(gan.generator)}


# --- a step ----------------------------------------------------------------------------------------------------------


def plain_loop(x, generator, critic, steps, optimizer):
    """The same networks, loss, noise, average and rates in a hand-written loop."""
    opt_d, opt_g = (
        optimizer(critic.parameters()),
        optimizer(list(generator.network.parameters()) + [generator.log_noise]),
    )
    owned = list(generator.network.parameters()) + [generator.log_noise]
    average = [p.detach().clone() for p in owned]
    u = critic.standard(x)

    def draw(n):
        location = generator.network(torch.randn(n, 2))
        return location + generator.log_noise.exp() * torch.randn_like(location)

    losses = []
    for _ in range(steps):
        real = u[torch.randint(len(u), (BATCH,))]
        with torch.no_grad():
            fake = draw(BATCH)
        rows = torch.cat([real, fake]).requires_grad_()
        logits = critic.network(rows).squeeze(-1)
        (gradient,) = torch.autograd.grad(logits.sum(), rows, create_graph=True)
        loss = softplus(-logits[:BATCH]).mean() + softplus(logits[BATCH:]).mean()
        loss = loss + 0.5e-3 * 2.0 * gradient.square().sum(-1).mean()
        opt_d.zero_grad(), loss.backward(), opt_d.step()
        for p in critic.parameters():
            p.requires_grad_(False)
        other = softplus(-critic.network(draw(BATCH))).mean()
        for p in critic.parameters():
            p.requires_grad_(True)
        opt_g.zero_grad(), other.backward(), opt_g.step()
        torch._foreach_lerp_(average, owned, 1e-3)
        losses.append((loss.item(), other.item()))
    return losses


def step(few=100, many=600, rounds=11):
    """Both in turns, CPU seconds: a step alone is the difference of many and few, a short fit has its set-up in it."""
    x = draws_of(ring_centres(), 20_000)
    gan = dgm.Adversarial(dgm.Generator(2), dgm.Critic(2))
    gan.prepare(itertools.repeat((x,)))
    make = lambda p: torch.optim.Adam(p, 1e-3, (0.5, 0.99), fused=True)

    def ours(steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"batch_size": BATCH, "optimizer": make, "progress": False, "validation": (x[:500],)}
            dgm.fit(gan, (x,), max_steps=steps, **options)

    players = ours, lambda steps: plain_loop(x, gan.generator, gan.critic, steps, make)
    [play(few) for play in players]
    alone, whole, longer = [], [], []
    for i in range(rounds):
        cpu = {(n, p): cpu_seconds(players[p], n) for n in (few, many) for p in ((0, 1) if i % 2 else (1, 0))}
        alone.append((cpu[many, 0] - cpu[few, 0]) / (cpu[many, 1] - cpu[few, 1]))
        whole.append(cpu[few, 0] / cpu[few, 1])
        longer.append(cpu[many, 0] / cpu[many, 1])
    yield {"row": f"a step: {many} less {few} steps"} | spread(alone)
    yield {"row": f"{few} steps of fit, set-up and quality checks included"} | spread(whole)
    yield {"row": f"{many} steps of fit, set-up and quality checks included"} | spread(longer)


def cpu_seconds(play, steps):
    began = time.process_time()
    play(steps)
    return time.process_time() - began


def spread(ratios):
    low, _, high = statistics.quantiles(ratios, n=4)
    return {"ratio": statistics.median(ratios), "low": low, "high": high}


# --- digits ----------------------------------------------------------------------------------------------------------


def digits(seeds):
    train, held_out = digits_split()
    for name, make in DIGITS.items():
        found = []
        for seed in seeds:
            torch.manual_seed(seed)
            began = time.process_time()
            sampler = make(train)
            seconds = round(time.process_time() - began, 1)
            found.append(judged_digits(sampler, train, held_out) | {"CPU s": seconds})
            yield {"row": f"digits, {name}", "seed": seed} | found[-1]
        yield {"row": f"digits, {name}, mean"} | {k: statistics.mean(row[k] for row in found) for k in found[0]}


def digits_split():
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().data).float()
    x = (x + torch.rand(x.shape, generator=torch.Generator().manual_seed(0))) / 17.0
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1297]], x[order[1297:]]


def judged_digits(sampler, train, held_out, sets=5):
    """Means over sets of 500 draws; memorization is 1/2 where draws are as far from training rows as held-out rows are."""
    found = []
    for seed in range(sets):
        draws = sampler(500).detach().reshape(500, 64)
        near = dgm.evaluate.precision_recall_density_coverage(held_out, draws)
        found.append({
            "C2ST": dgm.evaluate.c2st(held_out, draws, seed=seed).value,
            "density": near.density.value, "coverage": near.coverage.value,
            "memorization": dgm.evaluate.memorization(draws, train, held_out, seed=0).value,
        })  # fmt: skip
    return {k: statistics.mean(row[k] for row in found) for k in found[0]}


def digits_gan(x, **options):
    gan = dgm.Adversarial(dgm.Generator((8, 8)), dgm.Critic((8, 8)), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dgm.fit(gan, (x.reshape(-1, 8, 8),), batch_size=128, max_steps=1500, progress=False)
    return lambda n: gan.generator().sample((n,))


GREY = constraints.independent(constraints.unit_interval, 1)


def digits_flow(flow, steps, **options):
    def make(x):
        objective = dgm.MaximumLikelihood(flow(), **options)
        dgm.fit(objective, (x,), batch_size=256, max_steps=steps, validation=0.1, progress=False)
        return lambda n: objective.family().sample((n,))

    return make


def digits_vae(x):
    vae = dgm.VAE(
        dgm.vae.StandardNormal(16),
        dgm.vae.Conditional(64, 16, dgm.vae.normal, hidden_features=(128, 128), shared=("log_scale",)),
        dgm.vae.Conditional(16, 64, dgm.vae.normal, hidden_features=(128, 128)),
    )
    dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), (x,), batch_size=128, max_steps=1500, progress=False)
    return vae.generate


DIGITS = {
    "held-out distribution itself": lambda x: lambda n: x[torch.randperm(len(x))[:n]],
    "GAN, default": digits_gan,
    "GAN, wgan-gp, 3 critic steps": lambda x: digits_gan(x, loss="wgan-gp", critic_steps=3),
    "MAF": digits_flow(lambda: dgm.MAF(64, hidden_features=(128, 128), support=GREY), 400),
    "FFJORD": digits_flow(lambda: dgm.FFJORD(64, hidden_features=128), 5, pretrain=600),
    "VAE": digits_vae,
}


# --- a generator as a prior ------------------------------------------------------------------------------------------

SEEN, NOISE = 4, 0.3  # columns that are seen; sd of the hidden ones given them


def curved_mean(seen):
    """Means of the four hidden columns given the seen ones, which are standard normals."""
    return seen + torch.sin(1.5 * seen.roll(1, 1))


def curved_rows(n):
    seen = torch.randn(n, SEEN)
    return torch.cat([seen, curved_mean(seen) + NOISE * torch.randn(n, SEEN)], 1)


def exact_scores(draws):
    """Root mean square of the hidden columns' scores under the known conditionals (1 is right), and the part that is a shift."""
    seen = draws[:, :SEEN]
    scores = (draws[:, SEEN:] - curved_mean(seen)) / NOISE
    explained = [cross_val_predict(HistGradientBoostingRegressor(), seen.numpy(), z.numpy(), cv=5) for z in scores.T]
    shift = (scores * torch.as_tensor(np.array(explained).T)).mean()
    return {"spread of draws": scores.square().mean().sqrt().item(), "shift": shift.clamp_min(0.0).sqrt().item()}


def judged_prior(gan, held_out, seed):
    draws = gan.generator().sample((20_000,))
    c2st = dgm.evaluate.c2st(held_out, draws[: len(held_out)], seed=0)
    check = dgm.diagnostics.conditionals(gan.generator(), held_out, range(SEEN), seed=seed)
    return exact_scores(draws) | {"C2ST": c2st.value, "check": str(check)}


def as_prior(seeds):
    """The whole recipe on 4,000 rows of a law with known conditionals: after the distillation, and after the game."""
    for seed in seeds:
        torch.manual_seed(seed)
        x, held_out = curved_rows(4_000), curved_rows(2_000)
        gan = dgm.Adversarial(dgm.Generator(2 * SEEN), dgm.Critic(2 * SEEN))
        for stage, steps in {"distillation": 1, "game": STEPS}.items():
            began = time.process_time()
            dgm.fit(gan, (x,), batch_size=BATCH, max_steps=steps, progress=False)
            seconds = time.process_time() - began
            row = {"row": f"a prior, after the {stage}", "seed": seed, "CPU s": round(seconds, 1)}
            yield row | judged_prior(gan, held_out, seed)


def main(arguments):
    torch.set_num_threads(1)
    ours, *papers = METHODS
    seeds = arguments.seeds
    parts = {
        "ring": lambda: modes("8 gaussians", [ours], seeds),
        "grid": lambda: modes("5 x 5 grid", [ours], seeds),
        "ring-paper": lambda: modes("8 gaussians", papers, seeds),
        "grid-paper": lambda: modes("5 x 5 grid", papers, seeds),
        "networks": lambda: networks(TARGETS, seeds),
        "other-networks": lambda: networks(OTHER_TARGETS, seeds),
        "step": step,
        "digits": lambda: digits(seeds),
        "prior": lambda: as_prior(seeds),
        "kriging": lambda: kriging.rows_of(seeds),
    }
    rows = []
    for name in arguments.only or parts:
        for row in parts[name]():
            print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
            rows.append(row)
    return rows
