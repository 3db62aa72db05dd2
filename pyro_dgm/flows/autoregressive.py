r"""A masked network run column by column, each of its numbers computed once.

.. math:: \phi_i = h_i(x_{<i}, c), \qquad i = 1, \dots, D

What an autoregressive network says of a column depends on the columns before it, so they can only come one after the other.
The masks say for each hidden unit in which pass the last of its inputs becomes known. It is computed in that pass and never
again: all passes together cost about one run of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

__all__ = ["Passes", "Run", "schedule"]


@dataclass
class Passes:
    """Which units belong to which pass.

    Attributes:
        units: for the columns, each hidden layer and the outputs, the units by pass.
        sizes: for the same, how many of them each pass has.
    """

    units: list[Tensor]
    sizes: list[list[int]]


def schedule(order: Tensor, masks: Sequence[Tensor], total: int) -> Passes:
    """Of masks ``(out, in)`` from columns and a context to ``total`` outputs for each column.

    A hidden unit belongs to the pass in which its last input is known: a column of order k is, from pass k + 1 on.
    """
    passes, columns = int(order.max()) + 1, order.argsort(stable=True)
    known = torch.cat([order + 1, order.new_zeros(masks[0].shape[1] - len(order))])  # a context is known from the start
    units, sizes = [columns], [torch.bincount(order, minlength=passes).tolist()]
    for mask in masks[:-1]:
        known = torch.where(mask, known, 0).amax(-1)
        units.append(known.argsort(stable=True))
        sizes.append(torch.bincount(known, minlength=passes).tolist())
    rows = columns.unsqueeze(-1) * total + torch.arange(total, device=order.device)
    return Passes([*units, rows.flatten()], [*sizes, [total * n for n in sizes[0]]])


class _Layer(NamedTuple):
    """A linear layer by passes: weights ``(n, m)``, biases ``(n, 1)`` or, with a context in them, ``(n, N)``."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def __call__(self, k: int, below: Tensor) -> Tensor:
        return torch.addmm(self.biases[k], self.weights[k][:, : len(below)], below)


class Run:
    """One run of a masked network: ``outputs(k)`` of pass k, then ``learn`` its columns.

    Args:
        linears: the masked layers, each with ``weight``, ``bias`` and ``mask``.
        activations: the functions between them.
        passes: of their masks.
        context: shape ``(*, C)``, or None; it is read before it is repeated.
        batch: shape of the rows; N is their number.
    """

    def __init__(
        self, linears: Sequence[Any], activations: Sequence[Callable[[Tensor], Tensor]], passes: Passes,
        context: Tensor | None, batch: Size,
    ) -> None:  # fmt: skip
        self.activations, self.passes = activations, passes
        self.layers = _layers(linears, passes, context, batch)
        empty = linears[0].weight.new_empty(0, math.prod(batch))
        self.known = [empty for _ in self.layers]

    def outputs(self, k: int) -> Tensor:
        """Those of the columns of pass k, shape ``(n, N)``, n all their numbers."""
        for i, activation in enumerate(self.activations):
            if self.passes.sizes[i + 1][k]:
                self.known[i + 1] = torch.cat([self.known[i + 1], activation(self.layers[i](k, self.known[i]))])
        return self.layers[-1](k, self.known[-1])

    def learn(self, columns: Tensor) -> None:
        """The columns of the pass, shape ``(n, N)``."""
        self.known[0] = torch.cat([self.known[0], columns])


def _layers(linears: Sequence[Any], passes: Passes, context: Tensor | None, batch: Size) -> list[_Layer]:
    layers, below = list[_Layer](), passes.units[0]
    for linear, units, sizes in zip(linears, passes.units[1:], passes.sizes[1:], strict=True):
        weight, bias = (linear.mask * linear.weight)[units], linear.bias[units].unsqueeze(-1)
        if not layers and context is not None:
            bias = bias + _of_rows(context @ weight[:, len(below) :].mT, batch)
        layers.append(_Layer(weight[:, below].split(sizes), bias.split(sizes)))
        below = units
    return layers


def _of_rows(x: Tensor, batch: Size) -> Tensor:
    """Vectors ``(*, n)`` as columns ``(n, N)``, or as one column where there is one vector."""
    x = x if math.prod(x.shape[:-1]) == 1 else x.expand(*batch, -1)
    return x.reshape(-1, x.shape[-1]).mT
