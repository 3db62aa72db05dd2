r"""A log density ratio learned by logistic regression, and whether it is one.

A classifier that tells draws of p (label 1) from as many draws of r (label 0) minimises

.. math:: L = E_p \log(1 + e^{-T}) + E_r \log(1 + e^{T}), \qquad T^\star(x) = \log p(x) - \log r(x),
          \qquad E_{x \sim r}\, e^{T^\star(x)} = 1 .

The last equation needs draws of r alone: it checks a trained classifier, and no loss does (Goodfellow et al. 2014,
proposition 1; Sugiyama et al. 2012, section 4). With pairs :math:`(x, c)` of a simulator as p and shuffled pairs as r,
:math:`T^\star(x, c) = \log p(x \mid c) - \log p(x)` (Hermans et al. 2020, arXiv 1903.04057, eq. 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import softplus

from pyro_dgm.core.devices import frozen
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.networks import MLP, broadcast_cat
from pyro_dgm.core.pace import moved
from pyro_dgm.core.shapes import (
    as_count,
    as_shape,
    as_tensor_like,
    check_value_shape,
    fitting_context,
    refuse_immoderate,
    refuse_non_finite,
)
from pyro_dgm.core.units import InputUnits
from pyro_dgm.train.descend import Stages, adam, cosine, descend

__all__ = ["DensityRatio", "LogisticRegression", "RatioCheck", "calibration", "learn_ratio", "logistic_loss"]

# Not measured; chosen by hand.
_UNIT_ROWS = 10_000  # from which units are taken
_LOOK_EVERY = 50  # steps between looks at the held-out rows
_FLOOR = 0.02  # of the learning rate, at the end
_DECAY = 1e-2  # of the weights


def logistic_loss(of_p: Tensor, of_r: Tensor) -> Tensor:
    """Cross-entropy of logits on draws of p (label 1) and of r (label 0), in nats per pair; 2 log 2 where T = 0."""
    return softplus(-of_p).mean() + softplus(of_r).mean()


@dataclass(frozen=True)
class RatioCheck:
    r"""Whether a learned log ratio is one, from draws of the reference r alone.

    Attributes:
        mean: mean of :math:`e^{T}` over draws of r; 1 for a log ratio.
        error: its standard error. Heavy-tailed weights make it too small: read it with ``ess``.
        ess: :math:`(\sum e^T)^2 / \sum e^{2T}`, the effective number of the draws.
        draws: how many there were.

    >>> print(calibration(torch.zeros(100)))
    mean exp(T) on reference draws 1.000 +- 0.000 (must be 1), ESS 100 of 100
    """

    mean: float
    error: float
    ess: float
    draws: int

    @property
    def fault(self) -> str:
        """What is wrong, in words; empty where nothing is."""
        if not math.isfinite(self.mean):
            return "exp(T) overflows"
        if abs(self.mean - 1.0) > 0.1 + 4.0 * self.error:
            return f"mean exp(T) on reference draws is {self.mean:.3g} +- {self.error:.2g}, and must be 1"
        if self.ess < max(30.0, 0.01 * self.draws):
            return f"{self.ess:.0f} of {self.draws} reference draws carry all weight"
        return ""

    def __str__(self) -> str:
        return (
            f"mean exp(T) on reference draws {self.mean:.3f} +- {self.error:.3f} (must be 1), "
            f"ESS {self.ess:.0f} of {self.draws}"
        )


def calibration(log_ratio: Tensor) -> RatioCheck:
    """The check of a log ratio, from its values at draws of the reference."""
    n = log_ratio.numel()
    if not n:
        raise ValueError("DensityRatio.check: no rows, expected draws of the reference, one or more.")
    ratio = log_ratio.detach().double().reshape(-1).exp()
    total = float(ratio.sum())
    squares = float(ratio.square().sum())
    ess = total**2 / squares if squares > 0 and math.isfinite(squares) else 0.0
    return RatioCheck(total / n, float(ratio.std()) / math.sqrt(n), ess, n)


class DensityRatio(nn.Module):
    r"""The log density ratio :math:`T(x, c) \approx \log p(x \mid c) - \log r(x \mid c)`, in nats, by a network.

    With a context and :math:`r(x \mid c) = p(x)` it is :math:`\log p(x \mid c) - \log p(x)`, a likelihood up to a constant
    in c: ``pyro.factor("x", ratio(x, theta))`` puts it into a model (see :class:`~pyro_dgm.LogisticRegression`, which trains
    it). It is an estimate, and has no error bar of its own: look at :meth:`check`.

    Args:
        event_shape: of x, an int or a shape.
        context_features: length of the context; 0 without one.
        network: a module from ``(*batch, D + context_features)`` to ``(*batch, 1)`` or ``(*batch,)``; None for two hidden
            layers of 64.

    Shapes: ``ratio(x, context)`` broadcasts ``(*batch, *event)`` with ``(*batch, context_features)`` and returns ``(*batch,)``.

    Raises:
        ValueError: for a value or context of the wrong shape, or a network that returns another shape.

    Example:
        >>> ratio = DensityRatio(2, context_features=3)
        >>> ratio(torch.zeros(7, 1, 2), torch.zeros(5, 3)).shape
        torch.Size([7, 5])
    """

    calibrated: Tensor

    @checked()
    def __init__(
        self, event_shape: int | Sequence[int], context_features: int = 0, network: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.event_shape = as_shape(event_shape)
        self.context_features = as_count("DensityRatio", "context_features", context_features)
        self.features = self.event_shape.numel() + self.context_features
        self.standard = InputUnits(self.features)
        self.network = MLP(self.features, 1) if network is None else network
        self.register_buffer("calibrated", torch.tensor([1.0, 0.0]))  # slope and offset of the network's logit

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        slope, offset = self.calibrated
        return slope * self.logit(self.inputs(x, context)) + offset

    def held(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The log ratio with its parameters held constant: gradients go to x and context alone."""
        with frozen(*self.parameters()):
            return self(x, context)

    def logit(self, inputs: Tensor) -> Tensor:
        """The network's own logit at ``(*batch, features)``."""
        logit = self.network(self.standard(inputs))
        if logit.shape == (*inputs.shape[:-1], 1):
            return logit[..., 0]
        if logit.shape == inputs.shape[:-1]:
            return logit
        raise ValueError(
            f"DensityRatio: the network turned {tuple(inputs.shape)} into {tuple(logit.shape)}, expected one logit a row, "
            f"{(*inputs.shape[:-1], 1)}. Let its last layer have one output, without a sigmoid."
        )

    def inputs(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Events as vectors beside their contexts, ``(*batch, features)``."""
        context = fitting_context("DensityRatio", self, context)
        if context is not None:
            context = as_tensor_like("DensityRatio", "context", context, self.standard.loc)
        x = as_tensor_like("DensityRatio", "value", x, self.standard.loc)
        check_value_shape("DensityRatio", x, self.event_shape)
        rows = x.reshape(*x.shape[: x.dim() - len(self.event_shape)], self.event_shape.numel())
        inputs = broadcast_cat(rows, context)
        if Distribution._validate_args:
            refuse_immoderate("DensityRatio", inputs.reshape(-1, self.features))
        return inputs

    @torch.no_grad()
    def check(self, x: Tensor, context: Tensor | None = None) -> RatioCheck:
        """Mean of exp(T) and effective number of draws ``x`` of the *reference* r, made after training."""
        return calibration(self(x, context))

    @torch.no_grad()
    def calibrate(self, of_p: Tensor, of_r: Tensor) -> None:
        """Fit slope and offset of the logit to held-out logits of both samples (Platt scaling), by Newton's method."""
        of_p = _logits("of_p", of_p, self.calibrated)
        of_r = _logits("of_r", of_r, self.calibrated)
        logit = torch.cat([of_p, of_r]).double()
        label = torch.cat([torch.ones_like(of_p), torch.zeros_like(of_r)]).double()
        weight = torch.cat([torch.full_like(of_p, 1 / len(of_p)), torch.full_like(of_r, 1 / len(of_r))]).double()
        self.calibrated.copy_(_platt(logit, label, weight))


def _logits(name: str, value: Tensor, like: Tensor) -> Tensor:
    value = as_tensor_like("DensityRatio.calibrate", name, value, like)
    if value.dim() != 1 or not len(value):
        raise ValueError(
            f"DensityRatio.calibrate: {name} has shape {tuple(value.shape)}, expected (N,) logits, N >= 1."
        )
    refuse_non_finite("DensityRatio.calibrate", value, "logits")
    return value


def _platt(logit: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Slope and offset of a weighted logistic regression; the identity where it does not converge."""
    start = logit.new_tensor([1.0, 0.0])
    features = torch.stack([logit, torch.ones_like(logit)], -1)
    w = start.clone()
    for _ in range(30):
        share = torch.sigmoid(features @ w)
        hessian = features.T @ (features * (weight * share * (1.0 - share))[:, None])
        step = torch.linalg.lstsq(
            hessian + 1e-9 * torch.eye(2).to(hessian), features.T @ (weight * (label - share))
        ).solution
        w = w + step.clamp(-1.0, 1.0)
    return w if w.isfinite().all() and 0.0 < w[0] < 10.0 else start


def learn_ratio(
    of_p: Tensor,
    of_r: Tensor | Callable[[int], Tensor],
    *,
    network: nn.Module | None = None,
    max_steps: int = 2000,
    batch_size: int = 512,
    lr: float = 2e-3,
) -> tuple[DensityRatio, RatioCheck]:
    r"""A fresh log ratio of two distributions from their draws, calibrated on rows that did not train it, and its check.

    A fifth of the rows stops the training (best held-out loss), and then sets slope and offset; a third part of the
    reference's draws, seen by neither, gives the check.

    Args:
        of_p: draws ``(N, *event)`` of p.
        of_r: draws of r, or a function from a number to that many fresh draws.
        network, max_steps, batch_size, lr: of the fit.

    Raises:
        ValueError: for fewer than 100 draws, NaN, or events of different shape.

    Example:
        >>> p, r = torch.randn(4000, 2) + 0.5, torch.randn(4000, 2)
        >>> ratio, check = learn_ratio(p, r, max_steps=150)
        >>> abs(check.mean - 1.0) < 0.1 + 5 * check.error, check.fault
        (True, '')
    """
    of_p = as_tensor_like("learn_ratio", "draws of p", of_p, None)
    of_p = of_p if of_p.is_floating_point() else of_p.to(torch.get_default_dtype())
    of_r = of_r if callable(of_r) else as_tensor_like("learn_ratio", "draws of r", of_r, of_p)
    fresh = of_r if callable(of_r) else None
    other: Tensor = of_r(len(of_p)) if callable(of_r) else of_r
    _refuse_unfit(of_p, other)
    order = [torch.randperm(len(x)) for x in (of_p, other)]
    p, r = (x.detach()[o] for x, o in zip((of_p, other), order, strict=True))
    spare = other.new_empty(0) if fresh else r[: len(r) // 5]
    r = r if fresh else r[len(r) // 5 :]
    held_p, held_r = (x[: len(x) // 5] for x in (p, r))
    ratio = DensityRatio(tuple(p.shape[1:]), 0, network).to(p)
    ratio.standard.fit(torch.cat([p, r]).flatten(1))
    p = p[len(held_p) :]
    r = r[len(held_r) :]

    def loss() -> Tensor:
        some_p = p[torch.randint(len(p), (batch_size,))]
        some_r = fresh(batch_size) if fresh else r[torch.randint(len(r), (batch_size,))]
        return logistic_loss(ratio(some_p), ratio(some_r))

    best = _Best(ratio, held_p, held_r, max_steps)
    optimizer = adam(ratio.parameters(), lr, _DECAY)
    descend(optimizer, loss, max_steps, lambda step, progress: cosine(progress, _FLOOR), after=best.look)
    ratio.load_state_dict(best.state)
    with torch.no_grad():
        ratio.calibrate(ratio(held_p), ratio(held_r))
        return ratio, ratio.check(fresh(len(of_p)) if fresh else spare)


class _Best:
    """The state of a ratio with the least loss on held-out draws, among those that were looked at."""

    def __init__(self, ratio: DensityRatio, p: Tensor, r: Tensor, max_steps: int) -> None:
        self.ratio = ratio
        self.p = p
        self.r = r
        self.max_steps = max_steps
        self.score = math.inf
        self.state = deepcopy(ratio.state_dict())

    @torch.no_grad()
    def look(self, steps: int) -> None:
        """Every 50 steps, and after the last; each moves the bar of the work that it is part of."""
        moved()
        if steps % _LOOK_EVERY and steps != self.max_steps:
            return
        score = float(logistic_loss(self.ratio(self.p), self.ratio(self.r)))
        if score < self.score:
            self.score = score
            self.state = deepcopy(self.ratio.state_dict())


def _refuse_unfit(p: Tensor, r: Tensor) -> None:
    if p.shape[1:] != r.shape[1:] or min(len(p), len(r)) < 100:
        raise ValueError(
            f"learn_ratio: draws have shapes {tuple(p.shape)} and {tuple(r.shape)}, expected (N >= 100, *event) of one event."
        )
    for name, x in (("p", p), ("r", r)):
        refuse_non_finite("learn_ratio", x, f"draws of {name}")


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

    @checked(only=("shuffles",))
    def __init__(self, ratio: DensityRatio, *, shuffles: int = 4) -> None:
        super().__init__()
        if not isinstance(ratio, DensityRatio):
            raise TypeError(f"LogisticRegression: expected a DensityRatio, got {type(ratio).__name__}.")
        if shuffles < 1:
            raise ValueError(f"LogisticRegression: shuffles is {shuffles}, expected 1 or more.")
        self.ratio = ratio
        self.shuffles = shuffles

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """The loss of draws of p and of r, or of pairs of events and contexts."""
        x, other = _checked_rows(self.ratio, x, other)
        if not len(x) or not len(other):
            raise ValueError(f"LogisticRegression: {len(x)} and {len(other)} rows, expected one or more of each.")
        if not self.ratio.context_features:
            return logistic_loss(self.ratio(x), self.ratio(other))
        if len(x) != len(other) or len(x) < 2:
            raise ValueError(
                f"LogisticRegression: {len(x)} events and {len(other)} contexts, expected as many of each, two at least."
            )
        shifts = torch.randint(1, len(x), (min(self.shuffles, len(x) - 1),)).tolist()
        shuffled = torch.stack([other.roll(k, 0) for k in shifts])
        return logistic_loss(self.ratio(x, other), self.ratio(x.expand(len(shifts), *x.shape), shuffled))

    def prepare(self, batches: Iterator[tuple[Any, ...]], stages: Stages | None = None) -> None:
        """Take the units of events and contexts from the data, once."""
        if not self.ratio.standard.is_identity():
            return
        rows: list[Tensor] = []
        while sum(map(len, rows)) < _UNIT_ROWS and len(rows) < 20:
            x, other = next(batches)
            one = self.ratio.context_features == 0
            rows += [self.ratio.inputs(x), self.ratio.inputs(other)] if one else [self.ratio.inputs(x, other)]
        self.ratio.standard.fit(torch.cat(rows))


def _checked_rows(ratio: DensityRatio, *rows: Tensor) -> list[Tensor]:
    """Rows of the ratio's kind, all finite."""
    rows = tuple(as_tensor_like("LogisticRegression", "data", x, ratio.standard.loc) for x in rows)
    for x in rows:
        if not x.dim():
            raise ValueError(f"LogisticRegression: data are the one number {float(x):g}, expected rows (N, *event).")
        refuse_non_finite("LogisticRegression", x)
    return list(rows)
