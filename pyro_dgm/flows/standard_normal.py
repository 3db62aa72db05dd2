"""The base of the named flows: a standard normal without the arithmetic of a location and a scale."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from pyro_dgm.core import zuko

__all__ = ["StandardNormalBase", "standard_normal"]


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
