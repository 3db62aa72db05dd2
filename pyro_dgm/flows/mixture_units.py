r"""Units in which a mixture of normals is a standard normal: where a flow starts when its rows are many and lie in clusters.

With :math:`z_k = L_k^{-1}(v - m_k)`, the law of entry i given those before it is a mixture again,

.. math:: F_i = \sum_k r_{ki} \Phi(z_{ki}), \qquad r_{ki} \propto w_k \prod_{j<i} N(z_{kj}; 0, 1) / L_{k,jj}, \qquad
          u_i = \Phi^{-1}(F_i)

(Rosenblatt 1952, "Remarks on a multivariate transformation"). A flow that is the identity in these units has the density of the
mixture, and what it learns is where the rows differ from it. For one normal :math:`u = L^{-1}(v - m)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyro_dgm.core.pace import seconds_left
from pyro_dgm.core.saved import LateBuffers
from pyro_dgm.core.upstream import unseen
from pyro_dgm.flows.normal_mixture import log_ndtr

__all__ = ["MixtureUnits", "Normals", "fitted_mixture", "fitted_scales"]

# Of EM. Measured on the simulated tables of docs/benchmarks/small.md.
_ITERATIONS = 60  # of a mixture's EM at most
_TOLERANCE = 1e-3  # nats a row, that an iteration has to bring
_RIDGE = 1e-4  # in the common covariance: a spike of equal rows has a width of .01
_HELD = 10_000_000  # entries of components at once, where rows are mapped; not measured, chosen by hand
_PART = 2_000  # rows of which squares are held at once; not measured, chosen by hand
_LEAST = 1e-30  # probability below which the quantile comes from its logarithm; float32 has 1e-38
_HALVINGS = 60  # of a search for a draw's entry
_PRECISE = 1e-6  # of an entry's own width, where the search ends
_NEAR = 1e-3  # of a quantile, within which a short step ends the search
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class Normals(NamedTuple):
    """A mixture of K normals over vectors: weights ``(K,)``, means ``(K, D)``, Cholesky factors ``(K, D, D)``."""

    weight: Tensor
    loc: Tensor
    tril: Tensor

    def log_parts(self, x: Tensor) -> Tensor:
        """Log densities of the weighted components, shape ``(N, K)``."""
        inverse = torch.linalg.solve_triangular(self.tril, torch.ones_like(x[0]).diag(), upper=False)
        z = torch.einsum("kij,nj->nki", inverse, x) - torch.einsum("kij,kj->ki", inverse, self.loc)
        log_scale = self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * z.square().sum(-1) - log_scale - 0.5 * x.shape[1] * math.log(2.0 * math.pi) + self.weight.log()

    def log_prob(self, x: Tensor) -> Tensor:
        return self.log_parts(x).logsumexp(-1)

    def sample(self, n: int) -> Tensor:
        k = torch.multinomial(self.weight, n, replacement=True)
        z = torch.randn_like(self.loc[k])
        return self.loc[k] + (self.tril[k] @ z.unsqueeze(-1)).squeeze(-1)


class MixtureUnits(LateBuffers):
    """The map from the units of a mixture of normals to standardised ones; the identity until it is fitted.

    Example:
        >>> v = torch.randn(1000, 2) * 0.3 + torch.randint(2, (1000, 1)) * 2.0
        >>> units = MixtureUnits().take(fitted_mixture(v, 2, 1.0))
        >>> u = units.transform().inv(v)
        >>> bool((u.std(0) - 1.0).abs().max() < 0.1), bool(torch.allclose(units.transform()(u), v, atol=1e-3))
        (True, True)
    """

    NAMES = ("log_weight", "loc", "inverse")
    log_weight: Tensor
    loc: Tensor
    inverse: Tensor

    def take(self, mixture: Normals) -> MixtureUnits:
        """Take the units of a mixture of K normals over D numbers."""
        eye = torch.ones_like(mixture.loc[0]).diag()
        inverse = torch.linalg.solve_triangular(mixture.tril, eye, upper=False)
        self._put(mixture.weight.log(), mixture.loc, inverse)
        return self

    def transform(self) -> Transform:
        """The map from these units to standardised ones, with its log-determinant."""
        return _Rosenblatt(self.log_weight, self.loc, self.inverse)


def fitted_mixture(
    x: Tensor, components: int, pseudo: float, start: Normals | None = None, iterations: int = _ITERATIONS
) -> Normals:
    """The most probable mixture under a prior that draws each covariance to the common one; from k-means, or from a start."""
    if start is None:
        cluster = _clusters(x, components)
        sums = _sums(x, lambda some, part: nn.functional.one_hot(cluster[part], components).to(x))
    else:
        sums = _responsible(x, start)[1]
    before = -math.inf
    for _ in range(iterations):
        mixture = _maximised(sums, x.shape, pseudo)
        score, sums = _responsible(x, mixture)
        if score - before < _TOLERANCE or not seconds_left():
            break
        before = score
    return mixture


def _responsible(x: Tensor, mixture: Normals) -> tuple[float, Tensor]:
    """The mean score of rows, and the sums of their squares for each component, by its share in them."""
    quadratic = _as_quadratic(mixture)
    scores = []

    def share(some: Tensor, part: slice) -> Tensor:
        logits = some @ quadratic
        scores.append(logits.logsumexp(1).sum())
        return logits.softmax(1)

    sums = _sums(x, share)
    return float(torch.stack(scores).sum()) / len(x), sums


def _sums(x: Tensor, share: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """For each component the sums over rows of 1, x_i and x_i x_j, each row by its share; in parts of rows that fit a cache."""
    columns = x.shape[1]
    first, second = torch.triu_indices(columns, columns, device=x.device)
    total: Any = 0.0
    for part in range(0, len(x), _PART):
        rows = x[part : part + _PART]
        some = torch.cat([torch.ones_like(rows[:, :1]), rows, rows[:, first] * rows[:, second]], 1)
        total = total + share(some, slice(part, part + _PART)).mT @ some
    return total


def _as_quadratic(mixture: Normals) -> Tensor:
    """Log densities of the weighted components as coefficients of 1, x_i and x_i x_j, shape ``(1 + D + D (D + 1) / 2, K)``."""
    columns = mixture.loc.shape[1]
    first, second = torch.triu_indices(columns, columns, device=mixture.loc.device)
    precision = torch.cholesky_inverse(mixture.tril)
    linear = (precision @ mixture.loc.unsqueeze(-1)).squeeze(-1)
    log_scale = mixture.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = mixture.weight.log() - log_scale - columns * _HALF_LOG_2PI - 0.5 * (linear * mixture.loc).sum(-1)
    twice = torch.where(first == second, 0.5, 1.0).to(linear)
    return torch.cat([constant[:, None], linear, -twice * precision[:, first, second]], 1).mT


def _maximised(sums: Tensor, shape: Sequence[int], pseudo: float) -> Normals:
    """The mixture that such sums over rows of a shape ``(N, D)`` ask for."""
    rows, columns = shape
    first, second = torch.triu_indices(columns, columns, device=sums.device)
    count, loc = sums[:, 0] + 1e-6, sums[:, 1 : 1 + columns] / (sums[:, :1] + 1e-6)
    square = sums.new_zeros(len(sums), columns, columns)
    square[:, first, second] = sums[:, 1 + columns :]
    square[:, second, first] = sums[:, 1 + columns :]
    spread = square - count[:, None, None] * loc.unsqueeze(-1) * loc.unsqueeze(-2)
    common = _shrunk(spread.sum(0) / rows, rows)
    if pseudo == math.inf:
        covariance = common.expand_as(spread)
    else:
        covariance = (spread + pseudo * common) / (count + pseudo)[:, None, None]
    return Normals((count + 1.0) / (count + 1.0).sum(), loc, torch.linalg.cholesky(covariance))


def fitted_scales(x: Tensor, components: int, iterations: int = _ITERATIONS) -> Normals:
    """The most probable mixture of normals that share a place and, up to a factor, a covariance; by EM from even quantiles."""
    rows, columns = x.shape
    precision, before = torch.ones_like(x[:, 0]), -math.inf
    levels = (torch.arange(components).to(x) + 0.5) / components
    weight, variance = torch.full_like(levels, 1.0 / components), torch.empty(0)
    for _ in range(iterations):
        loc = (precision @ x) / precision.sum()
        off = x - loc
        tril = torch.linalg.cholesky(_shrunk((off * precision[:, None]).mT @ off / rows, rows))
        squares = torch.linalg.solve_triangular(tril, off.mT, upper=False).square().mean(0)
        variance = variance if variance.numel() else squares.quantile(levels)
        parts = weight.log() - 0.5 * columns * (variance.log() + squares[:, None] / variance)
        score = float(parts.logsumexp(1).mean() - tril.diagonal().log().sum())
        if score - before < _TOLERANCE or not seconds_left():
            break
        before, share = score, parts.softmax(1)
        count = share.sum(0) + 1e-6
        weight, variance = count / count.sum(), (share.mT @ squares) / count
        precision = share @ (1.0 / variance)
    return Normals(weight, loc.expand(components, -1), variance.sqrt()[:, None, None] * tril)


def _shrunk(covariance: Tensor, rows: int) -> Tensor:
    """Nearer to its diagonal, the more the fewer rows there are for a column."""
    shrinkage = len(covariance) / (rows + len(covariance))
    ridge = torch.full_like(covariance[0], _RIDGE).diag()
    return (1.0 - shrinkage) * covariance + shrinkage * covariance.diagonal().diag() + ridge


def _clusters(x: Tensor, components: int, iterations: int = 10) -> Tensor:
    """The cluster of each row, by k-means from far-apart rows (k-means++)."""
    centres = x[torch.randint(len(x), (1,), device=x.device)]
    nearest = torch.full_like(x[:, 0], math.inf)
    while len(centres) < components:
        nearest = torch.minimum(nearest, (x - centres[-1]).square().sum(1) + 1e-12)
        centres = torch.cat([centres, x[torch.multinomial(nearest, 1)]])
    for _ in range(iterations):
        nearest_centre = torch.cdist(x, centres).argmin(1)
        count = torch.bincount(nearest_centre, minlength=components).to(x)[:, None]
        total = torch.zeros_like(centres).index_add_(0, nearest_centre, x)
        centres = torch.where(count > 0, total / count.clamp_min(1.0), centres)
    return nearest_centre


class _Rosenblatt(Transform):
    """From standard normal u to v; one way in one pass, the other entry by entry.

    The last pair is kept, so that a density, which asks for the one and then for the log-determinant, takes one pass.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, log_weight: Tensor, loc: Tensor, inverse: Tensor) -> None:
        super().__init__()
        self.log_weight, self.loc, self.inverse = log_weight, loc, inverse
        self.last: tuple[Tensor, Tensor, Tensor] | None = None

    def call_and_ladj(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The image of u and the log-determinant there."""
        v = self._call(u)
        return v, self.log_abs_det_jacobian(u, v)

    def log_abs_det_jacobian(self, u: Tensor, v: Tensor) -> Tensor:
        if self.last is None or self.last[1] is not v:
            self._inverse(v)
        return self.last[2]  # type: ignore[index]

    def _inverse(self, v: Tensor) -> Tensor:
        rows = max(1, _HELD // self.loc.numel())
        parts = [self._in_units(part) for part in v.reshape(-1, v.shape[-1]).split(rows)]
        u, log_slope = (torch.cat(part) for part in zip(*parts, strict=True))
        u, log_slope = u.reshape(v.shape), log_slope.reshape(v.shape[:-1])
        self.last = u, v, -log_slope
        return u

    def _in_units(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The u of rows v, and the log-determinant there."""
        z = torch.einsum("kij,...kj->...ki", self.inverse, v.unsqueeze(-2) - self.loc)
        log_each = self.inverse.diagonal(dim1=-2, dim2=-1).log() - 0.5 * z.square() - _HALF_LOG_2PI
        before = nn.functional.pad(log_each[..., :-1].cumsum(-1), (1, 0))
        log_share = (self.log_weight.unsqueeze(-1) + before).log_softmax(-2)
        u = _quantile(log_share, z)
        log_slope = (log_share + log_each).logsumexp(-2) + 0.5 * u.square() + _HALF_LOG_2PI
        return u, log_slope.sum(-1)

    def _call(self, u: Tensor) -> Tensor:
        if self.last is not None and self.last[0] is u:
            return self.last[1]
        moved: list[Tensor] = []  # entries less each component's place, (..., K)
        found = []
        log_before = self.log_weight.expand(*u.shape[:-1], -1)
        scale = 1.0 / self.inverse.diagonal(dim1=-2, dim2=-1)
        for i, target in enumerate(u.unbind(-1)):
            past = sum((m * self.inverse[:, i, j] for j, m in enumerate(moved)), torch.zeros_like(log_before))
            centre = self.loc[:, i] - past * scale[:, i]
            v = _searched(log_before.log_softmax(-1), centre, scale[:, i], target)
            z = (v.unsqueeze(-1) - centre) / scale[:, i]
            log_before = log_before - 0.5 * z.square() - scale[:, i].log()
            moved.append(v.unsqueeze(-1) - self.loc[:, i])
            found.append(v)
        return torch.stack(found, -1)


def _quantile(log_share: Tensor, z: Tensor) -> Tensor:
    """The standard normal quantile of a mixture's distribution function, from the side of its smaller tail; K is dimension -2."""
    share = log_share.exp()
    below = (share * _below(z)).sum(-2)
    above = (share * _below(-z)).sum(-2)
    half = below < above
    tail = torch.where(half, below, above)
    u = torch.special.ndtri(tail.clamp_min(_LEAST))
    if unseen(z) or bool((tail < _LEAST).any()):
        sided = torch.where(half.unsqueeze(-2), z, -z)
        u = torch.where(tail < _LEAST, _far_quantile((log_share + log_ndtr(sided)).logsumexp(-2)), u)
    return torch.where(half, u, -u)


def _below(z: Tensor) -> Tensor:
    """The standard normal's distribution function; torch's own is 0 from -5.7 on in float32."""
    return 0.5 * torch.erfc(-(0.5**0.5) * z)


def _far_quantile(log_p: Tensor) -> Tensor:
    """The quantile of a log probability that float32 has no number for, by three steps of Newton."""
    log_p = log_p.clamp_max(math.log(_LEAST))
    z = -(-2.0 * log_p - (-2.0 * log_p).log() - 2.0 * _HALF_LOG_2PI).sqrt()
    for _ in range(3):
        log_below = log_ndtr(z)
        z = z - (log_below - log_p) * (log_below + 0.5 * z.square() + _HALF_LOG_2PI).exp()
    return z


def _searched(log_share: Tensor, centre: Tensor, scale: Tensor, u: Tensor) -> Tensor:
    """The value whose quantile is u: steps of Newton inside an interval that shrinks, and one more that has gradients."""
    with torch.no_grad():
        ends = centre + scale * u.unsqueeze(-1)
        low, high, fine = ends.amin(-1), ends.amax(-1), _PRECISE * scale.amin()
        v = 0.5 * (low + high)
        going = torch.ones_like(v, dtype=torch.bool)
        for turn in range(_HALVINGS):
            off, slope = _off(log_share, centre, scale, u, v)
            low, high = torch.where(off < 0.0, v, low), torch.where(off > 0.0, v, high)
            step = v - off / slope
            halved = (step < low) | (step > high) | (turn % 3 == 2)
            step = torch.where(going, torch.where(halved, 0.5 * (low + high), step), v)
            moving = ((step - v).abs() > fine) | (off.abs() > _NEAR)  # a step may be short for a slope that is steep
            going = going & moving & (high - low > fine)
            v = step
            if not bool(going.any()):
                break
    if not (torch.is_grad_enabled() and (u.requires_grad or centre.requires_grad or log_share.requires_grad)):
        return v
    off, slope = _off(log_share, centre, scale, u, v)
    return v - off / slope.detach()


def _off(log_share: Tensor, centre: Tensor, scale: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """How far the quantile of v is from u, and its slope."""
    z = (v.unsqueeze(-1) - centre) / scale
    quantile = _quantile(log_share.unsqueeze(-1), z.unsqueeze(-1)).squeeze(-1)
    log_slope = (log_share - 0.5 * z.square() - scale.log()).logsumexp(-1) + 0.5 * quantile.square()
    return quantile - u, log_slope.exp().clamp_min(1e-30)
