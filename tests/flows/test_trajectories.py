"""Where draws are on their way from the base to the data: continuous flows at any time, flows of layers after each layer."""

import pytest
import torch
from torch.distributions import constraints

import pyro_dgm as dgm
from tests.families import FAMILIES, NO_TRANSFORM, make

MOVING = sorted(FAMILIES.keys() - NO_TRANSFORM)


def flow_of(name, context_features=0):
    """A flow with units of its own."""
    torch.manual_seed(0)
    flow = make(name, 2, context_features)
    return flow if "NCSF" in name else flow.standardize(3.0 * torch.randn(50, 2) + 1.0)


@pytest.mark.parametrize(("name", "context_features"), [(n, 0 if "AF" in n and "zuko" in n else 3) for n in MOVING])
def test_the_ends_are_the_base_draw_and_the_draw(name, context_features):
    """To the last bit. Planted: layers in the order in which data pass them; units of the flow at the end."""
    flow = flow_of(name, context_features)
    context = torch.randn(4, 3) if context_features else None
    torch.manual_seed(1)
    path = flow.trajectory(6, context=context)
    torch.manual_seed(1)
    q = flow(context)
    base, x = q._base().base, q.rsample((6,))
    torch.manual_seed(1)
    z = base.rsample((6,))
    assert path.shape == (len(path), *x.shape) and torch.equal(path[0], z) and torch.equal(path[-1], x)
    torch.testing.assert_close(flow.trajectory(z, context=context), path)


@pytest.mark.parametrize(
    "options", [{"steps": 12}, {"method": "dopri5", "tolerance": 1e-6}, {"steps": 12, "adjoint": True}]
)
@pytest.mark.parametrize("make_flow", [dgm.FFJORD, dgm.OTFlow])
def test_positions_between_steps_solve_the_equation(make_flow, options):
    """Against a grid of 60 steps; a straight line between steps, torchdiffeq's choice, is 50 times as far off (planted)."""
    torch.manual_seed(0)
    flow, z = make_flow(2, **options).double(), torch.randn(20, 2).double()
    times = [0.9, 0.13, 0.5, 0.501, 0.13]
    with torch.no_grad():
        path = flow.trajectory(z, times)
    fine = make_flow(2, steps=60).double()
    fine.load_state_dict(flow.state_dict())
    fine.solver.steps.fill_(60)
    with torch.no_grad():
        exact = fine.trajectory(z, times)
    assert path.shape == (5, 20, 2) and torch.equal(path[1], path[4])
    assert float((path - exact).abs().max()) < 1e-4 < float((exact[0] - exact[1]).abs().max())


def test_the_layers_of_a_known_flow():
    """Two shifts by 1 and 2, drawn in the order from base to data, in units of mean 10 and sd 2."""
    zuko = dgm.core.zuko

    def shift(by):
        return zuko.lazy.UnconditionalTransform(zuko.transforms.AdditiveTransform, torch.tensor([by]))

    family = zuko.lazy.Flow(
        [shift(-2.0), shift(-1.0)],
        zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(1), torch.ones(1)),
    )
    flow = dgm.ZukoFlow(family)
    flow.standard.loc.fill_(10.0)
    flow.standard.scale.fill_(2.0)
    path = flow.trajectory(torch.zeros(1, 1)).flatten()
    assert path.tolist() == [0.0, 0.5 * 1.0 + 0.5 * 12.0, 16.0]


def test_gradients_pass_and_steps_stay():
    flow = dgm.FFJORD(2, hidden_features=4)
    z = torch.randn(3, 2, requires_grad=True)
    flow.trajectory(z, [0.3, 1.0]).sum().backward()
    assert z.grad.abs().min() > 0 and flow.solver.evaluations.backward > 0 and "_watched" not in flow.__dict__


@pytest.mark.parametrize("times", [[], [0.0, 1.1], [-0.1], [float("nan")], 0.5])
def test_bad_times_are_refused(times):
    with pytest.raises((ValueError, TypeError), match="times"):
        dgm.OTFlow(2).trajectory(3, times)


def test_what_has_no_trajectories_is_refused_by_name():
    with pytest.raises(ValueError, match="NSF: a flow of layers has no times"):
        dgm.NSF(2).trajectory(3, [0.5])
    with pytest.raises(
        TypeError, match="ZukoFlow: Mixture is no transform .* trajectories. They are of continuous flows"
    ):
        dgm.ZukoFlow(dgm.core.zuko.mixtures.GMM(2, components=2)).trajectory(3)
    with pytest.raises(ValueError, match="OTFlow: events on Simplex.* have 3 entries and 2 degrees of freedom"):
        dgm.OTFlow(3, support=constraints.simplex).trajectory(3)
    with pytest.raises(ValueError, match="draws is 0, expected"):
        dgm.OTFlow(3).trajectory(0)
    with pytest.raises(ValueError, match="value has shape"):
        dgm.OTFlow(3).trajectory(torch.zeros(4, 2))


@pytest.mark.parametrize("event", [(), (2, 3)])
def test_events_of_any_shape_come_flat(event):
    path = dgm.OTFlow(event, support=constraints.positive).trajectory(-torch.rand(4, 6 if event else 1), [0.0, 1.0])
    assert path.shape == (2, 4, 6 if event else 1) and bool((path[1] > 0).all()) and bool((path[0] < 0).all())
