r"""The default flow of an amortised posterior: a conditional Gaussian, bent by splines.

.. math:: u = A c + b + r \odot \big(m_\phi(c) + e^{s_\phi(c)} \odot f_\phi(z; c)\big), \qquad z \sim N(0, I)

:math:`A, b, r` come from a ridge regression on the simulations, so that a linear Gaussian posterior is there from the
start; :math:`m, s` let place and width follow the data without bending the splines, which see standardised residuals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from pyro_dgm.core import DistributionModule, zuko
from pyro_dgm.core.networks import MLP
from pyro_dgm.flows import NSF

__all__ = ["ResidualSpline"]

_SOFT_BOUND = 3.0  # on |log scale|, beside the regression's


class ResidualSpline(DistributionModule):
    """Splines around a conditional Gaussian whose start is a linear regression.

    Args:
        features: D.
        context_features: length of the context.
        transforms: spline layers; None for 5, or 1 in one dimension.
        hidden_features: of the splines' conditioners and of the network of place and width.
    """

    residual: Tensor

    def __init__(
        self,
        features: int,
        context_features: int,
        *,
        transforms: int | None = None,
        hidden_features: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__(features, context_features)
        layers = (5 if features > 1 else 1) if transforms is None else transforms
        self.spline = NSF(features, context_features, transforms=layers, hidden_features=hidden_features)
        self.spline.start_at_identity()
        self.affine = MLP(context_features, 2 * features, hidden_features)
        self.linear = nn.Linear(context_features, features)
        self.register_buffer("residual", torch.ones(features))
        with torch.no_grad():
            for tensor in (*self.affine[-1].parameters(), *self.linear.parameters()):
                tensor.zero_()

    def build(self, context: Tensor | None) -> Distribution:
        spline: Any = self.spline.build(context)
        to_base = zuko.transforms.ComposedTransform(self._residuals(context), spline.transform)
        return zuko.distributions.NormalizingFlow(to_base, spline.base)

    def _residuals(self, context: Any) -> Residuals:
        shift, raw = self.affine(context).chunk(2, -1)
        log_scale = self.residual.log() + raw / (1.0 + raw.abs() / _SOFT_BOUND)
        return Residuals(torch.addcmul(self.linear(context), self.residual, shift), log_scale)

    @torch.no_grad()
    def regress(self, context: Tensor, u: Tensor, ridge: float = 1e-3) -> None:
        """Start at the linear Gaussian that fits rows ``(N, C)`` and ``(N, D)``."""
        rows = torch.cat([context, torch.ones_like(context[:, :1])], -1).double()
        gram = rows.mT @ rows / len(rows) + ridge * torch.eye(rows.shape[-1], dtype=rows.dtype)
        weights = torch.linalg.solve(gram, rows.mT @ u.double() / len(rows))
        self.linear.weight.copy_(weights[:-1].mT), self.linear.bias.copy_(weights[-1])
        self.residual.copy_((u - self.linear(context)).std(0).clamp_min(1e-3))


class Residuals(Transform):
    r"""The map :math:`u \mapsto (u - \mu)\, e^{-s}`, one place and scale per context."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, log_scale: Tensor) -> None:
        super().__init__()
        self.loc, self.log_scale = loc, log_scale

    def _call(self, x: Tensor) -> Tensor:
        return (x - self.loc) * torch.exp(-self.log_scale)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.addcmul(self.loc, self.log_scale.exp(), y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.log_scale.sum(-1).expand(x.shape[:-1])
