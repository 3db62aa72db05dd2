"""Posteriors beyond the diagonal Gaussian ``Conditional(latent, data, normal)``; flows come by ``Encoded``."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_dgm.core import MLP, DistributionModule

__all__ = ["FullRank"]


class FullRank(DistributionModule):
    r"""A Gaussian with all its covariances, :math:`q(z \mid x) = N(\mu(x), L(x) L(x)^\top)`.

    The network gives D + D (D + 1) / 2 numbers; use it up to some tens of dimensions.

    Args:
        features: length D of the latent.
        context_features: length of the encoder's input.
        network: ``(*batch, context_features) -> (*batch, D + D (D + 1) / 2)``; None for an MLP.
        hidden_features, activation: of that MLP.

    Example:
        >>> FullRank(3, 5)(torch.zeros(7, 5)).rsample().shape
        torch.Size([7, 3])
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        *,
        network: nn.Module | None = None,
        hidden_features: Sequence[int] = (400,),
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(features, context_features)
        numbers = features + features * (features + 1) // 2
        self.network = network or MLP(context_features, numbers, hidden_features, activation)

    def build(self, context: Tensor | None) -> Distribution:
        return self.from_output(self.network(context))

    def from_output(self, output: Tensor) -> Distribution:
        """The Gaussian for an output of the network."""
        d = self.features
        loc, entries = output[..., :d], output[..., d:]
        rows, cols = torch.tril_indices(d, d, device=output.device)
        lower = output.new_zeros(*output.shape[:-1], d, d)
        lower[..., rows, cols] = torch.where(rows == cols, entries.clamp(max=20.0).exp(), entries)
        return dist.MultivariateNormal(loc, scale_tril=lower)
