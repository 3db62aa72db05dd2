"""Conditionals of a generator that serves as a prior, against held-out rows, with planted faults."""

import sys

import numpy as np
import pytest
import torch

import pyro_dgm as dgm
from pyro_dgm.diagnostics import conditionals

PARTS = sys.modules[conditionals.__module__]

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
    assert bool(result.faults) == bool(fault) == (result.p_value < 0.01)
    if "scale" in fault:  # sds of the draws are off by this factor
        assert abs(result.spread.value * fault["scale"] - 1.0) < 4 * result.spread.standard_error
    if "shift" in fault:
        assert abs(result.shift.value - 0.4) < 4 * result.shift.standard_error


def p_values(seed, spread=1.0, rows=150):
    """Of rows whose two entries are correlated, with log densities of heavy tails."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)

    def some(n, sd):
        return sd * (0.6 * rng.standard_normal((n, 2)) + 0.8 * rng.standard_normal((n, 1))), -(
            rng.standard_t(3, n) ** 2
        )

    (data, log_q), (own, own_log_q) = some(rows, spread), some(max(300, rows), 1.0)
    parts = PARTS._by_divisions(data, own, log_q, own_log_q) | {"ranks": PARTS._of_ranks(data, own)}
    return PARTS.Conditionals(None, None, parts, *[dgm.evaluate.Score(1.0, 0.1)] * 3)


def test_the_p_value_is_that_of_the_verdict(monkeypatch):
    """Of equal laws 1 % are rejected at most, 20 % at 20 %. Planted: the smallest p-value is not multiplied; 3 errors decide."""
    monkeypatch.setattr(PARTS, "_DIVISIONS", 600)
    found = [p_values(seed) for seed in range(150)]
    assert sum(each.p_value < 0.2 for each in found) <= 30 + 3 * 4.9
    assert sum(each.p_value < 0.01 for each in found) <= 6  # 1.5 are expected, more in 1 of 1,000 repetitions
    assert all(bool(each.faults) == (each.p_value < 0.01) for each in found)


def test_a_spread_that_speaks_alone_is_in_the_p_value():
    """Ranks hardly see a spread of .9. Planted: the p-value is that of the ranks, and the sentence contradicts it."""
    result = p_values(0, spread=0.9, rows=1500)
    assert result.p_values["ranks"] > 0.01 and result.p_values["shift"] > 0.01
    assert result.p_value < 0.01 and "spread" in result.faults[0]


@pytest.mark.parametrize("seed", range(4))
def test_a_flow_that_has_learned_little_raises_no_false_alarm(seed):
    """Ranks of held-out rows and of the generator's own are compared, so an untrained flow costs power, not the level."""
    torch.manual_seed(seed)
    result = conditionals(rows, rows(300), [0, 1], max_steps=1, num_draws=99, seed=seed)
    assert not result.faults and result.p_value > 0.01 and ("Sizes are rough" in str(result)) != result.learned


def test_wrong_arguments_of_conditionals_are_explained():
    """Planted fault: a long list of positions is cut off without a word."""
    for seen, n in (([], 200), ([0, 1, 2], 200), ([0, 7], 200), ([0, 0], 200), ([0], 50)):
        with pytest.raises(ValueError, match="conditionals: held_out has"):
            conditionals(rows, rows(n), seen)
    for seen in (range(20), torch.arange(20)):
        with pytest.raises(ValueError, match=r"seen=20 positions, 0 to 19"):
            conditionals(rows, rows(200), seen)


def test_a_generator_is_taken_as_it_is():
    torch.manual_seed(0)
    generator = dgm.Generator(3, 8)
    result = conditionals(generator(), rows(100), range(1), max_steps=1, num_draws=19, seed=0)
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
