"""Latents that are independent given the data: the connected parts of a model's graph once the data are known.

``pyro.infer.inspect.get_dependencies`` follows values through the model. It loses them where they pass through Python
numbers or numpy, so parts that it finds are believed only if runs of the model agree: latents of one part are replaced by
other draws, all else is held, and no density outside of the part may change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from torch import Tensor

from pyro_dgm.core.random import fork_rng
from pyro_dgm.model.sites import sample_sites

__all__ = ["independent_parts"]


def independent_parts(
    model: Callable[..., Any], latents: Sequence[str], observed: Sequence[str], traces: Sequence[poutine.Trace],
    args: Any, kwargs: Any,
) -> list[set[str]]:  # fmt: skip
    """Parts of the latents, in the order of the model; all latents as one part where it cannot be told.

    Args:
        model: a model that draws its data.
        latents, observed: names of sites.
        traces: two runs of the model.
        args, kwargs: the model's arguments.
    """
    drawn, others = (_values(t, observed) for t in traces)
    hidden = set(drawn) - set(observed)
    quiet = warnings.catch_warnings()
    with quiet, fork_rng(), torch.no_grad(), pyro.validation_enabled(False), poutine.block():
        warnings.simplefilter("ignore")
        try:
            given = poutine.condition(model, data={k: drawn[k] for k in observed})
            upstream = get_dependencies(given, args, kwargs)["prior_dependencies"]
            parts = _connected(upstream, hidden)
            run = lambda values: _densities(model, values, args, kwargs)  # noqa: E731
            agreed = len(parts) < 2 or all(_alone(p, upstream, drawn, others, run) for p in parts)
        except Exception:  # provenance cannot follow this model: densities not written, numpy, values of other shapes
            return [set(latents)]
    found = [part & set(latents) for part in parts if part & set(latents)]
    whole = set().union(*found) == set(latents)  # a latent Delta has no place in the graph
    return sorted(found, key=lambda p: min(map(list(latents).index, p))) if agreed and whole else [set(latents)]


def _values(trace: poutine.Trace, observed: Sequence[str]) -> dict[str, Tensor]:
    """What a run has drawn; what it has computed is left to the next run."""
    return {k: s["value"] for k, s in sample_sites(trace) if not s["is_observed"] or k in observed}


def _connected(upstream: Mapping[str, Any], hidden: set[str]) -> list[set[str]]:
    """Unknowns that share a density belong together."""
    parts: list[set[str]] = []
    for site, sources in upstream.items():
        joined = ({site} | set(sources)) & hidden
        others = [p for p in parts if not p & joined]
        parts = others + [joined.union(*(p for p in parts if p & joined))] if joined else parts
    return parts


def _alone(part: set[str], upstream: Mapping[str, Any], drawn: Any, others: Any, run: Any) -> bool:
    """Whether no density outside a part changes with its latents."""
    before, after = run(drawn), run(drawn | {k: others[k] for k in part})
    outside = [k for k in before if not ({k} | set(upstream.get(k, ()))) & part]
    return all(torch.allclose(before[k], after[k], equal_nan=True) for k in outside)


def _densities(model: Any, values: dict[str, Tensor], args: Any, kwargs: Any) -> dict[str, Tensor]:
    with fork_rng(0):
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)
    return {k: s["fn"].log_prob(s["value"]) for k, s in sample_sites(trace) if not s["infer"].get("_deterministic")}
