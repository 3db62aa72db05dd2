"""Sums over enumerated sites under masks, scales and plates: every density against Pyro's bound and against plain torch."""

import contextlib
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal

import pyro_dgm as dgm
from pyro_dgm.model.log_joint import LogJoint
from pyro_dgm.model.sites import is_enumerable, latent_sites
from tests.enumerated_programs import PROGRAMS


def point(program):
    """A guide that is one point: each latent at its value, in the plates that the model has for it."""
    with poutine.block():
        trace = poutine.trace(program.model).get_trace()

    def guide():
        for name, value in program.values.items():
            site = trace.nodes[name]
            with contextlib.ExitStack() as plates:
                for f in site["cond_indep_stack"]:
                    plates.enter_context(pyro.plate(f.name, f.size, dim=f.dim))
                pyro.sample(name, dist.Delta(value, event_dim=site["fn"].event_dim))

    return guide


def exported(program, n=2):
    """The container of n draws, all at the point; ``.mask()`` of a summed site warns, which has its own test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dgm.from_svi(program.model, point(program), num_samples=n, prior=0, posterior_predictive=False, seed=0,
                            container="dict", check=False)  # fmt: skip


def pyros(program):
    """The value of ``TraceEnum_ELBO`` at the point, of the full data."""
    return -TraceEnum_ELBO(max_plate_nesting=program.nesting).loss(program.full or program.model, point(program))


def log_joint(program):
    """``LogJoint`` at the point; all latents are real, so no Jacobian enters."""
    with poutine.block():
        trace = poutine.trace(program.model).get_trace()
    summed = [k for k, s in latent_sites(trace) if is_enumerable(s)]
    guide = AutoDiagonalNormal(poutine.block(program.model, hide=summed))
    guide()
    u = torch.cat([program.values[k].reshape(-1) for k, _ in latent_sites(guide.prototype_trace)])
    return LogJoint(guide, program.model, (), {})(u.expand(2, -1))


each = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
whole = {k: p for k, p in PROGRAMS.items() if p.full is None}


@each
def test_lp_is_the_bound_of_pyro_and_the_sum_by_hand(program):
    """Planted fault: the mask applied to the enumerated site itself, which adds log 2 for each masked step."""
    lp = exported(program)["sample_stats"]["lp"]
    np.testing.assert_allclose(lp, pyros(program), atol=1e-4)
    np.testing.assert_allclose(lp, float(program.log_joint), atol=1e-4)
