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
- a site whose density cannot be asked of a value from elsewhere (a transform that inverts its own draws only).

All other densities come from a second run through the same draws with the parameters held constant.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import TransformedDistribution, biject_to, constraints
from torch.distributions.transforms import Transform, _InverseTransform

from pyro_dgm.core import frozen
from pyro_dgm.core.random import fork_rng
from pyro_dgm.core.shapes import of_entries
from pyro_dgm.core.warn import warn_user
from pyro_dgm.model.sites import is_factor, is_subsample, latent_sites

__all__ = [
    "PathGradient",
    "unwrapped",
    "parameters_of",
    "rescored",
    "sample_sites",
    "support_moves",
    "with_densities",
    "with_values",
]

Site = dict[str, Any]

_NOT_REGISTERED = ".*was not registered in the param store"  # pyro.module, of parameters that are frozen on purpose


class PathGradient:
    """A guide's log densities without the scores of mean zero; it says once which sites keep theirs.

    Args:
        who: the bound that speaks in warnings.
        instead: what is done for a site that keeps its score.
    """

    def __init__(self, who: str, instead: str) -> None:
        self._who, self._instead = who, instead
        self._guide: Any = None
        self._known: set[str] = set()
        self._told: set[str] = set()
        self.plain: dict[str, str] = {}  # sites that keep a score, with the reason
        self.placed: set[str] = set()  # Deltas whose place is a parameter

    def scored(self, guide: Any, run: Any, drawn: poutine.Trace, args: Any, kwargs: Any) -> poutine.Trace:
        """The trace with the log density of every site, its score left out where that is allowed.

        ``run`` is the guide as it made the draws: alone, or in a plate of draws.
        """
        frozen_ones = self._frozen_sites(guide, run, drawn, args, kwargs)
        drawn.compute_log_prob(lambda name, _: name not in frozen_ones)
        if not frozen_ones:
            return prune_subsample_sites(drawn)
        views = with_values(drawn, {k: s["value"].view_as(s["value"]) for k, s in latent_sites(drawn)})
        again = rescored(run, views, parameters_of(guide, drawn), frozen_ones, args, kwargs)
        return prune_subsample_sites(with_densities(drawn, {k: again.nodes[k] for k in frozen_ones}))

    def _frozen_sites(self, guide: Any, run: Any, drawn: poutine.Trace, args: Any, kwargs: Any) -> set[str]:
        if not torch.is_grad_enabled():
            return set()
        self.learn(guide, run, drawn, args, kwargs)
        return {k for k, s in sample_sites(drawn) if not _why_kept(s) and k not in self.plain}

    def learn(self, guide: Any, run: Any, drawn: poutine.Trace, args: Any, kwargs: Any) -> None:
        """Find the sites that keep a score, and warn of them; once for a guide, and again where new sites appear."""
        if guide != self._guide:  # equal are also two bound methods of one object
            self._guide, self._known, self.plain, self.placed = guide, set(), {}, set()
        if {k for k, _ in sample_sites(drawn)} <= self._known:
            return
        drawn.compute_log_prob()  # before another run, while transforms still remember these draws
        for name, site in sample_sites(_run_at_constants(run, drawn, args, kwargs)):
            if name in drawn.nodes and name not in self._known:
                self._note(name, site)
        self._say()

    def _note(self, name: str, site: Site) -> None:
        self._known.add(name)
        if _is_placed(site):
            self.placed.add(name)
        why = _why_plain(site)
        if why:
            self.plain[name] = why

    def _say(self) -> None:
        """Warn of the sites that keep a score, those of one reason together, each once."""
        for why in sorted(set(self.plain.values())):
            names = [k for k, reason in self.plain.items() if reason == why and k not in self._told]
            self._told.update(names)
            if names:
                sites = ("sites " if len(names) > 1 else "site ") + ", ".join(f"'{k}'" for k in names)
                warn_user(f"{self._who}: the score of guide {sites} cannot be left out ({why}). {self._instead}")


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
        trace.compute_log_prob(lambda name, _: name in names)
    return trace


def _run_again(run: Any, drawn: poutine.Trace, args: Any, kwargs: Any) -> poutine.Trace:
    with poutine.block(), _quiet():
        return poutine.trace(poutine.replay(run, trace=drawn)).get_trace(*args, **kwargs)


def _run_at_constants(run: Any, drawn: poutine.Trace, args: Any, kwargs: Any) -> poutine.Trace:
    """The guide through its draws taken as constants: what requires grad then depends on parameters directly."""
    constants = with_values(drawn, {k: s["value"].detach().clone() for k, s in latent_sites(drawn)})
    with torch.enable_grad(), fork_rng():
        return _run_again(run, constants, args, kwargs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence ``pyro.module``, which warns of parameters that are frozen on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_NOT_REGISTERED)
        yield


def parameters_of(guide: Any, trace: poutine.Trace) -> list[Tensor]:
    """The leaf tensors behind a guide's densities: of its ``pyro.param`` statements, and those of the module."""
    params = [n["value"] for n in trace.nodes.values() if n["type"] == "param"]
    leaves = [p.unconstrained() if hasattr(p, "unconstrained") else p for p in params]
    inner = poutine.unwrap(guide)
    return leaves + (list(inner.parameters()) if isinstance(inner, nn.Module) else [])


def sample_sites(trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
    """Name and site of all that has a density: latent, observed, factors."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not is_subsample(site):
            yield name, site


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


def unwrapped(fn: Any) -> Any:
    """The distribution below ``to_event``, ``mask`` and ``expand``."""
    while hasattr(fn, "base_dist") and not isinstance(fn, TransformedDistribution):
        fn = fn.base_dist
    return fn


def support_moves(fn: Any) -> bool:
    """Whether the support depends on tensors that require grad; in doubt it does."""
    fn = unwrapped(fn)
    try:
        if isinstance(fn, TransformedDistribution) and not _declares_support(type(fn)):
            return support_moves(fn.base_dist) or _image_moves(fn.base_dist.support, fn.transforms)
        return _holds_grad(fn.support)
    except NotImplementedError:  # a distribution that does not say where it lives
        return True


def _declares_support(kind: type) -> bool:
    """Whether a family has its own word on where it lives, rather than what its last transform says."""
    return any("support" in c.__dict__ for c in kind.__mro__[: kind.__mro__.index(TransformedDistribution)])


def _image_moves(support: Any, transforms: list[Transform]) -> bool:
    """Whether the image of a support moves: a transform maps its whole domain onto a fixed set, but no part of it.

    Torch declares the reals as the codomain of every affine map, so a box is followed from the base on.
    """
    whole: Any = of_entries(support)  # None for a set that has no name
    for t in transforms:
        if _is_to_reals(whole, t):
            whole = constraints.real
        elif whole is not None and _same_set(whole, of_entries(t.domain)) and not _holds_grad(t.codomain):
            whole = of_entries(t.codomain)
        elif _holds_grad(t):
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


def _same_set(a: Any, b: Any) -> bool:
    """Whether two constraints are the same set, up to its border; in doubt not."""
    return a is b or (_bounds(a) is not None and _bounds(a) == _bounds(b))


def _bounds(constraint: Any) -> tuple[float, float] | None:
    """The ends of an interval between numbers, open or closed."""
    low, high = getattr(constraint, "lower_bound", -torch.inf), getattr(constraint, "upper_bound", torch.inf)
    if (low, high) == (-torch.inf, torch.inf) or not all(isinstance(b, int | float) for b in (low, high)):
        return None
    return float(low), float(high)


def _holds_grad(thing: Any) -> bool:
    """Whether a constraint or a transform holds a tensor that requires grad, in its parts too."""
    if isinstance(thing, Tensor):
        return thing.requires_grad
    if isinstance(thing, nn.Module) and any(p.requires_grad for p in thing.parameters()):
        return True
    if isinstance(thing, list | tuple):
        return any(_holds_grad(t) for t in thing)
    if not isinstance(thing, constraints.Constraint | Transform):
        return callable(thing)  # a function may hold anything
    inverse = isinstance(thing, _InverseTransform)  # any other transform holds its inverse, which holds it
    return any(
        _holds_grad(v) for k, v in vars(thing).items() if not k.startswith("_cached") and (inverse or k != "_inv")
    )
