"""What STL_ELBO and IWAE_ELBO share: draws of a guide, with the densities of model and guide.

The draws are run in one plate, by ``torch.vmap``, or one by one. A density is read by draw and by *unit*: a slice of those
plates that hold all local latents, whose average over draws may stand inside a logarithm of its own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer import Trace_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import Tensor

from pyro_dgm.core.devices import fork_rng, random_states
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import check_number
from pyro_dgm.core.warn import warn_user
from pyro_dgm.model.sites import (
    Frame,
    Site,
    is_enumerable,
    is_factor,
    latent_sites,
    plate_frames,
    sample_sites,
    subsampled,
    write_log_probs,
)
from pyro_dgm.model.supports import unwrapped
from pyro_dgm.model.vectorize import DRAWS, NOT_VECTORIZED, enumerated, in_draws_plate, over_draws, packed_log_probs
from pyro_dgm.objectives.agreement import Pair, fixed_part, how_to_draw, row_shape
from pyro_dgm.objectives.path_gradient import PathGradient

__all__ = ["Frames", "ParticleELBO", "Terms", "is_local", "scale_of", "stray_plates", "unit_terms", "units_of"]

Frames = tuple[Frame, ...]


def units_of(trace: poutine.Trace) -> Frames:
    """The plates that all local latents of a guide share, outermost first; their slices are independent.

    Local are the latents in subsampled plates, or, where nothing is subsampled, in any plate. Where all of these only
    follow from a joint draw outside, everything is one unit.
    """
    if _follow_from_a_joint_draw(trace):
        return ()
    stacks = [[f for f in plate_frames(s) if f.name != DRAWS] for _, s in latent_sites(trace)]
    parts = sorted({f.name for stack in stacks for f in stack if subsampled(f)})
    local = [stack for stack in stacks if any(f.name in parts or not parts for f in stack)]
    units = tuple(f for f in local[0] if all(f in stack for stack in local)) if local else ()
    if not units and parts:
        raise ValueError(
            f"IWAE_ELBO: latents lie in different subsampled plates, {parts}, so no bound per datum exists. Use "
            "STL_ELBO, or one plate around all local latents."
        )
    return units


def _follow_from_a_joint_draw(trace: poutine.Trace) -> bool:
    """Whether the latents in plates are parts of one vector, an auxiliary draw outside: those of a joint autoguide."""
    sites = [site for _, site in latent_sites(trace)]
    inside = [s for s in sites if any(f.name != DRAWS for f in plate_frames(s))]
    outside = [s for s in sites if not any(f.name != DRAWS for f in plate_frames(s))]
    joint = any(s["infer"].get("is_auxiliary") for s in outside)
    return joint and bool(inside) and all(isinstance(unwrapped(s["fn"]), Delta) for s in inside)


def is_local(site: Site, units: Frames) -> bool:
    """Whether the site lies in all plates of the units; without units every site does."""
    return set(units) <= set(plate_frames(site))


def scale_of(units: Frames) -> float:
    """By how much subsampling multiplies a unit's terms."""
    return math.prod((f.full_size or f.size) / f.size for f in units)


def stray_plates(traces: Iterable[poutine.Trace], units: Frames) -> list[str]:
    """Subsampled plates that scale a unit's terms without being one of the units: inside a logarithm no bound results."""
    stacks = [s["cond_indep_stack"] for trace in traces for _, s in sample_sites(trace)]
    local = [stack for stack in stacks if all(any(_same(u, f) for f in stack) for u in units if u.size > 1)]
    return sorted({f.name for stack in local for f in stack if subsampled(f) and not any(_same(u, f) for u in units)})


def _same(unit: Frame, frame: Frame) -> bool:
    """Whether a plate of the guide and one of the model are the same, under two names perhaps."""
    return unit.name == frame.name or (unit.dim, unit.size) == (frame.dim, frame.size)


def unit_terms(trace: poutine.Trace, units: Frames, n: int) -> tuple[Tensor, Tensor]:
    """Log density of each unit under each of the trace's ``n`` draws, ``(n, *units)``, and what is left, ``(n,)``.

    The trace holds one draw, or those of a plate of draws. Dimensions of size one have no name in a packed term; a term
    that is the same for all draws counts for each.
    """
    terms = list(packed_log_probs(trace))  # which names the dimensions
    sizes = [n, *(f.size for f in units)]
    symbols = [trace.plate_to_symbol.get(DRAWS, ""), *(_symbol(trace, f) for f in units)]
    needed = [s for s, size in zip(symbols[1:], sizes[1:], strict=True) if size > 1]
    local = torch.zeros(())
    rest = torch.zeros(())
    for term in terms:
        if all(s and s in term._pyro_dims for s in needed):  # type: ignore[attr-defined]
            local = local + _arranged(term, symbols)
        else:
            rest = rest + _arranged(term, symbols[:1])
    return local.expand(sizes), rest.expand(n)


def _symbol(trace: poutine.Trace, frame: Frame) -> str:
    """The symbol of a plate in a trace, or of the one in its place where model and guide call it by different names."""
    if frame.name in trace.plate_to_symbol:
        return trace.plate_to_symbol[frame.name]
    stacks = [plate_frames(s) for _, s in sample_sites(trace)]
    alike = {f.name for stack in stacks for f in stack if _same(frame, f)}
    return trace.plate_to_symbol[alike.pop()] if len(alike) == 1 else ""


def _arranged(term: Tensor, symbols: list[str]) -> Tensor:
    """The term with one dimension for each symbol, in their order, and the rest summed."""
    dims: str = term._pyro_dims  # type: ignore[attr-defined]
    rest = [i for i, s in enumerate(dims) if s not in symbols]
    summed = term.sum(rest) if rest else term
    left = [s for s in dims if s in symbols]
    order = [left.index(s) for s in symbols if s in left]
    return summed.permute(order).reshape([summed.shape[left.index(s)] if s in left else 1 for s in symbols])


Terms = tuple[Tensor, Tensor]  # of each draw and unit, (n, *units), and of each draw outside the units, (n,)


class ParticleELBO(Trace_ELBO):
    """A bound from ``num_particles`` draws. A subclass says how they are averaged, by ``differentiable_loss``.

    How the draws are run is found at the first call with a pair: many at once where that gives what single runs give.
    """

    num_particles: int
    vectorize_particles: bool
    fewest_alone: int | None = None  # draws that are left where they cannot run at once
    unpathed = "has no reparameterised draws."  # what is said of a guide site
    without_path = ""  # and what to do about it
    plain_instead = ""  # what is done where a score cannot be left out

    @checked()
    def __init__(
        self,
        num_particles: int = 128,
        *,
        vectorize_particles: bool = True,
        max_plate_nesting: float = float("inf"),
        max_iarange_nesting: float | None = None,
        retain_graph: bool | None = None,
        strict_enumeration_warning: bool = True,
        ignore_jit_warnings: bool = False,
        jit_options: dict[str, Any] | None = None,
        tail_adaptive_beta: float = -1.0,
    ) -> None:
        check_number(type(self).__name__, "num_particles", num_particles, least=1, whole=True)
        nesting = max_iarange_nesting or max_plate_nesting
        if not nesting >= 0:
            raise ValueError(
                f"{type(self).__name__}: max_plate_nesting is {nesting}, expected a whole number, or infinity."
            )
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
            max_iarange_nesting=max_iarange_nesting,
            retain_graph=retain_graph,
            strict_enumeration_warning=strict_enumeration_warning,
            ignore_jit_warnings=ignore_jit_warnings,
            jit_options=jit_options,
            tail_adaptive_beta=tail_adaptive_beta,
        )
        self._met: Any = None
        self._once: Any = None  # a run of the guide, for its structure
        self._how = ""
        self._asked: dict[str, Any] = {}  # the options that were changed for the pair at hand
        self._path = PathGradient(type(self).__name__, self.plain_instead)

    @checked()
    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> Any:
        return super().__call__(model, guide)

    @abstractmethod
    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound, in nats, with its gradient."""

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    @property
    def _nesting(self) -> int:
        """Depth of the plates of model and guide, without that of the draws."""
        return int(self.max_plate_nesting) - int(self.vectorize_particles and self.num_particles > 1)

    @property
    def _together(self) -> bool:
        return self._how in ("plate", "vmap")

    @property
    def _runs(self) -> int:
        """How often guide and model run in a step; once, if the guide draws nothing and all runs are the same."""
        return self.num_particles if self._how == "loop" else 1

    def _forget(self) -> None:
        """Be as before the first call: with the options that were asked for, and nothing known of a model or a guide."""
        self.__dict__.update(self._asked, _asked={}, _how="", _met=None, _once=None)

    def __getstate__(self) -> dict[str, Any]:
        """Without model, guide and traces: they are found again at the next call."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._forget()
        new._path = PathGradient(type(self).__name__, self.plain_instead)
        return new.__dict__

    def _meet(self, pair: Pair) -> None:
        """What a first call has to find out or to create; it takes nothing from the stream of random numbers."""
        if (pair.model, pair.guide) == self._met and not self._has_more(pair):
            return
        self._forget()
        if self.max_plate_nesting == float("inf"):
            self._asked = {"max_plate_nesting": self.max_plate_nesting}
            with fork_rng():
                self._guess_max_plate_nesting(*pair[:2], pair.args, pair.kwargs)
        with torch.no_grad(), poutine.block(), fork_rng():
            once = pair.guide_trace(pair.guide)
            self._refuse_unpathed(once)
            model_once = pair.trace(poutine.replay(pair.model, trace=once))
        self._refuse_missing(model_once, once)
        self._met, self._once = (pair.model, pair.guide), once
        if self.vectorize_particles and self.num_particles > 1:
            self._choose(pair, once, model_once)
        else:
            self._how = "loop"

    def _has_more(self, pair: Pair) -> bool:
        """Whether a guide that drew nothing at the first call, with all latents given, has draws now."""
        if self._how != "once":
            return False
        with torch.no_grad(), poutine.block(), fork_rng():
            return bool(dict(latent_sites(pair.guide_trace(pair.guide))))

    def _choose(self, pair: Pair, once: poutine.Trace, model_once: poutine.Trace) -> None:
        self._how, fault = how_to_draw(pair, once, model_once, self._nesting)
        if self._how == "loop":
            warn_user(NOT_VECTORIZED.format(fault))
            changed = ("max_plate_nesting", "vectorize_particles", "num_particles")
            self._asked = {k: getattr(self, k) for k in changed} | self._asked
            self.max_plate_nesting -= 1
            self.vectorize_particles = False
            self.num_particles = min(self.num_particles, self.fewest_alone or self.num_particles)

    def _run(self, guide: Any) -> Any:
        """The guide as it is run: in a plate of draws, or alone."""
        return in_draws_plate(guide, self.num_particles, self._nesting) if self._together else guide

    def _draw(self, pair: Pair, shared: Collection[str] = (), *, same_rows: bool = False) -> Iterator[poutine.Trace]:
        """Traces of the guide: one of all draws, or one for each.

        Sites named in ``shared`` are drawn once for all; with ``same_rows`` subsamples are, too.
        """
        run, left = self._run(pair.guide), self._runs
        if shared or (same_rows and not self._together):
            once = self._traced(pair, pair.guide)
            run = poutine.replay(run, trace=fixed_part(once, shared))
            if not self._together:
                left -= 1
                yield once
        for _ in range(left):
            yield self._traced(pair, run)

    def _traced(self, pair: Pair, run: Any) -> poutine.Trace:
        states = random_states()
        trace = pair.guide_trace(run)
        trace.nodes["_INPUT"]["random_states"] = states  # for another run like it
        self._refuse_unpathed(trace)
        if self._runs > 1:
            write_log_probs(trace)  # some transforms of Pyro remember their last draw only
        return trace

    def _model_traces(self, pair: Pair, drawn: list[poutine.Trace], *, same_rows: bool = False) -> list[poutine.Trace]:
        """The model run through the draws of each trace."""
        traces: list[poutine.Trace] = []
        for trace in drawn:
            run = enumerated(self._run(pair.model), self._nesting + self._together)
            if traces and same_rows:
                run = poutine.replay(run, trace=fixed_part(traces[0]))
            traces.append(pair.trace(poutine.replay(run, trace=trace)))
            self._refuse_missing(traces[-1], trace)
            if is_validation_enabled():
                check_model_guide_match(traces[-1], trace, self._nesting + self._together)
        return [prune_subsample_sites(trace) for trace in traces]

    def _terms(self, traces: list[poutine.Trace], units: Frames) -> Terms:
        """The log density of every draw: by unit, and outside the units."""
        n = self.num_particles if self._together else 1
        parts = [unit_terms(trace, units, n) for trace in traces]
        return parts[0] if len(parts) == 1 else (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))

    def _mapped_terms(
        self, pair: Pair, drawn: poutine.Trace, units: Frames, shared: Collection[str] = ()
    ) -> tuple[Terms, poutine.Trace]:
        """The model's terms by ``vmap`` of single runs, and the trace of one of them (its values are of no use)."""
        n = self.num_particles
        traces: list[poutine.Trace] = []
        sites = dict(latent_sites(drawn))
        rows = {k: s["value"].reshape(n, *row_shape(s)) for k, s in sites.items() if k not in shared}
        known = {k: sites[k]["value"] for k in shared}
        model = poutine.condition(poutine.replay(pair.model, trace=fixed_part(drawn)), data=known)

        def one(values: dict[str, Tensor]) -> Terms:
            traces.append(prune_subsample_sites(pair.trace(poutine.condition(model, data=values))))
            local, rest = unit_terms(traces[-1], units, 1)
            return local[0], rest[0]

        with pyro.validation_enabled(False), poutine.block(hide_types=["sample", "observe"]):
            return over_draws("vmap", one, rows), traces[0]

    def _refuse_unpathed(self, guide_trace: poutine.Trace) -> None:
        for name, site in sample_sites(guide_trace):
            if _has_no_path(site):
                raise ValueError(
                    f"{type(self).__name__}: guide site '{name}' ({type(site['fn']).__name__}) {self.unpathed} "
                    f"{site['infer'].get('instead', self.without_path)}"
                )

    def _refuse_missing(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
        for name, site in latent_sites(model_trace):
            if name not in guide_trace.nodes and not is_enumerable(site):
                raise ValueError(
                    f"{type(self).__name__}: latent site '{name}' of the model is missing from the guide, so the result would "
                    "be no bound. Add it to the guide; a discrete site can be summed out: infer={'enumerate': 'parallel'}; "
                    "for a guide that was built with reparam= pass guide.target."
                )


def _has_no_path(site: Site) -> bool:
    fn = site["fn"]
    if is_factor(site):
        return not vars(fn).get("has_rsample", True) and fn.log_factor.requires_grad
    return not site["is_observed"] and not fn.has_rsample
