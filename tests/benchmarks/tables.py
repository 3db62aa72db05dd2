"""Densities of tables with exact entropies, of the sizes of tabular benchmarks: gaps of flows with ``fit``'s defaults, beside peers'.

Each table is drawn from a law with an exact density: ``sheets-D`` (four curved sheets with noise, turned), ``copula-D`` (a Gaussian
copula with heavy, skewed and nearly discrete columns), ``field-D`` (chains whose scales are columns too), ``patch-D`` (a
Gaussian scale mixture with a spectrum that falls, as of patches of pictures) and ``mixture-D`` (the six Gaussians of ``cnf
--only dimensions``; they lie beside the checkout). The gap of a held-out score to the truth (4,000 rows, the same for all) estimates
KL(p||q), in nats a row. ``--seeds`` takes other laws of each kind, and other rows of them.

``--count`` rows (30,000); ``--limit`` CPU seconds for each method, by the clock of the process; without it ours end by
themselves, and the peers get 60. ``--only copula-8 mixture-32/NSF`` takes some rows.

The peers see standardised columns, and are trained by Adam on minibatches of 256, at the rate .001 that falls to zero along a cosine
over their seconds; 2,000 rows are held out, and the state that scores these best is kept (of flow matching the last one). zuko's flows have
its defaults, nflows' NSF the sizes of the sbi package (five couplings and LU layers, 50 hidden units, 10 bins), torchcfm a network of three
hidden layers of 128 and the plain matcher; its density takes 20 steps of RK4 with the exact trace, and beyond 21 columns 1,000 rows.
nflows, torchcfm and POT (which the latter imports) are optional: ``pip install --no-deps --target DIR torchcfm nflows POT``, and
DIR in ``PYTHONPATH``.
"""

import importlib.util
import math
import time
from functools import partial

import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

import pyro_dgm as dgm
from pyro_dgm.core import zuko
from pyro_dgm.train.descend import Limits
from tests.benchmarks.cnf import Field, targets_module

TABLES = ("sheets-6", "copula-8", "field-21", "sheets-43", "patch-63", "mixture-16", "mixture-32", "mixture-64")
OURS = {"FFJORD": dgm.FFJORD, "OTFlow": dgm.OTFlow, "MAF": dgm.MAF, "NSF": dgm.NSF, "RealNVP": dgm.RealNVP}
OURS["MixtureChain"] = dgm.flows.MixtureChain
ROWS, HELD_OUT, SECONDS, JUDGES = 30_000, 4_000, 60.0, 2_000


# --- laws: (D, a generator of the law) to a function (rows, generator) that gives rows and their log densities ----------------


def orthogonal(d, g):
    return torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]


def randn(*shape, g):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def sheets(d, g, count=4):
    """On sheet k a third of the columns t is normal, the others are sin(A t + b) + noise; then all are turned and moved."""
    free = max(1, d // 3)
    turn = [orthogonal(d, g) for _ in range(count)]
    centre, slope, shift = (
        1.5 * randn(count, d, g=g),
        1.5 * randn(count, d - free, free, g=g) / free**0.5,
        randn(count, d - free, g=g),
    )
    noise = 0.1 + 0.2 * torch.rand(count, d - free, generator=g, dtype=torch.float64)

    def log_prob(x):
        parts = []
        for k in range(count):
            t, y = ((x - centre[k]) @ turn[k]).split([free, d - free], 1)
            on = Normal((t @ slope[k].T + shift[k]).sin(), noise[k])
            parts.append(Normal(0.0, 1.0).log_prob(t).sum(1) + on.log_prob(y).sum(1) - math.log(count))
        return torch.stack(parts).logsumexp(0)

    def draw(n, g):
        rows = []
        for k in torch.randint(count, (n,), generator=g).bincount(minlength=count).unsqueeze(1).unbind():
            i = len(rows)
            t = randn(int(k), free, g=g)
            y = (t @ slope[i].T + shift[i]).sin() + noise[i] * randn(int(k), d - free, g=g)
            rows.append(torch.cat([t, y], 1) @ turn[i].T + centre[i])
        x = torch.cat(rows)[torch.randperm(n, generator=g)]
        return x, log_prob(x)

    return draw


def copula(d, g):
    """Columns sinh(.8 z), exp(.7 z), and a staircase of z, in turn; the correlations of z have two factors."""
    load = randn(d, 2, g=g)
    spread = load @ load.T + 0.5 * torch.eye(d, dtype=torch.float64)
    scale = spread.diagonal().sqrt()
    of_z = MultivariateNormal(torch.zeros(d, dtype=torch.float64), spread / scale / scale[:, None])
    kind, step = torch.arange(d) % 3, 4.0 * math.pi

    def draw(n, g):
        z = randn(n, d, g=g) @ of_z.scale_tril.T
        heavy, skewed, stairs = (0.8 * z).sinh(), (0.7 * z).exp(), z + 0.97 * (step * z).sin() / step
        slopes = [0.8 * (0.8 * z).cosh(), 0.7 * skewed, 1.0 + 0.97 * (step * z).cos()]
        pick = lambda a, b, c: torch.where(kind == 0, a, torch.where(kind == 1, b, c))
        return pick(heavy, skewed, stairs), of_z.log_prob(z) - pick(*slopes).log().sum(1)

    return draw


def field(d, g, members=4):
    """A common log scale, one of each chain around it, and chains of four with correlation .8 at these scales."""
    chains, rest = divmod(d - 1, members + 1)

    def draw(n, g):
        common = randn(n, 1, g=g)
        scale = common + 0.7 * randn(n, chains, g=g)
        z = [randn(n, chains, g=g)]
        for _ in range(members - 1):
            z.append(0.8 * z[-1] + 0.6 * randn(n, chains, g=g))
        plain = randn(n, rest, g=g)
        unit = torch.stack(z, -1)
        log_p = Normal(0.0, 1.0).log_prob(torch.cat([common, plain, unit[..., 0]], 1)).sum(1)
        log_p = log_p + Normal(common, 0.7).log_prob(scale).sum(1) - members * scale.sum(1)
        log_p = log_p + Normal(0.8 * unit[..., :-1], 0.6).log_prob(unit[..., 1:]).sum((1, 2))
        return torch.cat([common, scale, (unit * scale.exp().unsqueeze(-1)).flatten(1), plain], 1), log_p

    return draw


def patch(d, g, levels=9):
    """Normal rows with variances k^-1 along turned axes, times one of nine scales between exp(-2) and exp(2)."""
    axes = orthogonal(d, g) * torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    log_scale = torch.linspace(-2.0, 2.0, levels, dtype=torch.float64)
    weight = (-0.5 * log_scale.square()).softmax(0)
    log_axes = -0.5 * torch.arange(1, d + 1, dtype=torch.float64).log().sum()

    def draw(n, g):
        k = torch.multinomial(weight, n, True, generator=g)
        z = randn(n, d, g=g) * log_scale[k].exp()[:, None]
        each = -0.5 * z.square().sum(1, keepdim=True) * (-2.0 * log_scale).exp() - d * log_scale + weight.log()
        return z @ axes.T, each.logsumexp(1) - log_axes - 0.5 * d * math.log(2.0 * math.pi)

    return draw


def mixture(d, g):
    law = targets_module().GMM(d)

    def draw(n, g):
        x = law.sample(n, g)
        return x, law.log_prob(x.double())

    return draw


LAWS = {"sheets": sheets, "copula": copula, "field": field, "patch": patch, "mixture": mixture}


def table(name, rows, seed):
    """Rows to train on, held-out rows and their log densities."""
    kind, d = name.split("-")
    draw = LAWS[kind](int(d), torch.Generator().manual_seed(int(d) + 1_000 * seed))
    x = draw(rows, torch.Generator().manual_seed(1 + 1_000 * seed))[0].float()
    held, log_p = draw(HELD_OUT, torch.Generator().manual_seed(99 + 1_000 * seed))
    return x, held.float(), log_p


# --- methods -----------------------------------------------------------------------------------------------------------------


def gap(score, held, log_p):
    """Mean of the truth minus the score over held-out rows, and its standard error."""
    with torch.no_grad():
        each = log_p - torch.cat([score(part) for part in held.split(1_000)]).double()
    return float(each.mean()), float(each.std()) / len(each) ** 0.5


def ours(make, x, held, log_p, limit):
    """``fit`` by its defaults; the gaps before the end are those of its own held-out rows, moved to the last one."""
    torch.manual_seed(0)
    began = time.process_time()
    time.perf_counter = time.process_time  # a fit's seconds are those of the processor
    flow = make(x.shape[1])
    Limits.seconds = lambda self: time.process_time() - vars(self).setdefault("since", time.process_time())
    history = dgm.fit(dgm.MaximumLikelihood(flow), (x,), max_seconds=limit, progress=False, seed=0)
    used = time.process_time() - began
    last = gap(lambda rows: flow().log_prob(rows), held, log_p)
    curve = [(step / max(1, history.steps), last[0] + loss - history.best_loss) for step, loss in history.validation]
    found = {"stages": [stage[:2] for stage in history.stages], "steps": history.steps, "stopped": history.stopped}
    return {"seconds": used, "gap": last, "curve": curve[:: max(1, len(curve) // 4)], **found}


def peer(make, x, held, log_p, limit):
    torch.manual_seed(0)
    loc, scale = x.mean(0), x.std(0)
    judges, x = ((x - loc) / scale).split([JUDGES, len(x) - JUDGES])
    found = make(x.shape[1])
    held, log_p = held[: found.most], log_p[: found.most]
    used, steps = descended(found, x, judges, limit)
    score = lambda rows: found.score((rows - loc) / scale) - scale.log().sum()
    return {"seconds": used, "gap": gap(score, held, log_p), "curve": [], "steps": steps}


def descended(found, x, judges, limit, checks=20):
    """Seconds and steps of a peer's training; the best state of its checks is in place then."""
    optimizer = torch.optim.Adam(found.net.parameters(), 1e-3)
    began, steps, best, state = time.process_time(), 0, math.inf, None
    while (used := time.process_time() - began) < limit:
        for rows in x[torch.randperm(len(x))[:2_560]].split(256):
            share = min(1.0, (time.process_time() - began) / limit)
            optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (1.0 + math.cos(math.pi * share))
            optimizer.zero_grad()
            found.loss(rows).backward()
            nn.utils.clip_grad_norm_(found.net.parameters(), 10.0)
            optimizer.step()
            steps += 1
        if found.judged and (time.process_time() - began) * checks // limit > used * checks // limit:
            with torch.no_grad():
                loss = float(-found.score(judges).mean())
            if loss < best:
                best, state = loss, {k: v.clone() for k, v in found.net.state_dict().items()}
    if state is not None:
        found.net.load_state_dict(state)
    return used, steps


class Zuko:
    """A lazy flow of zuko's at its defaults."""

    judged, most = True, HELD_OUT

    def __init__(self, make, d):
        self.net = make(d)

    def score(self, rows):
        return self.net().log_prob(rows)

    def loss(self, rows):
        return -self.score(rows).mean()


class NFlows(Zuko):
    """nflows' splines in couplings, with LU layers between them."""

    def __init__(self, d):
        from nflows import distributions, flows, nn, transforms

        def network(inputs, outputs):
            return nn.nets.ResidualNet(inputs, outputs, hidden_features=50, num_blocks=2)

        layers = []
        for i in range(5):
            mask = (torch.arange(d) + i) % 2
            layers.append(
                transforms.PiecewiseRationalQuadraticCouplingTransform(
                    mask, network, num_bins=10, tails="linear", tail_bound=3.0
                )
            )
            layers.append(transforms.LULinear(d, identity_init=True))
        self.net = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([d]))

    def score(self, rows):
        return self.net.log_prob(rows)


class TorchCFM:
    """torchcfm's conditional flow matching."""

    judged = False

    def __init__(self, d):
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

        sizes, layers = (d + 1, 128, 128, 128), []
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], d))
        self.matcher, self.most = ConditionalFlowMatcher(sigma=0.0), HELD_OUT if d <= 21 else 1_000

        self.flow = dgm.FFJORD(d, field=Field(self.net), trace="exact", method="rk4", steps=20)

    def loss(self, rows):
        t, point, velocity = self.matcher.sample_location_and_conditional_flow(torch.randn_like(rows), rows)
        return (self.net(torch.cat([point, t[:, None]], -1)) - velocity).square().mean()

    def score(self, rows):
        return self.flow().log_prob(rows)


def peers():
    """Those that can be imported; of the others the reason is printed."""
    found = {"zuko MAF": partial(Zuko, zuko.flows.MAF), "zuko NSF": partial(Zuko, zuko.flows.NSF)}
    for name, make, packages in (("nflows NSF", NFlows, ["nflows"]), ("torchcfm", TorchCFM, ["torchcfm", "ot"])):
        lacking = [package for package in packages if importlib.util.find_spec(package) is None]
        if lacking:
            print(f"{name} is left out: no package {', '.join(lacking)} (see the docstring)")
        else:
            found[name] = make
    return found


def shown(name, method, found):
    curve = " ".join(f"{at:.2f}:{value:.2f}" for at, value in found["curve"])
    value, error = found["gap"]
    rest = " ".join(f"{k} {found[k]}" for k in ("steps", "stages", "stopped") if k in found)
    return f"| {name} | {method} | {value:.3f} +- {error:.3f} | {found['seconds']:.0f} | {curve} | {rest} |"


def main(arguments):
    torch.set_num_threads(1)
    others = peers()
    found = []
    for seed in arguments.seeds:
        for name in TABLES + tuple(n.split("/")[0] for n in arguments.only or () if n.split("/")[0] not in TABLES):
            data = None
            for method, make in {**OURS, **others}.items():
                if arguments.only and not {name, method, f"{name}/{method}"} & set(arguments.only):
                    continue
                data = data or table(name, arguments.count or ROWS, seed)
                run = (ours, arguments.limit) if method in OURS else (peer, arguments.limit or SECONDS)
                found.append({"table": name, "seed": seed, "method": method, **run[0](make, *data, run[1])})
                print(shown(name, method, found[-1]), flush=True)
    return found
