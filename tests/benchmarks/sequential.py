"""Draws of autoregressive flows before and after: zuko's inverse against ours, and zuko's spline against ours; CPU seconds.

The same parameters on both sides, three transforms of two hidden layers of 64, in turns on one thread; medians.
"""

import statistics
import time

import torch
from torch import nn

import pyro_dgm as dgm
from pyro_dgm.core import zuko

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


def main(arguments):
    torch.set_num_threads(1)
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
