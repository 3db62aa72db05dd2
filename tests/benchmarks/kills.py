"""SIGKILL and Ctrl-C at random moments, in turns, and the same call again until it comes to its end.

Every number of the result (draws and faults of ``simulate(path=)``; parameters, losses and held-out losses of
``fit(checkpoint=)``) must be that of a call that was left alone, to the bits. ``--count`` kills for each kind (8 by default), three at
most between a beginning and an end; ``--only`` kinds of :data:`KINDS`. Files are saved at each check of a fit, where usual
fits save every few seconds; nothing else is changed.
"""

import hashlib
import multiprocessing
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
import warnings

import pyro
import pyro.distributions as dist
import torch

import pyro_dgm as dgm
from pyro_dgm.simulation import store
from pyro_dgm.train import batches, loop

SLEEP = 0.03  # seconds of a run that is vectorised
IN_A_ROW = 3


def lines(x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def slow_lines(x=None):
    time.sleep(SLEEP)
    lines(x)


def ragged(x=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    if float(mu) > 1.0:
        raise ArithmeticError("large")
    with pyro.plate("n", int(pyro.sample("size", dist.Geometric(0.2))) + 1):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def faulty(mu, rng):
    if mu > 1.7:
        os._exit(1)
    if mu < -2.6:
        time.sleep(1e6)
    return mu + rng.normal(size=3)


FAULTY = dgm.as_model(faulty, prior={"mu": dist.Normal(0.0, 1.0)}, observed="x")


def simulated(model, n, folder, **options):
    sims = dgm.simulate(model, n, observed=["x"], path=folder / "sims", seed=3, progress=False, **options)
    rest = [torch.tensor(sorted(map(ord, "".join(sims.reasons)))), sims.failed, *sims.failed_latents.values()]
    return [*sims.values(), *sims.mask.values(), *rest]


def fitted(folder, objective, data=(), **options):
    loop._SAVE_EVERY = 0.0
    history = dgm.fit(objective, data, checkpoint=folder / "fit", seed=4, progress=False, **options)
    if history.stopped == "interrupted":
        sys.exit()
    numbers = [history.loss, history.critic_loss, [v for _, v in history.validation], [history.best_step]]
    tensors = [v for v in objective.state_dict().values() if isinstance(v, torch.Tensor)]
    return [*tensors, *(torch.tensor(v, dtype=torch.float64) for v in numbers)]


def two_players(folder):
    data = dist.Normal(torch.tensor([2.0, 0.0]), 0.3).sample((2_000,))
    pair = dgm.Adversarial(dgm.Generator(2, 2), dgm.Critic(2), pretrain=50)
    return fitted(folder, pair, data, max_steps=200, batch_size=64)


def minibatches(folder):
    data = torch.randn(6_000, 2).cumsum(1)
    return fitted(folder, dgm.MaximumLikelihood(dgm.MAF(2)), data, max_epochs=30)


def from_disk(folder):
    store._IN_MEMORY, batches._RUN, batches._SHUFFLED = 0, 2**10, 2**14
    sims = dgm.simulate(lines, 5_000, observed=["x"], path=folder / "sims", seed=3, progress=False)
    return fitted(folder, dgm.ForwardKL(dgm.AmortizedGuide(lines, ["x"], ensemble=1)), sims, max_steps=250)


def online(folder):
    return fitted(folder, dgm.ForwardKL(dgm.AmortizedGuide(lines, ["x"]), batch_size=64), max_steps=200)


def autoflow(folder, **options):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        b = pyro.sample("b", dist.Normal(a.square() - 2.0, 0.5))
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(1.0))

    return fitted(folder, dgm.STL_ELBO()(model, dgm.AutoFlow(model)), **options)


KINDS = {
    "simulate: vectorised": lambda folder: simulated(slow_lines, 80_000, folder),
    "simulate: ragged, one by one": lambda folder: simulated(ragged, 2_500, folder),
    "simulate: with a time limit": lambda folder: simulated(FAULTY, 500, folder, timeout=1.0),
    "fit: two players": two_players,
    "fit: minibatches": minibatches,
    "fit: minibatches from the disk": from_disk,
    "fit: simulations drawn afresh": online,
    "fit: AutoFlow": lambda folder: autoflow(folder, max_steps=250),
    "fit: AutoFlow in rounds": autoflow,
}


def job(kind, folder):
    """In a process of its own: the digest of all numbers is written where the call comes to its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(5)
    numbers = KINDS[kind](folder)
    digest = hashlib.sha256()
    for x in numbers:
        digest.update(
            f"{tuple(x.shape)}".encode() + x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    (folder / "digest").write_text(digest.hexdigest())


def begun(kind, folder):
    process = multiprocessing.get_context("fork").Process(target=job, args=(kind, folder))
    process.start()
    return process


def whole(kind):
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        begun(kind, folder).join()
        return (folder / "digest").read_text(), time.perf_counter() - began


def killed(kind, kills, seconds, rng):
    """The digest after so many kills, how many met the call at work, and how many runs found a state to go on from."""
    met = resumed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for i in range(kills):
            process = begun(kind, folder)
            process.join(rng.uniform(0.0, 0.8 * seconds))
            met += process.is_alive()
            os.kill(process.pid, (signal.SIGKILL, signal.SIGINT)[i % 2]) if process.is_alive() else None
            process.join()
            resumed += (folder / "fit").exists() or (folder / "sims" / "manifest.json").exists()
        if not (folder / "digest").exists():
            begun(kind, folder).join()
        return (folder / "digest").read_text(), met, resumed


def main(arguments):
    rows = []
    for kind in arguments.only or KINDS:
        rng = random.Random(arguments.seeds[0])
        digest, seconds = whole(kind)
        row = {
            "kind": kind,
            "seconds": seconds,
            "again": whole(kind)[0] == digest,
            "kills": 0,
            "resumed": 0,
            "wrong": 0,
        }
        for _ in range(1_000):
            wanted = (arguments.count or 8) - row["kills"]
            if wanted <= 0:
                break
            found, met, resumed = killed(kind, min(IN_A_ROW, wanted), seconds, rng)
            row["kills"] += met
            row["resumed"] += resumed
            row["wrong"] += found != digest
        rows.append(row)
        print(row, flush=True)
    return rows
