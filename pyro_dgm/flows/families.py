r"""The named flows: affine couplings (RealNVP), affine autoregression (MAF), splines (NSF); and any other flow of zuko's.

The spline is the function of zuko's ``MonotonicRQSTransform`` in less time. With raw widths :math:`a` of K pieces and
:math:`e = \exp(a / (1 + |2 a / \log \epsilon|))`, the edges are :math:`-B + 2B \sum_{j \le k} e_j / \sum_j e_j`; the same with
heights. A softmax over a short last dimension costs twenty times its exponentials (torch 2.13, CPU). Here the sum divides only
the piece that a point lies in, once that is found, and only its two slopes are computed (Durkan et al. 2019, arXiv 1906.04032,
eqs. 4-8).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyro_dgm.core import zuko
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.networks import soft_clip
from pyro_dgm.core.shapes import reference
from pyro_dgm.core.warn import in_short
from pyro_dgm.flows.autoregressive import sequential
from pyro_dgm.flows.base import Direction, NormalizingFlow, directed, features_of
from pyro_dgm.flows.many_rows import Piece

__all__ = ["MAF", "NSF", "RationalQuadratic", "RealNVP", "ZukoFlow"]


# Units of a conditioner's layer for each column, the fewest and the most (docs/benchmarks/tables.md). An autoregressive network
# shares them among its columns: with 64 units 43 columns have one or two each.
_UNITS, _NARROWEST, _WIDEST = 3, 64, 256


def _widths(columns: int, given: Sequence[int] | None) -> Sequence[int]:
    """Widths of the hidden layers of a conditioner."""
    return (min(max(_UNITS * columns, _NARROWEST), _WIDEST),) * 2 if given is None else given


class RealNVP(NormalizingFlow):
    r"""Affine coupling flow: :math:`x_b = e^{a(x_a, c)} z_b + b(x_a, c)`, alternating which half is kept.

    Sampling and scoring each cost one pass per layer, at any D. A layer leaves half of the coordinates alone, so use
    at least four. In one dimension there is nothing to couple: it is then a Gaussian (with a context, a conditional
    one); use :class:`NSF`.

    Args:
        event_shape: an int (a vector) or a shape.
        context_features: length of the context's last dimension.
        support: constraint of the event, through ``biject_to``.
        fast: accepted for symmetry; couplings are equally fast in both directions.
        transforms: number of coupling layers.
        hidden_features: widths of the hidden layers of each conditioner; None for two of 3 D, between 64 and 256.
        activation: of the conditioners; smooth by default.

    References:
        | Dinh, Sohl-Dickstein & Bengio (2017), "Density estimation using Real NVP", arXiv 1605.08803, eqs. 7-8.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> flow = dgm.RealNVP(4)
        >>> flow().log_prob(torch.zeros(3, 4)).shape
        torch.Size([3])
    """

    @checked(transforms=1, bins=2, hidden_features=1)
    def __init__(
        self,
        event_shape: int | Iterable[int],
        context_features: int = 0,
        *,
        support: constraints.Constraint | None = None,
        fast: Direction = "density",
        transforms: int = 6,
        hidden_features: Sequence[int] | None = None,
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(event_shape, context_features, support=support)
        flow = zuko.flows.RealNVP(
            self.features,
            context_features,
            transforms,
            hidden_features=_widths(self.features, hidden_features),
            activation=activation,
        )
        self.flow = directed(flow, self.features, fast)


class MAF(NormalizingFlow):
    r"""Affine autoregressive flow: :math:`z_i = e^{a(x_{<i}, c)} x_i + b(x_{<i}, c)`.

    ``fast="density"`` scores in one pass and draws column by column; ``fast="sampling"`` (inverse autoregressive) draws, with
    the density of the draw, in one pass and scores other points column by column. Use the first for likelihoods, the
    second for guides. All columns together compute about as much as one pass, in D times as many small operations.

    Args:
        event_shape: an int (a vector) or a shape.
        context_features: length of the context's last dimension.
        support: constraint of the event, through ``biject_to``.
        fast: which direction takes one pass.
        transforms: number of layers; the order of the features is reversed between them.
        hidden_features: widths of the hidden layers of each conditioner; None for two of 3 D, between 64 and 256.
        activation: of the conditioners; smooth by default.

    References:
        | Papamakarios, Pavlakou & Murray (2017), "Masked autoregressive flow", arXiv 1705.07057.
        | Kingma et al. (2016), "Inverse autoregressive flow", arXiv 1606.04934.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> q = dgm.MAF(3, context_features=2, fast="sampling")(torch.zeros(5, 2))
        >>> q.rsample().shape
        torch.Size([5, 3])
    """

    @checked(transforms=1, bins=2, hidden_features=1)
    def __init__(
        self,
        event_shape: int | Iterable[int],
        context_features: int = 0,
        *,
        support: constraints.Constraint | None = None,
        fast: Direction = "density",
        transforms: int = 3,
        hidden_features: Sequence[int] | None = None,
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(event_shape, context_features, support=support)
        flow = zuko.flows.MAF(
            self.features,
            context_features,
            transforms,
            hidden_features=_widths(self.features, hidden_features),
            activation=activation,
        )
        self.flow = directed(flow, self.features, fast)


class NSF(NormalizingFlow):
    r"""Autoregressive flow of monotonic rational-quadratic splines with ``bins`` pieces per dimension.

    The most expressive per layer, and the dearest. Outside ``[-5, 5]`` in the flow's units a spline is the identity:
    standardise the data first (:meth:`standardize`), and do not use it for heavy tails.

    Args:
        event_shape: an int (a vector) or a shape.
        context_features: length of the context's last dimension.
        support: constraint of the event, through ``biject_to``.
        fast: which direction takes one pass; see :class:`MAF`.
        transforms: number of layers.
        bins: number of spline pieces.
        hidden_features: widths of the hidden layers of each conditioner; None for two of 3 D, between 64 and 256.
        activation: of the conditioners; smooth by default.

    References:
        | Durkan et al. (2019), "Neural spline flows", arXiv 1906.04032.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> flow = dgm.NSF(2, support=torch.distributions.constraints.positive)
        >>> bool((flow().sample((100,)) > 0).all())
        True
    """

    @checked(transforms=1, bins=2, hidden_features=1)
    def __init__(
        self,
        event_shape: int | Iterable[int],
        context_features: int = 0,
        *,
        support: constraints.Constraint | None = None,
        fast: Direction = "density",
        transforms: int = 3,
        bins: int = 8,
        hidden_features: Sequence[int] | None = None,
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(event_shape, context_features, support=support)
        flow = zuko.flows.MAF(
            self.features,
            context_features,
            transforms,
            univariate=RationalQuadratic,
            shapes=[(bins,), (bins,), (bins - 1,)],
            hidden_features=_widths(self.features, hidden_features),
            activation=activation,
        )
        self.flow = directed(flow, self.features, fast)


class ZukoFlow(NormalizingFlow):
    r"""Any lazy zuko flow or mixture as a Pyro family: NICE, MAF, NSF, NCSF, SOSPF, BPF, NAF, UNAF, GF, CNF, GMM.

    The number of features and of context features is found from the flow. NCSF lives on :math:`[-\pi, \pi]` and says
    so by its support; a GMM has no reparameterised draws (``has_rsample`` is False).

    Args:
        zuko_flow: a lazy flow, ``zuko_flow(context) -> distribution``.
        event_shape: the shape to give its vector; None keeps the vector.
        support: constraint of the event, through ``biject_to``, for flows over all of :math:`\mathbb{R}^D`.

    Raises:
        TypeError: for anything but a lazy zuko flow.
        ValueError: if the flow's features do not fill ``event_shape``.

    Note:
        BPF, SOSPF, NAF, UNAF and GF invert by bisection on ``[-10, 10]`` in the flow's units, to about 1e-6:
        standardise the data. Their draws carry gradients, at the price of that bisection.

    Example:
        >>> import torch, zuko, pyro_dgm as dgm
        >>> flow = dgm.ZukoFlow(zuko.flows.BPF(6, context=2), event_shape=(2, 3))
        >>> flow.context_features, flow(torch.zeros(2)).sample().shape
        (2, torch.Size([2, 3]))
    """

    @checked()
    def __init__(
        self,
        zuko_flow: zuko.lazy.LazyDistribution,
        event_shape: int | Iterable[int] | None = None,
        *,
        support: constraints.Constraint | None = None,
    ) -> None:
        if not isinstance(zuko_flow, zuko.lazy.LazyDistribution):
            raise TypeError(f"ZukoFlow: expected a lazy zuko flow such as zuko.flows.BPF(3), got {type(zuko_flow)}.")
        shape, context_features = features_of(zuko_flow)
        super().__init__(shape if event_shape is None else event_shape, context_features, support=support)
        if self.features != shape.numel():
            raise ValueError(
                f"ZukoFlow: {type(zuko_flow).__name__} has {shape.numel()} features, but event_shape "
                f"{tuple(self.event_shape)} with support {in_short(support)} needs {self.features}."
            )
        self.flow = sequential(zuko_flow)
        like = reference(zuko_flow)
        if like is not None:
            self.to(like.dtype)


class RationalQuadratic(Transform):
    """A spline on ``[-bound, bound]``, the identity outside.

    Args:
        widths: raw widths, shape ``(*batch, K)``.
        heights: raw heights, shape ``(*batch, K)``.
        slopes: raw logarithms of the slopes between pieces, shape ``(*batch, K - 1)``; at the ends the slope is 1.
        bound: B.
        least: the least slope.

    Example:
        >>> spline = RationalQuadratic(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.5]))
        >>> x = torch.tensor([-7.0, -1.0, 2.0])
        >>> bool(torch.allclose(spline.inv(spline(x)), x, atol=1e-5))
        True
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(
        self, widths: Tensor, heights: Tensor, slopes: Tensor, bound: float = 5.0, least: float = 1e-3
    ) -> None:
        super().__init__()
        self.bound = bound
        self.floor = math.log(least)
        self.slopes = slopes
        raw = torch.stack([widths, heights], -2)
        self.sizes = torch.exp(soft_clip(raw, -0.5 * self.floor))
        self.edges = self.sizes.cumsum(-1)

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        v = y.clamp(-self.bound, self.bound)
        return torch.where(y.abs() < self.bound, self._piece(v, 1).origin(v), y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image and log-derivative."""
        v, inside = x.clamp(-self.bound, self.bound), x.abs() < self.bound
        y, slope = self._piece(v, 0).image(v)
        return torch.where(inside, y, x), torch.where(inside, slope.log(), 0.0)

    def _piece(self, v: Tensor, axis: int) -> Piece:
        """The piece that ``v`` lies in, on the axis of x (0) or of y (1)."""
        total, pieces = self.edges[..., -1], self.edges.shape[-1]
        place = (v + self.bound) * total[..., axis] / (2.0 * self.bound)
        k = (self.edges[..., axis, :] < place.unsqueeze(-1)).sum(-1, keepdim=True).clamp_max(pieces - 1)
        both, scale = k.unsqueeze(-1).expand(*k.shape[:-1], 2, 1), 2.0 * self.bound / total
        width, height = (_at(self.sizes, both).squeeze(-1) * scale).unbind(-1)
        right, top = (_at(self.edges, both).squeeze(-1) * scale - self.bound).unbind(-1)
        raw = _at(F.pad(self.slopes, (1, 1)), torch.cat([k, k + 1], -1))
        first, last = torch.exp(soft_clip(raw, -self.floor)).unbind(-1)
        return Piece(right - width, top - height, width, height, first, last, height / width)


def _at(table: Tensor, index: Tensor) -> Tensor:
    """Entries of the last dimension, batch dimensions broadcast."""
    return table.expand(*index.shape[:-1], table.shape[-1]).gather(-1, index)
