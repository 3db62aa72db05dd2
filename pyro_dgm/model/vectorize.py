"""Running a model on many draws at once, in an outer plate or by vmap, and checking that this gives what single runs give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import pyro
import torch
from opt_einsum import shared_intermediates
from pyro import poutine
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from torch import Size, Tensor

from pyro_dgm.core.devices import fork_rng
from pyro_dgm.model.handlers import is_enumerated

__all__ = [
    "DRAWS",
    "NOT_VECTORIZED",
    "How",
    "enumerated",
    "fault_of",
    "find_vectorization",
    "joint_alone",
    "joint_in_plate",
    "joint_of",
    "joint_of_rows",
    "log_probs",
    "packed_log_probs",
    "per_draw",
    "plate_nesting",
    "read_of_rows",
    "seeded_run",
    "in_draws_plate",
]

Model = Callable[..., Any]
How = Literal["plate", "vmap", "loop"]  # in which many draws are run
DRAWS = "_draws"  # the plate of draws

NOT_VECTORIZED = (
    "The model cannot run many draws at once ({}), so they run one by one, which is slow. Latent vectors must broadcast: "
    "write (x * b).sum(-1) instead of x @ b, and b.sum(-1) instead of b.sum(). Then (x * b) may have draws on its left."
)


def plate_nesting(trace: poutine.Trace) -> int:
    """Depth of the vectorised plates in a trace: 2 where a site has ``dim=-2``."""
    sites = [s for s in trace.nodes.values() if s["type"] == "sample"]
    return max((-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized), default=0)


def in_draws_plate(fn: Model, n: int, nesting: int) -> Model:
    """The same program, run for ``n`` independent draws along one new leftmost dimension."""
    return pyro.plate(DRAWS, n, dim=-nesting - 1)(fn)


def enumerated(fn: Model, nesting: int) -> Model:
    """The same program with its enumerable sites in dimensions left of all plates."""
    return poutine.enum(fn, first_available_dim=-nesting - 1)


def log_probs(trace: poutine.Trace) -> list[Tensor]:
    """Log probabilities (with scales and masks) of all sample sites; enumerated sites are summed out."""
    trace.compute_log_prob()
    if _has_enumerated(trace):
        terms = list(packed_log_probs(trace))  # which names the dimensions
        return [_draws_first(t, trace.plate_to_symbol.get(DRAWS, "")) for t in terms]
    return [s["log_prob"] for s in _sample_sites(trace)]


def packed_log_probs(trace: poutine.Trace) -> Iterator[Tensor]:
    """The same terms with named dimensions (``term._pyro_dims``, symbols of ``trace.plate_to_symbol``)."""
    trace.compute_log_prob()
    trace.pack_tensors()
    if not _has_enumerated(trace):
        yield from (s["packed"]["log_prob"] for s in _sample_sites(trace))
        return
    plain, factors, _, sum_dims, scale = _compute_model_factors(trace, poutine.Trace())
    with shared_intermediates() as cache:
        summed = contract_tensor_tree(factors, sum_dims, cache=cache)
    yield from (t for group in plain.values() for t in group)
    for group in summed.values():
        for t in group:
            scaled = packed.scale_and_mask(t, scale=scale)
            scaled._pyro_dims = t._pyro_dims
            yield scaled


def _sample_sites(trace: poutine.Trace) -> list[dict[str, Any]]:
    return [s for s in trace.nodes.values() if s["type"] == "sample"]


def _has_enumerated(trace: poutine.Trace) -> bool:
    return any(is_enumerated(s) for s in _sample_sites(trace))


def _draws_first(term: Tensor, draws: str) -> Tensor:
    dims = term._pyro_dims  # type: ignore[attr-defined]
    return term.movedim(dims.index(draws), 0) if draws and draws in dims else term.sum()


def per_draw(terms: Iterable[Tensor], n: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sum of terms whose leading dimension is the draw, shape ``(n,)``; a term without it counts for every draw."""
    rows = [t.to(dtype) if dtype else t for t in terms]
    return sum(t.reshape(n, -1).sum(-1) if t.shape[:1] == (n,) else t.sum().expand(n) for t in rows)  # type: ignore


def joint_of_rows(model: Model, rows: dict[str, Tensor], args: Any, kwargs: Any) -> Tensor:
    """Log joint of every row of ``rows`` (``{site: (n, *site)}``), shape ``(n,)``, by ``torch.vmap`` of single runs.

    It needs no broadcasting from the model, but neither control flow on values nor enumerated sites.
    """

    return read_of_rows(model, rows, joint_of, args, kwargs)


def read_of_rows(
    model: Model, rows: dict[str, Tensor], read: Callable[[poutine.Trace], Any], args: Any, kwargs: Any
) -> Any:
    """What ``read`` takes from the trace of a single run, for every row of ``rows``, by ``torch.vmap``."""

    def one(values: dict[str, Tensor]) -> Any:
        return read(poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs))

    with pyro.validation_enabled(False), poutine.block(hide_types=["sample"]):
        return torch.vmap(one, randomness="same")(rows)


def find_vectorization(
    model: Model, values: dict[str, Tensor], shapes: dict[str, Size], nesting: int, args: Any, kwargs: Any
) -> tuple[How, str]:
    """How many draws of the latents can be run at once, and what is wrong with the plate where it is not that.

    ``values`` holds a few draws of every latent, shape ``(n, 1, .., *plates, *event)``; ``shapes`` what a single run
    gives. The log joint of draws in one plate, then of draws under ``vmap``, is compared with that of single runs.
    """
    n = next((len(v) for v in values.values()), 1)
    rows = {k: v.reshape(n, *shapes[k]) for k, v in values.items()}
    with torch.no_grad(), pyro.validation_enabled(False), poutine.block():
        each = [{k: v[i] for k, v in rows.items()} for i in range(n)]
        single = torch.stack([seeded_run(partial(joint_alone, model, row, nesting, args, kwargs)) for row in each])
        alone = partial(joint_alone, model, nesting=nesting, args=args, kwargs=kwargs)
        nudged = partial(_nudged, alone, each)
        fault = fault_of(lambda: joint_in_plate(model, values, n, nesting, args, kwargs), single, nudged)
        if not fault:
            return "plate", ""
        mapped = fault_of(lambda: joint_of_rows(model, rows, args, kwargs), single, nudged)
    return ("loop" if mapped else "vmap"), fault


def joint_in_plate(model: Model, values: dict[str, Tensor], n: int, nesting: int, args: Any, kwargs: Any) -> Tensor:
    """Log joint of ``n`` draws ``{site: (n, 1, .., *plates, *event)}``, shape ``(n,)``, in one plate."""
    run = enumerated(in_draws_plate(poutine.condition(model, data=values), n, nesting), nesting + 1)
    return per_draw(log_probs(poutine.trace(run).get_trace(*args, **kwargs)), n)


def fault_of(run: Callable[[], Tensor], expected: Tensor, nudged: Callable[[], Tensor] | None = None) -> str:
    """Why a way of running many draws is wrong; empty where it is right.

    ``nudged`` gives the expected values at draws that are one rounding away: where they are far off, rounding is the
    reason of a difference. It is only asked where there is one.
    """
    try:
        joint = seeded_run(run)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if torch.allclose(joint, expected, rtol=1e-4, atol=1e-3, equal_nan=True):
        gap, allowed = _gap(joint, expected)
        if bool((gap <= allowed).all()):
            return ""
        noise = 8.0 * _gap(seeded_run(nudged), expected)[0].max() if nudged else gap.new_zeros(())
        if bool((gap <= allowed + noise).all()):
            return ""
    return f"log joint of draws run together {_short(joint)}, run singly {_short(expected)}"


def _gap(joint: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """How far the differences between draws lie from what is expected of them, and how far rounding may put them.

    Totals may be large and tell little: what one draw has more than another is what weights and gradients see.
    """
    joint, expected = joint.detach().cpu().double().reshape(-1), expected.detach().cpu().double().reshape(-1)
    finite = joint.isfinite() & expected.isfinite()
    joint, expected = joint[finite], expected[finite]
    gap = joint - expected
    rounding = 8.0 * torch.finfo(torch.float32).eps * expected.abs()
    allowed = 1e-3 + 1e-4 * (expected - expected[:1]).abs() + rounding
    return (gap - gap[:1]).abs(), allowed


def _nudged(alone: Callable[..., Tensor], each: list[dict[str, Tensor]]) -> Tensor:
    """The log joints of single runs with every value moved by a rounding."""
    step = 1.0 + torch.finfo(torch.float32).eps
    moved = [{k: v * step if v.is_floating_point() else v for k, v in row.items()} for row in each]
    return torch.stack([seeded_run(partial(alone, values=row)) for row in moved])


def seeded_run(run: Callable[[], Tensor]) -> Tensor:
    """The same subsamples in each run."""
    with fork_rng(0):
        return run()


def joint_alone(model: Model, values: dict[str, Tensor], nesting: int, args: Any, kwargs: Any) -> Tensor:
    """Log joint of one draw, a scalar."""
    run = enumerated(poutine.condition(model, data=values), nesting)
    return joint_of(poutine.trace(run).get_trace(*args, **kwargs))


def joint_of(trace: poutine.Trace) -> Tensor:
    """Log joint of a trace of one draw, a scalar."""
    return sum((t.sum() for t in log_probs(trace)), torch.zeros(()))


def _short(values: Tensor) -> str:
    return ", ".join(f"{float(v):.6g}" for v in values)
