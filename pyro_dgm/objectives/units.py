"""The log density of a trace by draw and by unit: the plates whose slices have a logarithm of their own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor

from pyro_dgm.model.layout import subsampled
from pyro_dgm.model.sites import latent_sites, plate_frames, sample_sites
from pyro_dgm.model.transforms import unwrapped
from pyro_dgm.model.vectorize import DRAWS, packed_log_probs

__all__ = ["Frames", "is_local", "scale_of", "stray_plates", "unit_terms", "units_of"]

Frames = tuple[Any, ...]


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


def is_local(site: dict[str, Any], units: Frames) -> bool:
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


def _same(unit: Any, frame: Any) -> bool:
    """Whether a plate of the guide and one of the model are the same, under two names perhaps."""
    return unit.name == frame.name or (unit.dim, unit.size) == (frame.dim, frame.size)


def unit_terms(trace: poutine.Trace, units: Frames, n: int) -> tuple[Tensor, Tensor]:
    """Log density of each unit under each of the trace's ``n`` draws, ``(n, *units)``, and what is left, ``(n,)``.

    The trace holds one draw, or those of a plate of draws. Dimensions of size one have no name in a packed term; a term
    that is the same for all draws counts for each.
    """
    packed = list(packed_log_probs(trace))
    sizes = [n, *(f.size for f in units)]
    symbols = [trace.plate_to_symbol.get(DRAWS, ""), *(_symbol(trace, f) for f in units)]
    needed = [s for s, size in zip(symbols[1:], sizes[1:], strict=True) if size > 1]
    local, rest = torch.zeros(()), torch.zeros(())
    for term in packed:
        if all(s and s in term._pyro_dims for s in needed):  # type: ignore[attr-defined]
            local = local + _arranged(term, symbols)
        else:
            rest = rest + _arranged(term, symbols[:1])
    return local.expand(sizes), rest.expand(n)


def _symbol(trace: poutine.Trace, frame: Any) -> str:
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
