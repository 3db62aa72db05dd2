"""Many draws of one program: together in a plate, by ``torch.vmap``, or one by one; subsampled plates in whole rounds.

A subsampled plate is run through all of its rows, a subsample at a time, with the global draws held fixed. What is outside
of the plate counts once, what is inside counts row by row, so densities are those of the full data.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_dgm.core.warn import warn_user
from pyro_dgm.model.handlers import Given, Redraw, Undrawn, posterior_draws_of
from pyro_dgm.model.sites import (
    Layout,
    is_computed,
    latent_sites,
    layout_of,
    left_of_plates,
    mask_of,
    plate_frames,
    sample_sites,
    subsampled,
    with_shape,
    write_log_probs,
)
from pyro_dgm.model.terms import Term, is_scored, merge_terms, plain_term, terms_of, total
from pyro_dgm.model.vectorize import NOT_VECTORIZED, How, Model, enumerated, first_line, in_draws_plate

__all__ = ["Runs", "Table", "rounds_of"]

Draws = dict[str, Tensor]  # {site: (n, *site)}
Round = dict[str, tuple[Tensor, Tensor]]  # plate -> its index in this round, and which positions of it are new


class _OwnNoise(TorchFunctionMode):
    """Under vmap, samplers whose arguments are the same for all draws refuse to give each draw its own noise.

    A zero that belongs to the draw is added to their argument.
    """

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self.zero = zero

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _SAMPLERS and isinstance(args[0], Tensor):
            args = (args[0] + self.zero.to(args[0].dtype), *args[1:])
        return func(*args, **(kwargs or {}))


_SLOW_SAMPLER = "There is a performance drop"  # torch's note, under vmap
_SAMPLERS = {"normal", "bernoulli", "poisson", "_standard_gamma", "_sample_dirichlet", "multinomial", "binomial",
             "normal_", "uniform_", "exponential_", "cauchy_", "geometric_", "log_normal_", "bernoulli_"}  # fmt: skip


@dataclass
class Table:
    """What n draws of a program leave behind.

    Attributes:
        values: by site, shape ``(n, *batch, *event)``.
        terms: of the log density, by site.
        masks: which data are there, shape ``batch``, for sites where not all are.
        lost: data that could not be drawn anew, and why.
    """

    values: Draws = field(default_factory=dict)
    terms: dict[str, Term] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    def total(self, n: int) -> Tensor:
        """Log density of every draw, in nats, summed in float64."""
        return total(self.terms.values(), n)


@dataclass(frozen=True)
class _Options:
    keep: Collection[str] | None = None
    redraw: bool = False
    score: bool = False
    discrete: str | None = None
    leave: Collection[str] = ()

    def keeps(self, name: str) -> bool:
        return self.discrete != "sum" and (self.keep is None or name in self.keep)


def stacked(tables: list[Table]) -> Table:
    """Tables of different draws as one."""
    first = tables[0]
    if len(tables) == 1:
        return first
    lost = _lost(tables)
    values = {k: torch.cat([t.values[k] for t in tables]) for k in first.values if k not in lost}
    terms = {k: merge_terms([u.terms[k] for u in tables], torch.cat) for k in first.terms}
    return Table(values, terms, first.masks, lost)


def _lost(tables: list[Table]) -> dict[str, str]:
    return {k: why for t in tables for k, why in t.lost.items()}


def rounds_of(traces: list[poutine.Trace]) -> list[Round]:
    """Index rounds that visit every row of every subsampled plate; one empty round where none is subsampled.

    The last round goes back to fill a whole subsample, whose size the model may fix; what was visited is not new.
    """
    _refuse_unplain(traces)
    frames = {
        f.name: f for t in traces for s in t.nodes.values() for f in s.get("cond_indep_stack", ()) if subsampled(f)
    }
    many = max((math.ceil(f.full_size / f.size) for f in frames.values()), default=1)
    return [{f.name: _visited(f.full_size, f.size, i) for f in frames.values()} for i in range(many)]


def _refuse_unplain(traces: list[poutine.Trace]) -> None:
    """Subsamples that cannot be visited: of two plates at once, and of a plate that is a loop."""
    for name, site in [item for t in traces for item in t.nodes.items()]:
        frames = [f for f in site.get("cond_indep_stack", ()) if subsampled(f)]
        if len(frames) > 1:
            raise ValueError(
                f"Site '{name}' lies in {len(frames)} subsampled plates ({', '.join(f.name for f in frames)}); only one can "
                "be visited row by row. Pass the full data for the others, with subsample_size=None."
            )
        if frames and not frames[0].vectorized:
            raise ValueError(
                f"Site '{name}' lies in plate '{frames[0].name}', a loop over a subsample. Write it as `with pyro.plate(...) "
                "as i:`, or pass the full data with subsample_size=None."
            )


def _visited(full: int, size: int, i: int) -> tuple[Tensor, Tensor]:
    start = min(i * size, full - size)
    index = torch.arange(start, start + size)
    return index, torch.nonzero(index >= i * size)[:, 0]


def _index(visited: Round) -> Draws:
    """The index of each plate in a round."""
    return {name: index for name, (index, _) in visited.items()}


class Runs:
    """A program with its arguments, run for many draws.

    Args:
        fn, args, kwargs: a model or a guide, and its arguments.
        prototype: a trace of one run.
        nesting: depth of the plates; draws go to the dimension left of them.
        how: "plate", "vmap" or "loop".
        rounds: of :func:`rounds_of`.
        with_grad: whether densities have gradients towards the values that are given.
    """

    def __init__(self, fn: Model, args: Any, kwargs: Any, prototype: poutine.Trace, nesting: int, how: How,
                 rounds: list[Round], *, with_grad: bool = False) -> None:  # fmt: skip
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.prototype = prototype
        self.nesting = nesting
        self.how = how
        self.fault = ""  # of one plate of draws, where there is another way
        self.rounds = rounds
        self.with_grad = with_grad
        self.layouts: dict[str, Layout] = {k: layout_of(s) for k, s in sample_sites(prototype)}
        self.latents = [k for k, _ in latent_sites(prototype)]

    def run(self, n: int, given: Draws | None = None, *, keep: Collection[str] | None = None, redraw: bool = False,
            score: bool = False, discrete: str | None = None, leave: Collection[str] = ()) -> Table:  # fmt: skip
        """Run for n draws.

        Args:
            n: number of draws.
            given: values of some latents, shape ``(n, *site)``; the others are drawn.
            keep: sites whose values are kept; None for all.
            redraw: draw data anew.
            score: with the terms of the log density.
            discrete: what happens to enumerable sites: None (drawn as the model says), "sum", or "draw" from their
                exact posterior.
            leave: data that are not drawn anew.

        Raises:
            Undrawn: if data are drawn anew and the model fails.
        """
        given = dict(given or {})
        parts: list[Table] = []
        for i, visited in enumerate(self.rounds):
            part = self._round(n, given, visited, _Options(keep, redraw, score, discrete, leave))
            if i == 0 and len(self.rounds) > 1:
                given |= {
                    k: part.values[k] for k in self.latents if not self._plates_in(k, visited) and k in part.values
                }
            parts.append(part)
        return parts[0] if len(parts) == 1 else self._merged(parts)

    def _grad(self) -> Any:
        return torch.set_grad_enabled(self.with_grad and torch.is_grad_enabled())

    def run_round(self, n: int) -> Draws:
        """Draws of the latents in the first round, in the shape of single runs."""
        table = self._round(n, {}, self.rounds[0], _Options())
        shapes = {k: self.prototype.nodes[k]["value"].shape for k in self.latents}
        return {k: table.values[k].reshape(n, *shape) for k, shape in shapes.items()}

    def computed(self, rows: Draws, how: How) -> Draws:
        """Values of the deterministic sites for a few draws of all latents, in the shape of single runs, run as told."""
        names = [k for k in self.layouts if is_computed(self.prototype.nodes[k])]
        if not names:
            return {}
        n = len(next(iter(rows.values())))
        before = self.how
        self.how = how
        try:
            return self._executed(self.fn, n, rows, _index(self.rounds[0]), _Options(names)).values
        finally:
            self.how = before

    def refuse_sums_across_subsamples(self, row: Draws) -> None:
        """Score one draw of the latents in one round: it names the site that depends on a discrete one outside its plate."""
        values = {k: v[0] for k, v in row.items()} | _index(self.rounds[0])
        self._alone(self.fn, values, _Options((), score=True, discrete="sum"))

    def of_prototype(self) -> Table:
        """The values of the prototype's run."""
        return self._table(self.prototype, 1, self.nesting, _Options())

    def _round(self, n: int, given: Draws, visited: Round, options: _Options) -> Table:
        index = _index(visited)
        rows = {k: self.rows(k, v, visited) for k, v in given.items() if k in self.layouts}
        if not options.redraw:
            return self._executed(self.fn, n, rows, index, options)
        redraw = Redraw(options.leave)
        try:
            return self._executed(redraw(self.fn), n, rows, index, options)
        except Exception as error:  # whatever a model says of data that it did not expect
            raise Undrawn(redraw, error) from error

    def _executed(self, fn: Model, n: int, rows: Draws, index: Draws, options: _Options) -> Table:
        fault = ""
        if self.how != "loop":
            try:
                run = self._by_vmap if self.how == "vmap" else self._together
                return run(fn, n, rows, index, options)
            except Exception as error:
                if not self._may_run_singly(error, options):
                    raise
                fault = first_line(error)
        single = [self._alone(fn, {k: v[i] for k, v in rows.items()} | index, options) for i in range(n)]
        if fault:
            self._say_slow(fault)
        return stacked(single)

    def _may_run_singly(self, error: Exception, options: _Options) -> bool:
        """Samplers that cannot run under vmap, and models that cannot take new data of many draws at once."""
        if isinstance(error, torch.linalg.LinAlgError) or isinstance(error.__cause__, torch.linalg.LinAlgError):
            return False
        return isinstance(error, RuntimeError) if self.how == "vmap" else options.redraw

    def _say_slow(self, fault: str) -> None:
        """Warn of the plate, which the user can mend, and go on one by one where vmap failed: its check ran no sampler."""
        self.how = "loop" if self.how == "vmap" else self.how
        warn_user(NOT_VECTORIZED.format(self.fault or fault))

    def rows(self, name: str, value: Tensor, visited: Round) -> Tensor:
        """The part of a full-size value that a round needs, in the shape of a single run: ``(n, *value)``."""
        layout = self.layouts[name]
        for plate, (index, _) in visited.items():
            if plate in layout.axes:
                value = value.index_select(layout.axes[plate], index.to(value.device))
        return value.reshape(len(value), *self.prototype.nodes[name]["value"].shape)

    def _together(self, fn: Model, n: int, rows: Draws, index: Draws, options: _Options) -> Table:
        given = {k: self.in_plate(k, v) for k, v in rows.items()} | index
        program = in_draws_plate(Given(given)(fn), n, self.nesting)
        return self._traced(program, n, self.nesting + 1, options)

    def in_plate(self, name: str, value: Tensor) -> Tensor:
        """Values ``(n, *value)`` with the draws left of all plates."""
        return left_of_plates(value, self.prototype.nodes[name]["fn"].event_dim, self.nesting)

    def _alone(self, fn: Model, values: Draws, options: _Options) -> Table:
        return self._traced(Given(values)(fn), 1, self.nesting, options)

    def _traced(self, program: Model, n: int, nesting: int, options: _Options) -> Table:
        try:
            if options.discrete == "draw":
                program = posterior_draws_of(program, -nesting - 1)
            with self._grad(), poutine.block(), pyro.validation_enabled(False):
                run = enumerated(program, nesting) if options.discrete == "sum" else program
                trace = poutine.trace(run).get_trace(*self.args, **self.kwargs)
                return self._table(trace, n, nesting, options)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"A matrix of the model could not be factorised for one of {n} draws. Add jitter to its diagonal "
                f"(1e-6 of its scale), or work in float64. torch says: {first_line(error)}"
            ) from error

    def _table(self, trace: poutine.Trace, n: int, nesting: int, options: _Options) -> Table:
        table = Table(terms=terms_of(trace, n, self.layouts) if options.score else {})
        for name, site in trace.nodes.items():
            if name in self.layouts:
                mask = None if is_computed(site) else mask_of(site, self.layouts[name], nesting)
                table.masks |= {} if mask is None else {name: mask}
                if options.keeps(name):
                    self._put(table, name, site["value"].detach(), n, options)
        return table

    def _put(self, table: Table, name: str, value: Tensor, n: int, options: _Options) -> None:
        """A site's value into the table; new data of a wrong shape are lost, without the rest."""
        try:
            table.values[name] = with_shape(value, n, self.layouts[name].shape, name)
        except ValueError as error:
            if not options.redraw:
                raise
            table.lost[name] = str(error)

    def _by_vmap(self, fn: Model, n: int, rows: Draws, index: Draws, options: _Options) -> Table:
        def single(row: Draws, zero: Tensor) -> tuple[Draws, Draws]:
            with _OwnNoise(zero):
                trace = poutine.trace(Given(row | index)(fn)).get_trace(*self.args, **self.kwargs)
            if options.score:
                write_log_probs(trace, is_scored)
            sites = {k: s for k, s in trace.nodes.items() if k in self.layouts}
            return {k: s["value"] for k, s in sites.items() if options.keeps(k)}, {
                k: s["log_prob"] for k, s in sites.items() if "log_prob" in s
            }

        with (
            self._grad(),
            pyro.validation_enabled(False),
            poutine.block(hide_types=["sample", "observe"]),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message=_SLOW_SAMPLER)
            values, log_probs = torch.vmap(single, randomness="different")(rows, torch.zeros(n))
        masks = self._alone(fn, {k: v[0] for k, v in rows.items()} | index, _Options(())).masks
        table = Table(terms=self._mapped_terms(log_probs, n), masks=masks)
        for name, value in values.items():
            self._put(table, name, value, n, options)
        return table

    def _mapped_terms(self, log_probs: Draws, n: int) -> dict[str, Term]:
        nodes = self.prototype.nodes
        return {k: plain_term(k, nodes[k], log_prob, n, self.layouts[k]) for k, log_prob in log_probs.items()}

    def _plates_in(self, name: str, visited: Round) -> bool:
        return any(f.name in visited for f in plate_frames(self.prototype.nodes[name]))

    def _merged(self, parts: list[Table]) -> Table:
        first = parts[0]
        lost = _lost(parts)
        kept = [k for k in first.values if k not in lost]
        values = {k: self._joined([t.values[k] for t in parts], self.layouts[k].axes) for k in kept}
        terms = {
            k: merge_terms([t.terms[k] for t in parts], partial(self._joined, axes=first.terms[k].axes))
            for k in first.terms
        }
        masks = {}
        for k in first.masks:
            axes = {plate: axis - 1 for plate, axis in self.layouts[k].axes.items()}
            masks[k] = self._joined([t.masks[k] for t in parts], axes)
        return Table(values, terms, masks, lost)

    def _joined(self, parts: list[Tensor], axes: dict[str, int]) -> Tensor:
        """Rows of a subsampled plate, of all rounds; what lies in none is the first round's."""
        for plate in self.rounds[0]:
            if plate in axes:
                axis, new = axes[plate], [visited[plate][1] for visited in self.rounds]
                return torch.cat([p.index_select(axis, i.to(p.device)) for p, i in zip(parts, new, strict=True)], axis)
        return parts[0]
