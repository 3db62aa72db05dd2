r"""Maximum mean discrepancy between the aggregated posterior and the prior (InfoVAE, Wasserstein autoencoder)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LatentMMD"]


class LatentMMD(nn.Module):
    r"""Unbiased estimate of :math:`\mathrm{MMD}^2` between draws of :math:`q(z)` and of the prior, one per row of the batch.

    The kernel is the sum of inverse multiquadrics :math:`C / (C + \|z - z'\|^2)` over scales C around :math:`2 D`. It is
    negative now and then: the expectation is zero where the two agree.

    Args:
        vae: a VAE; any prior and posterior that can be sampled will do.

    Raises:
        ValueError: for a batch of fewer than two rows.

    References:
        | Zhao, Song & Ermon (2019), "InfoVAE", arXiv 1706.02262.
        | Tolstikhin et al. (2018), "Wasserstein auto-encoders", arXiv 1711.01558, algorithm 2.

    Example:
        >>> import pyro_dgm as dgm
        >>> normal = dgm.vae.normal
        >>> vae = dgm.VAE(dgm.vae.StandardNormal(2), dgm.vae.Conditional(3, 2, normal), dgm.vae.Conditional(2, 3, normal))
        >>> LatentMMD(vae)(torch.randn(20, 3)).shape
        torch.Size([])
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if len(x) < 2:
            raise ValueError("LatentMMD: a batch of one row has no spread; use larger batches.")
        z = self.vae.encode(x, context, mask).rsample().flatten(1)
        prior: Any = self.vae.prior(context if self.vae.prior.context_features else None)
        other = prior.expand([len(x)]).sample().flatten(1)
        return _unbiased(z, z) + _unbiased(other, other) - 2.0 * _kernel(z, other).mean()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    distance = (a[:, None] - b[None]).square().sum(-1)
    scales = [2.0 * a.shape[-1] * s for s in (0.1, 0.5, 1.0, 2.0, 10.0)]
    return torch.stack([c / (c + distance) for c in scales]).sum(0)


def _unbiased(a: Tensor, b: Tensor) -> Tensor:
    """Mean of the kernel over pairs of different rows."""
    k, n = _kernel(a, b), len(a)
    return (k.sum() - k.diagonal().sum()) / (n * (n - 1))
