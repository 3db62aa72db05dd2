r"""Units of data, taken once from the data: of events, whose density keeps its Jacobian, and of what networks read.

A column is shifted and scaled by its mean and standard deviation. Where a few values are so far out that these say nothing of
the others, it is compressed first, :math:`y = \mathrm{asinh}((x - m)/s)`: linear near m, logarithmic far from it. Whether, and
with which m and s, is decided by the log likelihood of a normal distribution, to which the units should bring a column: it is
the entropy that remains.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.distributions.transforms import AffineTransform, ComposeTransform

from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import as_tensor_like, refuse_non_finite, spreads
from pyro_dgm.core.upstream import unseen
from pyro_dgm.core.warn import warn_user

__all__ = ["InputUnits", "Standardize"]

Tails = Literal["bend", "cut", "keep"]

_FAR = 4.0  # sds of the farthest value, from which a column is looked at; not measured, chosen by hand
_GAIN = 0.6  # nats that a compression has to bring (docs/howto/units.md)
_CENTRES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # quantiles that are tried as m
_SPREADS = (0, -2, -4, -6)  # powers of two, of the median distance from m, that are tried as s
_SEARCHED = 10_000  # rows that the search looks at; not measured, chosen by hand
_TIES = 0.5  # share of repeated values from which the least step of a column bounds s; not measured, chosen by hand
_REPEATED = 0.75  # share of one value from which the others say a column's scale; not measured, chosen by hand
_BOUND = 5.0  # units up to which an input stays as it is, and becomes logarithmic; not measured, chosen by hand
_CONSTANT = 4.0  # roundings of a column's numbers that its standard deviation has to exceed
_BLURRED = 20.0  # the same, below which digits are said to be lost


class Standardize(nn.Module):
    r"""The map :math:`x = T^{-1}(\mu + \sigma u)` from standardised units :math:`u` to the data's, as buffers.

    T is the identity for ordinary columns, and :math:`\mathrm{asinh}((x - m)/s)` for those with long tails (counts up to 3e7
    with a median of 2, a Cauchy's, one value of a thousand standard deviations). The units start as the identity; :meth:`fit`
    sets them from data. They are saved with the ``state_dict`` and never trained. A constant column gets :math:`\sigma = 1`.

    Args:
        features: length D of the last dimension.

    Example:
        >>> s = Standardize(2).fit(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
        >>> s(torch.tensor([[0.0, 5.0]]))
        tensor([[-0.7071,  0.0000]])
        >>> counts = torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0, 5.0] * 20 + [3e7])[:, None]
        >>> u = Standardize(1).fit(counts)(counts)
        >>> bool(u.abs().max() < 12), bool(u[1] - u[0] > 0.2)
        (True, True)
    """

    loc: Tensor
    scale: Tensor
    centre: Tensor
    spread: Tensor  # 0 where a column is straight

    @checked(features=1)
    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("spread", torch.zeros(features))
        self._asked: tuple[Tensor, int, Tensor, int, Tensor, int] | None = None
        self._identity = True
        self._straight = True
        self.loaded = False

    @torch.no_grad()
    def fit(
        self, x: Any, floor: float = 0.0, *, mask: Tensor | None = None, tails: Tails = "bend", who: str = "Standardize"
    ) -> Standardize:
        """Take the units from all but the last dimension of ``x``.

        Args:
            x: data, shape ``(..., D)``, two rows at least.
            floor: no standard deviation is below this share of their root mean square: pixels that hardly ever change are
                not blown up.
            mask: of x's shape, True where an entry counts; a column without any keeps the units that it has.
            tails: what becomes of a column with long tails: ``"bend"`` compresses it, ``"cut"`` leaves its tails out of
                location and scale (of a map that has to stay linear), ``"keep"`` takes mean and sd.
            who: is speaking in messages.

        Raises:
            ValueError: for data of another shape, or with NaN or infinity.
        """
        x = as_tensor_like(who, "data", x, None)
        if x.shape[-1:] != self.loc.shape or x.numel() < 2 * len(self.loc):
            raise ValueError(f"{who}: data has shape {tuple(x.shape)}, expected (N >= 2, {len(self.loc)}).")
        rows = x.reshape(-1, len(self.loc)).double()
        seen = None if mask is None else _seen(who, mask, x).reshape(rows.shape)
        refuse_non_finite(who, rows if seen is None else torch.where(seen, rows, 0.0))
        loc, scale, constant = self._straight_units(rows, seen, self._rounding(x), who)
        if floor:
            scale = scale.clamp_min(floor * float(scale.square().mean().sqrt()))
            constant = scale == 0
        found = {"loc": loc, "scale": self._left_out(scale, constant), "centre": 0.0 * loc, "spread": 0.0 * loc}
        if not floor and tails != "keep":
            _treat_tails(found, rows, seen, ~constant, tails)
        known = torch.ones_like(constant) if seen is None else seen.any(0)
        for name, value in found.items():
            own = getattr(self, name)
            own.copy_(torch.where(known.to(own.device), value.to(own), own))
        return self

    def _straight_units(
        self, rows: Tensor, seen: Tensor | None, rounding: float, who: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation of every column, and which are constant."""
        loc, scale = _moments(rows, seen)
        largest = (rows if seen is None else torch.where(seen, rows, 0.0)).abs().amax(0)
        constant = scale <= _CONSTANT * rounding * largest
        _say_blurred(who, scale, largest, rounding)
        return loc, scale, constant

    def _rounding(self, x: Tensor) -> float:
        """The relative rounding of given numbers, or of those that they become, whichever is coarser."""
        return max(_rounding_of(x), _rounding_of(self.loc))

    def _left_out(self, scale: Tensor, constant: Tensor) -> Tensor:
        """The scale of columns, those included that do not vary."""
        return torch.where(constant, 1.0, scale)

    @torch.no_grad()
    def share(self, x: Tensor, columns: int) -> None:
        """Give the first ``columns`` one location and one scale, of all numbers of ``x``: those of an image."""
        for name, value in (("loc", x.mean()), ("scale", x.std()), ("centre", 0.0), ("spread", 0.0)):
            getattr(self, name)[:columns] = value

    def middle(self) -> Tensor:
        """The data that are 0 in these units, shape ``(D,)``."""
        return self.loc if self.is_straight() else self.bend()._call(self.loc)

    @torch.no_grad()
    def forget(self) -> None:
        """Become the identity again."""
        for name, value in (("loc", 0.0), ("scale", 1.0), ("centre", 0.0), ("spread", 0.0)):
            getattr(self, name).fill_(value)

    def is_identity(self) -> bool:
        """Whether nothing was fitted; looked up in the buffers once per change of theirs."""
        return self._look() and self._identity

    @property
    def known(self) -> bool:
        """Whether it has units, of data or of a loaded state, which may be of a module that was trained in these."""
        return self.loaded or not self.is_identity()

    def is_straight(self) -> bool:
        """Whether the map is linear in every column."""
        return self._look() and self._straight

    def _look(self) -> bool:
        """Whether the numbers can be looked at, which those of modules stacked for ``torch.vmap`` cannot."""
        loc = self.loc
        scale = self.scale
        spread = self.spread
        if loc.is_meta or unseen(loc, scale, spread):
            return False
        asked = self._asked
        if (
            asked is None
            or asked[0] is not loc
            or asked[2] is not scale
            or asked[4] is not spread
            or asked[1::2] != (loc._version, scale._version, spread._version)
        ):
            self._asked = (loc, loc._version, scale, scale._version, spread, spread._version)
            self._straight = bool((spread == 0).all())
            self._identity = self._straight and bool((loc == 0).all() and (scale == 1).all())
        return True

    def forward(self, x: Tensor) -> Tensor:
        return self._in_units(as_tensor_like("Standardize", "data", x, self.loc))

    def _in_units(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != self.loc.shape:
            raise ValueError(
                f"{type(self).__name__}: data has shape {tuple(x.shape)}, expected (..., {len(self.loc)})."
            )
        straight = x if self.is_straight() else self.bend()._inverse(x)
        return (straight - self.loc) / self.scale

    def log_slopes(self, u: Tensor) -> Tensor:
        """Log derivatives of the data by standardised units, entry by entry: shape ``(..., D)`` or ``(D,)``."""
        log_scale = self.scale.log()
        if self.is_straight():
            return log_scale
        return log_scale + self.bend().log_slopes(torch.addcmul(self.loc, self.scale, u))

    def inverse(self, u: Tensor) -> Tensor:
        """The data of standardised units."""
        u = as_tensor_like("Standardize", "units", u, None if isinstance(u, Tensor) else self.loc)
        if u.shape[-1:] != self.loc.shape:
            raise ValueError(
                f"{type(self).__name__}: units have shape {tuple(u.shape)}, expected (..., {len(self.loc)})."
            )
        y = torch.addcmul(self.loc, self.scale, u)
        return y if self.is_straight() else self.bend()._call(y)

    def bend(self) -> Sinh:
        """The map from straightened coordinates, :math:`\\mu + \\sigma u`, to data."""
        return Sinh(self.centre, self.spread)

    def transform(self) -> Transform:
        """The map from standardised units to data, with its log-determinant."""
        affine = AffineTransform(self.loc, self.scale, event_dim=1)
        return affine if self.is_straight() else ComposeTransform([affine, self.bend()])

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """States from before a buffer existed have none of it: it keeps the value of new units."""
        for name in ("loc", "scale", "centre", "spread"):
            state.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state, prefix, *rest)
        self.loaded = True


def _seen(who: str, mask: Any, x: Tensor) -> Tensor:
    """The mask of data, of their shape."""
    mask = as_tensor_like(who, "mask", mask, None)
    if mask.dtype is not torch.bool or not spreads(mask.shape, x.shape):
        raise ValueError(
            f"{who}: mask has {mask.dtype} and shape {tuple(mask.shape)}, expected torch.bool and {tuple(x.shape)}."
        )
    return mask.to(x.device).expand(x.shape)


class InputUnits(Standardize):
    r"""Units of what a network reads: as :class:`Standardize`, and bounded, since no density asks for the way back.

    A constant column contributes nothing: it is 0, whatever comes later. Of a column that mostly repeats one value (a rare
    category, a pixel that is hardly ever lit) the others say the scale. What lies more than 5 units out counts by its
    logarithm, :math:`5 (1 + \log(|u| / 5))`. Numbers of another dtype are converted after they were shifted, so that time
    stamps of 1.7e9 seconds keep their digits in float64; in float32 they have lost them before, which a warning says.

    Args:
        features: length D of the last dimension.
        bounded: whether far values count by their logarithm. Not where statistics of them are taken, or a range is looked at.

    >>> u = InputUnits(2).fit(torch.tensor([[2001.0, 7.0], [2003.0, 7.0], [2005.0, 7.0]]))
    >>> u(torch.tensor([[2001.0, 7.0], [2005.0, 1e9]]))
    tensor([[-1.,  0.],
            [ 1.,  0.]])
    """

    def __init__(self, features: int, bounded: bool = True) -> None:
        super().__init__(features)
        self.bounded = bounded

    def forward(self, x: Tensor) -> Tensor:
        x = as_tensor_like("InputUnits", "data", x, None)
        x = x.to(self.loc.device, x.dtype if x.dtype is self.loc.dtype else torch.float64)
        u = self._in_units(x).to(self.loc.dtype)
        if not self.bounded:
            return u
        near = u.clamp(-_BOUND, _BOUND)
        return near * (1.0 + torch.log((u.abs() / _BOUND).clamp_min(1.0)))

    def _straight_units(
        self, rows: Tensor, seen: Tensor | None, rounding: float, who: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        loc, scale, constant = super()._straight_units(rows, seen, rounding, who)
        for j in _mostly_repeated(rows, seen, constant):
            x = rows[:, j] if seen is None else rows[seen[:, j], j]
            usual = x.median()
            loc[j] = usual
            scale[j] = (x[x != usual] - usual).square().mean().sqrt()
        return loc, scale, constant

    def _rounding(self, x: Tensor) -> float:
        return _rounding_of(x)  # they are shifted before they become others

    def _left_out(self, scale: Tensor, constant: Tensor) -> Tensor:
        return torch.where(constant, torch.inf, scale)


class Sinh(Transform):
    r"""The map :math:`x = m + s \sinh(y)` of some columns; where the spread s is 0 it is the identity.

    >>> t = Sinh(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    >>> t.inv(t(torch.tensor([3.0, 3.0])))
    tensor([3., 3.])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, centre: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.centre = centre
        self.bent = spread > 0
        self.spread = torch.where(self.bent, spread, 1.0)

    def _call(self, x: Tensor) -> Tensor:
        return torch.where(self.bent, self.centre + self.spread * torch.where(self.bent, x, 0.0).sinh(), x)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.where(self.bent, torch.asinh((y - self.centre) / self.spread), y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.log_slopes(x).sum(-1)

    def log_slopes(self, x: Tensor) -> Tensor:
        """Log derivatives of y by x, entry by entry."""
        far = torch.where(self.bent, x, 0.0).abs()
        log_cosh = far + torch.log1p(torch.exp(-2.0 * far)) - math.log(2.0)
        return self.spread.log() + torch.where(self.bent, log_cosh, 0.0)


def _rounding_of(x: Tensor) -> float:
    """The relative rounding of numbers of a dtype; whole ones become doubles."""
    return torch.finfo(x.dtype if x.is_floating_point() else torch.float64).eps


def _moments(rows: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    if seen is None:
        return rows.mean(0), rows.std(0)
    n = seen.sum(0)
    loc = torch.where(seen, rows, 0.0).sum(0) / n.clamp_min(1)
    off = torch.where(seen, rows - loc, 0.0)
    return loc, (off.square().sum(0) / (n - 1).clamp_min(1)).sqrt()


def _say_blurred(who: str, scale: Tensor, largest: Tensor, rounding: float) -> None:
    """Warn of numbers whose differences are near their rounding."""
    varies = scale > _CONSTANT * torch.finfo(scale.dtype).eps * largest
    blurred = (varies & (scale < _BLURRED * rounding * largest)).nonzero()[:, 0].tolist()
    if blurred:
        j = blurred[0]
        warn_user(
            f"{who}: column {j} has numbers up to {float(largest[j]):.4g} that differ by {float(scale[j]):.2g}, which is "
            f"near their rounding in this precision: digits are lost. Subtract a reference from it first."
        )


def _mostly_repeated(rows: Tensor, seen: Tensor | None, constant: Tensor) -> list[int]:
    """Columns, among those that vary, of which one value makes up most."""
    few = rows[:: max(1, len(rows) // _SEARCHED)]
    there = None if seen is None else seen[:: max(1, len(rows) // _SEARCHED)]
    usual = few.median(0).values if there is None else few.masked_fill(~there, torch.nan).nanmedian(0).values
    same = few == usual
    share = same.double().mean(0) if there is None else (same & there).sum(0) / there.sum(0).clamp_min(1)
    return ((share > _REPEATED) & ~constant).nonzero()[:, 0].tolist()


def _treat_tails(found: dict[str, Tensor], rows: Tensor, seen: Tensor | None, varies: Tensor, tails: Tails) -> None:
    """Compress, or cut, the columns of which some values lie far out, where it pays."""
    off = (rows - rows.mean(0)).abs() if seen is None else torch.where(seen, (rows - found["loc"]).abs(), 0.0)
    far = off.amax(0) > _FAR * _moments(rows, seen)[1]
    for j in (far & varies).nonzero()[:, 0].tolist():
        x = rows[:, j] if seen is None else rows[seen[:, j], j]
        best = _best_bend(x[:: max(1, len(x) // _SEARCHED)], x)
        if best is None:
            continue
        y = torch.asinh((x - best[0]) / best[1])
        if tails == "bend":
            found["centre"][j], found["spread"][j] = best
            found["loc"][j], found["scale"][j] = y.mean(), y.std()
        else:
            low, middle, high = x[:: max(1, len(x) // _SEARCHED)].quantile(rows.new_tensor([0.16, 0.5, 0.84]))
            found["loc"][j] = middle
            found["scale"][j] = 0.5 * (high - low) if high > low else best[1]


def _best_bend(x: Tensor, whole: Tensor) -> tuple[float, float] | None:
    """The centre and the spread that bring a column nearest to a normal, if they bring enough."""
    x = torch.cat([x, whole.min()[None], whole.max()[None]]).sort().values  # a few huge values are not to be missed
    steps = x.diff()
    step = float(steps[steps > 0].min()) if float((steps == 0).double().mean()) > _TIES else 0.0
    best = None
    least = -float(whole.std().log()) + _GAIN
    for q in _CENTRES:
        centre = float(x[int(q * (len(x) - 1))])
        off = (x - centre).abs()
        usual = float(off[off > 0].median())
        for power in _SPREADS:
            spread = max(usual * 2.0**power, step)
            w = (x - centre) / spread
            gain = -float(torch.asinh(w).std().log() + torch.hypot(torch.ones_like(w), w).log().mean()) - math.log(
                spread
            )
            if gain > least:
                least = gain
                best = (centre, spread)
    return best
