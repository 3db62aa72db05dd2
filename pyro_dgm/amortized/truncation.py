r"""Flows cut off at a box: :math:`q(u) = f(u)\,1[u \in B] / Z,\ Z = \int_B f`, with Z by Monte Carlo and bounded rejection.

For families that do not keep the box themselves, as the default one does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_dgm.core.warn import warn_user

__all__ = ["Truncated", "acceptance"]

_ROUNDS = 50  # of rejection, each with all draws still missing
_MASS_DRAWS, _MASS_ROWS = 20_000, 400_000  # for one data set; for many at once fewer each
_AT_ONCE = 50_000  # draws in memory


@torch.no_grad()
def acceptance(q: Any, box: Any) -> tuple[Tensor, Tensor]:
    """Share of a flow's mass in the box, and its standard error, shapes ``q.batch_shape``; never below half a draw.

    The error of ``log_prob`` is the second divided by the first.
    """
    rows = max(1, q.batch_shape.numel())
    n = max(100, min(_MASS_DRAWS, _MASS_ROWS // rows))
    at_once = max(1, _AT_ONCE // rows)
    hits: Any = sum(box.inside(q.sample(Size([min(at_once, n - i)]))).double().sum(0) for i in range(0, n, at_once))
    share = (hits / n).clamp_min(0.5 / n)
    return share, (share * (1.0 - share) / n).sqrt()


class Truncated(TorchDistribution):
    """A flow cut off at a box and normalised; its draws come by rejection, so they have no path gradient.

    Args:
        q: the flow's distribution over vectors.
        box: has ``inside(u)`` and ``clamp(u)``.
        mass: share of the flow in the box; None for estimating it when a density is asked.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False
    support = constraints.real_vector

    def __init__(self, q: Any, box: Any, mass: Tensor | None = None) -> None:
        self.q, self.box, self.mass = q, box, mass
        super().__init__(q.batch_shape, q.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Truncated:
        return Truncated(self.q.expand(Size(batch_shape)), self.box, self._mass())

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = self.q.log_prob(value) - self._mass().log().to(value)
        return torch.where(self.box.inside(value), log_prob, -torch.inf)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws in the box, by at most 50 rounds of rejection; with a warning where that was not enough."""
        shape = Size(sample_shape)
        if self.q.batch_shape.numel() == 1:
            u, bad = self._of_one(shape.numel())
            u, bad = u.reshape(shape + self.q.batch_shape + self.event_shape), bad.reshape(shape + self.q.batch_shape)
        else:
            u, bad = self._of_many(shape)
        if not bad.any():
            return u
        warn_user(
            f"AmortizedGuide: {int(bad.sum())} of {bad.numel()} draws were still outside the prior's box after {_ROUNDS} "
            "rounds, and were moved to its edge. The data lie outside what was simulated, or the guide is not trained."
        )
        return torch.where(bad.unsqueeze(-1), self.box.clamp(u), u)

    def _of_one(self, n: int) -> tuple[Tensor, Tensor]:
        """``(n, D)`` draws of one flow, and which are outside; each round draws what will hold the missing ones, likely."""
        u = self.q.sample(Size([n])).reshape(n, -1)
        bad = ~self.box.inside(u)
        share = max(1.0 - float(bad.double().mean()), 0.05) if n else 1.0
        for _ in range(_ROUNDS):
            missing = int(bad.sum())
            if not missing:
                break
            spare = 3.0 * math.sqrt(missing * (1.0 - share))  # three standard deviations of how many fall inside
            again = self.q.sample(Size([int((missing + spare) / share) + 8])).reshape(-1, u.shape[-1])
            again = again[self.box.inside(again)][:missing]
            at = bad.nonzero()[: len(again), 0]
            u[at], bad[at] = again, False
        return u, bad

    def _of_many(self, shape: Size) -> tuple[Tensor, Tensor]:
        """Draws of many flows, and which are outside; in each round a flow's draws inside fill its missing ones, in order."""
        n, batch = shape.numel(), self.q.batch_shape
        u = self.q.sample(Size([n]))
        bad = ~self.box.inside(u)
        for _ in range(_ROUNDS):
            if not bad.any():
                break
            again = self.q.sample(Size([n]))
            good = self.box.inside(again)
            slots, found = _first(bad), _first(good)
            filled = torch.arange(n).reshape(-1, *(1,) * len(batch)) < torch.minimum(bad.sum(0), good.sum(0))
            new = torch.where(filled.unsqueeze(-1), _rows(again, found), _rows(u, slots))
            u = u.scatter(0, slots.unsqueeze(-1).expand_as(u), new)
            bad = bad & ~torch.zeros_like(bad).scatter(0, slots, filled)
        return u.reshape(shape + batch + self.event_shape), bad.reshape(shape + batch)

    def _mass(self) -> Tensor:
        if self.mass is None:
            self.mass = acceptance(self.q, self.box)[0]
        return self.mass


def _rows(u: Tensor, index: Tensor) -> Tensor:
    return u.gather(0, index.unsqueeze(-1).expand_as(u))


def _first(which: Tensor) -> Tensor:
    """An order of the rows of each column in which those that are True come first."""
    return which.long().argsort(stable=True, dim=0, descending=True)
