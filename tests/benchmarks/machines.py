"""Simulations on many processes and machines, some of which raise, hang or end their process; and more of them than memory holds.

``--only serial pool dask mpi`` are ways to make ``--sizes`` simulations (:mod:`tests.benchmarks._machines`): the good ones must be
those of the simulator without faults, to the bits, and the others be listed with their parameters. Dask (two workers of a local
cluster) and MPI (a master and two ranks) run where they are installed. ``--only memory`` simulates a million times 502 numbers
(1.9 GiB) to the disk, in a process of its own, and trains on them; its peak memory is that of the process, torch included.
"""

import importlib.util
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor

import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm
from tests.benchmarks._machines import EXITS, FAULTY, HANGS, HARMLESS, RAISES, drawn

LIMIT = 2.0  # seconds, of runs that take a thousandth of it: with .5 s and twelve processes on two cores, 3 of 20,000 were late
TASK = 500
SITE, STEPS = 500, 2_000
GIB = 2**30


def serial(n, folder):
    return drawn(FAULTY, n, timeout=LIMIT)


def pool(n, folder):
    with ProcessPoolExecutor(2) as executor:
        return drawn(FAULTY, n, executor=executor, timeout=LIMIT, batch_size=TASK)


def dask(n, folder):
    from distributed import Client, LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        return drawn(FAULTY, n, executor=client.get_executor(), timeout=LIMIT, batch_size=TASK)


def mpi(n, folder):
    script = pathlib.Path(__file__).with_name("_machines.py")
    command = ["mpiexec", "-n", "3", sys.executable, "-m", "mpi4py.futures", str(script), folder, str(n), str(LIMIT)]
    subprocess.run(command, check=True)
    return drawn(FAULTY, n, path=folder)  # what MPI made


WAYS = {"serial": serial, "pool": pool, "dask": dask, "mpi": mpi}
NEEDS = {"dask": ["distributed"], "mpi": ["mpi4py"]}


def missing(way):
    lacks = [k for k in NEEDS.get(way, []) if importlib.util.find_spec(k) is None]
    return lacks or ([] if way != "mpi" or shutil.which("mpiexec") else ["mpiexec"])


def made(way, n, truth):
    """How a way did: the good ones and the faults against the truth, and seconds."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sims = WAYS[way](n, folder)
    seconds = time.perf_counter() - began
    theta = truth["theta"]
    good = theta >= EXITS
    expected = {
        "FloatingPointError: diverged": int((theta < RAISES).sum()),
        f"it took longer than timeout={LIMIT:g} s": int(((theta >= RAISES) & (theta < HANGS)).sum()),
        "it ended its process (exit status 1)": int(((theta >= HANGS) & (theta < EXITS)).sum()),
    }
    equal = torch.equal(sims["theta"], theta[good]) and torch.equal(sims["x"], truth["x"][good])
    listed = torch.equal(sims.failed_latents["theta"], theta[~good]) and sims.reasons == expected
    return {"way": way, "simulations": n, "equal": equal, "listed": listed, "seconds": seconds, "reasons": sims.reasons}


def line(x=None):
    """Two latents and 500 data of a line."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    mean = mu[..., :1] + mu[..., 1:] * torch.linspace(0.0, 1.0, SITE)
    return pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def trained_on_disk(folder, n):
    """A process of its own: prints seconds and peak GiB of both parts, and how far the posterior is from the exact one."""
    row = {"imported GiB": peak()}
    began = time.perf_counter()
    sims = dgm.simulate(line, n, observed=["x"], seed=0, progress=False, path=folder)
    row |= {"simulated s": time.perf_counter() - began, "simulated GiB": peak()}
    torch.manual_seed(0)
    guide = dgm.AmortizedGuide(line, observed=["x"])
    began = time.perf_counter()
    history = dgm.fit(dgm.ForwardKL(guide), sims, max_steps=STEPS, progress=False, seed=0)
    row |= {"trained s": time.perf_counter() - began, "peak GiB": peak(), "steps": history.steps}
    design = torch.stack([torch.ones(SITE), torch.linspace(0.0, 1.0, SITE)], 1)
    covariance = torch.linalg.inv(torch.eye(2) + design.T @ design)
    x = sims[:20]["x"]
    means = torch.stack([guide.condition(x=v).sample((4_000,))["mu"].mean(0) for v in x])
    off = (means - x @ design @ covariance).abs() / covariance.diagonal().sqrt()
    print(json.dumps(row | {"mean off, sd": float(off.mean())}))


def memory(n):
    with tempfile.TemporaryDirectory() as folder:
        code = f"from tests.benchmarks import machines; machines.trained_on_disk({folder!r}, {n})"
        told = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
        size = sum(p.stat().st_size for p in pathlib.Path(folder).iterdir()) / GIB
    return {"way": "memory", "simulations": n, "on disk GiB": size} | json.loads(told.stdout.splitlines()[-1])


def main(arguments):
    wanted, n, rows = arguments.only or [*WAYS, "memory"], arguments.sizes[0], []
    warnings.simplefilter("ignore")
    truth = drawn(HARMLESS, n) if set(wanted) & set(WAYS) else None
    for way in wanted:
        if missing(way):
            print(f"{way}: left out, there is no {', '.join(missing(way))}")
            continue
        rows.append(memory(100 * n) if way == "memory" else made(way, n, truth))
        print(rows[-1], flush=True)
    return rows
