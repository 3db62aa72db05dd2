"""Whether many draws can be made in one run: the densities, or the draws, must be those of single runs."""

from __future__ import annotations

import torch
from pyro import poutine
from pyro.util import get_rng_state, set_rng_seed, set_rng_state
from torch import Tensor

from pyro_dgm.core.sites import is_drawn
from pyro_dgm.core.vectorize import how_to_vectorize
from pyro_dgm.simulation.program import Program

__all__ = ["fault_of_plate"]

_FEW = 5
_MANY = 64  # two equal samples of 64 differ by 0.42 with probability 1e-5 (Kolmogorov-Smirnov)
_FAR = 0.42


def fault_of_plate(program: Program) -> str:
    """Why runs of many draws differ from single runs; empty where they do not.

    The log joint of a few draws of all sites is compared. Sites without a density, and values that were computed with noise
    of their own, are compared by their draws: many single runs at the same latents, against one run.
    """
    before = get_rng_state()
    try:
        set_rng_seed(0)
        traces = [program.trace() for _ in range(_FEW)]
        shapes = [{k: s["value"].shape for k, s in t.nodes.items() if is_drawn(s)} for t in traces]
        if any(found != program.shapes for found in shapes):
            return "the sites or their shapes differ between runs"
        opaque = [k for k in program.shapes if _opaque(traces[0].nodes[k])]
        return _densities_differ(program, traces, opaque) or _draws_differ(program, traces, opaque)
    finally:
        set_rng_state(before)


def _opaque(site: dict) -> bool:
    """Whether the density says nothing: there is none, or the value is a computed one."""
    if type(site["fn"]).__name__ in ("Delta", "Independent") and _is_delta(site["fn"]):
        return True
    try:
        return not torch.is_tensor(site["fn"].log_prob(site["value"]))
    except (NotImplementedError, AttributeError):
        return True


def _is_delta(fn: object) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__ == "Delta"


def _densities_differ(program: Program, traces: list[poutine.Trace], opaque: list[str]) -> str:
    scored = [k for k in program.shapes if k not in opaque]
    if not scored:
        return ""
    rows = {k: torch.stack([t.nodes[k]["value"] for t in traces]) for k in scored}
    values = {k: program.in_plate(k, v) for k, v in rows.items()}
    shapes = {k: program.shapes[k] for k in scored}
    fn = poutine.block(program.model, hide=opaque) if opaque else program.model
    how, fault = how_to_vectorize(fn, values, shapes, program.nesting, program.args, program.kwargs)
    return "" if how == "plate" else fault


def _draws_differ(program: Program, traces: list[poutine.Trace], opaque: list[str]) -> str:
    """Compare draws of the opaque sites at two settings of the others, which one run holds side by side."""
    if not opaque:
        return ""
    rest = [k for k in program.shapes if k not in opaque]
    settings = [{k: t.nodes[k]["value"] for k in rest} for t in traces[:2]]
    single = [[program.trace(None, given).nodes for _ in range(_MANY)] for given in settings]
    rows = {k: torch.cat([s[k].expand(_MANY, *s[k].shape) for s in settings]) for k in rest}
    try:
        together = program.rows(program.trace(2 * _MANY, rows), 2 * _MANY)
    except Exception as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    for k in opaque:
        for i, runs in enumerate(single):
            alone = torch.stack([nodes[k]["value"] for nodes in runs]).reshape(_MANY, -1)
            if _far(alone, together[k][i * _MANY : (i + 1) * _MANY].reshape(_MANY, -1)):
                return f"draws of site '{k}' made together differ from those of single runs"
    return ""


def _far(a: Tensor, b: Tensor) -> bool:
    """Whether any column's empirical distributions are further apart than chance allows; equal numbers count as ties."""
    a, b = a.double(), b.double()
    scale = torch.maximum(a.abs().amax(0), b.abs().amax(0)).clamp_min(1e-12)
    a, b = ((v / scale * 1e4).round() for v in (a, b))
    points = torch.cat([a, b])
    steps = [(v[None] <= points[:, None]).double().mean(1) for v in (a, b)]
    return bool((steps[0] - steps[1]).abs().max() > _FAR)
