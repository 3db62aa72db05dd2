"""The contract of a distribution, one property a test, over the whole table of families.

Tolerances come from each test's own Monte-Carlo error. Fixed seeds; a gof test fails by chance once in 50,000.
"""

import copy
import gc
import io
import pickle
import weakref

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.gof import auto_goodness_of_fit
from pyro.optim.clipped_adam import ClippedAdam
from torch.distributions import Normal, constraints

import pyro_dgm as dgm
from pyro_dgm.flows.coupling import TailedCoupling
from tests.families import APPROXIMATE, FAMILIES, NO_TRANSFORM, NOT_REPARAMETERISED, SUPPORTS, make

NAMES = sorted(FAMILIES)
REPARAMETERISED = [n for n in NAMES if n not in NOT_REPARAMETERISED]


def context_for(*batch, features=3):
    return torch.randn(*batch, features)


def tolerance(name):
    return APPROXIMATE.get(name, 1e-4)


def proposal(name, features):
    """A wide density on the family's support, for importance sums."""
    if name == "zuko-NCSF":
        return dist.Uniform(-torch.pi, torch.pi).expand([features]).to_event(1)
    return dist.StudentT(4.0, 0.0, 1.5).expand([features]).to_event(1)


def test_every_public_family_is_in_the_table():
    """A family that nobody put into the table would escape the contract."""
    made = {type(make(n)).__name__ for n in NAMES}
    public = {
        n
        for n in dgm.__all__
        if isinstance(getattr(dgm, n), type) and issubclass(getattr(dgm, n), dgm.DistributionModule)
    }
    assert public - made == {"DistributionModule", "Generator"}  # the second has no density: tests/gan/test_gan.py


@pytest.mark.parametrize("batch", [(), (5,), (4, 1)], ids=str)
@pytest.mark.parametrize("sample", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_draws_and_scores(name, sample, batch):
    q = make(name, 2, 3)(context_for(*batch)).expand((6, *q_shape(batch)))
    x = q.sample(sample)
    assert x.shape == q.shape(sample) == (*sample, 6, *q_shape(batch), 2)
    assert q.log_prob(x).shape == (*sample, 6, *q_shape(batch))


def q_shape(batch):
    """Interstitial expansion too: a trailing 1 becomes 3."""
    return (*batch[:-1], 3) if batch and batch[-1] == 1 else batch


@pytest.mark.parametrize("name", NAMES)
def test_values_broadcast_against_the_context(name):
    """Scores of (7, 1) values under a (5,) context equal the scores of every pair; raw zuko fails here."""
    family, c, x = make(name, 2, 3), context_for(5), 0.5 * torch.randn(7, 1, 2)
    scores = family(c).log_prob(x)
    assert scores.shape == (7, 5)
    pairs = torch.stack([torch.stack([family(ci).log_prob(xi[0]) for ci in c]) for xi in x])
    torch.testing.assert_close(scores, pairs, atol=tolerance(name), rtol=1e-3)


@pytest.mark.parametrize("features", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_density_integrates_to_one(name, features):
    """Numerical integral over a grid. Planted fault: log_prob + 0.1 (integral 1.105), and log_prob * 1.02."""
    q, box, n = make(name, features)(), 14.0 if name != "zuko-NCSF" else torch.pi, 40_001 if features == 1 else 561
    axis = torch.linspace(-box, box, n)
    x = torch.cartesian_prod(*[axis] * features).reshape(-1, features)
    with torch.no_grad():
        total = sum(q.log_prob(part).double().exp().sum() for part in x.split(50_000)) * (2 * box / (n - 1)) ** features
    assert abs(total - 1.0) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_moments_of_draws_match_the_density(name):
    """E|x|^2 from draws and from the density agree within 5 of their errors. Planted fault: draws * 1.1 (seen 3/3)."""
    q, wide = make(name)(), proposal(name, 2)
    with torch.no_grad():
        drawn = q.sample((10_000,)).square().sum(-1)
        x = wide.sample((20_000,))
        weighted = (q.log_prob(x) - wide.log_prob(x)).exp() * x.square().sum(-1)
    error = (drawn.var() / len(drawn) + weighted.var() / len(weighted)).sqrt()
    assert abs(drawn.mean() - weighted.mean()) < 5 * error


@pytest.mark.parametrize("name", NAMES)
def test_draws_follow_the_density(name):
    """Goodness of fit of draws with their densities, p > 2e-5. Planted fault: support of half the mass (seen 3/3)."""
    q = make(name)()
    torch.manual_seed(2)
    with torch.no_grad():
        x = q.sample((4_000,))
        assert auto_goodness_of_fit(x, q.log_prob(x).exp(), dim=2) > 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_draws_lie_in_the_support_and_carry_no_graph(name):
    q = make(name, 2, 3)(context_for(5))
    x = q.sample((100,))
    assert q.support.check(x).all() and not x.requires_grad and q.support.event_dim == 1


@pytest.mark.parametrize("name", REPARAMETERISED)
def test_the_density_of_a_draw_equals_its_score(name):
    """The density that the draw's own pass gives is log_prob of a copy. Planted fault: a sign of the log-determinant."""
    q = make(name, 2, 3)(context_for(5))
    x, joint = q.rsample_and_log_prob((50,))
    torch.testing.assert_close(joint, q.log_prob(x.clone()), atol=10 * tolerance(name), rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter_and_the_context(name):
    family, c = make(name, 3, 3), context_for(5).requires_grad_()
    value = torch.rand(5, 3) - 0.5
    family(c).log_prob(value).sum().backward()
    assert c.grad.abs().sum() > 0
    silent = [n for n, p in family.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("name", REPARAMETERISED)
def test_reparameterised_draws_have_the_gradient_of_finite_differences(name):
    """d E[x] / d c by the path equals a difference quotient with common random numbers."""
    family, c = make(name, 2, 3).double(), context_for(1).double()

    def mean(c):
        torch.manual_seed(3)
        return family(c).rsample((20,)).mean()

    c.requires_grad_()
    (slope,) = torch.autograd.grad(mean(c), c)
    step = torch.tensor([[1e-3, 0.0, 0.0]]).double()
    with torch.no_grad():
        difference = (mean(c + step) - mean(c - step)) / 2e-3
    torch.testing.assert_close(slope[0, 0], difference, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name):
    """A fresh family with the saved weights scores the same, and weights_only loading suffices."""
    family, x = make(name, 2, 3), 0.5 * torch.randn(9, 2)
    buffer = io.BytesIO()
    torch.save(family.state_dict(), buffer)
    buffer.seek(0)
    torch.manual_seed(99)
    other = FAMILIES[name](2, 3)
    c = context_for(9)
    assert not torch.allclose(other(c).log_prob(x), family(c).log_prob(x))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(other(c).log_prob(x), family(c).log_prob(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["Gaussian", "RealNVP", "MAF-sampling", "NSF", "FFJORD"])
def test_copies_after_use_score_the_same(name, copied):
    """Copies of family and distribution work after draws, gradients and pyro.module, and leave the original alone."""
    import pyro

    family, c, x = make(name, 2, 3), context_for(5, features=3).requires_grad_(), torch.randn(5, 2)
    pyro.module("flow", family)
    q = family(c * 1.0)
    q().sum().backward()
    expected = q.log_prob(x)
    torch.testing.assert_close(copied(q).log_prob(x), expected)
    torch.testing.assert_close(copied(family)(c).log_prob(x), expected)
    torch.testing.assert_close(q.log_prob(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_followed(name):
    family = make(name, 2, 3).double()
    q = family(context_for(5).double())
    x = q.sample()
    assert x.dtype == q.log_prob(x).dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_bad_values_are_refused_by_name(name):
    q = make(name, 2, 3)(context_for(5))
    with pytest.raises(ValueError, match=r"value has shape \(5, 3\), expected \(\.\.\., 2\)"):
        q.log_prob(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="does not broadcast"):
        q.log_prob(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="outside the support .* or are NaN"):
        q.log_prob(torch.full((5, 2), torch.nan))


@pytest.mark.parametrize("name", NAMES)
def test_bad_contexts_are_refused_by_name(name):
    family = make(name, 2, 3)
    with pytest.raises(ValueError, match="context has 4 features, expected 3"):
        family(torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"no context given, expected shape \(\.\.\., 3\)"):
        family()
    with pytest.raises(ValueError, match=r"is unconditional. Build it with .*context_features=4\)"):
        make(name)(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="are x and context swapped"):
        family(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="are x and context swapped"):
        family.standardize(torch.zeros(5, 3), torch.zeros(5, 2))


@pytest.mark.parametrize("name", NAMES)
def test_wrappers_of_pyro_work(name):
    q = make(name, 2, 3)(context_for(4))
    x = q.sample()
    torch.testing.assert_close(q.to_event(1).log_prob(x), q.log_prob(x).sum())
    mask = torch.tensor([True, False, True, False])
    torch.testing.assert_close(q.mask(mask).log_prob(x), q.log_prob(x) * mask)
    assert q.mask(False).log_prob(x).abs().sum() == 0
    assert q.expand_by([3]).sample().shape == (3, 4, 2) and q.to_event(1).sample((2,)).shape == (2, 4, 2)
    assert type(make(name)).__name__ in repr(q) and not hasattr(q, "base_dist")


@pytest.mark.parametrize("name", NAMES)
def test_expanded_draws_are_independent(name):
    """Planted fault: an expand that repeats one draw (18 cases seen)."""
    x = make(name)().expand([50]).sample()
    assert len(torch.unique(x[:, 0])) == 50


@pytest.mark.parametrize("name", REPARAMETERISED)
def test_has_rsample_is_assignable_and_survives_expand(name):
    q = make(name, 2, 3)(context_for(4)).has_rsample_(False).expand([2, 4])
    assert not q.has_rsample and not q().requires_grad


@pytest.mark.parametrize("kind", sorted(SUPPORTS))
def test_constrained_flows_are_densities_on_their_support(kind):
    """Support, shapes, gof of draws, and the density against autograd's Jacobian of the whole map."""
    support, event = SUPPORTS[kind]
    family = dgm.MAF(event, context_features=3, support=support, hidden_features=(16,)).double()
    q = family(torch.randn(1, 3).double())
    x = q.sample((200,))
    assert q.event_shape == event and q.support.check(x).all() and x.shape == (200, 1, *event)
    built = family.build(torch.zeros(3).double())
    bijection, u = family.bijection(built), torch.randn(family.features).double()
    columns = torch.autograd.functional.jacobian(lambda v: _coordinates(bijection(v), kind), u).reshape(
        -1, family.features
    )
    expected = torch.linalg.slogdet(columns).logabsdet
    torch.testing.assert_close(bijection.log_abs_det_jacobian(u, bijection(u)), expected)


def _coordinates(x, kind):
    """The free coordinates that the density of a constrained event is with respect to."""
    if kind == "simplex":
        return x[..., :-1]
    if kind in ("lower_cholesky", "corr_cholesky"):
        rows, columns = torch.tril_indices(*x.shape[-2:], offset=0 if kind == "lower_cholesky" else -1)
        return x[..., rows, columns]
    return x


@pytest.mark.parametrize("event", [(), (2,), (2, 2), (1, 2, 2)], ids=str)
def test_events_of_any_shape(event):
    q = dgm.NSF(event, context_features=3)(context_for(4))
    x = q.sample((5,))
    assert x.shape == (5, 4, *event) and q.log_prob(x).shape == (5, 4)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NO_TRANSFORM])
def test_round_trip_and_log_determinant_against_autograd(name):
    """z(x(z)) = z and log|det dx/dz| by autograd. Planted fault: counting masked coordinates, as one published RealNVP."""
    family = make(name, 2, 3).double()
    flow = family.build(torch.zeros(3).double())
    z = 0.5 * torch.randn(2).double()
    x, ladj = flow.transform.inv.call_and_ladj(z)
    torch.testing.assert_close(flow.transform(x), z, atol=tolerance(name), rtol=1e-3)
    jacobian = torch.autograd.functional.jacobian(flow.transform, x)
    torch.testing.assert_close(-torch.linalg.slogdet(jacobian).logabsdet, ladj, atol=10 * tolerance(name), rtol=1e-3)


def step_uncounted(optimiser, family):
    """A step by an optimiser that changes parameters without raising their version."""
    if optimiser == "fused":
        torch.optim.Adam(family.parameters(), 0.1, fused=True).step()
    else:
        ClippedAdam(family.parameters(), 0.1).step()


class TestMemo:
    """The density of a draw is remembered once, never stale, never for long."""

    def counted(self, name="MAF-sampling", monkeypatch=None):
        family = make(name)
        calls = []
        activation = family.flow.transform.transform.transforms[0].hyper[
            1
        ]  # an inverse calls it, too, and never the whole
        activation.register_forward_hook(lambda *_: calls.append(1))
        return family, calls

    def test_a_hit_runs_no_network(self):
        family, calls = self.counted()
        q = family()
        x = q()
        calls.clear()
        q.log_prob(x)
        assert calls == []
        q.log_prob(x)
        assert calls != []  # dropped after use

    def test_a_draw_through_to_event_is_scored_in_the_sampling_direction(self):
        """An inverse of 8 features would take 8 passes."""
        family = make("MAF-sampling", 8)
        calls = []
        family.flow.transform.transform.transforms[0].hyper[1].register_forward_hook(lambda *_: calls.append(1))
        q = family().expand([3]).to_event(1)
        x = q()
        calls.clear()
        score = q.log_prob(x)
        assert len(calls) == 1
        torch.testing.assert_close(score, q.log_prob(x.clone()), atol=1e-3, rtol=1e-4)

    def test_never_stale_after_an_optimiser_step(self):
        family = make("MAF-sampling")
        q = family()
        x = q()
        with torch.no_grad():
            next(family.parameters()).add_(0.5)
        torch.testing.assert_close(q.log_prob(x), family().log_prob(x))

    @pytest.mark.parametrize("name", ["RealNVP", "MAF-sampling", "NSF", "FFJORD", "Tailed", "zuko-GF"])
    @pytest.mark.parametrize("optimiser", ["fused", "Pyro's"])
    def test_never_stale_after_a_step_that_torch_does_not_count(self, name, optimiser):
        """Planted fault: parameters compared by their version; fused kernels and writes to .data leave it as it is."""
        family = TailedCoupling(3) if name == "Tailed" else make(name)
        q = family()
        family().log_prob(q.sample()).backward()
        x = q()
        versions = [p._version for p in family.parameters()]
        step_uncounted(optimiser, family)
        assert [p._version for p in family.parameters()] == versions
        torch.testing.assert_close(q.log_prob(x), family().log_prob(x))

    def test_never_stale_after_new_units(self):
        """Planted fault: buffers left out of what is compared."""
        flow = make("RealNVP")
        x = (q := flow())()
        flow.standardize(3.0 + 2.0 * torch.randn(100, 2))
        torch.testing.assert_close(q.log_prob(x), flow().log_prob(x))

    def test_never_stale_after_an_uncounted_step_where_the_draw_was_wrapped(self):
        q = (family := make("MAF-sampling"))().to_event(0).expand([3]).to_event(1)
        family().log_prob(torch.zeros(2)).backward()
        x = q()
        step_uncounted("fused", family)
        torch.testing.assert_close(q.log_prob(x), family().log_prob(x).sum())

    def test_never_stale_after_an_edit_of_the_draw(self):
        q = make("MAF-sampling")()
        x = q()
        with torch.no_grad():
            x.add_(1.0)
        torch.testing.assert_close(q.log_prob(x), q.log_prob(x.clone()))

    def test_a_draw_without_grad_is_scored_with_grad(self):
        family = make("MAF-sampling")
        q = family()
        with torch.no_grad():
            x = q()
        q.log_prob(x).sum().backward()
        assert all(p.grad is not None for p in family.parameters())

    def test_ten_thousand_draws_leave_nothing_behind(self):
        q = make("RealNVP")()
        alive = weakref.WeakSet()
        for _ in range(10_000):
            alive.add(q(()))
        gc.collect()
        assert len(alive) <= 1  # the memo's own draw

    def test_frozen_parameters_and_live_value(self):
        """The gradient towards the value is that of log_prob; parameters and context get none."""
        for name in ("Gaussian", "RealNVP", "zuko-GMM"):
            family, c = make(name, 2, 3), context_for(5).requires_grad_()
            x = torch.randn(5, 2, requires_grad=True)
            q = family(c)
            frozen = q.detach().log_prob(x)
            torch.testing.assert_close(frozen, q.log_prob(x))
            torch.testing.assert_close(*(torch.autograd.grad(s.sum(), x)[0] for s in (frozen, q.log_prob(x))))
            q.detach().log_prob(x).sum().backward()
            assert c.grad is None and all(p.grad is None and p.requires_grad for p in family.parameters())


def test_a_support_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="is on events of 1 dimension"):
        dgm.MAF((), support=constraints.simplex)
    with pytest.raises(ValueError, match="torch has no bijection onto"):
        dgm.MAF(3, support=constraints.integer_interval(0, 3))


def test_a_build_of_another_shape_is_refused():
    class Wrong(dgm.DistributionModule):
        def build(self, context):
            return Normal(torch.zeros(3), 1.0)

    with pytest.raises(ValueError, match=r"Wrong.build returned event shape \(\), expected \(3,\).*to_event"):
        Wrong(3)()


def test_other_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="expected a lazy zuko flow"):
        dgm.ZukoFlow(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has 3 features, but event_shape"):
        dgm.ZukoFlow(FAMILIES["zuko-NICE"](3).flow, (2, 2))
    with pytest.raises(ValueError, match="expected 'density'"):
        dgm.MAF(2, fast="both")
    with pytest.raises(ValueError, match="must hold positive sizes"):
        dgm.MAF(0)
    with pytest.raises(NotImplementedError, match="no reparameterised draws"):
        make("zuko-GMM")().rsample()
    with pytest.raises(ValueError, match="cannot expand"):
        make("MAF", 2, 3)(context_for(4)).expand([3])


def test_standardize_puts_the_flow_into_the_units_of_the_data():
    x = torch.tensor([100.0, -3.0]) + torch.tensor([20.0, 0.01]) * torch.randn(5_000, 2)
    flow = make("RealNVP").standardize(x)
    draws = flow.start_at_identity()().sample((5_000,))
    torch.testing.assert_close(draws.mean(0), x.mean(0), atol=1.5, rtol=1e-2)
    torch.testing.assert_close(draws.std(0), x.std(0), rtol=0.05, atol=0.0)
    positive = dgm.RealNVP(2, support=constraints.positive).standardize(x.abs() + 1.0).start_at_identity()
    torch.testing.assert_close(
        positive().sample((5_000,)).log().mean(0), (x.abs() + 1.0).log().mean(0), atol=0.05, rtol=0.05
    )
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        flow.standardize(torch.full((3, 2), torch.inf))


class TestImplicit:
    def made(self):
        return dgm.ImplicitDistribution(
            lambda z: z.exp(), dist.Normal(torch.zeros(4, 2), 1.0).to_event(1), 2, name="Toy"
        )

    def test_it_samples_and_expands(self):
        d = self.made()
        assert d.rsample((3,)).shape == (3, 4, 2) and d.expand([5, 4]).sample().shape == (5, 4, 2)
        assert d.support.event_dim == 1 and not d.sample().requires_grad

    def test_scoring_names_the_site_and_what_works(self):
        import pyro
        from pyro import poutine

        trace = poutine.trace(lambda: pyro.sample("x", self.made(), obs=torch.ones(4, 2))).get_trace()
        with pytest.raises(ValueError, match="(?s)site 'x'.*Toy has no density.*Adversarial_ELBO"):
            trace.compute_log_prob()
        with pytest.raises(NotImplementedError, match="no density"):
            self.made().log_prob(torch.ones(4, 2))


@pytest.mark.parametrize(
    "name", [n for n in REPARAMETERISED if n not in ("Gaussian", "Conditional", "Chain", "MixtureChain", "zuko-NCSF")]
)
def test_codes_are_undone_and_are_those_of_the_density(name):
    """decode undoes encode, and codes of draws are standard normal. Planted fault: encode without the standardiser."""
    flow = make(name, 2, 3).standardize(2.0 + 3.0 * torch.randn(100, 2))
    context = context_for(5)
    x = flow(context).sample((400,))
    z = flow.encode(x, context)
    torch.testing.assert_close(flow.decode(z, context), x, atol=10 * tolerance(name), rtol=1e-2)
    assert z.mean().abs() < 0.1 and (z.var() - 1.0).abs() < 0.12  # 4,000 numbers: errors 0.016 and 0.022


def test_codes_are_refused_where_there_are_none():
    with pytest.raises(TypeError, match="no transform of a latent, so it has no codes"):
        make("zuko-GMM").encode(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"MAF: value has shape \(3, 4\), expected \(\.\.\., 2\)"):
        make("MAF").encode(torch.zeros(3, 4))
