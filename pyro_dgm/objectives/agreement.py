"""Whether many draws of a model and a guide can run at once: they must then have the densities that single runs give."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from torch import Size, Tensor

from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.shapes import from_arrays
from pyro_dgm.model.sites import Site, is_computed, is_subsample, latent_sites, plate_frames, sample_sites
from pyro_dgm.model.supports import onto, unwrapped
from pyro_dgm.model.vectorize import DRAWS, Engine, fault_of, in_draws_plate, per_draw, seeded_run
from pyro_dgm.objectives.path_gradient import with_values

__all__ = ["HowDrawn", "Pair", "fixed_part", "how_to_draw", "row_shape"]

HowDrawn = Literal["plate", "vmap", "loop", "once"]

_TRIED = 3  # draws that are compared


class Pair(NamedTuple):
    """A model, a guide, and the arguments of both."""

    model: Any
    guide: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pair:
        """The pair with tensors in the place of the arrays among its arguments."""
        return cls(model, guide, from_arrays("the bound", args), from_arrays("the bound", kwargs))

    def trace(self, fn: Any) -> poutine.Trace:
        """One run of a program with these arguments."""
        return poutine.trace(fn).get_trace(*self.args, **self.kwargs)

    def guide_trace(self, run: Any) -> poutine.Trace:
        """One run of the guide. A messenger of Pyro runs the model inside: its observations are not the guide's."""
        trace = self.trace(run)
        if isinstance(poutine.unwrap(self.guide), GuideMessenger):
            for name, site in list(sample_sites(trace)):
                if site["is_observed"]:
                    trace.remove_node(name)
        return trace


def fixed_part(trace: poutine.Trace, names: Collection[str] = ()) -> poutine.Trace:
    """The subsamples of a trace and the sites of these names: what other runs may share with it."""
    part = trace.copy()
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not (name in names or is_subsample(site)):
            part.remove_node(name)
    return part


def row_shape(site: Site) -> Size:
    """The shape that a site of many draws has in a single run."""
    plates = [-f.dim for f in plate_frames(site) if f.name != DRAWS]
    return site["value"].shape[site["value"].dim() - site["fn"].event_dim - max(plates, default=0) :]


def how_to_draw(pair: Pair, once: poutine.Trace, model_once: poutine.Trace, nesting: int) -> tuple[HowDrawn, str]:
    """How many draws of a pair can be run, and what is wrong with running them in one plate.

    ``once`` and ``model_once`` are single runs. A guide that draws nothing needs one run only.
    """
    if not dict(latent_sites(once)):
        return "once", ""
    rows = fixed_part(once)
    rows.nodes.update(fixed_part(model_once).nodes)
    many: list[poutine.Trace] = []
    with torch.no_grad(), poutine.block(), fork_rng(), pyro.validation_enabled(False):
        fault = fault_of(partial(_draw_some, pair, rows, nesting, many), torch.zeros(()))
        fault = fault or _fault_of_guide(pair, once, *many)
    if fault:
        return "loop", fault
    sites = dict(latent_sites(many[0]))
    own = {k: s for k, s in sites.items() if not s["infer"].get("is_auxiliary")} or sites
    values = {k: s["value"] for k, s in own.items()}
    events = {k: s["fn"].event_dim for k, s in own.items()}
    engine = Engine(poutine.replay(pair.model, trace=rows), pair.args, pair.kwargs, nesting, events)
    try:
        return engine.find_how(_rows(_apart(values, model_once), sites))
    except (RuntimeError, ValueError):  # a model that fails where the guide has no draws
        return engine.find_how(_rows(values, sites))


def _rows(values: dict[str, Tensor], sites: dict[str, Site]) -> dict[str, Tensor]:
    """Draws in a plate in the shape of single runs."""
    return {k: v.reshape(_TRIED, *row_shape(sites[k])) for k, v in values.items()}


def _apart(values: dict[str, Tensor], model_once: poutine.Trace) -> dict[str, Tensor]:
    """The draws with other places inside the supports: those of a narrow guide would tell little apart."""
    with fork_rng(0), torch.no_grad():
        return {k: _moved(v, model_once.nodes[k]["fn"]) if k in model_once.nodes else v for k, v in values.items()}


def _moved(value: Tensor, fn: Any) -> Tensor:
    try:
        to_support = onto(fn, None)
        free = to_support.inv(value)
        moved = to_support(free + 0.1 * torch.randn_like(free))
    except (NotImplementedError, RuntimeError, ValueError):  # a support without coordinates
        return value
    return moved if moved.shape == value.shape and bool(moved.isfinite().all()) else value


def _draw_some(pair: Pair, rows: poutine.Trace, nesting: int, many: list[poutine.Trace]) -> Tensor:
    """A few draws in a plate, put into ``many``; zero says that they could be made."""
    many.append(pair.guide_trace(poutine.replay(in_draws_plate(pair.guide, _TRIED, nesting), trace=rows)))
    return torch.zeros(())


def _fault_of_guide(pair: Pair, once: poutine.Trace, many: poutine.Trace) -> str:
    """Why the guide's distribution in a plate is another than alone; empty where it is not, or where runs are random."""
    sites = dict(latent_sites(many))
    odd = [k for k, s in sites.items() if s["value"].numel() != _TRIED * row_shape(s).numel()]
    if odd:
        return f"of the guide, shape {tuple(sites[odd[0]]['value'].shape)} at site '{odd[0]}'"
    rows = [{k: s["value"].reshape(_TRIED, *row_shape(s))[i] for k, s in sites.items()} for i in range(_TRIED)]

    def alone() -> Tensor:
        runs = [pair.guide_trace(poutine.replay(pair.guide, trace=with_values(once, row))) for row in rows]
        return torch.cat([_summary(run, 1) for run in runs])

    expected = seeded_run(alone)
    with fork_rng(1):
        random = not torch.allclose(alone(), expected, rtol=1e-4, atol=1e-3, equal_nan=True)
    elsewhere = with_values(many, {k: s["value"].clone() for k, s in sites.items()})  # no transform remembers these
    fault = "" if random else fault_of(partial(_summary, elsewhere, _TRIED), expected)
    return fault and f"of the guide, {fault}"


def _summary(trace: poutine.Trace, n: int) -> Tensor:
    """One number for each draw that tells distributions apart: log densities, and the places of Deltas."""
    return per_draw((_place_or_density(site) for _, site in sample_sites(trace) if not is_computed(site)), n)


def _place_or_density(site: Site) -> Tensor:
    fn = unwrapped(site["fn"])
    if isinstance(fn, dist.Delta):
        return fn.v.reshape(*fn.batch_shape, -1).sum(-1) + fn.log_density
    try:
        return site["fn"].log_prob(site["value"])
    except (KeyError, NotImplementedError):  # a transform that inverts its own draws only
        return torch.zeros(())
