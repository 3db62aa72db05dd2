r"""The default flow of a posterior: affine couplings between learned tails.

:math:`z` is Student-t with learned degrees of freedom, six affine couplings with a linear skip bend it, and an
elementwise sinh-arcsinh map sets skewness and kurtosis (Jones & Pewsey 2009). It starts at the identity with a normal
base. Splines were measured to cost 2-3 times more per step and to reach less on Bayesian posteriors; the couplings are
written out here, since a guide's step is mostly their Python.

A step of Adam moves every weight by about the rate, whatever the gradient. A layer with n inputs that all agree then moves
its output by n times the rate, and six couplings multiply. So the layers that start at zero are scaled by
:math:`1/\sqrt{n}` (Yang & Hu 2021, arXiv 2011.14522, derive such scales for every layer), and a coupling changes a scale by
at most e. Four latents, 60 stock steps, 8 seeds at the rate .05: KL .06-.11; without the two, 3 of 4 seeds overflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from pyro_dgm.core import DistributionModule, zuko
from pyro_dgm.core.module import OnePass
from pyro_dgm.core.networks import soft_clip

__all__ = ["TailedCoupling"]

_LEAST = 1e-6  # 1 / df: nearly normal
_MOST = 2.0 / 3.0  # 1 / df: 1.5 degrees of freedom; not measured, chosen by hand
_SOFT_BOUND = 1.0  # on |log scale| of one coupling; with 2, draws of 60 steps at the rate .1 overflow for 1 of 4 seeds
_RATE = 3e-2  # of averaged weights: the schools take 100 steps, 150 with half of it; three times it is worse on gp_pois_regr
_TAILS = 2.5e-3  # nats that the tails of the start cost where the posterior is normal


class TailedCoupling(DistributionModule):
    """Student-t base, affine couplings with a linear skip, elementwise sinh-arcsinh tails; both directions fast.

    Args:
        event_shape: an int (a vector) or a shape.
        pairs: number of pairs of couplings; a pair changes one half of the coordinates, then the other.
        hidden_features: width of both hidden layers of a conditioner.
    """

    order: Tensor

    def __init__(self, event_shape: int | Sequence[int], *, pairs: int = 3, hidden_features: int = 32) -> None:
        super().__init__(event_shape)
        kept = self.features // 2
        sizes = [(kept, self.features - kept), (self.features - kept, kept)] * (pairs if kept else 0)
        self.couplings = nn.ModuleList(Conditioner(n, 2 * m, hidden_features) for n, m in sizes)
        self.tails = nn.Parameter(torch.zeros(2, self.features))  # rows: skewness, log tail weight
        self.logit_df = nn.Parameter(torch.full((self.features,), -12.0))
        self.register_buffer("order", torch.stack(list(_orders(self.features, pairs))))

    def build(self, context: Tensor | None) -> zuko.distributions.NormalizingFlow:
        couplings = Couplings(list(self.couplings), self.order)
        to_base = zuko.transforms.ComposedTransform(SinhArcsinh(*self.tails.unbind()), couplings)
        return zuko.distributions.NormalizingFlow(to_base, StudentTBase(self.logit_df))

    def soften(self) -> float:
        """It is soft as it is."""
        return _RATE

    @torch.no_grad()
    def start_with_tails(self) -> float:
        """Set the base's degrees of freedom, from which they are learned; returns its standard deviation."""
        df = 4.0 + 6.0 * math.sqrt(self.features / (48.0 * _TAILS))  # its excess kurtosis is 6 / (df - 4)
        share = (1.0 / df - _LEAST) / (_MOST - _LEAST)
        self.logit_df.fill_(math.log(share / (1.0 - share)))
        return math.sqrt(df / (df - 2.0))


class Conditioner(nn.Module):
    """A network with two hidden layers plus a linear map of its input; zero until it is trained."""

    def __init__(self, in_features: int, out_features: int, hidden_features: int) -> None:
        super().__init__()
        self.split = (hidden_features, out_features)
        self.gains = (in_features**-0.5, hidden_features**-0.5)  # of the layers that start at zero
        self.first = nn.Linear(in_features, hidden_features + out_features)
        self.middle = nn.Linear(hidden_features, hidden_features)
        self.last = nn.Linear(hidden_features, out_features)
        with torch.no_grad():
            self.first.weight[hidden_features:] = 0.0
            self.first.bias[hidden_features:] = 0.0
            for tensor in self.last.parameters():
                tensor.zero_()

    def forward(self, x: Tensor) -> Tensor:
        hidden, skip = self.first(x).split(self.split, -1)
        bent = self.last(nn.functional.silu(self.middle(nn.functional.silu(hidden))))
        return torch.add(self.gains[0] * skip, bent, alpha=self.gains[1])


class Couplings(OnePass):
    r"""Affine couplings :math:`b \mapsto b\, e^{s(a)} + t(a)` in pairs, each pair on an order of the coordinates of its own."""

    def __init__(self, conditioners: Sequence[nn.Module], order: Tensor, *, inverted: bool = False) -> None:
        super().__init__()
        self.conditioners = conditioners
        self.order = order
        self.undo = order.argsort(-1)
        self.inverted = inverted

    @property
    def inv(self) -> Couplings:
        return Couplings(self.conditioners, self.order, inverted=not self.inverted)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scales: list[Tensor] = []
        pairs = list(zip(self.order, self.undo, self.conditioners[::2], self.conditioners[1::2], strict=False))
        for order, undo, first, second in reversed(pairs) if self.inverted else pairs:
            x = self._pair(x[..., order], first, second, log_scales)[..., undo]
        total: Any = torch.cat(log_scales, -1).sum(-1) if log_scales else x.new_zeros(x.shape[:-1])
        return x, -total if self.inverted else total

    def _pair(self, x: Tensor, first: nn.Module, second: nn.Module, log_scales: list[Tensor]) -> Tensor:
        a, b = x.tensor_split((x.shape[-1] // 2,), -1)
        if self.inverted:
            a = self._change(a, second(b), log_scales)
            return torch.cat([a, self._change(b, first(a), log_scales)], -1)
        b = self._change(b, first(a), log_scales)
        return torch.cat([self._change(a, second(b), log_scales), b], -1)

    def _change(self, x: Tensor, parameters: Tensor, log_scales: list[Tensor]) -> Tensor:
        shift, raw = parameters.chunk(2, -1)
        log_scale = soft_clip(raw, _SOFT_BOUND)
        log_scales.append(log_scale)
        return (x - shift) * torch.exp(-log_scale) if self.inverted else torch.addcmul(shift, x, log_scale.exp())


def _orders(features: int, pairs: int) -> Iterator[Tensor]:
    """As they come, even before odd, then at random (the same for every guide of this size)."""
    index = torch.arange(features, device="cpu")
    generator = torch.Generator().manual_seed(features)
    for i in range(pairs):
        if i == 0:
            yield index
        elif i == 1:
            yield torch.cat([index[::2], index[1::2]])
        else:
            yield torch.randperm(features, generator=generator, device="cpu")


class SinhArcsinh(Transform):
    r"""The map :math:`x \mapsto \sinh(e^{t}\,\mathrm{asinh}(x) - s)`: skewness s, tail weight t; identity at 0."""

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, skew: Tensor, log_tail: Tensor) -> None:
        super().__init__()
        self.skew = skew
        self.log_tail = log_tail

    def _call(self, x: Tensor) -> Tensor:
        return torch.sinh(self.log_tail.exp() * torch.asinh(x) - self.skew)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.sinh((torch.asinh(y) + self.skew) * torch.exp(-self.log_tail))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.log_tail + 0.5 * (torch.log1p(y.square()) - torch.log1p(x.square()))


class StudentTBase(Distribution):
    """Independent Student-t with learned degrees of freedom, computed when asked: it follows the parameter.

    Args:
        logit: of 1 / df, between its least and its most, shape ``(D,)``.
        batch_shape: of independent copies.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, logit: Tensor, batch_shape: Any = ()) -> None:
        self.logit = logit
        super().__init__(Size(batch_shape), logit.shape, validate_args=False)

    @property
    def df(self) -> Tensor:
        return 1.0 / (_LEAST + (_MOST - _LEAST) * torch.sigmoid(self.logit))

    def expand(self, batch_shape: Any, _instance: Any = None) -> StudentTBase:
        return StudentTBase(self.logit, batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        df = self.df.expand(Size(sample_shape) + self.batch_shape + self.event_shape)
        normal = torch.randn_like(df)
        chi_square = 2.0 * torch._standard_gamma(0.5 * df)
        return normal * torch.rsqrt(chi_square.clamp_min(torch.finfo(df.dtype).tiny) / df)

    def log_prob(self, value: Tensor) -> Tensor:
        return _student_t_log_prob(self.df, value).sum(-1)

    def as_pyro(self) -> dist.TorchDistribution:
        """The same as a distribution of Pyro's."""
        return StableStudentT(self.df).to_event(1)


class StableStudentT(dist.StudentT):
    """Student-t whose density stays exact at large degrees of freedom, where torch's cancels in float32."""

    def log_prob(self, value: Tensor) -> Tensor:
        return _student_t_log_prob(self.df, value)


def _student_t_log_prob(df: Tensor, value: Tensor) -> Tensor:
    series = 0.5 * torch.log(0.5 * df) - 0.25 / df + 1.0 / (24.0 * df**3)
    exact = torch.lgamma(0.5 * (df + 1.0)) - torch.lgamma(0.5 * df)
    normaliser = torch.where(df > 40.0, series, exact) - 0.5 * torch.log(math.pi * df)
    return normaliser - 0.5 * (df + 1.0) * torch.log1p(value.square() / df)
