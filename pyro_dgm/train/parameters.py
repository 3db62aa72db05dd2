"""Which tensors a fit trains: the objective's own parameters, and those of ``pyro.param`` statements.

The fit runs in a param store of its own, so that entries left by an earlier guide of the same name cannot replace a
module's parameters (pyro#1204, pyro#3094). Afterwards the trained entries stand in the global store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_dgm.core.random import fork_rng

__all__ = ["owned_parameters"]


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
