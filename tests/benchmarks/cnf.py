"""Continuous flows against ``zuko.flows.CNF`` and torchcfm, in process CPU seconds on one thread, batch 512.

Parts (``--only``): targets, otflow, dimensions, steps, trace, svi, reach, moons; ``targets:moons``, ``targets:moons/ours`` or
``dimensions:16`` for some of their rows. Every flow gets ``--limit`` CPU seconds (25). The targets have exact log densities, so the gap of a held-out score to the truth estimates
KL(p||q); they lie beside the checkout, in ``../shared/densities``. torchcfm is optional: its rows are left out without it.
"""

import copy
import importlib.util
import math
import pathlib
import statistics
import time
import warnings

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_dgm as dgm
from pyro_dgm.cnf.field import at_times
from pyro_dgm.core import zuko

BATCH, HELD_OUT, MATCHING = 512, 4_000, 0.35
SHARED = pathlib.Path(__file__).parents[3] / "shared"


def targets_module():
    spec = importlib.util.spec_from_file_location("targets", SHARED / "densities" / "targets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- training on a stream, by CPU seconds ----------------------------------------------------------------------------


def train(loss, parameters, draw, seconds, lr, after=lambda used: False):
    """Adam with warm-up and a cosine schedule over CPU seconds; drawing data and ``after`` are not on the clock."""
    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, lr, betas=(0.9, 0.99), fused=True)
    used, steps = 0.0, 0
    while used < seconds:
        x = draw()
        began = time.process_time()
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * used / seconds))
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (steps + 1) / 30) * cosine
        optimizer.zero_grad(set_to_none=True)
        loss(x).backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        used, steps = used + time.process_time() - began, steps + 1
        if after(used):
            break
    return steps, used


class Ours:
    """The recipe: flow matching, then likelihood with step control; ``share`` is the part of flow matching."""

    def __init__(self, dim, x, share=MATCHING, width=64, make=dgm.FFJORD):
        self.flow, self.share = make(dim, hidden_features=width), share
        self.flow.standardize(x)

    def train(self, draw, seconds, after=lambda used: False):
        matching = self.share * seconds
        first = (0, 0.0)
        if matching:
            first = train(dgm.FlowMatching(self.flow), self.flow.parameters(), draw, matching, 5e-3, after)
            if first[1] < matching:
                return {"steps": first[0], "seconds": first[1]}
        likelihood = dgm.MaximumLikelihood(self.flow)
        lr = 6e-3 if matching else 5e-3
        second = train(likelihood, self.flow.parameters(), draw, seconds - matching, lr, lambda u: after(u + matching))
        self.flow.finish()
        return {"steps": (first[0], second[0]), "seconds": first[1] + second[1]}

    def score(self, x):
        return self.flow().log_prob(x)


class Zuko:
    """zuko's CNF at its defaults, on standardised data."""

    def __init__(self, dim, x, width=64):
        self.loc, self.scale = x.mean(0), x.std(0)
        self.flow = zuko.flows.CNF(dim, hidden_features=(width, width), activation=nn.Tanh)

    def train(self, draw, seconds, after=lambda used: False):
        steps, used = train(lambda x: -self.score(x).mean(), self.flow.parameters(), draw, seconds, 3e-3, after)
        return {"steps": steps, "seconds": used}

    def score(self, x):
        return self.flow().log_prob((x - self.loc) / self.scale) - self.scale.log().sum()


class Field(nn.Module):
    """A network of x and the time, in the form that a continuous flow takes."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, x):
        return self.net(torch.cat([x, t], -1))


class TorchCFM:
    """torchcfm's exact-OT flow matching with its own MLP, on standardised data; scored by dopri5 with an exact trace."""

    def __init__(self, dim, x):
        from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
        from torchcfm.models.models import MLP

        self.net, self.matcher = MLP(dim, time_varying=True, w=64), ExactOptimalTransportConditionalFlowMatcher(0.01)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its SELU
            self.flow = dgm.FFJORD(dim, field=Field(self.net), method="dopri5").standardize(x)

    def loss(self, x):
        u = self.flow.flow_units(x)
        t, point, velocity = self.matcher.sample_location_and_conditional_flow(torch.randn_like(u), u)
        return (self.net(torch.cat([point, t[:, None]], -1)) - velocity).square().mean()

    def train(self, draw, seconds, after=lambda used: False):
        steps, used = train(self.loss, self.net.parameters(), draw, seconds, 3e-3, after)
        return {"steps": steps, "seconds": used}

    def score(self, x):
        return self.flow().log_prob(x)


def peers():
    found = {"zuko": Zuko}
    if importlib.util.find_spec("torchcfm"):
        found["torchcfm"] = TorchCFM
    return found


def gap(method, target, x):
    """Mean and standard error of the truth minus the score, in nats."""
    with torch.no_grad():
        each = torch.cat([target.log_prob(part) - method.score(part) for part in x.split(1_000)])
    return {"gap": float(each.mean()), "error": float(each.std()) / len(each) ** 0.5}


def accuracy(flow, x):
    """Errors of log p and of the inverse in float32 at the settled steps, against dopri8 at 1e-9 in float64."""
    exact = dgm.FFJORD(flow.features, field=copy.deepcopy(flow.field), method="dopri8", tolerance=1e-9).double()
    exact.standard = copy.deepcopy(flow.standard).double()
    flow.solver.evaluations.reset()
    with torch.no_grad():
        off = (flow().log_prob(x).double() - exact().log_prob(x.double())).abs()
        evaluations = flow.solver.evaluations.forward
        u = flow.flow_units(x)
        back = flow.solve(flow.solve(u, None)[0], None, sampling=True)[0]
        inverse = ((back - u) * flow.standard.scale).abs()
    return {
        "nfe": evaluations, "logp_mean": float(off.mean()), "logp_99": float(off.quantile(0.99)), "logp_max": float(off.max()),
        "inverse_mean": float(inverse.mean()), "inverse_max": float(inverse.max()),
    }  # fmt: skip


def run(name, make, target, seconds, seed=0):
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed + 1)
    held = target.sample(HELD_OUT, torch.Generator().manual_seed(99))
    method = make(target.dim, target.sample(5_000, g))
    row = method.train(lambda: target.sample(BATCH, g), seconds)
    row |= gap(method, target, held)
    if name.startswith("ours"):
        row |= accuracy(method.flow, held[:1_000])
    return row


def targets(arguments, chosen):
    seconds, (only, _, method) = arguments.limit or 25.0, chosen.partition("/")
    methods = {"ours": Ours, **(peers() if seconds < 50 else {})}  # the longer column is ours alone
    for target in targets_module().TARGETS.values():
        for name, make in methods.items():
            if only in ("", target.name) and method in ("", name):
                yield f"{target.name}, {name}, {seconds:g} s", run(name, make, target, seconds)


def otflow(arguments, chosen):
    """The potential flow on two targets, same recipe."""
    all_targets, seconds = targets_module().TARGETS, arguments.limit or 25.0
    for name in ("8gaussians", "gmm8d"):
        make = lambda dim, x: Ours(dim, x, width=256, make=dgm.OTFlow)
        yield f"{name}, ours (OTFlow), {seconds:g} s", run("ours", make, all_targets[name], seconds)


def dimensions(arguments, chosen):
    seconds = arguments.limit or 25.0
    for dim in [int(chosen)] if chosen else (2, 4, 8, 16, 32, 64):
        yield f"mixture in {dim} dimensions, {seconds:g} s", run("ours", Ours, targets_module().GMM(dim), seconds)


def moons(arguments, chosen):
    """The source paper's moons: noise .05 in scikit-learn's units; entropy by quadrature of the same density."""
    from sklearn.datasets import make_moons

    seconds = arguments.limit or 25.0
    draw = lambda n, seed=None: torch.tensor(make_moons(n, noise=0.05, random_state=seed)[0], dtype=torch.float32)
    x, held = draw(5_000, 0), draw(20_000, 1)
    truth = moons_log_prob(held.double())
    yield "entropy", {"nats": -float(truth.mean()), "error": float(truth.std()) / len(held) ** 0.5}
    ours = Ours(2, x)
    yield "FFJORD", ours.train(lambda: draw(BATCH), seconds) | nll(ours.flow, held)
    for name, flow in {"NSF": dgm.NSF(2), "RealNVP": dgm.RealNVP(2, transforms=16)}.items():
        flow.standardize(x)
        steps, used = train(
            lambda y, f=flow: -f().log_prob(y).mean(), flow.parameters(), lambda: draw(BATCH), seconds, 5e-3
        )
        yield name, {"steps": steps, "seconds": used} | nll(flow, held)


def nll(flow, x):
    with torch.no_grad():
        each = -torch.cat([flow().log_prob(part) for part in x.split(2_000)])
    total, error = dgm.assert_density(flow(), num_samples=40_000)
    return {"nll": float(each.mean()), "error": float(each.std()) / len(x) ** 0.5, "integral": total, "+-": error}


def moons_log_prob(x):
    angle = (torch.arange(4_000, dtype=torch.float64) + 0.5) / 4_000 * math.pi
    circles = [torch.stack([angle.cos(), angle.sin()], 1), torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)]
    centres, s = torch.cat(circles), 0.05
    parts = [((p[:, None] - centres).square().sum(-1) / (-2 * s * s)).logsumexp(1) for p in x.split(500)]
    return torch.cat(parts) - math.log(len(centres)) - math.log(2 * math.pi * s * s)


# --- costs -----------------------------------------------------------------------------------------------------------


def in_turns(calls, rounds=9):
    """CPU milliseconds of each call, medians over rounds in which all run."""
    for f in calls.values():
        f()
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, f in calls.items():
            began = time.process_time()
            f()
            seconds[name].append(time.process_time() - began)
    return {name: 1e3 * statistics.median(s) for name, s in seconds.items()}


def step_of(loss, module):
    def step():
        module.zero_grad()
        loss().backward()

    return step


def steps(arguments, chosen):
    """One maximum-likelihood step, forward and backward, of the same field and weights after 6 s of the recipe.

    Ours takes the steps that its control found while training; the others their default tolerances.
    """
    for dim in [int(chosen)] if chosen else (2, 8, 32):
        target, g = targets_module().GMM(dim), torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        method, draw = Ours(dim, target.sample(5_000, g)), lambda t=target, g=g: t.sample(BATCH, g)
        flow, x = method.flow, draw()
        train(dgm.FlowMatching(flow), flow.parameters(), draw, 2.0, 5e-3)
        train(dgm.MaximumLikelihood(flow), flow.parameters(), draw, 4.0, 3e-3)
        style = dgm.FFJORD(dim, field=AsModule(flow.field), method="dopri5", adjoint=True, trace="hutchinson")
        exact = dgm.FFJORD(dim, field=copy.deepcopy(flow.field), method="dopri5", adjoint=True)
        style.standard = exact.standard = flow.standard
        calls = {
            "ours": step_of(lambda f=flow, x=x: -f().log_prob(x).mean(), flow),
            "closed trace, dopri5, adjoint": step_of(lambda f=exact, x=x: -f().log_prob(x).mean(), exact),
            "FFJORD (Hutchinson, dopri5, adjoint)": step_of(lambda f=style, x=x: -f().log_prob(x).mean(), style),
            "zuko (exact trace)": step_of(lambda f=flow, x=x: by_zuko_solver(f, x), flow),
        }
        row = in_turns(calls, 5 if dim < 32 else 2)
        ratios = {f"{k} / ours": v / row["ours"] for k, v in row.items() if k != "ours"}
        yield f"ms of a step, D={dim}, n={int(flow.solver.steps)}", row | ratios


def by_zuko_solver(flow, x):
    """The loss of the same field by zuko's solver and trace, at its defaults."""
    field, u = flow.field, flow.flow_units(x)
    f = lambda t, y: field.velocity(t.expand(*y.shape[:-1], 1), y, None)
    solve = zuko.transforms.FreeFormJacobianTransform(
        f, t0=u.new_tensor(1.0), t1=u.new_tensor(0.0), phi=list(field.parameters())
    )
    z, ladj = solve.call_and_ladj(u)
    return (0.5 * z.square().sum(-1) - ladj).mean()


class AsModule(nn.Module):
    """A field as any module, its divergence unknown."""

    def __init__(self, field):
        super().__init__()
        self.field = copy.deepcopy(field)

    def forward(self, t, x):
        return self.field.velocity(t, x, None)


def trace(arguments, chosen):
    """The exact divergence against none at D = 64, and its cost over D, 8 steps of RK4, in one run."""
    calls = {}
    for dim in (2, 8, 32, 64):
        x = torch.randn(BATCH, dim)
        for name, kind in {"exact": dgm.cnf.TwoLayerField, "none": NoTrace}.items():
            flow = dgm.FFJORD(dim, field=kind(dim), steps=8)
            calls[f"{name} D={dim}"] = step_of(lambda f=flow, y=x: -f().log_prob(y).mean(), flow)
    rows = in_turns(calls, 25)
    cost = {dim: rows[f"exact D={dim}"] - rows[f"none D={dim}"] for dim in (2, 64)}
    ratios = {"exact / none at D=64": rows["exact D=64"] / rows["none D=64"]}
    ratios |= {
        "divergence alone, D=64 / D=2": cost[64] / cost[2],
        "step, D=64 / D=2": rows["exact D=64"] / rows["exact D=2"],
    }
    yield "ms of a step", rows | ratios


class NoTrace(dgm.cnf.TwoLayerField):
    """The default field as it moves points, without its divergence."""

    def bind(self, context, plan):
        stage = at_times(self._stages, plan.times)

        def motion(t, x):
            at = stage(t)
            s = nn.functional.linear(x, at.first, at.bias0).sigmoid()
            s = nn.functional.linear(s, at.second, at.bias1).sigmoid()
            velocity = torch.addcmul(nn.functional.linear(s, at.third, at.bias2), at.rate, x)
            return dgm.cnf.Rates(velocity, torch.zeros_like(x[..., 0]))

        return motion


# --- in Pyro ---------------------------------------------------------------------------------------------------------


def svi(arguments, chosen):
    """A conditional guide on a plate of 64, 8 particles: an SVI step, and the error of log q, both after 300 steps of one particle."""
    torch.manual_seed(0)
    y = 2.0 * torch.randn(64, 3)
    guides = {}
    ours = dgm.FFJORD(3, 3, hidden_features=32)
    theirs = zuko.flows.CNF(3, 3, hidden_features=(32, 32))

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z + 0.5 * z.roll(1, -1) ** 2, 0.5).to_event(1), obs=y)

    def by_ours(y):
        pyro.module("ours", ours)
        with pyro.plate("data", len(y)):
            pyro.sample("z", ours(y))

    def by_zuko(y):
        pyro.module("theirs", theirs)
        with pyro.plate("data", len(y)):
            pyro.sample("z", ZukoToPyro(theirs(y)))

    for name, guide in {"ours": by_ours, "zuko": by_zuko}.items():
        optimizer = pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.1 ** (1 / 300)})
        short, loss = Trace_ELBO(1), Trace_ELBO(8, vectorize_particles=True, max_plate_nesting=1)
        trainer = SVI(model, guide, optimizer, short)  # one particle is cheap, and trained is trained
        losses = [trainer.step(y) for _ in range(300)]
        guides[name] = SVI(model, guide, pyro.optim.Adam({"lr": 1e-6}), loss)
        yield f"loss of {name}", {"nats": sum(losses[-50:]) / 50}
    calls = {k: lambda g=g: g.step(y) for k, g in guides.items()}
    for tolerance in (None, 1e-4, 1e-3, 1e-2):
        if tolerance:
            theirs.transform.atol = theirs.transform.rtol = tolerance
        row = in_turns({"zuko": calls["zuko"]}, 5) | log_q_error(theirs, y)
        yield f"SVI step, zuko, {'default tolerance' if tolerance is None else tolerance}", row
    ours.solver.controlled, controlled = False, int(ours.solver.steps)
    for n in sorted({controlled, 6, 8, 10, 12, 16, 20, 24}):
        ours.solver.steps.fill_(n)
        row = in_turns({"ours": calls["ours"]}, 7) | log_q_error(ours, y)
        yield f"SVI step, ours, n={n}{' (by control)' if n == controlled else ''}", row


@torch.no_grad()
def log_q_error(family, y):
    """|log q as drawn - log q by a tight float64 solve| over 8 x 64 draws."""
    torch.manual_seed(1)
    x, claimed = family(y).rsample_and_log_prob((8,))
    tight = copy.deepcopy(family).double()
    if isinstance(tight, dgm.FFJORD):
        tight.solver.steps.fill_(400)
    else:
        tight.transform.atol, tight.transform.rtol = 1e-9, 1e-9
    off = (claimed.double() - tight(y.double()).log_prob(x.double())).abs()
    return {"mean": float(off.mean()), "max": float(off.max())}


def reach(arguments, chosen):
    """CPU seconds to a gap of 0.06 on the eight Gaussians, looked at every half second for us, every 5 for the others."""
    target = targets_module().TARGETS["8gaussians"]
    methods = {
        "ours": (lambda d, x: Ours(d, x), 5.0, 0.25),
        "ours, likelihood only": (lambda d, x: Ours(d, x, 0.0), 12.0, 0.25),
    }
    if arguments.limit:  # without it, the others' gaps in ``targets`` are bounds
        methods |= {name: (make, arguments.limit, 5.0) for name, make in peers().items()}
    for name, (make, seconds, every) in methods.items():
        torch.manual_seed(0)
        g, held = torch.Generator().manual_seed(1), target.sample(1_000, torch.Generator().manual_seed(99))
        method, seen = make(2, target.sample(5_000, g)), [(0.0, math.inf)]

        def after(used, method=method, seen=seen, every=every, held=held):
            if used - seen[-1][0] >= every:
                if isinstance(method, Ours):
                    before = int(method.flow.solver.steps)
                    method.flow.solver.steps.fill_(24)
                seen.append((used, gap(method, target, held)["gap"]))
                if isinstance(method, Ours):
                    method.flow.solver.steps.fill_(before)
            return seen[-1][1] < 0.06

        method.train(lambda g=g: target.sample(BATCH, g), seconds, after)
        yield f"to 0.06 on 8gaussians, {name}", {"seconds": seen[-1][0], "gap": seen[-1][1], "schedule": seconds}


PARTS = {
    "targets": targets, "otflow": otflow, "dimensions": dimensions, "steps": steps, "trace": trace, "svi": svi, "reach": reach,
    "moons": moons,
}  # fmt: skip


def main(arguments):
    torch.set_num_threads(1)
    rows = {}
    for part in arguments.only or PARTS:
        pyro.clear_param_store()
        part, _, chosen = part.partition(":")
        for name, row in PARTS[part](arguments, chosen):
            rows[name] = row
            shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print(f"{name:45s} {shown}", flush=True)
    return rows
