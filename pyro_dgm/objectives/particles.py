"""Draws of a guide with the densities of model and guide: in one plate, by ``torch.vmap``, or one by one.

Both bounds over many draws stand on this: :class:`~pyro_dgm.STL_ELBO` and :class:`~pyro_dgm.IWAE_ELBO`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, warn_if_nan
from torch import Tensor

from pyro_dgm.core.random import fork_rng, random_states
from pyro_dgm.core.warn import warn_user
from pyro_dgm.model.sites import is_enumerable, is_factor, latent_sites, sample_sites
from pyro_dgm.model.vectorize import NOT_VECTORIZED, enumerated, in_draws_plate, read_of_rows
from pyro_dgm.objectives.agreement import Pair, fixed_part, how_to_draw, row_shape
from pyro_dgm.objectives.path_gradient import PathGradient
from pyro_dgm.objectives.units import Frames, unit_terms

__all__ = ["ParticleELBO", "Terms"]

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

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._met: Any = None
        self._once: Any = None  # a run of the guide, for its structure
        self._how = ""
        self._asked: dict[str, Any] = {}  # the options that were changed for the pair at hand
        self._path = PathGradient(type(self).__name__, self.plain_instead)

    @abstractmethod
    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound, in nats, with its gradient."""

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        with torch.no_grad():
            loss = self.differentiable_loss(model, guide, *args, **kwargs).item()
        warn_if_nan(loss, "loss")
        return loss

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        warn_if_nan(loss, "loss")
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
            trace.compute_log_prob()  # some transforms of Pyro remember their last draw only
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
        n, traces = self.num_particles, []
        sites = dict(latent_sites(drawn))
        rows = {k: s["value"].reshape(n, *row_shape(s)) for k, s in sites.items() if k not in shared}
        known = {k: sites[k]["value"] for k in shared}
        model = poutine.condition(poutine.replay(pair.model, trace=fixed_part(drawn)), data=known)

        def read(trace: poutine.Trace) -> Terms:
            traces.append(prune_subsample_sites(trace))
            local, rest = unit_terms(traces[-1], units, 1)
            return local[0], rest[0]

        return read_of_rows(model, rows, read, pair.args, pair.kwargs), traces[0]

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


def _has_no_path(site: dict[str, Any]) -> bool:
    fn = site["fn"]
    if is_factor(site):
        return not vars(fn).get("has_rsample", True) and fn.log_factor.requires_grad
    return not site["is_observed"] and not fn.has_rsample
