r"""Units in which a mixture of normals is a standard normal: where a flow starts when its rows are many and lie in clusters.

With :math:`z_k = L_k^{-1}(v - m_k)`, the law of entry i given those before it is a mixture again,

.. math:: F_i = \sum_k r_{ki} \Phi(z_{ki}), \qquad r_{ki} \propto w_k \prod_{j<i} N(z_{kj}; 0, 1) / L_{k,jj}, \qquad
          u_i = \Phi^{-1}(F_i)

(Rosenblatt 1952, "Remarks on a multivariate transformation"). A flow that is the identity in these units has the density of the
mixture, and what it learns is where the rows differ from it. For one normal :math:`u = L^{-1}(v - m)`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.pace import seconds_left
from pyro_dgm.core.upstream import unseen
from pyro_dgm.flows.normal_mixture import log_ndtr

__all__ = ["MixtureUnits", "Normals", "best_mixture", "fitted_mixture"]

# Of EM. Measured on the simulated tables of docs/benchmarks/small.md.
_ITERATIONS = 60  # of a mixture's EM at most
_TOLERANCE = 1e-3  # nats a row, that an iteration has to bring
_RIDGE = 1e-4  # in the common covariance: a spike of equal rows has a width of .01
# Of the mixture for many rows. NSF from 32 normals on sheets-6 ends .41 nats off, without them .34; so a number that still grows
# at 32 is no start (docs/benchmarks/tables.md).
_COMPONENTS = (2, 4, 8, 16, 32)
_PSEUDO = 2.0  # rows of the common covariance in each component's; not measured, chosen by hand
_CHOSEN_ON = 5_000  # rows; with 10,000 and 60 iterations sheets-43 took 46 CPU seconds
_SHARE = 0.8  # of them, to fit to
_LONGEST = 15  # iterations
_LEAST_GAIN = 0.02  # nats a row that twice as many components have to bring; not measured, chosen by hand
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


class MixtureUnits(nn.Module):
    """The map from the units of a mixture of normals to standardised ones; the identity until it is fitted.

    Its tensors are buffers: part of the ``state_dict``, never trained. They have no size until :meth:`take`.

    Example:
        >>> v = torch.randn(1000, 2) * 0.3 + torch.randint(2, (1000, 1)) * 2.0
        >>> units = MixtureUnits().take(fitted_mixture(v, 2, 1.0))
        >>> u = units.transform().inv(v)
        >>> bool((u.std(0) - 1.0).abs().max() < 0.1), bool(torch.allclose(units.transform()(u), v, atol=1e-3))
        (True, True)
    """

    log_weight: Tensor
    loc: Tensor
    inverse: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in _NAMES:
            self.register_buffer(name, torch.empty(0))

    def is_identity(self) -> bool:
        """Whether no mixture was taken."""
        return not self.loc.numel()

    def forget(self) -> None:
        """Become the identity again."""
        for name in _NAMES:
            setattr(self, name, getattr(self, name).new_empty(0))

    def take(self, mixture: Normals) -> MixtureUnits:
        """Take the units of a mixture of K normals over D numbers."""
        eye = torch.ones_like(mixture.loc[0]).diag()
        inverse = torch.linalg.solve_triangular(mixture.tril, eye, upper=False)
        for name, value in zip(_NAMES, (mixture.weight.log(), mixture.loc, inverse), strict=True):
            setattr(self, name, value.to(getattr(self, name)))
        return self

    def transform(self) -> Transform:
        """The map from these units to standardised ones, with its log-determinant."""
        return _Rosenblatt(self.log_weight, self.loc, self.inverse)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        """States of any size are taken; one of before there was this module is the identity."""
        for name in _NAMES:
            own = getattr(self, name)
            saved = state.setdefault(prefix + name, own.new_empty(0))
            setattr(self, name, torch.empty_like(saved).to(own))
        super()._load_from_state_dict(state, prefix, *rest)


_NAMES = ("log_weight", "loc", "inverse")


def best_mixture(v: Tensor) -> Normals | None:
    """The mixture of 1, 2, 4 ... normals that scores left-out rows best: found on some of the rows, then fitted to all.

    None where the largest number is the best: more and more normals that fit better are no clusters, but pieces of a curved law,
    which a flow in these units learns less of than in plain ones.
    """
    v = v.detach().cpu().double()
    some, left = v[:_CHOSEN_ON].tensor_split([round(_SHARE * len(v[:_CHOSEN_ON]))])
    with fork_rng(0):
        best = fitted_mixture(some, 1, _PSEUDO)
        score = float(best.log_prob(left).mean())
        for components in _COMPONENTS:
            if not seconds_left():
                return None
            found = fitted_mixture(some, components, _PSEUDO, iterations=_LONGEST)
            gain = float(found.log_prob(left).mean()) - score
            if gain < _LEAST_GAIN:
                return fitted_mixture(v, len(best.weight), _PSEUDO, best, _LONGEST)
            best, score = found, score + gain
    return None


def fitted_mixture(
    x: Tensor, components: int, pseudo: float, start: Normals | None = None, iterations: int = _ITERATIONS
) -> Normals:
    """The most probable mixture under a prior that draws each covariance to the common one; from k-means, or from a start."""
    share = (
        start.log_parts(x).softmax(-1) if start else nn.functional.one_hot(_clusters(x, components), components).to(x)
    )
    before = -math.inf
    for _ in range(iterations):
        mixture = _maximised(x, share, pseudo)
        parts = mixture.log_parts(x)
        score = float(parts.logsumexp(-1).mean())
        if score - before < _TOLERANCE:
            break
        before = score
        if not seconds_left():
            break
        share = parts.softmax(-1)
    return mixture


def _maximised(x: Tensor, share: Tensor, pseudo: float) -> Normals:
    rows, columns = x.shape
    count = share.sum(0) + 1e-6
    loc = share.T @ x / count[:, None]
    spread = torch.stack([((x - m) * s[:, None]).T @ (x - m) for m, s in zip(loc, share.T, strict=True)])
    common = spread.sum(0) / rows
    shrinkage = columns / (rows + columns)
    ridge = torch.full_like(x[0], _RIDGE).diag()
    common = (1.0 - shrinkage) * common + shrinkage * common.diagonal().diag() + ridge
    if pseudo == math.inf:
        covariance = common.expand_as(spread)
    else:
        covariance = (spread + pseudo * common) / (count + pseudo)[:, None, None]
    return Normals((count + 1.0) / (count + 1.0).sum(), loc, torch.linalg.cholesky(covariance))


def _clusters(x: Tensor, components: int, iterations: int = 10) -> Tensor:
    """The cluster of each row, by k-means from far-apart rows (k-means++)."""
    centres = x[torch.randint(len(x), (1,), device=x.device)]
    while len(centres) < components:
        nearest = torch.cdist(x, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, x[torch.multinomial(nearest, 1)]])
    for _ in range(iterations):
        nearest_centre = torch.cdist(x, centres).argmin(1)
        share = nn.functional.one_hot(nearest_centre, components).to(x)
        filled = share.sum(0) > 0
        centres = torch.where(filled[:, None], share.T @ x / share.sum(0).clamp_min(1.0)[:, None], centres)
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
        z = torch.einsum("kij,...kj->...ki", self.inverse, v.unsqueeze(-2) - self.loc)
        log_each = self.inverse.diagonal(dim1=-2, dim2=-1).log() - 0.5 * z.square() - _HALF_LOG_2PI
        before = nn.functional.pad(log_each[..., :-1].cumsum(-1), (1, 0))
        log_share = (self.log_weight.unsqueeze(-1) + before).log_softmax(-2)
        u = _quantile(log_share, z)
        log_slope = (log_share + log_each).logsumexp(-2) + 0.5 * u.square() + _HALF_LOG_2PI
        self.last = u, v, -log_slope.sum(-1)
        return u

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
