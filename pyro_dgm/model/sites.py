"""What a Pyro trace holds: latent, observed and deterministic sites, told apart once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine import Trace

from pyro_dgm.core.distribution import ImplicitDistribution

__all__ = [
    "is_computed",
    "is_data",
    "is_drawn",
    "is_enumerable",
    "is_factor",
    "is_subsample",
    "latent_sites",
    "observed_sites",
    "plate_frames",
    "refuse_implicit",
    "sample_sites",
]

Site = dict[str, Any]


def is_subsample(site: Site) -> bool:
    """Whether the site is the index draw of a subsampled plate."""
    return type(site["fn"]).__name__ == "_Subsample"


def sample_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Name and site of every ``pyro.sample`` and ``pyro.factor``: latent, observed, computed; not the index of a plate."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not is_subsample(site):
            yield name, site


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


def plate_frames(site: Site) -> list[Any]:
    """The vectorised plates of a site, outermost (most negative dim) first."""
    return sorted((f for f in site["cond_indep_stack"] if f.vectorized), key=lambda f: f.dim)


def refuse_implicit(who: str, trace: Trace) -> None:
    """Refuse a latent or observed site without a density before any step is made: its score would fail later."""
    for name, site in [*latent_sites(trace), *observed_sites(trace)]:
        fn = site["fn"]
        while not isinstance(fn, ImplicitDistribution) and hasattr(fn, "base_dist"):
            fn = fn.base_dist
        if isinstance(fn, ImplicitDistribution):
            kind = "observed" if site["is_observed"] else "latent"
            raise ValueError(
                f"{who}: {kind} site '{name}' is a {fn!r} without a density. Write x = generator.sample_site('{name}'"
                f"{', obs=...' if kind == 'observed' else ''}) instead: its noise is then the latent and everything works; "
                "or learn the density ratio with Adversarial_ELBO."
            )
