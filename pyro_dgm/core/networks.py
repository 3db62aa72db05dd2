"""Networks that accept any number of leading batch dimensions, so that particles and plates vectorise."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pyro_dgm.core.upstream import zuko

__all__ = ["MLP"]


class MLP(nn.Sequential):
    r"""A multilayer perceptron on the last dimension: ``(*batch, in_features) -> (*batch, out_features)``.

    Smooth activations by default (SiLU), so that densities have the second derivatives which Hamiltonian samplers
    and Laplace approximations ask for.

    Example:
        >>> import torch
        >>> MLP(3, 2)(torch.zeros(7, 5, 3)).shape
        torch.Size([7, 5, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(*zuko.nn.MLP(in_features, out_features, hidden_features, activation=activation))
