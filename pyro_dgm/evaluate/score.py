"""What the scores share: the pair that each returns, errors by jackknife, p-values by permutation, and samples as rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from pyro_dgm.core.distribution import ImplicitDistribution
from pyro_dgm.core.module import DistributionModule
from pyro_dgm.core.shapes import as_tensor_like, refuse_immoderate

__all__ = [
    "CHUNK",
    "Features",
    "JudgedScore",
    "Model",
    "Score",
    "as_distribution",
    "as_rows",
    "exactly_centred",
    "grouped",
    "jackknife",
    "judged",
    "mean_score",
    "random_source",
    "same_rows",
    "squared_distances",
]

Features = Callable[[Tensor], Tensor]  # rows (batch, *event) to (batch, D)
Model = (
    Distribution | DistributionModule | Callable[[int], Tensor]
)  # what can be drawn; the last from a number of draws

_BATCH = 512  # rows whose features are taken at once; not measured, chosen by hand
CHUNK = 10_000_000  # numbers for pairs of rows held at once, 80 MB; not measured, chosen by hand


class Score(NamedTuple):
    """A number with its Monte-Carlo standard error; a pair, so that ``value, error = score`` reads it.

    >>> value, error = Score(1.25, 0.01)
    >>> print(Score(1.25, 0.01))
    1.25 +- 0.01
    """

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.4g} +- {self.standard_error:.2g}"


class JudgedScore(Score):
    """A score of "are these two samples from one distribution?", still a pair, with its verdict as attributes.

    Attributes:
        p_value: chance of a score as large or larger where both samples come from one distribution.
        null: draws of the score under that hypothesis; their mean is the score of a perfect model.

    >>> value, error = JudgedScore(0.6, 0.1, 0.02, torch.zeros(3))
    >>> print(JudgedScore(0.6, 0.1, 0.02, torch.zeros(3)))
    0.6 +- 0.1 (p = 0.02)
    """

    p_value: float
    null: Tensor

    def __new__(
        cls, value: float, standard_error: float, p_value: float = float("nan"), null: Tensor | None = None
    ) -> JudgedScore:
        self = super().__new__(cls, value, standard_error)
        self.p_value = p_value
        self.null = torch.empty(0) if null is None else null
        return self

    def __str__(self) -> str:
        return f"{super().__str__()} (p = {self.p_value:.2g})"

    def __repr__(self) -> str:
        return f"JudgedScore({self.value}, {self.standard_error}, p_value={self.p_value})"


def mean_score(values: Tensor) -> Score:
    """The mean over rows and its standard error: infinite with an infinite row, NaN of one row."""
    values = values.double()
    if not values.isfinite().all():
        return Score(float(values.mean()), math.inf)
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan
    return Score(float(values.mean()), error)


def as_distribution(who: str, model: Model) -> Distribution:
    """The distribution of what can be drawn: of a family without a context; of a function, which gives it no density."""
    if isinstance(model, Distribution):
        return model
    name = type(model).__name__
    if not isinstance(model, DistributionModule):
        if isinstance(model, nn.Module):
            raise TypeError(
                f"{who}: model is a {name}, expected a distribution, a family, or a function from a number to so many draws, "
                "such as vae.generate."
            )
        return _of_function(who, model)
    if n := model.context_features:
        raise ValueError(
            f"{who}: {name} takes a context of {n} numbers, and each context has a density of its own. Take that of one, "
            f"{who}(family(context), ...) with a context of shape ({n},), beside data that belong to it."
        )
    return model()


def _of_function(who: str, model: Callable[[int], Tensor]) -> Distribution:
    def rows(n: int) -> Tensor:
        x = as_tensor_like(who, "draws", model(n), None)
        if x.shape[:1] != (n,):
            raise ValueError(
                f"{who}: the function gave draws of shape {tuple(x.shape)} for {n}, expected ({n}, *event). It must take the "
                "number of draws."
            )
        return x

    return ImplicitDistribution(lambda z: rows(len(z)), Normal(0.0, 1.0), tuple(rows(1).shape[1:]), name=who)


def random_source(seed: int | None) -> torch.Generator | None:
    """A generator for the seed; None takes torch's global stream."""
    return None if seed is None else torch.Generator().manual_seed(seed)


def grouped(n: int, m: int, num_permutations: int, generator: torch.Generator | None) -> Tensor:
    """Who is in the first group: ``(n + m, 1 + B)``, the true assignment and B random ones, as 0 and 1."""
    if num_permutations < 19:
        raise ValueError(f"num_permutations is {num_permutations}; below 19 no p-value can reach 0.05. Use 200.")
    first = torch.zeros(num_permutations + 1, n + m, dtype=torch.bool, device="cpu")
    first[0, :n] = True
    order = torch.rand(num_permutations, n + m, generator=generator, device="cpu").argsort(-1)
    first[1:].scatter_(1, order[:, :n], True)
    return first.T.contiguous()


def judged(who: str, values: Tensor, error: Tensor) -> JudgedScore:
    """The score ``values[0]`` of the true assignment among those of random ones: its p-value is exact, and never zero."""
    values = values.cpu()
    if not values.isfinite().all():
        raise ValueError(
            f"{who}: the score is {float(values[0])}, and {int((~values.isfinite()).sum())} of {len(values)} of its "
            "permutations are not finite, so there is no p-value: numbers overflow. Standardise the data, or pass float64."
        )
    p_value = float((values[1:] >= values[0]).sum() + 1) / len(values)
    return JudgedScore(float(values[0]), float(error), p_value, values[1:])


def jackknife(statistic: Callable[..., Tensor], *samples: Tensor, count: int = 20) -> Tensor:
    r"""Standard errors of ``statistic(*samples)`` by leaving out one of ``count`` blocks of every sample.

    :math:`\frac{B-1}{B}\sum_b (s_b - \bar s)^2`, with relative error about :math:`1/\sqrt{2B}`; conservative where
    the statistic is degenerate (two samples of one distribution).
    """
    count = min(count, *(len(s) for s in samples))
    values = torch.stack([statistic(*(_without(s, block, count) for s in samples)) for block in range(count)])
    return ((count - 1) * values.double().var(0, unbiased=False)).sqrt()


def _without(sample: Tensor, block: int, count: int) -> Tensor:
    """The rows outside of one of ``count`` interleaved blocks."""
    return sample[torch.arange(len(sample), device=sample.device) % count != block]


def as_rows(who: str, what: str, x: ArrayLike) -> Tensor:
    """``x`` of shape ``(N, *event)`` as finite floating rows ``(N, D)``."""
    _refuse_no_draws(who, what, x)
    rows = as_tensor_like(who, what, x, None).detach()
    if not rows.dim() or len(rows) < 2:
        raise ValueError(
            f"{who}: {what} has shape {tuple(rows.shape)}, expected (N, ...) with N >= 2 rows, one row a draw."
        )
    rows = rows.reshape(len(rows), -1)
    if not rows.shape[1]:
        raise ValueError(f"{who}: {what} has rows of no numbers, expected one or more in each.")
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    refuse_immoderate(who, rows, f"rows of {what}")
    return rows


def same_rows(who: str, features: Features | None = None, **samples: ArrayLike) -> list[Tensor]:
    """Several samples, or their features, as rows of the same length, device and precision."""
    if features is not None:
        samples = {name: _featured(who, name, features, x) for name, x in samples.items()}
    rows = {name: as_rows(who, name, x) for name, x in samples.items()}
    if len({r.shape[1] for r in rows.values()}) > 1:
        sizes = ", ".join(f"{name} has {r.shape[1]}" for name, r in rows.items())
        raise ValueError(f"{who}: numbers per row differ: {sizes}. Pass draws of one space, one row a draw.")
    first = max(rows.values(), key=lambda r: r.dtype.itemsize)
    return [r.to(first) for r in rows.values()]


def _refuse_no_draws(who: str, what: str, x: object) -> None:
    if isinstance(x, Distribution | nn.Module) or callable(x):
        write = "x(1_000)" if not isinstance(x, Distribution | nn.Module) else "q.sample((1_000,)) of a distribution q"
        raise TypeError(
            f"{who}: {what} is a {type(x).__name__}, expected draws of it, one a row: {write}. Of one with a context "
            "a row draw once, q.sample(), and put the contexts beside draws and data: torch.cat([context, draws], 1)."
        )


def _featured(who: str, what: str, features: Features, x: ArrayLike) -> Tensor:
    _refuse_no_draws(who, what, x)
    rows = as_tensor_like(who, what, x, None)
    if not rows.dim():
        raise ValueError(f"{who}: {what} is one number, expected (N, ...) with N >= 2 rows, one row a draw.")
    with torch.no_grad():
        return torch.cat([features(part) for part in rows.split(_BATCH)])


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances ``(len(a), len(b))`` by one matrix product: centre the rows first."""
    return torch.addmm(b.square().sum(-1), a, b.T, alpha=-2.0).add_(a.square().sum(-1, keepdim=True)).clamp_(min=0.0)


def exactly_centred(*samples: Tensor) -> list[Tensor]:
    """Rows in float64 around a common centre of integers: equal rows of integers (images) are at distance 0 exactly."""
    centre = samples[0].double().mean(0).round()
    return [s.double() - centre for s in samples]
