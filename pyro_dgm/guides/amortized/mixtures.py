r"""Mixtures of normals on an interval, each number by itself, and their chain over the entries of a vector.

.. math:: q(x) = \frac{\sum_k w_k N(x; m_k, s_k)}{\sum_k w_k \big(\Phi(\tfrac{b - m_k}{s_k}) - \Phi(\tfrac{a - m_k}{s_k})\big)},
          \qquad a < x < b

The constant is exact, so nothing is rejected. Draws are differentiable by the implicit function theorem (Figurnov et al. 2018,
arXiv 1805.08498, eq. 3): with the distribution function F, :math:`dx = -dF / q(x)` at a fixed x.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any, Protocol

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

__all__ = ["AutoregressiveMixture", "Interval", "NormalMixture"]

Interval = tuple[Tensor, Tensor]
_NEGLIGIBLE = 40.0  # standard deviations below the upper end, where no mass of a component is left
_ROUNDING = 1e-5  # by which a point of the interval may seem to be outside
_TAIL = -30.0  # where the expansion of the distribution function has six digits
_FARTHEST = 12.0  # standard deviations above a component, where all of its mass is below


class NormalMixture:
    """A mixture of K normals for each number, cut off at the ends of an interval.

    Args:
        log_weight, loc, log_scale: shape ``(..., K)``.
        interval: its two ends, of shape ``(...)``; None for all numbers.
    """

    def __init__(self, log_weight: Tensor, loc: Tensor, log_scale: Tensor, interval: Interval | None = None) -> None:
        self.log_weight, self.loc, self.log_scale = torch.log_softmax(log_weight, -1), loc, log_scale
        self.interval = interval
        self.ends: Any = None
        self.log_mass = torch.zeros(())
        if interval is not None:
            self.ends = (self._standard(interval[0]), self._standard(interval[1]))
            self.log_mass = _log_mass(*self.ends)

    def _standard(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-1) - self.loc) * torch.exp(-self.log_scale)

    def _log_inside(self) -> Tensor:
        """Log probabilities of the components, each with its part of the interval."""
        return self.log_weight + self.log_mass

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density, shape ``(...)``; -inf outside the interval."""
        terms = self.log_weight - self.log_scale - 0.5 * self._standard(x).square()
        density = torch.logsumexp(terms, -1) - 0.5 * math.log(2.0 * math.pi)
        if self.interval is None:
            return density
        inside = (x > self.interval[0] - _ROUNDING) & (x < self.interval[1] + _ROUNDING)
        return torch.where(inside, density - torch.logsumexp(self._log_inside(), -1), -torch.inf)

    def cdf(self, x: Tensor) -> Tensor:
        """Probability below x, shape ``(...)``."""
        share = torch.softmax(self._log_inside(), -1)
        if self.ends is None:
            return (share * torch.special.ndtr(self._standard(x))).sum(-1)
        return (share * torch.exp(_log_mass(self.ends[0], self._standard(x)) - self.log_mass)).sum(-1)

    def rsample(self) -> Tensor:
        """One draw of each, shape ``(...)``."""
        with torch.no_grad():
            x = self._drawn()
        if not (torch.is_grad_enabled() and self.loc.requires_grad):
            return x
        moved, density = self.cdf(x), self.log_prob(x).detach().exp()
        return x - (moved - moved.detach()) / density.clamp_min(1e-12)

    def _drawn(self) -> Tensor:
        """A component, and a point of it by inversion, from the end that loses no digits."""
        noise = -torch.log(-torch.log(torch.rand_like(self.loc).clamp(1e-20, 1.0 - 6e-8)))
        k = (self._log_inside() + noise).argmax(-1, keepdim=True)
        pick = lambda t: t.gather(-1, k)[..., 0]  # noqa: E731
        loc, scale = pick(self.loc), pick(self.log_scale).exp()
        if not self.ends:
            return loc + scale * torch.randn_like(loc)
        return loc + scale * _cut_normal(*(pick(end) for end in self.ends))


def _cut_normal(low: Tensor, high: Tensor) -> Tensor:
    """Draws of a standard normal between two ends."""
    turn = low + high > 0.0
    a, b = torch.where(turn, -high, low).double(), torch.where(turn, -low, high).double()
    below, above = torch.special.log_ndtr(a).exp(), torch.special.log_ndtr(b).exp()  # ndtr has no digits in the tail
    z = torch.special.ndtri(below + (above - below) * torch.rand_like(a)).clamp(a, b).to(low)
    return torch.where(turn, -z, z)


def _log_mass(low: Tensor, high: Tensor) -> Tensor:
    """Log of the standard normal's mass between two ends, from the side of its smaller tail."""
    turn = low + high > 0.0
    a, b = torch.where(turn, -high, low), torch.where(turn, -low, high).clamp_max(_FARTHEST)
    above = _log_ndtr(b)
    lost = _log_ndtr(torch.maximum(a, b - _NEGLIGIBLE)) - above
    return above + torch.log(-torch.expm1(lost.clamp_max(-1e-6)))


def _log_ndtr(x: Tensor) -> Tensor:
    """torch's, and its expansion in the tail, where the derivative of torch's loses its digits and overflows."""
    tail = x.clamp_max(_TAIL)
    square = tail.square()
    expansion = -0.5 * (square + math.log(2.0 * math.pi)) - torch.log(-tail) + torch.log1p(-1.0 / square)
    return torch.where(x < _TAIL, expansion, torch.special.log_ndtr(x.clamp_min(_TAIL)))


class Conditionals(Protocol):
    """What a chain asks: the distributions of a vector's entries, each given those before it."""

    def conditionals(self, x: Tensor, context: Tensor) -> NormalMixture:
        """Of all entries, batch ``(..., D)``."""

    def in_turn(self, context: Tensor, batch: Size) -> Generator[NormalMixture, Tensor, None]:
        """Of the entries one after the other; each is sent its value, of shape ``batch``."""


class AutoregressiveMixture(TorchDistribution):
    r"""The distribution of a vector, :math:`q(x) = \prod_i q_i(x_i \mid x_{<i}, c)`: scored in one pass, drawn in D.

    Args:
        conditionals: of the entries.
        context: shape ``(*batch, C)``.
        features: D.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True
    support = constraints.real_vector

    def __init__(self, conditionals: Conditionals, context: Tensor, features: int) -> None:
        self.of, self.context = conditionals, context
        super().__init__(context.shape[:-1], Size([features]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> AutoregressiveMixture:
        return AutoregressiveMixture(self.of, self.context.expand(*batch_shape, -1), self.event_shape[0])

    def log_prob(self, value: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value, context = value.expand(*batch, -1), self.context.expand(*batch, -1)
        return self.of.conditionals(value, context).log_prob(value).sum(-1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        entries = self.of.in_turn(self.context, Size(sample_shape) + self.batch_shape)
        x = [next(entries).rsample()]
        for _ in range(self.event_shape[0] - 1):
            x.append(entries.send(x[-1]).rsample())
        return torch.stack(x, -1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.rsample(sample_shape)
