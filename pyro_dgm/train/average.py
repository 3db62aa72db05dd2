r"""A running average of the weights, :math:`\bar w \leftarrow d\,\bar w + (1 - d)\,w` (Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Average"]


class Average:
    """The average of parameters over steps; with ``decay`` 0 nothing is averaged.

    Early steps are forgotten faster, unless the average begins at parameters that are good already (``begins_well``).

    >>> w = torch.nn.Parameter(torch.tensor(1.0))
    >>> average = Average([w], 0.5, begins_well=True)
    >>> with torch.no_grad():
    ...     _ = w.fill_(3.0)
    >>> average.update(), average.give(), w.item()
    (None, None, 2.0)
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float, begins_well: bool = False) -> None:
        self.parameters, self.decay, self.steps = list(parameters), decay, 0
        self.begins_well = begins_well
        self.values = [p.detach().clone() for p in parameters] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after a step."""
        self.steps += 1
        if self.decay:
            early = 1.0 if self.begins_well else (1.0 + self.steps) / (10.0 + self.steps)
            decay = min(self.decay, early)
            torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context the parameters have their averages."""
        if not self.decay:
            yield
            return
        now = [p.detach().clone() for p in self.parameters]
        self._put(self.values)
        try:
            yield
        finally:
            self._put(now)

    def give(self) -> None:
        """Set the parameters to their averages."""
        if self.decay:
            self._put(self.values)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"steps": self.steps, "values": [v.clone() for v in self.values]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        pairs = zip(state["values"], self.parameters, strict=False)  # no values without a decay
        self.steps, self.values = state["steps"], [v.to(p.device, copy=True) for v, p in pairs]

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
