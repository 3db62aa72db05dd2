"""The bounds where a shortcut would be silently wrong: each case has a right value from elsewhere."""

import math
import pickle
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal

import pyro_dgm as dgm

T = dist.transforms
X = torch.tensor([0.9, -0.4, 1.3, 0.2])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def warned(loss, *args):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loss.differentiable_loss(*args)
    return " ".join(str(w.message) for w in seen)


def gradient(loss, model, guide, parameter, n, *args):
    """Mean loss, mean gradient of the parameter's first entry, and its standard error."""
    torch.manual_seed(0)
    losses, grads = [], []
    for _ in range(n):
        value = loss.differentiable_loss(model, guide, *args)
        grads.append(torch.autograd.grad(value, parameter)[0].flatten()[0])
        losses.append(value.detach())
    grads = torch.stack(grads)
    return float(torch.stack(losses).mean()), float(grads.mean()), float(grads.std() / n**0.5)


def same_gradient(a, b, *rest):
    (_, x, sx), (_, y, sy) = gradient(a, *rest), gradient(b, *rest)
    return abs(x - y) < 5.0 * math.hypot(sx, sy) + 1e-4


@pytest.mark.parametrize("width", [0.3, 1e-3])
def test_a_small_fault_below_a_large_total_is_seen(width):
    """The mean over draws, too, is taken away: a fifth of a nat, among thousands from the data."""
    rows = torch.randn(2000)

    def centred(b):
        return b - b.mean()

    def each(b):
        return b - b.mean(-1, keepdim=True)

    def model(centre):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("rows", 2000):
            pyro.sample("y", dist.Normal(0.01 * centre(b).sum(-1, keepdim=True) + 0.1 * b[..., :1], 1.0), obs=rows)

    def guide(centre):
        pyro.sample("b", dist.Normal(torch.tensor([0.1, -0.2, 0.3]), width).to_event(1))

    assert "one by one" not in warned(dgm.STL_ELBO(4), model, guide, each)
    loss = dgm.STL_ELBO(4)
    loss.loss(model, guide, centred)
    assert loss._how != "plate"


def test_rounding_alone_is_no_fault():
    """Ten thousand rows, whose sum is rounded at 1e-3 nat."""
    x = torch.randn(10_000, 5)
    y = x.sum(1) + torch.randn(10_000)

    def model():
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        with pyro.plate("rows", 10_000):
            pyro.sample("y", dist.Normal((x * b).sum(-1), 1.0), obs=y)

    for centre in (0.0, 1.0, 5.0):
        loss = dgm.STL_ELBO(4)
        loss.loss(model, lambda: pyro.sample("b", dist.Normal(centre * torch.ones(5), 0.1).to_event(1)))
        assert loss._how == "plate"


def rows_model():
    with pyro.plate("d", 4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=X)


class Held(torch.nn.Module):
    """A guide with one parameter, ``b``."""

    def __init__(self, body, b):
        super().__init__()
        self.b, self.body = torch.nn.Parameter(torch.tensor(b)), body

    def forward(self, *args):
        return self.body(self.b, *args)


def standard(k):
    return dgm.IWAE_ELBO(k, gradient="standard")


@pytest.mark.parametrize("outside", [False, True])
def test_iwae_with_nets_that_are_registered_nowhere(outside):
    """In a closure they are held constant; what they computed outside of the guide cannot be."""
    net = torch.nn.Linear(1, 2)
    with torch.no_grad():
        net.weight.fill_(0.4)
        net.bias.fill_(0.2)

    def guide(h=None):
        with pyro.plate("d", 4):
            out = net(X[:, None]) if h is None else h
            pyro.sample("z", dist.Normal(out[:, 0], out[:, 1].exp()))

    class Loss:
        def __init__(self, loss):
            self.loss = loss

        def differentiable_loss(self, model, guide):
            args = (net(X[:, None]),) if outside else ()
            return self.loss.differentiable_loss(lambda *_: model(), guide, *args)

    rest = rows_model, guide, net.weight, 400
    assert same_gradient(Loss(dgm.IWAE_ELBO(8)), Loss(standard(8)), *rest)
    said = warned(dgm.IWAE_ELBO(8), lambda *_: rows_model(), guide, *([net(X[:, None])] if outside else []))
    assert ("computed outside of the guide" in said) == outside


@pytest.mark.parametrize("density", [False, True])
def test_iwae_with_a_local_delta_that_follows_from_a_shared_draw(density):
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("d", 4):
            c = pyro.sample("c", dist.Normal(mu, 1.0))
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=X)

    def body(b):
        mu = pyro.sample("mu", dist.Normal(b, 0.4))
        with pyro.plate("d", 4):
            where = 1.5 * mu + 0.0 * X
            if density:
                c = pyro.sample("c", dist.Normal(0.3, 1.0))
                pyro.sample("z", dist.Delta(c * 2.0, log_density=mu.square() + 0.0 * X))
            else:
                pyro.sample("c", dist.Delta(where))
                pyro.sample("z", dist.Normal(0.5 * X, 1.3))

    guide = Held(body, 1.3)
    assert same_gradient(dgm.IWAE_ELBO(4), standard(4), model, guide, guide.b, 300)


def test_a_box_in_a_composed_transform_moves():
    """Uniform(0, b) as a composition: its score is -1/b for every draw."""

    def model():
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 2.0)), 0.5), obs=torch.tensor(1.0))

    def body(b):
        cdf = T.CumulativeDistributionTransform(dist.Normal(0.0, 1.0))
        box = T.ComposeTransform([cdf, T.ComposeTransform([T.AffineTransform(0.0, 1.0 / b)]).inv])
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(0.0, 1.0), box))

    guide = Held(body, 1.5)
    assert same_gradient(dgm.STL_ELBO(8), Trace_ELBO(8), model, guide, guide.b, 300)


@pytest.mark.parametrize("late", [False, True])
def test_dropout_in_a_guide(late):
    """Before the draws a second pass repeats it; between them it cannot, and the gradient is the plain one."""

    def body(b):
        if late:
            pyro.sample("a", dist.Normal(0.0, 1.0))
        h = torch.nn.functional.dropout(torch.ones(4, 10), 0.5).mean(-1)  # hardly ever twice the same
        with pyro.plate("d", 4):
            pyro.sample("z", dist.Normal(b + 0.5 * h, 0.5))

    def model():
        if late:
            pyro.sample("a", dist.Normal(0.0, 1.0))
        rows_model()

    guide = Held(body, 0.2)
    loss = dgm.STL_ELBO(8)
    assert same_gradient(loss, Trace_ELBO(8), model, guide, guide.b, 300)
    assert ("another density" in warned(dgm.STL_ELBO(8), model, guide)) == late
    assert same_gradient(dgm.IWAE_ELBO(4), standard(4), model, guide, guide.b, 300)


def test_straight_through_draws_keep_the_plain_gradient():
    kind = dist.RelaxedBernoulliStraightThrough

    def model():
        z = pyro.sample("z", kind(torch.tensor(0.7), probs=torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(1.0))

    guide = Held(lambda b: pyro.sample("z", kind(torch.tensor(0.7), logits=b)), 0.4)
    loss = dgm.STL_ELBO(8)
    assert "straight-through" in warned(loss, model, guide)
    torch.manual_seed(0)
    value = loss.differentiable_loss(model, guide)
    torch.manual_seed(0)
    plain = Trace_ELBO(8, vectorize_particles=True, max_plate_nesting=0).differentiable_loss(model, guide)
    assert torch.allclose(*(torch.autograd.grad(v, guide.b)[0] for v in (value, plain)))


@pytest.mark.parametrize("bound", [dgm.STL_ELBO, dgm.IWAE_ELBO])
def test_a_transform_that_model_and_guide_share(bound):
    """The inverse that the guide's second pass leaves behind has no parameters."""

    def make():
        t = T.affine_autoregressive(1)
        t.arn.layers[-1].bias.data.fill_(0.3)
        return t

    def run(shared, loss):
        torch.manual_seed(0)
        t = make()
        own = t if shared else T.affine_autoregressive(1)
        own.load_state_dict(t.state_dict())

        def model():
            with pyro.plate("d", 4):
                z = pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(1), 1.0).to_event(1), [own]))
                pyro.sample("x", dist.Normal(z[..., 0], 0.5), obs=X)

        def guide():
            with pyro.plate("d", 4):
                pyro.sample("z", dist.TransformedDistribution(dist.Normal(0.2 * torch.ones(1), 1.0).to_event(1), [t]))

        loss.differentiable_loss(model, guide)
        torch.manual_seed(1)
        value = loss.differentiable_loss(model, guide)
        grads = {id(f): torch.autograd.grad(value, f.arn.layers[-1].bias, retain_graph=True)[0] for f in {t, own}}
        return sum(grads.values())

    assert torch.allclose(run(True, bound(8)), run(False, bound(8)), atol=1e-4)


@pytest.mark.parametrize("bound", [dgm.STL_ELBO, dgm.IWAE_ELBO])
def test_a_saturated_transform_keeps_the_density_of_its_own_draws(bound):
    def model():
        with pyro.plate("d", 4):
            z = pyro.sample("z", dist.Uniform(-1.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=X)

    def body(b):
        with pyro.plate("d", 4):
            t = T.TanhTransform(cache_size=1)
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(b + 0.0 * X, 4.0), [t]))

    guide = Held(body, 4.0)
    with pyro.validation_enabled(False):
        said = warned(bound(32), model, guide)
        _, mean, _ = gradient(bound(32), model, guide, guide.b, 50)
    assert "another density" in said and math.isfinite(mean)


@pytest.mark.parametrize("kind", [AutoDiagonalNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("options", [{}, {"vectorize_particles": False}])
def test_iwae_of_a_joint_guide_weighs_whole_draws(kind, options):
    """Latents in the plate that only follow from one vector outside: K single runs, as in RenyiELBO."""

    def model():
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        with pyro.plate("d", 4):
            z = pyro.sample("z", dist.Normal(0.0, s))
            pyro.sample("x", dist.Normal(z, 0.5), obs=X)

    torch.manual_seed(0)
    guide = kind(model, init_scale=0.7)
    guide()
    loss, n = dgm.IWAE_ELBO(8, **options), 150
    assert loss.log_weights(model, guide).shape == (8,)
    right = RenyiELBO(alpha=0.0, num_particles=8)
    values = torch.tensor([[loss.loss(model, guide), right.loss(model, guide)] for _ in range(n)])
    noise = values.std(0).square().sum().sqrt() / n**0.5
    assert (values[:, 0] - values[:, 1]).mean().abs() < 4.0 * noise
    if not options:
        assert same_gradient(dgm.IWAE_ELBO(8), standard(8), model, guide, guide.loc, n)


def test_a_joint_guide_under_a_subsample_is_averaged():
    def model():
        with pyro.plate("d", 4, subsample_size=2) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=X[i])

    def guide():
        u = pyro.sample("u", dist.Normal(torch.zeros(4), 0.7).to_event(1), infer={"is_auxiliary": True})
        with pyro.plate("d", 4, subsample_size=2) as i:
            pyro.sample("z", dist.Delta((u[..., 0, :] if u.dim() > 1 else u)[..., i]))

    assert "averaged" in warned(dgm.IWAE_ELBO(8), model, guide)


def given_z_model(z=None):
    with pyro.plate("d", 4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
        pyro.sample("x", dist.Normal(z, 0.5), obs=X)


def given_z_guide(z=None):
    if z is None:
        with pyro.plate("d", 4):
            pyro.sample("z", dist.Normal(0.3, 0.8))


def test_draws_that_come_after_a_call_without_latents():
    fresh, used = dgm.IWAE_ELBO(16), dgm.IWAE_ELBO(16)
    labelled = used.loss(given_z_model, given_z_guide, X)
    for _ in range(2):
        torch.manual_seed(0)
        fresh_loss = fresh.loss(given_z_model, given_z_guide)
        torch.manual_seed(0)
        assert used.loss(given_z_model, given_z_guide) == pytest.approx(fresh_loss, abs=1e-5)
    assert used.loss(given_z_model, given_z_guide, X) == pytest.approx(labelled, abs=1e-4)


@pytest.mark.parametrize("bound", [dgm.STL_ELBO, dgm.IWAE_ELBO])
def test_another_pair_is_checked_anew(bound):
    def guide():
        pyro.sample("b", dist.Normal(torch.tensor([0.5, -0.3, 1.0]), 1.0).to_event(1))

    def model(summary):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("y", dist.Normal(summary(b), 0.5), obs=torch.tensor(1.0))

    def by_branch(b):
        return b.sum() if float(b.sum()) > 0.0 else -b.sum()

    models = [partial(model, f) for f in (lambda b: b.sum(-1), lambda b: b.mean(), by_branch, lambda b: b.sum(-1))]
    loss, how = bound(4), []
    for m in models:
        loss.loss(m, guide)
        how.append((loss._how, loss.num_particles, loss.vectorize_particles, loss.max_plate_nesting))
    alone = loss.fewest_alone or 4
    assert how == [
        ("plate", 4, True, 1),
        ("vmap", 4, True, 1),
        ("loop", min(alone, 4), False, 0),
        ("plate", 4, True, 1),
    ]


@pytest.mark.parametrize("bound", [dgm.STL_ELBO, dgm.IWAE_ELBO])
def test_a_parameter_that_is_trained_later(bound):
    """Uniform(0, b): while b is held its support stands still."""

    def model():
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 2.0)), 0.5), obs=torch.tensor(1.0))

    guide = Held(lambda b: pyro.sample("z", dist.Uniform(0.0, b)), 1.5)
    guide.c = torch.nn.Parameter(torch.tensor(0.0))
    guide.b.requires_grad_(False)
    used, grads = bound(8), []
    used.differentiable_loss(model, guide)
    guide.b.requires_grad_(True)
    for loss in (used, bound(8)):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(loss.differentiable_loss(model, guide), guide.b)[0])
    assert torch.allclose(*grads)


@pytest.mark.parametrize("make", [lambda m: AutoNormal(m), lambda m: dgm.AutoFlow(m)])
@pytest.mark.parametrize("bound", [dgm.STL_ELBO, dgm.IWAE_ELBO])
def test_a_used_bound_can_be_pickled(bound, make):
    loss, guide = bound(4), make(rows_model)
    loss.loss(rows_model, guide)
    other = pickle.loads(pickle.dumps(loss))
    values = []
    for one in (loss, other):
        torch.manual_seed(0)
        values.append(one.loss(rows_model, guide))
    assert values[0] == pytest.approx(values[1], abs=1e-5)
