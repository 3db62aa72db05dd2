"""Two ranks of DistributedDataParallel over an ELBO module; run as ``python -m tests.train.ddp likelihood|prior|guide|implicit``."""

import os
import sys
import tempfile

import pyro
import pyro.infer as infer
import torch
import torch.distributed as ddp
from torch.nn.parallel import DistributedDataParallel

import pyro_dgm as dgm
from tests.compat_cells import DATA, FlowPrior, conjugate
from tests.families import make


class Observed(pyro.nn.PyroModule):
    """A flow as likelihood, nothing latent: the loss has no noise."""

    def __init__(self):
        super().__init__()
        self.flow = make("RealNVP", 2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.flow(), obs=x)


class Empty(pyro.nn.PyroModule):
    def forward(self, x):
        return {}


def program(column):
    if column == "likelihood":
        return Observed(), Empty()
    if column == "implicit":
        from tests.compat_implicit import Implicit

        model = Implicit()
        return model, dgm.AutoFlow(model).setup(DATA)
    model = FlowPrior() if column == "prior" else conjugate
    return model, dgm.AutoFlow(model).setup(DATA)


def worker(rank, column, rendezvous):
    ddp.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    pyro.settings.set(module_local_params=True)
    torch.manual_seed(0)
    elbo = infer.Trace_ELBO()(*program(column))
    parallel = DistributedDataParallel(elbo)
    torch.manual_seed(rank)
    mine = DATA[3 * rank : 3 * rank + 3] if column == "likelihood" else DATA  # latents: both see all, with other noise
    parallel(mine).backward()
    if column == "likelihood":
        whole = make("RealNVP", 2)
        (-whole().log_prob(DATA).sum() / 2).backward()
        for p, q in zip(elbo.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4)
    optimizer = torch.optim.Adam(elbo.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        parallel(mine).backward()
        optimizer.step()
    flat = torch.cat([p.detach().ravel() for p in elbo.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    ddp.all_gather(both, flat)
    assert torch.equal(*both)
    if rank == 0:
        print("ranks agree", flush=True)
    ddp.barrier()
    ddp.destroy_process_group()
    os._exit(0)  # on a busy machine a thread of gloo can abort an exit that cleans up


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (sys.argv[1], f"{folder}/meet"), nprocs=2)
