"""STL_ELBO and IWAE_ELBO in the place of Pyro's Trace_ELBO and RenyiELBO: gradients for every guide, values for every program."""

import inspect
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam

import pyro_dgm as dgm
from pyro_dgm.objectives.path_gradient import support_moves
from tests.objectives.bound_pairs import (
    PAIRS,
    SILENT,
    copied,
    errors_apart,
    gradients,
    model,
    plain_iwae,
    prepared,
)
from tests.torch_versions import checks_priors_within_vmap

BOUNDS = [dgm.STL_ELBO, dgm.IWAE_ELBO]
DATA = torch.tensor([1.9, -0.6, 2.2, 0.4, -1.3, 1.1, 0.8, 3.0])


def said(work):
    """The messages of all warnings."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in record]


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_the_gradient_of_stl_is_that_of_trace_elbo(name):
    """Five errors of 30 repetitions of 200 draws. Planted faults: Deltas scored in the second run (AutoStructured, AutoGaussian,
    auxiliary, mixed); factors scored there; no support taken for moving (uniform, pareto, moved_bases, mixed): each is off by a
    constant, so by any number of errors; no views (the spline and AutoIAFNormal then have no path gradient).
    """
    program, guide, leaves = prepared(name)
    options = {"num_particles": 200, "vectorize_particles": True, "max_plate_nesting": 1}
    ours, theirs = dgm.STL_ELBO(**options), Trace_ELBO(**options)
    messages = said(lambda: ours.differentiable_loss(program, guide))
    plain = gradients(lambda: theirs.differentiable_loss(program, guide), leaves, 30)
    path = gradients(lambda: ours.differentiable_loss(program, guide), leaves, 30)
    assert errors_apart(path, plain) < 5.0
    assert bool([m for m in messages if "cannot be left out" in m]) == (name not in SILENT)
    has_path = name in SILENT - {
        "AutoDelta",
        "AutoLaplaceApproximation",
    }  # Pyro's transforms remember draws and densities
    assert not has_path or (path - plain).abs().max() > 1e-3
    assert not [m for m in messages if "not registered in the param store" in m]


@pytest.mark.parametrize("name", PAIRS)
def test_the_gradients_of_iwae_are_those_of_its_value(name):
    """200 copies of three draws each. Planted faults: Deltas that parameters place weighted twice (AutoDelta, AutoGuideList: a
    third of the gradient); supports that move, or transforms without inverse, do not fall back (63 to 150 errors, a KeyError).
    """
    program, guide, leaves = prepared(name)
    both = copied(program, 200), copied(guide, 200)
    found = {k: dgm.IWAE_ELBO(3, gradient=k, max_plate_nesting=2) for k in ("dreg", "standard")}
    messages = said(lambda: found["dreg"].differentiable_loss(*both))
    plain = gradients(lambda: plain_iwae(program, guide, 3, 200), leaves, 30)
    doubly = gradients(lambda: found["dreg"].differentiable_loss(*both) / 200, leaves, 30)
    standard = gradients(lambda: found["standard"].differentiable_loss(*both) / 200, leaves, 2)
    assert errors_apart(doubly, plain) < 5.0
    torch.testing.assert_close(standard, plain[:2], rtol=1e-4, atol=1e-5)
    assert bool([m for m in messages if "The whole bound gets the plain gradient" in m]) == (name not in SILENT)


def test_a_local_guide_that_reads_a_shared_draw_has_the_right_gradient():
    """mu once, z_i | mu three times. Planted fault: shared draws live in the local densities (40 errors off)."""
    names = {"loc": 0.3, "scale": -0.2, "slope": 0.9, "z_loc": 0.2, "z_scale": -0.4}
    leaves = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in names.items()}

    def rows():
        return pyro.plate("rows", 8, subsample=torch.arange(4), dim=-1)

    def program():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with rows():
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=DATA[:4])

    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.leaves = torch.nn.ParameterDict(leaves)

        def forward(self):
            mu = pyro.sample("mu", dist.Normal(leaves["loc"], leaves["scale"].exp()))
            with rows():
                pyro.sample("z", dist.Normal(leaves["slope"] * mu + leaves["z_loc"], leaves["z_scale"].exp()))

    def by_hand(copies=200, draws=3):
        loc, scale, slope, z_loc, z_scale = leaves.values()
        q, p = dist.Normal(loc, scale.exp()), dist.Normal(0.0, 1.0)
        mu = q.rsample((copies, 1))
        q_z = dist.Normal(slope * mu + z_loc, z_scale.exp())
        z = (slope * mu + z_loc) + z_scale.exp() * torch.randn(draws, copies, 4)
        log_w = dist.Normal(mu, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(DATA[:4]) - q_z.log_prob(z)
        local = 2.0 * (log_w.logsumexp(0) - math.log(draws)).sum(-1)
        return -(local + (p.log_prob(mu) - q.log_prob(mu)).squeeze(-1)).mean()

    both = copied(program, 200), copied(Guide(), 200)
    plain = gradients(by_hand, list(leaves.values()), 60)
    for kind in ("dreg", "standard"):
        bound = dgm.IWAE_ELBO(3, gradient=kind, max_plate_nesting=2)
        ours = gradients(lambda b=bound: b.differentiable_loss(*both) / 200, list(leaves.values()), 60)
        error = (ours.var(0) / 60 + plain.var(0) / 60).sqrt()
        assert ((ours.mean(0) - plain.mean(0)).abs() < 5.0 * error).all(), kind


def test_supports_that_move_are_told_from_those_that_do_not():
    p, T = torch.tensor(0.7, requires_grad=True), dist.transforms
    line, half, box = dist.Normal(0.0, 1.0), dist.Exponential(1.0), dist.Uniform(2.0, 5.0)
    affine, fixed = T.AffineTransform(p, p), T.AffineTransform(1.0, 2.0)

    def pushed(base, *transforms):
        return dist.TransformedDistribution(base, list(transforms))

    to_line = torch.distributions.biject_to(box.support).inv
    moving = [dist.Uniform(0.0, p), dist.Pareto(p, 1.0), pushed(box, affine), pushed(half, T.ExpTransform(), affine)]
    moving += [pushed(pushed(half, affine), T.ExpTransform()), dist.Uniform(p, 2.0).expand([3]).to_event(1).mask(True)]
    still = [
        dist.Uniform(0.0, p.detach()),
        pushed(line, affine, T.ExpTransform()),
        pushed(half, fixed),
        dist.Weibull(p, p),
    ]
    still += [
        dist.LogNormal(p, p),
        dist.Gumbel(p, p),
        dist.Kumaraswamy(p, p),
        pushed(
            dist.Uniform(torch.tensor(0.0), torch.tensor(1.0)), fixed
        ),  # ends that are tensors, onto a set without ends
        pushed(box, to_line, affine, to_line.inv),
    ]
    assert [support_moves(d) for d in moving] == [True] * len(moving)
    assert [support_moves(d) for d in still] == [False] * len(still)


# --- guides without latents, sequential plates -----------------------------------------------------------------------


def coin():
    p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
    with pyro.plate("n", 4):
        pyro.sample("x", dist.Bernoulli(p), obs=torch.tensor([1.0, 1, 1, 0]))


def product_coin():
    """A likelihood that does not broadcast."""
    weights = pyro.param("w", torch.tensor([0.5, 0.2]))
    pyro.sample("x", dist.Normal((torch.eye(2) @ weights)[0], 1.0), obs=torch.tensor(1.0))


def factors():
    pyro.factor("f", pyro.param("p", torch.tensor(0.5)) * 3.0)


def empty():
    pass


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("program", [coin, product_coin, factors, empty])
def test_without_latents_the_loss_is_that_of_trace_elbo(bound, program):
    losses = []
    for loss in (Trace_ELBO(), bound(), bound(5, vectorize_particles=False), bound(1)):
        pyro.clear_param_store()
        svi = SVI(program, empty, Adam({"lr": 0.1}), loss)
        losses.append([svi.step() for _ in range(3)])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-5)


def in_turn(size, *, observe):
    """mu ~ N(0, 1) and rows x_i ~ N(mu, 1), one after the other."""

    def run():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0) if observe else dist.Normal(0.5, 0.6))
        for i in pyro.plate("n", len(DATA), size) if observe else ():
            pyro.sample(f"x_{i}", dist.Normal(mu, 1.0), obs=DATA[int(i)])

    return run


def at_once():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(DATA), 2) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=DATA[index])


def local_in_turn(locs):
    def run():
        for i in pyro.plate("n", 3, 2):
            pyro.sample(f"x_{i}", dist.Normal(locs(), 1.0))

    return run


def evidence():
    return dist.MultivariateNormal(torch.zeros(8), torch.eye(8) + 1.0).log_prob(DATA).item()


def repeated(loss, times):
    values = []
    for seed in range(times):
        pyro.set_rng_seed(seed)
        values.append(loss())
    values = torch.tensor(values)
    return values.mean().item(), (values.std() / times**0.5).item()


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("local", [True, False])
def test_stl_gives_trace_elbos_number_where_a_sequential_plate_is_subsampled(vectorize, local):
    """The same seeds give the same subsamples and draws."""
    pair = (in_turn(2, observe=True), in_turn(2, observe=False))
    if local:
        pair = (local_in_turn(lambda: 0.0), local_in_turn(lambda: pyro.param("m", torch.tensor(0.5))))
    options = {"num_particles": 20, "vectorize_particles": vectorize, "max_plate_nesting": 0}
    ours, theirs = dgm.STL_ELBO(**options), Trace_ELBO(**options)
    for seed in range(6):
        pyro.set_rng_seed(seed)
        expected = theirs.loss(*pair)
        pyro.set_rng_seed(seed)
        assert ours.loss_and_grads(*pair) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("program", [in_turn(2, observe=True), at_once])
def test_iwae_with_a_subsample_of_observations_only_is_the_elbo_and_no_more_than_the_evidence(program):
    """Planted fault: the scale within the logarithm (2.4 nats above the evidence)."""
    guide, bound = in_turn(2, observe=False), dgm.IWAE_ELBO(50)
    messages = said(lambda: bound.loss(program, guide))
    assert len([m for m in messages if "plate 'n' is subsampled" in m and "the ELBO with 50 draws" in m]) == 1
    assert not said(lambda: bound.loss(program, guide))
    value, error = repeated(lambda: -bound.loss(program, guide), 300)
    elbo, elbo_error = repeated(lambda: -Trace_ELBO(50).loss(in_turn(None, observe=True), guide), 20)
    assert value < evidence() + 3 * error and abs(value - elbo) < 4 * math.hypot(error, elbo_error)


def test_iwae_with_latents_in_a_subsampled_sequential_plate_is_the_elbo():
    """Minus three halves of 0.25, whichever two rows: all log weights have this mean, and the evidence is zero."""
    pair, bound = (local_in_turn(lambda: 0.0), local_in_turn(lambda: 0.5)), dgm.IWAE_ELBO(20)
    assert [m for m in said(lambda: bound.loss(*pair)) if "plate 'n' is subsampled" in m]
    value, error = repeated(lambda: bound.loss(*pair), 100)
    assert abs(value - 0.375) < 4 * error


def test_a_whole_sequential_plate_is_one_unit():
    program, guide = in_turn(None, observe=True), in_turn(None, observe=False)
    bound = dgm.IWAE_ELBO(50)
    assert not [m for m in said(lambda: bound.loss(program, guide)) if "subsampled" in m]
    value, error = repeated(lambda: -bound.loss(program, guide), 60)
    elbo, _ = repeated(lambda: -dgm.IWAE_ELBO(1).loss(program, guide), 100)
    assert elbo + 0.2 < value < evidence() + 3 * error and evidence() - value < 0.1


# --- programs that do not broadcast ----------------------------------------------------------------------------------


class Regression(PyroModule):
    """The Bayesian layer of Pyro's tutorial."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("n", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def branched(x, y):
    """A value decides what runs."""
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    c = pyro.sample("c", dist.Normal(0.0, 1.0))
    mean = x @ b + c if b[0] > -100.0 else x[:, 0]
    with pyro.plate("n", len(x)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.parametrize("program", [Regression, lambda: branched])
def test_iwae_runs_models_that_do_not_broadcast(program):
    """The evidence of a linear regression is known; both ways to run it give the plain gradient."""
    torch.manual_seed(0)
    program, (x, y) = program(), torch.randn(2, 6, 3).unbind(0)
    y = y[:, 0]
    exact = dist.MultivariateNormal(torch.zeros(6), x @ x.T + 1.0 + torch.eye(6)).log_prob(y).item()
    guide, bound = autoguide.AutoNormal(program, init_scale=0.4), dgm.IWAE_ELBO(20)
    messages = said(lambda: bound.loss(program, guide, x, y))
    slow = program is branched or not checks_priors_within_vmap()
    assert any("cannot run many draws at once" in m for m in messages) == slow
    assert not said(lambda: bound.loss(program, guide, x, y))
    value, error = repeated(lambda: -bound.loss(program, guide, x, y), 30)
    assert exact - 1.5 < value < exact + 3 * error
    leaves, found = list(guide.parameters()), {}
    for gradient in ("dreg", "standard"):
        bound = dgm.IWAE_ELBO(3, gradient=gradient, vectorize_particles=program is not branched)
        found[gradient] = gradients(lambda b=bound: b.differentiable_loss(program, guide, x, y), leaves, 120)
    assert errors_apart(found["dreg"], found["standard"]) < 5.0


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_guide_that_mixes_draws_runs_them_one_by_one(bound):
    """In a plate ``b[0]`` is the first draw, not the first entry. Planted fault: only the model is checked."""

    def program():
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("c", dist.Normal(b.sum(-1), 1.0))

    def guide():
        b = pyro.sample("b", dist.Normal(torch.tensor([0.5, -0.3]), 0.8).to_event(1))
        pyro.sample("c", dist.Normal((2.0 * b)[0].sum(-1), 1.0))

    loss = bound(10)
    assert [m for m in said(lambda: loss.loss(program, guide)) if "cannot run many draws at once" in m]
    if bound is dgm.STL_ELBO:
        value, error = repeated(lambda: loss.loss(program, guide), 200)
        expected, other = repeated(lambda: Trace_ELBO(10).loss(program, guide), 200)
        assert abs(value - expected) < 4 * math.hypot(error, other)


# --- options, seeds, refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", BOUNDS)
def test_all_keywords_of_trace_elbo_are_taken_and_kept(bound):
    assert set(inspect.signature(Trace_ELBO).parameters) <= set(inspect.signature(bound).parameters)
    guide = autoguide.AutoNormal(model)
    kept, dropped = bound(4, retain_graph=True), bound(4, retain_graph=False)
    assert kept.retain_graph is True and dropped.retain_graph is False
    alone = bound(4, vectorize_particles=False, jit_options={"optimize": None}, ignore_jit_warnings=True)
    runs = []
    alone.loss(lambda: (runs.append(1), model())[1], guide)
    assert len(runs) >= 4 and alone.num_particles == 4 and alone.jit_options == {"optimize": None}
    with pytest.warns(DeprecationWarning):
        assert bound(1, max_iarange_nesting=2).max_plate_nesting == 2


@pytest.mark.parametrize("bound", BOUNDS)
def test_retain_graph_is_honoured(bound):
    data = torch.tensor(1.0, requires_grad=True)
    outside = data.exp()  # its graph is shared by two backward passes

    def program():
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=outside)

    def guide():
        pyro.sample("z", dist.Normal(0.1, 1.0))

    loss = bound(3, retain_graph=True)
    for _ in range(2):
        loss.loss_and_grads(program, guide)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        for _ in range(2):
            bound(3).loss_and_grads(program, guide)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(
    "name", ["AutoNormal", "AutoFlow", "AutoGaussian", "AutoHierarchicalNormalMessenger", "in_turn", "by_row"]
)
@pytest.mark.parametrize("options", [{}, {"num_particles": 1}, {"vectorize_particles": False, "num_particles": 3}])
def test_a_first_call_takes_no_random_numbers_of_its_own(bound, name, options):
    """A new guide and a new bound, then both again. Planted fault: the shared draw of IWAE_ELBO outside of the fork."""
    program, make = PAIRS[name]
    guide, loss, values = make(), bound(**options), []
    for _ in range(2):
        pyro.set_rng_seed(3)
        values.append(loss.loss_and_grads(program, guide))
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    if isinstance(guide, torch.nn.Module):
        assert list(guide.parameters()) and all(p.grad is not None for p in guide.parameters())


def test_a_factor_without_reparameterised_draws_is_refused():
    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", pyro.param("p", torch.tensor(0.5)), has_rsample=False)

    with pytest.raises(ValueError, match="guide site 'f' .Unit. is not reparameterised"):
        dgm.STL_ELBO(4)(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), guide)()
