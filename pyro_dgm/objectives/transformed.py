"""An objective on data that are changed anew at each step: binarised, dequantised, augmented."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["Transformed"]


class Transformed(nn.Module):
    r"""``objective(transform(x), ...)``: the first argument is transformed at each call, the others go through.

    ``Transformed(bound, torch.bernoulli)`` is dynamic binarisation of grey levels in [0, 1].

    Example:
        >>> import torch
        >>> mean = Transformed(torch.nn.Identity(), torch.bernoulli)
        >>> bool(mean(torch.full((100,), 0.5)).unique().tolist() == [0.0, 1.0])
        True
    """

    def __init__(self, objective: nn.Module, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.objective, self.transform = objective, transform

    def forward(self, x: Tensor, *rest: Tensor | None) -> Tensor:
        return self.objective(self.transform(x), *rest)
