r"""The inverse of an autoregressive transform, each number of it computed once.

.. math:: x_i = f^{-1}\big(y_i;\ \phi_i(x_{<i}, c)\big), \qquad i = 1, \dots, D

Columns can only come one after the other. zuko's inverse runs the whole conditioner and all D univariate inverses in each of
D passes, and keeps one column of a pass (its issue 2: one second for 64 draws of 200 dimensions; the answer there is fewer
passes, which is another flow). Here each unit of the conditioner is computed in the pass in which its inputs become known
(:mod:`pyro_dgm.flows.autoregressive`), and so are the columns: all passes together cost about one run of the network and
D univariate inverses. The numbers and the gradients are those of zuko.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform

from pyro_dgm.core import zuko
from pyro_dgm.flows.autoregressive import Passes, Run, schedule

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

    _known: tuple[list[tuple[Tensor, int]], Passes] | None = None

    def forward(self, c: Tensor | None = None) -> _Sequential:
        return _Sequential(self, c)

    def schedule(self) -> Passes:
        """Read from order and masks, anew where these were replaced or loaded."""
        tensors = [self.order, *(layer.mask for layer in list(self.hyper)[::2])]
        if self._known is None or any(t is not u or t._version != v for t, (u, v) in zip(tensors, self._known[0])):  # noqa: B905
            self._known = [(t, t._version) for t in tensors], schedule(tensors[0], tensors[1:], self.total)
        return self._known[1]


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
        run = Run(list(self.module.hyper)[::2], list(self.module.hyper)[1::2], schedule, self.context, batch)
        x, ladj = self._columns(images, run, with_ladj)
        x = x.mT.index_select(-1, schedule.units[0].argsort())
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
