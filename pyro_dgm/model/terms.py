r"""Terms of a log joint, site by site, with enumerated sites summed out where they live.

A discrete :math:`z_n` that is local to a row of a plate gives that row :math:`\log \sum_z p(z)\,p(y_n \mid z)`; what is
observed in the row has the log-likelihood :math:`\log p(y_n, h_n) - \log p(h_n)`, with :math:`h_n` the row's other sites.
Masks and scales are those of :mod:`pyro_dgm.model.handlers`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from opt_einsum import shared_intermediates
from pyro import poutine
from pyro.infer.traceenum_elbo import _get_common_scale
from pyro.ops.contract import contract_tensor_tree, contract_to_tensor
from torch import Tensor, nn

from pyro_dgm.model.handlers import factor_of, is_enumerated
from pyro_dgm.model.sites import (
    Frame,
    Layout,
    Site,
    is_computed,
    is_data,
    is_implicit,
    is_subsample,
    subsampled,
    with_shape,
    write_log_probs,
)
from pyro_dgm.model.supports import simple_parts
from pyro_dgm.model.vectorize import DRAWS

__all__ = ["Term", "is_scored", "merge_terms", "plain_term", "terms_of", "total"]


@dataclass(frozen=True)
class Term:
    """A part of the log joint for n draws.

    Attributes:
        axes: plate name -> axis of the tensors.
        joint: its log density, shape ``(n, *batch)``, in nats.
        likelihood: the part of it that is the log-likelihood of ``observed``; None where nothing is observed, or where
            the sum over discrete sites runs over all data together.
        observed: names of the observed sites in it.
    """

    axes: dict[str, int]
    joint: Tensor
    likelihood: Tensor | None
    observed: tuple[str, ...]


def merge_terms(terms: list[Term], join: Callable[[list[Tensor]], Tensor]) -> Term:
    """Parts of one term (other draws, or other rows of a plate) put together."""
    pairs = [t.likelihood for t in terms if t.likelihood is not None]
    return replace(terms[0], joint=join([t.joint for t in terms]), likelihood=join(pairs) if pairs else None)


def is_scored(name: str, site: Site) -> bool:
    """Whether a site has a density to add: no index of a plate, no deterministic site, no implicit distribution."""
    if is_subsample(site) or is_computed(site):
        return False
    return not is_implicit(site)


def subsampling_factor(site: Site) -> float:
    """By how much Pyro scales the site up because a plate around it is subsampled."""
    factor = 1.0
    for frame in site["cond_indep_stack"]:
        factor *= frame.full_size / frame.size if subsampled(frame) else 1.0
    return factor


def terms_of(trace: poutine.Trace, n: int, layouts: dict[str, Layout]) -> dict[str, Term]:
    """Terms of a trace of n draws (in a plate ``_draws``, or one draw), by site or joined names of summed-out sites."""
    write_log_probs(trace, is_scored)
    sites = {k: s for k, s in trace.nodes.items() if s["type"] == "sample" and is_scored(k, s)}
    groups = _enumerated_groups(trace, sites)
    summed = {name for group in groups for name in group}
    terms = {k: plain_term(k, s, s["log_prob"], n, layouts[k]) for k, s in sites.items() if k not in summed}
    for group in groups:
        name, term = _summed(trace, {k: sites[k] for k in group}, n)
        terms[name] = term
    return terms


def plain_term(name: str, site: Site, log_prob: Tensor, n: int, layout: Layout) -> Term:
    """The term of a site that no sum touches, from its log density as Pyro scales it."""
    joint = with_shape(log_prob, n, layout.batch, name) / subsampling_factor(site)
    return Term(layout.axes, joint, joint if is_data(site) else None, (name,) if is_data(site) else ())


def _enumerated_groups(trace: poutine.Trace, sites: dict[str, Site]) -> list[list[str]]:
    """Names of sites that are connected through enumerated dimensions, one list per connected component."""
    if not any(is_enumerated(s) for s in sites.values()):
        return []
    for site in trace.nodes.values():  # the index of a plate needs an entry to be packed
        site.setdefault("packed", {})
    trace.pack_tensors()
    plates = set(trace.plate_to_symbol.values())
    groups: list[tuple[set[str], list[str]]] = []
    for name, site in sites.items():
        dims = _dims(site) - plates
        touched = [g for g in groups if g[0] & dims]
        if dims:
            merged = (set.union(dims, *(g[0] for g in touched)), [k for g in touched for k in g[1]] + [name])
            groups = [g for g in groups if g not in touched] + [merged]
    return [names for _, names in groups]


def _summed(trace: poutine.Trace, sites: dict[str, Site], n: int) -> tuple[str, Term]:
    plates = set(trace.plate_to_symbol.values())
    there = {d for s in sites.values() for d in _dims(s)}  # plates of size one are not
    enumerated = there - plates
    observed = tuple(k for k, s in sites.items() if is_data(s))
    with shared_intermediates() as cache:
        tree = contract_tensor_tree(_tree(trace, sites.values()), enumerated, cache=cache)
        ((ordinal, (joint,)),) = tree.items()
        rest = _tree(trace, [s for k, s in sites.items() if k not in observed])
        hidden = contract_to_tensor(rest, enumerated, target_ordinal=ordinal & there, cache=cache)
    frames = _frames(trace, sites.values(), ordinal)
    _refuse_sums_across_a_subsample(sites, frames)
    scale = _get_common_scale([s["scale"] / subsampling_factor(s) for s in sites.values()])
    joint, hidden = (_aligned(t, trace, frames, n) * scale for t in (joint, hidden))
    local = bool(observed) and (bool(frames) or _in_one_turn(sites.values()))
    axes = {f.name: 1 + i for i, f in enumerate(frames)}
    return "_".join(observed or sites), Term(axes, joint, joint - hidden if local else None, observed)


def _in_one_turn(sites: Iterable[Site]) -> bool:
    """Whether all sites lie in the same turn of a plate that is a loop."""
    turns = [{(f.name, f.counter) for f in s["cond_indep_stack"] if not f.vectorized} for s in sites]
    return bool(set.intersection(*turns))


def _dims(site: Site) -> set[str]:
    """Names of a packed site's dimensions; its mask may have some of its own."""
    return set(site["packed"]["log_prob"]._pyro_dims)


def _tree(trace: poutine.Trace, sites: Iterable[Site]) -> OrderedDict[Any, list[Tensor]]:
    tree: OrderedDict[Any, list[Tensor]] = OrderedDict()
    for site in sites:
        ordinal = frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)
        tree.setdefault(ordinal, []).append(factor_of(site))
    return tree


def _frames(trace: poutine.Trace, sites: Iterable[Site], ordinal: Any) -> tuple[Frame, ...]:
    frames = {f for s in sites for f in s["cond_indep_stack"] if f.vectorized and f.name != DRAWS}
    return tuple(sorted((f for f in frames if trace.plate_to_symbol[f.name] in ordinal), key=lambda f: f.dim))


def _aligned(term: Tensor, trace: poutine.Trace, frames: tuple[Frame, ...], n: int) -> Tensor:
    """A packed tensor as ``(n, *plates)``; dimensions that it lacks are repeated."""
    wanted = [trace.plate_to_symbol.get(DRAWS, ""), *(trace.plate_to_symbol[f.name] for f in frames)]
    dims = list(term._pyro_dims)  # type: ignore[attr-defined]
    ordered = term.permute([dims.index(d) for d in wanted if d in dims])
    for axis, d in enumerate(wanted):
        if d not in dims:
            ordered = ordered.unsqueeze(axis)
    return ordered.expand(n, *(f.size for f in frames))


def _refuse_sums_across_a_subsample(sites: dict[str, Site], frames: tuple[Frame, ...]) -> None:
    for name, site in sites.items():
        for f in site["cond_indep_stack"]:
            if subsampled(f) and f.name not in {g.name for g in frames}:
                raise ValueError(
                    f"Site '{name}' lies in the subsampled plate '{f.name}' and depends on a discrete site outside of it: "
                    "the sum over that site needs all rows at once. Pass the full data, with subsample_size=None."
                )


def total(terms: Iterable[Term], n: int) -> Tensor:
    """Sum of the terms by draw, in float64, shape ``(n,)``."""
    rows = [t.joint.double().reshape(n, -1).sum(-1) for t in terms]
    return torch.stack(rows).sum(0) if rows else torch.zeros(n, dtype=torch.float64)


def parameters_of(guide: Any, trace: poutine.Trace) -> list[Tensor]:
    """The leaf tensors behind a guide's draws and their densities, which the trace holds, and those of the module.

    Nets that are not registered anywhere (in a closure, or with an encoder's output as an argument) are found by the
    graph of the draws.
    """
    sites = [n for n in trace.nodes.values() if n["type"] == "sample"]
    ends = [s[k] for s in sites for k in ("value", "log_prob") if isinstance(s.get(k), Tensor)]
    found = {id(p): p for p in [*registered_in(guide, trace), *leaves_behind(ends)]}
    return list(found.values())


def registered_in(guide: Any, trace: poutine.Trace) -> list[Tensor]:
    """The leaf tensors of ``pyro.param`` statements and of the guide, where that is a module."""
    params = [n["value"] for n in trace.nodes.values() if n["type"] == "param"]
    leaves = [p.unconstrained() if hasattr(p, "unconstrained") else p for p in params]
    inner = poutine.unwrap(guide)
    return leaves + (list(inner.parameters()) if isinstance(inner, nn.Module) else [])


def leaves_behind(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaves that require grad in the graphs of some tensors; one may come twice."""
    nodes: list[Any] = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            nodes.append(tensor.grad_fn)
        elif tensor.requires_grad:
            yield tensor
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if not node.next_functions and isinstance(getattr(node, "variable", None), Tensor):
            yield node.variable
        nodes.extend(n for n, _ in node.next_functions if n is not None)


def forget_inverses(fn: Any) -> None:
    """Drop what the transforms of a distribution remember of their last values."""
    while fn is not None:
        for t in simple_parts(getattr(fn, "transforms", ())):
            if hasattr(t, "clear_cache"):
                t.clear_cache()
        fn = getattr(fn, "base_dist", None)
