r"""What a group of latents sees of the data: embeddings of each observed site, pooled over the plates that the group lacks.

A latent outside a plate must not depend on the order of the plate's data, and must take any number of them: its context is
:math:`\rho\big(\frac1n \sum_i \phi(x_i), \log n\big)` (Zaheer et al. 2017, "Deep sets", theorem 2), with two layers of
such means, so that each datum is seen beside the others. A latent inside a plate sees its own datum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_dgm.core import Standardize
from pyro_dgm.core.networks import MLP, broadcast_cat

__all__ = ["SetEncoder", "StandardData", "pooled"]


class StandardData(nn.Module):
    """Data in units of their simulations; what is missing is zero.

    Args:
        features: numbers in one datum.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.standard = Standardize(features)

    def fit(self, x: Tensor, mask: Tensor | None) -> None:
        """Take mean and standard deviation of what is present."""
        self.standard.fit(x.reshape(-1, x.shape[-1]) if mask is None else x[mask.expand(x.shape[:-1])])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        u = self.standard(x.to(self.standard.loc))
        return u if mask is None else torch.where(mask.unsqueeze(-1), u, torch.zeros_like(u))


class SetEncoder(nn.Module):
    """Elements ``(*batch, F)`` pooled over chosen batch dimensions (which become 1): ``(*batch, out_features)``.

    Args:
        in_features: F.
        out_features: length of the summary.
        hidden_features: width of the networks on single elements.
    """

    def __init__(self, in_features: int, out_features: int = 32, hidden_features: int = 64) -> None:
        super().__init__()
        h = hidden_features
        self.first = MLP(in_features, h, (h,))
        self.second = MLP(2 * h + 1, h, (h,))
        self.last = MLP(h + 1, out_features, (h,))

    def forward(self, x: Tensor, dims: list[int], mask: Tensor | None = None) -> Tensor:
        """``dims`` are negative dimensions of the batch; ``mask`` has the batch's shape, True where there is a datum."""
        elements = self.first(x)
        mean, log_n = pooled(elements, dims, mask)
        elements = self.second(torch.cat([elements, broadcast_cat(mean, log_n).expand(*elements.shape[:-1], -1)], -1))
        return self.last(broadcast_cat(*pooled(elements, dims, mask)))


def pooled(x: Tensor, dims: list[int], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean over batch dimensions, kept as 1, of what is present; and the log of one plus how many there are.

    >>> mean, log_n = pooled(torch.tensor([[1.0], [3.0], [9.0]]), [-1], torch.tensor([True, True, False]))
    >>> mean, bool(log_n.exp().round() == 3)
    (tensor([[2.]]), True)
    """
    axes = [d - 1 for d in dims]
    present = x.new_ones(x.shape[:-1]) if mask is None else mask.to(x).expand(x.shape[:-1])
    count = present.unsqueeze(-1).sum(axes, keepdim=True)
    mean = (x * present.unsqueeze(-1)).sum(axes, keepdim=True) / count.clamp_min(1.0)
    return mean, torch.log1p(count)
