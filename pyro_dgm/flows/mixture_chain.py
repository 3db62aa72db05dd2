r"""An autoregressive chain of mixtures of normals (MADE-MoG), around a linear regression on the context.

.. math:: q(x \mid c) = \prod_i q_i(x_i \mid x_{<i}, c), \qquad
          q_i(x) = \frac{\sum_k w_k N(x; m_k, s_k)}
                        {\sum_k w_k \big(\Phi(\tfrac{b_i - m_k}{s_k}) - \Phi(\tfrac{a_i - m_k}{s_k})\big)}, \qquad a_i < x < b_i

One masked network gives the weights, places and widths of all mixtures from the entries before each, from the context, and
from features of the context that all of them share (Germain et al. 2015, arXiv 1502.03509; Bishop 1994, "Mixture density
networks"). Places and widths are relative to a regression with a width of its own,

.. math:: A c + a \pm \exp(B c + b),

so that a linear Gaussian is nearly there from the start, and so is a posterior whose width shrinks with the number of data
over decades. The networks see a context inside the range of that regression's rows only; outside, the regression goes on.
One more component is as wide as all rows: few data leave long tails, in which the density must not vanish.

An entry on an interval has its mixture cut off at the ends. The constant is exact, and nothing is rejected. Draws are
differentiable by the implicit function theorem (Figurnov et al. 2018, arXiv 1805.08498, eq. 3): with the distribution
function F, :math:`dx = -dF / q(x)` at a fixed x.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_dgm.core import DistributionModule, zuko
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.networks import LOG_WIDTHS, Reader, chosen_place_and_width, soft_clip
from pyro_dgm.core.weights import gumbels_like
from pyro_dgm.flows.autoregressive import Run, schedule

__all__ = ["AutoregressiveMixture", "Interval", "MixtureChain", "NormalMixture", "log_ndtr"]

Interval = tuple[Tensor, Tensor]

# Widths and dropout, as found on the four simulators of docs/benchmarks/sbi.md (held-out loss, 10,000 simulations, nats).
_WIDTH = 64  # units of a layer for each entry
_LAYERS = 3  # of the masked network
_WIDEST = 192  # units of its layers at most
_WIDEST_SHARED = 128  # shared features at most; slcp 3.75 without any, 3.55 with plain layers, 3.30 with gated blocks
_DROPOUT = 0.05  # for each entry beyond two; slcp 3.30 without, 3.18 with
_MOST_DROPOUT = 0.1
_LOG_SCALE_BOUND = 6.0  # on minus the log scale relative to the regression; not measured, chosen by hand
_RARE = -4.0  # log weight of the component that is as wide as all rows, at the start; not measured, chosen by hand
_FADING = 2.0  # power of the width in its weight: so its share of the variance does not grow as widths shrink
_WIDEST_LOG_SCALE = 2.0  # on the log scale; with 6 a set of three rows whose sd is 0.004 gave infinite draws

# Numbers that float32 asks for.
_INFINITE = 1e4  # what stands for an infinite end, whose gradients are NaN
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
        self.log_weight = torch.log_softmax(log_weight, -1)
        self.loc = loc
        self.log_scale = log_scale
        self.interval = interval
        self.ends: Interval | None = None
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
        moved = self.cdf(x)
        density = self.log_prob(x).detach().exp()
        return x - (moved - moved.detach()) / density.clamp_min(1e-12)

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


class AutoregressiveMixture(TorchDistribution):
    r"""The distribution of a vector, :math:`q(x) = \prod_i q_i(x_i \mid x_{<i}, c)`: scored in one pass, drawn in D.

    Args:
        chain: gives the mixtures.
        context: shape ``(*batch, C)``.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True
    support = constraints.real_vector

    def __init__(self, chain: MixtureChain, context: Tensor) -> None:
        self.chain = chain
        self.context = context
        super().__init__(context.shape[:-1], chain.offset.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> AutoregressiveMixture:
        return AutoregressiveMixture(self.chain, self.context.expand(*batch_shape, -1))

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.expand(*torch.broadcast_shapes(value.shape[:-1], self.batch_shape), -1)
        return self.chain.conditionals(value, self.context).log_prob(value).sum(-1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        entries = self.chain.in_turn(self.context, Size(sample_shape) + self.batch_shape)
        x = [next(entries).rsample()]
        for _ in range(self.event_shape[0] - 1):
            x.append(entries.send(x[-1]).rsample())
        return torch.stack(x, -1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.rsample(sample_shape)


class MixtureChain(DistributionModule):
    r"""A chain of mixtures of normals: :math:`q(x \mid c) = \prod_i \sum_k w_{ik} N(x_i; m_{ik}, s_{ik})`.

    Weights, places and widths of an entry's mixture follow the entries before it and the context. Densities take one pass of the
    network, and draws, entry by entry, compute about as much; they have path gradients. It is the default family of
    :class:`~pyro_dgm.AmortizedGuide`: few steps bring it near a posterior, several modes and sharp edges included. It is no
    transform of a base, so it has no codes and no NeuTra.

    Args:
        event_shape: an int (a vector) or a shape; D numbers.
        context_features: length C of the context's last dimension.
        support: constraint of the event, through ``biject_to``.
        box: lower and upper ends of the entries, each ``(D,)``, infinite where there is none: every mixture is cut off
            there, with its exact constant. The density outside is 0, which the support does not say. None for no box.
        components: of each mixture, beside the wide one.
        hidden_features: of the masked network; None for three layers of 64 D units, 192 at most.
        shared_features: of the context; None for 64 D, 128 at most. 0 for none, where the context is a learned summary.
        dropout: share of hidden units that a step in training mode leaves out; None for 0.05 (D - 2), between 0 and 0.1: with
            it few entries learn too slowly, without it many overfit. A chain is built in eval mode; ``train()`` switches dropout
            on, and so does :class:`~pyro_dgm.ForwardKL` in its steps on a fixed budget of simulations.

    Example:
        >>> import torch
        >>> from pyro_dgm.flows import MixtureChain
        >>> chain = MixtureChain(2, context_features=3, box=(torch.zeros(2), torch.ones(2)))
        >>> q = chain(torch.zeros(5, 3))
        >>> x = q.sample((7,))
        >>> x.shape, q.log_prob(x).shape, bool(((0 <= x) & (x <= 1)).all())
        (torch.Size([7, 5, 2]), torch.Size([7, 5]), True)
    """

    slope: Tensor
    offset: Tensor
    log_slope: Tensor
    log_offset: Tensor
    least: Tensor
    most: Tensor
    counts: Tensor
    low: Tensor
    high: Tensor

    @checked(components=1, hidden_features=1, dropout=0)
    def __init__(
        self,
        event_shape: int | Iterable[int],
        context_features: int = 0,
        *,
        support: constraints.Constraint | None = None,
        box: Interval | None = None,
        components: int = 8,
        hidden_features: Sequence[int] | None = None,
        shared_features: int | None = None,
        dropout: float | None = None,
    ) -> None:
        if dropout is not None and dropout > 1.0:
            raise ValueError(f"MixtureChain: dropout={dropout}, expected a share between 0 and 1.")
        super().__init__(event_shape, context_features, support=support)
        size = self.features
        seen = max(1, context_features)  # without a context one zero takes its place
        dropout = min(_MOST_DROPOUT, _DROPOUT * max(0, size - 2)) if dropout is None else dropout
        hidden_features = (min(_WIDEST, _WIDTH * size),) * _LAYERS if hidden_features is None else hidden_features
        shared = min(_WIDEST_SHARED, _WIDTH * size) if context_features else 0
        shared_features = shared if shared_features is None else shared_features
        self.components = components
        self.bounded = box is not None and bool(box[0].isfinite().any())
        self.reader = Reader(seen, shared_features, dropout) if shared_features else None
        self.net = _masked(size, shared_features + seen, 3 * (components + 1), hidden_features, dropout)
        self.linear = nn.Linear(seen, size)
        if box is not None and not all(end.shape == (size,) for end in box):
            raise ValueError(f"MixtureChain: box of shapes {[tuple(e.shape) for e in box]}, expected ({size},).")
        low, high = box or (torch.full((size,), end) for end in (-torch.inf, torch.inf))
        for name in ("", "log_"):
            self.register_buffer(f"{name}slope", torch.zeros(size, seen))
            self.register_buffer(f"{name}offset", torch.zeros(size))
        self.register_buffer("least", torch.full((seen,), -torch.inf))
        self.register_buffer("most", torch.full((seen,), torch.inf))
        self.register_buffer("counts", torch.zeros(seen, dtype=torch.bool))
        self.register_buffer("low", low.clamp_min(-_INFINITE))
        self.register_buffer("high", high.clamp_max(_INFINITE))
        self._start()
        self.eval()

    def build(self, context: Tensor | None) -> AutoregressiveMixture:
        return AutoregressiveMixture(self, self.offset.new_zeros(1) if context is None else context)

    def conditionals(self, x: Tensor, context: Tensor) -> NormalMixture:
        """The mixtures of all entries of the vectors x, each given those before it; batch ``(..., D)``."""
        around = self._around(context)
        seen = self._read(around.context).expand(*x.shape[:-1], -1)  # read before it is repeated
        numbers = self.net(torch.cat([around.standard(x), seen], -1))
        return self._mixture(numbers.unflatten(-1, (self.features, -1)), around, (self.low, self.high))

    def in_turn(self, context: Tensor, batch: Size) -> Generator[NormalMixture, Tensor, None]:
        """The mixtures one after the other; each is to be sent its value. A unit of the network is computed once."""
        around = self._around(context).expand(batch)
        run = self._run(around.context, batch)
        for i in range(self.features):
            numbers = run.outputs(i).mT.reshape(*batch, -1)
            here = around.entry(i)
            x = yield self._mixture(numbers, here, (self.low[i], self.high[i]))
            run.learn(here.standard(x).reshape(1, -1))

    def _around(self, context: Tensor) -> _Around:
        """Where the regression puts the entries, and the context inside the range of its rows."""
        inside = torch.minimum(torch.maximum(context, self.least), self.most)
        counted = torch.where(self.counts, inside, context)  # the place of a large set is that of its statistics
        width = torch.where(self.counts, context, inside)  # and its width follows their number
        centre = counted @ self.slope.mT + self.offset
        log_scale = (width @ self.log_slope.mT + self.log_offset).clamp(*LOG_WIDTHS)
        return _Around(inside, centre, log_scale, self.linear(inside))

    def _read(self, context: Tensor) -> Tensor:
        return context if self.reader is None else torch.cat([self.reader(context), context], -1)

    def _run(self, context: Tensor, batch: Size) -> Run:
        linears: list[Any] = [layer for layer in self.net if isinstance(layer, nn.Linear)]
        order = torch.arange(self.features, device=context.device)
        passes = schedule(order, [layer.mask for layer in linears], 3 * (self.components + 1))
        return Run(linears, [nn.functional.silu] * (len(linears) - 1), passes, self._read(context), batch)

    def _mixture(self, numbers: Tensor, around: _Around, interval: Interval) -> NormalMixture:
        weight, loc, raw = numbers.unflatten(-1, (self.components + 1, 3)).unbind(-1)
        relative = torch.where(raw > 0.0, soft_clip(raw, _WIDEST_LOG_SCALE), soft_clip(raw, _LOG_SCALE_BOUND))
        centre, width, shift = around.of(self.components)
        fading = _FADING * around.log_scale.clamp_max(0.0).unsqueeze(-1)
        weight = weight + nn.functional.pad(fading, (self.components, 0))
        loc = centre + width.exp() * (shift + loc)
        return NormalMixture(weight, loc, width + relative, interval if self.bounded else None)

    @torch.no_grad()
    def _start(self) -> None:
        """Components side by side, together nearly a standard normal, whatever the context."""
        for tensor in self.linear.parameters():
            tensor.zero_()
        last: Any = self.net[-1]
        last.weight.mul_(0.1)
        numbers = last.bias.view(self.features, self.components + 1, 3)
        numbers.zero_()
        numbers[..., -1, 0] = _RARE
        numbers[..., :-1, 1] = torch.linspace(-0.9, 0.9, self.components)
        numbers[..., :-1, 2] = -0.2

    @torch.no_grad()
    def regress(
        self,
        context: Tensor,
        x: Tensor,
        steady: Tensor | None = None,
        counts: Tensor | None = None,
        bent: Tensor | None = None,
    ) -> None:
        """Start at the linear Gaussian that fits rows ``(N, C)`` and ``(N, D)``, with a width that is linear too.

        Args:
            steady: features of the context that training does not change, of shape ``(C,)``; None for all. The others have
                no part in the regression.
            counts: those that say how many data there are. The width follows them beyond the range of the rows, and the place
                does not; with the other features it is the other way round.
            bent: a level above 0 for functions of other features, which an entry takes only where they tell it much.
        """
        steady = torch.ones_like(context[0], dtype=torch.bool) if steady is None else steady
        if bool(steady.any()):
            ours = (self.slope, self.offset, self.log_slope, self.log_offset)
            for own, found in zip(ours, chosen_place_and_width(context, x, steady, counts, bent), strict=True):
                own.copy_(found)
        self.least[steady] = context[:, steady].amin(0)
        self.most[steady] = context[:, steady].amax(0)
        self.counts.copy_(torch.zeros_like(self.counts) if counts is None else counts & steady)


@dataclass(frozen=True)
class _Around:
    """What mixtures are relative to: the networks' context, place and log width of the regression, and a learned shift."""

    context: Tensor
    centre: Tensor
    log_scale: Tensor
    shift: Tensor

    def expand(self, batch: Size) -> _Around:
        own = (self.centre, self.log_scale, self.shift)
        return _Around(self.context, *[t.expand(*batch, -1) for t in own])

    def entry(self, i: int) -> _Around:
        return _Around(self.context, self.centre[..., i], self.log_scale[..., i], self.shift[..., i])

    def of(self, components: int) -> list[Tensor]:
        """Place, log width and shift of each component, ``(..., K + 1)``; the last is around 0, of width 1."""
        own = (self.centre, self.log_scale, self.shift)
        return [nn.functional.pad(t.unsqueeze(-1).expand(*t.shape, components), (0, 1)) for t in own]

    def standard(self, x: Tensor) -> Tensor:
        """Values in the units of the regression, from where it and the shift put them."""
        return (x - self.centre) * torch.exp(-self.log_scale) - self.shift


def _masked(features: int, context_features: int, numbers: int, hidden: Sequence[int], dropout: float) -> nn.Sequential:
    """A network whose outputs for entry i see the entries before it, and what is known from the start."""
    order = torch.arange(features)
    sees = torch.cat([order[:, None] > order, torch.ones(features, context_features, dtype=torch.bool)], 1)
    net = nn.Sequential()
    for layer in zuko.nn.MaskedMLP(sees.repeat_interleave(numbers, 0), hidden, activation=nn.SiLU):
        net.append(layer)
        if isinstance(layer, nn.SiLU):
            net.append(nn.Dropout(dropout))
    return net
