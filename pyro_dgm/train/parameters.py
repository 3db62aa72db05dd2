r"""Which tensors a fit trains: the objective's own parameters, and those of ``pyro.param`` statements.

The fit runs in a param store of its own, so that entries left by an earlier guide of the same name cannot replace a
module's parameters (pyro#1204, pyro#3094). Afterwards the trained entries stand in the global store.

A running average of the weights, :math:`\bar w \leftarrow d\,\bar w + (1 - d)\,w` (Polyak & Juditsky 1992).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_dgm.core.devices import fork_rng

__all__ = ["Average", "owned_parameters"]


@contextmanager
def owned_parameters(
    objective: nn.Module, example: tuple[Any, ...], prepare: Callable[[], None]
) -> Iterator[list[Tensor]]:
    """Run the objective once, so that lazy parameters exist, prepare it, and yield all leaf tensors to train."""
    store = pyro.get_param_store()
    outer = store.get_state()
    with store.scope():
        with torch.no_grad(), fork_rng():
            objective(*example)
        _continue_from(outer, objective)
        prepare()
        parameters: list[Tensor] = [p for p in objective.parameters() if p.requires_grad]
        parameters += [p for p in store.get_state()["params"].values() if all(p is not q for q in parameters)]
        if not parameters:
            raise ValueError("fit: the objective has no trainable parameters. Pass model and guide as nn.Modules.")
        try:
            yield parameters
        finally:
            inner = store.get_state()
    for key in ("params", "constraints"):
        outer[key].update(inner[key])
    store.set_state(outer)


def _continue_from(outer: dict[str, Any], objective: nn.Module) -> None:
    """Take the values that free ``pyro.param`` statements had before; modules keep their own."""
    own = {id(p) for p in objective.parameters()}
    state = pyro.get_param_store().get_state()
    for name, parameter in state["params"].items():
        known = outer["params"].get(name)
        if id(parameter) not in own and known is not None and known.shape == parameter.shape:
            state["params"][name] = known
    pyro.get_param_store().set_state(state)


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
        self.parameters = list(parameters)
        self.decay = decay
        self.steps = 0
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
        self.steps = state["steps"]
        self.values = [v.to(p.device, copy=True) for v, p in pairs]

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
