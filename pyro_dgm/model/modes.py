r"""Modes of a log density: where draws of the prior climb to, and whether a valley lies between two points."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_dgm.model.log_joint import LogJoint, prior_draws

__all__ = ["ascend", "barrier", "other_modes", "spread", "uncovered"]


def barrier(log_density: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    """How far the log density on the straight segment falls below its lower end, in nats."""
    t = torch.linspace(0.0, 1.0, 21).to(a)[:, None]
    value = log_density(a + t * (b - a)).detach()
    return float(torch.minimum(value[0], value[-1]) - value.min())


def spread(u: Tensor) -> Tensor:
    """A robust standard deviation of draws, by coordinate, between 1e-3 and 1e3."""
    return (u.quantile(0.84, 0) - u.quantile(0.16, 0)).div(2).clamp(1e-3, 1e3)


def other_modes(log_joint: LogJoint, best: Tensor, u: Tensor, limit: int = 3) -> list[Tensor]:
    """Other modes: ends of gradient ascent from prior draws, at least 1 nat apart from ``best`` and from one another."""
    if not log_joint.vectorized:
        return []
    ends = ascend(log_joint, u[:32], spread(u))
    found = [best]
    for i in log_joint(ends).detach().argsort(descending=True).tolist():
        if len(found) <= limit and all(barrier(log_joint, ends[i], known) > 1.0 for known in found):
            found.append(ends[i])
    return found[1:]


def ascend(log_joint: LogJoint, u: Tensor, scale: Tensor, steps: int = 60) -> Tensor:
    """Points after some steps of Adam uphill, each on its own, in units of ``scale``."""
    v = (u / scale).clone().requires_grad_()
    optimizer = torch.optim.Adam([v], lr=0.15)
    for _ in range(steps):
        v.grad = -log_joint.value_and_grad(v.detach() * scale)[1] * scale
        optimizer.step()
    return v.detach() * scale


def uncovered(
    log_joint: LogJoint, u: Tensor, to_z: Callable[[Tensor], Tensor], density: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Other modes, as dense as the draws ``u``, with a valley between them and the nearest draws.

    Valleys are looked for on straight lines of ``z = to_z(u)``, whose log density is given.
    """
    value = log_joint(u).detach()
    ends = other_modes(log_joint, u[value.argmax()], prior_draws(log_joint, 256))
    dense = [end for end in ends if float(log_joint(end[None])) > float(value.median()) - 6.0]
    return [end for end in dense if _apart(density, to_z, end, u)]


def _apart(density: Callable[[Tensor], Tensor], to_z: Callable[[Tensor], Tensor], end: Tensor, u: Tensor) -> bool:
    near = u[((u - end) / u.std(0)).square().sum(-1).argsort()[:8]]
    z_end = to_z(end[None])[0]
    return all(barrier(density, z_end, z) > 1.0 for z in to_z(near))
