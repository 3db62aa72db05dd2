"""Muon: the direction of its steps, what it leaves unchanged, and that fit trains and resumes with it."""

import pytest
import torch
from torch import nn

import pyro_dgm as dgm
from pyro_dgm.train import Muon
from pyro_dgm.train.muon import orthogonal


@pytest.mark.parametrize("shape", [(20, 60), (60, 20), (30, 30), (1, 5)])
def test_steps_have_the_singular_vectors_of_the_gradient_and_equal_lengths(shape):
    """Planted: the polynomial applied twice to one side (product = factor @ factor @ product)."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    x = u @ torch.diag(torch.logspace(0.0, -1.5, min(shape))) @ v
    found = u.T @ orthogonal(x) @ v.T
    lengths = found.diagonal()
    assert lengths.min() > 0.6 and lengths.max() < 1.25
    assert (found - torch.diag(lengths)).abs().max() < 1e-3


def test_a_zero_gradient_is_no_step():
    assert not orthogonal(torch.zeros(3, 4)).any()


def test_the_scale_of_the_loss_does_not_matter():
    """Planted: a gradient that is not divided by its norm."""
    steps = []
    for scale in (1.0, 1e4):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = Muon(net.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            (scale * net(torch.ones(3, 4)).square().sum()).backward()
            optimizer.step()
        steps.append(nn.utils.parameters_to_vector(net.parameters()).detach())
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-4)


def test_a_convolution_counts_as_the_matrix_of_its_channels():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.zeros(8, 3, 5, 5))
    kernel.grad = torch.randn(8, 3, 5, 5)
    Muon([kernel], lr=1.0).step()
    lengths = torch.linalg.svdvals(kernel.detach().flatten(1))
    assert lengths.min() > 0.6 and lengths.max() < 1.25


def test_badly_scaled_inputs_are_fitted_where_adam_has_hardly_begun():
    """A linear map of mixed inputs with scales of 1 to 30, in 300 steps. Planted: steps along the gradient (relative loss .13)."""
    losses = {}
    for name, optimizer in {"Muon": Muon, "Adam": None}.items():
        torch.manual_seed(0)
        mix, turn = (torch.linalg.qr(torch.randn(20, 20))[0] for _ in range(2))
        scales = torch.logspace(0.0, -1.5, 20)
        z = torch.randn(500, 20)
        x, y = z @ torch.diag(scales) @ mix, 5.0 * scales[-1] * z @ turn
        objective = _Regression()
        dgm.fit(objective, (x, y), optimizer=optimizer, max_steps=300, progress=False, seed=0)
        losses[name] = float(objective(x, y).detach() / y.square().mean())
    assert losses["Muon"] < 1e-3 and losses["Adam"] > 0.1


class _Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(20, 20)

    def forward(self, x, y):
        return (self.map(x) - y).square().mean()


def test_a_fit_resumes_to_the_bits(tmp_path):
    """Planted: means of the gradients that are kept outside of the state."""
    x, y = torch.randn(100, 20), torch.randn(100, 20)
    found = []
    for steps in ((60,), (30, 60)):
        for limit in steps:
            torch.manual_seed(0)
            objective = _Regression()
            dgm.fit(
                objective, (x, y), optimizer=lambda p: _Constant(p), max_steps=limit, progress=False, seed=0,
                checkpoint=tmp_path / f"{len(steps)}.pt",
            )  # fmt: skip
        found.append(objective.map.weight.detach())
    assert torch.equal(*found)


class _Constant(Muon):
    """Whose steps are equally long from the first to the last, so that a longer limit changes nothing before."""

    def step(self, closure=None):
        for group, lr in zip(self.param_groups, (0.05, 3e-3), strict=True):
            group["lr"] = lr
        return super().step(closure)


@pytest.mark.parametrize("name", ["lr", "vector_lr"])
@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_rates_are_positive(name, rate):
    with pytest.raises(ValueError, match=f"Muon: {name}="):
        Muon([nn.Parameter(torch.zeros(2, 2))], **{name: rate})


def test_groups_are_refused():
    with pytest.raises(TypeError, match="hold a dict, expected tensors"):
        Muon([{"params": [nn.Parameter(torch.zeros(2, 2))]}])


def test_a_closure_is_run():
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([w])

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0 and (w < 1.0).any()
