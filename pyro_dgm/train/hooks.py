"""Optional hooks that ``fit`` calls where a module defines them.

============================ ============================================ ==================================================
method                       of                                           called
============================ ============================================ ==================================================
``recipe(rows)``             the objective                                first, for arguments of ``fit`` that are None
``refuse_rows(*args)``       the objective                                with all data, before rows of them are held out
``players()`` and others     the objective                                in every step, where it is :class:`Alternating`
``warm_start(*args)``        any part of the objective                    before training, with the data or a first batch
``prepare(batches, stages)`` any part of the objective                    after its ``warm_start``
``peak_rate()``              any part of the objective                    when the optimiser is made
``converged(*args)``         the objective                                before the first step of an open fit, and at checks
``finish(*args)``            any part of the objective                    after training, with the data or a first batch
``judge_losses(batches, h)`` the objective                                last, with the history; in a fit of one process
``changed_arguments(args)``  an objective around another one              where parts inside are prepared: what they get
``settling``                 a part with a ``finish``                     once, for the share of ``max_seconds`` to leave for it
============================ ============================================ ==================================================

A fit that resumes from a checkpoint calls neither ``warm_start`` nor ``prepare``, unless it was stopped while preparing.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from pyro_dgm.train.descend import Stages
from pyro_dgm.train.history import History

__all__ = [
    "Alternating",
    "Convergent",
    "Finishing",
    "Judging",
    "Paced",
    "Preparing",
    "Recipe",
    "Recommending",
    "Refusing",
    "Settling",
    "Startable",
    "settings",
]


@runtime_checkable
class Startable(Protocol):
    """A module that can find its own starting point from the data before the first gradient step."""

    def warm_start(self, *args: Any, **kwargs: Any) -> None:
        """Start from the data; does nothing on a module that was already trained."""


@runtime_checkable
class Preparing(Protocol):
    """A module that takes its units from batches, or is brought near its end by a cheaper training."""

    def prepare(self, batches: Iterator[tuple[Any, ...]], stages: Stages | None = None) -> None:
        """Use as many of the endless batches as it takes; does nothing where that was done before.

        A training of its own is a call of ``stages.descend``, which the fit's history, time limit, checkpoint and bar see.
        """


@runtime_checkable
class Alternating(Protocol):
    """An objective of two players with a loss each: the loop steps the one, then the other, and averages the second.

    ``rates`` are the learning rates of the critic and of the generator.
    """

    rates: tuple[float, float]
    critic_steps: int
    ema: float

    def players(self) -> tuple[nn.Module, nn.Module]:
        """The critic, which is stepped ``critic_steps`` times, and the generator, which is stepped once after that."""

    def critic_loss(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """The critic's loss, and its accuracy."""

    def generator_loss(self, *batch: Tensor) -> Tensor:
        """The generator's loss, without a gradient towards the critic."""

    def quality(self, *held_out: Tensor) -> tuple[float, float]:
        """How near the generator's draws are to held-out rows: energy distance, and coverage as a share of the expected."""


@runtime_checkable
class Paced(Protocol):
    """A part of an objective whose parameters have a learning rate of their own."""

    def peak_rate(self) -> float | None:
        """The peak; None for the objective's."""


@runtime_checkable
class Convergent(Protocol):
    """An objective that can tell whether more training is worth while."""

    def converged(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the parameters, as they are, are so good that more training would change nothing a user sees."""


@runtime_checkable
class Finishing(Protocol):
    """A module with something to set or to say once training has ended."""

    def finish(self, *args: Any, **kwargs: Any) -> None:
        """Called with the best parameters in place."""


@runtime_checkable
class Judging(Protocol):
    """An objective that can say what the losses of a fit tell."""

    def judge_losses(self, batches: Iterator[tuple[Any, ...]], history: History) -> None:
        """Called without gradients, with the best parameters in place and with endless batches of what was trained on."""


@runtime_checkable
class Settling(Protocol):
    """A module whose ``finish`` takes a while: a share of a fit's seconds is left for it, where they are limited."""

    settling: float


@dataclass(frozen=True)
class Recipe:
    """How to train, where the user says nothing: what :func:`~pyro_dgm.fit` fills in for arguments that are None.

    Attributes:
        lr: peak learning rate.
        max_epochs, max_steps: limits, where the user gives none.
        validation: share of the rows to hold out.
        weight_decay: of AdamW; 0 for Adam.
        averaging: decay of the running average of the weights, which is what is validated and kept; 0 for none.
        every: steps between checks, where what is held out and for how long to wait is the recipe's; None for the usual.
    """

    lr: float = 5e-3
    batch_size: int | None = None
    max_epochs: int | None = None
    max_steps: int | None = None
    validation: float | None = None
    patience: int | None = None
    weight_decay: float = 0.0
    averaging: float = 0.0
    every: int | None = None


@runtime_checkable
class Refusing(Protocol):
    """An objective that knows which rows it cannot have."""

    def refuse_rows(self, *args: Any) -> None:
        """Raise where the data, all of them, hold such rows."""


@runtime_checkable
class Recommending(Protocol):
    """An objective that knows how it is trained best."""

    def recipe(self, rows: int | None) -> Recipe:
        """For that many rows of data; None where there are no rows (no data, or a loader)."""


def settings(objective: nn.Module) -> dict[str, Any]:
    """The name of an objective, and its settings where it is of this package: objectives of others may count in theirs."""
    elbo = copy(
        getattr(objective, "elbo", None)
    )  # a copy has the options that were asked for, not those of its last model
    ours = [part for part in (objective, elbo) if type(part).__module__.startswith("pyro_dgm.")]
    found = {name: value for part in ours for name, value in vars(part).items() if _is_setting(name, value)}
    return {"objective": type(objective).__name__} | found


def _is_setting(name: str, value: Any) -> bool:
    hidden = name.startswith("_") or name in ("training", "max_plate_nesting")  # the last is found at the first call
    numbers = value.values() if isinstance(value, dict) else [value]
    return not hidden and all(isinstance(number, bool | int | float | str) for number in numbers)
