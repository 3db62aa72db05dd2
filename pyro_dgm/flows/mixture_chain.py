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

An entry on an interval has its mixture cut off at the ends. The constant is exact, and nothing is rejected. An entry that is an
integer n has the mass of its mixture between n - 1/2 and n + 1/2. Draws of the others are differentiable by the implicit
function theorem (Figurnov et al. 2018, arXiv 1805.08498, eq. 3): with the distribution function F, :math:`dx = -dF / q(x)` at a
fixed x.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_dgm.core import DistributionModule, Standardize, zuko
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.networks import LOG_WIDTHS, Reader, chosen_place_and_width, soft_clip
from pyro_dgm.core.upstream import Columns, integer_ends
from pyro_dgm.core.warn import in_short
from pyro_dgm.flows.autoregressive import Run, schedule
from pyro_dgm.flows.normal_mixture import Interval, NormalMixture

__all__ = ["AutoregressiveMixture", "MixtureChain"]

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


class AutoregressiveMixture(TorchDistribution):
    r"""The distribution of a vector, :math:`q(x) = \prod_i q_i(x_i \mid x_{<i}, c)`: scored in one pass, drawn in D.

    Args:
        chain: gives the mixtures.
        context: shape ``(*batch, C)``.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, chain: MixtureChain, context: Tensor) -> None:
        self.chain = chain
        self.context = context
        self.has_rsample = not chain.discrete
        super().__init__(context.shape[:-1], chain.offset.shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The reals, and integers in discrete columns."""
        if not self.chain.discrete:
            return constraints.real_vector
        return Columns([self.chain.discrete.get(i, constraints.real) for i in range(self.event_shape[0])])

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

    Columns may be integers, so that a table of numbers, counts and categories has one exact likelihood: the density of the
    real columns times the mass of the ``discrete`` ones,

    .. math:: P(x_i = n \mid x_{<i}, c) = \sum_k w_{ik} \big(\Phi(\tfrac{n + 1/2 - m_{ik}}{s_{ik}})
              - \Phi(\tfrac{n - 1/2 - m_{ik}}{s_{ik}})\big),

    without noise that is added to them. Such a chain has no path gradients. Categories are told by their codes: more of
    them than ``components``, in no order, are fitted roughly.

    Args:
        event_shape: an int (a vector) or a shape; D numbers.
        context_features: length C of the context's last dimension.
        support: constraint of the event, through ``biject_to``.
        box: lower and upper ends of the entries, each ``(D,)``, infinite where there is none: every mixture is cut off
            there, with its exact constant. The density outside is 0, which the support does not say. None for no box.
        discrete: of an event that is a vector, the columns that are integers, with their supports:
            ``{2: constraints.boolean, 3: constraints.nonnegative_integer, 4: constraints.integer_interval(1, 5)}``.
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
        >>> mixed = MixtureChain(2, discrete={1: constraints.integer_interval(0, 3)})
        >>> rows = torch.stack([torch.zeros(4), torch.arange(4.0)], -1)
        >>> joint = mixed().log_prob(rows).exp()     # the density of 0.0, times the masses of 0, 1, 2 and 3
        >>> joint.shape, mixed().support
        (torch.Size([4]), Columns(Real(), IntegerInterval(lower_bound=0, upper_bound=3)))
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
    integer: Tensor

    @checked(components=1, hidden_features=1, dropout=0)
    def __init__(
        self,
        event_shape: int | Iterable[int],
        context_features: int = 0,
        *,
        support: constraints.Constraint | None = None,
        box: Interval | None = None,
        discrete: Mapping[int, constraints.Constraint] | None = None,
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
        self.reader = Reader(seen, shared_features, dropout) if shared_features else None
        self.net = _masked(size, shared_features + seen, 3 * (components + 1), hidden_features, dropout)
        self.linear = nn.Linear(seen, size)
        self.standard = Standardize(size)
        self.discrete = _checked_columns(self, discrete or {})
        low, high = _ends(box, self.discrete, size)
        for name in ("", "log_"):
            self.register_buffer(f"{name}slope", torch.zeros(size, seen))
            self.register_buffer(f"{name}offset", torch.zeros(size))
        self.register_buffer("least", torch.full((seen,), -torch.inf))
        self.register_buffer("most", torch.full((seen,), torch.inf))
        self.register_buffer("counts", torch.zeros(seen, dtype=torch.bool))
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("integer", torch.tensor([i in self.discrete for i in range(size)]), persistent=False)
        self.bounded = bool(low.isfinite().any() | high.isfinite().any())
        self._start()
        self.eval()

    def build(self, context: Tensor | None) -> AutoregressiveMixture:
        return AutoregressiveMixture(self, self.offset.new_zeros(1) if context is None else context)

    def conditionals(self, x: Tensor, context: Tensor) -> NormalMixture:
        """The mixtures of all entries of the vectors x, each given those before it; batch ``(..., D)``."""
        around = self._around(context)
        seen = self._read(around.context).expand(*x.shape[:-1], -1)  # read before it is repeated
        numbers = self.net(torch.cat([around.standard(self._in_units(x, slice(None))), seen], -1))
        return self._mixture(numbers.unflatten(-1, (self.features, -1)), around, slice(None))

    def in_turn(self, context: Tensor, batch: Size) -> Generator[NormalMixture, Tensor, None]:
        """The mixtures one after the other; each is to be sent its value. A unit of the network is computed once."""
        around = self._around(context).expand(batch)
        run = self._run(around.context, batch)
        for i in range(self.features):
            numbers = run.outputs(i).mT.reshape(*batch, -1)
            here = around.entry(i)
            x = yield self._mixture(numbers, here, i)
            run.learn(here.standard(self._in_units(x, i)).reshape(1, -1))

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

    def _mixture(self, numbers: Tensor, around: _Around, entries: int | slice) -> NormalMixture:
        weight, loc, raw = numbers.unflatten(-1, (self.components + 1, 3)).unbind(-1)
        relative = torch.where(raw > 0.0, soft_clip(raw, _WIDEST_LOG_SCALE), soft_clip(raw, _LOG_SCALE_BOUND))
        centre, width, shift = around.of(self.components)
        fading = _FADING * around.log_scale.clamp_max(0.0).unsqueeze(-1)
        weight = weight + nn.functional.pad(fading, (self.components, 0))
        loc = centre + width.exp() * (shift + loc)
        return self._of_events(weight, loc, width + relative, entries)

    def _in_units(self, x: Tensor, entries: int | slice) -> Tensor:
        """Entries of events in the units of the chain."""
        if self.standard.is_identity():
            return x
        return (x - self.standard.loc[entries]) / self.standard.scale[entries]

    def _of_events(self, weight: Tensor, loc: Tensor, log_scale: Tensor, entries: int | slice) -> NormalMixture:
        """The mixtures in the units of the events."""
        if not self.standard.is_identity():
            middle, sd = (t[entries].unsqueeze(-1) for t in (self.standard.loc, self.standard.scale))
            loc, log_scale = middle + sd * loc, log_scale + sd.log()
        interval = (self.low[entries], self.high[entries]) if self.bounded else None
        return NormalMixture(weight, loc, log_scale, interval, self.integer[entries] if self.discrete else None)

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

    def event_units(self) -> Standardize:
        return self.standard

    def fit_events(self, x: Tensor) -> None:
        """Mean 0 and sd 1 before the chain, of data ``(..., *event_shape)``; the few farthest values have no say."""
        self.standard.forget()
        to_event = self.bijection(self.build(self.offset.new_zeros(self.context_features)))
        rows = (x if to_event is None else to_event.inv(x)).reshape(-1, self.features)
        self.standard.fit(rows, tails="cut", who=type(self).__name__)

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


def _checked_columns(
    chain: MixtureChain, discrete: Mapping[int, constraints.Constraint]
) -> dict[int, constraints.Constraint]:
    """Supports of discrete columns, refused where the event is no plain vector or a support is not of integers."""
    if not discrete:
        return {}
    if len(chain.event_shape) != 1 or chain._support is not None:
        raise ValueError(
            f"MixtureChain: discrete columns of an event of shape {tuple(chain.event_shape)}"
            f"{'' if chain._support is None else f' on {in_short(chain._support)}'}, expected a vector on the reals, "
            "event_shape=D."
        )
    for i, support in discrete.items():
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < chain.features:
            raise ValueError(f"MixtureChain: discrete column {i!r}, expected one of 0 to {chain.features - 1}.")
        if not (isinstance(support, constraints.Constraint) and support.is_discrete and integer_ends(support)):
            raise ValueError(
                f"MixtureChain: discrete column {i} on {in_short(support)}, expected constraints.boolean, .nonnegative_integer, "
                "or .integer_interval(a, b)."
            )
    return dict(discrete)


def _ends(box: Interval | None, discrete: Mapping[int, constraints.Constraint], size: int) -> Interval:
    """Ends of all entries; of integers half a step beyond the last ones."""
    if box is not None and not all(end.shape == (size,) for end in box):
        raise ValueError(f"MixtureChain: box of shapes {[tuple(e.shape) for e in box]}, expected ({size},).")
    low, high = (e.clone() for e in box) if box else (torch.full((size,), end) for end in (-torch.inf, torch.inf))
    for i, support in discrete.items():
        least, most = integer_ends(support) or (-torch.inf, torch.inf)
        low[i], high[i] = least - 0.5, most + 0.5
    return low, high


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
