r"""Entries of a likelihood: raw network outputs to a distribution, for ``Conditional(event_shape, latent, make)``.

Each takes unconstrained tensors and says in its arguments how they are read. Any function like these will do.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from pyro.infer.util import is_validation_enabled
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_dgm.core.kinds import checked
from pyro_dgm.core.module import has_finite_numbers, looks_at_numbers
from pyro_dgm.core.shapes import as_tensor_like, broadcast_batch, check_number, check_support, of_entries
from pyro_dgm.core.warn import in_short

__all__ = [
    "DiscretizedLogistic",
    "arguments_of",
    "bernoulli",
    "categorical",
    "columns",
    "continuous_bernoulli",
    "discretized_logistic",
    "in_data_units",
    "kinds_of",
    "log_normal",
    "negative_binomial",
    "normal",
    "poisson",
    "refuse_outside",
    "zero_inflated_negative_binomial",
    "zero_inflated_poisson",
]

_CHECKED_ROWS = 32  # looked at before the likelihood scores all rows; not measured, chosen by hand


Make = TypeVar("Make", bound=Callable[..., TorchDistribution])


def arguments_of(make: Callable[..., TorchDistribution]) -> list[str]:
    """The names of the raw tensors that an entry function takes."""
    if isinstance(make, type):
        raise TypeError(f"{make.__name__} is made with arguments first, as by vae.categorical(4) for four classes.")
    names = getattr(make, "arguments", None)
    if names is None:
        try:
            found = dict(inspect.signature(make).parameters)
        except ValueError:  # of what is written in C
            found = {}
        names = [k for k, p in found.items() if p.kind is not p.POSITIONAL_ONLY]
    if not names:
        raise TypeError(f"{make!r} takes no tensors by name; expected an entry function such as vae.normal.")
    return list(names)


def _entries(make: Make) -> Make:
    """An entry function that converts arguments which are no tensors, and refuses in one line those that do not fit."""
    names = list(inspect.signature(make).parameters)

    @functools.wraps(make)
    def door(*args: Any, **kwargs: Any) -> TorchDistribution:
        given = dict(zip(names, args, strict=False)) | kwargs
        if not all(
            isinstance(v, Tensor) and v.is_floating_point() and v.layout is torch.strided and not v.is_nested
            for v in given.values()
        ):
            given = {k: _as_float(make.__name__, k, v) for k, v in given.items()}
        try:
            made = make(**given)
            if looks_at_numbers() and not has_finite_numbers(made):
                raise ValueError("infinite parameters")
            return made
        except (ValueError, RuntimeError) as error:
            shapes = ", ".join(f"{k} {tuple(v.shape)} up to {_largest(v):.3g}" for k, v in given.items())
            raise ValueError(
                f"{make.__name__}: no distribution has these arguments: {shapes}. Their shapes must broadcast, and no "
                "exponential may overflow: bring what a network reads to the unit scale (Standardize)."
            ) from error

    return cast(Make, door)


def _as_float(who: str, name: str, value: Any) -> Tensor:
    kept = isinstance(value, Tensor) and value.is_floating_point()
    value = as_tensor_like(who, name, value, None)
    return value if kept else value.to(torch.get_default_dtype())


def _largest(x: Tensor) -> float:
    return float(x.detach().to_dense().abs().max()) if x.numel() and not x.is_meta else 0.0


@_entries
def bernoulli(logits: Tensor) -> TorchDistribution:
    """Binary entries. Grey levels are refused: binarise them anew at each step (``Transformed(bound, torch.bernoulli)``)."""
    return dist.Bernoulli(logits=logits)


@_entries
def continuous_bernoulli(logits: Tensor) -> TorchDistribution:
    """Grey levels in [0, 1], with the normalising constant that cross-entropy on grey levels lacks."""
    return dist.ContinuousBernoulli(logits=logits)


@_entries
def normal(loc: Tensor, log_scale: Tensor) -> TorchDistribution:
    """Real entries; put ``shared=("log_scale",)`` for one learned scale per entry instead of one per entry and datum."""
    return dist.Normal(loc, log_scale.exp())


@_entries
def log_normal(loc: Tensor, log_scale: Tensor) -> TorchDistribution:
    """Positive entries whose logarithms are normal, such as incomes and concentrations; a zero is refused."""
    return dist.LogNormal(loc, log_scale.exp())


@_entries
def poisson(log_rate: Tensor) -> TorchDistribution:
    """Counts."""
    return dist.Poisson(log_rate.exp())


@_entries
def negative_binomial(log_mean: Tensor, log_dispersion: Tensor) -> TorchDistribution:
    r"""Overdispersed counts with mean :math:`\mu` and variance :math:`\mu + \mu^2 / r`, :math:`r` = exp(log_dispersion)."""
    return dist.NegativeBinomial(log_dispersion.exp(), logits=log_mean - log_dispersion)


@_entries
def zero_inflated_poisson(log_rate: Tensor, gate_logits: Tensor) -> TorchDistribution:
    """Counts with additional zeros, which have probability sigmoid(gate_logits)."""
    return dist.ZeroInflatedPoisson(log_rate.exp(), gate_logits=gate_logits)


@_entries
def zero_inflated_negative_binomial(log_mean: Tensor, log_dispersion: Tensor, gate_logits: Tensor) -> TorchDistribution:
    """Overdispersed counts with additional zeros, which have probability sigmoid(gate_logits)."""
    return dist.ZeroInflatedNegativeBinomial(
        log_dispersion.exp(), logits=log_mean - log_dispersion, gate_logits=gate_logits
    )


class categorical:
    """Entries in ``0 .. classes - 1``.

    >>> categorical(3)(logit_0=torch.zeros(5), logit_1=torch.zeros(5), logit_2=torch.zeros(5)).batch_shape
    torch.Size([5])
    """

    @checked()
    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.arguments = [f"logit_{k}" for k in range(classes)]

    def __call__(self, **logits: Tensor) -> TorchDistribution:
        return dist.Categorical(logits=torch.stack([logits[k] for k in self.arguments], -1))


class discretized_logistic:
    """Entries in ``0 .. levels - 1`` with an order, such as grey levels; location and scale in units of half the range.

    >>> discretized_logistic(256)(torch.zeros(5), torch.zeros(5)).mean
    tensor([127.5000, 127.5000, 127.5000, 127.5000, 127.5000])
    """

    arguments = ("loc", "log_scale")

    @checked()
    def __init__(self, levels: int = 256) -> None:
        self.levels = levels

    def __call__(self, loc: Tensor, log_scale: Tensor) -> TorchDistribution:
        half = 0.5 * (self.levels - 1)
        return DiscretizedLogistic(half * (1.0 + loc), half * log_scale.exp(), self.levels)


class DiscretizedLogistic(TorchDistribution):
    r"""Levels with the mass of a logistic over unit bins.

    .. math:: P(k) = \sigma((k + 0.5 - \mu) / s) - \sigma((k - 0.5 - \mu) / s)

    The first and the last bin reach to infinity, so the masses sum to one. ``log_prob`` is in nats per entry; bits per
    dimension are its negative mean over log 2.

    Args:
        loc, scale: of the logistic, in units of levels.
        levels: the support is ``0 .. levels - 1``.

    References:
        | Salimans et al. (2017), "PixelCNN++", arXiv 1701.05517, eq. 2.

    Example:
        >>> d = DiscretizedLogistic(torch.tensor(3.0), torch.tensor(2.0), 8)
        >>> bool((d.log_prob(torch.arange(8.0)).exp().sum() - 1.0).abs() < 1e-6)
        True
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(self, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None) -> None:
        check_number("DiscretizedLogistic", "levels", levels, least=2, whole=True)
        loc = _as_float("DiscretizedLogistic", "loc", loc)
        scale = _as_float("DiscretizedLogistic", "scale", scale)
        broadcast_batch("DiscretizedLogistic", loc.shape, scale.shape)
        validate = self._validate_args if validate_args is None else validate_args
        if validate and not bool(loc.isfinite().all() & (scale > 0).all() & scale.isfinite().all()):
            raise ValueError("DiscretizedLogistic: loc and scale have to be finite, and scale above 0.")
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """The location, kept inside the range (the mean of the logistic before its tails are cut)."""
        return self.loc.clamp(0.0, self.levels - 1.0)

    def expand(self, batch_shape: Size, _instance: TorchDistribution | None = None) -> DiscretizedLogistic:
        return DiscretizedLogistic(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.levels, False)

    @torch.no_grad()
    def sample(self, sample_shape: Iterable[int] = ()) -> Tensor:
        u = torch.rand(self._extended_shape(Size(sample_shape)), dtype=self.loc.dtype, device=self.loc.device)
        tiny = torch.finfo(u.dtype).tiny
        return (self.loc + self.scale * torch.logit(u, eps=tiny)).round().clamp(0.0, self.levels - 1.0)

    def log_prob(self, value: Tensor) -> Tensor:
        value = as_tensor_like("DiscretizedLogistic", "value", value, self.loc)
        broadcast_batch("DiscretizedLogistic", value.shape, self.batch_shape)
        if self._validate_args:
            check_support("DiscretizedLogistic", value, self.support, False)
        above = (value + 0.5 - self.loc) / self.scale
        below = (value - 0.5 - self.loc) / self.scale
        first = value <= 0
        last = value >= self.levels - 1
        up = F.logsigmoid(above).masked_fill(last, 0.0)
        down = F.logsigmoid(-below).masked_fill(first, 0.0)
        between = torch.log(-torch.expm1(-1.0 / self.scale)).masked_fill(first | last, 0.0)
        return up + down + between


class columns:
    """Columns of different kinds: one entry function per column, as in ``columns([normal, normal, poisson, bernoulli])``.

    The arguments are as many as the longest kind has; a kind with fewer uses the first ones.

    >>> make = columns([normal, poisson, bernoulli])
    >>> make(torch.zeros(5, 3), torch.zeros(5, 3)).sample().shape
    torch.Size([5, 3])
    """

    @checked()
    def __init__(self, kinds: Sequence[Callable[..., TorchDistribution]]) -> None:
        if not kinds:
            raise ValueError("columns: no kinds, expected one function for each column.")
        self.kinds = [*kinds]
        self.groups = [
            (kind, arguments_of(kind), [i for i, k in enumerate(kinds) if k is kind]) for kind in dict.fromkeys(kinds)
        ]
        self.arguments = [f"raw_{i}" for i in range(max(len(names) for _, names, _ in self.groups))]

    def __call__(self, *raw: Tensor, **named: Tensor) -> TorchDistribution:
        tensors = raw or tuple(named[k] for k in self.arguments)
        if tensors[0].shape[-1:] != (len(self.kinds),):
            raise ValueError(
                f"columns: {len(self.kinds)} kinds of columns for events of shape (..., {tensors[0].shape[-1]})."
            )
        parts = []
        for kind, names, index in self.groups:
            arguments = {name: tensor[..., index] for name, tensor in zip(names, tensors, strict=False)}
            parts.append((kind(**arguments), index))
        return _Columns(parts, tensors[0].shape)


class _ColumnSupport(constraints.Constraint):
    """Each column in the support of its own kind."""

    def __init__(self, parts: list[tuple[TorchDistribution, list[int]]]) -> None:
        self.parts = [(d.support, index) for d, index in parts]
        self.is_discrete = any(s.is_discrete for s, _ in self.parts)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        inside = torch.ones_like(value, dtype=torch.bool)
        for support, index in self.parts:
            inside[..., index] = support.check(value[..., index])
        return inside

    def first_outside(self, x: Tensor) -> str:
        """The first column with an entry outside of its support, and that entry."""
        j = int((~self.check(x)).reshape(-1, x.shape[-1]).any(0).nonzero()[0])
        support = next(support for support, index in self.parts if j in index)
        return f"Column {j} holds {float(x[..., j][~support.check(x[..., j])][0]):.4g}, which is not in {in_short(support)}"


class _Columns(TorchDistribution):
    """Independent columns; the last batch dimension runs over them."""

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, parts: list[tuple[TorchDistribution, list[int]]], shape: Size) -> None:
        self.parts = parts
        super().__init__(shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return _ColumnSupport(self.parts)

    @property
    def mean(self) -> Tensor:
        return self._filled([d.mean for d, _ in self.parts])

    def expand(self, batch_shape: Size, _instance: TorchDistribution | None = None) -> _Columns:
        parts = [(d.expand((*batch_shape[:-1], len(index))), index) for d, index in self.parts]
        return _Columns(parts, Size(batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Iterable[int] = ()) -> Tensor:
        return self._filled([d.sample(Size(sample_shape)) for d, _ in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        return self._filled([d.log_prob(value[..., index]) for d, index in self.parts])

    def _filled(self, values: list[Tensor]) -> Tensor:
        order = torch.tensor([i for _, index in self.parts for i in index], device=values[0].device)
        return torch.cat([v.to(values[0].dtype) for v in values], -1)[..., order.argsort()]


def kinds_of(make: Callable[..., TorchDistribution], entries: int) -> list[Callable[..., TorchDistribution]]:
    """The entry function of each of so many entries.

    >>> [kind.__name__ for kind in kinds_of(columns([normal, poisson]), 2)]
    ['normal', 'poisson']
    """
    return make.kinds if isinstance(make, columns) else [make] * entries


def in_data_units(entries: TorchDistribution, loc: Tensor, scale: Tensor) -> TorchDistribution:
    """The distribution of ``loc + scale * x`` for normal entries, of the logarithms for log-normal ones, also among columns."""
    if isinstance(entries, _Columns):
        parts = [(in_data_units(d, loc[..., i], scale[..., i]), i) for d, i in entries.parts]
        return _Columns(parts, entries.batch_shape)
    if not isinstance(entries, dist.Normal | dist.LogNormal):
        return entries
    return type(entries)(torch.addcmul(loc, scale, entries.loc), scale * entries.scale)


def refuse_outside(likelihood: TorchDistribution, x: Tensor, *, few: bool = False) -> Tensor:
    """Data must lie in the likelihood's support (asked while Pyro validates); x is returned.

    With ``few`` the first rows are looked at, for a message that helps: a learned likelihood checks all when it scores.
    """
    if not is_validation_enabled() or not x.numel():
        return x
    seen = x[:_CHECKED_ROWS] if few else x
    if seen.is_floating_point() and not bool(seen.isfinite().all()):
        raise ValueError(
            f"VAE: x holds {int((~x.isfinite()).sum())} NaN or infinite entries. Pass mask= (True where seen) and put any "
            "number into the unseen entries: x.nan_to_num()."
        )
    if not bool(likelihood.support.check(seen).all()):
        raise ValueError(
            f"VAE: x lies outside the likelihood's support {in_short(likelihood.support)}. {_advice(likelihood.support, seen)}"
        )
    return x


def _advice(support: constraints.Constraint, x: Tensor) -> str:
    low, high = float(x.min()), float(x.max())
    grey = x.is_floating_point() and 0.0 <= low and high <= 1.0
    if of_entries(support) is constraints.boolean and grey:
        return (
            "Grey levels have no Bernoulli likelihood: binarise them, torch.bernoulli(x) at each step (Transformed), or "
            "use vae.continuous_bernoulli."
        )
    if isinstance(of_entries(support), _ColumnSupport):
        return f"{of_entries(support).first_outside(x)}: clean it, or give the column another kind."
    return f"It ranges over [{low:.4g}, {high:.4g}]: rescale or clean it, or choose another likelihood."
