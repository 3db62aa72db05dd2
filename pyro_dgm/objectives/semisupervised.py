r"""The bound of a VAE with partly known labels, together with its classifier's likelihood.

.. math:: J = \sum_\mathrm{labelled} \mathcal L(x, y) + \sum_\mathrm{others} \mathcal U(x)
          + \alpha \sum_\mathrm{labelled} \log q(y \mid x)

(Kingma et al. 2014, arXiv 1406.5298, eq. 9; the bound alone never shows the classifier a label.)
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn

__all__ = ["SemiSupervised"]


class SemiSupervised(nn.Module):
    r"""Loss of a :class:`~pyro_dgm.vae.SemiSupervisedVAE` on a batch ``(x, y)``, y = -1 where unknown, in nats.

    It trains on the bound and on ``weight`` times the classifier's log likelihood of the known labels, and reports minus
    the bound alone. The label is summed out by Pyro's ``TraceEnum_ELBO``.

    Args:
        vae: the pair with its classifier.
        weight: of the classifier's term. Kingma et al. took 0.1 rows / labels.
        num_particles: draws of the latent.

    Example:
        >>> import pyro_dgm as dgm
        >>> c = dgm.vae.Conditional
        >>> vae = dgm.vae.SemiSupervisedVAE(
        ...     dgm.vae.StandardNormal(2), c(5, 5, dgm.vae.bernoulli), c(2, 8, dgm.vae.normal),
        ...     c((), 5, dgm.vae.categorical(3)), classes=3,
        ... )
        >>> SemiSupervised(vae, weight=10.0)(torch.ones(4, 5), torch.tensor([0, 2, -1, -1])).shape
        torch.Size([])
    """

    def __init__(self, vae: Any, weight: float, num_particles: int = 1) -> None:
        super().__init__()
        self.vae, self.weight = vae, weight
        self.elbo = TraceEnum_ELBO(
            num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1
        )  # fmt: skip

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pair = (self.vae.model, self.vae.guide)
        if not torch.is_grad_enabled():  # where TraceEnum_ELBO's differentiable loss refuses to run
            return torch.tensor(self.elbo.loss(*pair, x, y))
        bound = self.elbo.differentiable_loss(*pair, x, y)
        added = self.weight * self.vae.classification(x, y)
        return bound + added - added.detach()
