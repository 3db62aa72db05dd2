"""Units of a mixture of normals: exact densities and draws, and when a fit takes them."""

import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.core.pace import within
from pyro_dgm.flows.many_rows import _Grown, _grown, best_mixture
from pyro_dgm.flows.mixture_units import MixtureUnits, Normals, fitted_mixture


def mixture(d=3, components=3, seed=0):
    torch.manual_seed(seed)
    tril = torch.randn(components, d, d).tril(-1) * 0.3 + torch.rand(components, d).add(0.2).diag_embed()
    return Normals(torch.tensor([0.5, 0.3, 0.2]), 2.0 * torch.randn(components, d), tril)


def in_units(law, family=dgm.MAF):
    """A flow at the identity in the units of the law."""
    flow = family(law.loc.shape[1])
    flow.mixture.take(law)
    return flow.start_at_identity()


@pytest.mark.parametrize("far", [1.0, 30.0])
def test_the_identity_has_the_density_of_the_mixture(far):
    """Also 30 sds out. Planted fault: shares of the components that ignore the entries before."""
    law = mixture()
    x = far * law.sample(500)
    assert torch.allclose(in_units(law)().log_prob(x), law.log_prob(x), rtol=1e-4, atol=1e-3)


def test_units_of_one_normal_are_linear_30_sds_out():
    """Where float32 has no tails. Planted fault: quantiles of probabilities alone (u ends at 11), or of torch's ndtr (from 5.7 on)."""
    torch.manual_seed(0)
    tril = torch.tensor([[1.0, 0.0], [0.5, 0.2]])
    u = 30.0 * torch.randn(200, 2)
    units = MixtureUnits().take(Normals(torch.ones(1), torch.ones(1, 2), tril[None]))
    assert torch.allclose(units.transform().inv(u @ tril.T + 1.0), u, rtol=1e-3, atol=1e-3)


def test_draws_invert_scores_and_the_log_determinant_is_the_jacobians():
    """Planted fault: a search that ends at a short step of Newton on a steep slope."""
    law = Normals(*(t.double() for t in mixture(4)))
    units = MixtureUnits().double().take(law)
    v = law.sample(300)
    u = units.transform().inv(v)
    assert torch.allclose(units.transform()(u), v, atol=1e-5)
    transform = units.transform()
    jacobian = torch.autograd.functional.jacobian(transform.inv, v[0])
    assert torch.allclose(jacobian.tril(), jacobian)
    assert torch.allclose(-torch.linalg.slogdet(jacobian)[1], transform.log_abs_det_jacobian(transform.inv(v[0]), v[0]))
    back = torch.autograd.functional.jacobian(lambda u: units.transform()(u), u[0])
    assert torch.allclose(back @ jacobian, torch.eye(4).double(), atol=1e-4)


def test_draws_of_a_flow_are_of_the_mixture():
    law = mixture()
    drawn, given = in_units(law)().sample((20_000,)), law.sample(20_000)
    assert (drawn.mean(0) - given.mean(0)).abs().max() < 0.1
    assert abs(float(law.log_prob(drawn).mean() - law.log_prob(given).mean())) < 0.05


def test_units_are_in_the_state_and_older_states_load():
    law = mixture()
    x, flow, again = law.sample(50), in_units(law), dgm.MAF(3)
    old = {k: v.clone() for k, v in again.state_dict().items() if "mixture" not in k}
    again.load_state_dict(flow.state_dict())
    torch.testing.assert_close(again().log_prob(x), flow().log_prob(x))
    again.load_state_dict(old)
    assert again.mixture.is_identity()
    assert flow.standardize(x).mixture.is_identity()


def test_as_many_components_as_left_out_rows_ask_for():
    """Planted fault: the last number that was tried instead of the best."""
    torch.manual_seed(0)
    assert len(best_mixture(torch.randn(4_000, 5)).weight) == 1
    law = mixture(6)
    assert 3 <= len(best_mixture(law.sample(4_000)).weight) <= 8


def test_a_checkerboard_is_many_normals_in_several_fits(monkeypatch):
    """Planted fault: one fit alone."""
    monkeypatch.setattr("pyro_dgm.flows.many_rows._COMPONENTS", (2, 4, 8, 16))
    torch.manual_seed(0)
    first = 4.0 * torch.rand(6_000, dtype=torch.float64) - 2.0
    second = torch.rand_like(first) - 2.0 * torch.randint(2, first.shape) + first.floor() % 2
    x, fresh = torch.stack([first, second], 1).split([4_000, 2_000])
    found, one = best_mixture(x), fitted_mixture(x, 1, 4.0)
    assert len(found.weight) in (32, 48, 64, 80, 96)
    assert float((found.log_prob(fresh) - one.log_prob(fresh)).mean()) > 0.2


def test_numbers_that_bring_nothing_do_not_end_the_search_at_once():
    """Of a checkerboard two and four normals say as little as one. Planted fault: the first such number ends it."""
    law = mixture()
    x = law.sample(1_000)
    one = Normals(torch.ones(1), x.mean(0)[None], torch.linalg.cholesky(x.T.cov())[None])
    start = _Grown(one, float(one.log_prob(x).mean()), True)
    assert _grown(lambda k: law if k >= 8 else one, x, start).mixture is law


def test_scales_of_one_normal_are_found_and_cost_one_covariance():
    """In 20 columns. Planted faults: normals alone; rows that count alike in the covariance (.17 nats off)."""
    torch.manual_seed(0)
    tril = torch.linalg.qr(torch.randn(20, 20)).Q * torch.arange(1, 21) ** -0.5
    scales = torch.tensor([0.1, 0.5, 2.0]).double()
    law = Normals(
        torch.tensor([0.4, 0.3, 0.3]).double(), torch.zeros(3, 20).double(), scales[:, None, None] * tril.double()
    )
    law = law._replace(tril=torch.linalg.cholesky(law.tril @ law.tril.mT))
    found = best_mixture(law.sample(5_000))
    fresh = law.sample(4_000)
    ratio = found.tril[1:] / found.tril[:1]
    assert torch.allclose(ratio.tril().sum((1, 2)) / 210, ratio[:, 0, 0], rtol=1e-4)
    assert float((law.log_prob(fresh) - found.log_prob(fresh)).mean()) < 0.1


def test_expectation_by_sums_of_squares_is_that_of_densities():
    """Planted fault: products of different columns that count once."""
    law = Normals(*(t.double() for t in mixture(4)))
    x = law.sample(3_000)
    assert torch.allclose((law.log_parts(x) - law.log_prob(x)[:, None]).exp(), law.log_parts(x).softmax(-1))
    again = fitted_mixture(x, 3, 0.0, law, 1)
    share = law.log_parts(x).softmax(-1)
    count = share.sum(0)
    loc = share.T @ x / count[:, None]
    off = x[:, None] - loc
    spread = torch.einsum("nk,nki,nkj->kij", share, off, off) / count[:, None, None]
    assert torch.allclose(again.loc, loc, atol=1e-8) and torch.allclose(again.tril @ again.tril.mT, spread, atol=1e-6)


def fitted(flow, x, **options):
    dgm.fit(dgm.MaximumLikelihood(flow), (x,), max_steps=30, progress=False, seed=0, **options)
    return flow


def test_a_fit_of_clusters_starts_at_their_mixture():
    """30 steps do not find three clusters in 12 dimensions. Planted fault: no such start."""
    law = mixture(12)
    torch.manual_seed(1)
    flow, x, fresh = dgm.FFJORD(12), law.sample(5_000), law.sample(2_000)
    fitted(flow, x)
    assert not flow.mixture.is_identity()
    with torch.no_grad():
        assert float((law.log_prob(fresh) - flow().log_prob(fresh)).mean()) < 0.2


def test_other_flows_keep_their_start():
    """On `sheets` and funnels NSF ends worse from a mixture (docs/benchmarks/tables.md)."""
    torch.manual_seed(1)
    assert fitted(dgm.MAF(12), mixture(12).sample(5_000)).mixture.is_identity()


def test_a_mixture_ends_with_the_seconds_of_its_fit():
    """Planted fault: EM goes on to its end."""
    with within(0.0):
        assert best_mixture(mixture(12).sample(5_000)) is None


def test_a_flow_that_has_learned_more_than_a_mixture_says_keeps_it(monkeypatch):
    """Planted fault: the mixture is kept whatever it scores."""
    torch.manual_seed(0)
    wide = Normals(torch.ones(1), torch.zeros(1, 3), 5.0 * torch.eye(3)[None])
    monkeypatch.setattr("pyro_dgm.cnf.matching.best_mixture", lambda v: wide)
    flow = dgm.FFJORD(3)
    dgm.fit(dgm.MaximumLikelihood(flow, pretrain=50), (torch.randn(4_000, 3),), max_steps=2, progress=False, seed=0)
    assert flow.mixture.is_identity()


def test_contexts_and_loaders_have_no_such_start():
    """The mixture is of events alone. Planted fault: contexts are dropped."""
    torch.manual_seed(0)
    c = torch.randn(4_000, 1)
    x = c + 0.1 * torch.randn(4_000, 2)
    flow = dgm.FFJORD(2, context_features=1)
    dgm.fit(dgm.MaximumLikelihood(flow), (x, c), max_steps=20, progress=False, seed=0)
    assert flow.mixture.is_identity()
