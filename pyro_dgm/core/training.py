"""What a module may offer to training, beyond being an objective. Offers are made by having the method."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

__all__ = ["Convergent", "Settling", "Startable"]


@runtime_checkable
class Startable(Protocol):
    """A module that can find its own starting point from the data before the first gradient step."""

    def warm_start(self, *args: Any, **kwargs: Any) -> None:
        """Start from the data; does nothing on a module that was already trained."""


@runtime_checkable
class Convergent(Protocol):
    """An objective that can tell whether more training is worth while."""

    def converged(self) -> bool:
        """Whether the loss is so near its limit that a longer round would change nothing a user sees."""


@runtime_checkable
class Settling(Protocol):
    """A module with something to set that no gradient reaches, once training has ended."""

    def settle(self, *args: Any, **kwargs: Any) -> None:
        """Set it; the parameters stay as they are."""
