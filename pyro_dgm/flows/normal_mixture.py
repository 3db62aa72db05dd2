r"""Mixtures of normals for single numbers, on all numbers, on an interval, or on integers.

.. math:: q(x) = \sum_k w_k N(x; m_k, s_k) \Big/ \sum_k w_k \big(\Phi(\tfrac{b - m_k}{s_k}) - \Phi(\tfrac{a - m_k}{s_k})\big),
          \quad a < x < b, \qquad P(n) = \int_{n - 1/2}^{n + 1/2} q(x)\, dx
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_dgm.core.weights import gumbels_like

__all__ = ["Interval", "NormalMixture", "log_ndtr"]

Interval = tuple[Tensor, Tensor]

# Numbers that float32 asks for.
_INFINITE = 1e4  # standard deviations to what stands for an infinite end, whose gradients are NaN
_FLAT = -4.6  # log width of a bin, in sds, from which on the density is level in it: differences of masses lose digits
_NEGLIGIBLE = 40.0  # standard deviations below the upper end, where no mass of a component is left
_ROUNDING = 1e-5  # by which a point of the interval may seem to be outside
_TAIL = -30.0  # where the expansion of the distribution function has six digits
_FARTHEST = 12.0  # standard deviations above a component, where all of its mass is below


class NormalMixture:
    """A mixture of K normals for each number, cut off at the ends of an interval.

    Args:
        log_weight, loc, log_scale: shape ``(..., K)``.
        interval: its two ends, of shape ``(...)``, infinite where there is none; None for all numbers.
        integer: which numbers are integers n, of shape ``(...)``: they have the mass between n - 1/2 and n + 1/2. None for none.
    """

    def __init__(
        self,
        log_weight: Tensor,
        loc: Tensor,
        log_scale: Tensor,
        interval: Interval | None = None,
        integer: Tensor | None = None,
    ) -> None:
        self.log_weight = torch.log_softmax(log_weight, -1)
        self.loc = loc
        self.log_scale = log_scale
        self.interval = interval
        self.integer = integer
        self.ends: Interval | None = None
        self.log_mass = torch.zeros(())
        if interval is not None:
            self.ends = (self._standard_end(interval[0]), self._standard_end(interval[1]))
            self.log_mass = _log_mass(*self.ends)

    def _standard(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-1) - self.loc) * torch.exp(-self.log_scale)

    def _standard_end(self, end: Tensor) -> Tensor:
        infinite = end.isinf()
        finite = self._standard(torch.where(infinite, 0.0, end))
        return torch.where(infinite.unsqueeze(-1), _INFINITE * end.sign().unsqueeze(-1), finite)

    def _log_inside(self) -> Tensor:
        """Log probabilities of the components, each with its part of the interval."""
        return self.log_weight + self.log_mass

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density, of integers the log mass, shape ``(...)``; -inf outside the interval."""
        score = self._log_density(x)
        if self.integer is not None:
            score = torch.where(self.integer, self._log_bin(x), score)
        if self.interval is None:
            return score
        inside = (x > self.interval[0] - _ROUNDING) & (x < self.interval[1] + _ROUNDING)
        return torch.where(inside, score - torch.logsumexp(self._log_inside(), -1), -torch.inf)

    def _log_density(self, x: Tensor) -> Tensor:
        terms = self.log_weight - self.log_scale - 0.5 * self._standard(x).square()
        return torch.logsumexp(terms, -1) - 0.5 * math.log(2.0 * math.pi)

    def _log_bin(self, x: Tensor) -> Tensor:
        """Before the interval's constant: its ends lie between integers, so no bin is cut."""
        log_width = -self.log_scale
        flat = log_width - 0.5 * (self._standard(x).square() + math.log(2.0 * math.pi))
        mass = _log_mass(self._standard(x - 0.5), self._standard(x + 0.5))
        return torch.logsumexp(self.log_weight + torch.where(log_width < _FLAT, flat, mass), -1)

    def cdf(self, x: Tensor) -> Tensor:
        """Probability below x, shape ``(...)``; of integers as if they were none."""
        share = torch.softmax(self._log_inside(), -1)
        if self.ends is None:
            return (share * torch.special.ndtr(self._standard(x))).sum(-1)
        return (share * torch.exp(_log_mass(self.ends[0], self._standard(x)) - self.log_mass)).sum(-1)

    def rsample(self) -> Tensor:
        """One draw of each, shape ``(...)``; integers have no gradient."""
        with torch.no_grad():
            x = self._drawn()
        if self.integer is not None:
            return torch.where(self.integer, self._rounded(x), x)
        if not (torch.is_grad_enabled() and self.loc.requires_grad):
            return x
        moved = self.cdf(x)
        density = self.log_prob(x).detach().exp()
        return x - (moved - moved.detach()) / density.clamp_min(1e-12)

    def _rounded(self, x: Tensor) -> Tensor:
        x = x.round() + 0.0  # not -0
        return x if self.interval is None else x.clamp(self.interval[0] + 0.5, self.interval[1] - 0.5)

    def _drawn(self) -> Tensor:
        """A component, and a point of it by inversion, from the end that loses no digits."""
        k = (self._log_inside() + gumbels_like(self.loc)).argmax(-1, keepdim=True)
        loc = self.loc.gather(-1, k)[..., 0]
        scale = self.log_scale.gather(-1, k)[..., 0].exp()
        if self.ends is None:
            return loc + scale * torch.randn_like(loc)
        low, high = (end.gather(-1, k)[..., 0] for end in self.ends)
        return loc + scale * _cut_normal(low, high)


def _cut_normal(low: Tensor, high: Tensor) -> Tensor:
    """Draws of a standard normal between two ends."""
    turn, a, b = _towards_lower_tail(low.double(), high.double())
    below = torch.special.log_ndtr(a).exp()  # ndtr has no digits in the tail
    above = torch.special.log_ndtr(b).exp()
    z = torch.special.ndtri(below + (above - below) * torch.rand_like(a)).clamp(a, b).to(low)
    return torch.where(turn, -z, z)


def _log_mass(low: Tensor, high: Tensor) -> Tensor:
    """Log of the standard normal's mass between two ends, from the side of its smaller tail."""
    _, a, b = _towards_lower_tail(low, high)
    b = b.clamp_max(_FARTHEST)
    above = log_ndtr(b)
    lost = log_ndtr(torch.maximum(a, b - _NEGLIGIBLE)) - above
    return above + torch.log(-torch.expm1(lost.clamp_max(-1e-6)))


def _towards_lower_tail(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where an interval is mirrored so that most of it is below zero, and its ends then."""
    turn = low + high > 0.0
    return turn, torch.where(turn, -high, low), torch.where(turn, -low, high)


def log_ndtr(x: Tensor) -> Tensor:
    """torch's, and its expansion in the tail, where the derivative of torch's loses its digits and overflows."""
    tail = x.clamp_max(_TAIL)
    square = tail.square()
    expansion = -0.5 * (square + math.log(2.0 * math.pi)) - torch.log(-tail) + torch.log1p(-1.0 / square)
    return torch.where(x < _TAIL, expansion, torch.special.log_ndtr(x.clamp_min(_TAIL)))
