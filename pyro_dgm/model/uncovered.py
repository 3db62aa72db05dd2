"""Modes that draws of a guide miss, among the places where draws of the prior climb to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_dgm.model.log_joint import LogJoint, ascend, barriers, other_modes, prior_draws, spread

__all__ = ["uncovered"]

# A mode is covered where 4 of 512 draws are beyond the valley. Where one was enough, 10 of 24 lost modes of half of the mass in
# two dimensions were found, and now 24 of 24: a stray draw of a heavy tail is beyond it, or on its slope.
_DRAWS_A_VISIT = 128
_IN_THE_VALLEY = 4.0  # nats below typical draws, from where on a draw beyond it is one of its slope


def uncovered(
    log_joint: LogJoint, u: Tensor, to_z: Callable[[Tensor], Tensor], density: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Other modes, as dense as the draws ``u``, with a valley between them and the nearest draws.

    Valleys are looked for on straight lines of ``z = to_z(u)``, whose log density is given.
    """
    if not log_joint.vectorized:
        return []
    value = log_joint(u).detach()
    prior = prior_draws(log_joint, 256)
    ends = ascend(log_joint, prior[:32], spread(prior), "other modes")
    dense = log_joint(ends).detach()
    order = dense.argsort(descending=True)
    ends = ends[order[dense[order] > value.median() - 6.0]]
    found = other_modes(log_joint, u[value.argmax()], ends)
    return [end for end in found if _apart(density, to_z, end, u)]


def _apart(density: Callable[[Tensor], Tensor], to_z: Callable[[Tensor], Tensor], end: Tensor, u: Tensor) -> bool:
    """Whether hardly any draw is on the other side of the valley, and not just in it."""
    near = u[((u - end) / u.std(0)).square().sum(-1).argsort()[:8]]
    z = to_z(torch.cat([end[None], near]))
    value = density(z).detach()
    typical = density(to_z(u)).detach().median()
    low = torch.minimum(typical, value[0] - 0.5 * u.shape[-1]) - _IN_THE_VALLEY
    visits = (barriers(density, z[:1].expand_as(z[1:]), z[1:]) <= 1.0) & (value[1:] > low)
    return int(visits.sum()) < max(1, len(u) // _DRAWS_A_VISIT)
