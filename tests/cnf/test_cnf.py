"""Continuous flows: fields against autograd, the solver and its guards, costs, training, and their places in Pyro."""

import copy
import functools
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.distributions import constraints

import pyro_dgm as dgm
from pyro_dgm.cnf import BlackBoxField, Plan, PotentialField, SolverError, SumField, TwoLayerField, VectorField
from tests.compat_cells import DATA, EVIDENCE, conjugate


class Net(nn.Module):
    """A user's field."""

    def __init__(self, features, context_features=0, activation=nn.Tanh):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1 + features + context_features, 8), activation(), nn.Linear(8, features))

    def forward(self, t, x, *context):
        return self.net(torch.cat([t, x, *context], -1))


FIELDS = {
    "two-layer": lambda D, C: TwoLayerField(D, C, 8),
    "sum": lambda D, C: SumField(TwoLayerField(D, C, 8), TwoLayerField(D, C, 4)),
    "potential": lambda D, C: PotentialField(D, C, 8),
    "black box": lambda D, C: BlackBoxField(Net(D, C), D, C),
}


# --- fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [0, 3])
@pytest.mark.parametrize("name", FIELDS)
def test_the_divergence_is_the_trace_of_the_jacobian(name, C):
    """In float64 to 1e-10, for a batch of contexts. Planted fault: the first gate left out of the divergence."""
    field = FIELDS[name](3, C).double()
    x, context, t = torch.randn(4, 3).double(), torch.randn(4, C).double() if C else None, torch.tensor(0.3).double()
    rates = field.bind(context)(t, x)
    for i in range(4):
        c = None if context is None else context[i]
        jacobian = torch.autograd.functional.jacobian(lambda y: field.bind(c)(t, y).velocity, x[i])
        torch.testing.assert_close(rates.divergence[i], jacobian.trace(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(field.velocity(t.expand(4, 1), x, context), rates.velocity)


def test_the_hamilton_jacobi_rate_is_the_potentials_derivative_in_time():
    """grad_x of dPhi/dt equals d/dt of grad Phi; a residual of the wrong sign of time would differ."""
    field = PotentialField(3, 2, 8).double()
    x, c, t = torch.randn(5, 3).double().requires_grad_(), torch.randn(5, 2).double(), torch.tensor(0.4).double()
    from pyro_dgm.cnf.field import time_features

    b, w, _, _ = field._split(field.time(time_features(t)), field.context(c))
    z = x @ field.ridges.mT + b
    rate = field._rate(t, x, z, w * torch.tanh(z))
    (of_rate,) = torch.autograd.grad(rate.sum(), x)
    h = 1e-5
    moved = [field.velocity((t + s).expand(5, 1), x, c) for s in (h, -h)]
    torch.testing.assert_close(of_rate, -(moved[0] - moved[1]) / (2 * h), atol=1e-7, rtol=1e-6)
    residual = field.bind(c, Plan(hjb=True))(t, x).hjb
    torch.testing.assert_close(residual, (rate - 0.5 * field.velocity(t.expand(5, 1), x, c).square().sum(-1)).abs())


def test_random_probes_are_fixed_in_a_solve_and_unbiased():
    """Mean of 300 scores within 5 errors of the exact one. Planted fault: probes summed instead of averaged."""
    flow = dgm.FFJORD(3, field=Net(3), trace="hutchinson", probes=2, steps=4)
    exact = dgm.FFJORD(3, field=flow.field.module, steps=4)
    x = torch.randn(3)
    with torch.no_grad():
        scores = flow().log_prob(x.expand(300, 3))
    assert scores.std() > 0 and flow.solver_error(x[None]) < 0.1 * scores.std()
    assert abs(scores.mean() - exact().log_prob(x)) < 5 * scores.std() / 300**0.5
    probe = flow.field.probe(x.expand(2, 3))
    motion, t = flow.field.bind(None, Plan(probe=probe)), torch.tensor(0.5)
    assert probe.shape == (2, 2, 3) and torch.equal(motion(t, x.expand(2, 3))[1], motion(t, x.expand(2, 3))[1])


def test_bad_fields_are_refused():
    with pytest.raises(ValueError, match=r"field has \(features, context_features\) = \(3, 0\), expected \(2, 0\)"):
        dgm.FFJORD(2, field=TwoLayerField(3))
    with pytest.raises(ValueError, match="SumField: expected one or more fields over the same points"):
        SumField(TwoLayerField(3), TwoLayerField(2))
    with pytest.raises(ValueError, match="trace='some': expected 'exact'"):
        dgm.FFJORD(2, field=Net(2), trace="some")
    with pytest.raises(ValueError, match="probes=0"):
        dgm.FFJORD(2, field=Net(2), trace="hutchinson", probes=0)

    class Narrow(nn.Module):
        def forward(self, t, x):
            return x[..., :1]

    with pytest.raises(ValueError, match=r"Narrow as a field: returned shape \(5, 1\)"):
        dgm.FFJORD(2, field=Narrow())().log_prob(torch.zeros(5, 2))
    with pytest.warns(UserWarning, match="divergence that jumps"):
        dgm.FFJORD(2, field=Net(2, activation=nn.SELU))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dgm.FFJORD(2, field=Net(2, activation=nn.Softplus))


# --- solver ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, order", [("rk4", 4), ("midpoint", 2)])
def test_the_error_falls_with_the_order_of_the_method(method, order):
    """16 against 32 steps, in float64, against dopri8 at 1e-10; a wrong time in a stage costs the order."""
    tight = dgm.FFJORD(2, 1, method="dopri8", tolerance=1e-10).double()
    x, c = torch.randn(20, 2).double(), torch.randn(20, 1).double()
    errors = []
    for steps in (16, 32):
        flow = dgm.FFJORD(2, 1, method=method, steps=steps).double()
        flow.field = tight.field
        errors.append((flow(c).log_prob(x) - tight(c).log_prob(x)).abs().mean().item())
    assert order - 0.6 < math.log2(errors[0] / errors[1]) < order + 1.0
    assert flow.solver_error(x, c).mean() == pytest.approx(errors[1], rel=0.5)


def test_a_draw_and_its_density_take_one_solve():
    """Evaluations, not time: 4 a step. Also through to_event, where Pyro asks for draw and density separately."""
    flow = dgm.FFJORD(2, steps=5)
    q, count = flow(), flow.solver.evaluations
    q.log_prob(q())
    assert count.forward == 20
    many = flow().expand([3]).to_event(1)
    many.log_prob(many())
    assert count.forward == 40
    flow().log_prob(torch.zeros(4, 2)).sum().backward()
    assert (count.forward, count.backward) == (60, 20)
    assert repr(count) == "Evaluations(forward=60, backward=20)"
    count.reset()
    assert (count.forward, count.backward) == (0, 0)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_the_adjoint_has_the_gradients_of_backpropagation(method):
    """For parameters, context and value; a context outside the adjoint's list would get none, silently."""
    plain = dgm.FFJORD(2, 3, hidden_features=8, method=method, steps=30, tolerance=1e-8).double()
    adjoint = dgm.FFJORD(2, 3, hidden_features=8, method=method, steps=30, tolerance=1e-8, adjoint=True).double()
    adjoint.load_state_dict(plain.state_dict())
    grads = []
    for flow in (plain, adjoint):
        x, c = torch.ones(4, 2).double().requires_grad_(), torch.full((4, 3), 0.3).double().requires_grad_()
        loss = flow(2.0 * c).log_prob(x).sum()
        grads.append(torch.autograd.grad(loss, [x, c, *flow.parameters()]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert adjoint.solver.evaluations.backward > 0


def test_sampled_weights_of_a_bayesian_field():
    """A sampled weight gets its gradient by backpropagation; the adjoint, which would draw it anew, is refused."""
    for adjoint in (False, True):
        flow = dgm.FFJORD(2, hidden_features=4, adjoint=adjoint)
        to_pyro_module_(flow)
        weight = flow.field.third.detach().clone().requires_grad_()
        flow.field.third = PyroSample(dist.Normal(0.0, 1.0).expand([2, 4]).to_event(2))
        with pyro.poutine.trace(), pyro.poutine.condition(data={"field.third": weight}):
            q = flow()
            if adjoint:
                with pytest.raises(ValueError, match="FFJORD: adjoint=True with sampled weights"):
                    q.log_prob(torch.ones(2))
            else:
                (slope,) = torch.autograd.grad(q.log_prob(torch.ones(2)), weight)
                assert slope.abs().min() > 0


@pytest.mark.parametrize("make", [dgm.FFJORD, dgm.OTFlow, lambda D: dgm.FFJORD(D, field=Net(D))])
def test_second_derivatives_and_eval_mode(make):
    """The Hessian against differences of gradients, in float64; eval() changes nothing."""
    flow, x = make(2).double().eval(), torch.tensor([0.3, -0.5]).double()
    hessian = torch.autograd.functional.hessian(lambda y: flow().log_prob(y), x)
    slope = lambda y: torch.autograd.functional.jacobian(lambda z: flow().log_prob(z), y)
    step = 1e-5 * torch.eye(2).double()
    differences = torch.stack([(slope(x + s) - slope(x - s)) / 2e-5 for s in step])
    torch.testing.assert_close(hessian, differences, atol=1e-5, rtol=1e-4)
    flow().log_prob(x).backward()
    evaluated = [p.grad.clone() for p in flow.parameters()]
    flow.train().zero_grad()
    flow().log_prob(x).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(flow.parameters(), evaluated, strict=True))


def test_a_density_does_not_depend_on_its_neighbours():
    """Alone, and beside an outlier at 100; an adaptive solver changes its steps there."""
    flow = dgm.FFJORD(2)
    x = torch.randn(64, 2)
    x[-1] = 100.0
    with torch.no_grad():
        together, alone = flow().log_prob(x), torch.cat([flow().log_prob(row[None]) for row in x])
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_what_cannot_be_solved_is_a_named_error_at_once(method):
    flow = dgm.FFJORD(2, method=method, max_nfe=200)
    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="FFJORD: the value holds 2 NaN or infinite entries"):
            flow().log_prob(torch.full((1, 2), torch.nan))
    with pytest.raises(ValueError, match="NaN entries: 1"):
        flow().log_prob(torch.tensor([[torch.nan, 0.0]]))
    stiff = copy.deepcopy(flow)
    with torch.no_grad():
        flow.field.third.fill_(torch.nan)
        stiff.field.third.mul_(1e5)
        stiff.solver.steps.fill_(64)
    with pytest.raises(SolverError, match="FFJORD: .*Usual causes: a diverged training"):
        flow().log_prob(torch.zeros(3, 2))
    with pytest.raises(SolverError, match="more than max_nfe=200 evaluations of the field"):
        stiff().log_prob(torch.randn(3, 2))
    with pytest.raises(TypeError, match="FFJORD: parameters are torch.bfloat16; an ODE needs float32"):
        dgm.FFJORD(2).bfloat16()()


def test_bad_solvers_are_refused():
    with pytest.raises(ValueError, match="FFJORD: method='rk5', expected one of euler"):
        dgm.FFJORD(2, method="rk5")
    with pytest.raises(ValueError, match="OTFlow: steps=0, expected a whole number >= 1"):
        dgm.OTFlow(2, steps=0)
    with pytest.raises(ValueError, match="solver_error compares fixed grids"):
        dgm.FFJORD(2, method="dopri5").solver_error(torch.zeros(1, 2))


def test_a_fit_skips_steps_whose_equation_has_no_solution():
    """A SolverError in a step counts as a NaN loss, from which fit recovers."""

    class Failing(dgm.MaximumLikelihood):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 5:
                raise SolverError("planted")
            return super().forward(x)

    objective = Failing(dgm.FFJORD(2, hidden_features=4), pretrain=0)
    history = dgm.fit(objective, (torch.randn(20, 2),), max_steps=6, validation=0, progress=False)
    assert len(history.skipped) == 1 and history.steps == 6


# --- steps -----------------------------------------------------------------------------------------------------------


def test_steps_follow_the_error():
    """n (error / target)^(1/4), within limits; a given number of steps is never changed."""
    solver = dgm.FFJORD(2).solver
    for error, expected in ((1e-2, 9), (1.6e-1, 18), (1e-5, 14), (math.nan, 28), (10.0, 56), (1e9, 64)):
        solver.adapt(error, 1e-2)
        assert int(solver.steps) == expected
    flow = dgm.FFJORD(2, steps=7)
    flow().log_prob(torch.randn(9, 2)).sum().backward()
    flow.finish()
    assert int(flow.solver.steps) == 7


@pytest.mark.parametrize(
    "scale, steps, error", [(1.0, range(4, 25), 1e-4), (2.0, [25], 1e-3), (2.5, range(26, 65), 1e-3)]
)
def test_trained_flows_finish_at_100_evaluations_unless_accuracy_asks_for_more(scale, steps, error):
    """Planted fault: a limit of 25 steps whatever the error is (the steepest field would be 2e-2 off)."""
    torch.manual_seed(0)
    flow, x = dgm.FFJORD(2, hidden_features=8), torch.randn(200, 2)
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(scale)
    flow().log_prob(x).sum().backward()
    flow.finish()
    assert int(flow.solver.steps) in steps
    assert flow.solver_error(x).quantile(0.95) < error


@pytest.mark.parametrize("fused", [False, True])
def test_steps_are_watched_under_every_optimiser(fused):
    """A fused kernel does not count its changes by itself. Planted fault: without that count n stays at 8 for ever."""
    torch.manual_seed(0)
    flow, x = dgm.FFJORD(2, hidden_features=8), torch.randn(50, 2)
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(2.5)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-6, fused=fused)
    q = flow()
    before = q.log_prob(x)
    for _ in range(45):
        optimizer.zero_grad()
        (-flow().log_prob(x).mean()).backward()
        optimizer.step()
    assert int(flow.solver.steps) > 8
    with torch.no_grad():
        flow.field.third.add_(1.0)
    assert not torch.equal(q.log_prob(x), before)


def test_steps_are_watched_while_parameters_change_and_only_then():
    flow, x = dgm.FFJORD(2, hidden_features=8), torch.randn(50, 2)
    flow().log_prob(x).sum().backward()
    begun = int(flow.solver.steps)
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(2.5)
    for _ in range(40):
        flow().log_prob(x)
    assert int(flow.solver.steps) == begun  # one change
    for _ in range(25):
        with torch.no_grad():
            flow.field.third.mul_(1.0)
        flow().log_prob(x)
    assert int(flow.solver.steps) > begun
    flow.finish()
    assert flow.solver_error(x).mean() < 1e-3
    other = dgm.FFJORD(2, hidden_features=8)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other().log_prob(x), flow().log_prob(x))
    assert torch.equal(pickle.loads(pickle.dumps(flow))().log_prob(x), flow().log_prob(x))


# --- costs and training ----------------------------------------------------------------------------------------------


class Stretch(VectorField):
    """v = r x: everything is known."""

    def __init__(self, features, rate):
        super().__init__(features)
        self.rate = nn.Parameter(torch.tensor(rate))

    def bind(self, context, plan=None):
        return lambda t, x: dgm.cnf.Rates(self.rate * x, self.features * self.rate.expand(x.shape[:-1]))

    def velocity(self, time, x, context):
        return self.rate * x

    def start_at_rest(self):
        nn.init.zeros_(self.rate)


def test_costs_and_density_of_a_known_flow():
    """x(t) = x e^{r (t - 1)}: density N(0, e^{2r}), and all costs in closed form. Planted fault: the sign of time."""
    r, flow = 0.7, dgm.FFJORD(2, field=Stretch(2, 0.7), steps=20)
    x = torch.randn(30, 2)
    score, costs = flow.score_and_costs(x, None, ["transport", "kinetic"])
    torch.testing.assert_close(score, dist.Normal(0.0, math.exp(r)).log_prob(x).sum(-1), atol=1e-5, rtol=1e-5)
    length = r * r * x.square().sum(-1) * (1 - math.exp(-2 * r)) / (2 * r)
    torch.testing.assert_close(costs, torch.stack([length / 2, length / 2], -1), atol=1e-5, rtol=1e-4)
    _, jacobian = flow.score_and_costs(x[:1].expand(4000, 2), None, ["jacobian"])  # r^2 |e|^2 / D, of mean r^2
    assert abs(jacobian.mean() - r * r) < 5 * jacobian.std() / 4000**0.5
    loss = dgm.MaximumLikelihood(flow, transport=2.0, kinetic=0.0)(x)
    torch.testing.assert_close(loss, -score.mean() + length.mean(), atol=1e-5, rtol=1e-4)
    assert loss.requires_grad


def test_the_jacobian_cost_has_gradients_for_parameters():
    flow = dgm.OTFlow(2, hidden_features=8, steps=3)
    dgm.MaximumLikelihood(flow, transport=0.1, hjb=0.1, jacobian=0.1)(torch.randn(9, 2)).backward()
    assert all(p.grad.abs().sum() > 0 for p in flow.parameters())


@pytest.mark.parametrize("path, least", [("linear", math.pi / 2), ("vp", math.pi**2 / 4)])
def test_flow_matching_reaches_its_least_value_on_normal_data(path, least):
    """Normal data: the best field is known, linear (2t - 1) x / (t^2 + (1-t)^2), vp 0, and so is the loss there."""

    class Best(Stretch):
        def velocity(self, time, x, context):
            return 0.0 * x if path == "vp" else (2 * time - 1) * x / (time**2 + (1 - time) ** 2)

    objective = dgm.FlowMatching(dgm.FFJORD(2, field=Best(2, 0.0)), path)
    losses = torch.stack([objective(torch.randn(1000, 2)) for _ in range(50)])
    assert abs(losses.mean() - least) < 5 * losses.std() / 50**0.5


def test_coupling_shortens_paths_and_keeps_the_noise():
    from pyro_dgm.cnf.matching import _matched

    noise, data = torch.randn(100, 2), 3.0 * torch.randn(100, 2)
    matched = _matched(noise, data)
    assert (matched - data).square().sum() < 0.6 * (noise - data).square().sum()
    torch.testing.assert_close(matched[:64].sort(0)[0], noise[:64].sort(0)[0])
    loss = dgm.FlowMatching(dgm.FFJORD(2, field=Stretch(2, 0.0)), coupling="ot")(data)
    assert loss < dgm.FlowMatching(dgm.FFJORD(2, field=Stretch(2, 0.0)))(data)


def test_objectives_refuse_what_does_not_fit():
    cnf, conditional = dgm.FFJORD(2, hidden_features=4), dgm.FFJORD(2, 3, hidden_features=4)
    with pytest.raises(TypeError, match="RealNVP has no velocity field"):
        dgm.FlowMatching(dgm.RealNVP(2))
    with pytest.raises(ValueError, match="path='curve'"):
        dgm.FlowMatching(cnf, path="curve")
    with pytest.raises(ValueError, match="coupling='some'"):
        dgm.FlowMatching(cnf, coupling="some")
    with pytest.raises(ValueError, match="with a context biases the conditional densities of FFJORD"):
        dgm.FlowMatching(conditional, coupling="ot")
    with pytest.raises(ValueError, match="expected a finite number >= 0"):
        dgm.MaximumLikelihood(cnf, transport=-1.0)
    with pytest.raises(ValueError, match="transport weigh the paths of a continuous flow; RealNVP has none"):
        dgm.MaximumLikelihood(dgm.RealNVP(2), transport=1.0)
    with pytest.raises(ValueError, match="hjb needs the potential of an OTFlow"):
        dgm.MaximumLikelihood(cnf, hjb=1.0)
    with pytest.raises(ValueError, match=r"no path cost \['length'\]"):
        cnf.score_and_costs(torch.zeros(1, 2), None, ["length"])
    for objective in (dgm.FlowMatching, dgm.MaximumLikelihood):
        with pytest.raises(ValueError, match=r"data have shape \(5, 3\), expected \(N, 2\)"):
            objective(cnf)(torch.zeros(5, 3))
        with pytest.raises(ValueError, match="no context given, expected shape .* build FFJORD"):
            objective(conditional)(torch.zeros(5, 2))
        with pytest.raises(ValueError, match="are x and context swapped"):
            objective(conditional)(torch.zeros(5, 3), torch.zeros(5, 2))
        with pytest.raises(ValueError, match=r"Build it with FFJORD\(..., context_features=4\)"):
            objective(cnf)(torch.zeros(5, 2), torch.zeros(5, 4))
        with pytest.raises(ValueError, match="A mask is no context"):
            objective(cnf)(torch.zeros(5, 2), torch.ones(5, 2, dtype=torch.bool))
        with pytest.raises(ValueError, match="1 of 5 rows hold NaN or infinity"):
            objective(cnf)(torch.tensor([[0.0, 1.0]] * 4 + [[math.inf, 0.0]]))


def ring(n):
    """A ring: a density with a hole, of known entropy."""
    angle = 2 * math.pi * torch.rand(n)
    radius = 3.0 + 0.3 * torch.randn(n)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1) + torch.tensor([10.0, 0.0])


RING = 0.5 * math.log(2 * math.pi * math.e * 0.09) + math.log(2 * math.pi * 3.0) - 0.5 * 0.01  # to 1e-3


def test_the_default_recipe_learns_a_ring():
    """One call: units, flow matching, likelihood, steps. The gap to the entropy, accuracy and number of evaluations."""
    flow, x, held = dgm.FFJORD(2, hidden_features=32), ring(4000), ring(2000)
    history = dgm.fit(
        dgm.MaximumLikelihood(flow, pretrain=600), (x,), batch_size=256, max_steps=60, progress=False, seed=0
    )
    with torch.no_grad():
        score = -flow().log_prob(held)
    assert abs(score.mean() - RING) < 0.1 + 5 * score.std() / 2000**0.5
    assert flow.solver_error(held).mean() < 1e-3 and 4 * int(flow.solver.steps) <= 130
    z, _, _ = flow.solve(flow.flow_units(held), None)
    back, _, _ = flow.solve(z, None, sampling=True)
    assert (back - flow.flow_units(held)).abs().mean() < 1e-3
    assert history.steps == 60
    loc = flow.standard.loc.clone()
    dgm.fit(dgm.MaximumLikelihood(flow), (x[:500] + 5.0,), max_steps=1, progress=False)
    assert torch.equal(flow.standard.loc, loc)  # it has units


def test_a_trained_family_keeps_its_units_and_a_discrete_flow_gets_some():
    x = ring(500)
    flow = dgm.RealNVP(2)
    dgm.fit(dgm.MaximumLikelihood(flow), (x,), max_steps=1, validation=0, progress=False)
    torch.testing.assert_close(flow.standard.loc, x.mean(0))
    exact = dgm.FFJORD(2, field=Stretch(2, 0.0))
    dgm.fit(dgm.MaximumLikelihood(exact, pretrain=5), (0.02 * torch.randn(500, 2),), max_steps=1, progress=False)
    assert not exact.standard.is_identity()
    trained = dgm.FFJORD(
        2, field=Stretch(2, math.log(0.02))
    )  # scores these data better than the standard normal's units
    dgm.fit(dgm.MaximumLikelihood(trained, pretrain=5), (0.02 * torch.randn(500, 2),), max_steps=1, progress=False)
    assert trained.standard.is_identity()


@pytest.mark.parametrize("event, support", [((2, 2), None), ((2,), constraints.positive), ((3,), constraints.simplex)])
def test_events_of_any_shape_on_any_support(event, support):
    flow = dgm.FFJORD(event, 1, support=support, hidden_features=8)
    q = flow(torch.randn(3, 1))
    x, joint = q.rsample_and_log_prob((5,))
    assert x.shape == (5, 3, *event) and q.support.check(x).all()
    torch.testing.assert_close(q.log_prob(x.clone()), joint, atol=2e-3, rtol=1e-3)
    rows, context = x.reshape(15, *event).detach(), torch.randn(15, 1)
    score, _ = flow.score_and_costs(rows, context, ["kinetic"])
    torch.testing.assert_close(score, flow(context).log_prob(rows))
    assert flow.solver_error(rows, context).shape == (15,) and dgm.FlowMatching(flow)(rows, context) > 0


# --- in Pyro ---------------------------------------------------------------------------------------------------------


def test_guide_by_autoflow_with_path_gradients():
    """On the conjugate model the start is exact, and there the path gradient of every draw vanishes.

    Planted fault: the second pass scored with the remembered density (its gradient is then of order 1).
    """
    guide = dgm.AutoFlow(conjugate, functools.partial(dgm.FFJORD, hidden_features=8))
    elbo = dgm.STL_ELBO()(conjugate, guide)
    history = dgm.fit(elbo, (DATA,), max_steps=3, progress=False, seed=0)
    assert abs(history.loss[-1] + EVIDENCE) < 0.01
    elbo(DATA).backward()
    assert max(p.grad.abs().max() for p in guide.parameters()) < 0.02
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(8, vectorize_particles=True))
    assert abs(svi.step(DATA) + EVIDENCE) < 0.1
    x = torch.randn(4, 2)
    transform = guide.get_transform()
    torch.testing.assert_close(transform.inv(transform(x)), x, atol=1e-4, rtol=1e-3)  # what NeuTra needs


class FlowPrior(PyroModule):
    def __init__(self):
        super().__init__()
        self.flow = dgm.FFJORD(2, hidden_features=8, steps=3)

    def forward(self, x=None):
        z = pyro.sample("z", self.flow())
        with pyro.plate("data", len(DATA)):
            return pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def test_prior_under_nuts_laplace_and_svi():
    """NUTS against an importance sum; Laplace needs second derivatives."""
    model = FlowPrior()
    z = 1.5 * torch.randn(4000, 2)
    with torch.no_grad():
        likelihood = dist.Normal(z[:, None], 0.5).log_prob(DATA).sum((1, 2))
        weights = (model.flow().log_prob(z) + likelihood - dist.Normal(0.0, 1.5).log_prob(z).sum(-1)).softmax(0)
    mean = weights @ z
    kernel = NUTS(model, step_size=0.15, adapt_step_size=False, adapt_mass_matrix=False, max_tree_depth=4)
    mcmc = MCMC(kernel, num_samples=40, warmup_steps=5, disable_progbar=True)
    mcmc.run(DATA)
    draws = mcmc.get_samples()["z"]
    assert ((draws.mean(0) - mean).abs() < 5 * draws.std(0) / 10**0.5).all()
    guide = AutoLaplaceApproximation(model.requires_grad_(False).train(False))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(40):
        svi.step(DATA)
    scale = guide.laplace_approximation(DATA).get_posterior().scale_tril.diagonal()
    assert ((scale / draws.std(0) - 1).abs() < 0.5).all()


def test_conditional_likelihood_in_nested_plates_with_particles():
    """Particles x groups x items, context (G, 1, c); compared with the scores of every row."""
    flow, c, x = dgm.FFJORD(2, 3, hidden_features=8), torch.randn(4, 1, 3), torch.randn(4, 5, 2)

    def model():
        with pyro.plate("particles", 6, dim=-3), pyro.plate("g", 4, dim=-2), pyro.plate("i", 5, dim=-1):
            pyro.sample("x", flow(c), obs=x)

    with torch.no_grad():
        total = pyro.poutine.trace(model).get_trace().log_prob_sum()
        rows = sum(flow(c[g, 0]).log_prob(x[g]).sum() for g in range(4))
    torch.testing.assert_close(total, 6 * rows, atol=1e-3, rtol=1e-5)


def test_amortised_posterior_by_flow_matching_on_simulations():
    """theta ~ N(0, 1), x | theta ~ N(theta, 1/4): the posterior is N(0.8 x, 0.2). Planted fault: OT with a context."""
    theta = torch.randn(4000, 1)
    x = theta + 0.5 * torch.randn(4000, 1)
    cnf = dgm.FFJORD(1, 1, hidden_features=16)
    dgm.fit(dgm.FlowMatching(cnf), (theta, x), batch_size=256, max_steps=400, progress=False, seed=0)
    grid = torch.tensor([[-1.5], [0.0], [1.5]])
    with torch.no_grad():
        draws = cnf(grid).sample((4000,))[..., 0]
    torch.testing.assert_close(draws.mean(0), 0.8 * grid[:, 0], atol=0.12, rtol=0.0)
    torch.testing.assert_close(draws.std(0), torch.full((3,), 0.2**0.5), atol=0.08, rtol=0.0)


def test_prior_of_a_variational_autoencoder_trains_with_plain_svi():
    """A learned prior under an encoder: the bound rises by the prior's training alone, and gradients reach both."""
    torch.manual_seed(0)
    x = ring(200) - torch.tensor([10.0, 0.0])
    prior, encoder = dgm.FFJORD(2, hidden_features=16), dgm.RealNVP(2, 2, transforms=2, hidden_features=(8,))

    def model(x):
        pyro.module("prior", prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", encoder(x))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(x) / len(x) for _ in range(40)]
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.5


# --- the check of a density ------------------------------------------------------------------------------------------


class Faulty(dgm.DistributionModule):
    """A flow of two coordinates whose transform is replaced."""

    def __init__(self, transform):
        super().__init__(2)
        self.transform = transform

    def build(self, context):
        from pyro_dgm.core import zuko

        return zuko.distributions.NormalizingFlow(
            self.transform, zuko.distributions.DiagNormal(torch.zeros(2), torch.ones(2))
        )


class MaskedCoupling(torch.distributions.Transform):
    """An affine coupling; ``counted`` also adds the scale of the coordinate that it leaves alone, as one paper's code."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, counted, off=0.0):
        super().__init__()
        self.counted, self.off = counted, off

    def _scale(self, x):
        return torch.stack([0.8 + 0.1 * x[..., 0], 0.5 * x[..., 0].tanh()], -1)

    def _call(self, x):
        return torch.stack([x[..., 0], x[..., 1] * self._scale(x)[..., 1].exp()], -1)

    def _inverse(self, y):
        return torch.stack([y[..., 0], y[..., 1] * (-self._scale(y)[..., 1]).exp() + self.off], -1)

    def log_abs_det_jacobian(self, x, y):
        scale = self._scale(x)
        return scale.sum(-1) if self.counted else scale[..., 1]


def test_the_check_of_a_density_passes_right_ones():
    for q in (dgm.FFJORD(2, hidden_features=8)(), dgm.NSF(2)(), dist.MultivariateNormal(torch.zeros(3), torch.eye(3))):
        total, error = dgm.assert_density(q)
        assert abs(total - 1.0) < 5 * error + 0.01 and error < 0.05
    assert dgm.assert_density(Faulty(MaskedCoupling(False))())[1] < 0.05


def test_the_check_of_a_density_catches_faults():
    with pytest.raises(ValueError, match=r"Faulty integrates to 2\.\d+ \+- .*, expected 1: no density"):
        dgm.assert_density(Faulty(MaskedCoupling(True))())
    with pytest.raises(ValueError, match="the map of Faulty does not invert: off by"):
        dgm.assert_density(Faulty(MaskedCoupling(False, off=0.01))())

    class Shifted(MaskedCoupling):
        def log_abs_det_jacobian(self, x, y):
            return super().log_abs_det_jacobian(x, y) + 0.5 * torch.sin(20 * x[..., 0])

    with pytest.raises(ValueError, match="Faulty claims a log-determinant of .* where autograd's Jacobian has"):
        dgm.assert_density(Faulty(Shifted(False))(), num_samples=100)
    with pytest.raises(ValueError, match=r"empty batch shape, got batch_shape \(3,\)"):
        dgm.assert_density(dgm.FFJORD(2, 1)(torch.zeros(3, 1)))
    far = dist.MultivariateNormal(torch.zeros(40), torch.eye(40))
    with pytest.raises(ValueError, match="too uncertain to tell"):
        dgm.assert_density(far, num_samples=50)
