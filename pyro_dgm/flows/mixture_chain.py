r"""What the mixtures of a chain share: features of the context, learned by a gated residual network.

.. math:: h \leftarrow h + W \big(\mathrm{silu}(A\,\hat h) \odot B\,\hat h\big), \qquad \hat h = \mathrm{norm}(h)

Products of linear features are what a scale or a correlation is made of, and a sum of blocks learns small differences of
the data in far fewer steps than layers on top of each other.

Mixtures of normals on an interval, each number by itself, and their chain over the entries of a vector.

.. math:: q(x) = \frac{\sum_k w_k N(x; m_k, s_k)}{\sum_k w_k \big(\Phi(\tfrac{b - m_k}{s_k}) - \Phi(\tfrac{a - m_k}{s_k})\big)},
          \qquad a < x < b

The constant is exact, so nothing is rejected. Draws are differentiable by the implicit function theorem (Figurnov et al. 2018,
arXiv 1805.08498, eq. 3): with the distribution function F, :math:`dx = -dF / q(x)` at a fixed x.

The default family of an amortised posterior: a chain of mixtures of normals, cut off at the prior's box.

.. math:: u = A c + b + r \odot x, \qquad q(x \mid c) = \prod_i q_i(x_i \mid x_{<i}, c), \qquad q_i \text{ a mixture of normals}

:math:`A, b, r` come from a ridge regression on the simulations, so that a linear Gaussian posterior is nearly there from the
start. One masked network gives weights, places and widths of all mixtures (Germain et al. 2015, arXiv 1502.03509; Bishop 1994),
from the entries before, the context, and features of the context that all of them share.
A box is kept by the mixtures themselves, with an exact constant: see :mod:`~pyro_dgm.flows.mixture_chain`.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any, Protocol

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_dgm.core import DistributionModule, zuko
from pyro_dgm.flows.autoregressive import Run, schedule

__all__ = ["AutoregressiveMixture", "Interval", "MixtureChain", "NormalMixture", "Reader"]


class Reader(nn.Sequential):
    """Contexts ``(*batch, C)`` as features ``(*batch, width)``.

    Args:
        context_features: C.
        width: of the features, and of the blocks.
        dropout: share of a block's hidden units that a step of training leaves out.

    References:
        Shazeer (2020), "GLU variants improve transformer", arXiv 2002.05202. He et al. (2016), arXiv 1603.05027.
    """

    def __init__(self, context_features: int, width: int, dropout: float) -> None:
        blocks = _Block(width, dropout), _Block(width, dropout)
        super().__init__(nn.Linear(context_features, width), *blocks, nn.LayerNorm(width))


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.both = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.dropout, self.last = nn.Dropout(dropout), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        gate, value = self.both(self.norm(h)).chunk(2, -1)
        return h + self.last(self.dropout(nn.functional.silu(gate) * value))


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


_SOFT_BOUND = 6.0  # on |log scale|, beside the regression's
_FAR = 1e4  # what stands for infinity, whose gradients are NaN


class MixtureChain(DistributionModule):
    """Mixtures of normals, each entry given those before it, around a linear regression on the context.

    Args:
        features: D.
        context_features: length of the context.
        box: lower and upper ends of the entries, infinite where there is none; None for none.
        components: of each mixture.
        hidden_features: of the masked network; None for three layers of 64 D units, 192 at most.
        shared_features: of the context; None for 64 D, 128 at most. 0 for none, where the context is a learned summary.
        dropout: share of hidden units that a step on a fixed budget of simulations leaves out; None for
            0.05 (D - 2), between 0 and 0.1: with it few latents learn too slowly, without it many overfit.
    """

    residual: Tensor
    net: Any
    low: Tensor
    high: Tensor

    def __init__(
        self,
        features: int,
        context_features: int,
        *,
        box: Interval | None = None,
        components: int = 8,
        hidden_features: Sequence[int] | None = None,
        shared_features: int | None = None,
        dropout: float | None = None,
    ) -> None:
        super().__init__(features, context_features)
        self.components, self.bounded = components, box is not None and bool(box[0].isfinite().any())
        dropout = min(0.1, 0.05 * max(0, features - 2)) if dropout is None else dropout
        hidden = (min(192, 64 * features),) * 3 if hidden_features is None else hidden_features
        shared = min(128, 64 * features) if shared_features is None else shared_features
        self.reader = Reader(context_features, shared, dropout) if shared else None
        self.net = _masked(features, shared + context_features, 3 * components, hidden, dropout)
        self.linear = nn.Linear(context_features, features)
        low, high = box or (torch.full((features,), -torch.inf), torch.full((features,), torch.inf))
        self.register_buffer("residual", torch.ones(features))
        self.register_buffer("low", low.clamp_min(-_FAR))
        self.register_buffer("high", high.clamp_max(_FAR))
        self._start()
        self.eval()  # dropout is switched on by the loss of simulations, and by nothing else

    def build(self, context: Tensor | None) -> Distribution:
        return AutoregressiveMixture(self, context, self.features)  # type: ignore[arg-type]

    def conditionals(self, x: Tensor, context: Tensor) -> NormalMixture:
        """Of all entries of the vectors x, given those before."""
        centre = self.linear(context)
        numbers = self.net(torch.cat([(x - centre) / self.residual, self._read(context)], -1))
        return self._mixture(numbers.unflatten(-1, (self.features, -1)), centre, self.residual, (self.low, self.high))

    def in_turn(self, context: Tensor, batch: Size) -> Generator[NormalMixture, Tensor, None]:
        """Of the entries one after the other; each is to be sent its value. A unit of the network is computed once."""
        centre, run = self.linear(context).expand(*batch, -1), self._run(context, batch)
        for i in range(self.features):
            numbers = run.outputs(i).mT.reshape(*batch, -1)
            x = yield self._mixture(numbers, centre[..., i], self.residual[i], (self.low[i], self.high[i]))
            run.learn(((x - centre[..., i]) / self.residual[i]).reshape(1, -1))

    def _read(self, context: Tensor) -> Tensor:
        return context if self.reader is None else torch.cat([self.reader(context), context], -1)

    def _run(self, context: Tensor, batch: Size) -> Run:
        linears: list[Any] = [layer for layer in self.net if isinstance(layer, nn.Linear)]
        order = torch.arange(self.features, device=context.device)
        passes = schedule(order, [layer.mask for layer in linears], 3 * self.components)
        return Run(linears, [nn.functional.silu] * (len(linears) - 1), passes, self._read(context), batch)

    def _mixture(self, numbers: Tensor, centre: Tensor, scale: Tensor, box: Interval) -> NormalMixture:
        weight, loc, raw = numbers.unflatten(-1, (self.components, 3)).unbind(-1)
        log_scale = scale.log().unsqueeze(-1) + raw / (1.0 + raw.abs() / _SOFT_BOUND)
        loc = torch.addcmul(centre.unsqueeze(-1), scale.unsqueeze(-1), loc)
        return NormalMixture(weight, loc, log_scale, box if self.bounded else None)

    @torch.no_grad()
    def _start(self) -> None:
        """Components side by side, together nearly a standard normal, whatever the context."""
        for tensor in self.linear.parameters():
            tensor.zero_()
        self.net[-1].weight.mul_(0.1)
        numbers = self.net[-1].bias.view(self.features, self.components, 3)
        numbers[..., 0], numbers[..., 2] = 0.0, -0.2
        numbers[..., 1] = torch.linspace(-0.9, 0.9, self.components)

    @torch.no_grad()
    def regress(self, context: Tensor, u: Tensor, ridge: float = 1e-3) -> None:
        """Start at the linear Gaussian that fits rows ``(N, C)`` and ``(N, D)``."""
        rows = torch.cat([context, torch.ones_like(context[:, :1])], -1).double()
        gram = rows.mT @ rows / len(rows) + ridge * torch.eye(rows.shape[-1]).to(rows)
        weights = torch.linalg.solve(gram, rows.mT @ u.double() / len(rows))
        self.linear.weight.copy_(weights[:-1].mT), self.linear.bias.copy_(weights[-1])
        self.residual.copy_((u - self.linear(context)).std(0).clamp_min(1e-3))


def _masked(features: int, context_features: int, numbers: int, hidden: Sequence[int], dropout: float) -> nn.Sequential:
    """A network whose outputs for entry i see the entries before it, and what is known from the start."""
    order = torch.arange(features)
    sees = torch.cat([order[:, None] > order, torch.ones(features, context_features, dtype=torch.bool)], 1)
    layers = zuko.nn.MaskedMLP(sees.repeat_interleave(numbers, 0), hidden, activation=nn.SiLU)
    return nn.Sequential(*(n for m in layers for n in ((m, nn.Dropout(dropout)) if isinstance(m, nn.SiLU) else (m,))))
