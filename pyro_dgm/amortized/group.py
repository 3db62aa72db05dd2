"""The posterior of latents that share their plates: a flow for the continuous ones, then heads for the discrete ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn

from pyro_dgm.amortized.encoder import Pools, Stream, pairs, pooled
from pyro_dgm.amortized.structure import Site, Structure
from pyro_dgm.amortized.units import BesidePrior, Moments, PriorUnits, Units
from pyro_dgm.cnf.families import ContinuousFlow
from pyro_dgm.core import DistributionModule
from pyro_dgm.core.networks import MLP, broadcast_cat
from pyro_dgm.flows.ensemble import Ensemble, members_of
from pyro_dgm.flows.mixture_chain import MixtureChain

__all__ = ["REGRESSED", "Family", "Group", "Turn", "groups_of", "trimmed", "trimmed_moments"]

Family = Callable[[int, int], DistributionModule]
Values = dict[str, Tensor]

_AUXILIARY = {"is_auxiliary": True}
REGRESSED = 20_000  # rows that a start by regression takes; not measured, chosen by hand


class Group(nn.Module):
    r"""q(latents of one set of plates | data, earlier groups), shared by all elements of the plates.

    Continuous latents are one vector of a flow. A discrete site is drawn after them by a head, a network that sees the
    context, the flow's vector and the discrete sites before.

    Args:
        sites: the latents.
        dims: dimension of every plate of the model.
        streams: an example of the data's features.
        owned: sets of plates that latents live in.
        sees: the earlier groups on which it depends, by their place among all.
        centred: sites that are seen in units of their prior given earlier latents.
        family: ``family(features, context_features)``; None for a chain of mixtures.
        keeps_boxes: whether the chain of mixtures keeps the boxes of priors by itself.
        ensemble: so many flows, evenly mixed.
    """

    def __init__(
        self,
        sites: tuple[Site, ...],
        dims: dict[str, int],
        streams: Sequence[Stream],
        owned: Collection[tuple[str, ...]],
        sees: Mapping[int, Group],
        centred: Collection[Site],
        family: Family | None,
        keeps_boxes: bool,
        ensemble: int = 1,
    ) -> None:
        super().__init__()
        self.sites = sites
        self.plates = sites[0].plates
        self.sees = list(sees)
        self.continuous = [s for s in sites if not s.classes]
        self.discrete = [s for s in sites if s.classes]
        self.units = Units(self.continuous, keeps_boxes) if self.continuous else None
        self.lacking_of_earlier = [self._dims_of_lacking(g.plates, dims) for g in sees.values()]
        self.pools = nn.ModuleList(self._pools(s, owned, dims) for s in streams)
        self.summarised = any(isinstance(pool, Pools) for pool in self.pools)
        self.steady, self.counts, self.bent = self._columns(streams, sees)
        width = sum(s.width for s in sites if s in centred)
        told = len(self.steady) - sum(g.features for g in sees.values())
        self.beside = BesidePrior([s for s in sites if s in centred], told) if width else None
        self.steady += [True] * 2 * width
        self.counts += [False] * 2 * width
        self.bent += [0] * 2 * width
        self.context_features = len(self.steady)
        self.may_grow = family is None and self.units is not None
        self.family: Any = _together([self._family(family) for _ in range(ensemble if self.units is not None else 1)])
        self.heads = nn.ModuleList(self._heads())

    def grow(self, count: int) -> None:
        """Have an ensemble of at least so many default families; new ones have parameters of their own."""
        members = members_of(self.family)
        if self.may_grow and count > len(members):
            made = [self._family(None) for _ in range(count - len(members))]
            self.family = _together([*members, *made]).to(next(self.family.parameters()))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A saved guide may have grown."""
        start = f"{prefix}family.members."
        self.grow(len({k.removeprefix(start).split(".")[0] for k in state if k.startswith(start)}))
        super()._load_from_state_dict(state, prefix, *rest)

    def _pools(self, stream: Stream, owned: Collection[tuple[str, ...]], dims: dict[str, int]) -> nn.Module:
        """What pools a stream; plates come last that have latents which another plate of the stream does not split."""
        lacking = [p for p in stream.plates if p not in self.plates]
        apart = {p for plates in owned if not set(stream.plates) <= set(plates) for p in plates}
        last = [dims[p] for p in lacking if p in apart and len(lacking) > 1]
        return Pools(stream, [dims[p] for p in lacking], last) if lacking else nn.Identity()

    def _columns(
        self, streams: Sequence[Stream], sees: Mapping[int, Group]
    ) -> tuple[list[bool], list[bool], list[int]]:
        """Which features of the context training does not change, which are counts, and which logs of others."""
        steady: list[bool] = []
        counts: list[bool] = []
        bent: list[int] = []
        for stream, pool in zip(streams, self.pools, strict=True):
            width = stream.features.shape[-1]
            steady += pool.steady if isinstance(pool, Pools) else [not stream.learned] * width
            counts += pool.counts if isinstance(pool, Pools) else [False] * width
            bent += pool.bent if isinstance(pool, Pools) else [0] * width
        earlier = sum(g.features for g in sees.values())
        return steady + [True] * earlier, counts + [False] * earlier, bent + [0] * earlier

    def columns(self, device: torch.device) -> list[Tensor]:
        """Which features of the context are steady, counts and bent."""
        return [torch.tensor(mask, device=device) for mask in (self.steady, self.counts, self.bent)]

    def fit(self, streams: list[Stream]) -> None:
        """Take ranges and units of statistics from simulations."""
        for pool, stream in zip(self.pools, streams, strict=True):
            if isinstance(pool, Pools):
                pool.fit(stream)

    def _dims_of_lacking(self, plates: Sequence[str], dims: dict[str, int]) -> list[int]:
        return [dims[p] for p in plates if p not in self.plates]

    def _family(self, make: Family | None) -> DistributionModule | None:
        if self.units is None:
            return None
        size = self.units.features
        if make is None:
            shared = 0 if self.summarised else None  # a summary is a network of its own
            return MixtureChain(size, self.context_features, box=self.units.box(), shared_features=shared)
        family = make(size, self.context_features)
        if family.event_shape != Size([size]) or family.context_features != self.context_features:
            raise ValueError(
                f"AmortizedGuide: family gave {type(family).__name__} of event shape {tuple(family.event_shape)} with "
                f"{family.context_features} context features for latents {[s.name for s in self.sites]}; expected "
                f"({size},) and {self.context_features}. Write family=lambda D, C: dgm.MAF(D, C)."
            )
        return family.eval()

    def _heads(self) -> list[nn.Module]:
        heads: list[nn.Module] = []
        width = self.context_features + (self.units.features if self.units else 0)
        for site in self.discrete:
            heads.append(MLP(width, site.classes * site.width))
            width += site.classes * site.width
        return heads

    @property
    def features(self) -> int:
        """Numbers that later groups see."""
        return (self.units.features if self.units else 0) + sum(s.classes * s.width for s in self.discrete)

    @property
    def continuous_flow(self) -> bool:
        """Whether the family is carried along a velocity field, and is trained by flow matching."""
        return self.family is not None and all(isinstance(f, ContinuousFlow) for f in members_of(self.family))

    def context(self, streams: list[Stream], earlier: list[Stream], learned: bool = True) -> Tensor:
        """All that the group sees, shape ``(*lead, *plates, C)``; plates that it lacks have become 1."""
        parts = [
            pool(stream, learned) if isinstance(pool, Pools) else stream.features
            for pool, stream in zip(self.pools, streams, strict=True)
        ]
        for stream, dims in zip(earlier, self.lacking_of_earlier, strict=True):
            parts.append(pooled(stream.features, dims, stream.mask)[0] if dims else stream.features)
        return broadcast_cat(*parts)

    def sample(self, context: Tensor, shape: Size, prior: Moments) -> tuple[Values, Tensor | None]:
        """Values of every site, and the continuous ones in the flow's units; draws have ``shape + batch``."""
        u = None
        values: Values = {}
        if self.units is not None:
            u = self.family(context).sample(shape)
            values, _ = self.units.unflatten(u, prior)
        seen = broadcast_cat(context.expand(*shape, *context.shape), u)
        for head, site in zip(self.heads, self.discrete, strict=True):
            values[site.name] = _as_values(site, _classes(head, seen, site).sample())
            seen = broadcast_cat(seen, _one_hot(site, values[site.name]))
        return values, u

    def sample_sites(
        self, context: Tensor, plates: Sequence[Any], prior: Moments, hidden: Collection[str]
    ) -> tuple[Values, Tensor | None]:
        """The same as sample statements inside plates; ``hidden`` sites are auxiliary, since the model has none like them.

        An auxiliary site draws the flow's vector, and a Delta with the log-determinant stands for every latent.
        """
        u = None
        values: Values = {}
        with ExitStack() as stack:
            for plate in plates:
                stack.enter_context(plate)
            if self.units is not None:
                u = pyro.sample(f"_flow_{self.sites[0].name}", self.family(context), infer=_AUXILIARY)
                at, log_dets = self.units.unflatten(u, prior)
                for site in self.continuous:
                    delta = dist.Delta(at[site.name], -log_dets[site.name], event_dim=len(site.event_shape))
                    infer: dict[str, Any] = _AUXILIARY if site.name in hidden else {}
                    values[site.name] = pyro.sample(site.name, delta, infer=infer)
            seen = broadcast_cat(context, u)
            for head, site in zip(self.heads, self.discrete, strict=True):
                drawn = pyro.sample(f"_class_{site.name}", _classes(head, seen, site), infer=_AUXILIARY)
                delta = dist.Delta(_as_values(site, drawn), event_dim=len(site.event_shape))
                values[site.name] = pyro.sample(site.name, delta)
                seen = broadcast_cat(seen, _one_hot(site, values[site.name]))
        return values, u


def _together(families: list[Any]) -> Any:
    """One family, or an ensemble of them."""
    return families[0] if len(families) == 1 else Ensemble(families)


def groups_of(
    structure: Structure,
    prior: PriorUnits,
    streams: Sequence[Stream],
    family: Family | Mapping[str, Family] | None,
    keeps_boxes: bool,
    ensemble: int,
) -> list[Group]:
    """One for each set of plates of latents that hang together, outermost first."""
    dims = {n: d for n, (d, _) in structure.plates.items()}
    owned = {s.plates for s in structure.latents}
    groups: list[Group] = []
    for sites in structure.groups():
        sees = {i: g for i, g in enumerate(groups) if structure.related(g.sites[0], sites[0])}
        outer = not (sites[0].plates or sees)  # elsewhere the constant of a box would depend on other latents
        own = family_of(family, sites)
        keeps = keeps_boxes and outer and own is None
        groups.append(Group(sites, dims, streams, owned, sees, prior.sites, own, keeps, ensemble))
    return groups


def _one_hot(site: Site, value: Tensor) -> Tensor:
    """Classes of a discrete site as features ``(*batch, width * classes)``."""
    hot = nn.functional.one_hot(value.long(), site.classes).to(torch.get_default_dtype())
    batch = value.shape[: value.dim() - len(site.event_shape)]
    return hot.reshape(*batch, hot.shape[len(batch) :].numel())


def _classes(head: nn.Module, seen: Tensor, site: Site) -> dist.TorchDistribution:
    """The distribution of a discrete site's flat event, by its head."""
    logits = head(seen)
    logits = logits.reshape(*logits.shape[:-1], site.width, site.classes)
    validate = None if logits.numel() else False  # torch cannot look at no rows
    return dist.Categorical(logits=logits, validate_args=validate).to_event(1)


def _as_values(site: Site, drawn: Tensor) -> Tensor:
    return drawn.reshape([*drawn.shape[:-1], *site.event_shape]).to(site.dtype)


@dataclass
class Turn:
    """A group in a walk over the groups: what it looks at, and its values, which those after it look at.

    Attributes:
        context: shape ``(*lead, *plates, C)``.
        prior: moments of the group's latents, given the values of earlier groups.
        mask: which elements of its plates exist; None for all.
        values: of its sites, ``(*lead, *plates, *event)``, with all plates of the model.
        u: the continuous values in the flow's units, if there are any.
        log_det: of the map to ``u``, where values were encoded.
    """

    group: Group
    context: Tensor
    prior: Moments
    mask: Tensor | None
    values: Values = field(default_factory=dict)
    u: Tensor | None = None
    log_det: Tensor | None = None

    @torch.no_grad()
    def fit(self) -> None:
        """Take units from encoded values, and what the data alone say of them."""
        group = self.group
        if group.units is not None:
            group.units.fit(self.values, self.mask, self.prior)
        if group.beside is not None:
            context, x = pairs(self.context, group.beside.values(self.values), self.mask)
            group.beside.fit(context[:REGRESSED], x[:REGRESSED], *group.columns(context.device))

    def encode(self, values: Mapping[str, Any], nesting: int, lead: int) -> None:
        """Take given values ``{site: (*lead, *site)}``, of a model with ``nesting`` plate dimensions."""
        self.values = {s.name: s.laid(values[s.name], nesting, lead) for s in self.group.sites}
        if self.group.units is not None:
            self.u, self.log_det = self.group.units.flatten(self.values, self.prior)

    def stream(self) -> Stream:
        """What later groups see: the continuous values in the flow's units, and the classes of the discrete ones."""
        hot = [_one_hot(s, self.values[s.name]) for s in self.group.discrete]
        return Stream(self.group.plates, broadcast_cat(self.u, *hot), self.mask)

    def log_prob(self, *, apart: bool = False) -> Tensor:
        """Log density of encoded values, nats, shape ``(*lead, *plates)``; 0 where there is no element.

        Members of an ensemble are trained ``apart``, by the mean of their own.
        """
        if self.u is None or self.log_det is None:
            return self.present(self.log_prob_discrete())
        family = self.group.family
        if apart and isinstance(family, Ensemble):
            terms = family.apart(self.context, self.u).mean(0) + self.log_det
        else:
            terms = family(self.context).log_prob(self.u) + self.log_det
        if self.group.discrete:
            terms = terms + self.log_prob_discrete()
        return terms if self.mask is None else self.present(terms)

    def present(self, terms: Tensor) -> Tensor:
        """Terms ``(*lead, *plates)``, with 0 where there is no element."""
        return terms if self.mask is None else torch.where(self.mask, terms, torch.zeros_like(terms))

    def log_prob_discrete(self) -> Tensor:
        """The part of the discrete sites, each given those before it."""
        total = self.context.new_zeros(())
        seen = broadcast_cat(self.context, self.u)
        for head, site in zip(self.group.heads, self.group.discrete, strict=True):
            value = self.values[site.name]
            flat = value.reshape(*value.shape[: value.dim() - len(site.event_shape)], site.width)
            total = total + _classes(head, seen, site).base_dist.log_prob(flat.long()).sum(-1)
            seen = broadcast_cat(seen, _one_hot(site, value))
        return total


def trimmed(x: Tensor, right: int) -> Tensor:
    """Without the dimensions left of the ``right`` last ones, where all of them are 1."""
    extra = x.shape[: max(0, x.dim() - right)]
    return x.reshape(x.shape[len(extra) :]) if all(n == 1 for n in extra) else x


def trimmed_moments(turn: Turn, depth: int) -> Moments:
    """A turn's prior moments, without the dimensions left of its plates where they are 1."""
    moments: Moments = {}
    for site in turn.group.sites:
        if site.name in turn.prior:
            mean, sd = turn.prior[site.name]
            right = depth + len(site.event_shape)
            moments[site.name] = (trimmed(mean, right), trimmed(sd, right))
    return moments


def family_of(family: Family | Mapping[str, Family] | None, sites: tuple[Site, ...]) -> Family | None:
    """The family that was chosen for a group with these sites."""
    if not isinstance(family, Mapping):
        return family
    return next((family[s.name] for s in sites if s.name in family), None)
