"""The sites of a Pyro trace: which kind each is, and whether its dimensions belong to draws, to plates or to the event."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame as Frame
from torch import Size, Tensor

from pyro_dgm.core.distribution import ImplicitDistribution
from pyro_dgm.core.shapes import as_tensor_like
from pyro_dgm.core.warn import plain

__all__ = [
    "Frame",
    "Layout",
    "Site",
    "innermost_distribution",
    "is_computed",
    "is_data",
    "is_drawn",
    "is_enumerable",
    "is_factor",
    "is_implicit",
    "lacks_density",
    "is_subsample",
    "latent_sites",
    "layout_of",
    "left_of_plates",
    "mask_of",
    "observed_sites",
    "plate_frames",
    "refuse_implicit",
    "sample_sites",
    "subsampled",
    "with_shape",
    "write_log_probs",
]

Site = dict[str, Any]  # a node of a trace


def is_subsample(site: Site) -> bool:
    """Whether the site is the index draw of a subsampled plate."""
    return type(site["fn"]).__name__ == "_Subsample"


def sample_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Name and site of every ``pyro.sample`` and ``pyro.factor``: latent, observed, computed; not the index of a plate."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not is_subsample(site):
            yield name, site


def write_log_probs(trace: Trace, wanted: Callable[[str, Site], bool] = lambda name, site: True) -> None:
    """Write their log probabilities into the sites of a trace.

    Raises:
        TypeError: for a value of a kind that has no density: sparse, on the meta device, booleans under a density of numbers.
    """
    try:
        trace.compute_log_prob(wanted)
    except (RuntimeError, TypeError) as error:
        for name, site in sample_sites(trace):
            if "log_prob" not in site and isinstance(site["value"], Tensor):
                _refuse_kind(name, site)
        said = plain(error)
        if said is error:
            raise
        raise said from error


def _refuse_kind(name: str, site: Site) -> None:
    value = as_tensor_like(f"site '{name}'", "its value", site["value"], None)
    if value.dtype is torch.bool and site["is_observed"]:
        raise TypeError(
            f"site '{name}': its data are of torch.bool, of which {type(site['fn']).__name__} has no density, expected numbers. "
            "Convert them: x.float()."
        )


def latent_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Name and site of every latent variable."""
    for name, site in trace.iter_stochastic_nodes():
        if not is_subsample(site):
            yield name, site


def is_enumerable(site: Site) -> bool:
    """Whether a discrete site is marked for summing out (``infer={"enumerate": "parallel"}`` or ``config_enumerate``)."""
    return site["type"] == "sample" and not site["is_observed"] and site["infer"].get("enumerate") == "parallel"


def is_computed(site: Site) -> bool:
    """Whether the value follows from other sites: ``pyro.deterministic``, or what a reparameterisation left in its place."""
    if site["type"] != "sample" or not site["is_observed"]:
        return False
    fn = site["fn"]
    masked_delta = isinstance(fn, MaskedDistribution) and isinstance(fn.base_dist, Delta) and fn._mask is False
    return bool(site["infer"].get("_deterministic", False)) or masked_delta


def is_data(site: Site) -> bool:
    """Whether an observed site holds data: neither computed nor ``pyro.factor`` nor a subsample."""
    if site["type"] != "sample" or not site["is_observed"] or is_subsample(site):
        return False
    return not is_computed(site) and not is_factor(site)


def is_factor(site: Site) -> bool:
    """Whether the site is a ``pyro.factor``, which changes the density and draws nothing."""
    return site["type"] == "sample" and type(site["fn"]).__name__ == "Unit"


def is_drawn(site: Site) -> bool:
    """Whether a run draws the site when it simulates: latents, and data in the place of those that are given."""
    return site["type"] == "sample" and not (is_computed(site) or is_subsample(site) or is_factor(site))


def observed_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Name and site of every observed site that holds data."""
    for name, site in trace.nodes.items():
        if is_data(site):
            yield name, site


def plate_frames(site: Site) -> list[Frame]:
    """The vectorised plates of a site, outermost (most negative dim) first."""
    return sorted((f for f in site["cond_indep_stack"] if f.vectorized), key=lambda f: f.dim)


def innermost_distribution(site: Site) -> Any:
    """The distribution without reshaping, transforms and masks around it."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def is_implicit(site: Site) -> bool:
    """Whether a site has no density."""
    return isinstance(innermost_distribution(site), ImplicitDistribution)


def lacks_density(site: Site) -> bool:
    """Whether a datum is a computed value, or an implicit draw, so that its score says nothing of the latents."""
    return isinstance(innermost_distribution(site), ImplicitDistribution | Delta)


def refuse_implicit(who: str, trace: Trace) -> None:
    """Refuse a latent or observed site without a density before any step is made: its score would fail later."""
    for name, site in [*latent_sites(trace), *observed_sites(trace)]:
        fn = innermost_distribution(site)
        if isinstance(fn, ImplicitDistribution):
            kind = "observed" if site["is_observed"] else "latent"
            raise ValueError(
                f"{who}: {kind} site '{name}' is a {fn!r} without a density. Write x = generator.sample_site('{name}'"
                f"{', obs=...' if kind == 'observed' else ''}) instead: its noise is then the latent and everything works; "
                "or learn the density ratio with Adversarial_ELBO."
            )


@dataclass(frozen=True)
class Layout:
    """The shape of a site's value in one run, without singleton dimensions that no plate owns.

    Attributes:
        batch, event: the two parts of the shape.
        plates: the plates' frames among the batch dimensions, outermost first.
        axes: plate name -> its axis in a stack of draws ``(n, *batch, *event)``.
        run: the batch shape of a single run, singleton dimensions included.
    """

    batch: Size
    event: Size
    plates: tuple[Frame, ...]
    axes: dict[str, int]
    run: Size = Size()

    @property
    def shape(self) -> Size:
        return self.batch + self.event

    @property
    def full_shape(self) -> Size:
        """The shape over all rows of subsampled plates."""
        full = list(self.shape)
        for frame in self.plates:
            if subsampled(frame):
                full[self.axes[frame.name] - 1] = frame.full_size
        return Size(full)


def layout_of(site: Site) -> Layout:
    """The layout of a sample site; the value of a deterministic site starts with its plates, or has none."""
    frames = plate_frames(site)
    if site["infer"].get("_deterministic"):
        return _deterministic(site["value"].shape, frames)
    event_dim = site["fn"].event_dim
    if not isinstance(site["value"], Tensor):
        raise TypeError(f"Site '{site['name']}' has a {type(site['value']).__name__} as its value, expected a tensor.")
    try:
        shape = torch.broadcast_shapes(site["value"].shape, site["fn"].shape())
    except RuntimeError as error:
        raise ValueError(
            f"Site '{site['name']}': its value has shape {tuple(site['value'].shape)}, its distribution "
            f"{tuple(site['fn'].shape())}; they have to broadcast."
        ) from error
    batch, event = shape[: len(shape) - event_dim], shape[len(shape) - event_dim :]
    owned = {f.dim: f for f in frames}
    kept = [d for d in range(-len(batch), 0) if batch[d] != 1 or d in owned]
    axes = {owned[d].name: 1 + i for i, d in enumerate(kept) if d in owned}
    plates = tuple(owned[d] for d in kept if d in owned)
    return Layout(Size(batch[d] for d in kept), event, plates, axes, batch)


def _deterministic(shape: Size, frames: list[Frame]) -> Layout:
    plates = tuple(frames) if list(shape[: len(frames)]) == [f.size for f in frames] else ()
    n = len(plates)
    return Layout(shape[:n], shape[n:], plates, {f.name: 1 + i for i, f in enumerate(plates)})


def subsampled(frame: Frame) -> bool:
    """Whether a plate's frame holds fewer rows than the plate."""
    return frame.full_size is not None and frame.full_size != frame.size


def left_of_plates(value: Tensor, event_dim: int, nesting: int) -> Tensor:
    """Values of single runs ``(n, *batch, *event)`` with the draws left of all plates: ``(n, 1, .., *batch, *event)``."""
    batch = value.dim() - 1 - event_dim
    return value.reshape(len(value), *(1,) * (nesting - batch), *value.shape[1:])


def with_shape(value: Tensor, n: int, shape: Size, name: str) -> Tensor:
    """A site's value as ``(n, *shape)``; a value that does not depend on the draws is repeated."""
    if value.numel() == n * shape.numel():
        return value.reshape(n, *shape)
    if value.numel() == shape.numel():
        return value.reshape(1, *shape).expand(n, *shape)
    try:
        return value.expand(n, *shape)
    except RuntimeError as error:
        raise ValueError(
            f"Site '{name}' has shape {tuple(value.shape)} for {n} draws, expected {n} times {tuple(shape)}. Its shape "
            "must not depend on the draw, and its batch dimensions must belong to plates."
        ) from error


def mask_of(site: Site, layout: Layout, nesting: int) -> Tensor | None:
    """Which data a site has, shape ``batch``, by ``poutine.mask``, ``obs_mask`` or ``.mask``; None for all of them.

    A mask that depends on an enumerated value, in dimensions left of ``nesting``, hides what it hides for all values.
    """
    fn = site["fn"]
    own = fn._mask if isinstance(fn, MaskedDistribution) else None
    masks = [torch.as_tensor(m) for m in (site["mask"], own) if m is not None and m is not True]
    if not masks:
        return None
    together = masks[0] if len(masks) == 1 else masks[0] & masks[1]
    for _ in range(together.dim() - nesting):
        together = together.any(0)
    return _first(together, layout)


def _first(mask: Tensor, layout: Layout) -> Tensor:
    """The mask of one draw; masks do not depend on the draw."""
    while mask.dim() > len(layout.run):
        mask = mask[0]
    return mask.expand(layout.run).reshape(layout.batch)
