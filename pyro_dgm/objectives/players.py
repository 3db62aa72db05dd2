"""What objectives of two players share that keep their classifier's optimiser themselves."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DECAY", "descend"]

DECAY = 0.99  # of the averages: a loss of two players cannot tell which state is best


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """One step; a loss that is not finite is left out. Returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    if loss.isfinite():
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())
