"""Two ranks of one fit, each run as ``python -m tests.train.ranks WHAT [FOLDER]``.

WHAT is "compare" (all kinds of fits, by two ranks and by one), "gradients", "lost" (a rank), "raises" (an error in one), or
"resume" and "interrupt" (a fit with a checkpoint in the folder, which ends in the middle when there is none yet).
"""

import os
import signal
import sys
import tempfile

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as together

import pyro_dgm as dgm
from pyro_dgm.train import loop
from pyro_dgm.train.descend import adam, take_step
from pyro_dgm.train.ranks import Ranks
from pyro_dgm.vae import Conditional

N = 512


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 2, generator=generator)
    return torch.stack([3.0 * x[:, 0] + 50.0, x[:, 0] ** 2 + 0.3 * x[:, 1]], 1)


def likelihood():
    return dgm.MaximumLikelihood(dgm.RealNVP(2, hidden_features=(16,))), rows(), {"batch_size": 128, "max_steps": 200}


def ffjord():
    return dgm.MaximumLikelihood(dgm.FFJORD(2, hidden_features=16)), rows(), {"batch_size": 128, "max_steps": 20}


def guide():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 100.0).to_event(1))
        sd = pyro.sample("sd", dist.HalfNormal(torch.full((2,), 10.0)).to_event(1))
        with pyro.plate("row", N, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mu, sd).to_event(1), obs=x)

    return dgm.STL_ELBO()(model, dgm.AutoFlow(model)), rows(), {"batch_size": 128, "max_steps": 200}


def whole():
    """All data in each step: nothing is divided, since the posterior is that of all rows."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 100.0).to_event(1))
        with pyro.plate("row", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

    return dgm.STL_ELBO()(model, dgm.AutoFlow(model)), rows(), {"max_steps": 50}


def forward_kl():
    def model(x=None):
        mu = pyro.sample("mu", dist.Normal(20.0, 5.0))
        pyro.sample("x", dist.Normal(mu[..., None].expand(*mu.shape, 4), 1.0).to_event(1), obs=x)

    sims = dgm.simulate(model, 1_000, observed=["x"], seed=0, progress=False)
    return dgm.ForwardKL(dgm.AmortizedGuide(model, observed=["x"])), sims, {"batch_size": 100, "max_steps": 100}


def vae():
    likelihood = Conditional(2, 1, dgm.vae.normal, shared=("log_scale",))
    vae = dgm.VAE(dgm.vae.StandardNormal(1), likelihood, Conditional(1, 2, dgm.vae.normal), size=N)
    return dgm.STL_ELBO(1)(vae.model, vae.guide), (rows() - 50.0) / 5.0, {"batch_size": 128, "max_steps": 100}


def gan():
    return (
        dgm.Adversarial(dgm.Generator(2, 8), dgm.Critic(2, 8), pretrain=50),
        rows(),
        {"batch_size": 128, "max_steps": 100},
    )


FITS = {each.__name__: each for each in (likelihood, ffjord, guide, whole, forward_kl, vae, gan)}


def values(objective):
    return torch.cat([t.detach().double().ravel() for t in [*objective.parameters(), *objective.buffers()]])


def gradients(rank):
    """Of a batch that is divided, against those of the whole batch."""
    for make in (likelihood, forward_kl):
        torch.manual_seed(0)
        objective, data, _ = make()
        objective.eval()
        dgm.fit(objective, data, max_steps=1, batch_size=64, progress=False, seed=0, strategy="alone")
        batch = (data[:63],) if isinstance(data, torch.Tensor) else ({k: data[k][:63] for k in data},)
        parameters = [p for p in objective.parameters() if p.requires_grad]
        objective(*batch).backward()
        whole = [None if p.grad is None else p.grad.clone() for p in parameters]
        some, weight = Ranks(rank, 2).share(batch)
        assert take_step(adam(parameters, 1e-9), weight * objective(*some), owned=parameters, ranks=Ranks(rank, 2))
        for p, expected in zip(parameters, whole, strict=True):
            if expected is not None:
                torch.testing.assert_close(p.grad, expected, atol=1e-6 * float(expected.abs().max()) + 1e-9, rtol=1e-5)
    print("gradients agree", flush=True)


def alone(kind):
    torch.manual_seed(0)
    objective, data, limits = FITS[kind]()
    return dgm.fit(objective, data, progress=False, seed=0, strategy="alone", **limits), values(objective)


def told(what, history, own):
    end = torch.tensor(history.loss[-20:]).mean()
    print(f"{what}: {len(history.loss)} steps, end {end:.6f}, sum {float(own.sum()):.12f}", flush=True)


def ends_after(objective, calls):
    """End this process without a word in a forward pass."""
    forward, counted = objective.forward, iter(range(calls))
    objective.forward = lambda *a: forward(*a) if next(counted, None) is not None else os._exit(0)


def interrupted_after(objective, calls):
    """Send this process Ctrl-C in a forward pass."""
    forward, counted = objective.forward, iter(range(1, 10**9))
    objective.forward = lambda *a: (next(counted) == calls and signal.raise_signal(signal.SIGINT)) or forward(*a)


def train(kind, rank, stop=None, **options):
    torch.manual_seed(rank)  # other first weights: those of the first rank count
    objective, data, limits = FITS[kind]()
    if stop and not os.path.exists(options["checkpoint"]):
        stop(objective)
    history = dgm.fit(objective, data, progress=False, seed=0, strategy="ddp", **limits, **options)
    own = values(objective)
    both = [torch.empty_like(own) for _ in range(2)]
    together.all_gather(both, own)
    assert torch.equal(*both), "ranks have other parameters"
    return history, own


def compare(rank):
    for kind in FITS:
        both = train(kind, rank)
        if rank == 0:
            told(f"{kind}, two", *both)
            told(f"{kind}, one", *alone(kind))


def resume(rank, folder):
    loop._SAVE_EVERY = 0.0
    file = f"{folder}/fit.pt"
    try:
        # 800 of these calls are in a stage before the first step
        found = train("likelihood", rank, lambda objective: ends_after(objective, 900), checkpoint=file)
    except RuntimeError:  # the other rank ended first
        os._exit(0)
    if rank == 0:
        told("resumed", *found)


def interrupt(rank, folder):
    """The second rank alone is sent Ctrl-C, in the middle of an epoch of four batches."""
    stop = (lambda objective: interrupted_after(objective, 51)) if rank else (lambda objective: None)
    found = train("vae", rank, stop, checkpoint=f"{folder}/fit.pt")
    if rank == 0:
        told("resumed", *found)


def lost(rank):
    """The second rank ends in the middle."""
    objective, data, limits = likelihood()
    if rank == 1:
        ends_after(objective, 30)
    try:
        dgm.fit(objective, data, progress=False, seed=0, **limits)
    except RuntimeError as error:
        print(error, flush=True)


def raises(rank):
    """The second rank has an error of its own."""
    objective, data, limits = likelihood()
    if rank == 1:
        forward, counted = objective.forward, iter(range(30))
        objective.forward = lambda *a: forward(*a) if next(counted, None) is not None else forward("no tensor")
    try:
        dgm.fit(objective, data, progress=False, seed=0, **limits)
    except (RuntimeError, TypeError) as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)


def worker(rank, what, folder, rendezvous):
    torch.set_num_threads(1)
    together.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    if folder:
        {"resume": resume, "interrupt": interrupt}[what](rank, folder)
    else:
        {"gradients": gradients, "lost": lost, "raises": raises, "compare": compare}[what](rank)
    if what not in ("lost", "raises"):
        together.barrier()
    os._exit(0)  # on a busy machine a thread of gloo can abort an exit that cleans up


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as meet:
        given = (sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None, f"{meet}/meet")
        torch.multiprocessing.spawn(worker, given, nprocs=2)
