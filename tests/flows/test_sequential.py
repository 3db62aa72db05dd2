"""Draws of autoregressive flows, column by column, and the spline: zuko's numbers and gradients with less work."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import pyro_dgm as dgm
from pyro_dgm.core import zuko
from pyro_dgm.flows.families import RationalQuadratic

D, C = 5, 3
Zukos = zuko.transforms.AutoregressiveTransform
small = {"transforms": 2, "hidden_features": (16, 16)}


def wrapped(make, **options):
    return lambda context: dgm.ZukoFlow(make(D, context, **small, **options))


FLOWS = {
    "NSF": lambda context: dgm.NSF(D, context, **small),
    "MAF": lambda context: dgm.MAF(D, context, **small),
    "MAF-sampling": lambda context: dgm.MAF(D, context, fast="sampling", **small),
    "one-hidden-layer": lambda context: dgm.MAF(D, context, transforms=2, hidden_features=(7,)),
    "linear": lambda context: dgm.MAF(D, context, transforms=2, hidden_features=()),
    "zuko-permuted": wrapped(zuko.flows.NSF, randperm=True),
    "zuko-three-passes": wrapped(zuko.flows.NSF, passes=3),
    "zuko-coupling": wrapped(zuko.flows.MAF, passes=2),
    "zuko-NCSF": wrapped(zuko.flows.NCSF),
    "zuko-BPF": wrapped(zuko.flows.BPF),
    "zuko-relu": wrapped(zuko.flows.MAF, activation=nn.ReLU),
}


def sequential_transforms(flow):
    return [m for m in flow.modules() if type(m).__name__ == "_Masked"]


def gradients(x, ladj, inputs):
    weight = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape)
    return torch.autograd.grad((x * weight).sum() + ladj.sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("context", [None, (), (7,), (4, 1)], ids=str)
@pytest.mark.parametrize("name", FLOWS)
def test_the_inverse_and_its_gradients_are_those_of_zuko(name, context):
    """Value, log-determinant, and gradients to image, context and every parameter, in double precision.

    Planted faults: hidden units of one pass too early (order + 1 replaced by order) miss by .1 and more; an output whose
    columns are left in the order of their passes fails for every order but the first.
    """
    torch.manual_seed(0)
    flow = FLOWS[name](0 if context is None else C).double()
    c = None if context is None else torch.randn(*context, C, dtype=torch.double, requires_grad=True)
    y = torch.rand(2, *([] if context is None else [4, 7]), D, dtype=torch.double).requires_grad_()
    for module in sequential_transforms(flow):
        ours = module(c)
        x, ladj = ours.inv.call_and_ladj(y)
        theirs = Zukos._inverse(ours, y)
        assert x.shape == theirs.shape and torch.allclose(x, theirs, atol=1e-5)
        expected = -ours.log_abs_det_jacobian(theirs, y)
        assert torch.allclose(ladj, expected, atol=1e-5) and torch.equal(ours.inv(y), x)
        inputs = [y, *([] if c is None else [c]), *module.parameters()]
        for ours_g, theirs_g in zip(gradients(x, ladj, inputs), gradients(theirs, expected, inputs), strict=True):
            assert (ours_g is None) == (theirs_g is None)
            assert ours_g is None or torch.allclose(ours_g, theirs_g, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [dgm.NSF, dgm.MAF])
def test_single_precision_draws_are_those_of_zuko(make):
    torch.manual_seed(0)
    flow, y = make(12, C), torch.randn(2000, 12)
    for module in sequential_transforms(flow):
        ours = module(torch.randn(C))
        assert torch.allclose(ours.inv(y), Zukos._inverse(ours, y), atol=1e-5)


@pytest.mark.parametrize("fast", ["density", "sampling"])
@pytest.mark.parametrize("make", [dgm.NSF, dgm.MAF])
def test_densities_of_draws_agree_with_scores_and_with_autograd(make, fast):
    """Planted fault: the log-determinant of the inverse with the sign of the transform's."""
    torch.manual_seed(0)
    flow = make(3, C, fast=fast).double()
    q = flow(torch.randn(C, dtype=torch.double))
    x, log_q = q.rsample_and_log_prob((6,))
    assert torch.allclose(log_q, q.log_prob(x.clone()), atol=1e-8)
    transform = q._base().transform
    z = torch.randn(3, dtype=torch.double)
    jacobian = torch.autograd.functional.jacobian(transform.inv, z)
    assert torch.allclose(transform.inv.call_and_ladj(z)[1], jacobian.det().abs().log(), atol=1e-8)


def test_a_draw_computes_each_column_once(monkeypatch):
    """D columns of splines per transform, where zuko computes D columns in each of D passes."""
    columns, flow = [], dgm.NSF(6, transforms=2)
    original = RationalQuadratic._inverse
    monkeypatch.setattr(RationalQuadratic, "_inverse", lambda s, y: (columns.append(y.shape[-1]), original(s, y))[1])
    flow().sample((10,))
    assert columns == [1] * 12


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_draws_of_any_shape(shape):
    assert dgm.NSF(D, C)(torch.zeros(2, C)).sample(shape).shape == (*shape, 2, D)


def test_a_loaded_order_is_read_anew():
    """Planted fault: a schedule that outlives ``load_state_dict`` gives the draws of another flow."""
    torch.manual_seed(0)
    make = wrapped(zuko.flows.MAF, randperm=True)
    flow, other, y = make(0), make(0), torch.randn(4, D)
    flow().sample()  # its schedule is known now
    assert not torch.equal(*(sequential_transforms(f)[0].order for f in (flow, other)))
    flow.load_state_dict(other.state_dict())
    for a, b in zip(sequential_transforms(flow), sequential_transforms(other), strict=True):
        assert torch.equal(a().inv(y), b().inv(y)) and torch.allclose(a().inv(y), Zukos._inverse(a(), y), atol=1e-5)
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        z = torch.randn(3, D)
        assert torch.equal(twin.decode(z), flow.decode(z))


def test_per_sample_gradients_go_through_a_draw():
    flow, z = dgm.NSF(3, C), torch.randn(5, 3)
    contexts = torch.randn(5, C)
    one = torch.func.grad(lambda c, z: flow.build(c).transform.inv(z).sum())
    looped = torch.stack([one(c, row) for c, row in zip(contexts, z, strict=True)])
    assert torch.allclose(torch.func.vmap(one)(contexts, z), looped, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [zuko.flows.NAF, functools.partial(zuko.flows.MAF, residual=True), functools.partial(zuko.flows.MAF, activation=nn.PReLU)],
    ids=["per-column-networks", "residual", "activation-with-parameters"],
)  # fmt: skip
def test_what_cannot_be_split_by_columns_keeps_the_inverse_of_zuko(make):
    flow = dgm.ZukoFlow(make(3, transforms=2))
    assert not sequential_transforms(flow)
    z = torch.randn(4, 3)
    assert torch.allclose(flow.encode(flow.decode(z)), z, atol=1e-2)


@pytest.mark.parametrize("pieces", [1, 2, 8])
def test_the_spline_is_that_of_zuko(pieces):
    """Values, derivatives and gradients of both directions, inside, at and outside the bounds.

    Planted fault: slopes taken from the piece to the left (gather at k - 1) change values by .1.
    """
    torch.manual_seed(0)
    phi = [torch.randn(40, n, dtype=torch.double, requires_grad=True) for n in (pieces, pieces, pieces - 1)]
    x = torch.cat([torch.linspace(-7.0, 7.0, 38), torch.tensor([-5.0, 5.0])]).double().requires_grad_()
    ours, theirs = RationalQuadratic(*phi), zuko.transforms.MonotonicRQSTransform(*phi)
    for f in (lambda t: t(x), lambda t: t.inv(x), lambda t: t.call_and_ladj(x)[1]):
        a, b = f(ours), f(theirs)
        assert torch.allclose(a, b, atol=1e-10)
        for g, h in zip(
            *(torch.autograd.grad(v.square().sum(), [x, *phi], allow_unused=True, retain_graph=True) for v in (a, b)),
            strict=True,
        ):
            assert torch.allclose(torch.zeros(()) if g is None else g, torch.zeros(()) if h is None else h, atol=1e-8)
    assert torch.allclose(ours.log_abs_det_jacobian(x, ours(x)), ours.call_and_ladj(x)[1])


def test_a_spline_broadcasts_and_passes_nan_on():
    spline = RationalQuadratic(torch.randn(1, 4), torch.randn(1, 4), torch.randn(1, 3))
    x = torch.randn(6, 2)
    assert spline(x).shape == spline.inv(x).shape == x.shape and torch.allclose(spline.inv(spline(x)), x, atol=1e-4)
    assert spline(torch.tensor([[torch.nan]])).isnan().all() and spline.inv(torch.tensor([[torch.nan]])).isnan().all()


def test_the_parameters_of_a_spline_flow_are_those_of_zuko():
    """Saved flows are read by either."""
    theirs, ours = zuko.flows.NSF(D, C, activation=nn.SiLU), dgm.NSF(D, C)
    ours.flow.transform.load_state_dict(theirs.transform.state_dict())
    x, c = torch.randn(6, D), torch.randn(C)
    assert torch.allclose(ours(c).log_prob(x), theirs(c).log_prob(x), atol=1e-4)
    one = [
        {k: v.shape for k, v in f.state_dict().items()}
        for f in (dgm.NSF(1).flow.transform, zuko.flows.NSF(1).transform)
    ]
    assert one[0] == one[1]


def test_dependencies_are_followed_through_a_draw():
    """``get_dependencies`` passes tensors whose shapes are plain tuples."""
    from pyro.ops.provenance import ProvenanceTensor, get_provenance

    flow = dgm.MAF(3, C)
    context = ProvenanceTensor(torch.zeros(2, C), frozenset({"c"}))
    assert get_provenance(flow.build(context).transform.inv(torch.zeros(2, 3))) == {"c"}
