"""The posterior of the latents that share their plates: a flow for the continuous ones, heads for the discrete ones.

A group's draws as sample statements: an auxiliary site for the flow, and a Delta for every latent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Categorical

from pyro_dgm.amortized.encoder import SetEncoder, Stream, pooled
from pyro_dgm.amortized.structure import Site
from pyro_dgm.amortized.truncation import Truncated, acceptance
from pyro_dgm.amortized.units import Moments, Units
from pyro_dgm.cnf.families import ContinuousFlow
from pyro_dgm.core import DistributionModule
from pyro_dgm.core.networks import MLP, broadcast_cat
from pyro_dgm.flows.mixture_chain import MixtureChain

__all__ = ["Drawn", "Group", "logits_of", "one_hot", "traced"]


@dataclass
class Drawn:
    """What later groups see of an earlier one: features ``(*lead, *plates, F)``."""

    plates: tuple[str, ...]
    features: Tensor
    mask: Tensor | None = None


class Group(nn.Module):
    r"""q(latents of one set of plates | data, earlier groups), shared by all elements of the plates.

    Args:
        sites: the latents.
        dims: dimension of every plate of the model.
        streams: plates and widths of the data's features.
        earlier: plates and widths of all groups before this one.
        sees: which of them it depends on.
        family: ``family(features, context_features)``.
        bounds: ``"map"`` or ``"truncate"``.
    """

    def __init__(
        self, sites: tuple[Site, ...], dims: dict[str, int], streams: list[tuple[tuple[str, ...], int]],
        earlier: list[tuple[tuple[str, ...], int]], sees: list[int],
        family: Callable[[int, int], DistributionModule] | None, bounds: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sites, self.plates, self.dims, self.sees = sites, sites[0].plates, dims, sees
        self.continuous = [s for s in sites if not s.classes]
        self.discrete = [s for s in sites if s.classes]
        self.units = Units(self.continuous, bounds) if self.continuous else None
        lacking = [[p for p in plates if p not in self.plates] for plates, _ in streams]
        self.pools = nn.ModuleList(
            SetEncoder(width) if lacks else nn.Identity() for lacks, (_, width) in zip(lacking, streams, strict=True)
        )
        self.summarised = any(lacking)
        widths = [32 if lacks else width for lacks, (_, width) in zip(lacking, streams, strict=True)]
        self.context_features = sum(widths) + sum(earlier[i][1] for i in sees)
        self.family = self._family(family)
        own = family is not None  # the default keeps boxes by itself
        self.truncated = own and self.units is not None and self.units.truncated
        self.heads = nn.ModuleList(self._heads())

    @property
    def features(self) -> int:
        """Numbers that later groups see."""
        return (self.units.features if self.units else 0) + sum(s.classes * s.width for s in self.discrete)

    def context(self, streams: list[Stream], earlier: list[Drawn]) -> Tensor:
        """All that the flow sees, shape ``(*lead, *plates, C)``; plates that the group lacks have become 1."""
        parts = [self._pooled(pool, s) for pool, s in zip(self.pools, streams, strict=True)]
        parts += [pooled(d.features, self._lacking(d.plates), d.mask)[0] if self._lacking(d.plates) else d.features
                  for d in (earlier[i] for i in self.sees)]  # fmt: skip
        return broadcast_cat(*parts)

    def encode(self, values: dict[str, Tensor], prior: Moments) -> tuple[Tensor | None, Tensor, Tensor]:
        """Continuous values in the flow's units (None without any), their log-determinant, and what later groups see."""
        u, log_det = self.units.flatten(values, prior) if self.units else (None, torch.zeros(()))
        return u, log_det, self.seen(u, values)

    def seen(self, u: Tensor | None, values: dict[str, Tensor]) -> Tensor:
        """Features for later groups: the flow's units and one-hot classes."""
        hot = [one_hot(s, values[s.name]) for s in self.discrete]
        return broadcast_cat(*([] if u is None else [u]), *hot)

    def log_prob_discrete(self, values: dict[str, Tensor], context: Tensor, u: Tensor | None) -> Tensor:
        """Log probability of the discrete sites, each given those before it, in nats."""
        total, seen = context.new_zeros(()), broadcast_cat(context, u)
        for head, site in zip(self.heads, self.discrete, strict=True):
            flat = values[site.name].reshape(*values[site.name].shape[: -len(site.event_shape) or None], site.width)
            total = total + _categorical(head, seen, site).log_prob(flat.long()).sum(-1)
            seen = broadcast_cat(seen, one_hot(site, values[site.name]))
        return total

    def log_prob(self, values: dict[str, Tensor], context: Tensor, mass: Tensor | None, prior: Moments) -> Tensor:
        """Log density of values ``(*batch, *event)``, shape ``(*batch)``; ``mass`` is the flow's share in its box."""
        u, log_det, _ = self.encode(values, prior)
        discrete = self.log_prob_discrete(values, context, u)
        if u is None:
            return discrete
        return self.distribution(context, mass).log_prob(u) + log_det + discrete

    def distribution(self, context: Tensor, mass: Tensor | None = None) -> Any:
        """The distribution of the continuous latents in the flow's units, cut off at its box; ``mass`` is its share there."""
        q = self.family(context)
        return Truncated(q, self.units, mass) if self.truncated and self.units else q

    def mass(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Share of the flow in its box, and its standard error; shapes of the context's batch."""
        return acceptance(self.family(context), self.units)

    def sample(self, context: Tensor, shape: Size, prior: Moments) -> tuple[dict[str, Tensor], Tensor]:
        """Values of every site and what later groups see; draws have ``shape + batch``."""
        u, values = None, {}
        if self.units is not None:
            u = self.distribution(context).sample(shape)
            values = self.units.unflatten(u, prior)[0]
        seen = broadcast_cat(context.expand(*shape, *context.shape), u)
        for head, site in zip(self.heads, self.discrete, strict=True):
            drawn = _categorical(head, seen, site).sample()
            values[site.name] = drawn.reshape([*drawn.shape[:-1], *site.event_shape]).to(site.dtype)
            seen = broadcast_cat(seen, one_hot(site, values[site.name]))
        return values, self.seen(u, values)

    def _pooled(self, pool: nn.Module, stream: Stream) -> Tensor:
        lacking = self._lacking(stream.plates)
        return pool(stream.features, lacking, stream.mask) if lacking else stream.features

    def _lacking(self, plates: tuple[str, ...]) -> list[int]:
        return [self.dims[p] for p in plates if p not in self.plates]

    def _family(self, make: Callable[[int, int], DistributionModule] | None) -> Any:
        if self.units is None:
            return None
        if make is None:
            shared = 0 if self.summarised else None  # a summary is a network of its own
            return MixtureChain(
                self.units.features, self.context_features, box=self.units.edges(), shared_features=shared
            )
        family = make(self.units.features, self.context_features)
        if family.event_shape != Size([self.units.features]) or family.context_features != self.context_features:
            raise ValueError(
                f"AmortizedGuide: family gave {type(family).__name__} of event shape {tuple(family.event_shape)} with "
                f"{family.context_features} context features for latents {[s.name for s in self.sites]}; expected "
                f"({self.units.features},) and {self.context_features}. Write family=lambda D, C: dgm.MAF(D, C)."
            )
        return family

    def _heads(self) -> list[nn.Module]:
        width, heads = self.context_features + (self.units.features if self.units else 0), list[nn.Module]()
        for site in self.discrete:
            heads.append(MLP(width, site.classes * site.width))
            width += site.classes * site.width
        return heads

    @property
    def continuous_flow(self) -> bool:
        """Whether the family is carried along a velocity field, and is trained by flow matching."""
        return isinstance(self.family, ContinuousFlow)


def one_hot(site: Site, value: Tensor) -> Tensor:
    """Classes of a discrete site as features ``(*batch, width * classes)``."""
    hot = nn.functional.one_hot(value.long(), site.classes).to(torch.get_default_dtype())
    return hot.reshape(*value.shape[: value.dim() - len(site.event_shape)], -1)


def logits_of(head: nn.Module, seen: Tensor, site: Site) -> Tensor:
    """Logits ``(*batch, width, classes)`` of a discrete site."""
    logits = head(seen)
    return logits.reshape(*logits.shape[:-1], site.width, site.classes)


def _categorical(head: nn.Module, seen: Tensor, site: Site) -> Categorical:
    return Categorical(logits=logits_of(head, seen, site))


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
