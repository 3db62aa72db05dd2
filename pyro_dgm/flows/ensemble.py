r"""Several families as one, evenly mixed: networks that learned the same data from different starts.

.. math:: q(x \mid c) = \frac1K \sum_k q_k(x \mid c), \qquad
          D(c) = \frac1K \sum_k \mathrm{KL}\big(q_k(\cdot \mid c) \,\|\, q(\cdot \mid c)\big) \in [0, \log K]

Each is trained by itself: what one of them learned by heart the others did not. Their disagreement D, the mutual information of
a draw and the family that made it, is large where the data say too little about what q should be.

References:
    | Lakshminarayanan, Pritzel & Blundell (2017), "Simple and scalable predictive uncertainty estimation using deep
      ensembles", NeurIPS. Hermans et al. (2022), arXiv 2110.06581: ensembles of posteriors are less often overconfident.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_dgm.core import DistributionModule, LearnedDistribution
from pyro_dgm.core.kinds import shown
from pyro_dgm.flows.mixture_chain import MixtureChain

__all__ = ["Ensemble", "members_of"]

_SPLIT = 8  # draws for each member, from which they are split among the members instead of picked one by one


class Ensemble(DistributionModule):
    """The even mixture of families over the same event and context.

    Args:
        members: two or more families.

    Raises:
        TypeError: for members that are no families.
        ValueError: where their events or contexts differ.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> from pyro_dgm.flows import Ensemble, MixtureChain
        >>> q = Ensemble([MixtureChain(2, context_features=1) for _ in range(3)])(torch.zeros(5, 1))
        >>> q.sample((7,)).shape, q.log_prob(torch.zeros(5, 2)).shape
        (torch.Size([7, 5, 2]), torch.Size([5]))
    """

    def __init__(self, members: Sequence[DistributionModule]) -> None:
        if (
            not isinstance(members, list | tuple)
            or not members
            or not all(isinstance(m, DistributionModule) for m in members)
        ):
            raise TypeError(
                f"Ensemble: members are {shown(members)}, expected a list of families, as dgm.NSF makes them."
            )
        first = members[0]
        shapes = {(tuple(m.event_shape), m.context_features) for m in members}
        if len(shapes) > 1:
            raise ValueError(f"Ensemble: members have event shapes and context lengths {sorted(shapes)}, expected one.")
        super().__init__(first.event_shape, first.context_features)
        self.members = nn.ModuleList(members)

    def build(self, context: Tensor | None) -> Distribution:
        return EvenMixture([member(context) for member in self.members])

    def apart(self, context: Tensor, value: Tensor) -> Tensor:
        """The log density of values under each member, ``(K, *batch)``."""
        return torch.stack([member(context).log_prob(value) for member in members_of(self)])

    def disagreement(self, context: Tensor, value: Tensor) -> Tensor:
        """D's integrand at draws of the mixture, ``(*batch)``, in nats."""
        each = self.apart(context, value)
        mixed = each.logsumexp(0) - math.log(len(each))
        return (each.softmax(0) * (each - mixed)).sum(0)

    def takes_units(self) -> bool:
        return any(member.takes_units() for member in self.members)  # type: ignore[operator]

    def fit_events(self, x: Tensor) -> None:
        for member in members_of(self):
            member.fit_events(x)

    def forget_events(self) -> None:
        for member in members_of(self):
            member.forget_events()

    def regress(self, *rows: Any) -> None:
        """Start all members at the regression that a member starts at; others stay as they are."""
        for member in members_of(self):
            if isinstance(member, MixtureChain):
                member.regress(*rows)


def members_of(family: DistributionModule) -> list[Any]:
    """The families of an ensemble; of another family itself."""
    return list(family.members) if isinstance(family, Ensemble) else [family]


class EvenMixture(Distribution):
    """The even mixture of distributions of one shape, each entry of the batch by itself."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector

    def __init__(self, components: Sequence[LearnedDistribution]) -> None:
        self.components = components
        super().__init__(components[0].batch_shape, components[0].event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether all components have path gradients; which of them makes a draw depends on no parameter."""
        return all(c.has_rsample for c in self.components)

    def expand(self, batch_shape: Any, _instance: Any = None) -> EvenMixture:
        return EvenMixture([c.expand(batch_shape) for c in self.components])

    def log_prob(self, value: Tensor) -> Tensor:
        return self.each(value).logsumexp(0) - math.log(len(self.components))

    def each(self, value: Tensor) -> Tensor:
        """The log density under each component, ``(K, *shape)``."""
        return torch.stack([c.log_prob(value) for c in self.components])

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self._mixed(Size(sample_shape), "rsample")

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self._mixed(Size(sample_shape), "sample")

    def _mixed(self, shape: Size, how: str) -> Tensor:
        """Many draws are split among the components, in an order of its own for each entry of the batch."""
        n, count = shape.numel(), len(self.components)
        if n < _SPLIT * count:
            drawn = torch.stack([getattr(c, how)(shape) for c in self.components])
            chosen = torch.randint(count, drawn.shape[1 : drawn.dim() - len(self.event_shape)])
            return self._picked(drawn, chosen[None])[0]
        sizes = [n // count + (k < n % count) for k in torch.randperm(count).tolist()]
        drawn = torch.cat([getattr(c, how)((size,)) for c, size in zip(self.components, sizes, strict=True)])
        order = torch.rand(n, *self.batch_shape).argsort(0)
        return self._picked(drawn, order).reshape(shape + self.batch_shape + self.event_shape)

    def _picked(self, drawn: Tensor, index: Tensor) -> Tensor:
        """Entries along the first dimension, each whole event by one index."""
        index = index.to(drawn.device).reshape([*index.shape, *(1,) * len(self.event_shape)])
        return drawn.gather(0, index.expand(*index.shape[: drawn.dim() - len(self.event_shape)], *self.event_shape))
