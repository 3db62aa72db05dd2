"""A bound with further terms: trained on the sum, reported by the bound alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Penalised"]


class Penalised(nn.Module):
    r"""``objective + sum(weight * term)``, whose value is the objective's and whose gradient is the sum's.

    Each term is called with the same arguments as the objective and returns a scalar: :class:`TotalCorrelation`,
    :class:`LatentMMD`, or a module of your own.

    Args:
        objective: the bound that is reported.
        terms: pairs of a weight and a module.

    Example:
        >>> square = type("Square", (nn.Module,), {"forward": lambda self, x: x.square().sum()})()
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> loss = Penalised(square, (10.0, square))(x)
        >>> loss.item(), torch.autograd.grad(loss, x)[0].item()
        (9.0, 66.0)
    """

    def __init__(self, objective: nn.Module, *terms: tuple[float, nn.Module]) -> None:
        super().__init__()
        self.objective = objective
        self.weights = [float(weight) for weight, _ in terms]
        self.terms = nn.ModuleList(term for _, term in terms)

    def forward(self, *batch: Tensor | None) -> Tensor:
        value = self.objective(*batch)
        added = sum((w * t(*batch) for w, t in zip(self.weights, self.terms, strict=True)), torch.zeros(()))
        return value + added - added.detach()
