"""What was not seen: draws of the missing entries given the seen ones, by importance resampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_dgm.core.random import seeded

__all__ = ["impute"]


@torch.no_grad()
def impute(
    vae: Any,
    x: Tensor,
    mask: Tensor,
    *,
    context: Tensor | None = None,
    num_samples: int = 1,
    proposals: int = 200,
    seed: int | None = None,
) -> Tensor:
    r"""Draws of :math:`p(x_\mathrm{missing} \mid x_\mathrm{seen})`, with the seen entries as they are.

    Latents are proposed by the encoder, weighted by :math:`p(x_\mathrm{seen}, z) / q(z \mid x_\mathrm{seen})` and
    resampled (Mattei & Frellsen 2019, arXiv 1812.02633, section 3); the decoder then draws the rest. The encoder must
    have been trained with masks, or the weights must repair what it does not know: use more proposals.

    Args:
        vae: a :class:`~pyro_dgm.VAE` whose posterior takes the mask.
        x: shape ``(N, *event)``; entries that were not seen may hold anything.
        mask: boolean, True where seen.
        context: as for the VAE.
        num_samples: draws per row.
        proposals: latents proposed per row.
        seed: makes it reproducible, and leaves the global random state as it was.

    Returns:
        Shape ``(num_samples, N, *event)``.

    Example:
        >>> import pyro_dgm as dgm
        >>> normal = dgm.vae.normal
        >>> vae = dgm.VAE(dgm.vae.StandardNormal(2), dgm.vae.Conditional(3, 2, normal), dgm.vae.Conditional(2, 6, normal))
        >>> x, mask = torch.ones(4, 3), torch.tensor([True, False, True]).expand(4, 3)
        >>> impute(vae, x, mask, num_samples=5)[..., 0].unique()
        tensor([1.])
    """
    with seeded(seed):
        z, log_q = vae.encode(x, context, mask).rsample_and_log_prob((proposals,))
        log_w = vae.log_joint(x, z, context, mask) - log_q
        chosen = torch.distributions.Categorical(logits=log_w.T).sample((num_samples,))
        drawn = vae.decode(z[chosen, torch.arange(len(x))], context).sample()
        return torch.where(mask, x.to(drawn.dtype), drawn)
