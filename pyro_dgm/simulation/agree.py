"""Whether many draws can be made in one run: the densities, or the draws, must be those of single runs."""

from __future__ import annotations

import math

import torch
from pyro import poutine
from torch import Tensor

from pyro_dgm.model.sites import is_drawn
from pyro_dgm.model.vectorize import find_vectorization
from pyro_dgm.simulation.blocks import Blocks, random_state

__all__ = ["TOO_FEW", "fault_of_plate"]

TOO_FEW = "too few simulations for a check"

_FEW = 5
_MANY = 40
_ALARM = 1e-5  # probability that equal distributions are told apart


def fault_of_plate(blocks: Blocks, n: int) -> str:
    """Why runs of many draws differ from single runs; empty where they do not.

    The log joint of a few draws of all sites is compared. Sites without a density, and values that were computed with noise
    of their own, are compared by their draws: 40 single runs at each of two settings of the latents, against one run. That
    costs more than it saves if ``n`` is below 160.
    """
    with random_state(0):
        try:
            traces = [blocks.trace() for _ in range(_FEW)]
        except Exception as error:
            return f"a run failed: {error}"
        shapes = [{k: s["value"].shape for k, s in t.nodes.items() if is_drawn(s)} for t in traces]
        if any(found != blocks.shapes for found in shapes):
            return "the sites or their shapes differ between runs"
        opaque = [k for k in blocks.shapes if _opaque(traces[0].nodes[k])]
        if opaque and n < 4 * _MANY:
            return TOO_FEW
        return _densities_differ(blocks, traces, opaque) or _draws_differ(blocks, traces, opaque, _MANY)


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


def _densities_differ(blocks: Blocks, traces: list[poutine.Trace], opaque: list[str]) -> str:
    scored = [k for k in blocks.shapes if k not in opaque]
    if not scored:
        return ""
    rows = {k: torch.stack([t.nodes[k]["value"] for t in traces]) for k in scored}
    values = {k: blocks.in_plate(k, v) for k, v in rows.items()}
    shapes = {k: blocks.shapes[k] for k in scored}
    fn = poutine.block(blocks.model, hide=opaque) if opaque else blocks.model
    how, fault = find_vectorization(fn, values, shapes, blocks.nesting, blocks.args, blocks.kwargs)
    return "" if how == "plate" else fault


def _draws_differ(blocks: Blocks, traces: list[poutine.Trace], opaque: list[str], m: int) -> str:
    """Compare draws of the opaque sites at two settings of the others, which one run holds side by side."""
    if not opaque:
        return ""
    rest = [k for k in blocks.shapes if k not in opaque]
    settings = [{k: t.nodes[k]["value"] for k in rest} for t in traces[:2]]
    rows = {k: torch.cat([s[k].expand(m, *s[k].shape) for s in settings]) for k in rest}
    try:
        together = blocks.rows(blocks.trace(2 * m, rows), 2 * m)
    except Exception as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    single = [[blocks.trace(None, given).nodes for _ in range(m)] for given in settings]
    for k in opaque:
        for i, runs in enumerate(single):
            alone = torch.stack([nodes[k]["value"] for nodes in runs]).reshape(m, -1)
            if _far(alone, together[k][i * m : (i + 1) * m].reshape(m, -1)):
                return f"draws of site '{k}' made together differ from those of single runs"
    return ""


def _far(a: Tensor, b: Tensor) -> bool:
    """Whether any column's empirical distributions are further apart than chance allows; equal numbers count as ties."""
    a, b = a.double(), b.double()
    scale = torch.maximum(a.abs().amax(0), b.abs().amax(0)).clamp_min(1e-12)
    a, b = ((v / scale * 1e4).round() for v in (a, b))
    points = torch.cat([a, b])
    steps = [(v[None] <= points[:, None]).double().mean(1) for v in (a, b)]
    if bool(((b == b[0]).all(0) & (a != a[0]).any(0)).any()):
        return True  # all draws together share their noise
    far = math.sqrt(math.log(2.0 * a.shape[1] / _ALARM) / len(a))  # Kolmogorov and Smirnov, for every column
    return bool((steps[0] - steps[1]).abs().max() > far)
