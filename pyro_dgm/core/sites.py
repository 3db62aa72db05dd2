"""What a Pyro trace holds: latent, observed and deterministic sites, told apart once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyro.poutine import Trace

__all__ = ["is_data", "is_enumerable", "is_subsample", "latent_sites", "observed_sites", "plate_frames"]

Site = dict[str, Any]


def is_subsample(site: Site) -> bool:
    """Whether the site is the index draw of a subsampled plate."""
    return type(site["fn"]).__name__ == "_Subsample"


def latent_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Name and site of every latent variable."""
    for name, site in trace.iter_stochastic_nodes():
        if not is_subsample(site):
            yield name, site


def is_enumerable(site: Site) -> bool:
    """Whether a discrete site is marked for summing out (``infer={"enumerate": "parallel"}`` or ``config_enumerate``)."""
    return site["type"] == "sample" and not site["is_observed"] and site["infer"].get("enumerate") == "parallel"


def is_data(site: Site) -> bool:
    """Whether an observed site holds data: neither ``pyro.deterministic`` nor ``pyro.factor`` nor a subsample."""
    if site["type"] != "sample" or not site["is_observed"] or is_subsample(site):
        return False
    return not site["infer"].get("_deterministic", False) and type(site["fn"]).__name__ != "Unit"


def observed_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Name and site of every observed site that holds data."""
    for name, site in trace.nodes.items():
        if is_data(site):
            yield name, site


def plate_frames(site: Site) -> list[Any]:
    """The vectorised plates of a site, outermost (most negative dim) first."""
    return sorted((f for f in site["cond_indep_stack"] if f.vectorized), key=lambda f: f.dim)
