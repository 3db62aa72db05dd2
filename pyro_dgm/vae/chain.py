r"""Latents in layers: :math:`p(z_1, \dots, z_L \mid c) = \prod_l p(z_l \mid z_{<l}, c)`, as one family."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_dgm.core import DistributionModule, broadcast_cat

__all__ = ["Chain"]


class Chain(DistributionModule):
    r"""Families in a row, each conditional on the context and on all before it.

    A hierarchical VAE takes one as prior (top layer first) and one as posterior, in the same order of layers.

    Args:
        families: vectors; the l-th has ``context_features`` = those of the context + the lengths of all before it.
        context_features: length of the context of the chain.

    Raises:
        ValueError: for a family whose context has another length.

    Example:
        >>> import pyro_dgm as dgm
        >>> top = dgm.vae.StandardNormal(2)
        >>> chain = Chain(top, dgm.vae.Conditional(3, 2, dgm.vae.normal))
        >>> chain().rsample((4,)).shape
        torch.Size([4, 5])
    """

    def __init__(self, *families: DistributionModule, context_features: int = 0) -> None:
        super().__init__(sum(f.features for f in families), context_features)
        known = context_features
        for i, family in enumerate(families):
            if family.context_features != known:
                raise ValueError(
                    f"Chain: family {i} ({type(family).__name__}) takes {family.context_features} context features, "
                    f"expected {known}: {context_features} of the context and {known - context_features} of earlier layers."
                )
            known += family.features
        self.families = nn.ModuleList(families)

    def build(self, context: Tensor | None) -> Distribution:
        return _Chained(self, context, Size() if context is None else context.shape[:-1])


class _Chained(TorchDistribution):
    """The joint distribution of the layers."""

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(self, chain: Chain, context: Tensor | None, batch_shape: Size) -> None:
        self.chain, self.context = chain, context
        super().__init__(batch_shape, chain.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.real_vector

    def expand(self, batch_shape: Size, _instance: Any = None) -> _Chained:
        return _Chained(self.chain, self.context, Size(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        batch = Size(sample_shape) + self.batch_shape
        parts: list[Tensor] = []
        for family in self._families():
            conditional = self._given(family, parts)
            parts.append(conditional.expand(batch).rsample())
        return torch.cat(parts, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        parts = value.split([f.features for f in self._families()], -1)
        terms = [self._given(f, parts[:i]).log_prob(parts[i]) for i, f in enumerate(self._families())]
        return sum(terms[1:], terms[0])

    def _families(self) -> list[Any]:
        return list(self.chain.families)

    @staticmethod
    def _joined(parts: Any, context: Tensor | None) -> Tensor | None:
        return broadcast_cat(context, *parts) if parts or context is not None else None

    def _given(self, family: Any, parts: Any) -> Any:
        return family(self._joined(parts, self.context))
