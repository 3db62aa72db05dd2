"""Units of columns: exact densities and draws, which columns get them, and when a fit takes straight units of tails."""

import pytest
import torch
from torch.distributions import MultivariateNormal

import pyro_dgm as dgm
from pyro_dgm.flows.many_rows import ColumnUnits, column_splines, seems_normal


def stairs(z):
    """A column that is nearly discrete, and the log of its slope."""
    step = 4.0 * torch.pi
    return z + 0.97 * (step * z).sin() / step, (1.0 + 0.97 * (step * z).cos()).log()


def copula(n, seed=0):
    """A staircase, a skewed and a normal column of correlated normals, and their log densities."""
    torch.manual_seed(seed)
    spread = torch.tensor([[1.0, 0.7, 0.3], [0.7, 1.0, 0.5], [0.3, 0.5, 1.0]])
    law = MultivariateNormal(torch.zeros(3), spread)
    z = law.sample((n,))
    first, log_slope = stairs(z[:, 0])
    x = torch.stack([first, (0.7 * z[:, 1]).exp(), z[:, 2]], 1)
    return x, law.log_prob(z) - log_slope - (0.7 * x[:, 1]).log()


def in_columns(v):
    return ColumnUnits().double().take(column_splines(v).all)


def test_draws_invert_scores_and_the_log_determinant_is_the_jacobians():
    """Beyond the rows too. Planted fault: a piece of the neighbouring column."""
    v = copula(5_000)[0].double()
    v = (v - v.mean(0)) / v.std(0)
    transform = in_columns(v).transform()
    x = torch.cat([v[:100], 3.0 * v[:100]])
    u = transform.inv(x)
    assert torch.allclose(transform(u), x, atol=1e-8)
    jacobian = torch.stack([torch.autograd.functional.jacobian(transform.inv, row) for row in x])
    log_det = jacobian.diagonal(dim1=1, dim2=2).log().sum(-1)
    assert torch.allclose(-log_det, transform.log_abs_det_jacobian(u, x), atol=1e-8)
    assert torch.allclose(jacobian, torch.diag_embed(jacobian.diagonal(dim1=1, dim2=2)))


def test_slopes_go_on_beyond_the_rows():
    """Planted fault: the slope of a piece's other end."""
    units = in_columns((copula(5_000)[0] - 1.0).double())
    for end in (units.knots[:, 0], units.knots.gather(1, units.last.long()[:, None])[:, 0]):
        _, slopes = units.transform().images_of(end + torch.tensor([[-1e-9], [1e-9]], dtype=torch.float64))
        assert torch.allclose(slopes[0], slopes[1], rtol=1e-3)


def test_columns_are_normal_in_their_units():
    """Planted fault: slopes of one neighbour alone bend the density between the knots."""
    v = copula(20_000)[0]
    v = ((v - v.mean(0)) / v.std(0)).double()
    some, fresh = v.split(10_000)
    u = in_columns(some).transform().inv(fresh)
    levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    assert (u.quantile(levels, 0) - torch.special.ndtri(levels)[:, None]).abs().max() < 0.12  # four standard errors
    assert seems_normal(u) and not seems_normal(v)


def test_rough_columns_are_the_steps_alone():
    """Planted fault: every column that is not normal counts as rough."""
    v = copula(10_000)[0]
    splines = column_splines((v - v.mean(0)) / v.std(0))
    assert [s is not None for s in splines.rough] == [True, False, False]
    assert [s is not None for s in splines.all] == [True, True, False]


def test_repeated_values_get_no_spline():
    """Counts have no density. Planted fault: a spline through equal quantiles."""
    torch.manual_seed(0)
    v = torch.stack([torch.randint(5, (4_000,)).float(), torch.zeros(4_000)], 1)
    assert column_splines(v).all == [None, None]


def test_units_are_in_the_state_and_older_states_load():
    x = copula(4_000)[0]
    flow, again = dgm.MAF(3).standardize(x), dgm.MAF(3)
    old = {k: v.clone() for k, v in again.state_dict().items() if "columns" not in k}
    flow.columns.take(column_splines(flow.flow_units(x)).all)
    again.load_state_dict(flow.state_dict())
    assert torch.equal(again().log_prob(x), flow().log_prob(x))
    again.load_state_dict(old)
    assert again.columns.is_identity()
    assert flow.standardize(x).columns.is_identity()


@pytest.mark.parametrize("family", [dgm.MAF, dgm.FFJORD])
def test_a_fit_of_a_normal_copula_starts_at_it(family):
    """30 steps do not find a staircase. Planted fault: no such start (1.0 and 1.1 nats off)."""
    x, _ = copula(6_000)
    fresh, log_p = copula(2_000, seed=1)
    flow = family(3)
    dgm.fit(dgm.MaximumLikelihood(flow, pretrain=100), (x,), max_steps=30, progress=False, seed=0)
    with torch.no_grad():
        assert float((log_p - flow().log_prob(fresh)).mean()) < 0.15
    draws = flow().sample((4_000,))
    assert (draws.quantile(0.5, 0) - fresh.quantile(0.5, 0)).abs().max() < 0.15


def funnel(n):
    scale = 1.5 * torch.randn(n, 1)
    return torch.cat([scale, scale.exp() * torch.randn(n, 4)], 1)


def test_a_funnel_is_learned_in_straight_units_and_lone_tails_in_compressed_ones():
    """Planted faults: always compressed (MAF of the funnel); always straight (tails that no other column explains)."""
    torch.manual_seed(0)
    flow, lone = dgm.MAF(5), dgm.MAF(2)
    for each, x in ((flow, funnel(6_000)), (lone, torch.distributions.StudentT(1.0).sample((6_000, 2)))):
        history = dgm.fit(dgm.MaximumLikelihood(each), (x,), max_steps=10, progress=False, seed=0)
        assert [stage[0] for stage in history.stages] == ["compressed units", "straight units"]
    assert flow.standard.is_straight() and not lone.standard.is_straight()
