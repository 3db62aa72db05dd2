"""Conditionals of a generator that serves as a prior, against held-out rows, with planted faults."""

import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.diagnostics import conditionals

R = torch.tensor([[1.0, 0.8, 0.3], [0.0, 0.6, 0.4], [0.0, 0.0, 0.5]])  # rows are z @ R


def rows(n, scale=1.0, shift=0.0, slope=1.0):
    """Two seen entries, and one whose mean given them is linear and whose sd is 0.5; the last two are wrong by what is said."""
    z = torch.randn(n, 3)
    seen = z[:, :2] @ R[:2, :2]
    mean = z[:, :2] @ R[:2, 2:]
    return torch.cat([seen, slope * mean + 0.5 * (shift + scale * z[:, 2:])], -1)


FAULTS = {
    "spread 1": {"scale": 0.8},
    "spread 0.": {"scale": 1.25},
    "means are off by 0": {"shift": 0.4},
    "spread 1.": {"slope": 0.0},
}


@pytest.mark.parametrize("text, fault", [("No fault was found", {}), *FAULTS.items()])
def test_a_planted_fault_of_a_conditional_is_seen(text, fault):
    """Planted: sds 20 % too narrow and 25 % too wide, means 0.4 sd off, and a hidden entry that ignores the seen ones."""
    torch.manual_seed(0)
    held_out = rows(600)
    result = conditionals(lambda n: rows(n, **fault), held_out, [0, 1], max_steps=150, num_draws=99, seed=1)
    assert result.learned and text in str(result), str(result)
    assert bool(result.faults) == bool(fault) and (result.p_value > 0.01 or fault)
    if "scale" in fault:  # sds of the draws are off by this factor
        assert abs(result.spread.value * fault["scale"] - 1.0) < 4 * result.spread.standard_error
    if "shift" in fault:
        assert abs(result.shift.value - 0.4) < 4 * result.shift.standard_error


@pytest.mark.parametrize("seed", range(4))
def test_a_flow_that_has_learned_little_raises_no_false_alarm(seed):
    """Ranks of held-out rows and of the generator's own are compared, so an untrained flow costs power, not the level."""
    torch.manual_seed(seed)
    result = conditionals(rows, rows(300), [0, 1], max_steps=1, num_draws=99, seed=seed)
    assert not result.faults and result.p_value > 0.01 and ("Sizes are rough" in str(result)) != result.learned


def test_wrong_arguments_of_conditionals_are_explained():
    for seen, n in (([], 200), ([0, 1, 2], 200), ([0, 7], 200), ([0, 0], 200), ([0], 50)):
        with pytest.raises(ValueError, match="conditionals: held_out has"):
            conditionals(rows, rows(n), seen)


def test_a_generator_is_taken_as_it_is():
    torch.manual_seed(0)
    generator = dgm.Generator(3, 8)
    result = conditionals(generator(), rows(100), [0], max_steps=1, num_draws=19, seed=0)
    assert set(result.held_out.pit) == {"hidden"}


@pytest.mark.parametrize("generator", [
    torch.distributions.Normal(0.0, 1.0),
    lambda n: torch.randn(n, 2),
    lambda n: torch.randn(7, 3),
    lambda n: [None] * n,
    lambda n: torch.full((n, 3), torch.nan),
])  # fmt: skip
def test_draws_that_are_no_rows_like_the_held_out_ones_are_explained(generator):
    """Planted fault: they are reshaped, and torch speaks of an index or of a size that is invalid."""
    with pytest.raises((ValueError, TypeError), match="conditionals: .*the generator drew"):
        conditionals(generator, rows(120), [0, 1])
