r"""What the flows share: a zuko flow as a Pyro family, :math:`x = T(u),\ u = f_\theta(z; c),\ z \sim p(z)`.

zuko makes the flows (Ruthotto & Haber 2021, section 3.1); here they get Pyro's manners: supports, events of any shape,
units taken from data, and a standard normal base without the arithmetic of a location and a scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from pyro_dgm.core import DistributionModule, Standardize, zuko
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.module import composed
from pyro_dgm.core.shapes import (
    as_tensor_like,
    broadcast_batch,
    check_context,
    check_value_shape,
    reference,
    refuse_immoderate,
)
from pyro_dgm.core.units import Tails
from pyro_dgm.core.warn import in_short
from pyro_dgm.flows.autoregressive import sequential
from pyro_dgm.flows.few_rows import Decorrelate
from pyro_dgm.flows.many_rows import ColumnUnits
from pyro_dgm.flows.mixture_units import MixtureUnits

__all__ = ["Direction", "NormalizingFlow", "StandardNormalBase", "directed", "features_of", "standard_normal"]

Direction = Literal["density", "sampling"]

# What soften() sets. Measured on RealNVP and MAF with 5 and 3 reference posteriors.
_SOFT_BOUND = 1.0  # on |log scale| of a guide's affine layer; with zuko's 6.9, 4 of 4 RealNVPs overflow at the rate .05
_SOFT_RATE = 1.5e-2  # of Adam; KL at most .011, before both changes .013


class StandardNormalBase(Distribution):
    r""":math:`N(0, I)` over vectors, :math:`\log p(z) = -\frac12 \|z\|^2 - \frac D2 \log 2\pi`.

    A general normal of torch subtracts 0 and divides by 1, which is a tenth of the cost of a small flow.

    Args:
        zero: the origin, shape ``(D,)``: it says dimension, dtype and device.
        batch_shape: of independent copies.

    Example:
        >>> StandardNormalBase(torch.zeros(2)).log_prob(torch.zeros(3, 2))
        tensor([-1.8379, -1.8379, -1.8379])
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, zero: Tensor, batch_shape: Any = ()) -> None:
        self.zero = zero
        super().__init__(Size(batch_shape), zero.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> StandardNormalBase:
        return StandardNormalBase(self.zero, batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape + self.event_shape
        return torch.randn(shape, dtype=self.zero.dtype, device=self.zero.device)

    def log_prob(self, value: Tensor) -> Tensor:
        return -0.5 * (value * value).sum(-1) - 0.5 * math.log(2.0 * math.pi) * len(self.zero)


def standard_normal(features: int) -> zuko.lazy.UnconditionalDistribution:
    """The lazy base of a flow over ``features`` dimensions; the origin is a buffer."""
    return zuko.lazy.UnconditionalDistribution(StandardNormalBase, torch.zeros(features), buffer=True)


class NormalizingFlow(DistributionModule):
    """A family around a lazy zuko flow over the flat, unconstrained event.

    Args:
        event_shape: an int or a shape.
        context_features: length of the context.
        support: constraint of the event; None for the flow's own domain.
    """

    flow: zuko.lazy.LazyDistribution

    def __init__(
        self,
        event_shape: int | Iterable[int],
        context_features: int = 0,
        *,
        support: constraints.Constraint | None = None,
    ) -> None:
        super().__init__(event_shape, context_features, support=support)
        self.standard = Standardize(self.features)
        self.decorrelate = Decorrelate()  # the identity, unless a fit finds few rows
        self.mixture = MixtureUnits()  # the identity, unless a fit finds many
        self.columns = ColumnUnits()  # the same
        self._known_support: constraints.Constraint | None = None

    def build(self, context: Tensor | None) -> Distribution:
        return self.flow(context)

    def support_of(self, built: Distribution) -> constraints.Constraint:
        if self._known_support is None:  # a flow's domain is the same for every context
            self._known_support = super().support_of(built)
        return self._known_support

    def bijection(self, built: Distribution) -> Transform | None:
        rest = super().bijection(built)
        whole = (self.decorrelate, self.mixture, self.columns, self.standard)
        parts = [units.transform() for units in whole if not units.is_identity()]
        return composed(parts + ([] if rest is None else [rest])) if parts else rest

    def event_units(self) -> Standardize:
        return self.standard

    @torch.no_grad()
    def fit_events(self, x: Tensor) -> None:
        """Mean 0 and sd 1 before the flow, of data ``(..., *event_shape)``; columns with long tails are compressed first."""
        self._take_units(x, "bend" if len(self.event_shape) < 2 else "keep")

    @torch.no_grad()
    def take_straight_units(self, x: Tensor) -> None:
        """The same without any compression."""
        self._take_units(x, "keep")

    def _take_units(self, x: Tensor, tails: Tails) -> None:
        self.standard.forget()
        self.decorrelate.forget()
        self.mixture.forget()
        self.columns.forget()
        rows = self.flow_units(x).reshape(-1, self.features)
        self.standard.fit(rows, tails=tails, who=type(self).__name__)

    def has_normal_base(self) -> bool:
        """Whether the identity would be a normal law: not so of a flow on circles, nor of a mixture."""
        base = getattr(self._built(), "base", None)
        return isinstance(base, StandardNormalBase | zuko.distributions.DiagNormal)

    def flow_units(self, x: Tensor) -> Tensor:
        """Events as flat vectors in the unconstrained, standardised units in which the flow begins."""
        x = self._events(x, self.event_shape)
        to_event = self._to_event()
        return x if to_event is None else to_event.inv(x)

    def from_units(self, u: Tensor) -> Tensor:
        """Events of vectors in the flow's units: what :meth:`flow_units` undoes."""
        u = self._events(u, Size((self.features,)))
        to_event = self._to_event()
        return u if to_event is None else to_event(u)

    def _to_event(self) -> Transform | None:
        return self.bijection(self._built())

    def _built(self) -> Distribution:
        """For a context of zeros, where any will do."""
        return self.build(self.standard.loc.new_zeros(self.context_features) if self.context_features else None)

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Latents :math:`z = g^{-1}(x; c)` of events ``(*batch, *event_shape)``, shape ``(*batch, D)``.

        They are standard normal where the flow fits the data.

        Raises:
            ValueError: for events of another shape or a context that does not fit, and (while Pyro validates) NaN or infinity;
                TypeError for a family without a transform, such as a mixture.

        Example:
            >>> import pyro_dgm as dgm
            >>> flow = dgm.RealNVP((2, 3), support=constraints.positive)
            >>> x = flow().sample((5,))
            >>> z = flow.encode(x)
            >>> z.shape, bool(torch.allclose(flow.decode(z), x, atol=1e-4))
            (torch.Size([5, 6]), True)
        """
        built = self._with_transform(context)
        x = self._events(x, self.event_shape)
        batch = broadcast_batch(type(self).__name__, x.shape[: x.dim() - len(self.event_shape)], built.batch_shape)
        x = x.expand(batch + self.event_shape)
        to_event = self.bijection(built)
        return built.transform(x if to_event is None else to_event.inv(x))

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Events :math:`x = g(z; c)` of latents ``(*batch, D)``: what :meth:`encode` undoes."""
        z = self._events(z, Size((self.features,)))
        built = self._with_transform(context)
        z = z.expand(broadcast_batch(type(self).__name__, z.shape[:-1], built.batch_shape) + z.shape[-1:])
        to_event = self.bijection(built)
        u = built.transform.inv(z)
        return u if to_event is None else to_event(u)

    @checked(draws=1)
    def trajectory(
        self, draws: int | Tensor, times: Sequence[float] | None = None, context: Tensor | None = None
    ) -> Tensor:
        r"""Where draws are on their way from the base at time 0 to the data at time 1.

        A continuous flow moves points by :math:`\dot u = v(t, u; c)` and is asked at ``times``. A flow of layers has none: it
        shows where points are after each of its K layers, at :math:`t = k / K`. On the way units pass from the
        base's to the data's,

        .. math:: x(t) = (1 - t)\, u(t) + t\, T(u(t)), \qquad x(0) = z \sim p(z), \qquad x(1) = T(u(1)),

        where T maps the flow's units to data (:meth:`from_units`). The end is the draw that ``rsample`` makes of the same z.
        Between the steps of a fixed grid positions are those of a cubic, which is as exact as the steps.

        Args:
            draws: how many, or the latents to start from, shape ``(*batch, D)``. To see where data come from, give
                ``flow.encode(x)``.
            times: between 0 and 1, in any order; None for 11 even ones. Only of continuous flows.
            context: shape ``(*batch, context_features)``, or None.

        Returns:
            Shape ``(T, *batch, D)``, events flat; with a number of draws, ``(T, draws, *batch of the context, D)``.

        Raises:
            TypeError: for a family that moves no points (a mixture).
            ValueError: for times of a flow of layers, times outside 0 to 1, and supports whose events have more entries than
                D (a simplex).

        Example:
            >>> import pyro_dgm as dgm
            >>> flow = dgm.OTFlow(2)
            >>> z = torch.randn(5, 2)
            >>> x = flow.trajectory(z, [0.0, 0.5, 1.0])
            >>> x.shape, bool((x[0] == z).all()), bool(torch.allclose(x[-1], flow.decode(z)))
            (torch.Size([3, 5, 2]), True, True)
            >>> dgm.RealNVP(2, transforms=4).trajectory(100).shape  # the base, and four layers
            torch.Size([5, 100, 2])
        """
        t, u, built = self._positions(draws, times, context)
        return self._passing_units(built, t.to(u).reshape(-1, *[1] * (u.dim() - 1)), u)

    def positions(self, draws: int | Tensor, times: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
        """Times ``(T,)`` and positions ``(T, *batch, D)`` of a :meth:`trajectory` in the flow's units, u(t)."""
        return self._positions(draws, times, None)[:2]

    def _positions(
        self, draws: int | Tensor, times: Sequence[float] | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Any]:
        built = self._with_transform(
            context, "trajectories. They are of continuous flows (FFJORD, OTFlow) and of layers (NSF)"
        )
        if isinstance(draws, int):
            z = built.base.rsample((draws,))
        else:
            z = self._events(draws, Size((self.features,)))
            z = z.expand(broadcast_batch(type(self).__name__, z.shape[:-1], built.batch_shape) + z.shape[-1:])
        return *self._stages(built, z, times), built

    def _stages(self, built: Any, z: Tensor, times: Sequence[float] | None) -> tuple[Tensor, Tensor]:
        """Times ``(T,)`` and the positions then, in the flow's units."""
        if times is not None:
            raise ValueError(
                f"{type(self).__name__}: a flow of layers has no times; leave them out, and get the positions after each "
                "layer. Times are of continuous flows (FFJORD, OTFlow)."
            )
        stages = [z]
        for layer in _layers_of(built.transform.inv):
            stages.append(layer(stages[-1]))
        return torch.linspace(0.0, 1.0, len(stages)), torch.stack(stages)

    def _passing_units(self, built: Any, t: Tensor, u: Tensor) -> Tensor:
        to_event = self.bijection(built)
        if to_event is None:
            return u
        x = to_event(u).flatten(u.dim() - 1) if self.event_shape else to_event(u).unsqueeze(-1)
        if x.shape != u.shape:
            raise ValueError(
                f"{type(self).__name__}: events on {in_short(self._support)} have {x.shape[-1]} entries and {u.shape[-1]} "
                "degrees of freedom, so positions on the way are no events. Follow flow.encode(x) and flow.decode(z) instead."
            )
        return torch.lerp(u, x, t)

    def _events(self, x: Tensor, shape: Size) -> Tensor:
        """Given rows as tensors of the flow's kind, of this shape, and finite while Pyro validates."""
        name = type(self).__name__
        x = as_tensor_like(name, "value", x, reference(self))
        check_value_shape(name, x, shape)
        if Distribution._validate_args:
            refuse_immoderate(name, x.reshape(-1, max(1, shape.numel())))
        return x

    def _with_transform(self, context: Tensor | None, lacks: str = "codes. Use a flow such as NSF, or a VAE") -> Any:
        built = self.checked_build(check_context(self, context))
        if not isinstance(built, zuko.distributions.NormalizingFlow):
            raise TypeError(
                f"{type(self).__name__}: {type(built).__name__} is no transform of a latent, so it has no {lacks}."
            )
        return built

    @torch.no_grad()
    def start_at_identity(self) -> NormalizingFlow:
        """Zero the last layer of every hyper-network: affine and spline flows become the identity, q = p(z)."""
        for module in self.flow.modules():
            for hyper in [m for n, m in module.named_children() if n in ("hyper", "ode")]:
                for last in _last_layers(hyper):
                    for parameter in last.parameters():
                        parameter.zero_()
            if isinstance(module, zuko.flows.gaussianization.ElementWiseTransform) and hasattr(module, "phi"):
                for phi in module.phi:
                    phi.zero_()
        return self

    def soften(self) -> float | None:
        """Scale what the last layer of every plain hyper-network reads, and bound how far an affine layer scales."""
        plain: list[Any] = [m for m in self.modules() if _has_plain_network(m)]
        for module in plain:
            module.hyper[-2] = _Softened(module.hyper[-2], module.hyper[-1].in_features)
            if module.univariate is zuko.transforms.MonotonicAffineTransform:
                module.univariate = partial(module.univariate, slope=math.exp(-_SOFT_BOUND))
        return _SOFT_RATE if plain else None


def _layers_of(transform: Any) -> list[Transform]:
    """The maps that a transform is composed of, first to last."""
    if isinstance(transform, zuko.transforms.ComposedTransform):
        return [layer for part in transform.transforms for layer in _layers_of(part)]
    return [transform]


class _Softened(nn.Sequential):
    """The last hidden layer's activation, over the square root of its width: a step of Adam moves every weight by the rate."""

    gain: Tensor

    def __init__(self, activation: nn.Module, width: int) -> None:
        super().__init__(activation)
        self.register_buffer("gain", torch.tensor(width**-0.5))  # kept, so that no other network takes this state

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self[0](x)


def _has_plain_network(module: nn.Module) -> bool:
    """Whether it is a layer of a flow, with a conditioner of at least one hidden layer that is not softened."""
    hyper: Any = dict(module.named_children()).get("hyper")
    plain = isinstance(hyper, nn.Sequential) and len(hyper) > 1 and not isinstance(hyper[-2], _Softened)
    return plain and isinstance(hyper[-1], nn.Linear | zuko.nn.Linear)


def _last_layers(hyper: nn.Module) -> list[nn.Module]:
    """The layers whose outputs are summed into the hyper-network's output."""
    branches = [hyper] if isinstance(hyper, nn.Sequential) else list(hyper.children())
    return [[m for m in b.modules() if isinstance(m, nn.Linear | zuko.nn.Linear)][-1] for b in branches]


def directed(flow: zuko.lazy.Flow, features: int, fast: Direction) -> zuko.lazy.Flow:
    """The flow over a standard normal, its transform inverted where sampling, not scoring, is to take the single pass."""
    if fast not in ("density", "sampling"):
        raise ValueError(
            f"fast={fast!r}: expected 'density' (scoring in one pass) or 'sampling' (drawing in one pass)."
        )
    transform = flow.transform if fast == "density" else flow.transform.inv
    return sequential(zuko.lazy.Flow(transform, standard_normal(features)))


def features_of(flow: zuko.lazy.LazyDistribution) -> tuple[Size, int]:
    """Event shape and number of context features of any zuko flow, found by asking it."""
    for context_features in [0, *range(1, 1 + _widest_input(flow))]:
        shape = _event_shape(flow, context_features)
        if shape is not None:
            return shape, context_features
    raise ValueError(f"ZukoFlow: could not find the features of {type(flow).__name__}; is it a lazy zuko flow?")


def _widest_input(flow: nn.Module) -> int:
    linear = (nn.Linear, zuko.nn.Linear)
    return max((m.in_features for m in flow.modules() if isinstance(m, linear)), default=0)


@torch.no_grad()
def _event_shape(flow: zuko.lazy.LazyDistribution, context_features: int) -> Size | None:
    tensor = next(iter([*flow.parameters(), *flow.buffers()]))
    try:
        built = flow(tensor.new_zeros(context_features) if context_features else None)
        built.log_prob(tensor.new_zeros(built.event_shape))
    except (RuntimeError, TypeError, AttributeError):
        return None
    return built.event_shape
