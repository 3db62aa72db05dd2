"""Have Markov chains forgotten where they began? Populations that know nothing of each other must agree, and stand still.

Where few draws carry all the weight, chains that start at them are in the modes of these draws, in shares that are wrong, and one
population can stand still there. Populations that start at draws of their own are then in different places, and the mean over
all of them is off by no more than their spread says. What all of them lack is not seen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_dgm.amortized.refine import Joint, run_chains
from pyro_dgm.model.hmc import Chains

__all__ = ["POPULATIONS", "settled"]

# One population that stood still for one block left 3 of 43 and 6 of 52 posteriors of slcp more than .2 sd off, by up to .9:
# docs/benchmarks/workflows.md.
_BLOCK, _MOST_BLOCKS = 100, 20  # steps
POPULATIONS = 8  # of a thousand chains: means that are alike have a standard error of .07 sd at most. Chosen by hand
_CHANCE = 1e-3  # of a change where there is none, over all numbers. Chosen by hand
_STUCK = 0.9  # share of the chains that must have left their starts. Not measured; chosen by hand


def settled(chains: Chains, joint: Joint) -> bool:
    """Run the chains until another block of steps changes nothing and no population differs; whether that was reached."""
    start = chains.u
    for i in range(_MOST_BLOCKS):
        before = _numbers(chains)
        run_chains(chains, joint, _BLOCK, POPULATIONS, f"chains {i + 1}/{_MOST_BLOCKS} at most")
        after = _numbers(chains)
        left = (chains.u != start).any(-1).double().mean() > _STUCK
        centre = after.mean(0)
        if bool(left) and _still(_spread(before, centre), _spread(after, centre)) and _alike(_spread(after, centre)):
            return True
    return False


def _numbers(chains: Chains) -> Tensor:
    """What is looked at of each chain, ``(n, F)``."""
    return torch.cat([chains.u.double(), chains.log_p[:, None]], 1)


def _spread(numbers: Tensor, centre: Tensor) -> Tensor:
    """Numbers ``(n, F)`` and how far they are from the centre, ``(n, 2 F)``: a mean of these sees a wrong width."""
    return torch.cat([numbers, (numbers - centre).abs()], 1)


def _still(before: Tensor, after: Tensor) -> bool:
    """Whether no mean has changed by more than by chance, chain by chain."""
    from scipy.stats import norm

    change = after - before
    limit = float(norm.isf(0.5 * _CHANCE / change.shape[1]))
    return bool((change.mean(0).abs() <= limit * change.std(0) / math.sqrt(len(change))).all())


def _alike(numbers: Tensor) -> bool:
    """Whether the means of populations differ as those of independent draws do (an F test)."""
    from scipy.stats import f

    each = numbers.reshape(POPULATIONS, -1, numbers.shape[1])
    between, within = each.shape[1] * each.mean(1).var(0), each.var(1).mean(0)
    limit = float(f.isf(_CHANCE / numbers.shape[1], POPULATIONS - 1, len(numbers) - POPULATIONS))
    return bool((between <= limit * within).all())
