r"""The log joint density of a model as a function of the unconstrained latent vector, for many vectors at once.

.. math:: \log p(x, T(u)) + \log|\det J_T(u)|, \qquad u \in R^D

Modes of a log density: where draws of the prior climb to, and whether a valley lies between two points.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor

from pyro_dgm.core.devices import fork_rng
from pyro_dgm.model.coordinates import Constrain, Coordinates
from pyro_dgm.model.runs import Runs, rounds_of
from pyro_dgm.model.sites import is_enumerable, latent_sites, left_of_plates
from pyro_dgm.model.stability import AnySite
from pyro_dgm.model.vectorize import (
    NOT_VECTORIZED,
    How,
    find_vectorization,
    in_draws_plate,
    joint_alone,
    joint_in_plate,
    joint_of,
    plate_nesting,
)

__all__ = ["LogJoint", "ascend", "barrier", "other_modes", "prior_draws", "spread", "uncovered", "value_and_grad"]


def value_and_grad(log_density: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """A log density of many points and its gradient; where either is not finite the value is -inf and the gradient zero."""
    u = u.detach().requires_grad_()
    with torch.enable_grad():
        value = log_density(u)
        total = torch.where(value.isfinite(), value, torch.zeros_like(value)).sum()
        (grad,) = torch.autograd.grad(total, u)
    inside = value.isfinite() & grad.isfinite().all(-1)
    return torch.where(inside, value, -torch.inf).detach(), torch.where(inside[:, None], grad, 0.0)


class LogJoint:
    """``log_joint(u)``: shape ``(N, D) -> (N,)``, in nats, differentiable; NaN and failed Cholesky factors become -inf.

    All N vectors run in one outer plate or by vmap, as a check against single runs allows; otherwise one by one, with a
    warning. With a subsampled plate each evaluation sees another subsample, unless ``whole``: then all rows of the plate are
    visited, a subsample at a time, and the density is one and the same at every call.

    Args:
        guide: a guide that was set up (it knows the sites, their order and supports).
        model: the model whose density is asked.
        args, kwargs: the model's arguments.
        whole: visit all rows of subsampled plates.

    Raises:
        ValueError: at an evaluation, for a support that depends on the arguments; with ``whole``, for subsampled plates that
            cannot be visited row by row.
    """

    def __init__(
        self, guide: AutoContinuous, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, whole: bool = False
    ) -> None:
        self.guide, self.model, self.args, self.kwargs = guide, model, args, kwargs
        self.dim = guide.latent_dim
        self._fixed = None if hasattr(guide, "coordinates") else Coordinates.of(guide)
        known = {k: s["value"] for k, s in latent_sites(guide.prototype_trace)}
        with pyro.validation_enabled(False), fork_rng():
            conditioned = poutine.trace(poutine.condition(model, data=known))
            trace = poutine.block(conditioned.get_trace)(*args, **kwargs)
        self.nesting = plate_nesting(trace)
        self.missing = [n for n, s in latent_sites(trace) if not is_enumerable(s)]
        self.how = self._find_how()
        rounds = rounds_of([trace]) if whole else []
        self.rounds = len(rounds)
        self._runs = None
        if len(rounds) > 1:
            self._runs = Runs(model, args, kwargs, trace, self.nesting, self.how, rounds, with_grad=True)

    def __call__(self, u: Tensor) -> Tensor:
        with pyro.validation_enabled(False), poutine.block(hide_types=["sample"]):
            value = self._parallel(u) if self.vectorized else torch.stack([self._single(v) for v in u])
        return value.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)

    def at(self, *args: Any, **kwargs: Any) -> LogJoint:
        """The same density, of other data."""
        self.args, self.kwargs = args, kwargs
        return self

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log joint and its gradient; where either is not finite the value is -inf and the gradient zero."""
        return value_and_grad(self, u)

    @property
    def vectorized(self) -> bool:
        """Whether many vectors run at once."""
        return self.how != "loop"

    @property
    def coordinates(self) -> Coordinates:
        """Of the guide, as they are now."""
        return self._fixed or self.guide.coordinates

    def constrain(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Site values ``(N, *site)`` of vectors ``(N, D)``, and the log-determinants ``(N,)``."""
        with pyro.validation_enabled(False):
            if self.how == "plate" or not self.coordinates.moving:
                return self._constrain_together(u)
            if self.how == "vmap":
                return torch.vmap(partial(self._constrain_one, compare=False), randomness="same")(u)
            rows = [self._constrain_one(v) for v in u]
        return {k: torch.stack([v[k] for v, _ in rows]) for k in rows[0][0]}, torch.stack([d for _, d in rows])

    def _constrain_together(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        coordinates, wide = self.coordinates, self._wide(u)
        if coordinates.moving:
            made = Constrain(coordinates, wide, stop=True)
            made.run(in_draws_plate(self.model, len(u), self.nesting), self.args, self.kwargs)
            values, log_dets = made.values, made.log_dets
        else:
            values, log_dets = coordinates.constrain(wide)
        shapes = {k: latent.shape for k, latent in coordinates.latents.items()}
        values = {k: v.reshape(len(u), *shapes[k]) for k, v in values.items()}
        return values, _summed(log_dets, len(u))

    def _constrain_one(self, u: Tensor, compare: bool = True) -> tuple[dict[str, Tensor], Tensor]:
        made = Constrain(self.coordinates, u, stop=True, compare=compare)
        made.run(self.model, self.args, self.kwargs)
        return made.values, _summed(made.log_dets)

    def _wide(self, u: Tensor) -> Tensor:
        """Vectors left of all plates, ``(N, 1, .., D)``."""
        return u.reshape(len(u), *(1,) * self.nesting, self.dim)

    def _parallel(self, u: Tensor) -> Tensor:
        """All draws in one run; those whose matrices cannot be factorised are found by halving, and get -inf."""
        try:
            return self._together(u)
        except torch.linalg.LinAlgError:
            if len(u) == 1:
                return 0.0 * u.sum(-1) - torch.inf
            return torch.cat([self._parallel(half) for half in u.split(-(-len(u) // 2))])

    def _together(self, u: Tensor) -> Tensor:
        if self._runs is not None:
            return self._whole(u)
        if self.how == "vmap":
            return torch.vmap(self._without_enumeration, randomness="same")(u)
        made = Constrain(self.coordinates, self._wide(u))
        joint = joint_in_plate(made(self.model), {}, len(u), self.nesting, self.args, self.kwargs)
        return joint + _summed(made.log_dets, len(u))

    def _single(self, u: Tensor) -> Tensor:
        try:
            return self._whole(u[None])[0] if self._runs is not None else self._alone(u)
        except torch.linalg.LinAlgError:
            return 0.0 * u.sum() - torch.inf

    def _alone(self, u: Tensor) -> Tensor:
        made = Constrain(self.coordinates, u)
        joint = joint_alone(made(self.model), {}, self.nesting, self.args, self.kwargs)
        return joint + _summed(made.log_dets)

    def _without_enumeration(self, u: Tensor) -> Tensor:
        """Of one vector; vmap cannot enumerate."""
        made = Constrain(self.coordinates, u, compare=False)
        trace = poutine.trace(made(self.model)).get_trace(*self.args, **self.kwargs)
        return joint_of(trace) + _summed(made.log_dets)

    def _whole(self, u: Tensor) -> Tensor:
        """With all rows of subsampled plates."""
        values, log_det = self.constrain(u)
        return self._runs.run(len(u), values, keep=(), score=True, discrete="sum").total(len(u)).to(u) + log_det  # type: ignore[union-attr]

    def _find_how(self) -> How:
        with fork_rng(0), torch.no_grad(), pyro.validation_enabled(False):
            loc = self.guide._init_loc()
            rows = [self._constrain_one(v)[0] for v in loc + 0.1 * torch.randn(3, self.dim).to(loc)]
        if not rows[0]:  # a guide of another model
            return "plate"
        latents = self.coordinates.latents
        stacked = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
        values = {k: left_of_plates(v, latents[k].fn.event_dim, self.nesting) for k, v in stacked.items()}
        shapes = {k: latents[k].shape for k in values}
        how, fault = find_vectorization(self.model, values, shapes, self.nesting, self.args, self.kwargs)
        if how == "loop":
            warnings.warn(NOT_VECTORIZED.format(fault), stacklevel=3)
        return how


def _summed(log_dets: dict[str, Tensor], rows: int | None = None) -> Tensor:
    """Log-determinants of all sites, of each of the rows, or of the one run."""
    shape = () if rows is None else (rows,)
    return sum((d.reshape(*shape, -1).sum(-1) for d in log_dets.values()), torch.zeros(()))


@torch.no_grad()
def prior_draws(log_joint: LogJoint, n: int) -> Tensor:
    """Unconstrained prior draws, shape ``(n, D)``; sites without a sampler draw standard normals."""
    rows = []
    with pyro.validation_enabled(False), poutine.block(), AnySite():
        if log_joint.how == "plate":
            model = in_draws_plate(log_joint.model, n, log_joint.nesting)
            return _packed(poutine.trace(model).get_trace(*log_joint.args, **log_joint.kwargs), log_joint, n)
        for _ in range(n):
            trace = poutine.trace(log_joint.model).get_trace(*log_joint.args, **log_joint.kwargs)
            rows.append(_packed(trace, log_joint, 1))
    return torch.cat(rows)


def _packed(trace: poutine.Trace, log_joint: LogJoint, n: int) -> Tensor:
    sites = [(k, s["fn"], s["value"]) for k, s in latent_sites(trace)]
    return log_joint.coordinates.vector(sites, n).nan_to_num(0.0, 1e3, -1e3)


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
