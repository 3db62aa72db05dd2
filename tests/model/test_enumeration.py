"""Sums over enumerated sites under masks, scales and plates: every density against Pyro's bound and against plain torch."""

import contextlib
import warnings
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal

import pyro_dgm as dgm
from pyro_dgm.amortized.refine import Joint
from pyro_dgm.diagnostics.containers import group, has_group
from pyro_dgm.model.log_joint import LogJoint
from pyro_dgm.model.program import Program
from pyro_dgm.model.sites import is_enumerable, latent_sites
from tests.model.enumerated_programs import PROGRAMS, X, Y, by_state, draw_loc, state


class Point(dist.Normal):
    """All draws are ``loc``, and the density is one."""

    def rsample(self, sample_shape=()):
        return self.loc.expand(*sample_shape, *self.batch_shape)

    def log_prob(self, value):
        return torch.zeros(torch.broadcast_shapes(self.batch_shape, value.shape))


def point(program):
    """A guide that is one point: each latent at its value, in the plates that the model has for it."""
    with poutine.block():
        trace = poutine.trace(program.model).get_trace()
    sites = {k: trace.nodes[k] for k in program.values}

    def guide():
        for stack in dict.fromkeys(s["cond_indep_stack"] for s in sites.values()):
            with contextlib.ExitStack() as plates:
                for f in stack:
                    plates.enter_context(pyro.plate(f.name, f.size, dim=f.dim))
                for name in [k for k, s in sites.items() if s["cond_indep_stack"] == stack]:
                    pyro.sample(name, Point(program.values[name], 1.0).to_event(sites[name]["fn"].event_dim))

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
    lp = group(exported(program), "sample_stats")["lp"]
    np.testing.assert_allclose(lp, pyros(program), atol=1e-4)
    np.testing.assert_allclose(lp, float(program.log_joint), atol=1e-4)


@pytest.mark.parametrize("program", whole.values(), ids=whole)
def test_log_joint_and_bounds_are_the_bound_of_pyro(program):
    """All at one point, where every bound is log p - 0."""
    wanted, options = pyros(program), {"max_plate_nesting": program.nesting}
    np.testing.assert_allclose(log_joint(program), wanted, atol=1e-4)
    bounds = [dgm.STL_ELBO(1, **options), dgm.STL_ELBO(3, **options)]
    bounds += [dgm.IWAE_ELBO(k, **options) for k in (1, 3)] if program.iwae else []
    for bound in bounds:
        np.testing.assert_allclose(-bound.loss(program.model, point(program)), wanted, atol=1e-4)


@each
def test_pointwise_terms_are_the_rows_given_the_latents(program):
    """log p(y_n | h_n) by row, summed by hand; what is masked has none, and neither have sums over all rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Program(program.model, point(program), (), {})
        table = made.scored({k: v[None] for k, v in program.values.items()}, 1)
    np.testing.assert_allclose(sum(t.joint.sum() for t in table.terms.values()), pyros(program), atol=1e-4)
    made = exported(program)
    given = group(made, "log_likelihood") if has_group(made, "log_likelihood") else {}
    assert set(given) == {program.datum, *program.others} - {None}
    if program.datum is not None:
        rows = program.sums.likelihood if program.seen is None else program.sums.likelihood[program.seen]
        np.testing.assert_allclose(given[program.datum][0, 0], program.scale * rows, atol=1e-4)


def test_a_loop_of_rows_has_a_likelihood_for_each_turn():
    """x0 and x2 are seen, each with its own sum; x1 is masked by a number."""
    program = PROGRAMS["loop"]
    given = group(exported(program), "log_likelihood")
    for i in (0, 2):
        np.testing.assert_allclose(given[f"x{i}"], float(program.sums.likelihood[i]), atol=1e-4)


DRAWN = [k for k in PROGRAMS if k != "loop"]


@pytest.mark.parametrize("program", [PROGRAMS[k] for k in DRAWN], ids=DRAWN)
def test_draws_of_summed_sites_follow_their_exact_posterior(program):
    """Each site's frequency of ones, within five of its own errors, and that of neighbours being alike.

    Planted fault: ``infer_discrete``, which draws masked steps uniformly.
    """
    n = 2_000
    drawn = group(exported(program, n), "posterior")
    columns = [_column(drawn, name) for name in program.names]
    z = torch.stack(columns, -1)  # (n, rows, m)
    weights, states = program.sums.weights.expand(z.shape[1], -1), program.sums.z.float()
    alike = lambda v: (v[..., 1:] == v[..., :-1]).float()
    for got, wanted in ((z, states), (alike(z), alike(states))):
        p = weights @ wanted
        error = (p * (1 - p) / n).sqrt() + 1e-6
        assert ((got.mean(0) - p).abs() < 5 * error).all()


def _column(drawn, name):
    """Draws of one summed variable, ``(n, rows)``; ``j.2`` is the third item of j."""
    site, _, item = name.partition(".")
    values = torch.as_tensor(drawn[site][0]).float()
    values = values[..., int(item)] if item else values
    return values.reshape(len(values), -1)


@pytest.mark.parametrize("name", ["chain, both masked, history 2", "chain in a subsampled plate", "row, masked latent"])
def test_draws_run_one_by_one_have_the_same_densities(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Program(PROGRAMS[name].model, point(PROGRAMS[name]), (), {}, parallel=False)
    values = {k: v.expand(2, *v.shape) for k, v in PROGRAMS[name].values.items()}
    np.testing.assert_allclose(made.scored(values, 2).total(2), float(PROGRAMS[name].log_joint), atol=1e-4)


def test_an_amortised_posterior_has_the_same_joint():
    """Ragged chains whose states are summed out, the data given by name: the density that ``refine`` weights with."""
    program = PROGRAMS["chain, both masked, history 1"]
    guide = dgm.AmortizedGuide(program.model, [f"y{t}" for t in range(3)])
    joint = Joint(guide.condition(**{f"y{t}": Y[:, t] for t in range(3)}))
    u = joint.pack({k: v[None] for k, v in program.values.items()})
    np.testing.assert_allclose(joint.log_p(u), pyros(program), atol=1e-4)


def test_a_summed_site_masked_by_its_distribution_is_warned_of():
    """Pyro then sums ones; its bound is reproduced, and what to write instead is said."""
    program = PROGRAMS["chain, states masked by .mask()"]
    with pytest.warns(
        UserWarning, match=r"Site 'z1' is summed out and its distribution is masked by .mask\(\): .*log K"
    ):
        Program(program.model, point(program), (), {})


def test_scales_inside_of_a_sum_are_refused_as_by_pyro():
    """A scale around the state alone has no place outside of the sum."""

    def model():
        loc = draw_loc()
        with pyro.plate("row", 3):
            with poutine.scale(scale=2.0):
                k = state()
            pyro.sample("x", dist.Normal(by_state(loc, k), 1.0), obs=X)

    unequal = replace(PROGRAMS["row"], model=model)
    for run in (exported, pyros, log_joint):
        with pytest.raises(ValueError, match="Expected all enumerated sample sites to share a common poutine.scale"):
            run(unequal)
