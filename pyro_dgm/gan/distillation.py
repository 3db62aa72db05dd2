r"""A generator's start by distillation: a continuous flow learns the data, and the generator learns the flow's map in one pass.

.. math:: \min_\theta\; E_z \big| G_\theta(z; c) - x(1) \big|, \qquad \dot x = v(t, x; c),\quad x(0) = z

The flow sees every mode and its mass, and its map from noise to data is a function, which a network can follow (Luhman &
Luhman 2021, arXiv 2101.02388; Liu et al. 2023, arXiv 2209.03003, section 2.3). Where the latent is shorter than the event,
the flow moves the data's first principal components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyro_dgm.cnf import FFJORD
from pyro_dgm.cnf.matching import velocity_error
from pyro_dgm.core import Standardize
from pyro_dgm.core.data import first_rows

__all__ = ["distil"]

_ROWS, _PAIRS = 512, 32_768
_PATH_STEPS = 16
_RATE = 1e-2  # of a flow of the least width; less of a wider one
_WIDTHS = (64, 256)
_LEAST_NOISE = 0.01  # of a learned noise, in standard deviations of the data


def distil(generator: Any, batches: Iterator[tuple[Any, ...]], steps: int) -> None:
    """Train a flow for so many steps, then distil it into a :class:`~pyro_dgm.Generator` for half as many."""
    teacher = _Teacher(generator, *first_rows(batches))
    rate = _RATE * _WIDTHS[0] / _width(teacher.flow.features)
    _descend(teacher.flow, lambda: teacher.loss(*_at_most(_ROWS, *first_rows(batches, _ROWS))), steps, rate)
    later = max(1, steps // 2)
    z, u, context = teacher.pairs(n := min(_PAIRS, _ROWS * later), _contexts(batches, n))

    def loss() -> Tensor:
        some = torch.randint(n, (_ROWS,), device=z.device)
        c = None if context is None else context[some]
        return (generator.location(z[some], c) - u[some]).abs().mean()

    _descend(generator.network, loss, later, _RATE)
    if isinstance(generator.log_noise, nn.Parameter):
        error = generator.location(z[:_ROWS], None if context is None else context[:_ROWS]) - u[:_ROWS]
        _set_noise(generator, error, teacher.residual)


class _Teacher:
    """A continuous flow from a generator's latents to the first principal components of data ``(N, *event_shape)``."""

    def __init__(self, generator: Any, x: Tensor, context: Tensor | None) -> None:
        u, size = generator.units(x), min(generator.base.event_shape.numel(), generator.features)
        self.generator, self.centre, self.basis = generator, u.mean(0), _principal(u, size)
        self.standard = None if context is None else Standardize(context.shape[-1]).to(context).fit(context)
        self.flow = FFJORD(size, generator.context_features, steps=_PATH_STEPS, hidden_features=_width(size)).to(u)
        coordinates = self._coordinates(u)
        self.flow.standardize(coordinates)
        self.residual = (u - self._lift(coordinates)).square().mean(0).sqrt()

    def loss(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Flow matching, with the generator's latents as noise."""
        data = self.flow.flow_units(self._coordinates(self.generator.units(x)))
        noise = self._noise(self.generator.latents(len(x), context).detach())
        return velocity_error(self.flow, "linear", noise, data, self._seen(context))

    @torch.no_grad()
    def pairs(self, n: int, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """n latents, where the flow takes them in the generator's units, and their contexts."""
        z = self.generator.latents(n, context)
        moved = self.flow.solve(self._noise(z), self._seen(context), sampling=True)[0]
        coordinates = torch.addcmul(self.flow.standard.loc, self.flow.standard.scale, moved)
        return z, self._lift(coordinates), context

    def _noise(self, z: Tensor) -> Tensor:
        return z.reshape(len(z), -1)[:, : self.flow.features]

    def _seen(self, context: Tensor | None) -> Tensor | None:
        return None if context is None or self.standard is None else self.standard(context)

    def _coordinates(self, u: Tensor) -> Tensor:
        return (u - self.centre) @ self.basis

    def _lift(self, coordinates: Tensor) -> Tensor:
        return self.centre + coordinates @ self.basis.mT


def _principal(u: Tensor, size: int) -> Tensor:
    """The directions of largest variance, shape ``(D, size)``; the axes themselves where all are kept."""
    if size == u.shape[-1]:
        return torch.eye(size).to(u)
    return torch.pca_lowrank(u, size)[2]


def _width(features: int) -> int:
    """Of a flow: 64 for a point of a few entries, 256 for an image of 64, which a narrow one cannot learn."""
    return max(_WIDTHS[0], min(4 * features, _WIDTHS[1]))


def _descend(module: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float) -> None:
    """Adam with a linear schedule to zero; steps whose loss is not finite are left out."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, rate, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 30, 1.0 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        if value.isfinite():
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _set_noise(generator: Any, error: Tensor, residual: Tensor) -> None:
    """The learned noise of each entry: what the map and the principal components leave."""
    typical = error.abs().median(0).values
    generator.log_noise.copy_((typical.square() + residual.square()).sqrt().clamp_min(_LEAST_NOISE).log())


def _contexts(batches: Iterator[tuple[Any, ...]], rows: int) -> Tensor | None:
    """So many contexts of the data; None without any."""
    context = first_rows(batches)[1]
    return None if context is None else context[torch.randint(len(context), (rows,), device=context.device)]


def _at_most(rows: int, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows of both, drawn at random where there are too many."""
    if len(x) <= rows:
        return x, context
    some = torch.randperm(len(x), device=x.device)[:rows]
    return x[some], None if context is None else context[some]
