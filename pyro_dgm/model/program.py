"""A model and its posterior draws: everything that ArviZ reads belongs to the same draw.

Latents, deterministic sites, log joint, log q, pointwise log-likelihood and predictive draws are all made from one set of
draws, whoever drew them: a guide, MCMC, or the user.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoCallable, AutoGuide, AutoGuideList

from pyro_dgm.core.devices import as_array, fork_rng
from pyro_dgm.core.shapes import from_arrays
from pyro_dgm.core.warn import warn_user
from pyro_dgm.model.coordinates import HasCoordinates
from pyro_dgm.model.handlers import Given, Undrawn, warn_of_masked_sums
from pyro_dgm.model.runs import Draws, Runs, Table, rounds_of, stacked
from pyro_dgm.model.sites import (
    Site,
    is_computed,
    is_data,
    is_enumerable,
    is_implicit,
    is_subsample,
    latent_sites,
    observed_sites,
    plate_frames,
    sample_sites,
    subsampled,
)
from pyro_dgm.model.terms import total
from pyro_dgm.model.vectorize import NOT_VECTORIZED, Engine, How, Model, first_line, plate_nesting

__all__ = ["Model", "Program", "refuse_guides_as_models", "refuse_missing", "refuse_uncallable", "signature_of"]


def refuse_guides_as_models(who: str, model: Any) -> None:
    """An autoguide in the place of the model is a swap of the two."""
    if isinstance(model, AutoGuide):
        raise ValueError(
            f"{who}: the model is an {type(model).__name__}, a guide. Did you swap model and guide? "
            f"Expected {_CALLS.get(who, who + '(model, ...)')}."
        )


def signature_of(model: Callable[..., Any]) -> inspect.Signature | None:
    """The arguments of a model; None of what is written in C, or is no function."""
    try:
        return inspect.signature(getattr(model, "forward", model))
    except (ValueError, TypeError):
        return None


def refuse_uncallable(who: str, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a model that cannot be called with these arguments: often a simulator that is none yet."""
    signature = signature_of(model)
    if signature is None:
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name = getattr(model, "__name__", type(model).__name__)
        raise TypeError(
            f"{who}: the model {name}{signature} cannot be called with the arguments given: {error}. Give the model's arguments; "
            "of a simulator of your own make a model first: dgm.as_model(simulator, prior={...}, observed=...)."
        ) from None


_TRIED = 3  # draws by which it is found how many are run at once; not measured, chosen by hand
_CALLS = {"from_svi": "from_svi(model, guide, *args)", "from_fits": "from_fits(guides, model, *args)"}


class _Preset(poutine.messenger.Messenger):
    """Finds subsampled plates whose index is an argument of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_subsample(msg) and msg["value"] is not None and len(msg["value"]) < msg["fn"].size:
            self.found.append(msg["name"])


def refuse_missing(who: str, missing: Sequence[str], where: str = "the guide") -> None:
    """Refuse latents that nothing says how to draw."""
    if missing:
        raise ValueError(
            f"{who}: latent sites {list(missing)} of the model are not in {where}, so they would be drawn from the prior. Where "
            f"they are data, give {who} the arguments that the fit had, data included. Else add them to {where}; discrete ones "
            "can be summed out: infer={'enumerate': 'parallel'}."
        )


class Program:
    """A model with its arguments, and either a guide or some draws.

    Attributes:
        density_how: how the log joint of many draws runs, for a :class:`LogJoint`; None where it was not asked.

    Args:
        model: a Pyro model.
        guide: a Pyro guide; None where draws are given.
        args, kwargs: arguments of both.
        parallel: True, False, or "auto" (in one plate or by vmap, if a check of three draws allows it).
        draws: ``{site: (n, *site)}`` of at least one draw, where there is no guide.
        new: the arguments are others than those of the draws; latents that do not fit are left to the model.
        who: the function that messages name.

    Raises:
        ValueError: for latents that guide or draws lack, for subsampled plates whose rows cannot be visited, for a guide in
            the place of the model, and for a model without sites.
    """

    def __init__(self, model: Model, guide: Model | None, args: Any, kwargs: Any, parallel: bool | str = "auto",
                 draws: Draws | None = None, new: bool = False, who: str = "pyro_dgm") -> None:  # fmt: skip
        refuse_guides_as_models(who, model)
        self.who = who
        self.model = model
        self.guide = guide
        args = from_arrays(who, tuple(args))
        kwargs = from_arrays(who, dict(kwargs))
        self.args = args
        self.kwargs = kwargs
        guided = self._trace(guide) if guide is not None else None
        known = _values(guided) if guided else {k: v[0] for k, v in (draws or {}).items()}
        self.density_how: How | None = None
        self.prototype = self._anyhow(model, known)
        self._refuse_no_sites(guided)
        traces = [t for t in (self.prototype, guided) if t is not None]
        rounds = rounds_of(traces)
        if len(rounds) > 1:
            self._refuse_data_without_index(rounds, known)
        self.enumerable = [n for n, s in latent_sites(self.prototype) if is_enumerable(s)]
        warn_of_masked_sums({k: self.prototype.nodes[k] for k in self.enumerable})
        nesting = max(_nesting(t) for t in traces)
        self.runs = Runs(model, args, kwargs, self.prototype, nesting, "loop", rounds)
        self.guide_runs = Runs(guide, args, kwargs, guided, nesting, "loop", rounds) if guide and guided else None
        draws = {k: v for k, v in (draws or {}).items() if not new or self.fits(k, v)}
        if new:
            free = {k: self.prototype.nodes[k]["value"] for k in self.sites("latent") if k not in draws}
            draws |= {k: v.expand(_TRIED, *v.shape) for k, v in free.items()}
        else:
            self._refuse_missing_latents(guided.nodes if guided else draws)
        self._choose(parallel, draws)

    def fits(self, name: str, values: Any) -> bool:
        """Whether values ``(n, *site)`` have the shape that the model's site has."""
        return name in self.runs.layouts and tuple(values.shape[1:]) == tuple(self.runs.layouts[name].full_shape)

    def _trace(self, fn: Model) -> poutine.Trace:
        with torch.no_grad(), poutine.block(), fork_rng():
            return poutine.trace(fn).get_trace(*self.args, **self.kwargs)

    def _anyhow(self, model: Model, known: Draws) -> poutine.Trace:
        """One run of the model, for shapes and plates; where it fails on prior draws, on draws that are known."""
        try:
            return self._trace(model)
        except Exception:  # a site without a sampler, a matrix that cannot be factorised, an index out of range
            if not known:
                raise
            return self._trace(Given(known)(model))

    def _refuse_data_without_index(self, rounds: list[Any], known: Draws) -> None:
        """A subsampled plate can be visited row by row only if the data follow its index."""
        preset = _Preset()
        self._anyhow(preset(self.model), known)
        if preset.found:
            raise ValueError(
                f"Plate '{preset.found[0]}' is subsampled by subsample=, so its other rows cannot be reached. Pass the full "
                "data and subsample_size=, and use the index that the plate gives."
            )
        index = [{k: i for k, (i, _) in visited.items()} for visited in rounds[:2]]
        first, second = (self._anyhow(Given(i)(self.model), known) for i in index)
        for name, site in first.nodes.items():
            plates = [f.name for f in plate_frames(site) if subsampled(f)] if is_data(site) else []
            if plates and site["value"].data_ptr() == second.nodes[name]["value"].data_ptr():
                raise ValueError(
                    f"Plate '{plates[0]}' is subsampled, and the data of site '{name}' do not follow its index, so the "
                    "other rows cannot be reached. Pass the full data and write obs=x[i] with the index i of the plate."
                )

    def _refuse_no_sites(self, guided: poutine.Trace | None) -> None:
        """A model without latents and data, and a guide that has the data in its place."""
        data = [n for n, _ in observed_sites(guided)] if guided else []
        if data and not self.sites("observed"):
            raise ValueError(
                f"{self.who}: the model has no data site '{data[0]}', and the guide has it. Did you swap model and guide?"
            )
        if not self.sites("observed") and not any(True for _ in latent_sites(self.prototype)):
            raise ValueError(
                f"{self.who}: the model has no latent and no data site, so there is no posterior. Write "
                "pyro.sample(name, distribution), with obs= for data; pyro.deterministic and pyro.factor draw nothing."
            )

    def _refuse_missing_latents(self, known: Any) -> None:
        missing = [n for n in self.sites("latent") if n not in known]
        refuse_missing(self.who, missing, "the guide" if self.guide is not None else "the draws")

    def _choose(self, parallel: bool | str, draws: Draws) -> None:
        """How many draws are run at once, in the model and in the guide."""
        if parallel != "auto":
            self.runs.how = self._guide_how("plate" if parallel else "loop")
            return
        if self.guide_runs is not None:
            few = self.guide_runs.run_round(_TRIED)
            self._guide_how("plate" if _broadcasts(self.guide) else self._how(self.guide_runs, few))
        else:
            few = {
                k: self.runs.rows(k, v[:_TRIED], self.runs.rounds[0])
                for k, v in draws.items()
                if k in self.runs.layouts
            }
        self.runs.how = self._how(self.runs, {k: v for k, v in few.items() if k in self.sites("latent")})

    def _guide_how(self, how: How) -> How:
        if self.guide_runs is not None:
            self.guide_runs.how = how
        return how

    def _how(self, runs: Runs, rows: Draws) -> How:
        """``rows`` are a few draws of all latents, in the shape of single runs."""
        nodes = runs.prototype.nodes
        implicit = [k for k in runs.layouts if is_implicit(nodes[k])]
        if not set(rows) - set(implicit):
            return "plate"
        if self.enumerable and len(runs.rounds) > 1 and runs is self.runs:
            runs.refuse_sums_across_subsamples({k: v[:1] for k, v in rows.items()})
        events = {k: nodes[k]["fn"].event_dim for k in rows}
        fn = poutine.block(runs.fn, hide=implicit) if implicit else runs.fn  # what has no density is not compared
        how, runs.fault = Engine(fn, self.args, self.kwargs, runs.nesting, events).find_how(rows)
        if runs is self.runs and runs.nesting == plate_nesting(runs.prototype):
            self.density_how = how
        if how != "loop":
            how = self._computes_alike(runs, rows, how)
        if how == "loop":
            warn_user(NOT_VECTORIZED.format(runs.fault))
        return how

    def _computes_alike(self, runs: Runs, rows: Draws, how: How) -> How:
        """The way, or another one if deterministic sites of a few draws run together are not those of single runs."""
        free = {k: runs.prototype.nodes[k]["value"] for k in self.enumerable if k in runs.layouts}
        few = len(next(iter(rows.values())))
        rows = rows | {k: v.expand(few, *v.shape) for k, v in free.items()}
        single = runs.computed(rows, "loop")
        ways: tuple[How, ...] = ("plate", "vmap") if how == "plate" else ("vmap",)
        for way in ways:
            try:
                made = runs.computed(rows, way)
                wrong = [
                    k for k in single if not torch.allclose(made[k], single[k], rtol=1e-4, atol=1e-5, equal_nan=True)
                ]
                if not wrong:
                    return way
                fault = f"deterministic site '{wrong[0]}' of draws run together differs from single runs"
            except (RuntimeError, ValueError, IndexError) as error:
                fault = first_line(error)
            runs.fault = runs.fault or fault
        return "loop"

    def guided(self, n: int) -> Table:
        """Draws of the guide, of all its sites, with their log densities."""
        if self.guide_runs is None:
            raise ValueError("This program has no guide.")
        return self.guide_runs.run(n, score=True)

    def log_q(self, guided: Table, scored: Table, n: int) -> np.ndarray | None:
        """Log density of the guide's draws, shape ``(n,)``; None if the guide has an implicit distribution.

        What the model masks is left out of the guide too: with ``obs_mask`` the latents of observed data mean nothing.
        """
        if any(is_implicit(s) for s in self._guided_sites()):
            return None
        terms = dict(guided.terms)
        for name, mask in scored.masks.items():
            if name in self.sites("latent") and not bool(mask.all()):
                self._refuse_joint_guides(name, terms)
                for k in {name, f"{name}_unconstrained"} & set(terms):
                    terms[k] = replace(terms[k], joint=terms[k].joint * mask)
        return total(terms.values(), n).cpu().numpy()

    def _guided_sites(self) -> Iterator[Site]:
        yield from (s for s in self.guide_runs.prototype.nodes.values() if s["type"] == "sample")  # type: ignore[union-attr]

    def _refuse_joint_guides(self, name: str, terms: dict[str, Any]) -> None:
        site = self.guide_runs.prototype.nodes[name]  # type: ignore[union-attr]
        if isinstance(site["fn"], dist.Delta) and f"{name}_unconstrained" not in terms:
            raise ValueError(
                f"{self.who}: latent site '{name}' is masked in part, so its other values mean nothing, and "
                f"{type(self.guide).__name__} has one density over all latents. Use a guide that has a site of its own for "
                f"'{name}' (AutoNormal), or leave the missing data out of the model."
            )

    @property
    def has_density(self) -> bool:
        """Whether the model's joint density is known."""
        sites = (s for s in self.prototype.nodes.values() if s["type"] == "sample")
        return not any(is_implicit(s) for s in sites)

    def scored(self, draws: Draws, n: int, batch_size: int | None = None) -> Table:
        """Terms of the log joint for given draws; enumerable sites are summed out."""
        return self._over(draws, n, batch_size, keep=(), score=True, discrete="sum" if self.enumerable else None)

    def completed(self, draws: Draws, n: int, keep: Collection[str], batch_size: int | None = None) -> Table:
        """Latent and deterministic sites for given draws; enumerable sites are drawn from their exact posterior."""
        return self._over(draws, n, batch_size, keep=keep, discrete="draw" if self.enumerable else None)

    def redrawn(self, draws: Draws, n: int, keep: Collection[str], batch_size: int | None = None) -> Table:
        """New data for given draws; enumerable sites that are not given are drawn as the model says.

        Data that cannot be drawn stay what they are, for what comes after them, and are ``lost`` to the table.
        """
        return self._leaving(lambda leave: self._over(draws, n, batch_size, keep=keep, redraw=True, leave=leave))

    def forward(self, n: int) -> Table:
        """The model's sites from the prior, data included; data are lost as by :meth:`redrawn`."""
        return self._leaving(lambda leave: self.runs.run(n, redraw=True, leave=leave))

    def prior(self, n: int) -> Table:
        """The model's sites from the prior, given that data stay what they are."""
        return self.runs.run(n)

    def _leaving(self, run: Callable[[Collection[str]], Table]) -> Table:
        lost: dict[str, str] = {}
        while True:
            try:
                table = run(tuple(lost))
            except Undrawn as error:
                if error.site not in self.sites("observed") or error.site in lost:
                    raise
                lost[error.site] = str(error)
                continue
            table.lost |= lost
            table.values = {k: v for k, v in table.values.items() if k not in lost}
            return table

    def _over(self, draws: Draws, n: int, batch_size: int | None, **options: Any) -> Table:
        """The draws in batches of the given size, each run at once."""
        kept = {k: v for k, v in draws.items() if k in self.runs.layouts}
        if not kept:
            return self.runs.run(n, **options)
        parts = zip(*(v.split(batch_size or n) for v in kept.values()), strict=True)
        batches = [dict(zip(kept, part, strict=True)) for part in parts]
        return stacked([self.runs.run(len(next(iter(b.values()))), b, **options) for b in batches])

    def array(self, table: Table, name: str) -> np.ndarray:
        """A site's values, ``(n, *plates, *event)``."""
        return as_array(table.values[name])

    def observed(self, draws: Draws | None = None) -> dict[str, np.ndarray]:
        """The data, by site; all rows of subsampled plates."""
        if not self.runs.rounds[0]:
            table = self.runs.of_prototype()
        else:
            first = {k: v[:1] for k, v in (draws or {}).items() if k in self.runs.layouts}
            table = self.runs.run(1, first, keep=set(self.sites("observed")) | set(self.runs.latents))
        return {k: as_array(table.values[k][0]) for k in self.sites("observed")}

    def sites(self, kind: str) -> list[str]:
        """Names of latent, deterministic or observed sites of the model; latents without the enumerable ones."""
        if kind == "latent":
            return [n for n, _ in latent_sites(self.prototype) if n not in self.enumerable]
        if kind == "observed":
            return [n for n, _ in observed_sites(self.prototype)]
        return [n for n, s in self.prototype.nodes.items() if is_computed(s)]


def _nesting(trace: poutine.Trace) -> int:
    """Depth of the plates, and of batch dimensions that belong to none."""
    sites = [s for _, s in sample_sites(trace) if not is_computed(s)]
    return max(plate_nesting(trace), *(len(s["fn"].batch_shape) for s in sites), 0)


def _broadcasts(guide: Any) -> bool:
    """Whether a guide is an autoguide, which run in a plate; a list of guides may hold any function, and one that follows
    moving supports runs the model.
    """
    parts = list(guide) if isinstance(guide, AutoGuideList) else [guide]
    own = all(isinstance(part, AutoGuide) and not isinstance(part, AutoCallable) for part in parts)
    return own and not any(part.coordinates.moving for part in parts if isinstance(part, HasCoordinates))


def _values(trace: poutine.Trace) -> Draws:
    return {k: s["value"] for k, s in sample_sites(trace)}
