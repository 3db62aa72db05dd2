"""Any lazy zuko flow as a family."""

from __future__ import annotations

from collections.abc import Iterable

from torch.distributions import constraints

from pyro_dgm.core import zuko
from pyro_dgm.flows.base import NormalizingFlow, features_of
from pyro_dgm.flows.sequential import sequential

__all__ = ["ZukoFlow"]


class ZukoFlow(NormalizingFlow):
    r"""Any lazy zuko flow or mixture as a Pyro family: NICE, MAF, NSF, NCSF, SOSPF, BPF, NAF, UNAF, GF, CNF, GMM.

    The number of features and of context features is found from the flow. NCSF lives on :math:`[-\pi, \pi]` and says
    so by its support; a GMM has no reparameterised draws (``has_rsample`` is False).

    Args:
        zuko_flow: a lazy flow, ``zuko_flow(context) -> distribution``.
        event_shape: the shape to give its vector; None keeps the vector.
        support: constraint of the event, through ``biject_to``, for flows over all of :math:`\mathbb{R}^D`.

    Raises:
        TypeError: for anything but a lazy zuko flow.
        ValueError: if the flow's features do not fill ``event_shape``.

    Note:
        BPF, SOSPF, NAF, UNAF and GF invert by bisection on ``[-10, 10]`` in the flow's units, to about 1e-6:
        standardise the data. Their draws carry gradients, at the price of that bisection.

    Example:
        >>> import torch, zuko, pyro_dgm as dgm
        >>> flow = dgm.ZukoFlow(zuko.flows.BPF(6, context=2), event_shape=(2, 3))
        >>> flow.context_features, flow(torch.zeros(2)).sample().shape
        (2, torch.Size([2, 3]))
    """

    def __init__(
        self,
        zuko_flow: zuko.lazy.LazyDistribution,
        event_shape: int | Iterable[int] | None = None,
        *,
        support: constraints.Constraint | None = None,
    ) -> None:
        if not isinstance(zuko_flow, zuko.lazy.LazyDistribution):
            raise TypeError(f"ZukoFlow: expected a lazy zuko flow such as zuko.flows.BPF(3), got {type(zuko_flow)}.")
        shape, context_features = features_of(zuko_flow)
        super().__init__(shape if event_shape is None else event_shape, context_features, support=support)
        if self.features != shape.numel():
            raise ValueError(
                f"ZukoFlow: {type(zuko_flow).__name__} has {shape.numel()} features, but event_shape "
                f"{tuple(self.event_shape)} with support {support} needs {self.features}."
            )
        self.flow = sequential(zuko_flow)
