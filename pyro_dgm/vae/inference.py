"""Inference for given rows by a trained VAE: a better posterior than the encoder's, and draws of entries that were not seen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution

from pyro_dgm.core import frozen
from pyro_dgm.core.devices import seeded
from pyro_dgm.core.kinds import Above, checked
from pyro_dgm.core.shapes import check_context
from pyro_dgm.train.descend import cosine, descend
from pyro_dgm.vae.conditional import Conditional, Encoded
from pyro_dgm.vae.latents import FullRank
from pyro_dgm.vae.model import VAE, as_data

__all__ = ["impute", "refine"]


@checked({}, lr=Above(0), max_steps=0, num_particles=1)
def refine(
    vae: VAE,
    x: Tensor,
    *,
    context: Tensor | None = None,
    mask: Tensor | None = None,
    max_steps: int = 100,
    lr: float = 0.02,
    num_particles: int = 8,
) -> Distribution:
    r"""The posterior of these rows with the encoder's output as free parameters, fitted to their ELBO.

    It removes the amortisation gap (Kim et al. 2018, arXiv 1802.02550; Cremer et al. 2018), not the gap of the family.
    The VAE is left as it was. Path gradients of ``num_particles`` draws, Adam with a cosine schedule.

    Args:
        vae: a :class:`~pyro_dgm.VAE` whose posterior is ``vae.Conditional``, ``vae.FullRank`` or ``vae.Encoded``.
        x: shape ``(N, *event)``; one datum is ``x[None]``.
        context, mask: as for the VAE.
        max_steps, lr, num_particles: of the fit.

    Returns:
        A distribution with batch shape ``(N,)``.

    Raises:
        TypeError: for a posterior without a network in front.

    Example:
        >>> import pyro_dgm as dgm
        >>> normal = dgm.vae.normal
        >>> vae = dgm.VAE(dgm.vae.StandardNormal(2), dgm.vae.Conditional(3, 2, normal), dgm.vae.Conditional(2, 3, normal))
        >>> refine(vae, torch.ones(1, 3), max_steps=5).batch_shape
        torch.Size([1])
    """
    family = vae.posterior
    if not isinstance(family, Conditional | FullRank | Encoded) or family.network is None:
        raise TypeError(
            f"refine: {type(family).__name__} has no network in front; use Conditional, FullRank or Encoded."
        )
    x, context, mask = as_data(family, vae.guide.event_shape, x, context, mask)
    x = x.detach()
    with torch.no_grad():
        output = family.network(check_context(family, vae.guide.inputs(x, context, mask)))
    output = output.clone().requires_grad_()

    def loss() -> Tensor:
        z = family.from_output(output).rsample((num_particles,))
        log_q = family.from_output(output.detach()).log_prob(z)
        return -(vae.log_joint(x, z, context, mask) - log_q).mean(0).sum()

    with frozen(*vae.parameters()):
        descend(torch.optim.Adam([output], lr), loss, max_steps, lambda step, progress: cosine(progress, 0.0))
        return family.from_output(output.detach())


@checked(num_samples=1, proposals=1)
@torch.no_grad()
def impute(
    vae: VAE,
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
        mask: boolean, True where seen, of the shape of ``x``; one row for all is ``mask.expand(x.shape)``.
        context: what the VAE was given beside ``x``, shape ``(N, C)``, complete; None for a VAE without one.
        num_samples: so many whole tables. One for a single filled table; some dozens where a result is computed on each of
            them, and their spread counted (multiple imputation).
        proposals: latents proposed per row, of which ``num_samples`` are picked by weight, with repeats.
        seed: makes it reproducible, and leaves the global random state as it was.

    Returns:
        Shape ``(num_samples, N, *event)``, in the units of ``x``. Each is a draw, with the noise of the likelihood;
        ``impute(...).mean(0)`` is the guess with the least squared error.

    Raises:
        ValueError: where ``x``, ``mask`` and ``context`` do not fit the VAE.

    Example:
        >>> import pyro_dgm as dgm
        >>> normal = dgm.vae.normal
        >>> vae = dgm.VAE(dgm.vae.StandardNormal(2), dgm.vae.Conditional(3, 2, normal), dgm.vae.Conditional(2, 6, normal))
        >>> x, mask = torch.ones(4, 3), torch.tensor([True, False, True]).expand(4, 3)
        >>> impute(vae, x, mask, num_samples=5)[..., 0].unique()
        tensor([1.])
    """
    x, context, seen = as_data(vae.posterior, vae.guide.event_shape, x, context, mask)
    mask = torch.ones_like(x, dtype=torch.bool) if seen is None else seen
    with seeded(seed):
        z, log_q = vae.encode(x, context, mask).rsample_and_log_prob((proposals,))
        log_w = vae.log_joint(x, z, context, mask) - log_q
        chosen = Categorical(logits=log_w.T).sample((num_samples,))
        drawn = vae.decode(z[chosen, torch.arange(len(x))], context).sample()
        return torch.where(mask, x.to(drawn.dtype), drawn)
