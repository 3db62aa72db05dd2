"""Elements of two latents: intercepts and slopes beside exact numbers, counted evaluations, and small matrices."""

import math

import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.guides import plate_start
from pyro_dgm.guides.plates import Rule, _Permuted
from pyro_dgm.model.elements import Factors, between, precision_of, rooted, solved, times
from pyro_dgm.model.log_joint import LogJoint
from tests.benchmarks import _slopes
from tests.guides.test_plates import started


def slopes(kind="normal", groups=100):
    data = _slopes.drawn(kind, groups, 1)
    return data, _slopes.model(kind, groups)


def test_intercepts_and_slopes_are_right_before_the_first_step():
    """Exact numbers by hand. Planted: the gradient of entries in another order left as it is; no plate is then followed."""
    data, model = slopes()
    guide = started(model, *data)
    exact = _slopes.Exact(*data)
    g, weight, evidence = exact.drawn(guide.plated.outer.loc)
    verdict = dgm.khat(dgm.from_svi(model, guide, *data, seed=0, prior=0, num_samples=500, log_likelihood=False))
    assert verdict.status == "good" and abs(verdict.log_evidence - evidence) < 4 * verdict.log_evidence_error + 0.01
    mean = weight @ g
    sd = (weight @ (g - mean).square()).sqrt()
    outer = guide.plated.outer().sample((4000,)).double()
    assert bool(((outer.mean(0) - mean).abs() < 0.1 * sd).all())
    assert bool(((outer.std(0) / sd).log().abs() < 0.1).all())


def test_a_normal_element_of_two_latents_takes_nine_points(monkeypatch):
    """Counted, not timed. Planted: the finer of two quadratures that agree, which is 16 points; and before, 25 at every draw."""
    data, model = slopes()
    seen = []
    call = Factors.__call__
    monkeypatch.setattr(Factors, "__call__", lambda self, u: seen.append(len(u)) or call(self, u))
    guide = started(model, *data)
    assert guide.plated.rule.order == 3
    steps = (plate_start._GLOBALS + plate_start._AGAIN) * plate_start.draws_for(guide.plated.size) * 9
    compared = 2 * plate_start.compared(guide.plated) * (9 + 16)
    near = 256 * 9
    assert sum(seen) < 1.1 * (steps + compared + near)


def test_a_coarse_quadrature_has_the_line_of_a_finer_one():
    """Yes-or-no data. Planted: the line left out, which puts the integral .05 nats off; its sign turned, which doubles that."""
    data, model = slopes("bernoulli", 400)
    guide = started(model, *data)
    own = guide.plated
    factors = guide.factors_of(LogJoint(guide, model, data, {}))
    g = own.outer().sample((40,))
    rule = plate_start.rule_for(own, factors, g)
    fresh = own.outer().sample((24,))
    with torch.no_grad():
        right, coarse, plain = (own.marginal(factors, fresh, r) for r in (Rule(11), rule, Rule(3)))
    assert rule.order < 11 and not rule.unsure
    assert float((coarse - right).abs().max()) < 0.03 < float((plain - right).abs().max())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_small_matrices_are_those_of_the_library(size):
    """Planted: a factor's entry without the product of those before it."""
    torch.manual_seed(size)
    root, vector = torch.randn(5, 7, size, size).double().triu(), torch.randn(5, 7, size).double()
    precision, upper = precision_of(root), times(root, vector)
    tril = torch.linalg.cholesky(precision)
    assert torch.allclose(precision, torch.eye(size) + root.mT @ root)
    assert torch.allclose(upper, (root @ vector[..., None])[..., 0]) and torch.allclose(rooted(precision), tril)
    for triangle, is_upper in ((tril, False), (tril.mT, True)):
        assert torch.allclose(times(triangle, solved(triangle, vector, upper=is_upper)), vector)


@pytest.mark.parametrize("size", [2, 3])
def test_eigenvalues_are_brought_between_two_numbers(size):
    """Planted: the mean eigenvalue moved and their distance left."""
    torch.manual_seed(0)
    matrix = torch.randn(50, size, size).double()
    matrix = matrix + matrix.mT
    values, vectors = torch.linalg.eigh(matrix)
    assert torch.allclose(between(matrix, 0.1, 1.5), (vectors * values.clamp(0.1, 1.5)[:, None]) @ vectors.mT)
    assert torch.allclose(between(3.0 * torch.eye(size)[None], 0.1, 2.0), 2.0 * torch.eye(size))
    assert between(torch.full((1, size, size), math.nan), 0.1, 2.0).isnan().all()


def test_counts_of_two_latents_do_not_throw_the_start_away():
    """Planted: no bounds on how much an element's information changes in a step; no plate is then followed."""
    data, model = slopes("poisson", 200)
    guide = started(model, *data)
    assert guide.follows_plates
    truth = torch.tensor([1.0, math.log(0.7), -0.5, math.log(0.4)])
    assert bool(((guide.plated.outer.loc - truth).abs() < 0.3).all())


def test_draws_and_gradients_keep_their_places_where_globals_come_last():
    """Planted: the gradient of a permutation gathered by the same permutation."""
    order = torch.randperm(9)
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: _Permuted.apply(v, order.argsort(), order), (x,))
    assert torch.equal(_Permuted.apply(x, order.argsort(), order), x[:, order.argsort()])


def test_a_state_has_the_rule_by_which_its_guide_was_fitted():
    """So a fit that resumes, or another process, integrates as before. Planted fault: five points each way after loading."""
    data, model = slopes("bernoulli", 100)
    guide = started(model, *data)
    again = dgm.AutoFlow(model).setup(*data)
    assert again.plated.rule == Rule(5) and guide.plated.rule.more is not None
    again.load_state_dict(guide.state_dict())
    assert again.plated.rule.order == guide.plated.rule.order
    assert torch.equal(again.plated.rule.more, guide.plated.rule.more)
    before = {k: v for k, v in guide.state_dict().items() if "rule" not in k}
    dgm.AutoFlow(model).setup(*data).load_state_dict(before)
