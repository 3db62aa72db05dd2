r"""The default family of an amortised posterior: a chain of mixtures of normals, cut off at the prior's box.

.. math:: u = A c + b + r \odot x, \qquad q(x \mid c) = \prod_i q_i(x_i \mid x_{<i}, c), \qquad q_i \text{ a mixture of normals}

:math:`A, b, r` come from a ridge regression on the simulations, so that a linear Gaussian posterior is nearly there from the
start. One masked network gives weights, places and widths of all mixtures (Germain et al. 2015, arXiv 1502.03509; Bishop 1994),
from the entries before, the context, and features of the context that all of them share.
A box is kept by the mixtures themselves, with an exact constant: see :mod:`~pyro_dgm.guides.amortized.mixtures`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution

from pyro_dgm.core import DistributionModule, zuko
from pyro_dgm.flows.autoregressive import Run, schedule
from pyro_dgm.guides.amortized.mixtures import AutoregressiveMixture, Interval, NormalMixture
from pyro_dgm.guides.amortized.reader import Reader

__all__ = ["MixtureChain"]

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
