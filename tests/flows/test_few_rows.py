"""Densities of few rows: units that take out correlations, the stand-in of smooth densities, and fits that use both."""

import math

import pytest
import torch
from pyro.distributions import constraints as pyro_constraints
from torch.distributions import MultivariateNormal, Normal, constraints

import pyro_dgm as dgm
from pyro_dgm.cnf import matching
from pyro_dgm.core import zuko
from pyro_dgm.flows.few_rows import Decorrelate, Pairs, StandIn, _kernels, _mixture


def correlated(n, seed=0):
    """Rows of a normal law with a correlation of .995 in scales that differ, and that law."""
    torch.manual_seed(seed)
    factor = torch.tensor([[1.0, 0.0, 0.0], [9.95, 1.0, 0.0], [0.01, 0.0, 0.05]])
    law = MultivariateNormal(torch.tensor([5.0, -3.0, 0.0]), scale_tril=factor)
    return law.sample((n,)), law


def clustered(n, seed=0):
    """Rows of three clusters in four dimensions, and their log density."""
    torch.manual_seed(seed)
    centres = torch.tensor([[3.0, 0.0, 0.0, 1.0], [-3.0, 2.0, 0.0, 0.0], [0.0, -3.0, 2.0, 0.0]])

    def log_prob(x):
        return Normal(centres, 0.6).log_prob(x[:, None]).sum(-1).logsumexp(-1) - math.log(3.0)

    return centres[torch.randint(3, (n,))] + 0.6 * torch.randn(n, 4), log_prob


def fitted(family, *data, **options):
    history = dgm.fit(dgm.MaximumLikelihood(family), data, batch_size=512, progress=False, seed=0, **options)
    return history


@pytest.mark.parametrize("support", [None, constraints.positive], ids=["real", "positive"])
def test_units_without_correlations_keep_the_density_exact(support):
    """A flow at the identity has the density of the normal law of its units. Planted fault: no log-determinant of L."""
    x, _ = correlated(200)
    flow = dgm.MAF(3, support=support)
    flow.standardize(x if support is None else x.exp())
    flow.decorrelate.fit(flow.flow_units(x if support is None else x.exp()))
    flow.start_at_identity()
    tril = torch.diag(flow.standard.scale) @ flow.decorrelate.tril
    law = MultivariateNormal(flow.standard.loc, scale_tril=tril)
    if support is None:
        assert torch.allclose(flow().log_prob(x), law.log_prob(x), atol=1e-3)
    else:
        assert torch.allclose(flow().log_prob(x.exp()), law.log_prob(x) - x.sum(1), atol=1e-3)
    event = flow().sample((50,))
    assert torch.allclose(flow.decode(flow.encode(event)), event, rtol=1e-3, atol=1e-3)
    assert torch.allclose(flow.from_units(flow.flow_units(event)), event, rtol=1e-3, atol=1e-3)


def test_units_are_in_the_state_and_older_states_load():
    x, _ = correlated(100)
    flow = dgm.MAF(3)
    old = {k: v.clone() for k, v in flow.state_dict().items() if "decorrelate" not in k}
    flow.standardize(x)
    flow.decorrelate.fit(flow.flow_units(x))
    again = dgm.MAF(3)
    again.load_state_dict(flow.state_dict())
    assert torch.equal(again().log_prob(x), flow().log_prob(x))
    again.load_state_dict(old)
    assert again.decorrelate.is_identity() and again().log_prob(x).isfinite().all()
    assert flow.standardize(x).decorrelate.is_identity()


def test_shrinkage_follows_the_number_of_rows():
    """Left-out rows of independent columns lose less with it. Planted fault: shrinkage by the rows that R is of (always 0)."""
    torch.manual_seed(0)
    fresh = torch.randn(2000, 20)
    for rows, worst in ((30, 0.06), (1000, 0.02)):
        x = torch.randn(rows, 20)
        tril = Decorrelate().fit(x).tril
        loss = Normal(0.0, 1.0).log_prob(fresh).sum(1) - MultivariateNormal(torch.zeros(20), scale_tril=tril).log_prob(
            fresh
        )
        assert loss.mean() / 20 < worst


def test_a_constant_column_and_a_copy_do_not_stop_the_units():
    x = torch.randn(50, 1)
    units = Decorrelate().fit(torch.cat([x, x, torch.zeros(50, 1)], 1))
    assert units.tril.isfinite().all() and units.transform().inv(torch.ones(3)).isfinite().all()


@pytest.mark.parametrize("make", [_kernels(0.3), _mixture(3, 4.0), StandIn], ids=["kernels", "mixture", "all"])
def test_what_stands_in_is_a_density_and_draws_from_it(make):
    """It integrates to one, and draws fall where it says. Planted fault: kernels drawn at half their width."""
    torch.manual_seed(0)
    rows = torch.cat([0.3 * torch.randn(60, 1) - 1.0, 0.3 * torch.randn(60, 1) + 1.0]).double()
    density = make(rows)
    grid = torch.linspace(-90.0, 90.0, 60_001).double()[:, None]
    mass = density.log_prob(grid).exp() * (grid[1] - grid[0])
    assert abs(mass.sum() - 1.0) < 1e-3
    n = 20_000
    edges = (-1.5, -1.0, -0.5, 0.0, 1.5)
    below = (density.sample(n) < torch.tensor(edges)).double().mean(0)
    expected = torch.stack([mass[grid[:, 0] < edge].sum() for edge in edges])
    assert (below - expected).abs().max() < 4.0 * 0.5 / n**0.5 + 2e-3


def test_the_stand_in_of_a_normal_law_is_that_law():
    torch.manual_seed(0)
    assert StandIn(torch.randn(200, 5)).gain < 0.05


def test_drawn_classes_are_classes():
    """Planted fault: contexts as they are drawn, between the classes."""
    torch.manual_seed(0)
    classes = torch.randint(3, (200, 1)).float()
    u, context = Pairs(torch.randn(200, 2) + classes, torch.cat([classes, torch.randn(200, 1)], 1)).sample(100)
    assert set(context[:, 0].tolist()) <= {0.0, 1.0, 2.0} and u.shape == (100, 2)
    assert len(context[:, 1].unique()) == 100


@pytest.mark.parametrize("family", [dgm.NSF, dgm.MAF, dgm.RealNVP, dgm.FFJORD])
def test_a_hundred_rows_of_clusters(family):
    """A flow is within 1.1 nats of the truth, a normal law 1.8; 500 steps on draws and 100 on rows suffice. Planted fault: rows in the place of draws."""
    x, _ = clustered(100)
    test, log_prob = clustered(2000, seed=1)
    truth = log_prob(test).mean()
    normal = MultivariateNormal(x.mean(0), torch.cov(x.T)).log_prob(test).mean()
    torch.manual_seed(0)
    flow = family(4)
    history = fitted(flow, x, max_steps=100)
    with torch.no_grad():
        gap = truth - flow().log_prob(test).mean()
    assert gap < 1.1 and truth - normal > 1.6
    assert history.held_out == "10 of 100 rows, at random" and "held_out='10 of 100 rows" in repr(history)
    assert history.validation[0][0] == 0 and history.best_loss <= history.validation[0][1]


def test_a_normal_law_of_correlated_columns_is_found_at_once():
    """Its shrunk estimate is the start, and no step makes it worse. Planted fault: the start is no candidate."""
    x, law = correlated(60)
    test, _ = correlated(2000, seed=1)
    flow = dgm.RealNVP(3)
    history = fitted(flow, x)
    with torch.no_grad():
        assert law.log_prob(test).mean() - flow().log_prob(test).mean() < 0.2
    assert history.stages == [] and history.stopped.startswith("no improvement")


def test_few_rows_with_a_context():
    """A location that follows a number and a class; a regression line is 1 nat off."""
    torch.manual_seed(0)

    def rows(n):
        number = torch.randn(n, 1)
        of_class = torch.randint(2, (n, 1)).float()
        law = Normal((2.0 * number).sin() + 3.0 * of_class, 0.3)
        return law.sample(), torch.cat([number, of_class], 1), law

    x, context, _ = rows(200)
    test, at, law = rows(2000)
    flow = dgm.NSF(1, 2)
    fitted(flow, x, context)
    with torch.no_grad():
        assert law.log_prob(test).mean() - flow(at).log_prob(test).mean() < 0.45


def test_nothing_is_held_out_where_that_is_asked_for():
    x, _ = correlated(100)
    assert fitted(dgm.MAF(3), x, max_steps=5, validation=0).held_out == ""


@pytest.mark.parametrize("flow", [zuko.flows.NCSF(2), zuko.mixtures.GMM(2, components=3), zuko.flows.BPF(2)], ids=str)
def test_families_without_a_normal_base_are_fitted_too(flow):
    torch.manual_seed(0)
    family = dgm.ZukoFlow(flow)
    x = torch.randn(50, 2)
    fitted(family, x, max_steps=5)
    assert family().log_prob(x).isfinite().all()


def test_flow_matching_of_few_rows_is_held_out_too(monkeypatch):
    monkeypatch.setattr(matching, "FEW_STEPS", 30)  # for its time
    x, _ = clustered(100)
    history = dgm.fit(dgm.FlowMatching(dgm.FFJORD(4)), (x,), batch_size=512, max_steps=50, progress=False, seed=0)
    assert history.held_out == "10 of 100 rows, at random"
    assert [stage[:2] for stage in history.stages] == [("FlowMatching of draws of a smooth density", 30)]


def test_likelihood_on_draws_follows_flow_matching_on_draws():
    """Matching alone leaves FFJORD .1 nats a column short in 13 columns. Planted fault: the first course alone."""
    x, _ = clustered(100)
    history = fitted(dgm.FFJORD(4), x, max_steps=2)
    names = ("FlowMatching of draws of a smooth density", "MaximumLikelihood of draws of a smooth density")
    assert [stage[:2] for stage in history.stages] == [(name, 10) for name in names]
    alone = dgm.MaximumLikelihood(dgm.FFJORD(4), pretrain=4)
    history = dgm.fit(alone, (x,), batch_size=512, max_steps=2, progress=False, seed=0)
    assert [stage[1] for stage in history.stages] == [4, 4]


@pytest.mark.parametrize("rounded", [True, False])
def test_values_that_come_again_are_told(rounded, recwarn):
    """A column rounded to .2, and not those beside it; not the far values of few rows. Planted fault: any wide steps."""
    torch.manual_seed(0)
    x = torch.randn(100 if rounded else 20, 3) * torch.tensor([1.0, 1.0, 100.0])
    if rounded:
        x[:, 1] = (x[:, 1] * 5.0).round() / 5.0
    fitted(dgm.MAF(3), x, max_steps=1)
    found = [str(w.message) for w in recwarn if "come again" in str(w.message)]
    assert len(found) == rounded
    assert not rounded or ("column 1 " in found[0] and "0.2 " in found[0] and "Dequantize" in found[0])


@pytest.mark.parametrize("rows", [1, 50])
def test_columns_of_one_value_are_told(rows):
    """Planted fault: columns whose values come again, of which a constant is none."""
    x = torch.randn(rows, 3)
    x[:, 1] = 7.0
    named = "column 0, 1, 2 has" if rows == 1 else "column 1 has"
    with pytest.warns(UserWarning, match=rf"{named} one value in \d+ rows. A constant has no density"):
        fitted(dgm.MAF(3), x, max_steps=1)


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_columns_that_follow_from_others_are_told(noise, recwarn):
    """In other units, and with a thousandth of noise; not on a simplex. Planted fault: the threshold 10^5 times as high."""
    x = torch.randn(50, 3)
    x[:, 2] = 1e4 * x[:, 0] + 7.0 + noise * 1e4 * torch.randn(50)
    fitted(dgm.MAF(3), x, max_steps=1)
    told = [str(w.message) for w in recwarn if "no density" in str(w.message)]
    assert len(told) == (noise == 0.0) and all(
        "column 0, 2 are linear functions of each other" in text for text in told
    )


@pytest.mark.parametrize("event, shape", [(1, (20,)), (2, (2,))])
def test_rows_of_a_wrong_shape_are_refused_with_what_to_do(event, shape):
    with pytest.raises(ValueError, match=r"rows of events. One row is x\[None\], one column x\[:, None\]"):
        fitted(dgm.MAF(event), torch.randn(shape), max_steps=1)


def test_few_rows_without_a_start_are_not_trained_at_its_gentle_rate():
    """Planted fault: one rate for both, by which a fit without pretraining ends where it began."""
    gentle = dgm.MaximumLikelihood(dgm.NSF(2)).recipe(60).lr
    assert dgm.MaximumLikelihood(dgm.NSF(2), pretrain=0).recipe(60).lr > 100 * gentle
    assert dgm.MaximumLikelihood(dgm.NSF(150)).recipe(60).lr > 100 * gentle


def test_draws_that_are_rounded_out_of_the_support_are_left_out():
    """Pairs in order, which may lie next to each other. Planted fault: all draws near the data are scored."""
    torch.manual_seed(0)
    x = torch.randn(2_000, 2).sort(-1).values
    flow = dgm.RealNVP(2, support=pyro_constraints.ordered_vector, transforms=2)
    fitted(flow, x, max_steps=150)
    assert flow().log_prob(x).isfinite().all()
    pairs, far = Pairs(flow.flow_units(x), None), torch.full((2,), 100.0)
    events = torch.cat([matching._events(flow, pairs, far, 4_000)[0] for _ in range(10)])
    assert pyro_constraints.ordered_vector.check(events).all() and len(events) > 30_000
