r"""The family behind :class:`AutoFlow`: a flow in whitened coordinates.

.. math:: \theta = \mu + L\,(a + e^{s} \odot f_\phi(z)), \qquad z \sim p(z),

with :math:`\mu, L` fixed (the start) and :math:`a, s, \phi` trained. At the start :math:`a = s = 0` and :math:`f` is the
identity, so :math:`q = N(\mu, LL^\top)`.
"""

from __future__ import annotations

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from pyro_dgm.core import DistributionModule, compose

__all__ = ["WhitenedPosterior"]


class Whitening(Transform):
    r"""The map :math:`u \mapsto \mu + L (a + e^{s} \odot u)` with lower-triangular L."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, scale_tril: Tensor, shift: Tensor, log_scale: Tensor) -> None:
        super().__init__()
        self.loc, self.scale_tril, self.shift, self.log_scale = loc, scale_tril, shift, log_scale

    def _call(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.addcmul(self.shift, self.log_scale.exp(), x), self.scale_tril, self.loc)

    def _inverse(self, y: Tensor) -> Tensor:
        rows = (y - self.loc).reshape(-1, y.shape[-1])
        white = torch.linalg.solve_triangular(self.scale_tril.mT, rows, upper=True, left=False).reshape(y.shape)
        return (white - self.shift) * torch.exp(-self.log_scale)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.scale_tril.diagonal().log() + self.log_scale).sum().expand(x.shape[:-1])


class WhitenedPosterior(DistributionModule):
    """A family over :math:`R^D` seen through a fixed whitening and a trained elementwise affine map.

    Args:
        family: any family over vectors of length D.
        loc: the centre, shape ``(D,)``.
        scale: the standard deviation at the start, in each dimension.
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, family: DistributionModule, loc: Tensor, scale: float) -> None:
        super().__init__(len(loc))
        self.rate = family.soften()
        self.family = family.to(loc)
        self.affine = nn.Parameter(loc.new_zeros(2, len(loc)))  # rows: shift, log scale
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale_tril", scale * torch.eye(len(loc)).to(loc))

    @torch.no_grad()
    def whiten(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set the whitening: q becomes :math:`N(loc, LL^T)` as long as the flow is the identity."""
        self.loc.copy_(loc), self.scale_tril.copy_(scale_tril)

    def peak_rate(self) -> float | None:
        """The learning rate of all its parameters, from a start that whitens well."""
        return self.rate

    def buffer_version(self) -> int:
        """A number that grows when the whitening is set."""
        return self.loc._version + self.scale_tril._version

    def build(self, context: Tensor | None) -> Distribution:
        return self.family.build(context)

    def checked_build(self, context: Tensor | None) -> Distribution:
        return self.family.checked_build(context)

    def bijection(self, built: Distribution) -> Transform:
        inner = self.family.bijection(built)
        whitening = Whitening(self.loc, self.scale_tril, *self.affine.unbind())
        return whitening if inner is None else compose([inner, whitening])

    def support_of(self, built: Distribution) -> constraints.Constraint:
        return constraints.real_vector

    @property
    def unconstrained_shape(self) -> Size:
        return self.event_shape
