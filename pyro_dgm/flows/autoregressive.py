r"""Autoregressive networks and transforms, column by column, each number computed once.

.. math:: \phi_i = h_i(x_{<i}, c), \qquad x_i = f^{-1}\big(y_i;\ \phi_i\big), \qquad i = 1, \dots, D

What an autoregressive network says of a column depends on the columns before it, so columns can only come one after the
other. zuko's inverse runs the whole network and all D univariate inverses in each of D passes, and keeps one column of a
pass (its issue 2: one second for 64 draws of 200 dimensions). Here the masks say for each hidden unit in which pass the last
of its inputs becomes known; it is computed in that pass and never again, and so is each column. All passes together cost
about one run of the network and D univariate inverses. The numbers and the gradients are those of zuko.

Couplings keep zuko's two passes. Their halves are put together without writing into a tensor, and masks and orders are read
behind ``torch.vmap``, so that flows stacked by ``torch.func.stack_module_state`` run as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform

from pyro_dgm.core import zuko
from pyro_dgm.core.upstream import in_vmap, listed_numbers, shared_by_all, unseen

__all__ = ["Passes", "Run", "schedule", "sequential"]


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
    units, sizes = [columns], [_counts(order, passes)]
    for mask in masks[:-1]:
        known = torch.where(mask, known, 0).amax(-1)
        units.append(known.argsort(stable=True))
        sizes.append(_counts(known, passes))
    rows = columns.unsqueeze(-1) * total + torch.arange(total, device=order.device)
    return Passes([*units, rows.flatten()], [*sizes, [total * n for n in sizes[0]]])


def _counts(known: Tensor, passes: int) -> list[int]:
    """Of units by pass."""
    return listed_numbers(torch.bincount(known, minlength=passes))


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
        self.activations = activations
        self.passes = passes
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


def sequential(flow: zuko.lazy.LazyDistribution) -> zuko.lazy.LazyDistribution:
    """The flow itself, its masked autoregressive transforms inverted column by column; parameters stay as they are.

    Left as they are: residual conditioners; univariate functions with parameters of their own for each column (NAF, UNAF).
    Couplings need no more than two passes and are only made fit for ``torch.vmap``.
    """
    for module in flow.modules():
        if type(module) is zuko.flows.coupling.GeneralCouplingTransform:
            module.__class__ = _Coupling
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

    _known: tuple[list[tuple[Tensor, int]], Passes] | None = None

    def forward(self, c: Tensor | None = None) -> _Sequential:
        return _Sequential(self, c)

    def schedule(self) -> Passes:
        """Read from order and masks, anew where these were replaced or loaded."""
        tensors = [self.order, *(layer.mask for layer in list(self.hyper)[::2])]
        if unseen(*tensors):
            order, *masks = [shared_by_all("autoregressive flow", "order of columns", t) for t in tensors]
            return schedule(order, masks, self.total)
        if self._known is None or any(t is not u or t._version != v for t, (u, v) in zip(tensors, self._known[0])):  # noqa: B905
            self._known = [(t, t._version) for t in tensors], schedule(tensors[0], tensors[1:], self.total)
        return self._known[1]


class _Sequential(zuko.transforms.AutoregressiveTransform):
    """zuko's transform with another inverse, which knows its log-determinant."""

    def __init__(self, module: _Masked, context: Tensor | None) -> None:
        super().__init__(partial(module.meta, context), module.passes)
        self.module = module
        self.context = context

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
        passes = self.module.schedule()
        order = passes.units[0]
        images = y.expand(*batch, -1).reshape(-1, y.shape[-1]).mT[order]
        layers = list(self.module.hyper)
        run = Run(layers[::2], layers[1::2], passes, self.context, batch)
        x, ladj = self._columns(images, run, with_ladj)
        x = x.mT.index_select(-1, order.argsort())
        return x.reshape(*batch, y.shape[-1]), ladj.expand(x.shape[0]).reshape(batch)

    def _columns(self, images: Tensor, run: Run, with_ladj: bool) -> tuple[Tensor, Tensor]:
        """Columns ``(D, N)`` in the order of their passes."""
        ladj = images.new_zeros(())
        for k, image in enumerate(images.split(run.passes.sizes[0])):
            phi = run.outputs(k).mT.unflatten(-1, (-1, self.module.total))
            univariate = self.module.univariate(*zuko.utils.unpack(phi, self.module.shapes))
            y = image.mT
            x = univariate.inv(y)
            if with_ladj:
                ladj = ladj + univariate.log_abs_det_jacobian(x, y).sum(-1)
            run.learn(x.mT)
        return run.known[0], ladj


class _Inverse(_InverseTransform):
    """An inverse that finds its log-determinant on the way."""

    def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._inv.solve(y, True)  # type: ignore[union-attr]
        return x, -ladj


class _Coupling(zuko.flows.coupling.GeneralCouplingTransform):
    """zuko's lazy coupling, of which many can be stacked."""

    def forward(self, c: Tensor | None = None) -> _Coupled:
        return _Coupled(partial(self.meta, c), shared_by_all("coupling flow", "mask", self.mask))


class _Coupled(zuko.transforms.CouplingTransform):
    """zuko's coupling, which writes both halves into one tensor: ``torch.vmap`` refuses that where one half stands for many."""

    def merge(self, x_a: Tensor, x_b: Tensor, shape: Size) -> Tensor:
        if not in_vmap():
            return super().merge(x_a, x_b, shape)
        x_a = x_a.expand(*shape[:-1], -1)
        x_b = x_b.expand(*shape[:-1], -1)
        return torch.cat([x_a, x_b], -1).index_select(-1, torch.cat([self.idx_a, self.idx_b]).argsort())
