"""A function is replayed only while that gives what the function gives."""

import copy

import pytest
import torch
from torch import nn

from pyro_dgm.core import record
from pyro_dgm.core.record import Recordable, Records


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(record, "_TRIED_AT", (3,) * 9)


def replayed(records, asked, *inputs):
    """What a replay gives after some calls; None where the function is called."""
    for _ in range(3):
        records.replay(asked, *inputs)
    return records.replay(asked, *inputs)


BY_STEALTH = {
    "entries": lambda p: torch.tensor([p[0], 1.0]),
    "as_tensor": lambda p: torch.as_tensor([p[0], 1.0]),
    "new_tensor": lambda p: p.new_tensor([p[0], 1.0]),
    "copied": lambda p: copy.deepcopy((2.0 * p).detach()),
    "data": lambda p: (2.0 * p).data,
}


@pytest.mark.parametrize("way", BY_STEALTH)
def test_what_is_learned_is_not_read_once_and_for_all(way):
    """By ways of which torch tells no mode. Planted: compare at one value of what is learned, which passes the first three."""
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    asked = Recordable(lambda: (3.0 * BY_STEALTH[way](p) + 0.0 * torch.rand(()),), (), (), (p,), draws=True)
    records = Records()
    replayed(records, asked)
    before = p.detach().clone()
    with torch.no_grad():
        p += 1.0
    found = records.replay(asked)
    assert found is None or torch.equal(found[0], asked.function()[0])
    assert torch.equal(p.detach(), before + 1.0)  # which a comparison has put back


def test_a_hook_of_a_parameter_is_applied_once():
    """Planted: record it, and the gradient is a hundredth."""
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    p.register_hook(lambda grad: 0.1 * grad)

    def derived():
        loss = (p * p).sum()
        return loss.detach(), *torch.autograd.grad(loss, [p])

    assert replayed(Records(), Recordable(derived, (), (), (p,))) is None
