"""Many draws of a model's latents at once: in an outer plate, by ``torch.vmap``, or one by one.

A model can run in a plate if its latents broadcast, and by ``vmap`` if it has neither control flow on values nor enumerated
sites. Which of them gives the log joint of single runs is found out with a few draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pyro
import torch
from opt_einsum import shared_intermediates
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from torch import Tensor

from pyro_dgm.core.devices import fork_rng
from pyro_dgm.model.handlers import Given, is_enumerated
from pyro_dgm.model.sites import Site, left_of_plates, sample_sites, write_log_probs

__all__ = [
    "DRAWS",
    "NOT_VECTORIZED",
    "Engine",
    "How",
    "Model",
    "enumerated",
    "fault_of",
    "first_line",
    "in_draws_plate",
    "over_draws",
    "packed_log_probs",
    "per_draw",
    "plate_nesting",
    "seeded_run",
]

Model = Callable[..., Any]
How = Literal["plate", "vmap", "loop"]  # in which many draws are run
DRAWS = "_draws"  # the plate of draws

NOT_VECTORIZED = (
    "The model cannot run many draws at once ({}), so they run one by one, which is slow. Latent vectors must broadcast: "
    "write (x * b).sum(-1) instead of x @ b, and b.sum(-1) instead of b.sum(). Then (x * b) may have draws on its left."
)

# How far log joints of one draw may lie apart, run together and run singly. Not measured; chosen by hand.
_RELATIVE = 1e-4
_ABSOLUTE = 1e-3  # nats
_LONGEST = 300  # letters of what an error says
_ROUNDINGS = 8.0  # of float32, of the whole sum; and of what a rounding of the values changes


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


def over_draws(how: How, one: Callable[..., Any], rows: Any) -> Any:
    """What ``one`` makes of every draw, with the draws in front.

    Args:
        how: in a plate it is called once, as ``one(rows, n)``; otherwise with one row at a time, as ``one(row)``.
        one: gives a tensor, or a dictionary or tuple of them.
        rows: a tensor ``(n, ...)``, or a dictionary of such tensors.
    """
    if how == "plate":
        return one(rows, _count(rows))
    if how == "vmap":
        return torch.vmap(one, randomness="same")(rows)
    return _stacked([one(row) for row in _each(rows)])


def _count(rows: Any) -> int:
    return len(next(iter(rows.values()))) if isinstance(rows, dict) else len(rows)


def _each(rows: Any) -> list[Any]:
    if not isinstance(rows, dict):
        return list(rows)
    return [{k: v[i] for k, v in rows.items()} for i in range(_count(rows))]


def _stacked(made: list[Any]) -> Any:
    first = made[0]
    if isinstance(first, dict):
        return {k: _stacked([m[k] for m in made]) for k in first}
    if isinstance(first, tuple):
        return tuple(_stacked(list(parts)) for parts in zip(*made, strict=True))
    return torch.stack(made)


@dataclass(frozen=True)
class Engine:
    """A model with its arguments, run for many draws: their values, their log joint, and how they can be run.

    Attributes:
        model, args, kwargs: a Pyro model and its arguments.
        nesting: depth of its plates; draws go to the dimension left of them.
        event_dims: of its latents, where draws are given as ``{site: (n, *site)}``.
    """

    model: Model
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    nesting: int = 0
    event_dims: dict[str, int] = field(default_factory=dict)

    def log_joint(self, rows: dict[str, Tensor], how: How) -> Tensor:
        """Log joint of draws ``{site: (n, *site)}``, shape ``(n,)``, in nats, run as told."""
        return over_draws(how, partial(self._given, enumerate_sites=how != "vmap"), rows)

    def _given(self, values: dict[str, Tensor], n: int | None = None, *, enumerate_sites: bool = True) -> Tensor:
        given = poutine.condition(self.model, data=self._placed(values, n))
        return self.joint_of(given, n, enumerate_sites=enumerate_sites)

    def _placed(self, values: dict[str, Tensor], n: int | None) -> dict[str, Tensor]:
        """Values of one draw, or those of ``n`` draws left of all plates."""
        if n is None:
            return values
        return {k: left_of_plates(v, self.event_dims[k], self.nesting) for k, v in values.items()}

    def joint_of(self, model: Model, n: int | None = None, *, enumerate_sites: bool = True) -> Tensor:
        """Log joint of a model that holds its latents: of one draw, a scalar, or of ``n`` draws in a plate, ``(n,)``."""
        terms = self.terms_of(model, n, enumerate_sites=enumerate_sites)
        return sum((t.sum() for t in terms), torch.zeros(())) if n is None else per_draw(terms, n)

    def terms_of(self, model: Model, n: int | None = None, *, enumerate_sites: bool = True) -> list[Tensor]:
        """The terms of that log joint, each with the draws first where it depends on them."""
        run = self.wide(n, model)
        if enumerate_sites:
            run = enumerated(run, self.nesting + (n is not None))
        return _log_probs(poutine.trace(run).get_trace(*self.args, **self.kwargs))

    def wide(self, n: int | None, model: Model | None = None) -> Model:
        """The model, in a plate of ``n`` draws where there is a number."""
        run = self.model if model is None else model
        return run if n is None else in_draws_plate(run, n, self.nesting)

    def trace(
        self, n: int | None = None, given: dict[str, Tensor] | None = None, model: Model | None = None
    ) -> poutine.Trace:
        """One run, of one draw or of ``n`` draws in a plate.

        ``given`` has the values of some latents, ``{site: (*site)}`` or ``{site: (n, *site)}``; ``model`` is the model under
        some handlers.
        """
        run = Given(self._placed(given or {}, n))(self.model if model is None else model)
        return poutine.trace(self.wide(n, run)).get_trace(*self.args, **self.kwargs)

    def is_of(self, model: Model, args: Any, kwargs: Any) -> bool:
        """Whether this is the model, and these are the very arguments that it is called with."""
        given = [*map(id, args)], {k: id(v) for k, v in kwargs.items()}
        return model == self.model and given == ([*map(id, self.args)], {k: id(v) for k, v in self.kwargs.items()})

    def find_how(self, rows: dict[str, Tensor]) -> tuple[How, str]:
        """How many draws can be run at once, and what is wrong with the plate where it is not that.

        ``rows`` are a few draws of every latent, ``{site: (n, *site)}``. Their log joint in one plate, then under ``vmap``,
        is compared with that of single runs.
        """
        with torch.no_grad(), pyro.validation_enabled(False), poutine.block():
            single = self._singly(rows)
            nudged = lambda: self._singly({k: _nudged(v) for k, v in rows.items()})  # noqa: E731
            fault = fault_of(lambda: self.log_joint(rows, "plate"), single, nudged)
            if not fault:
                return "plate", ""
            mapped = fault_of(lambda: self.log_joint(rows, "vmap"), single, nudged)
        return ("loop" if mapped else "vmap"), fault

    def _singly(self, rows: dict[str, Tensor]) -> Tensor:
        """The log joints of single runs, each with the same subsamples."""
        return over_draws("loop", lambda row: seeded_run(lambda: self._given(row)), rows)


def seeded_run(run: Callable[[], Tensor]) -> Tensor:
    """The same subsamples in each run."""
    with fork_rng(0):
        return run()


def _nudged(value: Tensor) -> Tensor:
    """Values that are one rounding away."""
    return value * (1.0 + torch.finfo(torch.float32).eps) if value.is_floating_point() else value


def fault_of(run: Callable[[], Tensor], expected: Tensor, nudged: Callable[[], Tensor] | None = None) -> str:
    """Why a way of running many draws is wrong; empty where it is right.

    ``nudged`` gives the expected values at draws that are one rounding away: where they are far off, rounding is the
    reason of a difference. It is only asked where there is one.
    """
    try:
        joint = seeded_run(run)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        return first_line(error)
    if torch.allclose(joint, expected, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True):
        gap, allowed = _gap(joint, expected)
        if bool((gap <= allowed).all()):
            return ""
        noise = _ROUNDINGS * _gap(seeded_run(nudged), expected)[0].max() if nudged else gap.new_zeros(())
        if bool((gap <= allowed + noise).all()):
            return ""
    return f"log joint of draws run together {_short(joint)}, run singly {_short(expected)}"


def _gap(joint: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """How far the differences between draws lie from what is expected of them, and how far rounding may put them.

    Totals may be large and tell little: what one draw has more than another is what weights and gradients see.
    """
    joint = joint.detach().cpu().double().reshape(-1)
    expected = expected.detach().cpu().double().reshape(-1)
    finite = joint.isfinite() & expected.isfinite()
    joint, expected = joint[finite], expected[finite]
    gap = joint - expected
    rounding = _ROUNDINGS * torch.finfo(torch.float32).eps * expected.abs()
    allowed = _ABSOLUTE + _RELATIVE * (expected - expected[:1]).abs() + rounding
    return (gap - gap[:1]).abs(), allowed


def _short(values: Tensor) -> str:
    return ", ".join(f"{float(v):.6g}" for v in values)


def _log_probs(trace: poutine.Trace) -> list[Tensor]:
    """Log probabilities (with scales and masks) of all sample sites, by entries; enumerated sites are summed out."""
    write_log_probs(trace)
    if _has_enumerated(trace):
        terms = list(packed_log_probs(trace))  # which names the dimensions
        return [_draws_first(t, trace.plate_to_symbol.get(DRAWS, "")) for t in terms]
    return [_by_entry(s) for _, s in sample_sites(trace)]


def _by_entry(site: Site) -> Tensor:
    """The log probability of a site; of each entry of its event, where these are independent."""
    fn, more = site["fn"], 0
    while isinstance(fn, torch.distributions.Independent):
        fn, more = fn.base_dist, more + fn.reinterpreted_batch_ndims
    if not more:
        return site["log_prob"]
    scale, mask = (x[(..., *(None,) * more)] if isinstance(x, Tensor) else x for x in (site["scale"], site["mask"]))
    return scale_and_mask(fn.log_prob(site["value"]), scale, mask)


def packed_log_probs(trace: poutine.Trace) -> Iterator[Tensor]:
    """The same terms with named dimensions (``term._pyro_dims``, symbols of ``trace.plate_to_symbol``)."""
    write_log_probs(trace)
    trace.pack_tensors()
    if not _has_enumerated(trace):
        yield from (s["packed"]["log_prob"] for _, s in sample_sites(trace))
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


def _has_enumerated(trace: poutine.Trace) -> bool:
    return any(is_enumerated(s) for _, s in sample_sites(trace))


def _draws_first(term: Tensor, draws: str) -> Tensor:
    dims = term._pyro_dims  # type: ignore[attr-defined]
    return term.movedim(dims.index(draws), 0) if draws and draws in dims else term.sum()


def per_draw(terms: Iterable[Tensor], n: int) -> Tensor:
    """Sum of terms whose leading dimension is the draw, shape ``(n,)``; a term without it counts for every draw."""
    return sum(t.reshape(n, -1).sum(-1) if t.shape[:1] == (n,) else t.sum().expand(n) for t in terms)  # type: ignore


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    said = str(error).strip()
    return said.splitlines()[0][:_LONGEST] if said else type(error).__name__
