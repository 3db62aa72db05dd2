r"""Where a flow starts when its data are few: units that take out correlations, and a smooth density in the place of the rows.

**Units.** With the correlations :math:`R` of the rows, :math:`LL^\top = \gamma\,((1 - a) R + a I)`; shrinkage :math:`a` and
inflation :math:`\gamma \ge 1` are those with the highest likelihood of rows that were left out of :math:`R`.

**The stand-in.** In these units candidates :math:`p_m` are fitted: the standard normal, mixtures of K normals whose covariances
are drawn to a common one, and kernel densities. The weights of their mixture come from their densities at left-out rows,

.. math:: w = \arg\max_w \sum_n \log \sum_m w_m\, p_m^{(-n)}(x_n).

It is no worse than its best candidate, up to the noise of the left-out rows. A flow that is trained on its draws, of which there
are as many as one likes, cannot learn the rows by heart. (Smyth & Wolpert 1999, "Linearly combining density estimators via
stacking", Machine Learning 36; Silverman & Young 1987, "The bootstrap: to smooth or not to smooth?", Biometrika 74.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.saved import LateBuffers
from pyro_dgm.flows.mixture_units import Normals, fitted_mixture
from pyro_dgm.train.batches import FEW
from pyro_dgm.train.hooks import Recipe

__all__ = [
    "DRAWS",
    "FEW_ROWS",
    "FEW_ROWS_ALONE",
    "LEAST_ROWS",
    "MANY_ROWS",
    "MOST_COLUMNS",
    "Decorrelate",
    "Pairs",
    "StandIn",
    "are_few",
]

# How a density is trained. Measured on the simulated tables of docs/benchmarks/small.md.
FEW_ROWS = Recipe(lr=5e-4, max_steps=1000, validation=0.1, patience=8, averaging=0.95)  # after draws of the stand-in
FEW_ROWS_ALONE = Recipe(lr=3e-3, max_steps=1000, validation=0.1, patience=8, averaging=0.95)  # without them
MANY_ROWS = Recipe(lr=1e-2, batch_size=256, max_steps=3000, validation=0.1, averaging=0.99, every=50)  # of more rows
DRAWS = 512  # of the stand-in, a step
MOST_COLUMNS = 100  # above which neither is done: a covariance has too many entries. Not measured; chosen by hand
LEAST_ROWS = 10  # below which neither is done. Not measured; chosen by hand

_SHRINKAGES = (1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0)
_FOLDS = 10  # for the units
_CONSTANT = 1e-8  # variance below which a standardised column is constant
_STACKED = 5  # folds for the stand-in; half of the rows each time where they are more than
_MANY = 500

# The candidates. Measured on the simulated tables of docs/benchmarks/small.md.
_COMPONENTS = (2, 3, 4, 6, 8, 12)
_ROWS_EACH = 5  # of a component, at least, for a candidate
_TIES = (math.inf, 3.0, 1.0, 0.3)  # pseudo-rows of the common covariance in each component's, as multiples of D
_LEAST_TIE = 4.0  # pseudo-rows
_WIDTHS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)  # of kernels
_FAR = (2.0, 6.0, 20.0)  # widths of normals for far rows: MAF on heavy tails -.15 nats a column without, -.01 with
_FAR_WEIGHT = 0.005
_LEAST_GAIN = 0.02  # nats a row above the normal law, for the stand-in to be worth while. Not measured; chosen by hand
_SNAPPED = 0.1  # of the rows: the most values of a context's column that counts as one of classes. Not measured
_NEGLIGIBLE = 0.01  # weight of a candidate that is left out


def are_few(rows: int) -> bool:
    """Whether so many rows are few, and enough for anything at all."""
    return LEAST_ROWS <= rows <= FEW


class Decorrelate(LateBuffers):
    r"""The map :math:`v = L u` from uncorrelated units :math:`u` to standardised ones; the identity until it is fitted.

    Example:
        >>> a = torch.randn(500, 1)
        >>> v = torch.cat([a, a + 0.1 * torch.randn(500, 1)], 1)
        >>> u = Decorrelate().fit(v).transform().inv(v)
        >>> bool(torch.corrcoef(u.T)[0, 1].abs() < 0.1), bool(torch.corrcoef(v.T)[0, 1] > 0.9)
        (True, True)
    """

    NAMES = ("tril",)
    tril: Tensor

    @torch.no_grad()
    def fit(self, v: Tensor) -> Decorrelate:
        """Take correlations from rows ``(N, D)`` in standardised units."""
        v = v.detach().cpu().double()
        shrinkage, inflation = _best_covariance(v)
        self._put(inflation**0.5 * _cholesky(v, shrinkage))
        return self

    def transform(self) -> Transform:
        """The map from uncorrelated units to standardised ones, with its log-determinant."""
        return _Triangular(self.tril)


class _Triangular(Transform):
    """``v = L u`` for rows."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, tril: Tensor, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.tril = tril

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Triangular) and torch.equal(self.tril, other.tril)

    def with_cache(self, cache_size: int = 1) -> _Triangular:
        return _Triangular(self.tril, cache_size)

    def _call(self, x: Tensor) -> Tensor:
        return x @ self.tril.mT

    def _inverse(self, y: Tensor) -> Tensor:
        rows = y.reshape(-1, y.shape[-1])
        return torch.linalg.solve_triangular(self.tril.mT, rows, upper=True, left=False).reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.tril.diagonal().log().sum().expand(x.shape[:-1])


def _cholesky(v: Tensor, shrinkage: float) -> Tensor:
    covariance = torch.cov(v.T).reshape(v.shape[1], v.shape[1])
    constant = covariance.diagonal() < _CONSTANT
    covariance = covariance + constant.to(covariance).diag()  # such a column keeps its units
    diagonal = covariance.diagonal().diag()
    return torch.linalg.cholesky((1.0 - shrinkage) * covariance + shrinkage * diagonal)


def _best_covariance(v: Tensor) -> tuple[float, float]:
    """Shrinkage and inflation with the highest likelihood of left-out rows."""
    best = (-math.inf, 1.0, 1.0)
    for shrinkage in _SHRINKAGES:
        squares, log_scale = _left_out(v, shrinkage)
        inflation = max(1.0, float(squares.mean()) / v.shape[1])
        score = float(-0.5 * squares.mean() / inflation - log_scale) - 0.5 * v.shape[1] * math.log(inflation)
        best = max(best, (score, shrinkage, inflation))
    return best[1:]


def _left_out(v: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Squared distances of left-out rows in the units of the others, and those units' mean log-determinant."""
    squares = []
    log_scales = []
    for rows, left in _folds(len(v), min(_FOLDS, len(v) // 2)):
        tril = _cholesky(v[rows], shrinkage)
        u = torch.linalg.solve_triangular(tril, (v[left] - v[rows].mean(0)).T, upper=False)
        squares.append(u.square().sum(0))
        log_scales.append(tril.diagonal().log().sum())
    return torch.cat(squares), torch.stack(log_scales).mean()


def _folds(rows: int, folds: int) -> list[tuple[Tensor, Tensor]]:
    """Rows to fit to and rows that are left out, at random but always the same."""
    order = torch.randperm(rows, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return [(order[~torch.isin(order, left)], left) for left in order.tensor_split(folds)]


class _Kernels(NamedTuple):
    """A normal kernel of one width around each row ``(N, D)``."""

    loc: Tensor
    width: float

    def log_prob(self, x: Tensor) -> Tensor:
        kernel = -0.5 * (torch.cdist(x, self.loc) / self.width).square()
        constant = math.log(len(self.loc)) + x.shape[1] * (math.log(self.width) + 0.5 * math.log(2.0 * math.pi))
        return kernel.logsumexp(-1) - constant

    def sample(self, n: int) -> Tensor:
        centres = self.loc[torch.randint(len(self.loc), (n,), device=self.loc.device)]
        return centres + self.width * torch.randn_like(centres)


_Part = Normals | _Kernels
_Candidate = Callable[[Tensor], _Part]


class StandIn:
    """A stack of smooth densities fitted to rows ``(N, D)`` in uncorrelated units: it scores and draws.

    Attributes:
        gain: nats a row that it scores above the standard normal, at rows that were left out.

    Example:
        >>> rows = torch.cat([torch.randn(100, 2) - 4.0, torch.randn(100, 2) + 4.0]) / 4.0
        >>> both = StandIn(rows)
        >>> both.gain > 0.3, both.sample(1000).shape
        (True, torch.Size([1000, 2]))
    """

    def __init__(self, rows: Tensor) -> None:
        x = rows.detach().double().cpu()
        candidates = _candidates(*x.shape)
        with fork_rng(0):
            scores = _scores(candidates, x)
            weights = _stacked(scores)
            kept = [i for i, w in enumerate(weights.tolist()) if w > _NEGLIGIBLE]
            self.parts = [candidates[i](x) for i in kept] + [_normal(x, width) for width in _FAR]
        weights = weights[kept] / weights[kept].sum()
        self.gain = float(((scores[:, kept] + weights.log()).logsumexp(-1) - scores[:, 0]).mean())
        self.weights = torch.cat([weights * (1.0 - len(_FAR) * _FAR_WEIGHT), x.new_full((len(_FAR),), _FAR_WEIGHT)])

    @property
    def worth_while(self) -> bool:
        """Whether it says more than a normal law."""
        return self.gain > _LEAST_GAIN

    def log_prob(self, x: Tensor) -> Tensor:
        """Log densities of rows, shape ``(N,)``."""
        each = torch.stack([part.log_prob(x.double().cpu()) for part in self.parts], -1)
        return (each + self.weights.log()).logsumexp(-1).to(x)

    def sample(self, n: int) -> Tensor:
        """Independent draws ``(n, D)``."""
        counts = torch.multinomial(self.weights, n, replacement=True).bincount(minlength=len(self.parts))
        drawn = [part.sample(count) for part, count in zip(self.parts, counts.tolist(), strict=True) if count]
        draws = torch.cat(drawn)
        return draws[torch.randperm(n, device=draws.device)].float()


class Pairs:
    """What stands in for events in a flow's units ``(N, D)`` together with their contexts ``(N, C)``, or for events alone.

    Events and contexts have a joint stand-in, in units of their own. Drawn contexts of a column with few values take the nearest
    of these.
    """

    def __init__(self, u: Tensor, context: Tensor | None) -> None:
        self.columns = u.shape[1]
        self.context = context
        self.like = u
        if context is not None:
            self.loc = context.mean(0)
            sd = context.std(0)
            self.scale = torch.where(sd > 0, sd, 1.0)
            u = torch.cat([u, (context - self.loc) / self.scale], 1)
            self.units = Decorrelate().to(u).fit(u)
            u = self.units.transform().inv(u)
        self.stand_in = StandIn(u)

    @property
    def worth_while(self) -> bool:
        """Whether a normal law that ignores the context says less."""
        return self.context is not None or self.stand_in.worth_while

    def sample(self, n: int) -> tuple[Tensor, ...]:
        """Draws: events in the flow's units, and contexts where there are any."""
        u = self.stand_in.sample(n).to(self.like)
        if self.context is None:
            return (u,)
        u, context = self.units.transform()(u).split([self.columns, self.context.shape[1]], 1)
        return u, _snapped(self.loc + self.scale * context, self.context)


def _snapped(drawn: Tensor, seen: Tensor) -> Tensor:
    """Drawn columns at the nearest of the values that were seen, where these are few."""
    columns = []
    for some, values in zip(drawn.T, (column.unique() for column in seen.T), strict=True):
        few = len(values) <= _SNAPPED * len(seen)
        columns.append(values[(some[:, None] - values).abs().argmin(1)] if few else some)
    return torch.stack(columns, 1)


def _candidates(rows: int, columns: int) -> list[_Candidate]:
    """Ways to fit a density: first the standard normal, then mixtures and kernels."""
    found: list[_Candidate] = [_normal]
    for components in _COMPONENTS:
        if components * _ROWS_EACH <= rows:
            ties = {max(_LEAST_TIE, tie * columns) for tie in _TIES}
            found += [_mixture(components, tie) for tie in sorted(ties)]
    return found + [_kernels(width) for width in _WIDTHS]


def _normal(x: Tensor, width: float = 1.0) -> Normals:
    tril = torch.full_like(x[0], width).diag()
    return Normals(x.new_ones(1), torch.zeros_like(x[:1]), tril[None])


def _mixture(components: int, pseudo: float) -> _Candidate:
    return lambda x: fitted_mixture(x, components, pseudo)


def _kernels(width: float) -> _Candidate:
    return lambda x: _Kernels(x, width)


def _scores(candidates: list[_Candidate], x: Tensor) -> Tensor:
    """Log densities of left-out rows under each candidate, shape ``(N, M)``."""
    scores = x.new_empty(len(x), len(candidates))
    for rows, left in _folds(len(x), _STACKED if len(x) <= _MANY else 2):
        for i, candidate in enumerate(candidates):
            scores[left, i] = candidate(x[rows]).log_prob(x[left])
    return scores


def _stacked(scores: Tensor, iterations: int = 200) -> Tensor:
    """Weights ``(M,)`` with the highest likelihood, by EM."""
    weights = torch.full_like(scores[0], 1.0 / scores.shape[1])
    for _ in range(iterations):
        weights = torch.softmax(scores + weights.log(), -1).mean(0)
    return weights
