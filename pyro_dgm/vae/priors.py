"""Priors over a latent vector. Any unconditional flow is one too; a family with a context makes the VAE conditional."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal

from pyro_dgm.core import DistributionModule

__all__ = ["Mixture", "StandardNormal", "VampPrior"]


class StandardNormal(DistributionModule):
    r""":math:`N(0, I)` over ``features`` dimensions, without parameters.

    >>> StandardNormal(3)().log_prob(torch.zeros(3)).shape
    torch.Size([])
    """

    zero: Tensor
    one: Tensor

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("zero", torch.zeros(self.event_shape))
        self.register_buffer("one", torch.ones(self.event_shape))

    def build(self, context: Tensor | None) -> Distribution:
        return Independent(Normal(self.zero, self.one), len(self.event_shape))


class Mixture(DistributionModule):
    r"""Learned mixture of diagonal Gaussians, :math:`p(z) = \sum_k w_k N(z; \mu_k, \sigma_k^2)`.

    Its draws carry no gradient, which a prior does not need.

    Args:
        features: length of the latent.
        components: number of Gaussians.

    Example:
        >>> Mixture(2, 5)().sample((7,)).shape
        torch.Size([7, 2])
    """

    def __init__(self, features: int, components: int = 10) -> None:
        super().__init__(features)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, features))
        self.log_scale = nn.Parameter(torch.zeros(components, features))

    def build(self, context: Tensor | None) -> Distribution:
        parts = Independent(Normal(self.loc, self.log_scale.exp()), 1)
        return dist.MixtureSameFamily(Categorical(logits=self.logits), parts)


class VampPrior(DistributionModule):
    r"""The mixture of the posteriors of learned pseudo-data, :math:`p(z) = \sum_k w_k\, q(z \mid u_k)`.

    It shares the posterior's parameters. Start the pseudo-data at rows of the training set.

    Args:
        posterior: the VAE's own posterior family.
        pseudo_inputs: shape ``(K, posterior.context_features)``, in the encoder's units.

    Raises:
        ValueError: for pseudo-inputs that the posterior cannot take.

    References:
        | Tomczak & Welling (2018), "VAE with a VampPrior", arXiv 1705.07120, eq. 9.

    Example:
        >>> import pyro_dgm as dgm
        >>> q = dgm.vae.Conditional(2, 5, dgm.vae.normal)
        >>> VampPrior(q, torch.rand(10, 5))().log_prob(torch.zeros(4, 2)).shape
        torch.Size([4])
    """

    def __init__(self, posterior: DistributionModule, pseudo_inputs: Tensor) -> None:
        super().__init__(posterior.event_shape)
        if pseudo_inputs.dim() != 2 or pseudo_inputs.shape[-1] != posterior.context_features:
            raise ValueError(
                f"VampPrior: pseudo_inputs have shape {tuple(pseudo_inputs.shape)}, expected (K, "
                f"{posterior.context_features}), such as {10} flat rows of the data."
            )
        self.posterior = posterior
        self.inputs = nn.Parameter(pseudo_inputs.detach().clone())
        self.logits = nn.Parameter(torch.zeros(len(pseudo_inputs)))

    def build(self, context: Tensor | None) -> Distribution:
        parts: Any = self.posterior(self.inputs)
        return MixtureSameFamily(Categorical(logits=self.logits), parts)
