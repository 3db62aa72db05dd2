r"""A generator's start by distillation: a continuous flow learns the data, and the generator learns the flow's map in one pass.

.. math:: \min_\theta\; E_z \big| G_\theta(z; c) - x(1) \big|, \qquad \dot x = v(t, x; c),\quad x(0) = z

The flow sees every mode and its mass, and its map from noise to data is a function, which a network can follow (Luhman &
Luhman 2021, arXiv 2101.02388; Liu et al. 2023, arXiv 2209.03003, section 2.3). Where the latent is shorter than the event,
the flow moves the data's first principal components.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyro_dgm.cnf import FFJORD
from pyro_dgm.cnf.matching import velocity_error
from pyro_dgm.core.shapes import check_context
from pyro_dgm.gan.generator import Generator
from pyro_dgm.train.batches import first_rows
from pyro_dgm.train.descend import Limits, Stages, adam, warm_up

__all__ = ["distil"]

# The widths were measured: of images on digits (test_images_are_distilled_from_a_wide_flow_of_all_pixels), of points of a few
# entries by their conditionals (docs/implicit.md). The others were not, but chosen by hand.
_WIDTHS = (64, 128, 256)  # of the flow: the least, and the most for points of a few entries and for images
_WIDER = (32, 4)  # with each entry, up to the second and to the third
_FLOW_RATE = 0.64  # of the flow, times its width
_RATE = 1e-2  # of the distillation
_ROWS = 512  # of a step
_PAIRS = 32_768  # of a latent and what the flow makes of it, at most
_PATH_STEPS = 16  # of the flow's solver
_CLIP = 1.0  # norm of a gradient
_LEAST_NOISE = 0.01  # of a learned noise, in standard deviations of the data


def distil(generator: Generator, batches: Iterator[tuple[Any, ...]], steps: int, stages: Stages | None = None) -> None:
    """Train a flow for so many steps, then distil it into a :class:`~pyro_dgm.Generator` for half as many."""
    stages = stages or Stages()
    teacher = _Teacher(generator, *_rows(generator, first_rows(batches)))
    rate = _FLOW_RATE / _width(teacher.flow.features)
    optimizer = adam([p for p in teacher.flow.parameters() if p.requires_grad], rate)

    def matching() -> Tensor:
        return teacher.loss(*_at_most(_ROWS, *_rows(generator, first_rows(batches, _ROWS))))

    stages.descend("flow matching", teacher, optimizer, matching, steps, _linear, _CLIP)
    later = max(1, steps // 2)
    n = min(_PAIRS, _ROWS * later)
    z, u, context = teacher.pairs(n, _contexts(generator, batches, n), stages.seconds())
    n = len(z)

    def distance() -> Tensor:
        some = torch.randint(n, (_ROWS,), device=z.device)
        c = None if context is None else context[some]
        return (generator.location(z[some], c) - u[some]).abs().mean()

    optimizer = adam([p for p in generator.network.parameters() if p.requires_grad], _RATE)
    stages.descend("distillation", generator, optimizer, distance, later, _linear, _CLIP)
    if isinstance(generator.log_noise, nn.Parameter):
        error = generator.location(z[:_ROWS], None if context is None else context[:_ROWS]) - u[:_ROWS]
        _set_noise(generator, error, teacher.residual)


def _linear(step: int, progress: float) -> float:
    """Up over a few steps, then down to zero on a line."""
    return min(warm_up(step), 1.0 - progress)


class _Teacher(nn.Module):
    """A continuous flow from a generator's latents to the first principal components of data ``(N, *event_shape)``."""

    centre: Tensor
    basis: Tensor
    residual: Tensor

    def __init__(self, generator: Generator, x: Tensor, context: Tensor | None) -> None:
        super().__init__()
        u = generator.units(x)
        size = min(generator.base.event_shape.numel(), generator.features)
        self.generator = generator
        self.register_buffer("centre", u.mean(0))
        self.register_buffer("basis", _principal(u, size))
        self.flow = FFJORD(size, generator.context_features, steps=_PATH_STEPS, hidden_features=_width(size)).to(u)
        coordinates = self._coordinates(u)
        self.flow.standardize(coordinates)
        self.register_buffer("residual", (u - self._lift(coordinates)).square().mean(0).sqrt())

    def loss(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Flow matching, with the generator's latents as noise."""
        data = self.flow.flow_units(self._coordinates(self.generator.units(x)))
        noise = self._noise(self.generator.latents(len(x), context).detach())
        return velocity_error(self.flow, "linear", noise, data, context)

    @torch.no_grad()
    def pairs(
        self, n: int, context: Tensor | None, seconds: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """n latents, or as many as the seconds allow, where the flow takes them in the generator's units, and contexts."""
        z = self.generator.latents(n, context)
        moved: list[Tensor] = []
        clock = Limits(None, seconds)
        for rows in torch.arange(n).split(n if seconds is None else _ROWS):
            seen = None if context is None else context[rows]
            moved.append(self.flow.solve(self._noise(z[rows]), seen, sampling=True)[0])
            if clock.progress(0) >= 1.0:
                break
        coordinates = self.flow.standard.inverse(torch.cat(moved))
        made = len(coordinates)
        return z[:made], self._lift(coordinates), None if context is None else context[:made]

    def _noise(self, z: Tensor) -> Tensor:
        return z.reshape(len(z), -1)[:, : self.flow.features]

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
    """Of a flow: 64 for two entries, 128 from four on, 256 for an image of 64, which a narrow one cannot learn."""
    return max(_WIDTHS[0], *(min(by * features, most) for by, most in zip(_WIDER, _WIDTHS[1:], strict=True)))


@torch.no_grad()
def _set_noise(generator: Generator, error: Tensor, residual: Tensor) -> None:
    """The learned noise of each entry: what the map and the principal components leave."""
    typical = error.abs().median(0).values
    generator.log_noise.copy_((typical.square() + residual.square()).sqrt().clamp_min(_LEAST_NOISE).log())


def _rows(generator: Generator, rows: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Data, and contexts in the generator's units."""
    return rows[0], check_context(generator, rows[1])


def _contexts(generator: Generator, batches: Iterator[tuple[Any, ...]], rows: int) -> Tensor | None:
    """So many contexts of the data, in the generator's units; None without any."""
    context = _rows(generator, first_rows(batches))[1]
    return None if context is None else context[torch.randint(len(context), (rows,), device=context.device)]


def _at_most(rows: int, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows of both, drawn at random where there are too many."""
    if len(x) <= rows:
        return x, context
    some = torch.randperm(len(x), device=x.device)[:rows]
    return x[some], None if context is None else context[some]
