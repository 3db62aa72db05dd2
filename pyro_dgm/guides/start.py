r"""Where a posterior starts: Gaussians by natural-gradient variational inference, many at once, best by ELBO.

A Gaussian :math:`N(m, LL^\top)` follows the natural gradient of its ELBO, in whitened coordinates: with
:math:`z = m + Le,\ e \sim N(0, I)` and :math:`g = \nabla\log p(z)`, the residual :math:`r = L^\top g + e` vanishes where
:math:`q = p`. Its mean moves the centre and :math:`S = -E[r e^\top]` is what the precision :math:`I` lacks. The path is
the same in any affine coordinates, so scales from 1e-3 to 1e4 need no tuning. A mode (Laplace, Pathfinder) is no start
for a hierarchy: its density may be infinite where the mass is not.

References:
    | Khan & Rue (2023), "The Bayesian learning rule", arXiv 2107.04562, section 4.
    | Opper & Archambeau (2009), "The variational Gaussian approximation revisited", eqs. 5-6.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_dgm.core.pace import seconds_left, steps, within
from pyro_dgm.model.log_joint import LogJoint, barrier, other_modes, prior_draws, spread

__all__ = ["Gaussians", "find_start"]

_WIDE = 50  # dimensions from which many starts compete by their diagonals, and only the winner gets a covariance
_WIDEST = 400  # dimensions from which it gets none: a covariance costs D^3 a step; the flow has to bend the rest


# The parts of a start, and what each may take of the seconds that are left, where they are limited: chosen by hand.
_NAMES = [f"start {i}/5: {what}" for i, what in enumerate(("climb", "other modes", "Gaussians", "best", "modes"), 1)]
_SHARES = dict(zip(_NAMES, (0.15, 0.15, 0.4, 0.6, 0.9), strict=True))


@dataclass
class Gaussians:
    """C Gaussians: ``loc (C, D)``, ``scale_tril (C, D, D)``, their ELBOs ``(C,)`` in nats and the names of their origins."""

    loc: Tensor
    scale_tril: Tensor
    elbo: Tensor
    names: list[str]

    def pick(self, index: list[int]) -> Gaussians:
        return Gaussians(self.loc[index], self.scale_tril[index], self.elbo[index], [self.names[i] for i in index])

    def best(self, count: int) -> list[int]:
        """The best by ELBO, those that are distinct first."""
        order = self.elbo.argsort(descending=True).tolist()
        distinct: list[int] = []
        for i in order:
            if all(_distance(self, i, j) > 1.0 for j in distinct):
                distinct.append(i)
        return (distinct + [i for i in order if i not in distinct])[:count]


def _distance(q: Gaussians, i: int, j: int) -> float:
    """Mahalanobis distance of two centres, the smaller of both metrics, per root of the dimension beyond four."""
    step = q.loc[i] - q.loc[j]
    both = [torch.linalg.solve_triangular(q.scale_tril[k], step[:, None], upper=False).norm() for k in (i, j)]
    return float(min(both)) / max(1.0, math.sqrt(q.loc.shape[-1] / 4))


def find_start(log_joint: LogJoint) -> Gaussians:
    """The best Gaussian found from eight or more starts, and one for every other mode within 6 nats; best first.

    Raises:
        ValueError: if the log joint is not finite anywhere that was looked.
    """
    budget, size = (100, 16) if log_joint.vectorized else (30, 4), log_joint.dim
    wide, full = size > _WIDE, size <= _WIDEST and log_joint.vectorized
    q = _starts(log_joint)
    q = _natural_gradient(log_joint, q, _NAMES[2], budget[0], budget[1], (0.3, 0.1), temper="tempered", diagonal=wide)
    q = q.pick(list(dict.fromkeys([*q.best(1 if wide else 3), *_modes(log_joint, q, within=20.0)])))
    rate, enough = ((0.3, 0.03), 2 * size) if wide and full else ((0.1, 0.03), 0)
    q = _natural_gradient(
        log_joint, q, _NAMES[3], budget[0], max(2 * budget[1], enough), rate, diagonal=wide and not full
    )
    q = q.pick(_modes(log_joint, q, within=6.0))
    last = max(8 * budget[1], 2 * enough)
    q = _natural_gradient(log_joint, q, _NAMES[4], budget[0] // 2, last, (0.03, 0.02), diagonal=wide and not full)
    if not q.elbo.isfinite().any():
        raise ValueError(
            "AutoFlow: the model's log density is not finite at any of the starting points (prior draws, prior median, "
            "0, optimised points). Usual causes: NaN or infinity in the data, data outside the likelihood's support, "
            "or a prior far from anything plausible."
        )
    return q.pick(q.elbo.argsort(descending=True).tolist())


@torch.no_grad()
def _modes(log_joint: LogJoint, q: Gaussians, *, within: float) -> list[int]:
    """The best, and all that are far from the better ones in both metrics and behind a barrier of a nat."""
    order = q.elbo.argsort(descending=True).tolist()
    found = order[:1]
    for i in order[1:]:
        near = not q.elbo[found[0]] - q.elbo[i] < within or any(_distance(q, i, j) < 2.5 for j in found)
        if not near and all(barrier(log_joint, q.loc[i], q.loc[j]) > 1.0 for j in found):
            found.append(i)
    return found


def _starts(log_joint: LogJoint) -> Gaussians:
    u = prior_draws(log_joint, 256 if log_joint.vectorized else 32)
    density = log_joint(u).detach()
    top = u[density.argsort(descending=True)[:2]]
    median, scale = u.median(0).values, spread(u)
    ones, zero = torch.ones_like(median), torch.zeros_like(median)
    climbed = _climb(log_joint, [top[0], zero])
    starts = {
        "prior": (median, scale),
        "tempered": (median, scale),
        "zero": (zero, 0.3 * ones),
        "prior draw 1": (top[0], 0.1 * scale),
        "prior draw 2": (top[-1], 0.1 * scale),
        "optimised from prior": (climbed[0], 0.1 * ones),
        "optimised from zero": (climbed[1], 0.1 * ones),
        "prior median": (median, 0.1 * scale),
    }
    with within(_SHARES[_NAMES[1]] * seconds_left()):
        others = other_modes(log_joint, climbed[0], u, name=_NAMES[1])
    for i, end in enumerate(others):
        starts[f"other basin {i + 1}"] = (end, 0.1 * scale)
    loc, sd = (torch.stack(column) for column in zip(*starts.values(), strict=True))
    return Gaussians(loc, torch.diag_embed(sd), loc.new_full((len(loc),), -torch.inf), list(starts))


class _OutOfTimeError(Exception):
    """Ends a climb."""


def _climb(log_joint: LogJoint, starts: list[Tensor], iterations: int = 200) -> list[Tensor]:
    """The ends of L-BFGS paths; a start where its path is lost."""
    climbing = steps(_NAMES[0], 5 * iterations // 4 * len(starts), _SHARES[_NAMES[0]])
    next(climbing)
    return [_climbed(log_joint, start, iterations, climbing) for start in starts]


def _climbed(log_joint: LogJoint, start: Tensor, iterations: int, climbing: Iterator[Any]) -> Tensor:
    u = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([u], max_iter=iterations, line_search_fn="strong_wolfe")
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1 and next(climbing, None) is None and seconds_left() < math.inf:
            raise _OutOfTimeError
        value, grad = log_joint.value_and_grad(u[None])
        u.grad = -grad[0]
        return -value[0]

    if torch.isfinite(log_joint(start[None]).detach()).all():
        with suppress(_OutOfTimeError):
            optimizer.step(closure)
    end = u.detach()
    fine = end.isfinite().all() and end.abs().max() < 1e8
    return end if fine and (calls < 2 or log_joint(end[None]).isfinite().all()) else start


@torch.no_grad()
def _natural_gradient(
    log_joint: LogJoint, q: Gaussians, name: str, most: int, draws: int, rate: tuple[float, float], *, temper: str = "",
    diagonal: bool = False,
) -> Gaussians:  # fmt: skip
    """Step all Gaussians together; the rate stays for 30 % of the steps, then decays geometrically."""
    m, L = q.loc.clone(), q.scale_tril.clone()
    tempered = torch.tensor([name == temper for name in q.names])
    for _, progress in steps(name, most, _SHARES[name]):
        rho = rate[0] * (rate[1] / rate[0]) ** max(0.0, (progress - 0.3) / 0.7)
        beta = torch.where(tempered, min(1.0, 0.01 + 2.0 * progress), 1.0).to(m)
        m, L = (_diagonal_step if diagonal else _step)(m, L, *_residuals(log_joint, m, L, draws, beta), rho)
    return Gaussians(m, L, _elbo(log_joint, m, L), q.names)


def _antithetic(m: Tensor, draws: int) -> Tensor:
    e = torch.randn(len(m), draws // 2, m.shape[-1]).to(m)
    return torch.cat([e, -e], 1)


def _residuals(log_joint: LogJoint, m: Tensor, L: Tensor, draws: int, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Base draws and whitened residuals, both ``(C, S, D)``; draws outside the support pull inwards."""
    e = _antithetic(m, draws)
    z = m[:, None] + e @ L.mT
    value, grad = log_joint.value_and_grad(z.reshape(-1, m.shape[-1]))
    r = beta[:, None, None] * (grad.reshape(z.shape) @ L) + e
    bound = 10.0 * math.sqrt(m.shape[-1])
    r = r * (bound / r.norm(dim=-1, keepdim=True).clamp_min(bound))
    inside = value.isfinite().reshape(*z.shape[:2], 1) & r.isfinite().all(-1, keepdim=True)
    return e, torch.where(inside, r, -e)


def _step(m: Tensor, L: Tensor, e: Tensor, r: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """One natural-gradient step with a trust region on the precision and on the centre."""
    outer = r.mT @ e / e.shape[1]
    values, vectors = torch.linalg.eigh(-0.5 * (outer + outer.mT))
    precision = 1.0 + (rho * values).clamp(-0.6, 2.0)
    move = _bounded((vectors @ ((vectors.mT @ r.mean(1, keepdim=True).mT * rho) / precision[..., None]))[..., 0])
    root = L @ (vectors * precision.rsqrt()[:, None]) @ vectors.mT
    return m + (L @ move[..., None])[..., 0], _lower(root)


def _diagonal_step(m: Tensor, L: Tensor, e: Tensor, r: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """The same step, of Gaussians without correlations."""
    scale = L.diagonal(dim1=-2, dim2=-1)
    precision = 1.0 - (rho * (r * e).mean(1)).clamp(-2.0, 0.6)
    move = _bounded(rho * r.mean(1) / precision)
    return m + scale * move, torch.diag_embed(scale * precision.rsqrt())


def _bounded(move: Tensor) -> Tensor:
    """Whitened steps, none longer than 2 (more in high dimensions, where a draw is further off)."""
    bound = 2.0 * max(1.0, math.sqrt(move.shape[-1] / 30))
    return move * (bound / move.norm(dim=-1, keepdim=True).clamp_min(bound))


def _lower(root: Tensor) -> Tensor:
    """The lower-triangular factor with positive diagonal of ``root root^T``."""
    R = torch.linalg.qr(root.mT).R.mT
    return R * R.diagonal(dim1=-2, dim2=-1).sign()[:, None]


def _elbo(log_joint: LogJoint, m: Tensor, L: Tensor, draws: int = 128) -> Tensor:
    e = _antithetic(m, draws if log_joint.vectorized else 16)
    value = log_joint((m[:, None] + e @ L.mT).reshape(-1, m.shape[-1])).reshape(e.shape[:2])
    entropy = L.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1) + 0.5 * m.shape[-1] * math.log(2 * math.pi * math.e)
    return (value.mean(1) + entropy).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
