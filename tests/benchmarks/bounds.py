"""Gradients of STL_ELBO against Trace_ELBO, and of IWAE_ELBO against autograd of its value: 200,000 draws for each guide.

Fifty repetitions with equal seeds; ``z`` is the largest mean difference over parameters in its standard errors, ``noise`` the
ratio of the gradients' summed variances. 0.00 and 1.00: the plain gradient, digit by digit.
"""

import logging
import time
import warnings

from pyro.infer import Trace_ELBO

import pyro_dgm as dgm
from tests.objectives.bound_pairs import PAIRS, copied, errors_apart, gradients, plain_iwae, prepared

REPETITIONS, PARTICLES, DRAWS = 50, 4_000, 4
COPIES = PARTICLES // DRAWS


def noise(ours, theirs):
    """The ratio of the gradients' summed variances."""
    return (ours.var(0).sum() / theirs.var(0).sum().clamp_min(1e-12)).item() if theirs.var(0).sum() > 0.0 else 1.0


def row(name):
    program, guide, leaves = prepared(name)
    options = {"num_particles": PARTICLES, "vectorize_particles": True, "max_plate_nesting": 1}
    stl, trace = dgm.STL_ELBO(**options), Trace_ELBO(**options)
    plain = gradients(lambda: trace.differentiable_loss(program, guide), leaves, REPETITIONS)
    path = gradients(lambda: stl.differentiable_loss(program, guide), leaves, REPETITIONS)
    both = copied(program, COPIES), copied(guide, COPIES)
    dreg = dgm.IWAE_ELBO(DRAWS, max_plate_nesting=2)
    weighted = gradients(lambda: plain_iwae(program, guide, DRAWS, COPIES), leaves, REPETITIONS)
    doubly = gradients(lambda: dreg.differentiable_loss(*both) / COPIES, leaves, REPETITIONS)
    stl_row = {"z": errors_apart(path, plain), "noise": noise(path, plain)}
    return {"guide": name, **stl_row, "z, dreg": errors_apart(doubly, weighted), "noise, dreg": noise(doubly, weighted)}


def main(arguments):
    logging.getLogger("pyro").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = []
    print(f"{'guide':32s} {'z STL':>6s} {'noise':>6s} {'z DReG':>7s} {'noise':>6s} {'s':>5s}")
    for name in arguments.only or PAIRS:
        began = time.perf_counter()
        rows.append(r := row(name))
        seconds = time.perf_counter() - began
        print(
            f"{name:32s} {r['z']:6.2f} {r['noise']:6.2f} {r['z, dreg']:7.2f} {r['noise, dreg']:6.2f} {seconds:5.1f}",
            flush=True,
        )
    return rows
