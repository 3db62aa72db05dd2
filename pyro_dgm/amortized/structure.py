"""What a model is made of, read from runs of it: latent and observed sites with supports and plates, and its parts.

Parts are latents that are independent of the others given the data: the connected parts of the model's graph once the data
are known. ``pyro.infer.inspect.get_dependencies`` follows values through the model. It loses them where they pass through
Python numbers or numpy, so parts that it finds are believed only if runs of the model agree: latents of one part are replaced
by other draws, all else is held, and no density outside of the part may change.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from torch import Size, Tensor, nn
from torch.distributions import Distribution, ExpTransform, biject_to, constraints

from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.shapes import of_entries, reference
from pyro_dgm.core.upstream import elementwise
from pyro_dgm.core.warn import in_short
from pyro_dgm.model.program import refuse_uncallable
from pyro_dgm.model.sites import is_enumerable, lacks_density, latent_sites, plate_frames, sample_sites, subsampled
from pyro_dgm.model.stability import changing_supports, runs_from_the_prior
from pyro_dgm.model.supports import innermost, is_circular, unwrapped
from pyro_dgm.model.vectorize import plate_nesting

__all__ = ["Site", "Structure", "as_drawn", "moving_supports", "read"]

Model = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Values = dict[str, Tensor]

_ATTEMPTS = 20  # runs until one does not fail; not measured, chosen by hand


@dataclass(frozen=True)
class Site:
    """One site: its name, event shape, plates (outermost first, by name) and, for a latent, where its values lie.

    Attributes:
        dims: the dimension of each plate, negative, in the order of ``plates``.
        support: constraint of one event; None for data.
        classes: number of values of a discrete latent, 0 for a continuous one.
        varies: whether the first size of the event is another one in each run: a series of any length.
        logarithmic: whether data are drawn as exponentials (LogNormal), so that their logarithms are what is read.
    """

    name: str
    event_shape: Size
    plates: tuple[str, ...]
    dims: tuple[int, ...]
    support: constraints.Constraint | None = None
    classes: int = 0
    dtype: torch.dtype = torch.float32
    varies: bool = False
    logarithmic: bool = False

    @cached_property
    def depth(self) -> int:
        """Batch dimensions that the site's value has in a single run."""
        return max((-d for d in self.dims), default=0)

    @cached_property
    def width(self) -> int:
        """Numbers in one event."""
        return self.event_shape.numel()

    @property
    def columns(self) -> int:
        """Numbers in one event that have units of their own: all, or those at one time of a series of any length."""
        return self.event_shape[1:].numel() if self.varies else self.width

    @property
    def event_sizes(self) -> list[str]:
        """Sizes of an event, for messages."""
        return ["any number"] * self.varies + [str(n) for n in self.event_shape[self.varies :]]

    def fits(self, event: Size) -> bool:
        """Whether an event may have this shape."""
        same = len(event) == len(self.event_shape) and event[self.varies :] == self.event_shape[self.varies :]
        return same and (not self.varies or event[0] > 0)

    def lead_of(self, value: Tensor) -> int:
        """Dimensions of a value that stand left of the site's: 1 for a batch of simulations, 0 for one data set."""
        return value.dim() - self.depth - len(self.event_shape)

    def refuse_empty(self, who: str, value: Tensor, lead: int) -> None:
        """Refuse a value that has a plate without elements."""
        batch = value.shape[lead : lead + self.depth]
        empty = [p for p, d in zip(self.plates, self.dims, strict=True) if -d <= len(batch) and batch[d] == 0]
        if empty:
            raise ValueError(
                f"{who}: '{self.name}' has shape {tuple(value.shape)}, so plate '{empty[0]}' holds no element, expected one at "
                "least. Without data the posterior is the prior: pyro.infer.Predictive(model, num_samples=n)()."
            )

    def laid(self, value: Tensor, nesting: int, lead: int) -> Tensor:
        """Values ``(*lead, *batch, *event)`` as ``(*lead, 1, .., *batch, *event)`` with ``nesting`` batch dimensions."""
        shape = value.shape
        if not self.fits(shape[lead + self.depth :]) or len(shape) < lead + self.depth:
            raise ValueError(
                f"AmortizedGuide: '{self.name}' has shape {tuple(shape)}, expected {lead} leading dimension(s), "
                f"{self.depth} of plates {list(self.plates)}, and an event of shape ({', '.join(self.event_sizes)})."
            )
        return value.reshape([*shape[:lead], *(1,) * (nesting - self.depth), *shape[lead:]])

    def features(self, value: Tensor, nesting: int, lead: int) -> Tensor:
        """The same with events as vectors: ``(*lead, 1, .., *batch, width)``."""
        laid = self.laid(value, nesting, lead)
        return laid.reshape(*laid.shape[: lead + nesting], laid.shape[lead + nesting :].numel())

    def laid_mask(self, mask: Tensor, nesting: int, lead: int) -> Tensor:
        """A mask ``(*lead, *plates)``, which may lack the last plates, as ``(*lead, 1, .., *plates)``."""
        left = (1,) * (nesting - self.depth)
        right = (1,) * (self.depth + lead - mask.dim())
        return mask.reshape(*mask.shape[:lead], *left, *mask.shape[lead:], *right)


@dataclass(frozen=True)
class Structure:
    """Sites of a model, and its plates ``{name: (dim, size)}``; ``nesting`` is their depth.

    ``parts`` are latents that are independent of the others given the data.
    """

    latents: tuple[Site, ...]
    observed: tuple[Site, ...]
    plates: dict[str, tuple[int, int]]
    nesting: int
    parts: tuple[frozenset[str], ...]

    def groups(self) -> list[tuple[Site, ...]]:
        """Latents with the same plates and of the same part together; fewer plates first."""
        sets = sorted({s.plates for s in self.latents}, key=lambda p: (len(p), [self.plates[n][0] for n in p]))
        found = [[s for s in self.latents if s.plates == p and s.name in part] for p in sets for part in self.parts]
        return [tuple(group) for group in found if group]

    def related(self, a: Site, b: Site) -> bool:
        """Whether two latents belong to the same part."""
        return any(a.name in part and b.name in part for part in self.parts)


def read(
    model: Model, observed: Iterable[str], args: Args, kwargs: Kwargs, runs: Sequence[poutine.Trace] = ()
) -> Structure:
    """The structure of a model that simulates its data; ``runs`` are others of it, for the shapes of its data.

    Raises:
        ValueError: for an observed name that is no site, a subsampled plate, latents without a density or with a support
            that is not supported, non-finite draws, and batch dimensions outside plates.
    """
    traces = [_simulated(model, args, kwargs) for _ in range(3)]
    trace = traces[0]
    names = tuple(observed)
    _refuse_unknown(trace, names)
    _refuse_subsamples(trace)
    data = tuple(_data([t.nodes[k] for t in (*traces, *runs) if k in t.nodes]) for k in trace.nodes if k in names)
    hidden = [n for n, s in latent_sites(trace) if n not in names and not is_enumerable(s)]
    latents = tuple(_latent(n, [t.nodes[n] for t in traces]) for n in hidden)
    if not latents:
        raise ValueError(
            f"AmortizedGuide: the model has no latent site besides observed={list(names)}; nothing to infer."
        )
    sites = [s for _, s in sample_sites(trace)]
    plates = {f.name: (f.dim, f.size) for s in sites for f in plate_frames(s)}
    parts = _independent_parts(model, [s.name for s in latents], names, traces[:2], args, kwargs)
    return Structure(latents, data, plates, plate_nesting(trace), tuple(map(frozenset, parts)))


def moving_supports(
    model: Model, observed: Iterable[str], args: Args, kwargs: Kwargs
) -> tuple[frozenset[str], list[poutine.Trace]]:
    """Latents whose support follows other latents; and the runs that tell."""
    who = "AmortizedGuide"
    refuse_uncallable(who, model, args, kwargs)
    traces = runs_from_the_prior(who, model, _simulated(model, args, kwargs), args, kwargs, one_size=False)
    hidden = {name for name, site in latent_sites(traces[0]) if not is_enumerable(site)} - set(observed)
    moving = changing_supports(who, model, traces, args, kwargs)
    return frozenset(k for k in moving & hidden if not traces[0].nodes[k]["fn"].support.is_discrete), traces


def _simulated(model: Model, args: Args, kwargs: Kwargs) -> poutine.Trace:
    """A run that does not fail, of a few."""
    with pyro.validation_enabled(False), poutine.block(), torch.no_grad():
        for _ in range(_ATTEMPTS - 1):
            with suppress(Exception):
                return poutine.trace(model).get_trace(*args, **kwargs)
        return poutine.trace(model).get_trace(*args, **kwargs)


def _refuse_unknown(trace: poutine.Trace, names: tuple[str, ...]) -> None:
    sites = [k for k, _ in sample_sites(trace)]
    unknown = [k for k in names if k not in sites]
    if unknown or not names:
        raise ValueError(
            f"AmortizedGuide: observed={list(names)}; {unknown or 'nothing'} is no sample site of the model, whose sites "
            f"are {sites}. Give the names of the sites that will hold data."
        )


def _refuse_subsamples(trace: poutine.Trace) -> None:
    """Half of a simulated data set is no data set."""
    for site in trace.nodes.values():
        for frame in plate_frames(site) if site["type"] == "sample" else []:
            if subsampled(frame):
                raise ValueError(
                    f"AmortizedGuide: plate '{frame.name}' is subsampled ({frame.size} of {frame.full_size}); simulations must "
                    f"be whole. Take its size from an argument, pyro.plate('{frame.name}', n), and build the guide with a "
                    "small n: the plate may have any size when it is conditioned."
                )


def _site(site: dict[str, Any], support: constraints.Constraint | None, classes: int = 0) -> Site:
    fn = site["fn"]
    frames = plate_frames(site)
    plates = tuple(f.name for f in frames)
    dims = tuple(f.dim for f in frames)
    loose = [-i for i, n in enumerate(reversed(fn.batch_shape), 1) if n != 1 and -i not in dims]
    if loose:
        raise ValueError(
            f"AmortizedGuide: site '{site['name']}' has batch shape {tuple(fn.batch_shape)}, and dimension(s) {loose} are "
            "in no plate. Declare them dependent with .to_event(n), or open a pyro.plate."
        )
    return Site(site["name"], Size(fn.event_shape), plates, dims, support, classes, site["value"].dtype)


def _data(sites: list[dict[str, Any]]) -> Site:
    """An observed site, whose events may have another first size in each run."""
    shapes = [s["fn"].event_shape for s in sites]
    if len({(len(shape), shape[1:]) for shape in shapes}) > 1:
        raise ValueError(
            f"AmortizedGuide: events of site '{sites[0]['name']}' have shapes {sorted({tuple(s) for s in shapes})} in "
            f"{len(shapes)} runs; only their first size may differ, the times of a series."
        )
    transforms: Sequence[Any] = getattr(unwrapped(sites[0]["fn"]), "transforms", ())
    exponential = len(transforms) > 0 and isinstance(transforms[-1], ExpTransform)
    return replace(_site(sites[0], None), varies=len(set(shapes)) > 1, logarithmic=exponential)


def _latent(name: str, sites: list[dict[str, Any]]) -> Site:
    if not all(torch.isfinite(s["value"]).all() for s in sites):
        raise ValueError(
            f"AmortizedGuide: draws of latent site '{name}' from its prior are not finite; a guide that learns from "
            "simulations needs a proper prior with finite draws."
        )
    try:
        supports = [_event_support(s) for s in sites]
        if supports[0].is_discrete:
            return _site(sites[0], supports[0], _classes(name, supports))
        biject_to(supports[0])
    except NotImplementedError as error:
        on = in_short(sites[0]["fn"].support)
        raise ValueError(
            f"AmortizedGuide: latent site '{name}' has support {on}, onto which torch has no bijection: {error}."
        ) from error
    return _site(sites[0], supports[0])


_BOUNDS = ("lower_bound", "upper_bound")


def _event_support(site: dict[str, Any]) -> constraints.Constraint:
    """The support of one event: bounds that a plate has expanded are taken from its first element."""
    fn = site["fn"]
    support = elementwise(fn.support, fn.event_shape)
    if is_circular(fn):
        return _of_whole_event(constraints.interval(-math.pi, math.pi), fn)
    inner = innermost(support)
    if isinstance(support, constraints.independent) and support.event_dim > len(fn.event_shape):
        support = _of_whole_event(inner, fn)
    bounds = {k: getattr(inner, k) for k in _BOUNDS if isinstance(getattr(inner, k, None), Tensor)}
    if not any(b.dim() for b in bounds.values()):
        return support
    given = [getattr(inner, k) for k in _BOUNDS if hasattr(inner, k)]
    return _of_whole_event(type(inner)(*[_of_event(site["name"], b, fn) for b in given]), fn)


def _of_whole_event(entries: constraints.Constraint, fn: Distribution) -> constraints.Constraint:
    return constraints.independent(entries, len(fn.event_shape)) if fn.event_shape else entries


def _of_event(name: str, bound: Tensor | float, fn: Any) -> Tensor | float:
    """The bound of one event, of one that may have a plate's dimensions."""
    if not isinstance(bound, Tensor) or bound.dim() <= len(fn.event_shape):
        return bound
    rows = bound.expand(fn.shape()).reshape(-1, *fn.event_shape)
    if not (rows == rows[:1]).all():
        raise ValueError(
            f"AmortizedGuide: the bounds of latent site '{name}' differ within its plate, so a flow cannot be shared. "
            "Sample Uniform(0, 1) and scale it in the model."
        )
    return rows[0]


def _classes(name: str, supports: list[constraints.Constraint]) -> int:
    """How many values a discrete site has, over all prototypes."""
    inner = of_entries(supports[0])
    if inner is constraints.boolean:
        return 2
    counts = isinstance(inner, type(constraints.integer_interval(0, 1)))
    if counts and bool(torch.as_tensor(inner.lower_bound == 0).all()):
        return 1 + max(int(torch.as_tensor(of_entries(s).upper_bound).max()) for s in supports)
    raise ValueError(
        f"AmortizedGuide: discrete latent site '{name}' has support {in_short(supports[0])}; expected Bernoulli, Categorical or "
        "Binomial, with values from 0. Sum others out, or truncate them to a Categorical."
    )


def _independent_parts(
    model: Model,
    latents: Sequence[str],
    observed: Sequence[str],
    traces: Sequence[poutine.Trace],
    args: Args,
    kwargs: Kwargs,
) -> list[set[str]]:
    """Parts of the latents, in the order of the model; all latents as one part where it cannot be told.

    Args:
        model: a model that draws its data.
        latents, observed: names of sites.
        traces: two runs of the model.
        args, kwargs: the model's arguments.
    """
    if any(lacks_density(traces[0].nodes[k]) for k in observed):  # it says nothing of what it depends on
        return [set(latents)]
    drawn = _values(traces[0], observed)
    others = _values(traces[1], observed)
    quiet = warnings.catch_warnings()
    with quiet, fork_rng(), torch.no_grad(), pyro.validation_enabled(False), poutine.block():
        warnings.simplefilter("ignore")
        try:
            given = poutine.condition(model, data={k: drawn[k] for k in observed})
            upstream = get_dependencies(given, args, dict(kwargs))["prior_dependencies"]
            parts = _connected(upstream, drawn.keys() - set(observed))
            densities = partial(_densities, model, args, kwargs)
            agreed = len(parts) < 2 or all(_alone(p, upstream, drawn, others, densities) for p in parts)
        except Exception:  # provenance cannot follow this model: densities not written, numpy, values of other shapes
            return [set(latents)]
    found = [part & set(latents) for part in parts if part & set(latents)]
    whole = set().union(*found) == set(latents)  # a latent Delta has no place in the graph
    if not (agreed and whole):
        return [set(latents)]
    return sorted(found, key=lambda part: min(map(list(latents).index, part)))


def _values(trace: poutine.Trace, observed: Sequence[str]) -> Values:
    """What a run has drawn; what it has computed is left to the next run."""
    return {k: s["value"] for k, s in sample_sites(trace) if not s["is_observed"] or k in observed}


def _connected(upstream: Mapping[str, Any], hidden: set[str]) -> list[set[str]]:
    """Unknowns that share a density belong together."""
    parts: list[set[str]] = []
    for site, sources in upstream.items():
        joined = ({site} | set(sources)) & hidden
        if joined:
            apart = [p for p in parts if not p & joined]
            parts = [*apart, joined.union(*(p for p in parts if p & joined))]
    return parts


def _alone(
    part: set[str],
    upstream: Mapping[str, Any],
    drawn: Values,
    others: Values,
    densities: Callable[[Values], Values],
) -> bool:
    """Whether no density outside a part changes with its latents."""
    before = densities(drawn)
    after = densities(drawn | {k: others[k] for k in part})
    outside = [k for k in before if not ({k} | set(upstream.get(k, ()))) & part]
    return all(torch.allclose(before[k], after[k], equal_nan=True) for k in outside)


def _densities(model: Model, args: Args, kwargs: Kwargs, values: Values) -> Values:
    with fork_rng(0):
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)
    return {k: s["fn"].log_prob(s["value"]) for k, s in sample_sites(trace) if not s["infer"].get("_deterministic")}


def as_drawn(sites: Iterable[Site], values: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Values ``{site: value}`` in the precision of the module where they are real, and without booleans."""
    like, out = reference(module), dict(values)
    for site in sites:
        value, real = values.get(site.name), site.dtype.is_floating_point
        if isinstance(value, Tensor) and (value.dtype is torch.bool or (real and value.is_floating_point())):
            out[site.name] = value.to(like.dtype if real and like is not None else site.dtype)
    return out
