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
from pyro_dgm.model.log_joint import LogJoint, barrier, climbed, prior_draws, spread

__all__ = ["Gaussians", "antithetic", "find_start", "gaussians_at", "natural_step", "shortened"]

_WIDE = 50  # dimensions from which many starts compete by their diagonals, and only the winner gets a covariance
_WIDEST = 1_000  # dimensions from which it gets none: a covariance costs D^3 a step; the flow has to bend the rest
_SLOW, _MOST_SLOW = 400, 40  # dimensions above which so many steps are enough: each takes a second or two at 1,000


# The parts of a start, and what each may take of the seconds that are left, where they are limited: chosen by hand.
_NAMES = [f"start {i}/4: {what}" for i, what in enumerate(("other modes", "Gaussians", "climb", "best"), 1)]
_SHARES = dict(zip(_NAMES, (0.15, 0.5, 0.3, 0.9), strict=True))

# Of the rates and looks. With these 17 reference posteriors start at the KL of before, in 52 to 180 runs of the model instead of
# 400 to 540; ten of them end the race after 20 to 40 steps, and settle in 10.
_RACE = 0.5  # rate while Gaussians race
_LAST = 0.02  # least rate while they settle
_LOOK = 10  # steps between looks at which Gaussians still climb
_LEAST_GAIN = 0.1  # nats, or three standard errors, in so many steps: what still climbs
_NEAR = 20.0  # nats below the best, within which a Gaussian that climbs no more may still become another mode
_TEMPERED = 25  # steps in which the tempered start comes to the density
_ARRIVED = 2e-3  # nats that a step of rate one would bring, by the mean residuals of a look


@dataclass
class Gaussians:
    """C Gaussians: ``loc (C, D)``, ``scale_tril (C, D, D)``, their ELBOs ``(C,)`` in nats and the names of their origins."""

    loc: Tensor
    scale_tril: Tensor
    elbo: Tensor
    names: list[str]

    def pick(self, index: list[int]) -> Gaussians:
        return Gaussians(self.loc[index], self.scale_tril[index], self.elbo[index], [self.names[i] for i in index])

    def joined(self, other: Gaussians) -> Gaussians:
        loc, tril, elbo = (torch.cat([getattr(q, k) for q in (self, other)]) for k in ("loc", "scale_tril", "elbo"))
        return Gaussians(loc, tril, elbo, self.names + other.names)


def _distance(q: Gaussians, i: int, j: int) -> float:
    """Mahalanobis distance of two centres, the smaller of both metrics, per root of the dimension beyond four."""
    step = q.loc[i] - q.loc[j]
    both = [torch.linalg.solve_triangular(q.scale_tril[k], step[:, None], upper=False).norm() for k in (i, j)]
    return float(min(both)) / max(1.0, math.sqrt(q.loc.shape[-1] / 4))


def _twins(q: Gaussians, i: int, j: int) -> bool:
    """Whether two Gaussians have one centre, in the metric of either, and nearly one volume."""
    step = q.loc[i] - q.loc[j]
    both = [torch.linalg.solve_triangular(q.scale_tril[k], step[:, None], upper=False).norm() for k in (i, j)]
    return float(max(both)) < max(1.0, math.sqrt(q.loc.shape[-1] / 4))


def find_start(log_joint: LogJoint) -> Gaussians:
    """The best Gaussian found from six or more starts, and one for every other mode within 6 nats; best first.

    Raises:
        ValueError: if the log joint is not finite anywhere that was looked.
    """
    size, alone = log_joint.dim, not log_joint.vectorized
    wide, full = size > _WIDE, size <= _WIDEST and not alone
    most, few, many = (30, 4, 8) if alone else (100, 2 * size if 8 < size <= 16 else 16, max(64, 2 * size))
    q, arrived = _raced(log_joint, _starts(log_joint), most, few, diagonal=wide)
    if not arrived:  # too far, or of too many scales at once
        q = q.joined(_raced(log_joint, _climbed(log_joint, q), most, few, diagonal=wide)[0])
    q = q.pick(_modes(log_joint, q, within=_NEAR))
    most = min(most, _MOST_SLOW) if size > _SLOW else most
    if wide and full:
        q = _settled(log_joint, q, most, many, least=0.3)
    q = _settled(log_joint, q, most, many, diagonal=wide and not full)
    q = q.pick(_modes(log_joint, q, within=6.0))
    if not q.elbo.isfinite().any():
        raise ValueError(
            "AutoFlow: the model's log density is not finite at any of the starting points (prior draws, prior median, "
            "0, optimised points). Usual causes: NaN or infinity in the data, data outside the likelihood's support, "
            "or a prior far from anything plausible."
        )
    return q


def gaussians_at(log_joint: LogJoint, points: Tensor) -> Gaussians:
    """Gaussians that begin small at points ``(C, D)``, those within 6 nats of the best, one for each mode."""
    size, wide = log_joint.dim, log_joint.dim > _WIDE
    tril = 0.1 * torch.diag_embed(spread(prior_draws(log_joint, 256)).expand_as(points))
    q = Gaussians(points, tril, points.new_full((len(points),), -torch.inf), [f"point {i}" for i in range(len(points))])
    q = _raced(log_joint, q, 100, 2 * size if 8 < size <= 16 else 16, diagonal=wide)[0]
    q = _settled(log_joint, q.pick(_modes(log_joint, q, within=_NEAR)), 100, max(64, 2 * size), diagonal=wide)
    return q.pick(_modes(log_joint, q, within=6.0))


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
    top = u[log_joint(u).detach().argsort(descending=True)[:2]]
    median, scale = u.median(0).values, spread(u)
    ones, zero = torch.ones_like(median), torch.zeros_like(median)
    starts = {
        "prior": (median, scale),
        "tempered": (median, scale),
        "zero": (zero, 0.3 * ones),
        "prior draw 1": (top[0], 0.1 * scale),
        "prior draw 2": (top[-1], 0.1 * scale),
        "prior median": (median, 0.1 * scale),
    }
    with within(_SHARES[_NAMES[0]] * seconds_left()):
        ends = climbed(log_joint, u, name=_NAMES[0])
    for i, end in enumerate(ends):
        starts[f"climbed {i + 1}"] = (end, 0.1 * scale)
    loc, sd = (torch.stack(column) for column in zip(*starts.values(), strict=True))
    return Gaussians(loc, torch.diag_embed(sd), loc.new_full((len(loc),), -torch.inf), list(starts))


def _climbed(log_joint: LogJoint, q: Gaussians) -> Gaussians:
    """Small Gaussians where L-BFGS ends from the best centre and from zero."""
    ends = torch.stack(_climb(log_joint, [q.loc[q.elbo.argmax()], torch.zeros_like(q.loc[0])]))
    tril = 0.1 * torch.eye(ends.shape[1]).to(ends).expand(2, -1, -1)
    return Gaussians(ends, tril, ends.new_full((2,), -torch.inf), ["optimised from the best", "optimised from zero"])


class _OutOfTimeError(Exception):
    """Ends a climb."""


def _climb(log_joint: LogJoint, starts: list[Tensor], iterations: int = 200) -> list[Tensor]:
    """The ends of L-BFGS paths; a start where its path is lost."""
    climbing = steps(_NAMES[2], 5 * iterations // 4 * len(starts), _SHARES[_NAMES[2]])
    next(climbing)
    return [_end_of(log_joint, start, iterations, climbing) for start in starts]


def _end_of(log_joint: LogJoint, start: Tensor, iterations: int, climbing: Iterator[Any]) -> Tensor:
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
def _raced(log_joint: LogJoint, q: Gaussians, most: int, draws: int, *, diagonal: bool) -> tuple[Gaussians, bool]:
    """Step all Gaussians together until none climbs; on the way those leave that are where a better one is, or far below.

    Returns those that are left, and whether the best has arrived.
    """
    arrived = False
    before, error = torch.full_like(q.elbo, -torch.inf), torch.zeros_like(q.elbo)
    rows: list[Tensor] = []
    for i, _ in steps(_NAMES[1], most, _SHARES[_NAMES[1]]):
        beta = [min(1.0, 0.01 + i / _TEMPERED) if name == "tempered" else 1.0 for name in q.names]
        e, r, value = _residuals(log_joint, q.loc, q.scale_tril, draws, q.loc.new_tensor(beta))
        rows.append(value + _entropy(q.scale_tril)[:, None])
        q.loc, q.scale_tril = (_diagonal_step if diagonal else natural_step)(q.loc, q.scale_tril, e, r, _RACE)
        if len(rows) == _LOOK:
            seen, rows = torch.cat(rows, 1), []
            q.elbo, noise = seen.mean(1).nan_to_num(nan=-torch.inf), seen.std(1) * seen.shape[1] ** -0.5
            climbs = ~(q.elbo - before < (3.0 * (noise + error)).clamp_min(_LEAST_GAIN))
            stays = _staying(q, climbs)
            before, error, q, climbs = q.elbo[stays], noise[stays], q.pick(stays), climbs[stays]
            arrived = not climbs[0]
            if not climbs.any():
                break
    return Gaussians(q.loc, q.scale_tril, _elbo(log_joint, q.loc, q.scale_tril), q.names), arrived


def _staying(q: Gaussians, climbs: Tensor) -> list[int]:
    """Without those that are where a better one is, and those that climb no more and are far below the best."""
    kept: list[int] = []
    for i in q.elbo.argsort(descending=True).tolist():
        lost = not climbs[i] and not q.elbo[i] > q.elbo.max() - _NEAR
        if not kept or not (lost or any(_twins(q, i, j) for j in kept)):
            kept.append(i)
    return kept


@torch.no_grad()
def _settled(
    log_joint: LogJoint, q: Gaussians, most: int, draws: int, *, diagonal: bool = False, least: float = _LAST
) -> Gaussians:
    """Step Gaussians at rates that fall as 1/t, which averages their targets, until a step of rate one would bring little."""
    step, ones = _diagonal_step if diagonal else natural_step, torch.ones_like(q.elbo)
    residuals: list[tuple[Tensor, Tensor]] = []
    for i, _ in steps(_NAMES[3], most, _SHARES[_NAMES[3]]):
        e, r, _ = _residuals(log_joint, q.loc, q.scale_tril, draws, ones)
        q.loc, q.scale_tril = step(q.loc, q.scale_tril, e, r, max(least, 1.0 / (i + 2)))
        residuals.append((r.mean(1), r.mT @ e / e.shape[1]))
        if len(residuals) == _LOOK:
            mean, outer = (torch.stack(x).mean(0) for x in zip(*residuals, strict=True))
            residuals.clear()
            if (0.5 * mean.square().sum(-1) + 0.0625 * (outer + outer.mT).square().sum((-1, -2)) < _ARRIVED).all():
                break
    return Gaussians(q.loc, q.scale_tril, _elbo(log_joint, q.loc, q.scale_tril), q.names)


def antithetic(m: Tensor, draws: int) -> Tensor:
    """Normal draws in pairs of opposite sign, of covariance one where they are many enough: exact for a Gaussian density."""
    e = torch.randn(len(m), draws // 2, m.shape[-1]).to(m)
    if 2 * m.shape[-1] <= draws:
        e = torch.linalg.qr(e).Q * math.sqrt(e.shape[1])
    return torch.cat([e, -e], 1)


def _residuals(log_joint: LogJoint, m: Tensor, L: Tensor, draws: int, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Base draws and whitened residuals, both ``(C, S, D)``, and log densities; draws outside the support pull inwards."""
    e = antithetic(m, draws)
    z = m[:, None] + e @ L.mT
    value, grad = log_joint.value_and_grad(z.reshape(-1, m.shape[-1]))
    r = beta.to(m)[:, None, None] * (grad.reshape(z.shape) @ L) + e
    r = shortened(r, 10.0 * math.sqrt(m.shape[-1]))
    inside = value.isfinite().reshape(*z.shape[:2], 1) & r.isfinite().all(-1, keepdim=True)
    return e, torch.where(inside, r, -e), value.reshape(z.shape[:2])


def natural_step(m: Tensor, L: Tensor, e: Tensor, r: Tensor, rho: float) -> tuple[Tensor, Tensor]:
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
    return shortened(move, 2.0 * max(1.0, math.sqrt(move.shape[-1] / 30)))


def shortened(steps: Tensor, longest: float) -> Tensor:
    """Vectors ``(*batch, D)``, none longer than that."""
    return steps * (longest / steps.norm(dim=-1, keepdim=True).clamp_min(longest))


def _lower(root: Tensor) -> Tensor:
    """The lower-triangular factor with positive diagonal of ``root root^T``."""
    R = torch.linalg.qr(root.mT).R.mT
    return R * R.diagonal(dim1=-2, dim2=-1).sign()[:, None]


def _entropy(L: Tensor) -> Tensor:
    return L.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1) + 0.5 * L.shape[-1] * math.log(2 * math.pi * math.e)


def _elbo(log_joint: LogJoint, m: Tensor, L: Tensor, draws: int = 128) -> Tensor:
    e = antithetic(m, draws if log_joint.vectorized else 16)
    value = log_joint((m[:, None] + e @ L.mT).reshape(-1, m.shape[-1])).reshape(e.shape[:2])
    return (value.mean(1) + _entropy(L)).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
