"""Flows under ``torch.func``: many parameter sets or values at once by vmap, gradients, Jacobians and Hessians, Bayesian weights."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.distributions import constraints
from torch.func import functional_call, grad, hessian, jacrev, stack_module_state, vmap

import pyro_dgm as dgm
from pyro_dgm.core.upstream import in_vmap, plain_of, unseen
from pyro_dgm.model.log_joint import LogJoint
from tests.families import FAMILIES, make
from tests.torch_versions import checks_priors_within_vmap

# zuko writes these as autograd functions that torch.func refuses.
NOT_YET = {"zuko-SOSPF", "zuko-BPF", "zuko-NAF", "zuko-UNAF", "zuko-GF", "zuko-CNF"}
NAMES = sorted(FAMILIES.keys() - NOT_YET)
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, t, x):
        return self.net(torch.cat([t, x], -1))


class Scored(nn.Module):
    """What functional_call needs: a forward that ends in a tensor."""

    def __init__(self, family):
        super().__init__()
        self.family = family

    def forward(self, x, context=None):
        return self.family(context).log_prob(x)


def members(name, count=5, context_features=0):
    """Flows with weights and units of their own."""
    torch.manual_seed(0)
    found = [copy.deepcopy(make(name, 2, context_features)) for _ in range(count)]
    for k, family in enumerate(found):
        with torch.no_grad():
            for p in family.parameters():
                p += 0.05 * torch.randn_like(p)
        if "GMM" not in name and "NCSF" not in name:
            family.standardize(torch.randn(50, 2) * (1.0 + k) + k)
    return found


@pytest.mark.parametrize("context_features", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_stacked_parameters_score_as_the_loop(name, context_features):
    """Planted: units taken for the identity where they cannot be looked at."""
    families = members(name, context_features=context_features)
    x = 0.5 * torch.randn(7, 2)
    context = torch.randn(7, 3) if context_features else None
    stacked = stack_module_state([Scored(f) for f in families])
    found = vmap(lambda *state: functional_call(Scored(families[0]), state, (x, context)))(*stacked)
    torch.testing.assert_close(found, torch.stack([f(context).log_prob(x) for f in families]), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_may_be_stacked_alone(name):
    """Buffers shared, no units: what a layer keeps stands for one. Planted: a coupling's halves written into the one kept."""
    torch.manual_seed(0)
    families = [copy.deepcopy(make(name)) for _ in range(3)]
    for k, family in enumerate(families):
        with torch.no_grad():
            for p in family.parameters():
                p += 0.02 * k
    x = 0.5 * torch.randn(4, 2)
    parameters, _ = stack_module_state([Scored(f) for f in families])
    shared = dict(Scored(families[0]).named_buffers())
    found = vmap(lambda p, b: functional_call(Scored(families[0]), (p, b), (x,)), in_dims=(0, None))(parameters, shared)
    torch.testing.assert_close(found, torch.stack([f().log_prob(x) for f in families]), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_values_one_by_one_and_their_derivatives(name):
    """vmap over values and contexts; gradient, Jacobian and Hessian against torch.autograd."""
    (family,) = members(name, 1, context_features=3)
    x, context = 0.5 * torch.randn(6, 2), torch.randn(6, 3)

    def score(x, context):
        return family(context).log_prob(x)

    torch.testing.assert_close(vmap(score)(x, context), score(x, context), **CLOSE)
    slopes = torch.autograd.functional.jacobian(lambda x: score(x, context).sum(), x)
    torch.testing.assert_close(vmap(grad(score))(x, context), slopes, **CLOSE)
    torch.testing.assert_close(jacrev(score)(x, context), torch.diag_embed(slopes.mT).permute(1, 2, 0), **CLOSE)
    if "NSF" not in name:
        curved = torch.autograd.functional.hessian(lambda x: score(x, context[0]), x[0])
        torch.testing.assert_close(hessian(score)(x[0], context[0]), curved, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["RealNVP", "MAF", "NSF", "FFJORD", "OTFlow"])
def test_stacked_draws_have_the_densities_that_they_come_with(name):
    families = members(name, 3)

    class Drawn(Scored):
        def forward(self, x, context=None):
            return self.family().rsample_and_log_prob((4,))

    stacked = stack_module_state([Scored(f) for f in families])
    x, log_prob = vmap(lambda *state: functional_call(Drawn(families[0]), state, (None,)), randomness="different")(
        *stacked
    )
    torch.testing.assert_close(
        log_prob, torch.stack([f().log_prob(v) for f, v in zip(families, x, strict=True)]), atol=2e-3, rtol=2e-3
    )


def test_a_users_field_runs_under_vmap_too():
    flow = dgm.FFJORD(2, field=Net(), steps=4)
    x = torch.randn(5, 2)
    torch.testing.assert_close(vmap(lambda x: flow().log_prob(x))(x), flow().log_prob(x), **CLOSE)
    slopes = torch.autograd.functional.jacobian(lambda x: flow().log_prob(x).sum(), x)
    torch.testing.assert_close(vmap(grad(lambda x: flow().log_prob(x)))(x), slopes, **CLOSE)


def test_steps_are_neither_watched_nor_remembered_inside():
    """Planted: points of a transform that has ended, kept to be looked at 20 steps later."""
    flow = dgm.FFJORD(2, hidden_features=4)
    vmap(grad(lambda x: flow().log_prob(x)))(torch.randn(5, 2))
    assert "_watched" not in flow.__dict__


def test_the_most_steps_of_those_stacked_are_taken():
    families = members("FFJORD", 2)
    families[1].solver.steps.fill_(9)
    stacked = stack_module_state([Scored(f) for f in families])
    x = torch.randn(3, 2)
    found = vmap(lambda *state: functional_call(Scored(families[0]), state, (x,)))(*stacked)
    families[0].solver.steps.fill_(9)
    torch.testing.assert_close(found, torch.stack([f().log_prob(x) for f in families]), **CLOSE)


def test_values_that_cannot_be_refused_are_nan():
    """NaN and values outside the support; infinity has no density, as elsewhere. Outside of vmap they are refused."""
    flow = dgm.MAF(1, support=constraints.positive)
    x = torch.tensor([[1.0], [-1.0], [torch.nan], [torch.inf]])
    score = vmap(lambda x: flow().log_prob(x))(x)
    assert score[0].isfinite() and score[1:3].isnan().all() and score[3] == -torch.inf
    with pytest.raises(ValueError, match="2 of 4 values lie outside"):
        flow().log_prob(x)
    with pytest.raises(ValueError, match="1 of 1 values lie outside"):
        grad(lambda x: flow().log_prob(x))(x[1])  # a gradient alone hides no number


def test_flows_of_different_build_are_refused():
    flows = [dgm.ZukoFlow(dgm.core.zuko.flows.NICE(3, randmask=True, hidden_features=(4,))) for _ in range(8)]
    with pytest.raises(ValueError, match="stacked for torch.vmap differ in their mask"):
        stacked = stack_module_state([Scored(f) for f in flows])
        vmap(lambda *state: functional_call(Scored(flows[0]), state, (torch.zeros(3),)))(*stacked)


@pytest.mark.parametrize("options", [{"method": "dopri5"}, {"adjoint": True}])
def test_solvers_that_look_at_numbers_are_refused(options):
    flow = dgm.FFJORD(2, hidden_features=4, **options)
    with pytest.raises(NotImplementedError, match="FFJORD: .* looks at numbers, which torch.vmap does not let it"):
        vmap(lambda x: flow().log_prob(x))(torch.zeros(3, 2))


def test_what_stands_behind_two_transforms():
    seen = []

    def look(x, y):
        seen.append((unseen(x), unseen(y), in_vmap(), plain_of(x).shape))
        return x.sum() * y

    x = torch.zeros(3, 4, 2)
    grad(lambda y: vmap(vmap(look, (0, None)), (1, None))(x, y).sum())(torch.tensor(1.0))
    assert seen == [(True, False, True, (4, 3, 2))] and not in_vmap()


def bayesian():
    flow = dgm.MAF(2, transforms=1, hidden_features=(4,))
    to_pyro_module_(flow)
    last = flow.flow.transform.transforms[0].hyper[-1]
    last.bias = PyroSample(dist.Normal(0.0, 1.0).expand(last.bias.shape).to_event(1))
    return flow


def test_bayesian_weights_are_scored_many_at_once():
    """A log joint of the weights: by vmap, no longer one by one. Planted: it equals single runs of the model."""
    flow, x = bayesian(), torch.randn(20, 2)

    def model(x):
        learned = flow()  # outside of the plate: older Pyro would draw weights for each row
        with pyro.plate("rows", len(x)):
            pyro.sample("x", learned, obs=x)

    guide = dgm.AutoFlow(model)
    guide.setup(x)
    joint = LogJoint(guide, model, (x,), {})
    u = torch.randn(5, guide.latent_dim)
    assert joint.how == ("vmap" if checks_priors_within_vmap() else "loop")
    torch.testing.assert_close(joint(u), torch.cat([joint(row[None]) for row in u]), **CLOSE)
    loop = LogJoint(guide, model, (x,), {}, how="loop")
    torch.testing.assert_close(joint(u), loop(u), **CLOSE)
