"""The continuous flow that a generator is distilled from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_dgm.cnf import FFJORD
from pyro_dgm.cnf.matching import velocity_error
from pyro_dgm.gan.generator import Generator
from pyro_dgm.train.descend import Limits

__all__ = ["Teacher", "flow_width", "teaching_flow"]

# The widths were measured: of images on digits (test_images_are_distilled_from_a_wide_flow_of_all_pixels), of points of a few
# entries by their conditionals (docs/implicit.md). The others were chosen by hand.
_WIDTHS = (64, 128, 256)  # of the flow: the least, and the most for points of a few entries and for images
_WIDER = (32, 4)  # with each entry, up to the second and to the third
_PATH_STEPS = 16  # of the flow's solver
_ROWS = 512  # that it moves at once, where its time is limited


class Teacher(nn.Module):
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
        self.flow = teaching_flow(size, generator.context_features).to(u)
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


def teaching_flow(features: int, context_features: int = 0) -> FFJORD:
    """A flow for data of so many entries, with few steps of its solver."""
    return FFJORD(features, context_features, steps=_PATH_STEPS, hidden_features=flow_width(features))


def flow_width(features: int) -> int:
    """Of a flow: 64 for two entries, 128 from four on, 256 for an image of 64, which a narrow one cannot learn."""
    return max(_WIDTHS[0], *(min(by * features, most) for by, most in zip(_WIDER, _WIDTHS[1:], strict=True)))
