"""The bounds where a shortcut would be silently wrong: each case has a right value from elsewhere."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch


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
        loss.loss(model, lambda: pyro.sample("b", dist.Normal(centre * torch.ones(5), 0.1).to_event(1)))  # noqa: B023
        assert loss._how == "plate"
