"""Data and its scale: standardisation as part of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform

__all__ = ["Standardize"]


class Standardize(nn.Module):
    r"""The map :math:`x = \mu + \sigma u` from standardised units :math:`u` to the data's, as buffers.

    It starts as the identity; :meth:`fit` sets :math:`\mu` and :math:`\sigma` from data. It is saved with the
    ``state_dict`` and never trained. A constant column gets :math:`\sigma = 1`.

    Args:
        features: length D of the last dimension.

    Example:
        >>> s = Standardize(2).fit(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
        >>> s(torch.tensor([[0.0, 5.0]]))
        tensor([[-0.7071,  0.0000]])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self._known = ((self.loc._version, self.scale._version), True)

    @torch.no_grad()
    def fit(self, x: Tensor) -> Standardize:
        """Take mean and standard deviation over all but the last dimension of ``x``."""
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[-1] != len(self.loc) or len(rows) < 2:
            raise ValueError(f"Standardize: data has shape {tuple(x.shape)}, expected (N >= 2, {len(self.loc)}).")
        if not rows.isfinite().all():
            raise ValueError(f"Standardize: {int((~rows.isfinite()).any(-1).sum())} rows hold NaN or infinity.")
        self.loc.copy_(rows.mean(0))
        sd = rows.std(0)
        self.scale.copy_(torch.where(sd > 0, sd, torch.ones_like(sd)))
        return self

    def is_identity(self) -> bool:
        """Whether nothing was fitted; asked of the buffers once per change of theirs."""
        version = (self.loc._version, self.scale._version)
        if self._known[0] != version:
            self._known = (version, bool((self.loc == 0).all() and (self.scale == 1).all()))
        return self._known[1]

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.loc) / self.scale

    def transform(self) -> AffineTransform:
        """The map from standardised units to data, with its log-determinant."""
        return AffineTransform(self.loc, self.scale, event_dim=1)
