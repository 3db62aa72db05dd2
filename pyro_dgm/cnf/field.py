r"""Vector fields :math:`v(t, x; c)` with their divergence, and sums of them.

A continuous flow moves a point by :math:`\dot x = v(t, x; c)`; its log density changes by
:math:`\frac{d}{dt} \log p(x(t)) = -\nabla \cdot v` (Chen et al. 2018, theorem 1).

What a path costs, integrated with the path itself.

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

from pyro_dgm.core.upstream import PyroABCMeta

__all__ = [
    "COSTS",
    "Motion",
    "NOTHING_KNOWN",
    "Plan",
    "Rates",
    "SumField",
    "VectorField",
    "at_times",
    "path_costs",
    "time_features",
    "time_features_rate",
]

FREQUENCIES = 3


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
        self.features, self.context_features = features, context_features

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


class SumField(VectorField):
    """The sum of fields over the same points; its divergence is the sum of theirs.

    Args:
        fields: at least one field, all with the same features.

    Raises:
        ValueError: if they differ in their features.
    """

    fields: Any

    def __init__(self, *fields: VectorField) -> None:
        if len({(f.features, f.context_features) for f in fields}) != 1:
            raise ValueError(
                "SumField: expected one or more fields over the same points, got (features, context_features) "
                f"{[(f.features, f.context_features) for f in fields]}. Build them with the same sizes."
            )
        super().__init__(fields[0].features, fields[0].context_features)
        self.fields = nn.ModuleList(fields)

    def bind(self, context: Tensor | None, plan: Plan = NOTHING_KNOWN) -> Motion:
        motions = [f.bind(context, plan) for f in self.fields]

        def motion(t: Tensor, x: Tensor) -> Rates:
            rates = [m(t, x) for m in motions]
            return Rates(sum(r.velocity for r in rates), sum(r.divergence for r in rates))

        return motion

    def velocity(self, time: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        return sum(f.velocity(time, x, context) for f in self.fields)

    def start_at_rest(self) -> None:
        for field in self.fields:
            field.start_at_rest()

    def probe(self, x: Tensor) -> Tensor | None:
        probes = [p for p in (f.probe(x) for f in self.fields) if p is not None]
        return probes[0] if probes else None


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
        known = dict(zip((round(t, 5) for t in times.tolist()), stages(times), strict=True))

    def stage(t: Tensor) -> T:
        found = known.get(round(float(t), 5)) if known else None
        return stages(t[None])[0] if found is None else found

    return stage


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
