"""What lies behind a guide's densities: the tensors that its gradients end at, and what its transforms remember."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pyro import poutine
from torch import Tensor, nn

from pyro_dgm.model.supports import simple_parts

__all__ = ["forget_inverses", "leaves_behind", "parameters_of", "registered_in"]


def parameters_of(guide: Any, trace: poutine.Trace) -> list[Tensor]:
    """The leaf tensors behind a guide's draws and their densities, which the trace holds, and those of the module.

    Nets that are not registered anywhere (in a closure, or with an encoder's output as an argument) are found by the
    graph of the draws.
    """
    sites = [n for n in trace.nodes.values() if n["type"] == "sample"]
    ends = [s[k] for s in sites for k in ("value", "log_prob") if isinstance(s.get(k), Tensor)]
    found = {id(p): p for p in [*registered_in(guide, trace), *leaves_behind(ends)]}
    return list(found.values())


def registered_in(guide: Any, trace: poutine.Trace) -> list[Tensor]:
    """The leaf tensors of ``pyro.param`` statements and of the guide, where that is a module."""
    params = [n["value"] for n in trace.nodes.values() if n["type"] == "param"]
    leaves = [p.unconstrained() if hasattr(p, "unconstrained") else p for p in params]
    inner = poutine.unwrap(guide)
    return leaves + (list(inner.parameters()) if isinstance(inner, nn.Module) else [])


def leaves_behind(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaves that require grad in the graphs of some tensors; one may come twice."""
    nodes: list[Any] = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            nodes.append(tensor.grad_fn)
        elif tensor.requires_grad:
            yield tensor
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if not node.next_functions and isinstance(getattr(node, "variable", None), Tensor):
            yield node.variable
        nodes.extend(n for n, _ in node.next_functions if n is not None)


def forget_inverses(fn: Any) -> None:
    """Drop what the transforms of a distribution remember of their last values."""
    while fn is not None:
        for t in simple_parts(getattr(fn, "transforms", ())):
            if hasattr(t, "clear_cache"):
                t.clear_cache()
        fn = getattr(fn, "base_dist", None)
