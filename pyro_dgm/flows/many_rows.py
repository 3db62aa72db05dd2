r"""Where a flow starts when its rows are many: units in which each column is a standard normal by itself, and a mixture.

The distribution function of a column is taken at K quantiles of the rows, and

.. math:: u = S(v), \qquad S(q_k) = \Phi^{-1}(k / K),

with a monotone rational-quadratic spline S between them (Gregory & Delbourgo 1982, "Piecewise rational quadratic interpolation to
monotonic data") and straight lines outside. A spline of few pieces that a network sets for each row does not find the steps of a
column that is nearly discrete; quantiles do, at the price of some :math:`K / 2N` nats a column for N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.pace import seconds_left
from pyro_dgm.core.saved import LateBuffers
from pyro_dgm.flows.mixture_units import Normals, fitted_mixture, fitted_scales

__all__ = [
    "ColumnUnits",
    "Piece",
    "Splines",
    "best_mixture",
    "column_splines",
    "is_one_normal",
    "seems_normal",
]

# Of the splines. Staircases of copula-8, nats a left-out row: -.059, -.031, -.019, -.015, -.027 with 64, 128 ... 1,024 pieces.
_PIECES = (8, 16, 32, 64, 128, 256, 512)
_SHARE = 0.8  # of the rows, to fit to, while the number of pieces is chosen
_LEAST_EACH = 20  # rows of a piece; not measured, chosen by hand
_LEAST_GAIN = 0.01  # nats a row over the normal law, for a column to get a spline; not measured, chosen by hand
# Nats over eight pieces from which a column is rough: staircases of copula-8 have .48 and .50, all other columns of the tables of
# docs/benchmarks/tables.md at most .08.
_ROUGH = 0.2
_TAIL, _LEAST_IN_TAIL = 12, 5  # finer levels at each end, and rows beyond the last; not measured, chosen by hand
_REPEATED = 0.1  # share of repeated values from which a column has no density; not measured, chosen by hand
_STEEPEST = 1e4  # slope: of values nearer together one is a knot; not measured, chosen by hand
# Of the mixture for many rows (docs/benchmarks/tables.md).
_COMPONENTS = (2, 4, 8, 16, 32, 64, 128, 256)
_PSEUDO = 4.0  # rows of the common covariance in each normal's: sheets-6, 128 normals, .172, .170, .176 for 2, 4, 8
_CHOSEN_ON = 5_000  # rows at least
_CHOSEN_SQUARES = 2_000_000  # and so many squares of a row's entries; not measured, chosen by hand
_LONGEST = 10  # iterations; with 20 sheets-6 ends at .119 +- .012 for .116 +- .011, after 22 CPU seconds for 14
_LEAST_DOUBLED = 0.02  # nats a row that twice as many components have to bring; not measured, chosen by hand
_IDLE = 3  # such doublings: of a checkerboard or two spirals 2 and 4 normals say as little as one
_MOST_MEMBERS = 6  # sheets-6, 128 normals each: .170, .134, .120, .113, .105, .105 +- .01 for 1 to 6
_LEAST_OF_MEMBER = 0.004  # nats a row that one more has to bring
# Whether rows are of one normal law (docs/benchmarks/gan.md, fields on a grid); not measured, chosen by hand.
_TAUGHT = 0.8  # of them, to what could be better
_CLEAR = 2.0  # standard errors of what that gains on the others


class Piece(NamedTuple):
    """A piece of a rational-quadratic spline: its lower left corner, width and height, slopes at both ends and on average."""

    x: Tensor
    y: Tensor
    width: Tensor
    height: Tensor
    left: Tensor
    right: Tensor
    mean: Tensor

    def image(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image and slope there (Durkan et al. 2019, arXiv 1906.04032, eqs. 4 and 5)."""
        z = (x - self.x) / self.width
        rest, zz = 1.0 - z, z * (1.0 - z)
        below = self.mean + (self.left + self.right - 2.0 * self.mean) * zz
        y = self.y + self.height * (self.mean * z * z + self.left * zz) / below
        slope = 2.0 * self.mean * zz + self.left * rest * rest + self.right * z * z
        return y, slope * (self.mean / below).square()

    def origin(self, y: Tensor) -> Tensor:
        """What has the image y (eqs. 6 to 8)."""
        bend = (y - self.y) * (self.left + self.right - 2.0 * self.mean)
        a, b = self.height * (self.mean - self.left) + bend, self.height * self.left - bend
        c = self.mean * (y - self.y)
        return self.x + 2.0 * c / (b + (b * b + 4.0 * a * c).sqrt()) * self.width


class ColumnUnits(LateBuffers):
    """The map from units in which columns are normal to standardised ones; the identity until it is fitted."""

    NAMES = ("knots", "images", "slopes", "last")
    knots: Tensor
    images: Tensor
    slopes: Tensor
    last: Tensor

    def take(self, splines: list[Tensor | None]) -> ColumnUnits:
        """Take splines ``(3, K + 1)`` of columns: knots, their images and the slopes there; None for the identity."""
        whole = [torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [1.0, 1.0]]) if s is None else s for s in splines]
        most = max(s.shape[1] for s in whole)
        padded = [nn.functional.pad(s, (0, most - s.shape[1]), value=math.inf) for s in whole]
        self._put(*torch.stack(padded, 1), torch.tensor([s.shape[1] - 1.0 for s in whole]))
        return self

    def transform(self) -> Transform:
        """The map from these units to standardised ones, with its log-determinant."""
        return _Splined(self.knots, self.images, self.slopes, self.last)


class _Splined(Transform):
    """From normal u to v, entry by entry."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, knots: Tensor, images: Tensor, slopes: Tensor, last: Tensor) -> None:
        super().__init__()
        self.knots, self.images, self.slopes, self.last = knots, images, slopes, last

    def _call(self, u: Tensor) -> Tensor:
        piece, above, within = self._at(u, self.images)
        inside = piece.origin(torch.where(within, u, piece.y))
        end, image, slope = _corner(piece, above)
        return torch.where(within, inside, end + (u - image) / slope)

    def _inverse(self, v: Tensor) -> Tensor:
        return self.images_of(v)[0]

    def log_abs_det_jacobian(self, u: Tensor, v: Tensor) -> Tensor:
        return -self.images_of(v)[1].log().sum(-1)

    def images_of(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The u of v, and the slopes there."""
        piece, above, within = self._at(v, self.knots)
        u, slope_inside = piece.image(torch.where(within, v, piece.x))
        end, image, slope = _corner(piece, above)
        return torch.where(within, u, image + slope * (v - end)), torch.where(within, slope_inside, slope)

    def _at(self, t: Tensor, edges: Tensor) -> tuple[Piece, Tensor, Tensor]:
        """The nearest piece to each entry, and whether it lies above that piece, or within."""
        rows = t.reshape(-1, t.shape[-1]).mT.contiguous()
        k = torch.searchsorted(edges.contiguous(), rows, right=True) - 1
        k = torch.minimum(k.clamp_min(0), self.last.long()[:, None] - 1)
        corners = [_taken(table, i, t) for table in (self.knots, self.images, self.slopes) for i in (k, k + 1)]
        x, to_x, y, to_y, left, right = corners
        piece = Piece(x, y, to_x - x, to_y - y, left, right, (to_y - y) / (to_x - x))
        above = t > _taken(edges, k + 1, t)
        return piece, above, (t >= _taken(edges, k, t)) & ~above


def _taken(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Entries ``(D, K)`` at indices ``(D, N)``, in the shape ``(*batch, D)`` of the rows."""
    return table.gather(1, index).mT.reshape(like.shape)


def _corner(piece: Piece, above: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The end of a piece that is nearest to what lies outside: place, image and slope."""
    end = torch.where(above, piece.x + piece.width, piece.x)
    image = torch.where(above, piece.y + piece.height, piece.y)
    return end, image, torch.where(above, piece.right, piece.left)


class Splines(NamedTuple):
    """For each column a spline ``(3, K + 1)``, of knots, images and slopes, or None where the column is normal as it is."""

    all: list[Tensor | None]
    rough: list[Tensor | None]  # those alone that eight pieces do not show


def column_splines(v: Tensor) -> Splines:
    """Splines for the columns of standardised rows ``(N, D)``."""
    found = [_chosen(column) for column in v.detach().cpu().double().T]
    every = [spline if gain > _LEAST_GAIN else None for spline, gain, _ in found]
    return Splines(every, [spline if rough > _ROUGH else None for spline, _, rough in found])


def _chosen(column: Tensor) -> tuple[Tensor | None, float, float]:
    """The best spline, and the nats a left-out row that it brings over the normal law, and over the better of this and eight."""
    some, left = column.tensor_split([round(_SHARE * len(column))])
    some = some.sort().values
    if float((some.diff() == 0.0).double().mean()) > _REPEATED:
        return None, 0.0, 0.0
    normal = float(-0.5 * left.square().mean())
    scores = {k: _score(_spline(some, k), left) for k in _PIECES if k * _LEAST_EACH <= len(some)}
    best = max(scores, key=lambda k: scores[k])
    gain = scores[best] - normal
    return _spline(column.sort().values, best), gain, min(gain, scores[best] - scores[_PIECES[0]])


def _score(spline: Tensor, left: Tensor) -> float:
    """Mean log density of a column, but for a constant."""
    knots, images, slopes = spline[:, None]
    u, slope = _Splined(knots, images, slopes, torch.tensor([spline.shape[1] - 1])).images_of(left[:, None])
    return float((slope.log() - 0.5 * u.square()).mean())


def _spline(ordered: Tensor, pieces: int) -> Tensor:
    """Through quantiles, with the slopes of Fritsch & Butland (1984): a weighted harmonic mean of the two neighbours'."""
    n = len(ordered)
    index = (_levels(pieces, n) * (n - 1)).round().long()
    knots, images = ordered[index], torch.special.ndtri((index + 0.5) / n)
    apart = images.diff() < _STEEPEST * knots.diff()
    kept = torch.cat([torch.ones_like(apart[:1]), apart])
    knots, images = knots[kept], images[kept]
    width = knots.diff()
    mean = images.diff() / width
    a, b = width[:-1] + 2.0 * width[1:], 2.0 * width[:-1] + width[1:]
    slopes = torch.cat([mean[:1], (a + b) / (a / mean[:-1] + b / mean[1:]), mean[-1:]])
    return torch.stack([knots, images, slopes])


def _levels(pieces: int, rows: int) -> Tensor:
    """Even levels between 0 and 1, and finer ones towards both ends."""
    even = torch.arange(1, pieces, dtype=torch.float64) / pieces
    tail = 0.25 ** torch.arange(_TAIL, 0, -1, dtype=torch.float64) / pieces
    tail = tail[tail * rows > _LEAST_IN_TAIL]
    return torch.cat([tail.new_zeros(1), tail, even, 1.0 - tail.flip(0), tail.new_ones(1)])


def best_mixture(v: Tensor) -> Normals | None:
    """The mixture that scores left-out rows best: of 1, 2, 4 ... normals, or of so many scales of one normal.

    It is found on some of the rows, then fitted to all. Where several fits of one size, from other clusters, are better together
    than one, it is their mean: pieces of a curved law lie elsewhere in each. Where the time ends, it is the best so far, or None.
    """
    v = v.detach().cpu().double()
    some, left = _split(v)
    with fork_rng(0):
        one = fitted_mixture(some, 1, _PSEUDO)
        start = _Grown(one, float(one.log_prob(left).mean()), True)
        scaled = _grown(lambda k: fitted_scales(some, k, _LONGEST), left, start)
        many = _grown(lambda k: fitted_mixture(some, k, _PSEUDO, iterations=_LONGEST), left, scaled)
        if not many.settled:
            return None if many.mixture is one else many.mixture
        if many.mixture is scaled.mixture and scaled.mixture is not one:
            return fitted_scales(v, len(scaled.mixture.weight), _LONGEST)
        whole = len(some) + len(left) == len(v)  # few rows profit from several fits more than all would
        members = _members(some, left, many.mixture) if whole else [many.mixture]
        return _mean_of([fitted_mixture(v, len(m.weight), _PSEUDO, m, _LONGEST) for m in members])


def seems_normal(v: Tensor) -> bool:
    """Whether neither two normals nor two scales of one score left-out rows better than one normal."""
    some, left = _split(v.detach().cpu().double()[:_CHOSEN_ON])
    with fork_rng(0):
        two = fitted_mixture(some, 2, _PSEUDO, iterations=_LONGEST), fitted_scales(some, 2, _LONGEST)
        one = fitted_mixture(some, 1, _PSEUDO).log_prob(left).mean()
    return all(float(other.log_prob(left).mean() - one) < _LEAST_DOUBLED for other in two)


def is_one_normal(v: Tensor, rival: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether nothing scores left-out rows clearly better than one normal law: splines of columns, two normals, or a rival.

    The rival is asked last, by the other rows and those left out, for the nats of each of these that it gains.
    """
    v = v[:, v.var(0) > 0.0]
    some, left = v.tensor_split([round(_TAUGHT * len(v))])
    if _clear(_gain_of_columns(some, left)) or not seems_normal(v):
        return False
    return not _clear(rival(some, left))


def _clear(gain: Tensor) -> bool:
    return float(gain.mean()) > _CLEAR * float(gain.std()) * len(gain) ** -0.5


def _gain_of_columns(some: Tensor, left: Tensor) -> Tensor:
    """Nats of each left-out row that splines of the columns bring over normal columns, without their correlations."""
    splines = column_splines(some).all
    if all(spline is None for spline in splines):
        return torch.zeros_like(left[:, 0])
    shape = ColumnUnits().to(left).take(splines).transform()
    v = shape.inv(left)
    return 0.5 * (left.square() - v.square()).sum(1) - shape.log_abs_det_jacobian(v, left)


def _split(v: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to fit to, and rows that choose: of many columns fewer, since a step costs the square of them."""
    v = v[: max(_CHOSEN_ON, _CHOSEN_SQUARES // v.shape[1] ** 2)]
    some, left = v.tensor_split([round(_SHARE * len(v))])
    return some, left


class _Grown(NamedTuple):
    """A mixture, its score of left-out rows, and whether there was time to find that more components bring nothing."""

    mixture: Normals
    score: float
    settled: bool


def _grown(fit: Callable[[int], Normals], left: Tensor, start: _Grown) -> _Grown:
    """Twice as many components until some doublings in a row bring nothing, or there is no time."""
    best, score, _ = start
    idle = 0
    for components in _COMPONENTS:
        if not seconds_left():
            return _Grown(best, score, False)
        found = fit(components)
        gain = float(found.log_prob(left).mean()) - score
        idle = 0 if gain > _LEAST_DOUBLED else idle + 1
        if not idle:
            best, score = found, score + gain
        if idle == _IDLE:
            break
    return _Grown(best, score, True)


def _members(some: Tensor, left: Tensor, first: Normals) -> list[Normals]:
    """Fits of one size whose mean scores left-out rows better with each of them."""
    found, scores = [first], [first.log_prob(left)]
    before = float(scores[0].mean())
    while len(found) < _MOST_MEMBERS and len(first.weight) > 1 and seconds_left():
        other = fitted_mixture(some, len(first.weight), _PSEUDO, iterations=_LONGEST)
        scores.append(other.log_prob(left))
        score = float((torch.stack(scores).logsumexp(0) - math.log(len(scores))).mean())
        if score - before < _LEAST_OF_MEMBER:
            break
        found.append(other)
        before = score
    return found


def _mean_of(mixtures: list[Normals]) -> Normals:
    weight, loc, tril = (torch.cat(parts) for parts in zip(*mixtures, strict=True))
    return Normals(weight / len(mixtures), loc, tril)
