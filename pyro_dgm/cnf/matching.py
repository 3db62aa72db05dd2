r"""Flow matching: regression of a velocity field on the velocities of simple paths, without solving any equation.

.. math:: L = E_{t, x_0, x_1} \big| v(t, x_t; c) - \dot x_t \big|^2 / D, \qquad x_t = \sigma(t) x_0 + \alpha(t) x_1

The minimiser carries :math:`N(0, I)` at time 0 to the data at time 1 (Lipman et al. 2023, arXiv 2210.02747, theorem 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from pyro_dgm.cnf.families import ContinuousFlow
from pyro_dgm.core import DistributionModule
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.pace import within
from pyro_dgm.core.shapes import check_batch, check_context
from pyro_dgm.core.warn import warn_of_columns
from pyro_dgm.flows.base import NormalizingFlow
from pyro_dgm.flows.few_rows import (
    DRAWS,
    FEW_ROWS,
    FEW_ROWS_ALONE,
    LEAST_ROWS,
    MANY_ROWS,
    MOST_COLUMNS,
    Pairs,
    are_few,
)
from pyro_dgm.flows.many_rows import best_mixture, column_splines, seems_normal
from pyro_dgm.flows.mixture_units import Normals
from pyro_dgm.train.batches import FEW, few_rows, first_rows, some_rows
from pyro_dgm.train.descend import Stages, adam, cosine, warm_up
from pyro_dgm.train.hooks import Recipe

__all__ = [
    "Course",
    "FlowMatching",
    "match",
    "mixture_for",
    "recipe_for",
    "standardize_once",
    "start_from_columns",
    "start_from_few",
    "start_from_mixture",
    "start_in_better_units",
    "velocity_error",
]

RATE = 5e-3  # of flow matching before a flow's first step; not measured; chosen by hand
_FLOOR = 0.1  # of a rate before the first step, at the end; not measured; chosen by hand
# Rows of which a tenth tells when to stop. On four simulated tables of 100 and 150 rows MAF won at most .004 nats a column by the
# full rate over the one that falls, and lost .013 on heavy tails.
_TRUSTED = 500
_FARTHEST = (
    1e3  # times the largest entry of the rows, for a draw of what stands in for them; not measured, chosen by hand
)
_IN_PROPORTION = 5  # steps on such draws for each step that a fit is limited to, at most; not measured
FEW_STEPS = 800  # of flow matching on draws of what stands in for few rows (docs/benchmarks/small.md)
FEW_RATE = 1e-2  # of all steps on such draws (docs/benchmarks/small.md)
_MOST_HELD_OUT = (
    2_000  # of many rows: a check costs a continuous flow about as much as three of the 50 steps between checks
)
_MIXED_ROWS = 30_000  # to which a mixture is fitted, at most: 64 columns and 8 normals take some 5 CPU seconds
_JUDGES = 2_000  # rows that choose between a mixture and what a flow has learned so far; the mixture does not see them
# Of a trial of units: steps, rate and clip of the gradient. MAF on field-21 after 8 CPU seconds: .94 nats off in compressed
# units, .06 in straight ones, and 1.5 nats apart after 250 steps (docs/benchmarks/tables.md).
_TRIAL, _TRIAL_RATE, _CLIP = 200, 1e-2, 10.0
_BLOCK = 64  # rows among which noise is matched to data; the cost of a match grows with their cube


class Course(NamedTuple):
    """Steps on draws of what stands in for few rows: of which objective, how many, and on how many draws each."""

    objective: nn.Module
    steps: int
    draws: int = DRAWS


class FlowMatching(nn.Module):
    r"""Mean squared error of a continuous flow's velocity on paths from noise to data.

    One step costs one evaluation of the field, 10 to 20 times less than a step of maximum likelihood. The loss is no
    likelihood, and its least value is not zero: it is the variance of the paths' velocities. :func:`~pyro_dgm.fit` takes
    the flow's units from the data first, and treats few rows and many as :class:`~pyro_dgm.MaximumLikelihood` does.

    Args:
        cnf: an :class:`~pyro_dgm.FFJORD` or :class:`~pyro_dgm.OTFlow`.
        path: ``"linear"``, :math:`x_t = (1 - t) x_0 + t x_1`, or ``"vp"``,
            :math:`x_t = \cos(\frac{\pi}{2} t) x_0 + \sin(\frac{\pi}{2} t) x_1`.
        coupling: how noise meets data: ``"none"`` at random, ``"ot"`` by least squared distance within blocks of 64 rows,
            ``"auto"`` for ``"none"``: in equal time it was measured to come 1.3 to 3 times closer to the density, while
            ``"ot"`` halves the steps that a trained flow needs. With a context only ``"none"`` is right: matching across
            contexts makes the noise depend on the context.

    Raises:
        TypeError: if the family has no velocity.
        ValueError: for unknown names, for ``"ot"`` with a context, and for data that do not fit the flow.

    References:
        | Lipman et al. (2023), arXiv 2210.02747. Tong et al. (2024), arXiv 2302.00482 (minibatch couplings).
        | Albergo & Vanden-Eijnden (2023), arXiv 2209.15571 (the trigonometric path).

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> cnf, x = dgm.FFJORD(2), torch.randn(512, 2)
        >>> history = dgm.fit(dgm.FlowMatching(cnf), (x,), batch_size=128, max_steps=30, progress=False, seed=0)
        >>> cnf().log_prob(x).shape
        torch.Size([512])
    """

    @checked()
    def __init__(self, cnf: DistributionModule, path: str = "linear", coupling: str = "auto") -> None:
        super().__init__()
        name = type(cnf).__name__
        if not isinstance(cnf, ContinuousFlow):
            raise TypeError(f"FlowMatching: {name} has no velocity field; expected a continuous flow such as FFJORD.")
        if path not in ("linear", "vp"):
            raise ValueError(f"FlowMatching: path={path!r}, expected 'linear' or 'vp'.")
        if coupling not in ("auto", "none", "ot"):
            raise ValueError(f"FlowMatching: coupling={coupling!r}, expected 'auto', 'none' or 'ot'.")
        if coupling == "ot" and cnf.context_features:
            raise ValueError(
                f"FlowMatching: coupling='ot' with a context biases the conditional densities of {name} (noise would "
                "depend on the context). Use coupling='none'."
            )
        self.cnf, self.path, self.coupling = cnf, path, coupling

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The loss of events ``(N, *event_shape)`` with contexts ``(N, context_features)``."""
        x, context = check_batch("FlowMatching", self.cnf, x, context)
        context = check_context(self.cnf, context)
        data = self.cnf.flow_units(x)
        noise = torch.randn_like(data)
        if self.coupling == "ot":
            noise = _matched(noise, data)
        return velocity_error(self.cnf, self.path, noise, data, context)

    def prepare(self, batches: Iterator[tuple[Any, ...]], stages: Stages | None = None) -> None:
        """Take the flow's units from the data, unless it has some; few rows are first matched by what stands in for them."""
        if standardize_once(self.cnf, batches):
            start_from_few(self.cnf, [Course(self, FEW_STEPS)], batches, stages or Stages())

    def recipe(self, rows: int | None) -> Recipe:
        """Rows are in part held out; of many, minibatches are taken."""
        return recipe_for(self.cnf, rows)


def velocity_error(cnf: ContinuousFlow, path: str, noise: Tensor, data: Tensor, context: Tensor | None) -> Tensor:
    """Mean squared error of a flow's velocity on paths between rows ``(N, D)``, each at a time of its own."""
    time = (torch.randperm(len(data), device=data.device)[:, None] + torch.rand_like(data[:, :1])) / len(data)
    point, velocity = _on_path(path, time, noise, data)
    return (cnf.velocity(time, point, context) - velocity).square().mean()


def _on_path(path: str, time: Tensor, noise: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """The point of a path at a time, and its velocity there."""
    if path == "linear":
        return torch.lerp(noise, data, time), data - noise
    angle = 0.5 * math.pi * time
    cos, sin = angle.cos(), angle.sin()
    return cos * noise + sin * data, 0.5 * math.pi * (cos * data - sin * noise)


def _matched(noise: Tensor, data: Tensor) -> Tensor:
    """The noise in the order that brings it nearest to the data, block by block (an exact assignment)."""
    from scipy.optimize import linear_sum_assignment

    blocks = []
    for some, there in zip(noise.split(_BLOCK), data.split(_BLOCK), strict=True):
        cost = torch.cdist(there.detach(), some).square().cpu().numpy()
        blocks.append(some[torch.as_tensor(linear_sum_assignment(cost)[1], device=noise.device)])
    return torch.cat(blocks)


def recipe_for(family: DistributionModule, rows: int | None, starts: bool = True) -> Recipe:
    """How a density is trained: of few rows gently, where draws of what stands in for them come first (``starts``).

    The rate falls with the square of the rows: ten held-out rows do not tell when to stop. Of many rows minibatches are taken.
    """
    if rows is None or not are_few(rows):
        return Recipe() if rows is None or rows <= FEW else _of_many(family, rows)
    if not starts or not _can_start(family) or not family.standard.is_identity():
        return FEW_ROWS_ALONE
    return replace(FEW_ROWS, lr=FEW_ROWS.lr * min(1.0, rows / _TRUSTED) ** 2)


def _of_many(family: DistributionModule, rows: int) -> Recipe:
    """The recipe of many rows; only flows of few columns in one pass were measured to stand its rate."""
    quick = _can_start(family) and not isinstance(family, ContinuousFlow)
    share = min(MANY_ROWS.validation or 0.0, _MOST_HELD_OUT / rows)
    return replace(MANY_ROWS, lr=MANY_ROWS.lr if quick else RATE, validation=share)


def _can_start(family: DistributionModule) -> TypeGuard[NormalizingFlow]:
    """Whether the family can be the normal law of few rows."""
    flow = isinstance(family, NormalizingFlow) and family.features <= MOST_COLUMNS
    return flow and family.has_normal_base()


def start_from_few(
    family: DistributionModule, courses: list[Course], batches: Iterator[tuple[Any, ...]], stages: Stages
) -> bool:
    """Start a standardised flow at the normal law of few rows, and train it on draws of what stands in for them.

    The answer is whether the rows are few. Steps that leave their likelihood lower than the normal law's are undone.
    """
    rows = few_rows(batches)
    if rows is None or not isinstance(family, NormalizingFlow):
        return False
    x, context = check_batch(type(family).__name__, family, rows[0], rows[1] if len(rows) > 1 else None)
    if len(x) < LEAST_ROWS or not _can_start(family):
        return True
    _start_at_normal(family, x, context)
    pairs = Pairs(family.flow_units(x), None if context is None else context.to(x))
    if pairs.worth_while:
        far = _FARTHEST * (1.0 + x.abs().amax(0))
        with _kept_if_better(family, x, context):
            for course in courses:
                _take_course(family, course, pairs, far, stages)
    return True


def start_from_columns(family: DistributionModule, batches: Iterator[tuple[Any, ...]]) -> None:
    """Make rough columns normal by themselves, where rows are many and have no contexts.

    Where all columns are then normal together but for correlations, all get such units, and the flow starts as that law.
    """
    if not isinstance(family, NormalizingFlow) or len(family.event_shape) > 1:
        return
    rows = _many_rows(family, batches)
    if rows is None:
        return
    judges, x = rows
    splines = column_splines(family.flow_units(x))
    if any(spline is not None for spline in splines.all):
        with _kept_if_better(family, judges, None):
            family.columns.take(splines.all)
            if normal := seems_normal(family.flow_units(x)):
                family.decorrelate.fit(family.flow_units(x))
                family.start_at_identity()
        if normal:
            return
        family.columns.forget()
    if any(spline is not None for spline in splines.rough):
        with _kept_if_better(family, judges, None):
            family.columns.take(splines.rough)


def mixture_for(
    family: NormalizingFlow, batches: Iterator[tuple[Any, ...]], stages: Stages
) -> tuple[Normals, Tensor] | None:
    """A mixture of normals in a flow's units, and rows to judge it by; only where rows are many, and have no contexts.

    A fit by seconds gives it half of those that are left.
    """
    rows = _many_rows(family, batches)
    if rows is None or family.features == 1:
        return None
    judges, x = rows
    with within(stages.seconds()):
        mixture = best_mixture(family.flow_units(x))
    return None if mixture is None else (mixture, judges)


def start_from_mixture(family: NormalizingFlow, mixture: Normals, judges: Tensor) -> None:
    """Start a flow at a mixture, in whose units it is the identity, where that scores rows better than the flow as it is."""
    with _kept_if_better(family, judges, None):
        family.mixture.take(mixture)
        family.start_at_identity()


def start_in_better_units(
    family: DistributionModule, objective: nn.Module, batches: Iterator[tuple[Any, ...]], stages: Stages
) -> None:
    """Where rows are many and units compress some columns, try straight ones too, and go on in those that score rows better.

    A compressed column is nearer to normal by itself; given others it may be farther, as in a funnel.
    """
    rows = some_rows(batches, _JUDGES)
    if rows is None or not isinstance(family, NormalizingFlow) or family.standard.is_straight():
        return
    x, context = check_batch(type(family).__name__, family, rows[0], rows[1] if len(rows) > 1 else None)
    fresh, found = deepcopy(family.state_dict()), []
    for name in ("compressed", "straight"):
        family.load_state_dict(fresh)
        if name == "straight":
            family.take_straight_units(x)
        match(f"{name} units", family, lambda: objective(*next(batches)), stages, _TRIAL, _TRIAL_RATE, _CLIP)
        found.append((_mean_score(family, x, context), deepcopy(family.state_dict())))
    family.load_state_dict(max(found, key=lambda each: each[0])[1])


def _many_rows(family: NormalizingFlow, batches: Iterator[tuple[Any, ...]]) -> tuple[Tensor, Tensor] | None:
    """Rows that judge, and rows to fit to, where they are many and have no contexts."""
    rows = some_rows(batches, _MIXED_ROWS)
    if rows is None or len(rows) > 1 or len(rows[0]) <= FEW or not _can_start(family):
        return None
    x, _ = check_batch(type(family).__name__, family, rows[0], None)
    judges, x = x.tensor_split([min(_JUDGES, len(x) // 5)])
    return judges, x


def _take_course(family: NormalizingFlow, course: Course, pairs: Pairs, far: Tensor, stages: Stages) -> None:
    """Train a flow on draws; a fit that is limited to few steps takes fewer of these too."""
    most = stages.limits.max_steps
    steps = course.steps if most is None else min(course.steps, _IN_PROPORTION * most)
    name = f"{type(course.objective).__name__} of draws of a smooth density"
    match(name, family, lambda: course.objective(*_events(family, pairs, far, course.draws)), stages, steps, FEW_RATE)


def _events(family: NormalizingFlow, pairs: Pairs, far: Tensor, draws: int) -> tuple[Tensor, ...]:
    """Draws as events with their contexts. A far draw in units that compress tails may be beyond all numbers, and one of an
    ordered pair may be rounded to a tie, which has no density: both are left out.
    """
    u, *context = pairs.sample(draws)
    x = family.from_units(u)
    near = (x.abs() <= far).reshape(len(x), -1).all(1) & family(*context).support.check(x)
    return tuple(part[near] for part in (x, *context))


@torch.no_grad()
def _start_at_normal(family: NormalizingFlow, x: Tensor, context: Tensor | None) -> None:
    """Make the flow the identity in units that take out correlations, unless that is no normal law."""
    with _kept_if_better(family, x, context):
        family.decorrelate.fit(family.flow_units(x))
        family.start_at_identity()


@contextmanager
def _kept_if_better(family: DistributionModule, x: Tensor, context: Tensor | None) -> Iterator[None]:
    """Undo what is done to a family within the context, unless it then scores these rows better."""
    before = deepcopy(family.state_dict())
    score = _mean_score(family, x, context)
    yield
    if not _mean_score(family, x, context) > score:
        family.load_state_dict(before)


def match(
    name: str,
    family: nn.Module,
    loss: Callable[[], Tensor],
    stages: Stages,
    steps: int,
    rate: float = RATE,
    clip: float | None = None,
) -> None:
    """A stage of all parameters before the first step, at a rate that falls."""
    optimizer = adam([p for p in family.parameters() if p.requires_grad], rate)
    stages.descend(
        name, family, optimizer, loss, steps, lambda step, progress: warm_up(step) * cosine(progress, _FLOOR), clip
    )


def standardize_once(family: DistributionModule, batches: Iterator[tuple[Any, ...]]) -> bool:
    """Take a family's units from the data, and say whether a flow's events got some.

    A family that has units keeps them, and so does one that scores the data better as it is: it was trained.
    """
    of_events = family.takes_units()
    of_contexts = family.context_features > 0 and not family.has_units()
    if not of_events and not of_contexts:
        return False
    x, context = first_rows(batches)
    before = _mean_score(family, x, context)
    family.standardize(x if of_events else None, context if of_contexts else None)
    if _mean_score(family, x, context) > before - 0.5:
        if of_events:
            warn_of_columns(
                type(family).__name__,
                (few_rows(batches) or (x,))[0],
                getattr(family, "discrete", ()),
                dependent=family._support is None,
            )
        return of_events
    if of_events:
        family.forget_events()
    if of_contexts:
        family.context_units.forget()
    return False


def _mean_score(family: DistributionModule, x: Tensor, context: Tensor | None) -> float:
    """Mean log density; minus infinity where the data are too far off to be scored."""
    try:
        with torch.no_grad():
            score = float(family(context).log_prob(x).mean())
    except (ValueError, ArithmeticError, RuntimeError):
        return -math.inf
    return score if math.isfinite(score) else -math.inf
