"""Enumerated sites under masks and scales, as in ``TraceEnum_ELBO``: what is summed over, and draws of it.

A mask hides what depends on an enumerated site, never the distribution that is summed: a masked step of a chain sums to
one. A scale stands outside of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.infer.discrete import _sample_posterior_from_trace
from pyro.ops import packed
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_dgm.core.warn import warn_user

__all__ = ["factor_of", "is_enumerated", "posterior_draws_of", "warn_of_masked_sums"]

Site = dict[str, Any]


def is_enumerated(site: Site) -> bool:
    """Whether this run gave the site all of its values, in a dimension of their own."""
    return site["infer"].get("_enumerate_dim") is not None


def factor_of(site: Site) -> Tensor:
    """A packed site's log density as it enters the sum over enumerated sites: masked unless it is summed over itself."""
    p = site["packed"]
    if is_enumerated(site):
        return p["unscaled_log_prob"]
    return packed.scale_and_mask(p["unscaled_log_prob"], mask=p["mask"])


def posterior_draws_of(model: Callable[..., Any], first_available_dim: int) -> Callable[..., Any]:
    """The model with its enumerable sites drawn from their exact posterior given everything else.

    ``infer_discrete`` masks the enumerated sites themselves: hidden steps would be uniform, not drawn from the model.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with poutine.block():
            trace = poutine.trace(poutine.enum(model, first_available_dim)).get_trace(*args, **kwargs)
        trace = prune_subsample_sites(trace)
        trace.compute_log_prob()
        trace.pack_tensors()
        for site in trace.nodes.values():
            if site["type"] == "sample":
                site["packed"]["masked_log_prob"] = factor_of(site)
        return _sample_posterior_from_trace(model, trace, 1, True, *args, **kwargs)

    return run


def warn_of_masked_sums(sites: dict[str, Site]) -> None:
    """Say that ``.mask()`` of a distribution that is summed over leaves ones, of which there are as many as values."""
    for name, site in sites.items():
        own = site["fn"]._mask if isinstance(site["fn"], MaskedDistribution) else True
        if not bool(torch.as_tensor(own).all()):
            warn_user(
                f"Site '{name}' is summed out and its distribution is masked by .mask(): every hidden row of K values adds "
                "log K to the density, as in TraceEnum_ELBO. Write `with poutine.mask(mask=...)` around the site instead: a "
                "hidden row then adds nothing."
            )
