"""Draws of autoregressive flows before and after: zuko's inverse against ours, and zuko's spline against ours; CPU seconds.

The same parameters on both sides, three transforms of two hidden layers of 64, in turns on one thread; medians. ``--only tasks``
times 10,000 draws of amortised posteriors of the tasks of the ``sbi`` benchmark, trained for 15 epochs (five observations,
two rounds; the mean), and those of the spline flow of the sbi package where it is installed.
"""

import importlib.util
import statistics
import time

import torch
from torch import nn

import pyro_dgm as dgm
from pyro_dgm.core import zuko
from tests.benchmarks._sbi_tasks import BOUND, TASKS, box, simulations

DRAWS = {8: 10_000, 32: 2_000, 64: 1_000}


def pair(name, features):
    """Our flow, and zuko's with its parameters."""
    theirs = getattr(zuko.flows, name)(features, transforms=3, activation=nn.SiLU)
    ours = getattr(dgm, name)(features)
    ours.flow.transform.load_state_dict(theirs.transform.state_dict())
    return ours, theirs


def seconds(work):
    began = time.process_time()
    work()
    return time.process_time() - began


def both(ours, theirs, rounds):
    times = [(seconds(theirs), seconds(ours)) for _ in range(rounds + 1)][1:]
    before, after = (statistics.median(t) for t in zip(*times, strict=True))
    return {"before": before, "after": after, "times faster": before / after}


@torch.no_grad()
def draws():
    for name in ("MAF", "NSF"):
        for features, n in DRAWS.items():
            ours, theirs = pair(name, features)
            rounds = 3 if name == "NSF" and features > 8 else 7
            yield (
                f"{n} draws, {name}, D={features}",
                both(lambda: ours().sample((n,)), lambda: theirs().sample((n,)), rounds),
            )


def steps():
    """A draw with its density and the gradients of both: what a step of an ELBO with ``fast="density"`` asks."""
    for name in ("MAF", "NSF"):
        for features in (2, 8):
            ours, theirs = pair(name, features)

            def step(flow):
                x, log_q = flow.rsample_and_log_prob((64,))
                (log_q + x.square().sum(-1)).mean().backward()

            yield f"step of 64 draws, {name}, D={features}", both(lambda: step(ours()), lambda: step(theirs()), 21)


def fits():
    """Density and gradient of a batch: a step of maximum likelihood."""
    for features in (2, 8, 32):
        ours, theirs = pair("NSF", features)
        x = torch.randn(512, features)
        work = lambda flow: lambda: flow().log_prob(x).mean().backward()
        yield f"density and gradient of 512 rows, NSF, D={features}", both(work(ours), work(theirs), 21)


def ours(task, theta, x):
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(TASKS[task], observed=["data"])
    sims = dgm.Simulations({"theta": theta, "data": x}, ["data"])
    dgm.fit(dgm.ForwardKL(guide), sims, progress=False, seed=0, max_epochs=15)
    return lambda at: guide.condition(data=at).sample((10_000,))


def theirs(task, theta, x):
    from sbi.inference import NPE

    torch.manual_seed(0)
    prior = box(BOUND[task], theta.shape[1])
    method = NPE(prior=prior, density_estimator="nsf", show_progress_bars=False)
    posterior = method.build_posterior(method.append_simulations(theta, x).train(max_num_epochs=15))
    return lambda at: posterior.sample((10_000,), x=at[None], show_progress_bars=False)


def tasks():
    """Mean CPU seconds of 10,000 draws, in turns."""
    for task in BOUND:
        (theta, x), (_, seen) = simulations(task, 10_000, 100), simulations(task, 5, 900)
        ways = {"pyro_dgm": ours} | ({"sbi nsf": theirs} if importlib.util.find_spec("sbi") else {})
        draw = {name: way(task, theta, x) for name, way in ways.items()}
        cost = {name: [] for name in ways}
        for at in (*seen, *seen):
            for name in ways:
                cost[name].append(seconds(lambda name=name, at=at: draw[name](at)))
        print(f"{task:26s}", *(f"{name} {statistics.mean(c):.3f}" for name, c in cost.items()), flush=True)
        yield task, {name: statistics.mean(c) for name, c in cost.items()}


def main(arguments):
    torch.set_num_threads(1)
    if arguments.only == ["tasks"]:
        return dict(tasks())
    rows = {}
    for part in (draws, steps, fits):
        if arguments.only and part.__name__ not in arguments.only:
            continue
        for name, found in part():
            rows[name] = found
            print(
                f"{name:50s} before {found['before']:.4f}  after {found['after']:.4f}  {found['times faster']:.1f} times",
                flush=True,
            )
    return rows
