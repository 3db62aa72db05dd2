"""The map of a continuous flow as a transform: both directions first class, each with its log-determinant in one solve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

if TYPE_CHECKING:
    from pyro_dgm.cnf.families import ContinuousFlow

__all__ = ["FlowMap"]


class FlowMap(Transform):
    r"""From data at time 1 to the base at time 0, or (``sampling``) from the base to data.

    A draw's log-determinant is remembered for the base draw that was solved last, in the same grad mode.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, family: ContinuousFlow, context: Tensor | None, sampling: bool = False) -> None:
        super().__init__()
        self.family, self.context, self.sampling = family, context, sampling
        self._last: Any = None
        self._other: FlowMap | None = None

    def __repr__(self) -> str:
        return f"{type(self.family).__name__} map ({'base to data' if self.sampling else 'data to base'})"

    @property
    def inv(self) -> FlowMap:  # type: ignore[override]
        if self._other is None:
            self._other = FlowMap(self.family, self.context, not self.sampling)
        return self._other

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image of ``x``, shape ``(*batch, D)``, and the log-determinant there, shape ``(*batch,)``."""
        if not self.sampling:
            return self.family.solve(x, self.context)[:2]
        asked = (x._version, torch.is_grad_enabled(), self.family.version())
        if self._last is None or self._last[0] is not x or self._last[1] != asked:
            self._last = (x, asked, self.family.solve(x, self.context, sampling=True)[:2])
        return self._last[2]

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inv.call_and_ladj(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]
