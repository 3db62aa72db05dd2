r"""A gradient field :math:`v = -\nabla\Phi`, with divergence and Hamilton-Jacobi residual in closed form.

.. math:: \Phi(t, x; c) = w^\top \log\cosh(Kx + b) + \tfrac12 a |x|^2 + \tfrac12 |A x|^2 + l^\top x,

with :math:`w, b, a, l` functions of time and context. With :math:`s = \tanh(Kx + b)`:
:math:`\nabla\Phi = K^\top(w \odot s) + a x + A^\top A x + l` and
:math:`\Delta\Phi = \sum_j w_j (1 - s_j^2) |K_j|^2 + D a + |A|_F^2`. Along optimal paths
:math:`\partial_t\Phi = \frac12 |\nabla\Phi|^2` (Onken et al. 2021, arXiv 2006.00104, eqs. 6-8; Ruthotto & Haber 2021,
section 3.2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from pyro_dgm.cnf.field import (
    FREQUENCIES,
    NOTHING_KNOWN,
    Motion,
    Plan,
    Rates,
    VectorField,
    at_times,
    time_features,
    time_features_rate,
)
from pyro_dgm.core import MLP

__all__ = ["PotentialField"]


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
