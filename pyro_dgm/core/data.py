"""Data and its scale: standardisation as part of a model, integers made continuous, and rows that are no numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform

from pyro_dgm.core.shapes import as_tensor_like, refuse_non_finite

__all__ = ["Dequantize", "Standardize"]


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
        self._asked: tuple[Tensor, int, Tensor, int] | None = None
        self._answer = True

    @torch.no_grad()
    def fit(self, x: Tensor, floor: float = 0.0) -> Standardize:
        """Take mean and standard deviation over all but the last dimension of ``x``.

        With a ``floor`` no standard deviation is below this share of their root mean square: pixels that hardly ever
        change are not blown up.
        """
        x = as_tensor_like("Standardize", "data", x, self.loc)
        if x.shape[-1:] != self.loc.shape or x.numel() < 2 * len(self.loc):
            raise ValueError(f"Standardize: data has shape {tuple(x.shape)}, expected (N >= 2, {len(self.loc)}).")
        rows = x.reshape(-1, len(self.loc))
        refuse_non_finite("Standardize", rows)
        self.loc.copy_(rows.mean(0))
        sd = rows.std(0)
        sd = sd.clamp_min(floor * float(sd.square().mean().sqrt()))
        self.scale.copy_(torch.where(sd > 0, sd, torch.ones_like(sd)))
        return self

    @torch.no_grad()
    def forget(self) -> None:
        """Become the identity again."""
        self.loc.zero_()
        self.scale.fill_(1.0)

    def is_identity(self) -> bool:
        """Whether nothing was fitted; looked up in the buffers once per change of theirs."""
        loc, scale, asked = self.loc, self.scale, self._asked
        if (
            asked is None
            or asked[0] is not loc
            or asked[2] is not scale
            or asked[1::2] != (loc._version, scale._version)
        ):
            self._asked = (loc, loc._version, scale, scale._version)
            self._answer = bool((loc == 0).all() and (scale == 1).all())
        return self._answer

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.loc) / self.scale

    def transform(self) -> AffineTransform:
        """The map from standardised units to data, with its log-determinant."""
        return AffineTransform(self.loc, self.scale, event_dim=1)


class Dequantize(nn.Module):
    r"""Integers :math:`x \in \{0, \dots, K-1\}` as real numbers: :math:`y = (x + u) / K`, :math:`u \sim U(0, 1)`.

    A density on real numbers can grow without limit at integers, so it is trained on, and scored at, ``y``. Then
    :math:`\log \int q(x + u)\,du \ge \mathbb{E}_u[\log q_y(y)] - D \log K`: the right-hand side, ``log_prob + D *
    log_scale``, is a lower bound on the log probability of the integers (Theis et al. 2016, eq. 4).

    ``y`` stays strictly inside (0, 1): 255 + u rounds to 256 in float32 about once in 130,000 draws, and a logit is
    then infinite.

    Args:
        levels: K; 256 for 8-bit images.

    Raises:
        ValueError: for ``levels`` below 2, or data that are not integers from 0 to ``levels - 1``.

    Example:
        >>> d = Dequantize(4)
        >>> y = d(torch.tensor([0, 1, 3]))
        >>> d.inverse(y), bool((y > 0).all() and (y < 1).all())
        (tensor([0., 1., 3.]), True)
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"Dequantize: levels is {levels}, expected at least 2 (256 for 8-bit images).")
        self.levels = int(levels)

    @property
    def log_scale(self) -> float:
        """Log-derivative of y by x, for one number: -log K."""
        return -math.log(self.levels)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = as_tensor_like("Dequantize", "data", x, None)
        x = x if x.is_floating_point() else x.float()
        if not ((x >= 0) & (x < self.levels) & (x == x.floor())).all():
            raise ValueError(
                f"Dequantize: expected integers from 0 to {self.levels - 1}, got values from {float(x.min()):.4g} to "
                f"{float(x.max()):.4g}. Pass the raw levels: not divided by 255, and without noise."
            )
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
        eps = torch.finfo(x.dtype).eps
        return ((x + noise) / self.levels).clamp(eps, 1.0 - eps)

    def inverse(self, y: Tensor) -> Tensor:
        """The integers, as floats: ``floor(K y)``; values outside [0, 1) go to the nearest level."""
        return (y * self.levels).floor().clamp(0, self.levels - 1)
