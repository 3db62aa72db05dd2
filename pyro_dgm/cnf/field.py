r"""Vector fields :math:`v(t, x; c)` with their divergence in closed form, and what their paths cost.

A continuous flow moves a point by :math:`\dot x = v(t, x; c)`; its log density changes by
:math:`\frac{d}{dt} \log p(x(t)) = -\nabla \cdot v` (Chen et al. 2018, theorem 1).

**Two layers.** With gates :math:`g` and a rate :math:`a` that follow time, biases :math:`b` that follow time and context, and
:math:`d_k = g_k \odot (1 - \tanh^2)` of layer k,

.. math:: v = W_2\, g_1 \odot \tanh\big(W_1\, g_0 \odot \tanh(W_0 x + b_0) + b_1\big) + b_2 + a x, \qquad
          \nabla \cdot v = d_1^\top \big(W_1 \odot (W_0 W_2)^\top\big)\, d_0 + D a.

The bracket does not depend on the point: the divergence costs one more matrix product, whatever D is.

**A potential.** :math:`v = -\nabla\Phi` with :math:`w, b, a, l` functions of time and context, and :math:`s = \tanh(Kx + b)`:

.. math:: \Phi(t, x; c) = w^\top \log\cosh(Kx + b) + \tfrac12 a |x|^2 + \tfrac12 |A x|^2 + l^\top x, \qquad
          \nabla\Phi = K^\top(w \odot s) + a x + A^\top A x + l, \qquad
          \Delta\Phi = \sum_j w_j (1 - s_j^2) |K_j|^2 + D a + |A|_F^2.

Along optimal paths :math:`\partial_t\Phi = \frac12 |\nabla\Phi|^2` (Onken et al. 2021, arXiv 2006.00104, eqs. 6-8; Ruthotto &
Haber 2021, section 3.2).

**Costs**, integrated with the path itself:

========== ============================================== =========================================
name       rate at a point                                 source
========== ============================================== =========================================
transport  :math:`\frac12 |v|^2`                           Onken et al. (2021), eq. 9
kinetic    :math:`|v|^2 / D`                               Finlay et al. (2020), eq. 8a, a dimension
jacobian   :math:`|\epsilon^\top \nabla v|^2 / D`          Finlay et al. (2020), eq. 8b, one probe
hjb        :math:`|\partial_t\Phi - \frac12|\nabla\Phi|^2|` Onken et al. (2021), eq. 10
========== ============================================== =========================================
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from pyro_dgm.core import MLP
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.upstream import PyroABCMeta, listed_numbers

__all__ = [
    "COSTS",
    "Motion",
    "NOTHING_KNOWN",
    "Plan",
    "PotentialField",
    "Rates",
    "TwoLayerField",
    "VectorField",
    "path_costs",
]

FREQUENCIES = 3
sigmoid_slope = torch.ops.aten.sigmoid_backward  # of a factor and s: factor * s * (1 - s) in one pass


class Rates(NamedTuple):
    """What a field says of a point: shapes ``(*batch, D)``, ``(*batch,)`` and, of a potential field, ``(*batch,)``."""

    velocity: Tensor
    divergence: Tensor
    hjb: Tensor | None = None


class Plan(NamedTuple):
    """What is known of a solve before it begins.

    Attributes:
        times: at which the field will be asked, where that is known, so that what depends on time is computed at once.
        probe: of a stochastic trace, drawn once a solve.
        hjb: whether the Hamilton-Jacobi residual is wanted.
    """

    times: Tensor | None = None
    probe: Tensor | None = None
    hjb: bool = False


NOTHING_KNOWN = Plan()
Motion = Callable[[Tensor, Tensor], Rates]
T = TypeVar("T")


class VectorField(nn.Module, metaclass=PyroABCMeta):
    """Abstract field. What depends on the context alone is computed once, by :meth:`bind`.

    Args:
        features: length D of the points.
        context_features: length of the context; 0 for none.
    """

    def __init__(self, features: int, context_features: int = 0) -> None:
        super().__init__()
        self.features = features
        self.context_features = context_features

    @abstractmethod
    def bind(self, context: Tensor | None, plan: Plan = NOTHING_KNOWN) -> Motion:
        """The motion ``(t, x) -> Rates`` for a context; ``t`` is a scalar, ``x`` has shape ``(*sample, *batch, D)``."""

    @abstractmethod
    def velocity(self, time: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """The velocity alone, for times of shape ``(*batch, 1)``, one a point."""

    @abstractmethod
    def start_at_rest(self) -> None:
        """Set parameters so that the velocity is zero everywhere."""

    def probe(self, x: Tensor) -> Tensor | None:
        """Random probes of a stochastic trace, drawn once a solve; None where the trace is exact."""
        return None


def time_features(t: Tensor) -> Tensor:
    r"""The features :math:`(t, \cos k\pi t, \sin k\pi t)` of times, shape ``t.shape[:-1] + (7,)`` or ``(7,)``."""
    t = t if t.dim() else t[None]
    angle = t * _frequencies(t)
    return torch.cat([t, angle.cos(), angle.sin()], -1)


def time_features_rate(t: Tensor) -> Tensor:
    """Their derivatives in time."""
    t = t if t.dim() else t[None]
    k = _frequencies(t)
    angle = t * k
    return torch.cat([torch.ones_like(t), -k * angle.sin(), k * angle.cos()], -1)


def _frequencies(t: Tensor) -> Tensor:
    return math.pi * torch.arange(1, FREQUENCIES + 1, dtype=t.dtype, device=t.device)


def at_times(stages: Callable[[Tensor], list[T]], times: Tensor | None) -> Callable[[Tensor], T]:
    """What a field is at a time, out of a table made at once for all times of a solve; other times are computed singly."""
    known: dict[float, T] = {}
    if times is not None:
        known = dict(zip((round(t, 5) for t in listed_numbers(times)), stages(times), strict=True))

    def stage(t: Tensor) -> T:
        found = known.get(round(float(t), 5)) if known else None
        return stages(t[None])[0] if found is None else found

    return stage


class _Stage(NamedTuple):
    """The field at one time."""

    first: Tensor
    bias0: Tensor
    second: Tensor
    bias1: Tensor
    third: Tensor
    bias2: Tensor
    coupling: Tensor
    gate: Tensor
    rate: Tensor


class TwoLayerField(VectorField):
    """The default field: smooth, gated by time and context, with an exact divergence at a cost independent of D.

    Args:
        features: length D of the points.
        context_features: length of the context; 0 for none.
        hidden_features: width H of both layers.

    Example:
        >>> import torch
        >>> field = TwoLayerField(3)
        >>> x, t = torch.randn(5, 3), torch.tensor(0.4)
        >>> rates = field.bind(None)(t, x)
        >>> jacobian = torch.autograd.functional.jacobian(lambda x: field.bind(None)(t, x).velocity, x[0])
        >>> torch.allclose(rates.divergence[0], jacobian.trace(), atol=1e-5)
        True
    """

    @checked(features=1, hidden_features=1)
    def __init__(self, features: int, context_features: int = 0, hidden_features: int = 64) -> None:
        super().__init__(features, context_features)
        width = hidden_features
        self.first = nn.Parameter(torch.randn(width, features) * (2.0 / features) ** 0.5)
        self.second = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.third = nn.Parameter(torch.randn(features, width) * 0.3 * width**-0.5)
        self.sizes = (width, width, features, width, width, 1)
        self.time = nn.Linear(1 + 2 * FREQUENCIES, sum(self.sizes))
        biases = 2 * width + features
        self.context: Any = MLP(context_features, biases, (width,)) if context_features else None
        with torch.no_grad():
            self.time.weight[2 * width : biases] *= 0.1
            self.time.bias[biases:-1] = 1.0  # gates are open
            self.time.weight[-1] *= 0.1
            self.time.bias[-1] *= 0.1

    def bind(self, context: Tensor | None, plan: Plan = NOTHING_KNOWN) -> Motion:
        of_context = self._of_context(context)
        stage = at_times(self._stages, plan.times)

        def motion(t: Tensor, x: Tensor) -> Rates:
            at = stage(t)
            z0 = linear(x, at.first, at.bias0)
            s0 = torch.sigmoid(z0 if of_context is None else z0 + of_context[0])
            z1 = linear(s0, at.second, at.bias1)
            s1 = torch.sigmoid(z1 if of_context is None else z1 + of_context[1])
            out = linear(s1, at.third, at.bias2)
            velocity = torch.addcmul(out if of_context is None else out + of_context[2], at.rate, x)
            slope = sigmoid_slope(linear(sigmoid_slope(s0.new_ones(()), s0), at.coupling), s1)
            return Rates(velocity, slope @ at.gate + self.features * at.rate)

        return motion

    def _stages(self, times: Tensor) -> list[_Stage]:
        """The field at each of some times; a gate that all points share is folded into the weights.

        ``sigmoid(z) - 1/2 = tanh(z / 2) / 2`` is six times as fast as tanh: weights are scaled for it.
        """
        b0, b1, b2, g0, g1, a = self.time(time_features(times[:, None])).split(self.sizes, -1)
        first, second, third = 2.0 * self.first, 4.0 * self.second, 2.0 * self.third
        coupling = second * (first @ third).mT * g0[:, None]
        second, third = second * g0[:, None], third * g1[:, None]
        b1, b2 = b1 - 0.5 * second.sum(-1), b2 - 0.5 * third.sum(-1)
        columns = [c.unbind() for c in (b0, second, b1, third, b2, coupling, g1, a.squeeze(-1))]
        return [_Stage(first, *row) for row in zip(*columns, strict=True)]

    def velocity(self, time: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        b0, b1, b2, g0, g1, a = self.time(time_features(time)).split(self.sizes, -1)
        of_context = self._of_context(context)
        if of_context is not None:
            b0 = b0 + of_context[0]
            b1 = b1 + of_context[1]
            b2 = b2 + of_context[2]
        s0 = torch.sigmoid(linear(x, 2.0 * self.first) + b0)
        s1 = torch.sigmoid(linear((s0 - 0.5) * g0, 4.0 * self.second) + b1)
        return linear((s1 - 0.5) * g1, 2.0 * self.third) + b2 + a * x

    def _of_context(self, context: Tensor | None) -> tuple[Tensor, ...] | None:
        return None if self.context is None else self.context(context).split(self.sizes[:3], -1)

    @torch.no_grad()
    def start_at_rest(self) -> None:
        width = self.sizes[0]
        self.third.zero_()
        for layer in [self.time] + ([] if self.context is None else [self.context[-1]]):
            layer.weight[2 * width : 2 * width + self.features] = 0.0
            layer.bias[2 * width : 2 * width + self.features] = 0.0
        self.time.weight[-1] = 0.0
        self.time.bias[-1] = 0.0


class PotentialField(VectorField):
    """The gradient field of a potential with one wide hidden layer; the cost of its divergence is linear in D.

    Args:
        features: length D of the points.
        context_features: length of the context; 0 for none.
        hidden_features: number of ridge functions in the potential.
        rank: rows of the quadratic part.

    Example:
        >>> import torch
        >>> field = PotentialField(3)
        >>> x, t = torch.randn(3), torch.tensor(0.4)
        >>> jacobian = torch.autograd.functional.jacobian(lambda x: field.bind(None)(t, x).velocity, x)
        >>> torch.allclose(jacobian, jacobian.mT, atol=1e-5)   # a gradient field: no rotation
        True
    """

    @checked(features=1, hidden_features=1, rank=1)
    def __init__(
        self, features: int, context_features: int = 0, hidden_features: int = 256, rank: int | None = None
    ) -> None:
        super().__init__(features, context_features)
        width = hidden_features
        self.ridges = nn.Parameter(torch.randn(width, features) * (4.0 / features) ** 0.5)
        self.quadratic = nn.Parameter(0.1 * torch.randn(min(10, features) if rank is None else rank, features))
        self.sizes = (width, width, features, 1)
        self.time = nn.Linear(1 + 2 * FREQUENCIES, sum(self.sizes))
        self.context: Any = MLP(context_features, sum(self.sizes), (64,)) if context_features else None
        with torch.no_grad():
            self.time.bias[:width] = 2.0 * torch.randn(width)
            for layer in self._outputs():
                layer.weight[width:] *= 0.3 / width**0.5
                layer.bias[width:] *= 0.3 / width**0.5

    def _outputs(self) -> list[Any]:
        """The linear layers whose outputs are summed into the potential's coefficients."""
        return [self.time] + ([] if self.context is None else [list(self.context)[-1]])

    def bind(self, context: Tensor | None, plan: Plan = NOTHING_KNOWN) -> Motion:
        of_context = None if self.context is None else self.context(context)
        lengths, trace = self.ridges.square().sum(-1), self.quadratic.square().sum()
        stage = at_times(lambda times: list(self.time(time_features(times[:, None])).unbind()), plan.times)

        def motion(t: Tensor, x: Tensor) -> Rates:
            b, w, l, a = self._split(stage(t), of_context)
            z = linear(x, self.ridges, b) if of_context is None else linear(x, self.ridges) + b
            s = _tanh(z)
            gradient = self._gradient(x, w * s, l, a)
            curvature = (1.0 - s * s) @ (w * lengths) if of_context is None else ((1.0 - s * s) * (w * lengths)).sum(-1)
            laplacian = curvature + self.features * a.squeeze(-1) + trace
            if not plan.hjb:
                return Rates(-gradient, -laplacian)
            residual = (self._rate(t, x, z, w * s) - 0.5 * gradient.square().sum(-1)).abs()
            return Rates(-gradient, -laplacian, residual)

        return motion

    def velocity(self, time: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        of_context = None if self.context is None else self.context(context)
        b, w, l, a = self._split(self.time(time_features(time)), of_context)
        return -self._gradient(x, w * _tanh(linear(x, self.ridges) + b), l, a)

    def _split(self, of_time: Tensor, of_context: Tensor | None) -> tuple[Tensor, ...]:
        return (of_time if of_context is None else of_time + of_context).split(self.sizes, -1)

    def _gradient(self, x: Tensor, weighted: Tensor, l: Tensor, a: Tensor) -> Tensor:
        return weighted @ self.ridges + linear(x, self.quadratic) @ self.quadratic + a * x + l

    def _rate(self, t: Tensor, x: Tensor, z: Tensor, weighted: Tensor) -> Tensor:
        """The potential's derivative in time, at a fixed point."""
        db, dw, dl, da = linear(time_features_rate(t), self.time.weight).split(self.sizes, -1)
        log_cosh = z + softplus(-2.0 * z) - math.log(2.0)
        return weighted @ db + log_cosh @ dw + x @ dl + 0.5 * da.squeeze(-1) * x.square().sum(-1)

    @torch.no_grad()
    def start_at_rest(self) -> None:
        width = self.sizes[0]
        self.quadratic.mul_(1e-4)
        for layer in self._outputs():
            layer.weight[width:] = 0.0
            layer.bias[width:] = 0.0


def _tanh(z: Tensor) -> Tensor:
    """The same as torch's, by the sigmoid, which is six times as fast."""
    return 2.0 * torch.sigmoid(2.0 * z) - 1.0


COSTS = ("transport", "kinetic", "jacobian", "hjb")


def path_costs(
    motion: Motion, t: Tensor, x: Tensor, costs: Sequence[str], noise: Tensor | None
) -> tuple[Rates, Tensor]:
    """The rates of a motion at points ``(*batch, D)`` and its costs there, shape ``(*batch, len(costs))``."""
    if "jacobian" in costs:
        rates, product = _with_product(motion, t, x, noise)
    else:
        rates, product = motion(t, x), x
    each: dict[str, Any] = {
        "transport": lambda: 0.5 * rates.velocity.square().sum(-1),
        "kinetic": lambda: rates.velocity.square().mean(-1),
        "jacobian": lambda: product.square().mean(-1),
        "hjb": lambda: rates.hjb,
    }
    return rates, torch.stack([each[name]() for name in costs], -1)


def _with_product(motion: Motion, t: Tensor, x: Tensor, noise: Tensor | None) -> tuple[Rates, Tensor]:
    """The rates and the vector-Jacobian product of the velocity with one probe."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        rates = motion(t, x)
        (product,) = torch.autograd.grad(rates.velocity, x, noise, create_graph=wanted, retain_graph=True)
    return rates, product
