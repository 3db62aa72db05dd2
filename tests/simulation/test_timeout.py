"""Simulations that hang, exit or crash: they are counted with their parameters, and the others are as if there were none."""

import ctypes
import functools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm

N, LIMIT = 160, 1.0
PROGRAM = ["sleep", f"61.{os.getpid():07}"]  # another one in each process of a parallel run of the tests
EDGES = {"hang": 0.02, "exit": 0.05, "leave": 0.08, "crash": 0.11, "raise": 0.14, "program": 0.155}
REASONS = {
    "hang": f"it took longer than timeout={LIMIT:g} s",
    "exit": "it ended its process (exit status 3)",
    "leave": "SystemExit: 4",
    "crash": "its process was ended by SIGSEGV",
    "raise": "ValueError: no",
    "program": f"it took longer than timeout={LIMIT:g} s",
}


def fault(theta):
    return next((name for name, edge in EDGES.items() if theta < edge), "")


def fail(kind):
    if kind == "hang":
        ctypes.PyDLL(None).sleep(600)  # compiled code that does not give Python its turn
    if kind == "exit":
        os._exit(3)
    if kind == "leave":
        sys.exit(4)
    if kind == "crash":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # pytest's own handler would print
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "raise":
        raise ValueError("no")
    if kind == "program":
        subprocess.run(PROGRAM, check=True)


def harmless(theta, rng):
    return theta + rng.normal(size=3)


def faulty(theta, rng):
    fail(fault(theta))
    return harmless(theta, rng)


PRIOR = {"theta": dist.Uniform(0.0, 1.0)}
FAULTY, HARMLESS = (dgm.as_model(f, prior=PRIOR, observed="x") for f in (faulty, harmless))


def band(t):
    return bool(((t > 0.5) & (t < 0.5 + 3e-3)).any())


def vectorised(x=None):
    t = pyro.sample("theta", dist.Uniform(0.0, 1.0))
    if band(t):
        os._exit(5)
    pyro.sample("x", dist.Normal(t, 1.0), obs=x)


def drawn(model=FAULTY, n=N, **options):
    return dgm.simulate(model, n, **({"observed": ["x"], "seed": 1, "progress": False} | options))


@functools.cache
def truth():
    return drawn(HARMLESS)


def check(sims):
    """The good ones are those of the harmless simulator, to the bits; the others are told, with their parameters."""
    theta = truth()["theta"]
    kinds = [fault(float(t)) for t in theta]
    good = torch.tensor([not kind for kind in kinds])
    assert set(EDGES) == set(kinds) - {""}, "the seed must meet every fault"
    assert torch.equal(sims["theta"], theta[good]) and torch.equal(sims["x"], truth()["x"][good])
    assert torch.equal(sims.failed, torch.nonzero(~good)[:, 0])
    assert torch.equal(sims.failed_latents["theta"], theta[~good])
    expected = [REASONS[kind] for kind in kinds if kind]
    assert sims.reasons == {reason: expected.count(reason) for reason in expected}


def no_orphans():
    found = subprocess.run(["pgrep", "-f", "^" + " ".join(PROGRAM)], capture_output=True, text=True).stdout
    assert not found, "a program outlives the child that began it"


pytestmark = pytest.mark.filterwarnings("ignore:simulate.*were left out", "ignore:.*fork.*:DeprecationWarning")


def test_they_are_left_out_and_a_repeat_does_not_meet_them(tmp_path):
    """Planted faults: parameters of lost runs are NaN; a child's programs are not ended; the child after a loss begins anew."""
    began = time.perf_counter()
    check(drawn(timeout=LIMIT, path=tmp_path / "a"))
    hanging = sum(fault(float(t)) in ("hang", "program") for t in truth()["theta"])
    assert time.perf_counter() - began < (hanging + 2) * LIMIT + 20
    no_orphans()
    began = time.perf_counter()
    check(drawn(timeout=LIMIT, path=tmp_path / "a"))
    assert time.perf_counter() - began < 10
    check(drawn(path=tmp_path / "a"))  # without a limit too: what is known to fail is not asked again


@pytest.mark.parametrize("batch_size", [None, 40])
def test_a_pool_of_processes_stays_whole(batch_size):
    """Planted fault: the limit is kept in the worker itself, whose end takes the pool along."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        check(drawn(timeout=LIMIT, executor=pool, batch_size=batch_size))
        assert pool.submit(os.getpid).result()
    no_orphans()


def test_a_vectorised_block_is_searched_draw_by_draw():
    """Blocks of 1,000 of which a draw ends the process: the same as where it raises. Planted: the whole block is left out."""

    def raises(x=None):
        t = pyro.sample("theta", dist.Uniform(0.0, 1.0))
        if band(t):
            raise ValueError
        pyro.sample("x", dist.Normal(t, 1.0), obs=x)

    sims, expected = drawn(vectorised, 2_000, seed=2, timeout=5.0), drawn(raises, 2_000, seed=2)
    assert 0 < len(expected.failed) < 20 and torch.equal(sims.failed, expected.failed)
    assert torch.equal(sims["x"], expected["x"]) and set(sims.reasons) == {"it ended its process (exit status 5)"}
    assert torch.equal(sims.failed_latents["theta"], expected.failed_latents["theta"])


def test_what_python_says_of_an_exit_needs_no_limit():
    """``sys.exit`` is an error like others. Planted: it ends the user's program without a word."""

    def leaves(theta, rng):
        if theta < 0.3:
            sys.exit("bad parameters")
        return harmless(theta, rng)

    sims = drawn(dgm.as_model(leaves, prior=PRIOR, observed="x"))
    assert set(sims.reasons) == {"SystemExit: bad parameters"} and float(sims["theta"].min()) > 0.3


def exits(theta, rng):
    if theta < 0.05:
        os._exit(3)
    return harmless(theta, rng)


def test_an_exit_without_a_limit_is_explained(tmp_path):
    model = dgm.as_model(exits, prior=PRIOR, observed="x")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        with pytest.raises(RuntimeError, match="a process of the executor ended .*timeout=.*With path= the same call"):
            drawn(model, executor=pool, path=tmp_path / "a", seed=2)
    whole = drawn(HARMLESS, seed=2)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        sims = drawn(model, executor=pool, path=tmp_path / "a", seed=2, timeout=5.0)
    assert torch.equal(sims["x"], whole["x"][whole["theta"] >= 0.05])


def test_a_model_that_never_comes_back_is_told():
    model = dgm.as_model(lambda theta: os._exit(1), prior=PRIOR, observed="x")
    with pytest.raises(ValueError, match=r"failed in each of 20 runs.*it ended its process \(exit status 1\)"):
        drawn(model, timeout=1.0)
    for bad in (0.0, -1.0, float("nan"), "5"):
        with pytest.raises((ValueError, TypeError), match="timeout"):
            drawn(timeout=bad)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_child_ends_when_nobody_waits_for_it(hangs, tmp_path):
    """SIGKILL of the process that waits. Planted: the child keeps the end of the pipe from which the other read."""
    note = tmp_path / "pids"

    def noted(theta):
        with note.open("a") as file:
            file.write(f"{os.getpid()} ")
        if hangs and len(pids()) == 20:
            time.sleep(600.0)
        return torch.full((2_000,), theta).numpy()

    def pids():
        return note.read_text().split() if note.exists() else []

    model = dgm.as_model(noted, prior=PRIOR, observed="x")
    job = functools.partial(drawn, model, 100_000, timeout=1.0 if hangs else 60.0, path=tmp_path / "a")
    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    while len(pids()) < 20:
        time.sleep(0.01)
    process.kill()
    process.join()
    child, deadline = pathlib.Path(f"/proc/{pids()[-1]}"), time.perf_counter() + 20.0
    while child.exists() and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert not child.exists() and int(child.name) != process.pid


def test_a_child_brings_the_proposals_draws_and_errors():
    """Simulations inside a region are the same in children; an error that is no simulation's goes through."""

    class Near:
        def sample(self, shape):
            return {"theta": dist.Normal(0.5, 0.1).sample(shape)}

        def log_prob(self, values):
            return dist.Normal(0.5, 0.1).log_prob(values["theta"])

    limited, free = (drawn(HARMLESS, 30, proposal=Near(), timeout=limit) for limit in (5.0, None))
    assert torch.equal(limited["x"], free["x"]) and limited.acceptance == free.acceptance
    with pytest.raises(ValueError, match="draws"):
        list(dgm.simulation.guard.in_child(lambda: (_ for _ in ()).throw(ValueError("no draws")), 1.0))
