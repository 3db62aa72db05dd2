r"""Which part of a guide's score may be left out of a bound's gradient.

A guide draws :math:`z_i` one after the other, each given those before it (its parents), and

.. math:: \frac{d}{d\phi} \log q_\phi(z) = \sum_i \Big( \partial_\phi \log q_i(z_i \mid z_{<i})
          + \sum_{j \le i} \partial_{z_j} \log q_i(z_i \mid z_{<i})\, \frac{dz_j}{d\phi} \Big).

The whole sum is the plain gradient, which is always right. The first term, the score of one site at a fixed value and
fixed parents, has mean zero where the order of derivative and integral may be changed,

.. math:: E[\partial_\phi \log q_i \mid z_{<i}] = \int \partial_\phi q_i\, dz_i = \partial_\phi \int q_i\, dz_i = 0,

and leaving it out removes noise. That needs (a) a normalised density of a value that was drawn there, and (b) a support
that does not depend on parameters: :math:`U(0, b)` has the score :math:`-1/b` for every draw. So it is kept, from the
run that made the draws, at

- a ``Delta``, whose ``log_density`` is a Jacobian and no density of a draw;
- ``pyro.factor``, and a site that is observed in the guide;
- a site whose support moves;
- a site whose density cannot be asked of a value from elsewhere (a transform that inverts its own draws only), or is
  another then (one that saturates);
- straight-through draws, whose density is that of another tensor;
- a site that depends on tensors computed outside of the guide, which cannot be held constant.

All other densities come from a second run through the same draws, with the same random numbers besides and the
parameters held constant; a site whose density is another one in that run keeps the first.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Transform, TransformedDistribution, biject_to, constraints

from pyro_dgm.core import frozen
from pyro_dgm.core.devices import fork_rng, put_random_states
from pyro_dgm.core.shapes import of_entries
from pyro_dgm.core.warn import warn_user
from pyro_dgm.model.sites import Site, is_factor, latent_sites, sample_sites, write_log_probs
from pyro_dgm.model.supports import declares_support, holds_grad, same_ends, simple_parts, unwrapped
from pyro_dgm.model.terms import forget_inverses, parameters_of, registered_in

__all__ = [
    "PathGradient",
    "rescored",
    "support_moves",
    "with_densities",
    "with_values",
]

_NOT_REGISTERED = ".*was not registered in the param store"  # pyro.module, of parameters that are frozen on purpose


class PathGradient:
    """A guide's log densities without the scores of mean zero; it says once which sites keep theirs.

    Args:
        who: the bound that speaks in warnings.
        instead: what is done for a site that keeps its score.

    Attributes:
        now: what was found of the sites of the guide that was met last.
    """

    def __init__(self, who: str, instead: str) -> None:
        self._who = who
        self._instead = instead
        self._guide: Any = None
        self._told: set[str] = set()
        self._learnt: dict[Any, _Learnt] = {}
        self.now = _Learnt()

    def scored(self, guide: Any, run: Any, drawn: poutine.Trace, args: Any, kwargs: Any) -> poutine.Trace:
        """The trace with the log density of every site, its score left out where that is allowed.

        ``run`` is the guide as it made the draws: alone, or in a plate of draws.
        """
        write_log_probs(drawn)
        if not torch.is_grad_enabled():
            return prune_subsample_sites(drawn)
        constant = self.learn(guide, run, drawn, args, kwargs)
        names = {k for k, s in sample_sites(drawn) if not _why_kept(s) and k not in self.now.plain}
        views = with_values(drawn, {k: s["value"].view_as(s["value"]) for k, s in latent_sites(drawn)})
        again = rescored(run, views, constant, names, args, kwargs)
        names -= self.unlike(drawn, again, names)
        return prune_subsample_sites(with_densities(drawn, {k: again.nodes[k] for k in names}))

    def unlike(self, drawn: poutine.Trace, again: poutine.Trace, names: set[str]) -> set[str]:
        """The sites that a second run gives other densities than the draws have, of which it warns."""
        ordered = sorted(names)
        flags = [_is_unlike(drawn.nodes[k]["unscaled_log_prob"], again.nodes[k]["unscaled_log_prob"]) for k in ordered]
        found = [k for k, unlike in zip(ordered, torch.stack(flags).tolist() if flags else [], strict=True) if unlike]
        self.say(dict.fromkeys(found, "a second run of the guide gives the same draws another density"))
        return set(found)

    def learn(
        self, guide: Any, run: Any, drawn: poutine.Trace, args: Any, kwargs: Any, shared: Collection[str] = ()
    ) -> list[Tensor]:
        """Find the sites that keep a score, and warn of them; what is constant in a second run.

        It is found once for a guide, and again where new sites appear or other tensors are trained. Draws that all
        others share (``shared``) are parameters to the rest.
        """
        write_log_probs(drawn)  # before another run, while transforms still remember these draws
        constant = parameters_of(guide, drawn)
        self._recall(guide, drawn, constant, shared)
        names = {k for k, _ in sample_sites(drawn)}
        if not names <= self.now.known:
            self._look(run, drawn, constant, args, kwargs, shared)
            self.now.known.update(names)
            self.say(self.now.plain)
        return constant

    def _recall(self, guide: Any, drawn: poutine.Trace, constant: list[Tensor], shared: Collection[str]) -> None:
        """What was found with the same guide, the same tensors that are trained, and the same shared draws."""
        if guide != self._guide or len(self._learnt) > 32:  # equal are also two bound methods of one object
            self._guide = guide
            self._learnt = {}
        registered = {id(p) for p in registered_in(guide, drawn)}
        trained = [id(p) for p in constant if p.requires_grad]
        others = sum(i not in registered for i in trained)
        key = frozenset(registered.intersection(trained)), others, frozenset(shared)
        self.now = self._learnt.setdefault(key, _Learnt())

    def _look(
        self, run: Any, drawn: poutine.Trace, constant: list[Tensor], args: Any, kwargs: Any, shared: Collection[str]
    ) -> None:
        sites = {k for k, _ in sample_sites(drawn)} - self.now.known
        self._note(_run_at_constants(run, drawn, args, kwargs), sites)
        if shared:
            self._note(_run_at_constants(run, drawn, args, kwargs, shared), sites.difference(shared))
        with frozen(*constant):
            for name, site in sample_sites(_run_at_constants(run, drawn, args, kwargs)):
                if name in sites and name not in self.now.plain and not _why_kept(site) and _requires_grad(site):
                    self.now.plain[name] = "it depends on tensors that were computed outside of the guide"

    def _note(self, trace: poutine.Trace, names: Collection[str]) -> None:
        for name, site in sample_sites(trace):
            if name in names:
                self.now.note(name, site)

    def say(self, reasons: dict[str, str]) -> None:
        """Warn of the sites that keep a score, those of one reason together, each once."""
        for why in sorted(set(reasons.values())):
            names = [k for k, reason in reasons.items() if reason == why and k not in self._told]
            self._told.update(names)
            if names:
                sites = ("sites " if len(names) > 1 else "site ") + ", ".join(f"'{k}'" for k in names)
                warn_user(f"{self._who}: the score of guide {sites} cannot be left out ({why}). {self._instead}")


class _Learnt:
    """What was found of a guide's sites.

    Attributes:
        known: those that were looked at.
        plain: those that keep a score, with the reason.
        placed: Deltas whose place is a parameter, or follows from a draw that is shared.
    """

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.plain: dict[str, str] = {}
        self.placed: set[str] = set()

    def note(self, name: str, site: Site) -> None:
        """Of one site at constant draws."""
        if _is_placed(site):
            self.placed.add(name)
        why = _why_plain(site)
        if why:
            self.plain.setdefault(name, why)


def rescored(
    run: Any, drawn: poutine.Trace, constant: list[Tensor], names: set[str], args: Any, kwargs: Any
) -> poutine.Trace:
    """The guide run again through the draws of a trace, with no gradient towards ``constant``: densities of ``names``."""
    with frozen(*constant):
        trace = _run_again(run, drawn, args, kwargs)
        for name in names:
            site = trace.nodes[name]
            if isinstance(unwrapped(site["fn"]), dist.Delta):
                site["value"] = site["fn"].mean  # its own place, whatever the last digit
        write_log_probs(trace, lambda name, _: name in names)
    for name in names:
        forget_inverses(trace.nodes[name]["fn"])  # which hold no gradient towards what was constant
    return trace


def _is_unlike(first: Tensor, second: Tensor) -> Tensor:
    """Whether log densities of the same draws differ by more than rounding."""
    close = torch.isclose(first.detach(), second.detach(), rtol=1e-4, atol=1e-3, equal_nan=True)
    return ~close.all()


def _run_again(run: Any, drawn: poutine.Trace, args: Any, kwargs: Any) -> poutine.Trace:
    """Through the same draws and, where they were kept, with the same random numbers besides (those of dropout)."""
    states = drawn.nodes["_INPUT"].get("random_states")
    with poutine.block(), _quiet(), fork_rng():
        if states is not None:
            put_random_states(states)
        return poutine.trace(poutine.replay(run, trace=drawn)).get_trace(*args, **kwargs)


def _run_at_constants(
    run: Any, drawn: poutine.Trace, args: Any, kwargs: Any, moving: Collection[str] = ()
) -> poutine.Trace:
    """The guide through its draws taken as constants, but for those that are named.

    What requires grad then depends on parameters directly, or on the named draws.
    """
    values = {k: _constant(s["value"]) for k, s in latent_sites(drawn)}
    for name in moving:
        values[name].requires_grad_()
    with torch.enable_grad():
        return _run_again(run, with_values(drawn, values), args, kwargs)


def _constant(value: Tensor) -> Tensor:
    copy = value.detach().clone()
    if hasattr(value, "_unquantize"):
        copy._unquantize = value._unquantize.detach()  # type: ignore[attr-defined]
    return copy


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence ``pyro.module``, which warns of parameters that are frozen on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_NOT_REGISTERED)
        yield


def with_values(trace: poutine.Trace, values: dict[str, Tensor]) -> poutine.Trace:
    """A copy of the trace with other values at some sites."""
    copy = trace.copy()
    for name, value in values.items():
        copy.nodes[name] = {**trace.nodes[name], "value": value}
    return copy


def with_densities(trace: poutine.Trace, scored: dict[str, Site]) -> poutine.Trace:
    """A copy of the trace with the log densities of other runs' sites."""
    copy = trace.copy()
    for name, site in scored.items():
        densities = {k: site[k] for k in ("log_prob", "unscaled_log_prob", "log_prob_sum")}
        copy.nodes[name] = {**trace.nodes[name], **densities}
    return copy


def _why_kept(site: Site) -> str:
    """Why a site's score has no mean of zero, or may have none; empty where it has."""
    if is_factor(site):
        return "a pyro.factor"
    if site["is_observed"]:
        return "it is observed in the guide"
    if isinstance(unwrapped(site["fn"]), dist.Delta):
        return "a Delta with a density"
    if hasattr(site["value"], "_unquantize"):
        return "its draws are straight-through"
    return "its support depends on parameters" if support_moves(site["fn"]) else ""


def _why_plain(site: Site) -> str:
    """The same of a site that was run at constant draws, and only where parameters do enter its density."""
    why = _why_kept(site)
    if why:
        return why if _depends(site) else ""
    return "" if _scores_other_values(site) else "its transform inverts its own draws only"


def _depends(site: Site) -> bool:
    fn = unwrapped(site["fn"])
    if isinstance(fn, dist.Delta):
        has_density = not (is_identically_zero(fn.log_density) or bool((fn.log_density == 0.0).all()))
        return fn.log_density.requires_grad or (fn.v.requires_grad and has_density)
    return _requires_grad(site)


def _requires_grad(site: Site) -> bool:
    return bool(site["fn"].log_prob(site["value"]).requires_grad)


def _is_placed(site: Site) -> bool:
    fn = unwrapped(site["fn"])
    return isinstance(fn, dist.Delta) and not site["is_observed"] and fn.v.requires_grad


def _scores_other_values(site: Site) -> bool:
    try:
        site["fn"].log_prob(site["value"])
    except (KeyError, NotImplementedError):  # what transforms of Pyro raise without their cache
        return False
    return True


def support_moves(fn: Any) -> bool:
    """Whether the support depends on tensors that require grad; in doubt it does."""
    fn = unwrapped(fn)
    try:
        if isinstance(fn, TransformedDistribution) and not declares_support(type(fn)):
            return support_moves(fn.base_dist) or _image_moves(fn.base_dist.support, fn.transforms)
        return holds_grad(fn.support)
    except NotImplementedError:  # a distribution that does not say where it lives
        return True


def _image_moves(support: Any, transforms: list[Transform]) -> bool:
    """Whether the image of a support moves: a transform maps its whole domain onto a fixed set, but no part of it.

    Torch declares the reals as the codomain of every affine map, so a box is followed from the base on.
    """
    whole: Any = of_entries(support)  # None for a set that has no name
    for t in chain.from_iterable(simple_parts([t]) if holds_grad(t) else [t] for t in transforms):
        if _is_to_reals(whole, t):
            whole = constraints.real
        elif whole is not None and same_ends(whole, of_entries(t.domain)) and not holds_grad(t.codomain):
            whole = of_entries(t.codomain)
        elif holds_grad(t):
            return True
        else:
            whole = None
    return False


def _is_to_reals(support: Any, transform: Transform) -> bool:
    """Whether the transform is the one from this support to the unconstrained space."""
    try:
        return support is not None and transform == biject_to(support).inv
    except NotImplementedError:
        return False
