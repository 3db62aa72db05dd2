"""A short run of the fuzz (``python -m tests.benchmarks fuzz``), and that it finds what it should."""

import torch

from pyro_dgm.core import shapes
from tests.benchmarks import _fuzz_calls, fuzz

LIGHT = ("NSF", "MAF", "RealNVP", "MixtureChain", "Conditional", "Generator", "Critic", "Standardize", "Dequantize", "VAE", "impute",
         "mmd", "khat", "loo", "simulate", "Simulations", "LearnedDistribution", "normal", "poisson", "broadcast_cat")  # fmt: skip


def names():
    return [n for n in _fuzz_calls.CALLS if n.split(":")[0] in LIGHT]


def test_every_public_name_has_a_call():
    assert _fuzz_calls.without_recipe() == []


def test_two_hundred_inputs_are_right_or_refused():
    torch.set_num_threads(1)
    cases = list(fuzz.run(1, range(200), names()))
    assert [(c.number, c.name, c.changed, c.fault) for c in cases if c.fault] == []
    outcomes = [c.outcome for c in cases]
    assert outcomes.count("refused") > 50 and outcomes.count("right") > 30


def test_a_door_left_open_is_found(monkeypatch):
    """Planted fault: arrays and NaN pass unseen into the families."""
    monkeypatch.setattr("pyro_dgm.core.distribution.as_tensor_like", lambda who, what, value, like: value)
    monkeypatch.setattr(shapes, "refuse_non_finite", lambda *args: None)
    cases = fuzz.run(1, range(80), [n for n in names() if n.endswith((":log_prob", ":conditional"))])
    assert sum(bool(c.fault) for c in cases) > 5


def test_a_case_is_the_same_again():
    first, again = (next(fuzz.run(3, [17])) for _ in range(2))
    assert (first.name, first.changed, first.outcome) == (again.name, again.changed, again.outcome)
