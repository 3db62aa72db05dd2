r"""Logistic regression: the loss that makes a network a log density ratio, or a log likelihood up to a constant.

.. math:: L = E_p \log(1 + e^{-T}) + E_r \log(1 + e^{T}), \qquad T^\star = \log p - \log r

With pairs :math:`(x, c)` of a simulator and shuffled pairs as r, :math:`T^\star(x, c) = \log p(x \mid c) - \log p(x)`
(Hermans et al. 2020, arXiv 1903.04057, eq. 5).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyro_dgm.core.ratio import DensityRatio, logistic_loss

__all__ = ["LogisticRegression"]

_FIRST_ROWS = 10_000  # from which units are taken


class LogisticRegression(nn.Module):
    r"""The loss of a :class:`~pyro_dgm.DensityRatio`, in nats per pair; :math:`2 \log 2` where nothing was learned.

    ``fit(LogisticRegression(ratio), (x, y))`` learns :math:`\log p(x) - \log r(x)` from draws x of p and y of r.
    With ``ratio.context_features`` it is ``fit(LogisticRegression(ratio), (x, context))`` with pairs of a simulator: contexts
    drawn from a prior and one x for each. Inside a model ``pyro.factor("x", ratio(x, theta))`` is then its likelihood.

    Args:
        ratio: the network.
        shuffles: how many shuffled pairs stand against each true one.

    Raises:
        TypeError: for anything but a DensityRatio.
        ValueError: for NaN, rows that do not pair, fewer than two rows.

    Note:
        A learned likelihood knows the region that its contexts came from, and nothing outside: keep the prior of the
        inference inside. Ask ``ratio.check(x, shuffled contexts)``: its mean must be 1, and its effective number of draws
        not small. Sharp likelihoods are learned bluntly; a conditional flow under ``MaximumLikelihood`` is often better.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> theta = torch.randn(2000, 1)
        >>> ratio = dgm.DensityRatio(1, context_features=1)
        >>> pairs = (theta + torch.randn(2000, 1), theta)
        >>> history = dgm.fit(LogisticRegression(ratio), pairs, max_steps=100, progress=False, seed=0)
        >>> bool(ratio(torch.ones(1), torch.ones(1)) > ratio(torch.ones(1), -torch.ones(1)))
        True
    """

    def __init__(self, ratio: DensityRatio, *, shuffles: int = 4) -> None:
        super().__init__()
        if not isinstance(ratio, DensityRatio):
            raise TypeError(f"LogisticRegression: expected a DensityRatio, got {type(ratio).__name__}.")
        if shuffles < 1:
            raise ValueError(f"LogisticRegression: shuffles is {shuffles}, expected 1 or more.")
        self.ratio, self.shuffles = ratio, shuffles

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """The loss of draws of p and of r, or of pairs of events and contexts."""
        _check_rows(x, other)
        if not self.ratio.context_features:
            return logistic_loss(self.ratio(x), self.ratio(other))
        if len(x) != len(other) or len(x) < 2:
            raise ValueError(
                f"LogisticRegression: {len(x)} events and {len(other)} contexts, expected as many of each, two at least."
            )
        shifts = torch.randint(1, len(x), (min(self.shuffles, len(x) - 1),)).tolist()
        shuffled = torch.stack([other.roll(k, 0) for k in shifts])
        return logistic_loss(self.ratio(x, other), self.ratio(x.expand(len(shifts), *x.shape), shuffled))

    def pretrain(self, batches: Iterator[tuple[Any, ...]]) -> None:
        """Take the units of events and contexts from the data, once."""
        if not self.ratio.standard.is_identity():
            return
        rows: list[Tensor] = []
        while sum(map(len, rows)) < _FIRST_ROWS and len(rows) < 20:
            x, other = next(batches)
            one = self.ratio.context_features == 0
            rows += [self.ratio.inputs(x), self.ratio.inputs(other)] if one else [self.ratio.inputs(x, other)]
        self.ratio.standard.fit(torch.cat(rows))


def _check_rows(*rows: Tensor) -> None:
    for x in rows:
        if not x.isfinite().all():
            bad = int((~x.isfinite()).reshape(len(x), -1).any(-1).sum())
            raise ValueError(f"LogisticRegression: {bad} of {len(x)} rows hold NaN or infinity. Clean the data.")
