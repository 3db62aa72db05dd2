"""A simulator of which 1 % of the runs raise, .1 % hang and .1 % end their process, and the same one without faults.

Run by itself, ``mpiexec -n 3 python -m mpi4py.futures tests/benchmarks/_machines.py FOLDER N LIMIT``, it simulates on MPI.
"""

import os
import sys
import time

import numpy as np
import pyro.distributions as dist

import pyro_dgm as dgm

RAISES, HANGS, EXITS = 0.01, 0.011, 0.012  # the ends of the ranges of theta, each from the one before
SEED = 0


def harmless(theta, rng):
    return theta + np.cumsum(rng.normal(size=10))


def faulty(theta, rng):
    if theta < RAISES:
        raise FloatingPointError("diverged")
    if theta < HANGS:
        time.sleep(1e6)
    if theta < EXITS:
        os._exit(1)
    return harmless(theta, rng)


PRIOR = {"theta": dist.Uniform(0.0, 1.0)}
FAULTY, HARMLESS = (dgm.as_model(f, prior=PRIOR, observed="x") for f in (faulty, harmless))


def drawn(model, n, **options):
    return dgm.simulate(model, n, observed=["x"], seed=SEED, progress=False, **options)


def on_mpi(folder, n, limit):
    from mpi4py.futures import MPIPoolExecutor

    from tests.benchmarks import _machines as there  # by its name, which the workers know too

    with MPIPoolExecutor() as executor:
        there.drawn(there.FAULTY, n, executor=executor, timeout=limit, batch_size=500, path=folder)


if __name__ == "__main__":
    on_mpi(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
