"""Several threads of one process: calls take turns, and give what each gives alone. Nested calls go on."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_dgm as dgm

ROWS = 3.0 + torch.randn(60, 2, generator=torch.Generator().manual_seed(0))


def mean(x=None):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("n", len(ROWS)):
        pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)


def numbers(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def likelihood():
    """Makes the call: first weights are drawn where a module is built, before the threads begin."""
    torch.manual_seed(1)
    flow = dgm.MAF(2, transforms=1, hidden_features=(8,))
    return lambda: dgm.fit(dgm.MaximumLikelihood(flow), ROWS, max_steps=30, seed=0, progress=False) and numbers(flow)


def posterior():
    guide = dgm.AutoFlow(mean)
    return lambda: dgm.fit(dgm.STL_ELBO()(mean, guide), ROWS, max_steps=5, seed=0, progress=False) and numbers(guide)


def verdict():
    guide = pyro.infer.autoguide.AutoNormal(mean)
    guide(ROWS)
    return lambda: torch.tensor(dgm.from_svi(mean, guide, ROWS, num_samples=100, seed=0).posterior["mu"].values)


def game():
    torch.manual_seed(1)
    pair = dgm.Adversarial(dgm.Generator(2, 8), dgm.Critic(2, 8), pretrain=0)
    return lambda: dgm.fit(pair, ROWS, max_steps=20, seed=0, progress=False) and numbers(pair)


def simulations():
    return lambda: dgm.simulate(mean, 2_000, observed=["x"], seed=0, progress=False)["x"]


def together(*calls):
    """What each gives, in a thread of its own, and what was raised."""
    barrier = threading.Barrier(len(calls))
    with ThreadPoolExecutor(len(calls)) as threads:
        jobs = [threads.submit(lambda call=call: (barrier.wait(), call())[1]) for call in calls]
        return [job.result(timeout=120) for job in jobs]


PAIRS = [
    (likelihood, likelihood), (posterior, posterior), (simulations, simulations), (verdict, simulations),
    (likelihood, game), (game, game),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:fit. at step", "ignore:from_svi")
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(f.__name__ for f in pair))
def test_two_threads_give_what_each_gives_alone(pair):
    """Planted fault: nobody waits. Then sites come twice, messengers lie at the wrong place, or numbers are others."""
    alone = [make()() for make in pair]
    calls = [make() for make in pair]
    with pytest.warns(UserWarning, match="another thread of this process is at work.*this call waits for it"):
        found = together(*calls)
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    assert not pyro.poutine.runtime._PYRO_STACK


class Nested(torch.nn.Module):
    """An objective whose start is a fit of its own, and simulations."""

    def __init__(self, executor=None):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2))
        self.executor = executor

    def forward(self, x):
        return (x - self.w).square().mean()

    def warm_start(self, x):
        inner = Plain()
        dgm.fit(inner, x, max_steps=3, progress=False)
        dgm.simulate(mean, 40, observed=["x"], seed=0, progress=False, executor=self.executor)


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return (x - self.w).square().mean()


def simulates(x=None):
    """A model that simulates, one by one and many at once."""
    inner = dgm.simulate(mean, 5, observed=["x"], seed=0, progress=False)
    y = pyro.sample("y", dist.Normal(inner["mu"].mean(), 1.0))
    pyro.sample("x", dist.Normal(y, 1.0), obs=x)


@pytest.mark.filterwarnings("ignore:The model cannot run many draws")
def test_calls_within_calls_do_not_wait_for_themselves():
    """Also those that threads of an executor make for a caller that waits for them. Planted faults: a lock that is not
    re-entrant; threads that wait for the turn of their own caller."""

    def everything():
        assert dgm.fit(Nested(), ROWS, max_steps=3, progress=False).steps == 3
        with ThreadPoolExecutor(2) as threads:
            assert dgm.fit(Nested(threads), ROWS, max_steps=3, progress=False).steps == 3
            sims = dgm.simulate(simulates, 6, observed=["x"], seed=0, progress=False, executor=threads)
        assert torch.equal(sims["x"], dgm.simulate(simulates, 6, observed=["x"], seed=0, progress=False)["x"])

    worker = threading.Thread(target=everything, daemon=True)
    worker.start()
    worker.join(30.0)
    assert not worker.is_alive(), "it waits for itself"


def test_a_process_that_was_forked_meanwhile_does_not_wait():
    """Planted fault: the lock of a thread that the new process does not have."""
    forked = []

    class Forks(Plain):
        def warm_start(self, x):
            threading.Thread(target=fork).start()
            while not forked:
                pass

    def fork():
        pid = os.fork()
        if not pid:
            try:
                dgm.fit(Plain(), ROWS, max_steps=2, progress=False)
            finally:
                os._exit(0)
        forked.append(pid)

    dgm.fit(Forks(), ROWS, max_steps=2, progress=False)
    for _ in range(200):
        done, status = os.waitpid(forked[0], os.WNOHANG)
        if done:
            break
        threading.Event().wait(0.05)
    if not done:
        os.kill(forked[0], signal.SIGKILL)
    assert done and status == 0


def test_an_error_gives_the_turn_back():
    with pytest.raises(ValueError, match="no trainable parameters"):
        dgm.fit(torch.nn.Identity(), torch.zeros(()), progress=False)
    assert len(together(likelihood())) == 1
