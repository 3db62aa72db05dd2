r"""Where the density of a latent site lives, and the map from the real numbers onto that set.

Torch and Pyro declare angles (VonMises and its kin) on the real line, with a periodic density: over the line it integrates to
infinity, and the evidence of a posterior there grows with every turn that it covers. Their set is the circle,

.. math:: \theta = \big(c + 2\pi(\sigma(u) - \tfrac12)\big) \bmod 2\pi \in [-\pi, \pi),

cut open opposite to a centre c.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import pyro
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Size, Tensor, nn
from torch.distributions import Transform, TransformedDistribution, biject_to, constraints
from torch.distributions.transforms import (
    ComposeTransform,
    IndependentTransform,
    ReshapeTransform,
    _InverseTransform,
)

from pyro_dgm.core.upstream import elementwise

__all__ = [
    "Wrapped",
    "declares_support",
    "holds_grad",
    "holds_moved_circle",
    "innermost",
    "is_circular",
    "made_of",
    "mass",
    "on_the_circle",
    "onto",
    "place_of",
    "repeats",
    "same_ends",
    "same_support",
    "simple_parts",
    "unwrapped",
    "wrap",
]


def unwrapped(fn: Any) -> Any:
    """The distribution below ``to_event``, ``mask`` and ``expand``."""
    while isinstance(fn, (MaskedDistribution, ExpandedDistribution, torch.distributions.Independent)):
        fn = fn.base_dist
    return fn


def declares_support(kind: type) -> bool:
    """Whether a family of transformed distributions has its own word on where it lives, not what its last transform says."""
    return any("support" in c.__dict__ for c in kind.__mro__[: kind.__mro__.index(TransformedDistribution)])


def simple_parts(transforms: Iterable[Transform]) -> Iterator[Transform]:
    """The transforms one after the other, out of compositions, inverses and added event dimensions."""
    for t in transforms:
        if isinstance(t, ComposeTransform):
            yield from simple_parts(t.parts)
        elif isinstance(t, IndependentTransform):
            yield from simple_parts([t.base_transform])
        elif isinstance(t, _InverseTransform) and not _is_simple(t.inv):
            yield from (part.inv for part in reversed(list(simple_parts([t.inv]))))
        elif not isinstance(t, ReshapeTransform):
            yield t


def _is_simple(t: Transform) -> bool:
    return not isinstance(t, ComposeTransform | IndependentTransform | ReshapeTransform)


def made_of(thing: Any) -> dict[str, Any]:
    """The attributes of a constraint or a transform, without what it remembers of its last value."""
    inverse = isinstance(thing, _InverseTransform)  # any other transform holds its inverse, which holds it
    return {k: v for k, v in vars(thing).items() if not k.startswith("_cached") and (inverse or k != "_inv")}


def holds_grad(thing: Any) -> bool:
    """Whether a constraint or a transform holds a tensor that requires grad, in its parts too."""
    if isinstance(thing, Tensor):
        return thing.requires_grad
    if isinstance(thing, nn.Module) and any(p.requires_grad for p in thing.parameters()):
        return True
    if isinstance(thing, list | tuple):
        return any(holds_grad(t) for t in thing)
    if not isinstance(thing, constraints.Constraint | Transform):
        return callable(thing)  # a function may hold anything
    return any(holds_grad(v) for v in made_of(thing).values())


_TURN = 2.0 * math.pi
_IMPROPER = "ImproperUniform"
_TOO_MUCH = 10.0  # mass from which a density is improper or periodic, whatever the grid
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
        return wrap(self.centre + _TURN * (torch.sigmoid(x) - 0.5))

    def _inverse(self, y: Tensor) -> Tensor:
        eps = torch.finfo(y.dtype).eps
        return torch.logit((wrap(y - self.centre) / _TURN + 0.5).clamp(eps, 1.0 - eps))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return math.log(_TURN) + torch.nn.functional.logsigmoid(x) + torch.nn.functional.logsigmoid(-x)


def wrap(angle: Tensor) -> Tensor:
    r"""The same angle in :math:`[-\pi, \pi)`."""
    return torch.remainder(angle + math.pi, _TURN) - math.pi


def onto(fn: Any, centre: Tensor | None) -> Transform:
    """The map from real numbers onto where a distribution lives; onto the circle, where a centre is given."""
    if centre is not None:
        return IndependentTransform(Wrapped(centre), fn.event_dim) if fn.event_dim else Wrapped(centre)
    inner = unwrapped(fn)
    if _is_misdeclared(inner):
        return ComposeTransform([onto(inner.base_dist, None), *inner.transforms])
    return _onto_set(elementwise(fn.support, fn.event_shape))


def place_of(fn: Any) -> Any:
    """What the map of :func:`onto` depends on, to be compared between runs."""
    inner = unwrapped(fn)
    return [place_of(inner.base_dist), list(inner.transforms)] if _is_misdeclared(inner) else fn.support


def _is_misdeclared(fn: Any) -> bool:
    """Whether a transformed distribution lives on less than the last transform's codomain, which torch declares.

    An exponential that is shifted by an affine map is declared on the whole line, and so is one that is stretched.
    """
    if not isinstance(fn, TransformedDistribution) or declares_support(type(fn)):
        return False
    if not all(t.bijective for t in fn.transforms):
        return False
    support = innermost(fn.base_dist.support)
    for part in simple_parts(fn.transforms):
        if not same_ends(support, innermost(part.domain)):
            return True
        support = innermost(part.codomain)
    return _is_misdeclared(unwrapped(fn.base_dist))


def same_ends(a: Any, b: Any) -> bool:
    """Whether two sets are the same up to their border."""
    if a is b or same_support(a, b):
        return True
    ends = [(getattr(c, "lower_bound", None), getattr(c, "upper_bound", None)) for c in (a, b)]
    return ends[0] != (None, None) and _same(list(ends[0]), list(ends[1]))


class _OntoInterval(Transform):
    """Onto intervals some of whose upper ends are infinite, by torch's maps onto an interval and onto a half line."""

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, low: Any, high: Tensor) -> None:
        super().__init__()
        self.bounded = high.isfinite()
        self.interval = biject_to(
            constraints.interval(low, torch.where(self.bounded, high, low + torch.ones_like(high)))
        )
        self.half_line = biject_to(constraints.greater_than(low))

    def _call(self, x: Tensor) -> Tensor:
        return torch.where(self.bounded, self.interval(x), self.half_line(x))

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.where(self.bounded, self.interval.inv(y), self.half_line.inv(y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        inside, above = (t.log_abs_det_jacobian(x, t(x)) for t in (self.interval, self.half_line))
        return torch.where(self.bounded, inside, above)


def _onto_set(support: Any) -> Transform:
    """``biject_to``; where an interval may reach to infinity, as Pyro's GeneralizedPareto does, torch's map is NaN."""
    inner = innermost(support)
    tensor = type(inner) is type(constraints.unit_interval) and isinstance(inner.upper_bound, Tensor)
    if not tensor or _all_finite(inner.upper_bound):
        return biject_to(support)
    return _OntoInterval(inner.lower_bound, inner.upper_bound)


def _all_finite(bound: Tensor) -> bool:
    try:
        return bool(bound.isfinite().all())
    except RuntimeError:  # under vmap no number can be looked at
        return False


def innermost(support: Any) -> Any:
    """The constraint on single entries, also of a mixture."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def same_support(a: Any, b: Any) -> bool:
    """Whether two places, constraints or transforms are of one kind, with equal bounds."""
    if a is b:
        return True
    if isinstance(a, list):
        return _same(a, b)
    x, y = made_of(a), made_of(b)
    return type(a) is type(b) and x.keys() == y.keys() and all(_same(v, y[k]) for k, v in x.items())


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    if isinstance(a, (constraints.Constraint, Transform)):
        return same_support(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return _equal(torch.as_tensor(a), torch.as_tensor(b))
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(v, b[k]) for k, v in a.items())
    return a is b or bool(a == b)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bounds that a plate has expanded equal those that it has not, whatever the plate's size."""
    try:
        return bool((a == b).all())
    except RuntimeError:  # shapes that do not broadcast
        first = a.reshape(-1)[0]
        return bool((a == first).all()) and bool((b == first).all())


@torch.no_grad()
def is_circular(fn: Any) -> bool:
    r"""Whether a distribution that is declared on the real line lives on the circle from :math:`-\pi` to :math:`\pi`.

    Its density then repeats after :math:`2\pi` in every coordinate, and its draws lie there. A constant density is one on
    the circle only if it is :math:`1 / 2\pi`, and an improper prior otherwise.
    """
    draws = repeats(fn)
    return draws is not None and on_the_circle(draws)


def on_the_circle(angle: Tensor) -> bool:
    r"""Whether angles lie between :math:`-\pi` and :math:`\pi`."""
    return bool((angle.abs() <= math.pi + 1e-4).all())


@torch.no_grad()
def repeats(fn: Any) -> Tensor | None:
    r"""Some draws of a distribution whose density repeats after :math:`2\pi`, and that is declared real; None otherwise."""
    fn = unwrapped_mask(fn)
    if innermost(fn.support) is not constraints.real or type(fn).__name__ == _IMPROPER:
        return None
    with pyro.validation_enabled(False):
        try:
            x = fn.sample((16,))
            return x if _repeats(fn, x) else None
        except (NotImplementedError, RuntimeError, ValueError):
            return None


def unwrapped_mask(fn: Any) -> Any:
    """The distribution below ``mask``, whose density counts."""
    while isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    return fn


def _repeats(fn: Any, x: Tensor) -> bool:
    """Whether turns of all coordinates, and of each alone, leave the density as it is.

    So many turns as go into ten standard deviations: a wide normal is nearly the same after one.
    """
    here, entries = fn.log_prob(x), Size(fn.event_shape).numel()
    if is_constant(here):
        return bool((here + entries * math.log(_TURN)).abs().max() < 1e-3)
    turns = _TURN * max(1, round(10.0 * float(x.std()) / _TURN))
    same = lambda shift: torch.allclose(here, fn.log_prob(x + shift), rtol=1e-3, atol=1e-2)  # noqa: E731
    each = torch.eye(entries).reshape(entries, *fn.event_shape).to(x) * turns if same(turns) else ()
    return len(each) > 0 and all(map(same, each))


def holds_moved_circle(fn: Any) -> bool:
    """Whether a distribution is a transform of an angle (in degrees, say), whose period is not known."""
    fn = unwrapped(fn)
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        return holds_moved_circle(fn.component_distribution)
    if not isinstance(fn, TransformedDistribution):
        return False
    return repeats(fn.base_dist) is not None or holds_moved_circle(fn.base_dist)


def is_constant(log_density: Tensor) -> bool:
    """Whether the points have one density, in every element of a batch."""
    return bool((log_density - log_density[:1]).abs().max() < 1e-6)


@torch.no_grad()
def mass(fn: Any) -> float | None:
    """The integral of a scalar distribution's density over its support.

    None where that cannot be told, and for a constant density: that of a box, or an improper prior that is meant to be one. A
    grid of 4,001 points in unconstrained space, denser near the draws, has to agree with every second point of itself, and
    its distribution with that of the draws, so that no spike between the points is missed. A number above 10 needs neither.
    """
    if type(fn).__name__ == _IMPROPER or Size(fn.event_shape) or Size(fn.batch_shape).numel() > _MOST:
        return None
    with pyro.validation_enabled(False):
        try:
            if is_constant(fn.log_prob(fn.sample((16,)))):
                return None
            draws, grid, cells = _integrand(fn)
        except (NotImplementedError, RuntimeError, ValueError, TypeError):
            return None
    fine, coarse = cells.sum(0), 2.0 * cells[::2].sum(0)
    worst = int(fine.log().abs().argmax()) if fine.dim() else 0
    found = float(fine.reshape(-1)[worst])
    if found > _TOO_MUCH:
        return found
    agree = bool(((fine - coarse).abs() <= 0.02 * fine).all()) and _same_distribution(draws, grid, cells)
    return found if agree else None


def _integrand(fn: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Draws and grid in unconstrained space, and density times width of each cell: ``(401 | 4001 | 4001, *batch)``."""
    to_support = onto(fn, None)
    u = to_support.inv(fn.sample((401,))).double()
    low, middle, high = u.quantile(torch.tensor([0.16, 0.5, 0.84], dtype=u.dtype).to(u), 0)
    t = torch.linspace(-12.0, 12.0, 4001, dtype=u.dtype).to(u)
    t = t.reshape(-1, *(1,) * (u.dim() - 1))
    spread = (0.5 * (high - low)).clamp_min(1e-6)
    grid = middle + spread * t.sinh()
    x = to_support(grid)
    log_density = fn.log_prob(x) + to_support.log_abs_det_jacobian(grid, x)
    cells = (log_density.exp() * spread * t.cosh() * (24.0 / 4000)).nan_to_num(0.0, 0.0, 0.0)
    return u, grid, cells.expand(len(t), *fn.batch_shape)


def _same_distribution(draws: Tensor, grid: Tensor, cells: Tensor) -> bool:
    """Whether shares of draws below some grid points are those of the cells, within 0.1 (401 draws: error 0.025)."""
    share = (cells.cumsum(0) - 0.5 * cells) / cells.sum(0)
    at = torch.stack([(share < level).sum(0) for level in (0.1, 0.3, 0.5, 0.7, 0.9)]).clamp_max(len(grid) - 1)
    point, expected = grid.expand(share.shape).gather(0, at), share.gather(0, at)
    below = (draws[None] <= point[:, None]).double().mean(1)
    return bool(((below - expected).abs() < 0.1).all())
