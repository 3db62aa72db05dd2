"""A group's draws as sample statements: an auxiliary site for the flow, and a Delta for every latent."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_dgm.core.networks import broadcast_cat
from pyro_dgm.guides.amortized.group import Group, logits_of, one_hot
from pyro_dgm.guides.amortized.units import Moments

__all__ = ["traced"]

_AUXILIARY = {"is_auxiliary": True}
_CUT_OFF = {"instead": "A prior's box is cut off the flow by rejection: build the guide with bounds='map' for an ELBO."}


def traced(
    group: Group, context: Tensor, plates: Sequence[Any], prior: Moments, hidden: Collection[str] = ()
) -> tuple[dict[str, Tensor], Tensor]:
    """Values of the group's sites, and what later groups see, drawn inside its plates; ``hidden`` sites are no model's."""
    values: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for plate in plates:
            stack.enter_context(plate)
        u = None
        if group.units is not None:
            infer = _AUXILIARY | (_CUT_OFF if group.truncated else {})
            u = pyro.sample(f"_flow_{group.sites[0].name}", group.distribution(context), infer=infer)
            at, log_dets = group.units.unflatten(u, prior)
            for site in group.continuous:
                delta = dist.Delta(at[site.name], -log_dets[site.name], event_dim=len(site.event_shape))
                aside: dict[str, Any] = _AUXILIARY if site.name in hidden else {}
                values[site.name] = pyro.sample(site.name, delta, infer=aside)
        seen = broadcast_cat(context, u)
        for head, site in zip(group.heads, group.discrete, strict=True):
            drawn = pyro.sample(f"_class_{site.name}", dist.Categorical(logits=logits_of(head, seen, site)).to_event(1),
                                infer=_AUXILIARY)  # fmt: skip
            value = drawn.reshape([*drawn.shape[:-1], *site.event_shape]).to(site.dtype)
            values[site.name] = pyro.sample(site.name, dist.Delta(value, event_dim=len(site.event_shape)))
            seen = broadcast_cat(seen, one_hot(site, values[site.name]))
    return values, group.seen(u, values)
