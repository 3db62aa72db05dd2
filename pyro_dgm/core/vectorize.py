"""Running a model on many draws at once, in an outer plate, and checking that this gives what single runs give."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Size, Tensor

__all__ = ["NOT_VECTORIZED", "log_probs", "per_draw", "plate_nesting", "together", "vectorization_fault"]

Model = Callable[..., Any]

NOT_VECTORIZED = (
    "The model cannot run many draws at once ({}), so they run one by one, which is slow. Latent vectors must broadcast: "
    "write (x * b).sum(-1) instead of x @ b, and b.sum(-1) instead of b.sum(). Then (x * b) may have draws on its left."
)


def plate_nesting(trace: poutine.Trace) -> int:
    """Depth of the vectorised plates in a trace: 2 where a site has ``dim=-2``."""
    sites = [s for s in trace.nodes.values() if s["type"] == "sample"]
    return max((-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized), default=0)


def together(fn: Model, n: int, nesting: int) -> Model:
    """The same program, run for ``n`` independent draws along one new leftmost dimension."""
    return pyro.plate("_draws", n, dim=-nesting - 1)(fn)


def log_probs(trace: poutine.Trace) -> list[Tensor]:
    """Log probabilities (with scales and masks) of all sample sites."""
    trace.compute_log_prob()
    return [s["log_prob"] for s in trace.nodes.values() if s["type"] == "sample"]


def per_draw(terms: Iterable[Tensor], n: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sum of terms whose leading dimension is the draw, shape ``(n,)``; a term without it counts for every draw."""
    rows = [t.to(dtype) if dtype else t for t in terms]
    return sum(t.reshape(n, -1).sum(-1) if t.shape[:1] == (n,) else t.sum().expand(n) for t in rows)  # type: ignore


def vectorization_fault(
    model: Model, values: dict[str, Tensor], shapes: dict[str, Size], nesting: int, args: Any, kwargs: Any
) -> str | None:
    """Why a plate of draws differs from single runs; None where it does not.

    ``values`` holds a few draws of every latent, shape ``(n, 1, .., *plates, *event)``; ``shapes`` what a single run
    gives. Compared is the log joint of every draw.
    """
    n = len(next(iter(values.values())))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), pyro.validation_enabled(False), poutine.block():
        rows = [{k: v[i].reshape(shapes[k]) for k, v in values.items()} for i in range(n)]
        single = torch.stack([_single(model, row, args, kwargs) for row in rows])
        try:
            run = together(poutine.condition(model, data=values), n, nesting)
            joint = per_draw(log_probs(poutine.trace(run).get_trace(*args, **kwargs)), n)
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if torch.allclose(joint, single, rtol=1e-4, atol=1e-3, equal_nan=True):
        return None
    return f"log joint of draws run together {_short(joint)}, run singly {_short(single)}"


def _single(model: Model, values: dict[str, Tensor], args: Any, kwargs: Any) -> Tensor:
    trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)
    return sum((t.sum() for t in log_probs(trace)), torch.zeros(()))


def _short(values: Tensor) -> str:
    return ", ".join(f"{float(v):.6g}" for v in values)
