r"""Maximum likelihood, for a continuous flow with what its paths cost; objectives on data changed anew at each step.

.. math:: L = -E_x \log p(x \mid c) + \sum_k \lambda_k E_x \int_0^1 r_k(t, x(t))\, dt
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from pyro_dgm.cnf.families import ContinuousFlow
from pyro_dgm.cnf.matching import (
    FEW_STEPS,
    Course,
    FlowMatching,
    match,
    mixture_for,
    recipe_for,
    standardize_once,
    start_from_columns,
    start_from_few,
    start_from_mixture,
    start_in_better_units,
)
from pyro_dgm.core import DistributionModule
from pyro_dgm.core.data import refuse_outside_support
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import check_batch, check_number
from pyro_dgm.core.warn import told_unless_finite
from pyro_dgm.train.descend import Stages
from pyro_dgm.train.hooks import Recipe

__all__ = ["MaximumLikelihood", "Transformed"]

_KINETIC = 0.02  # weight of a continuous flow's kinetic cost, unless given (docs/benchmarks/cnf.md)
_MATCHING_STEPS = 2000  # of flow matching before the first step (docs/benchmarks/cnf.md)
_FEW_STEPS = 800  # of likelihood on draws of what stands in for few rows (docs/benchmarks/small.md)
# Steps of likelihood, and draws of each, after a continuous flow's matching of draws. FFJORD beside a mixture, simulated clusters
# of 13 columns (two laws) and of 4: from -.18, -.15 and -.05 to -.09, -.03 and -.02 nats a column (docs/benchmarks/small.md)
_FEW_FINE = (150, 256)


class MaximumLikelihood(nn.Module):
    r"""Negative log likelihood of a batch, in nats per event, plus the costs of a continuous flow's paths.

    ``fit(MaximumLikelihood(family), (x,))`` is the whole recipe: it takes the flow's units from the data,
    a continuous flow is trained by flow matching first (cheap: no equation is solved) and then by likelihood, with steps
    that are checked against twice as many. A family that was already trained or standardised goes straight to likelihood.

    Few rows (10 to 3,000) are fitted with care. A tenth of them is held out, and the parameters are kept that score these best.
    A flow begins as the normal law of the others, in units that take out correlations. Where rows say more than such a law, it
    is first trained on draws of a smooth density that stands in for them: a mixture of mixtures of normals and of kernels,
    weighted by cross-validation. Up to 1,000 steps on the rows follow, and end early. ``History.held_out`` and ``.stopped`` say
    so; ``fit(..., validation=0)`` holds nothing out, and then only ``max_steps`` keeps rows from being learned by heart.

    More rows without contexts say where a flow starts, up to 30,000 of them. Columns that are nearly discrete become normal by
    themselves, by splines through their quantiles; where all columns are then normal together, the flow starts as that law. A
    continuous flow is matched, and compared with a mixture of normals, or of scales of one normal: where that scores other
    rows better, the flow starts anew as the identity in the units of the mixture, and draws take a search for each column.
    Other flows whose units compress tails take 200 steps in these units and 200 in straight ones, and go on with the better.

    More rows are taken in minibatches of 256, for up to 3,000 steps. A tenth of them is held out, 2,000 at most, and checked each
    50 steps. The averaged weights that score them best are kept; the fit ends after 750 steps without a better score. What is
    given to ``fit`` (``batch_size=``, ``validation=``, ``patience=``, limits) stands instead. Of a ``DataLoader``, whose
    rows are not known, none of this is done.

    Args:
        family: any family with a density.
        transport: weight of :math:`\int \frac12 |v|^2 dt` (OT-Flow's transport cost, in the flow's units).
        hjb: weight of :math:`\int |\partial_t\Phi - \frac12 |\nabla\Phi|^2| dt`; :class:`~pyro_dgm.OTFlow` only.
        kinetic: weight of :math:`\int |v|^2 / D\, dt`. It straightens paths, so that a given number of steps is more
            accurate. None for 0.02 with a continuous flow.
        jacobian: weight of :math:`\int |\epsilon^\top \nabla v|^2 / D\, dt`, one probe.
        pretrain: steps before the first step: of flow matching, for continuous flows; of few rows at most so many on draws of
            what stands in for them (800 of flow matching and 150 of likelihood; of other flows 800 of likelihood). 0 changes
            nothing beforehand, not even the units.

    Raises:
        ValueError: for a negative weight, path costs of a family without paths, ``hjb`` without a potential, and data that
            do not fit the family or hold NaN.

    Note:
        The loss contains the costs. Compare models by ``-family().log_prob(held_out).mean()``.

    References:
        | Onken et al. (2021), "OT-Flow", arXiv 2006.00104. Finlay et al. (2020), arXiv 2002.02798.
        | Smyth & Wolpert (1999), "Linearly combining density estimators via stacking", Machine Learning 36.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> x = torch.randn(2000, 2) * torch.tensor([1.0, 5.0])
        >>> flow = dgm.FFJORD(2, hidden_features=8)
        >>> objective = dgm.MaximumLikelihood(flow, pretrain=200)
        >>> history = dgm.fit(objective, (x,), batch_size=200, max_steps=20, progress=False, seed=0)
        >>> exact = torch.distributions.Normal(0.0, torch.tensor([1.0, 5.0])).entropy().sum()
        >>> bool((-flow().log_prob(x).mean() - exact).abs() < 0.15)
        True
    """

    @checked()
    def __init__(
        self,
        family: DistributionModule,
        transport: float = 0.0,
        hjb: float = 0.0,
        *,
        kinetic: float | None = None,
        jacobian: float = 0.0,
        pretrain: int = _MATCHING_STEPS,
    ) -> None:
        super().__init__()
        continuous = isinstance(family, ContinuousFlow)
        if kinetic is None:
            kinetic = _KINETIC if continuous else 0.0
        weights = {"transport": transport, "hjb": hjb, "kinetic": kinetic, "jacobian": jacobian}
        for name, weight in weights.items():
            check_number("MaximumLikelihood", name, weight, least=0)
        check_number("MaximumLikelihood", "pretrain", pretrain, least=0, whole=True)
        self.weights = {name: weight for name, weight in weights.items() if weight}
        if self.weights and not continuous:
            raise ValueError(
                f"MaximumLikelihood: {', '.join(self.weights)} weigh the paths of a continuous flow; "
                f"{type(family).__name__} has none. Leave them out, or use FFJORD or OTFlow."
            )
        self.family: Any = family
        self.steps = pretrain
        self._refuse_hjb_without_potential()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The loss of events ``(N, *event_shape)`` with contexts ``(N, context_features)``."""
        x, context = check_batch("MaximumLikelihood", self.family, x, context)
        if not self.weights:
            return told_unless_finite("MaximumLikelihood", -self.family(context).log_prob(x).mean())
        score, costs = self.family.score_and_costs(x, context, list(self.weights))
        loss = -score.mean() + costs.mean(0) @ costs.new_tensor(list(self.weights.values()))
        return told_unless_finite("MaximumLikelihood", loss)

    def refuse_rows(self, *args: Any) -> None:
        """Rows lie in the family's support."""
        if args:
            refuse_outside_support("MaximumLikelihood", self.family, args[0])

    def recipe(self, rows: int | None) -> Recipe:
        """Rows are in part held out; of many, minibatches are taken."""
        return recipe_for(self.family, rows, starts=self.steps > 0)

    def prepare(self, batches: Iterator[tuple[Any, ...]], stages: Stages | None = None) -> None:
        """Take the units from the data and match the flow, unless the family was trained before."""
        family = self.family
        stages = stages or Stages()
        if not self.steps or not standardize_once(family, batches):
            return
        continuous = isinstance(family, ContinuousFlow)
        cheap = FlowMatching(family) if continuous else self
        courses = [Course(cheap, min(self.steps, FEW_STEPS if continuous else _FEW_STEPS))]
        if continuous:
            courses.append(Course(self, min(self.steps, _FEW_FINE[0]), _FEW_FINE[1]))
        if start_from_few(family, courses, batches, stages):
            return
        start_from_columns(family, batches)
        if not continuous:
            start_in_better_units(family, self, batches, stages)
            return
        mixture = mixture_for(family, batches, stages)
        match("flow matching", family, lambda: cheap(*next(batches)), stages, self.steps)
        if mixture is not None:
            start_from_mixture(family, *mixture)

    def _refuse_hjb_without_potential(self) -> None:
        if "hjb" in self.weights:
            self.family.refuse_costs(["hjb"])


class Transformed(nn.Module):
    r"""``objective(transform(x), ...)``: the first argument is transformed at each call, the others go through.

    ``Transformed(bound, torch.bernoulli)`` is dynamic binarisation of grey levels in [0, 1]; dequantising and augmenting go
    the same way.

    Example:
        >>> import torch
        >>> mean = Transformed(torch.nn.Identity(), torch.bernoulli)
        >>> bool(mean(torch.full((100,), 0.5)).unique().tolist() == [0.0, 1.0])
        True
    """

    @checked()
    def __init__(self, objective: nn.Module, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.objective = objective
        self.transform = transform

    def forward(self, x: Tensor, *rest: Tensor | None) -> Tensor:
        return self.objective(*self.changed_arguments((x, *rest)))

    def changed_arguments(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the objective gets: ``fit`` prepares its parts by such data too."""
        return (self.transform(args[0]), *args[1:])
