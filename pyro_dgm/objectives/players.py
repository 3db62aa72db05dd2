"""What objectives of two players share that keep their classifier's optimiser themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Averages", "descend"]


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """One step; a loss that is not finite is left out. Returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    if loss.isfinite():
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


class Averages:
    """Running averages of parameters. The loss of a player cannot tell which of its states is best; the average is good.

    >>> w = torch.nn.Parameter(torch.tensor(1.0))
    >>> averages = Averages(share=0.5)
    >>> averages.follow([w])
    >>> with torch.no_grad():
    ...     _ = w.fill_(3.0)
    >>> averages.follow([w])
    >>> averages.give([w])
    >>> w.item()
    2.0
    """

    def __init__(self, share: float = 0.01) -> None:
        self.share, self.means = share, list[Tensor]()

    @torch.no_grad()
    def follow(self, parameters: Iterable[Tensor]) -> None:
        """Move towards the parameters by ``share``; the first call takes them as they are."""
        now = list(parameters)
        if len(self.means) != len(now):
            self.means = [p.detach().clone() for p in now]
        for mean, p in zip(self.means, now, strict=True):
            mean.lerp_(p, self.share)

    @torch.no_grad()
    def give(self, parameters: Iterable[Tensor]) -> None:
        """Set the parameters to their averages; nothing happens before the first :meth:`follow`."""
        for mean, p in zip(self.means, parameters, strict=False):
            p.copy_(mean)

    def state(self) -> list[Any]:
        """For a checkpoint."""
        return self.means

    def load(self, means: list[Tensor]) -> None:
        """From a checkpoint."""
        self.means = [mean.clone() for mean in means]
