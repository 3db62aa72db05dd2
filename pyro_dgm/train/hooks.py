"""Optional hooks that ``fit`` calls where a module defines them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from pyro_dgm.core.data import Standardize

__all__ = [
    "Alternating",
    "Convergent",
    "Distillable",
    "Drawing",
    "Finishing",
    "Implicit",
    "Paced",
    "Pretrainable",
    "Recipe",
    "Recommending",
    "Standardizable",
    "Startable",
    "Transporting",
]


@runtime_checkable
class Startable(Protocol):
    """A module that can find its own starting point from the data before the first gradient step."""

    def warm_start(self, *args: Any, **kwargs: Any) -> None:
        """Start from the data; does nothing on a module that was already trained."""


@runtime_checkable
class Pretrainable(Protocol):
    """An objective with a cheaper one that brings its parameters near their end first."""

    def pretrain(self, batches: Iterator[tuple[Any, ...]]) -> None:
        """Train on as many of the endless batches as it takes; does nothing where that was done before."""


@runtime_checkable
class Standardizable(Protocol):
    """A family that can take its units from data."""

    standard: Standardize

    def standardize(self, x: Tensor) -> Any:
        """Fix the units to events ``(N, *event_shape)``."""


@runtime_checkable
class Drawing(Protocol):
    """A family that draws rows directly; training by draws asks for some in every step."""

    def draw(self, rows: int, context: Tensor | None = None) -> Tensor:
        """So many draws, one for each row of a context."""


@runtime_checkable
class Transporting(Protocol):
    """A family whose draws are carried along a velocity field from noise at time 0 to events at time 1."""

    def velocity(self, time: Tensor, u: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity, in the flow's units."""

    def flow_units(self, x: Tensor) -> Tensor:
        """Events as vectors in the flow's units."""

    def score_and_costs(self, x: Tensor, context: Tensor | None, costs: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Log density of events, and what their paths cost."""


@runtime_checkable
class Distillable(Protocol):
    """A generator that can be shown where each of its latents should go."""

    def latents(self, rows: int, context: Tensor | None = None) -> Tensor:
        """Draws of the latent, ``(rows, *latent)``."""

    def location(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Where latents go, flat and in standard units, ``(rows, D)``."""

    def units(self, x: Tensor) -> Tensor:
        """Events in the same units."""


@runtime_checkable
class Convergent(Protocol):
    """An objective that can tell whether more training is worth while."""

    def converged(self) -> bool:
        """Whether the loss is so near its limit that a longer round would change nothing a user sees."""


@runtime_checkable
class Finishing(Protocol):
    """A module with something to set that no gradient reaches, once training has ended."""

    def finish(self, *args: Any, **kwargs: Any) -> None:
        """Set it; the parameters stay as they are."""


@runtime_checkable
class Implicit(Protocol):
    """A guide over one latent vector that draws without a density; its noise may choose among modes."""

    def setup(self, *args: Any, **kwargs: Any) -> Any:
        """Create all parameters."""

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Latent vectors ``(n, D)``, with gradients, and the modes that they belong to, ``(n,)``."""

    def log_weight(self) -> Tensor:
        """Log probabilities of the modes."""

    def weigh(self, log_weight: Tensor) -> None:
        """Set them."""

    def score_by(self, log_density: Any) -> None:
        """Let an estimate stand in for the log density; None takes it back."""


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


@dataclass(frozen=True)
class Recipe:
    """How to train, where the user says nothing: what :func:`~pyro_dgm.fit` fills in for arguments that are None.

    Attributes:
        lr: peak learning rate.
        weight_decay: of AdamW; 0 for Adam.
        averaging: decay of the running average of the weights, which is what is validated and kept; 0 for none.
    """

    lr: float = 5e-3
    batch_size: int | None = None
    max_epochs: int | None = None
    validation: float | None = None
    patience: int | None = None
    weight_decay: float = 0.0
    averaging: float = 0.0


@runtime_checkable
class Recommending(Protocol):
    """An objective that knows how it is trained best."""

    def recipe(self, rows: int | None) -> Recipe:
        """For that many rows of data; None where there are no rows (no data, or a loader)."""
