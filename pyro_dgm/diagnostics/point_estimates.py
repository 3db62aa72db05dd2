"""Guides that put a latent on a point: they have no density there, and their weights mean nothing."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoDelta
from torch.distributions import biject_to

from pyro_dgm.core.distribution import ImplicitDistribution
from pyro_dgm.model.program import Program
from pyro_dgm.model.runs import Table
from pyro_dgm.model.sites import is_data, latent_sites, sample_sites

__all__ = ["refuse_autodelta", "refuse_points"]

Site = dict[str, Any]


def refuse_autodelta(who: str, guide: Any) -> None:
    """Refuse the guide that is a point estimate by its name, before it is run."""
    if isinstance(guide, AutoDelta):
        raise ValueError(f"{who}: AutoDelta is a point estimate, not a posterior: it has no density and no weights.")


def refuse_points(program: Program, guided: Table) -> None:
    """Refuse a guide of which a continuous latent is a ``Delta`` without a density.

    That is a ``Delta`` of log density zero that is the same in all draws, or that no auxiliary draw spreads: the guide's
    ``Delta`` latents have more free coordinates than its auxiliary sites have entries. A ``Delta`` that repeats another
    draw, in a guide that has auxiliary entries to spare, is not found.
    """
    guide: Any = program.guide_runs
    nodes = dict(sample_sites(guide.prototype))
    if any(isinstance(_bare(s), ImplicitDistribution) for s in nodes.values()):
        return
    models = {k: s for k, s in latent_sites(program.prototype) if _is_continuous(s)}
    deltas = [k for k in models if k in nodes and isinstance(_bare(nodes[k]), Delta)]
    free = sum(_coordinates(models[k], nodes[k]) for k in deltas)
    entries = sum(s["value"].numel() for k, s in nodes.items() if _is_auxiliary(k, s, program))
    plain = [k for k in deltas if _coordinates(models[k], nodes[k]) and not bool(guided.terms[k].joint.any())]
    points = [k for k in plain if _constant(program, guided, k)] or (plain if free > entries else [])
    if points:
        raise ValueError(
            f"{program.who}: latent site '{points[0]}' of the guide ({type(program.guide).__name__}) is a Delta without a "
            "density: a point estimate, not a posterior, with no weights. Give it a distribution, AutoNormal for one; "
            "AutoLaplaceApproximation has one after laplace_approximation(*args)."
        )


def _bare(site: Site) -> Any:
    """The distribution without reshaping and masks around it."""
    fn = site["fn"]
    while not isinstance(fn, (ImplicitDistribution, Delta)) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _is_continuous(site: Site) -> bool:
    fn = _bare(site)
    return not isinstance(fn, Delta) and site["value"].is_floating_point() and not _is_discrete(site["fn"])


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):
        return bool(getattr(fn, "has_enumerate_support", False))


def _coordinates(model: Site, guide: Site) -> int:
    """How many free coordinates a value has: a simplex of K parts K - 1."""
    shape = guide["value"].shape
    try:
        return biject_to(model["fn"].support).inverse_shape(shape).numel()
    except (AttributeError, NotImplementedError):
        return shape.numel()


def _is_auxiliary(name: str, site: Site, program: Program) -> bool:
    """A draw of the guide's own that has a density."""
    return name not in program.prototype.nodes and not is_data(site) and not isinstance(_bare(site), Delta)


def _constant(program: Program, guided: Table, name: str) -> bool:
    values = guided.values[name]
    if len(values) < 2:
        values = torch.cat([values, program.guided(2).values[name]])
    return bool((values == values[:1]).all())
