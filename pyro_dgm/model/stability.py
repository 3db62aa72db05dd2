"""What runs of a model have in common: a guide over one vector needs the same latents, shapes and plates in all of them.

Supports may differ: those that follow other latents are found here, and angles, whose declared support is too wide. A model
whose latents lie in a subsampled plate may be run with all rows if its log joint is then that of rounds of subsamples.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Transform

from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.warn import in_short, warn_user
from pyro_dgm.model.coordinates import Whole
from pyro_dgm.model.runs import Runs, rounds_of
from pyro_dgm.model.sites import Frame, is_enumerable, latent_sites, subsampled
from pyro_dgm.model.supports import (
    holds_grad,
    holds_moved_circle,
    innermost,
    mass,
    on_the_circle,
    onto,
    place_of,
    repeats,
    same_support,
)
from pyro_dgm.model.vectorize import Model, first_line, plate_nesting

__all__ = [
    "AnySite",
    "changing_supports",
    "circular_sites",
    "refuse_rows_that_hang_together",
    "refuse_without_bijection",
    "runs_from_the_prior",
    "subsampled_latents",
]

# By how much log joints may differ, with all rows and by subsamples. Not measured; chosen by hand.
_RELATIVE = 1e-4
_ABSOLUTE = 1e-2  # nats
_RUNS = 8  # a branch that is taken with probability p in a run goes unseen with probability (1 - p)^8


class AnySite(poutine.messenger.Messenger):
    """Lets latent sites without a sampler (ImproperUniform) draw standard normals in unconstrained space."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["value"] is None and type(msg["fn"]).__name__ == "ImproperUniform":
            to_support = refuse_without_bijection("Model", msg["name"], msg["fn"])
            msg["value"] = to_support(torch.randn(to_support.inverse_shape(msg["fn"].shape())))


def runs_from_the_prior(
    who: str, model: Callable[..., Any], prototype: poutine.Trace, args: Any, kwargs: Any, *, one_size: bool = True
) -> list[poutine.Trace]:
    """Traces of several runs, the prototype first; all have the same latents and, with ``one_size``, shapes and plates.

    Raises:
        ValueError: for a latent that some runs lack, or whose shape or plates differ; it names the site.
    """
    with fork_rng(), pyro.validation_enabled(False), poutine.block(), AnySite():
        drawn = [_tried(model, args, kwargs) for _ in range(_RUNS)]
    traces = [prototype, *(t for t in drawn if t is not None)]
    known = [{k: s for k, s in latent_sites(t) if not is_enumerable(s)} for t in traces]
    for sites in known[1:]:
        _refuse_other_sites(who, known, set(known[0]) ^ set(sites))
        for name, site in sites.items() if one_size else ():
            _refuse_other_shape(who, name, known[0][name], site)
    return traces


def _tried(model: Callable[..., Any], args: Any, kwargs: Any) -> poutine.Trace | None:
    """A run, or None where the prior's draws cannot be used (a matrix that is not positive definite, say)."""
    try:
        return poutine.trace(model).get_trace(*args, **kwargs)
    except Exception:  # whatever a model says of draws that its author has not met
        return None


def _refuse_other_sites(who: str, known: list[dict[str, Any]], odd: set[str]) -> None:
    if odd:
        name = sorted(odd)[0]
        share = sum(name in sites for sites in known)
        raise ValueError(
            f"{who}: latent site '{name}' is in {share} of {len(known)} runs of the model. One vector needs the same latents in "
            "every run: draw the site always, and let the model use it or not; or sum over the cases as a discrete site."
        )


def _refuse_other_shape(who: str, name: str, first: dict[str, Any], other: dict[str, Any]) -> None:
    a, b = _signature(first), _signature(other)
    if a != b:
        raise ValueError(
            f"{who}: latent site '{name}' has shape and plates {a} in one run of the model, and {b} in another. One vector needs "
            "a fixed length: take sizes from the arguments, or draw the largest size and mask what is not used."
        )


def _signature(site: dict[str, Any]) -> tuple[Any, ...]:
    frames = [(f.name, f.dim, f.size) for f in site["cond_indep_stack"]]
    return tuple(site["value"].shape), tuple(frames)


def changing_supports(
    who: str, model: Callable[..., Any], traces: list[poutine.Trace], args: Any, kwargs: Any
) -> frozenset[str]:
    """Latents whose support follows other latents, or a parameter: it differs between runs, or has a gradient.

    Raises:
        ValueError: for a support that differs between runs in which all latents before are the same.
    """
    known = {k: s for k, s in latent_sites(traces[0]) if not is_enumerable(s)} if traces else {}
    places = {k: [place_of(t.nodes[k]["fn"]) for t in traces] for k in known}
    found = {k for k, seen in places.items() if any(not same_support(seen[0], p) for p in seen[1:])}
    if found:
        _refuse_random_supports(who, found, model, traces[0], args, kwargs)
    followed = _followed(model, known, args, kwargs)
    return frozenset(found | {k for k in known if k in followed})


def _followed(model: Callable[..., Any], known: dict[str, Any], args: Any, kwargs: Any) -> set[str]:
    """Sites whose support has a gradient towards latents before it or parameters; it may differ in rare runs only."""
    values = {k: s["value"].detach().clone() for k, s in known.items()}
    for value in values.values():
        if value.is_floating_point():
            value.requires_grad_()
    given = poutine.condition(model, data=values)
    quiet = warnings.catch_warnings()  # torch warns where a number is made of a tensor with a gradient
    with quiet, torch.enable_grad(), fork_rng(), pyro.validation_enabled(False), poutine.block():
        warnings.simplefilter("ignore")
        trace = _tried(given, args, kwargs)
    if trace is None:
        return set()
    return {k for k in known if k in trace.nodes and holds_grad(place_of(trace.nodes[k]["fn"]))}


def _refuse_random_supports(
    who: str, names: set[str], model: Callable[..., Any], trace: poutine.Trace, args: Any, kwargs: Any
) -> None:
    """The same latents have to give the same supports; a discrete site that is summed out would give another one."""
    values = {k: s["value"] for k, s in latent_sites(trace) if not is_enumerable(s)}
    with fork_rng(), pyro.validation_enabled(False), poutine.block(), poutine.condition(data=values):
        again = [t for t in (_tried(model, args, kwargs) for _ in range(_RUNS)) if t is not None]
    for name in sorted(names):
        first = place_of(trace.nodes[name]["fn"])
        if any(not same_support(first, place_of(t.nodes[name]["fn"])) for t in again):
            raise ValueError(
                f"{who}: the support of latent site '{name}' depends on something that is no continuous latent of this guide (a "
                "discrete site, a latent hidden from it, a subsample, a random number). Draw it on a fixed support, such as "
                "Uniform(0, 1), and scale it in the model."
            )


def circular_sites(who: str, traces: list[poutine.Trace]) -> frozenset[str]:
    """Latents that are declared on the real line and live on a circle; other densities without mass one are named in a warning.

    Raises:
        ValueError: for a transform of an angle.
    """
    sites = {k: s["fn"] for k, s in latent_sites(traces[0]) if not is_enumerable(s)} if traces else {}
    found = set()
    for name, fn in sites.items():
        _refuse_moved_circles(who, name, fn)
        draws = repeats(fn)
        if draws is None:
            _check_mass(who, name, fn)
        else:
            _refuse_another_turn(who, name, fn, draws)
            found.add(name)
    return frozenset(found)


def refuse_without_bijection(who: str, name: str, fn: Any) -> Transform:
    """The map from real numbers onto where a latent site lives, or an error where there is none."""
    try:
        return onto(fn, None)
    except NotImplementedError as error:
        raise ValueError(
            f"{who}: the support of site '{name}' ({type(fn).__name__}: {in_short(fn.support)}) has no bijection from the real "
            f"numbers: {error}. Register one with torch.distributions.biject_to, or write the site as a transform of another."
        ) from error


def _check_mass(who: str, name: str, fn: Any) -> None:
    with fork_rng(0):
        total = mass(fn)
    if total is None or 0.85 < total < 1.05:  # densities that rise without bound at an edge lose some to rounding
        return
    warn_user(
        f"{who}: the density of latent site '{name}' ({type(fn).__name__}) integrates to {total:.3g} over its declared support "
        f"{in_short(innermost(fn.support))}, expected 1: the evidence is that of this density. If no improper prior is meant, "
        "declare the set on which it is one; an angle is a VonMises in [-pi, pi]."
    )


def _refuse_moved_circles(who: str, name: str, fn: Any) -> None:
    if holds_moved_circle(fn):
        raise ValueError(
            f"{who}: latent site '{name}' is a transform of an angle, whose period is not known. Sample the angle itself and "
            "compute the rest from it, with pyro.deterministic."
        )


def _refuse_another_turn(who: str, name: str, fn: Any, draws: Tensor) -> None:
    """An angle that is not counted from -pi to pi."""
    if not on_the_circle(draws):
        raise ValueError(
            f"{who}: the density of latent site '{name}' ({type(fn).__name__}) repeats after a turn, and its draws do not lie in "
            "[-pi, pi]. Declare the turn in which they lie: support = constraints.interval(0.0, 2.0 * math.pi), say."
        )


# --- Subsampled plates ---


def subsampled_latents(trace: poutine.Trace) -> dict[str, Frame]:
    """The subsampled plates that hold continuous latents, by the name of such a latent."""
    found = {}
    for name, site in latent_sites(trace):
        frames = [f for f in site["cond_indep_stack"] if subsampled(f)]
        if frames and not is_enumerable(site):
            found[name] = frames[0]
    return found


def refuse_rows_that_hang_together(
    who: str, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], trace: poutine.Trace
) -> None:
    """Refuse a model whose density with all rows is another than that of its subsamples.

    Args:
        who: the guide that speaks.
        model, args, kwargs: a model and its arguments.
        trace: a run of it.

    Raises:
        ValueError: for plates that cannot be visited row by row, and where the densities differ; it names the plate.
    """
    plate = next(iter(subsampled_latents(trace).values())).name
    rounds = rounds_of([trace])
    with fork_rng(0), torch.no_grad(), poutine.block():
        try:
            whole = poutine.trace(Whole(model)).get_trace(*args, **kwargs)
            values = {k: s["value"].detach()[None] for k, s in latent_sites(whole) if not is_enumerable(s)}
            found = _total(Whole(model), args, kwargs, whole, [{}], values)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"{who}: {_ADVICE.format(plate)} With all rows it fails: {first_line(error)}") from error
        if subsampled_latents(whole):
            raise ValueError(
                f"{who}: plate '{plate}' is subsampled by subsample=, or made outside of the model, so its other rows cannot "
                "be reached. Pass the full data, write pyro.plate(name, size, subsample_size=...) in the model and use the index."
            )
        expected = _total(model, args, kwargs, trace, rounds, values)
    if not math.isclose(found, expected, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE):
        raise ValueError(
            f"{who}: {_ADVICE.format(plate)} With all rows its log joint is {found:.6g}, by subsamples {expected:.6g}."
        )


_ADVICE = (
    "the model's rows in the subsampled plate '{}' are not independent, or its data do not follow the index. Pass the full data "
    "and write obs=y[i] with the index i of the plate; what is common to rows belongs outside of the plate."
)


def _total(
    model: Model, args: Any, kwargs: Any, trace: poutine.Trace, rounds: list[Any], values: dict[str, Tensor]
) -> float:
    def same(*args: Any, **kwargs: Any) -> Any:
        """Sites that are hidden from the guide have the same draws in all runs."""
        with fork_rng(0):
            return model(*args, **kwargs)

    runs = Runs(same, args, kwargs, trace, plate_nesting(trace), "loop", rounds)
    return float(runs.run(1, values, keep=(), score=True, discrete="sum").total(1))
