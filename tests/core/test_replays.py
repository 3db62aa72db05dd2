"""A function is replayed only while that gives what the function gives."""

import copy
import sys
import types

import pytest
import torch
from torch import nn

from pyro_dgm.core import record
from pyro_dgm.core.record import Recordable, Records, with_gradients
from pyro_dgm.core.units import Standardize


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


def test_a_second_derivative_is_refused():
    """Planted: give gradients without a graph, and a penalty on them trains nothing."""
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    value = with_gradients(torch.tensor(5.0), (torch.tensor([2.0, 4.0]),), [p])
    (grad,) = torch.autograd.grad(value, p, retain_graph=True)
    assert grad.tolist() == [2.0, 4.0]
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(value, p, create_graph=True)


# --- What a function reads ---

SETTINGS = types.ModuleType("mine.settings")
PACKAGE = types.ModuleType("mine")
PACKAGE.settings = SETTINGS


class Rates(list):
    beta = 1.0

    def __call__(self, x):
        return (self.beta * x,)


class Held:
    module = SETTINGS

    def __call__(self, x):
        return (self.module.beta * x,)


def by_package(x):
    return (PACKAGE.settings.beta * x,)


def by_import(x):
    from mine.settings import beta

    return (beta * x,)


def by_closure(module):
    return lambda x: (module.beta * x,)


def set_beta(reader):
    (reader if isinstance(reader, Rates) else SETTINGS).beta = 2.0


@pytest.mark.parametrize(
    "reader, recorded",
    [(by_package, True), (by_import, False), (by_closure(SETTINGS), True), (Held(), False), (Rates(), True)],
    ids=["submodule", "import", "closure", "attribute", "list"],
)
def test_a_setting_of_a_module_may_change(reader, recorded, monkeypatch):
    """Planted: do not look into modules of modules, of closures, or into attributes of lists; allow imports and held modules."""
    monkeypatch.setitem(sys.modules, "mine", PACKAGE)
    monkeypatch.setitem(sys.modules, "mine.settings", SETTINGS)
    SETTINGS.beta = 1.0
    asked, records, x = Recordable(reader, (reader,)), Records(), torch.ones(2)
    assert (replayed(records, asked, x) is not None) == recorded
    set_beta(reader)
    found = records.replay(asked, x)
    assert found is None or torch.equal(found[0], 2.0 * x)


def test_another_key_for_the_same_value_is_seen():
    """Planted: look at the values alone."""
    options = {"steep": 2.0}
    asked, records, x = Recordable(f := lambda x: (options.get("steep", 1.0) * x,), (f,)), Records(), torch.ones(2)
    assert replayed(records, asked, x) is not None
    options["flat"] = options.pop("steep")
    found = records.replay(asked, x)
    assert found is None or torch.equal(found[0], x)


def test_units_that_are_loaded_after_a_record_count():
    """That they were the identity was looked up before it. Planted: do not look at the versions of tensors."""
    units = Standardize(2)
    state = units.state_dict()
    units.load_state_dict(state)
    asked = Recordable(f := lambda x: (x + 1.0 if units.is_identity() else units(x) + 1.0,), (f,))
    records, x = Records(), torch.ones(2)
    assert replayed(records, asked, x) is not None
    units.load_state_dict({**state, "loc": torch.ones(2)})
    found = records.replay(asked, x)
    assert found is None or torch.equal(found[0], torch.ones(2))
