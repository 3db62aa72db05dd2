r"""The inverse of an autoregressive transform, each number of it computed once.

.. math:: x_i = f^{-1}\big(y_i;\ \phi_i(x_{<i}, c)\big), \qquad i = 1, \dots, D

Columns can only come one after the other. zuko's inverse runs the whole conditioner and all D univariate inverses in each of
D passes, and keeps one column of a pass (its issue 2: one second for 64 draws of 200 dimensions; the answer there is fewer
passes, which is another flow). But the masks say for each unit of the conditioner in which pass the last of its inputs
becomes known. Here it is computed in that pass and never again, and so are the columns: all passes together cost about one
run of the network and D univariate inverses. The numbers and the gradients are those of zuko.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform

from pyro_dgm.core import zuko

__all__ = ["sequential"]


def sequential(flow: zuko.lazy.LazyDistribution) -> zuko.lazy.LazyDistribution:
    """The flow itself, its masked autoregressive transforms inverted column by column; parameters stay as they are.

    Left as they are: couplings, which need no more than two passes; residual conditioners; univariate functions with
    parameters of their own for each column (NAF, UNAF).
    """
    for module in flow.modules():
        if type(module) is zuko.flows.MaskedAutoregressiveTransform and _is_plain(module):
            module.__class__ = _Masked
    return flow


def _is_plain(module: Any) -> bool:
    """Whether the order is known, and linear layers alternate with functions of single numbers."""
    linear, between = list(module.hyper)[::2], list(module.hyper)[1::2]
    stateless = not any(list(m.children()) or list(m.parameters()) for m in between)
    masked = all(type(m) is zuko.nn.MaskedLinear for m in linear)
    return module.order is not None and not isinstance(module.univariate, nn.Module) and masked and stateless


class _Masked(zuko.flows.MaskedAutoregressiveTransform):
    """Adds to zuko's transform the schedule of its inverse."""

    _known: tuple[list[tuple[Tensor, int]], _Schedule] | None = None

    def forward(self, c: Tensor | None = None) -> _Sequential:
        return _Sequential(self, c)

    def schedule(self) -> _Schedule:
        """Read from order and masks, anew where these were replaced or loaded."""
        tensors = [self.order, *(layer.mask for layer in list(self.hyper)[::2])]
        if self._known is None or any(t is not u or t._version != v for t, (u, v) in zip(tensors, self._known[0])):  # noqa: B905
            self._known = [(t, t._version) for t in tensors], _schedule(tensors[0], tensors[1:], self.total)
        return self._known[1]


@dataclass
class _Schedule:
    """Which units belong to which pass.

    Attributes:
        units: for the columns, each hidden layer and the parameters, the units by pass.
        sizes: for the same, how many of them each pass has.
    """

    units: list[Tensor]
    sizes: list[list[int]]


def _schedule(order: Tensor, masks: list[Tensor], total: int) -> _Schedule:
    """A hidden unit belongs to the pass in which its last input is known: a column of order k is, from pass k + 1 on."""
    passes, columns = int(order.max()) + 1, order.argsort(stable=True)
    known = torch.cat([order + 1, order.new_zeros(masks[0].shape[1] - len(order))])  # a context is known from the start
    units, sizes = [columns], [torch.bincount(order, minlength=passes).tolist()]
    for mask in masks[:-1]:
        known = torch.where(mask, known, 0).amax(-1)
        units.append(known.argsort(stable=True))
        sizes.append(torch.bincount(known, minlength=passes).tolist())
    rows = columns.unsqueeze(-1) * total + torch.arange(total, device=order.device)
    return _Schedule([*units, rows.flatten()], [*sizes, [total * n for n in sizes[0]]])


class _Layer(NamedTuple):
    """A linear layer by passes: weights ``(n, m)``, biases ``(n, 1)`` or, with a context in them, ``(n, N)``."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def __call__(self, k: int, below: Tensor) -> Tensor:
        return torch.addmm(self.biases[k], self.weights[k][:, : len(below)], below)


class _Sequential(zuko.transforms.AutoregressiveTransform):
    """zuko's transform with another inverse, which knows its log-determinant."""

    def __init__(self, module: _Masked, context: Tensor | None) -> None:
        super().__init__(partial(module.meta, context), module.passes)
        self.module, self.context = module, context

    @property
    def inv(self) -> Transform:
        return _Inverse(self)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.solve(y, False)[0]

    def solve(self, y: Tensor, with_ladj: bool) -> tuple[Tensor, Tensor]:
        """The point whose image is ``y``, and there the log-determinant of the transform (0 where it is not wanted)."""
        batch = y.shape[:-1]
        if self.context is not None:
            batch = torch.broadcast_shapes(batch, self.context.shape[:-1])
        schedule = self.module.schedule()
        images = y.expand(*batch, -1).reshape(-1, y.shape[-1]).mT[schedule.units[0]]
        x, ladj = self._columns(images, self._layers(schedule, batch), schedule.sizes, with_ladj)
        x = x.mT.index_select(-1, schedule.units[0].argsort())
        return x.reshape(*batch, y.shape[-1]), ladj.expand(x.shape[0]).reshape(batch)

    def _layers(self, schedule: _Schedule, batch: torch.Size) -> list[_Layer]:
        layers, below = list[_Layer](), schedule.units[0]
        linears = list(self.module.hyper)[::2]
        for linear, units, sizes in zip(linears, schedule.units[1:], schedule.sizes[1:], strict=True):
            weight, bias = (linear.mask * linear.weight)[units], linear.bias[units].unsqueeze(-1)
            if not layers and self.context is not None:
                rows = self.context
                rows = rows if math.prod(rows.shape[:-1]) == 1 else rows.expand(*batch, -1)
                bias = bias + weight[:, len(below) :] @ rows.reshape(-1, rows.shape[-1]).mT
            layers.append(_Layer(weight[:, below].split(sizes), bias.split(sizes)))
            below = units
        return layers

    def _columns(
        self, images: Tensor, layers: list[_Layer], sizes: list[list[int]], with_ladj: bool
    ) -> tuple[Tensor, Tensor]:
        """Columns ``(D, N)`` in the order of their passes: in each pass what has become known, layer by layer."""
        activations, total = list(self.module.hyper)[1::2], self.module.total
        known, ladj = [images.new_empty(0, images.shape[-1]) for _ in layers], images.new_zeros(())
        for k, image in enumerate(images.split(sizes[0])):
            for i, activation in enumerate(activations):
                if sizes[i + 1][k]:
                    known[i + 1] = torch.cat([known[i + 1], activation(layers[i](k, known[i]))])
            phi = layers[-1](k, known[-1]).mT.unflatten(-1, (-1, total))
            univariate = self.module.univariate(*zuko.utils.unpack(phi, self.module.shapes))
            y = image.mT
            x = univariate.inv(y)
            if with_ladj:
                ladj = ladj + univariate.log_abs_det_jacobian(x, y).sum(-1)
            known[0] = torch.cat([known[0], x.mT])
        return known[0], ladj


class _Inverse(_InverseTransform):
    """An inverse that finds its log-determinant on the way."""

    def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._inv.solve(y, True)  # type: ignore[union-attr]
        return x, -ladj
