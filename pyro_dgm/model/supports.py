r"""Where the density of a latent site integrates to one, and the map from the real numbers onto that set.

Torch and Pyro declare angles (VonMises and its kin) on the real line, with a periodic density: over the line it integrates to
infinity, and the evidence of a posterior there grows with every turn that it covers. Their set is the circle,

.. math:: \theta = \big(c + 2\pi(\sigma(u) - \tfrac12)\big) \bmod 2\pi \in [-\pi, \pi),

cut open opposite to a centre c.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Size, Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.transforms import IndependentTransform

__all__ = ["Wrapped", "follows_parameters", "innermost", "is_circular", "mass", "onto", "same_support"]

_TURN = 2.0 * math.pi
_IMPROPER = "ImproperUniform"
_MOST = 64  # elements of a batch whose densities are integrated


class Wrapped(Transform):
    r"""Real numbers to angles in :math:`[-\pi, \pi)`; 0 goes to the centre, and the ends meet opposite to it."""

    domain = constraints.real
    codomain = constraints.interval(-math.pi, math.pi)
    bijective = True

    def __init__(self, centre: Tensor | float) -> None:
        super().__init__()
        self.centre = centre

    def _call(self, x: Tensor) -> Tensor:
        return _wrap(self.centre + _TURN * (torch.sigmoid(x) - 0.5))

    def _inverse(self, y: Tensor) -> Tensor:
        eps = torch.finfo(y.dtype).eps
        return torch.logit((_wrap(y - self.centre) / _TURN + 0.5).clamp(eps, 1.0 - eps))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return math.log(_TURN) + torch.nn.functional.logsigmoid(x) + torch.nn.functional.logsigmoid(-x)


def _wrap(angle: Tensor) -> Tensor:
    return torch.remainder(angle + math.pi, _TURN) - math.pi


def onto(fn: Any, centre: Tensor | None) -> Transform:
    """The map from real numbers onto the support of a distribution; onto the circle, where a centre is given."""
    if centre is None:
        return biject_to(_without_infinite_ends(fn.support))
    return IndependentTransform(Wrapped(centre), fn.event_dim) if fn.event_dim else Wrapped(centre)


def _without_infinite_ends(support: Any) -> Any:
    """An interval up to infinity, as Pyro's GeneralizedPareto has one, onto which torch's map is NaN, as a half line."""
    inner = innermost(support)
    if type(inner) is not type(constraints.unit_interval) or not _infinite(inner.upper_bound):
        return support
    half = constraints.greater_than(inner.lower_bound)
    return constraints.independent(half, support.event_dim) if support.event_dim else half


def _infinite(bound: Any) -> bool:
    try:
        return not bool(torch.as_tensor(bound).isfinite().any())
    except RuntimeError:  # under vmap no number can be looked at; such a bound follows other latents
        return False


def innermost(support: Any) -> Any:
    """The constraint on single entries, also of a mixture."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def same_support(a: Any, b: Any) -> bool:
    """Whether two constraints are of one kind, with equal bounds."""
    if a is b:
        return True
    if type(a) is not type(b) or vars(a).keys() != vars(b).keys():
        return False
    return all(_same(x, vars(b)[k]) for k, x in vars(a).items())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, constraints.Constraint):
        return same_support(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return _equal(torch.as_tensor(a), torch.as_tensor(b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bounds that a plate has expanded equal those that it has not."""
    try:
        return bool((a == b).all())
    except RuntimeError:  # shapes that do not broadcast
        return False


def follows_parameters(support: Any) -> bool:
    """Whether a bound is learned: it then moves from one training step to the next."""
    return any(t.requires_grad for t in _tensors(support))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, constraints.Constraint):
        yield from (t for v in vars(value).values() for t in _tensors(v))
    elif isinstance(value, (list, tuple)):
        yield from (t for v in value for t in _tensors(v))


@torch.no_grad()
def is_circular(fn: Any) -> bool:
    r"""Whether a distribution that is declared on the real line lives on a circle.

    Its density then repeats after :math:`2\pi` in every coordinate, and its draws lie in :math:`[-\pi, \pi]`. A constant density
    is one on the circle only if it is :math:`1 / 2\pi`, and an improper prior otherwise.
    """
    while isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    if innermost(fn.support) not in (constraints.real, constraints.real_vector) or type(fn).__name__ == _IMPROPER:
        return False
    with pyro.validation_enabled(False):
        try:
            x = fn.sample((16,))
            return bool((x.abs() <= math.pi + 1e-4).all()) and _repeats(fn, x)
        except (NotImplementedError, RuntimeError, ValueError):
            return False


def _repeats(fn: Any, x: Tensor) -> bool:
    """Whether a turn of all coordinates, and of each alone, leaves the density as it is."""
    here, entries = fn.log_prob(x), Size(fn.event_shape).numel()
    if is_constant(here):
        return bool((here + entries * math.log(_TURN)).abs().max() < 1e-3)
    same = lambda shift: torch.allclose(here, fn.log_prob(x + shift), rtol=1e-3, atol=1e-2)  # noqa: E731
    each = torch.eye(entries).reshape(entries, *fn.event_shape).to(x) * _TURN if same(_TURN) else ()
    return len(each) > 0 and all(map(same, each))


def is_constant(log_density: Tensor) -> bool:
    """Whether the points have one density, in every element of a batch."""
    return bool((log_density - log_density[:1]).abs().max() < 1e-6)


@torch.no_grad()
def mass(fn: Any) -> float | None:
    """The integral of a scalar distribution's density over its declared support.

    None where that cannot be told, and for a constant density: that of a box, or an improper prior that is meant to be one. A
    grid of 4,001 points in unconstrained space, denser near the draws, has to agree with every second point of itself.
    """
    if type(fn).__name__ == _IMPROPER or Size(fn.event_shape) or Size(fn.batch_shape).numel() > _MOST:
        return None
    with pyro.validation_enabled(False):
        try:
            if is_constant(fn.log_prob(fn.sample((16,)))):
                return None
            values = _integrand(fn)
        except (NotImplementedError, RuntimeError, ValueError, TypeError):
            return None
    fine, coarse = values.sum(0), 2.0 * values[::2].sum(0)
    agree = bool(((fine - coarse).abs() <= 0.02 * fine).all())
    worst = int((fine.log().abs()).argmax()) if fine.dim() else 0
    return float(fine.reshape(-1)[worst]) if agree else None


def _integrand(fn: Any) -> Tensor:
    """Density times width of each cell, shape ``(4001, *batch)``."""
    to_support = onto(fn, None)
    u = to_support.inv(fn.sample((401,))).double()
    low, middle, high = u.quantile(torch.tensor([0.16, 0.5, 0.84], dtype=u.dtype).to(u), 0)
    t = torch.linspace(-12.0, 12.0, 4001, dtype=u.dtype).to(u)
    t = t.reshape(-1, *(1,) * (u.dim() - 1))
    spread = (0.5 * (high - low)).clamp_min(1e-6)
    grid = middle + spread * t.sinh()
    x = to_support(grid)
    log_density = fn.log_prob(x) + to_support.log_abs_det_jacobian(grid, x)
    return (log_density.exp() * spread * t.cosh() * (24.0 / 4000)).nan_to_num(0.0, 0.0, 0.0)
