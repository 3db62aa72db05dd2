r"""Total correlation of the aggregated posterior, a term that asks latents to be independent of each other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TotalCorrelation"]


class TotalCorrelation(nn.Module):
    r"""Minibatch estimate of :math:`\mathrm{KL}\big(q(z)\,\|\,\prod_j q(z_j)\big)`, in nats, with :math:`q(z)` over all data.

    :math:`q(z) = \frac1N \sum_i q(z|x_i)` and its marginals are estimated by the mixture over the batch, in which the row
    that z was drawn from counts no more than its share of 1 in ``size``. The estimate
    is biased in small batches: read its gradient, not its value.

    Args:
        vae: a VAE with a diagonal posterior, ``vae.Conditional(..., vae.normal)``.
        size: rows of the whole data set.

    Raises:
        ValueError: for a posterior whose coordinates do not separate, or a batch of fewer than two rows.

    References:
        | Chen et al. (2018), "Isolating sources of disentanglement in VAEs", arXiv 1802.04942.

    Example:
        >>> import pyro_dgm as dgm
        >>> normal = dgm.vae.normal
        >>> vae = dgm.VAE(dgm.vae.StandardNormal(2), dgm.vae.Conditional(3, 2, normal), dgm.vae.Conditional(2, 3, normal))
        >>> TotalCorrelation(vae, size=100)(torch.randn(20, 3)).shape
        torch.Size([])
    """

    def __init__(self, vae: Any, size: int) -> None:
        super().__init__()
        self.vae, self.size = vae, size

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        n = len(x)
        if n < 2:
            raise ValueError("TotalCorrelation: a batch of one row has no aggregated posterior; use larger batches.")
        q = self.vae.encode(x, context, mask)
        z = q.rsample()
        pairs = _coordinates(q).log_prob(z[:, None])  # (draw, component, coordinate)
        log_n = _log_shares(n, self.size).to(z)
        joint = (pairs.sum(-1) + log_n).logsumexp(1)
        marginals = (pairs + log_n[..., None]).logsumexp(1).sum(-1)
        return (joint - marginals).mean()


def _log_shares(n: int, size: int) -> Tensor:
    """Log weights of the batch's components for each draw: 1/size for its own, the rest shared by the others."""
    others = math.log((size - 1.0) / size / (n - 1.0)) if size > 1 else -math.inf
    return torch.full((n, n), others).fill_diagonal_(-math.log(size))


def _coordinates(q: Any) -> Any:
    """The distributions of the single coordinates."""
    built = q._base()
    if not isinstance(built, torch.distributions.Independent) or built.reinterpreted_batch_ndims != 1:
        raise ValueError(
            f"TotalCorrelation: {q!r} does not separate into coordinates. Use a diagonal posterior, vae.Conditional(..., "
            "vae.normal), or LatentMMD."
        )
    return built.base_dist
