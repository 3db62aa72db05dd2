r"""The log joint density of a model as a function of the unconstrained latent vector, for many vectors at once.

.. math:: \log p(x, T(u)) + \log|\det J_T(u)|, \qquad u \in R^D

Its modes are looked for where draws of the prior climb to; two points are of different modes if a valley of a nat lies
between them.
"""

from __future__ import annotations

import math
import sys
import weakref
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.pace import steps
from pyro_dgm.core.record import Recordable, Records, with_gradients
from pyro_dgm.core.shapes import from_arrays
from pyro_dgm.core.warn import warn_user
from pyro_dgm.model.coordinates import Constrain, Coordinates, HasCoordinates, as_run
from pyro_dgm.model.runs import Runs, rounds_of
from pyro_dgm.model.sites import is_enumerable, latent_sites
from pyro_dgm.model.stability import AnySite
from pyro_dgm.model.vectorize import NOT_VECTORIZED, Engine, How, Model, over_draws, plate_nesting

__all__ = [
    "Density",
    "LogJoint",
    "PulledBack",
    "ascend",
    "barrier",
    "barriers",
    "climbed",
    "other_modes",
    "prior_draws",
    "pulled_back",
    "spread",
    "value_and_grad",
]


Density = Callable[[Tensor], Tensor]  # of many points, in nats


def value_and_grad(log_density: Density, u: Tensor) -> tuple[Tensor, Tensor]:
    """A log density of many points and its gradient; where either is not finite the value is -inf and the gradient zero."""
    found = log_density.replayed(u) if isinstance(log_density, _Recorded) else None
    value, grad = derived(log_density, u) if found is None else found
    inside = value.isfinite() & grad.isfinite().all(-1)
    return torch.where(inside, value, -torch.inf), torch.where(inside[:, None], grad, 0.0)


def derived(log_density: Density, u: Tensor) -> tuple[Tensor, Tensor]:
    """The same, as they are."""
    u = u.detach().requires_grad_()
    with torch.enable_grad():
        value = log_density(u)
        total = torch.where(value.isfinite(), value, torch.zeros_like(value)).sum()
        (grad,) = torch.autograd.grad(total, u)
    return value.detach(), grad


_LATEST: WeakKeyDictionary[AutoContinuous, weakref.ref[LogJoint]] = WeakKeyDictionary()


class _Recorded:
    """A log density of many points that is recorded, and replayed, where that can be done."""

    def __init__(self) -> None:
        self._records = Records()

    def __call__(self, u: Tensor) -> Tensor:
        found = self.replayed(u) if torch.is_grad_enabled() and u.requires_grad else None
        return self.evaluated(u) if found is None else with_gradients(found[0], found[1:], [u])

    def replayed(self, u: Tensor) -> Any:
        """Values and gradients from a record; None where there is none."""
        reads = self.reads()
        return None if reads is None else self._records.replay(Recordable(partial(derived, self.plain), reads), u)

    @property
    def recorded(self) -> bool:
        """Whether it is replayed, for some number of points."""
        return bool(self._records)

    @abstractmethod
    def evaluated(self, u: Tensor) -> Tensor:
        """Its values, by running the model."""

    @abstractmethod
    def plain(self, u: Tensor) -> Tensor:
        """The same in one run, which a matrix that cannot be factorised ends."""

    @abstractmethod
    def reads(self) -> tuple[Any, ...] | None:
        """What its values depend on; None where no run gives them all."""


def pulled_back(density: Density, transform: Any, z: Tensor) -> Tensor:
    """The log density of z where theta = T(z) has the given one, T with ``call_and_ladj``."""
    theta, ladj = transform.call_and_ladj(z)
    return density(theta) + ladj


class PulledBack(_Recorded):
    """:func:`pulled_back` of a log joint, by a transform with frozen parameters."""

    def __init__(self, log_joint: LogJoint, transform: Any) -> None:
        super().__init__()
        self.log_joint = log_joint
        self.transform = transform

    def evaluated(self, u: Tensor) -> Tensor:
        return pulled_back(self.log_joint.evaluated, self.transform, u)

    def plain(self, u: Tensor) -> Tensor:
        return pulled_back(self.log_joint.plain, self.transform, u)

    def reads(self) -> tuple[Any, ...] | None:
        inner = self.log_joint.reads()
        return inner and (*inner, self.transform)


class LogJoint(_Recorded):
    """``log_joint(u)``: shape ``(N, D) -> (N,)``, in nats, differentiable; NaN and failed Cholesky factors become -inf.

    All N vectors run in one outer plate or by vmap, as a check against single runs allows; otherwise one by one, with a
    warning. With a subsampled plate each evaluation sees another subsample, unless ``whole``: then all rows of the plate are
    visited, a subsample at a time, and the density is one and the same at every call. A guide of all rows has them run at once.

    Args:
        guide: a guide that was set up (it knows the sites, their order and supports).
        model: the model whose density is asked.
        args, kwargs: the model's arguments.
        whole: visit all rows of subsampled plates.
        how: how many vectors are run, where that was found for this model and these arguments; None to find it.

    Raises:
        ValueError: at an evaluation, for a support that depends on the arguments; with ``whole``, for subsampled plates that
            cannot be visited row by row.
    """

    def __init__(
        self,
        guide: AutoContinuous,
        model: Model,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        whole: bool = False,
        how: How | None = None,
    ) -> None:
        super().__init__()
        args, kwargs = from_arrays("the model", args), from_arrays("the model", kwargs)
        model = as_run(guide, model)
        self.guide, self.dim = guide, guide.latent_dim
        self._fixed = None if isinstance(guide, HasCoordinates) else Coordinates.of(guide)
        known = {k: s["value"] for k, s in latent_sites(guide.prototype_trace)}
        with pyro.validation_enabled(False), fork_rng():
            conditioned = poutine.trace(poutine.condition(model, data=known))
            trace = poutine.block(conditioned.get_trace)(*args, **kwargs)
        events = {k: latent.fn.event_dim for k, latent in self.coordinates.latents.items()}
        self.engine = Engine(model, args, kwargs, plate_nesting(trace), events)
        self.missing = [n for n, s in latent_sites(trace) if not is_enumerable(s)]
        self.how: How = how or self._find_how()
        rounds = rounds_of([trace]) if whole else []
        self.rounds = len(rounds)
        self._runs = None
        if len(rounds) > 1:
            self._runs = Runs(model, args, kwargs, trace, self.engine.nesting, self.how, rounds, with_grad=True)
        _LATEST[guide] = weakref.ref(self)

    def evaluated(self, u: Tensor) -> Tensor:
        with pyro.validation_enabled(False), poutine.block(hide_types=["sample", "observe"]):
            value = self._parallel(u) if self.vectorized else torch.cat([self._parallel(v) for v in u.split(1)])
        return _finite(value)

    def plain(self, u: Tensor) -> Tensor:
        with pyro.validation_enabled(False), poutine.block(hide_types=["sample", "observe"]):
            return _finite(over_draws(self.how, self._density, u))

    def reads(self) -> tuple[Any, ...] | None:
        if not self.vectorized or self._runs is not None:
            return None
        leaves, places = tree_flatten((self.engine.args, self.engine.kwargs))
        return self.engine.model, *vars(self.coordinates).values(), sys.intern(str(places)), *leaves

    @classmethod
    def known(cls, guide: AutoContinuous, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LogJoint:
        """A new one; how it runs is not asked again where the guide's latest is in use, of this model and these arguments."""
        latest = _LATEST[guide]() if guide in _LATEST else None
        if latest is None or not latest.engine.is_of(as_run(guide, model), args, kwargs):
            return cls(guide, model, args, kwargs)
        return cls(guide, model, args, kwargs, how=latest.how)

    def at(self, *args: Any, **kwargs: Any) -> LogJoint:
        """The same density, of other data."""
        given = from_arrays("the model", args), from_arrays("the model", kwargs)
        self.engine = replace(self.engine, args=given[0], kwargs=given[1])
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
            return over_draws(self.how if self.coordinates.moving else "plate", self._constrained, u)

    def _constrained(self, u: Tensor, n: int | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Of one vector, or of ``n`` in a plate."""
        coordinates = self.coordinates
        if n is not None and not coordinates.moving:
            values, log_dets = coordinates.constrain(self._wide(u))
        else:
            made = self._constrain(u, n, stop=True).run(self.engine.wide(n), self.engine.args, self.engine.kwargs)
            values, log_dets = made.values, made.log_dets
        if n is not None:
            values = {k: v.reshape(n, *coordinates.latents[k].shape) for k, v in values.items()}
        return values, _summed(log_dets, n)

    def _constrain(self, u: Tensor, n: int | None, *, stop: bool = False) -> Constrain:
        wide = u if n is None else self._wide(u)
        return Constrain(self.coordinates, wide, stop=stop, compare=self.how != "vmap")

    def _wide(self, u: Tensor) -> Tensor:
        """Vectors left of all plates, ``(N, 1, .., D)``."""
        return u.reshape(len(u), *(1,) * self.engine.nesting, self.dim)

    def _parallel(self, u: Tensor) -> Tensor:
        """Those vectors whose matrices cannot be factorised are found by halving, and get -inf."""
        try:
            return self._whole(u) if self._runs is not None else over_draws(self.how, self._density, u)
        except torch.linalg.LinAlgError:
            if len(u) == 1:
                return 0.0 * u.sum(-1) - torch.inf
            return torch.cat([self._parallel(half) for half in u.split(-(-len(u) // 2))])

    def _density(self, u: Tensor, n: int | None = None) -> Tensor:
        """Of one vector, or of ``n`` in a plate."""
        made = self._constrain(u, n)
        joint = self.engine.joint_of(made(self.engine.model), n, enumerate_sites=self.how != "vmap")
        return joint + _summed(made.log_dets, n)

    def terms(self, u: Tensor) -> list[Tensor]:
        """The log joint in parts, each ``(N, entries)``; log-determinants are parts, too."""
        with pyro.validation_enabled(False), poutine.block(hide_types=["sample", "observe"]):
            return list(over_draws(self.how, self._parts, u))

    def _parts(self, u: Tensor, n: int | None = None) -> tuple[Tensor, ...]:
        """Of one vector, or of ``n`` in a plate."""
        made = self._constrain(u, n)
        terms = self.engine.terms_of(made(self.engine.model), n, enumerate_sites=self.how != "vmap")
        found = [*terms, *made.log_dets.values()]
        if n is None:
            return tuple(t.reshape(-1) for t in found)
        return tuple(t.reshape(n, -1) if t.shape[:1] == (n,) else t.sum().expand(n, 1) for t in found)

    def _whole(self, u: Tensor) -> Tensor:
        """With all rows of subsampled plates."""
        values, log_det = self.constrain(u)
        return self._runs.run(len(u), values, keep=(), score=True, discrete="sum").total(len(u)).to(u) + log_det  # type: ignore[union-attr]

    def _find_how(self) -> How:
        """By three vectors around the guide's first one; of another model's guide no site is known, and none is asked."""
        with fork_rng(0), torch.no_grad(), pyro.validation_enabled(False):
            loc = self.guide._init_loc()
            near = loc + 0.1 * torch.randn(3, self.dim).to(loc)
            self.how = "loop"
            values = over_draws("loop", self._constrained, near)[0]
        if not values:
            return "plate"
        how, fault = self.engine.find_how(values)
        if how == "loop":
            warn_user(NOT_VECTORIZED.format(fault))
        return how


def _finite(value: Tensor) -> Tensor:
    return value.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def _summed(log_dets: dict[str, Tensor], rows: int | None = None) -> Tensor:
    """Log-determinants of all sites, of each of the rows, or of the one run."""
    shape = () if rows is None else (rows,)
    return sum((d.reshape(*shape, -1).sum(-1) for d in log_dets.values()), torch.zeros(()))


@torch.no_grad()
def prior_draws(log_joint: LogJoint, n: int) -> Tensor:
    """Unconstrained prior draws, shape ``(n, D)``; sites without a sampler draw standard normals."""
    with pyro.validation_enabled(False), poutine.block(), AnySite():
        if log_joint.how == "plate":
            return _prior_run(log_joint, n)
        return torch.cat([_prior_run(log_joint) for _ in range(n)])


def _prior_run(log_joint: LogJoint, n: int | None = None) -> Tensor:
    """The vector of one run, ``(1, D)``, or those of ``n`` draws in a plate."""
    trace = log_joint.engine.trace(n=n)
    sites = [(k, s["fn"], s["value"]) for k, s in latent_sites(trace)]
    return log_joint.coordinates.vector(sites, n or 1).nan_to_num(0.0, 1e3, -1e3)


def barriers(log_density: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """How far the log density on straight segments between rows of ``a`` and ``b`` falls below its lower end, in nats."""
    t = torch.linspace(0.0, 1.0, 21).to(a)[:, None]
    points = a[:, None] + t * (b - a)[:, None]
    value = torch.cat([log_density(p).detach() for p in points.flatten(0, 1).split(512)]).reshape(points.shape[:2])
    return torch.minimum(value[:, 0], value[:, -1]) - value.amin(1)


def barrier(log_density: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    """The same, of one segment."""
    return float(barriers(log_density, a[None], b[None]))


def spread(u: Tensor) -> Tensor:
    """A robust standard deviation of draws, by coordinate, between 1e-3 and 1e3."""
    return (u.quantile(0.84, 0) - u.quantile(0.16, 0)).div(2).clamp(1e-3, 1e3)


def climbed(log_joint: LogJoint, u: Tensor, name: str = "other modes") -> list[Tensor]:
    """The best end of gradient ascent from prior draws ``u``, and other modes among the ends."""
    if not log_joint.vectorized:
        return []
    ends = ascend(log_joint, u[:32], spread(u), name)
    ends = ends[log_joint(ends).detach().argsort(descending=True)]
    return [ends[0], *other_modes(log_joint, ends[0], ends[1:])]


def other_modes(log_joint: LogJoint, best: Tensor, ends: Tensor, limit: int = 3) -> list[Tensor]:
    """Those of the ``ends`` that are at least 1 nat apart from ``best`` and from one another, the first ones first."""
    found = [best]
    while len(found) <= limit and len(ends):
        ends = ends[barriers(log_joint, ends, found[-1].expand_as(ends)) > 1.0]
        found.extend(ends[:1])
    return found[1:]


@torch.no_grad()
def ascend(log_joint: LogJoint, u: Tensor, scale: Tensor, name: str, most: int = 32) -> Tensor:
    """Points after some steps of Adam uphill, each on its own, in units of ``scale``; rates fall from half a unit to none."""
    u, mean, square = u.clone(), torch.zeros_like(u), torch.zeros_like(u)
    for i, _ in steps(name, most):
        grad = log_joint.value_and_grad(u)[1] * scale
        mean, square = mean.lerp(grad, 0.1), square.lerp(grad.square(), 0.01)
        size = 0.5 * (1.0 - i / most) * math.sqrt(1.0 - 0.99 ** (i + 1)) / (1.0 - 0.9 ** (i + 1))
        u += size * scale * mean / square.sqrt().clamp_min(1e-8)
    return u
