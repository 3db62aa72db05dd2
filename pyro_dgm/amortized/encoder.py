r"""What a group of latents sees of the data: features of each set of plates, pooled over the plates that the group lacks.

A latent outside a plate must not depend on the order of the plate's data, and must take any number of them: it sees them by
a :class:`~pyro_dgm.amortized.sets.SetEncoder`. A latent inside a plate sees its own datum.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_dgm.amortized.sets import Range, SetEncoder
from pyro_dgm.amortized.structure import Site, Structure
from pyro_dgm.amortized.summaries import summary_for
from pyro_dgm.core import InputUnits
from pyro_dgm.core.networks import broadcast_cat

__all__ = ["Pools", "Stream", "Streams", "Trained", "by_site", "checksum", "pairs", "parts_of", "pooled"]

# Not measured; chosen by hand.
_LEVEL = 0.005  # share of simulations that count as outside
_FEWEST = 200  # simulations for a range
_PART = 1_000  # simulations whose contexts are made at once
_CHANCE = 4.0  # standard deviations by which more of many data sets are outside than that


@dataclass
class Stream:
    """Features ``(*lead, *plates, F)`` of data or of latents, and where there is one, ``(*lead, *plates)`` or None.

    Attributes:
        told: how many of the features, the first, are numbers of data; the others say what is there, or are learned.
        inputs: how many of these, the first, stand beside the data: covariates, and data that the model draws earlier.
        there: which of the told features are present, ``(*lead, *plates, told)``; None where all are.
        learned: whether an encoder of the user made them.
        raw: what it saw, as one vector.
    """

    plates: tuple[str, ...]
    features: Tensor
    mask: Tensor | None = None
    told: int = 0
    inputs: int = 0
    there: Tensor | None = None
    learned: bool = False
    raw: Tensor | None = None


class Pools(nn.Module):
    """A stream pooled over the plates that a group lacks: all at once, or plate after plate where some have latents.

    Rows of groups are pooled within each group first, then the groups: how far groups differ is what the latents outside
    see. With crossed plates both orders are taken.

    Args:
        stream: an example.
        lacking: dimensions of the plates to pool.
        last: those of them whose elements have latents, in turn the last to be pooled.
    """

    def __init__(self, stream: Stream, lacking: list[int], last: list[int]) -> None:
        super().__init__()
        self.orders: list[list[list[int]]] = [[[d for d in lacking if d != p], [p]] for p in last] or [[lacking]]
        width = stream.features.shape[-1]
        chains: list[nn.ModuleList] = []
        for order in self.orders:
            first = SetEncoder(width, told=stream.told, inputs=stream.inputs)
            rest = [SetEncoder(first.out_features, told=first.told_features, raw=False) for _ in order[1:]]
            chains.append(nn.ModuleList([first, *rest]))
        self.chains = nn.ModuleList(chains)
        ends: list[Any] = [chain[-1] for chain in chains]
        self.steady = [i < end.told_features for end in ends for i in range(end.out_features)]
        self.counts = [i == 0 for end in ends for i in range(end.out_features)]
        self.bent = [b for end in ends for b in (*end.statistics.bent, *[0] * (end.out_features - end.told_features))]

    def forward(self, stream: Stream, learned: bool = True) -> Tensor:
        """The summary, ``(*lead, *plates, F)`` with 1 for pooled plates; what is learned may be zero."""
        return broadcast_cat(*[self._through(stream, i, learned) for i in range(len(self.orders))])

    def _through(self, stream: Stream, i: int, learned: bool, fit: bool = False) -> Tensor:
        x = stream.features
        mask = stream.mask
        there = stream.there
        chain: Any = self.chains[i]
        for encoder, dims in zip(chain, self.orders[i], strict=True):
            if fit:
                encoder.fit(x, dims, mask, there)
            x = encoder(x, dims, mask, there, learned=learned)
            mask = _some(mask, dims)
            there = None
        return x

    @torch.no_grad()
    def fit(self, stream: Stream) -> None:
        """Take ranges and units from simulations."""
        for i in range(len(self.orders)):
            self._through(stream, i, learned=False, fit=True)


def _some(mask: Tensor | None, dims: list[int]) -> Tensor | None:
    """Where any element of the pooled dimensions is present."""
    for d in dims if mask is not None else []:
        mask = mask.any(d, keepdim=True)  # type: ignore[union-attr]
    return mask


def pooled(x: Tensor, dims: list[int], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean over batch dimensions, kept as 1, of what is present; and the log of one plus how many there are.

    >>> mean, log_n = pooled(torch.tensor([[1.0], [3.0], [9.0]]), [-1], torch.tensor([True, True, False]))
    >>> mean, bool(log_n.exp().round() == 3)
    (tensor([[2.]]), True)
    """
    axes = [d - 1 for d in dims]
    present = x.new_ones(x.shape[:-1]) if mask is None else mask.to(x).expand(x.shape[:-1])
    present = present.unsqueeze(-1)
    count = present.sum(axes, keepdim=True)
    mean = (x * present).sum(axes, keepdim=True) / count.clamp_min(1.0)
    return mean, torch.log1p(count)


class Trained(nn.Module):
    """What a guide was trained on, as buffers: sizes of plates, and the range of the data.

    A guide whose parameters are those that it was made with was not trained. One that was trained on data has no range: an
    ELBO says nothing of data that it did not see, and those that it saw it knows.

    Args:
        plates: their names.
        features: numbers by which data sets are compared.
    """

    least: Tensor
    most: Tensor
    limit: Tensor
    start: Tensor

    def __init__(self, plates: Sequence[str], features: int) -> None:
        super().__init__()
        self.plates = list(plates)
        self.range = Range(features)
        self.register_buffer("least", torch.full((len(self.plates),), 2**31))
        self.register_buffer("most", torch.zeros(len(self.plates), dtype=torch.long))
        self.register_buffer("limit", torch.tensor(torch.inf))
        self.register_buffer("start", torch.tensor(torch.nan, dtype=torch.float64))

    @torch.no_grad()
    def on_sizes(self, counts: Mapping[str, Tensor]) -> None:
        """Note the sizes of plates in simulations."""
        for i, plate in enumerate(self.plates):
            if plate in counts:
                self.least[i] = min(int(self.least[i]), int(counts[plate].min()))
                self.most[i] = max(int(self.most[i]), int(counts[plate].max()))

    @torch.no_grad()
    def on_data(self, features: Tensor) -> None:
        """Take the range of vectors ``(N, F)`` of simulations; too few of them have none."""
        if len(features) < _FEWEST or not features.shape[-1]:
            return
        self.range.fit(features, torch.Generator().manual_seed(0))
        known = self.range.known().sort().values
        self.limit.copy_(known[min(len(known), math.ceil((len(known) + 1) * (1.0 - _LEVEL))) - 1])

    @torch.no_grad()
    def forget(self) -> None:
        """Know of no range any more."""
        self.least.fill_(2**31)
        self.most.zero_()
        self.limit.fill_(torch.inf)

    def unusual_sizes(self, counts: Mapping[str, Tensor]) -> Iterator[str]:
        """What is wrong with the sizes of plates, ``{plate: one of each data set}``."""
        for i, plate in enumerate(self.plates):
            low, high = int(self.least[i]), int(self.most[i])
            if plate not in counts or not high:
                continue
            outside = counts[plate][(counts[plate] < low) | (counts[plate] > high)]
            if len(outside):
                sizes = (
                    f"{int(outside.min()):,}"
                    if outside.min() == outside.max()
                    else f"{int(outside.min()):,} to {int(outside.max()):,}"
                )
                many = f" in {len(outside):,} of {len(counts[plate]):,} data sets" if len(counts[plate]) > 1 else ""
                wider = (max(1, min(low, int(outside.min()))), max(high, int(outside.max())))
                yield (
                    f"plate '{plate}' has {sizes} elements{many}, and the guide was trained on {low:,} to {high:,}. Refine the "
                    f"posterior, or train on such sizes: simulate(..., sizes={{'{plate}': {wider}}})."
                )

    def unusual_data(self, features: Tensor) -> str:
        """What is wrong with data sets whose vectors are ``(m, F)``; more of them than chance explains must be far."""
        if not self.limit.isfinite():
            return ""
        scores = self.range.distances(features)
        outside = int((scores > self.limit).sum())
        expected = _LEVEL * len(scores)
        if outside <= expected + _CHANCE * math.sqrt(expected) and not (outside and len(scores) == 1):
            return ""
        if len(scores) > 1:
            far = f"{outside:,} of {len(scores):,} data sets are"
        else:
            far = f"at a distance of {float(scores):.3g} from the nearest simulations they are"
        return (
            f"{far} outside of the range that the guide was trained on ({1.0 - _LEVEL:.1%} of the simulations are within "
            f"{float(self.limit):.3g}); the posterior may be anything there. Refine it, or widen the prior and train again. "
            "diagnostics.misspecification says what is unusual."
        )


class Streams(nn.Module):
    """The data as features, one stream for each set of plates: standardised, through the user's encoder where there is one.

    Observed sites of the same plates stand side by side, in the model's order, so that pairs stay pairs. On their left stand
    the covariates and the data of their plates and of the plates around them; on their right whether there is a datum. What
    is missing is zero. A covariate without plates, and data without, have streams of their own.

    Args:
        structure: of the model.
        covariates: inputs of the model as sites without a distribution.
        encoder: ``{site: module}``; a module maps events ``(N, *event_shape)`` to ``(N, F)``, and may take ``mask``.
    """

    def __init__(self, structure: Structure, covariates: tuple[Site, ...], encoder: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.structure = structure
        self.covariates = covariates
        self.inputs = (*structure.observed, *covariates)
        self.keys = {s.name: _key(s.name) for s in self.inputs}
        self.standard = nn.ModuleDict({self.keys[s.name]: InputUnits(s.width, bounded=False) for s in self.inputs})
        observed = [s.name for s in structure.observed]
        unknown = [k for k in encoder if k not in observed]
        if unknown:
            raise ValueError(f"AmortizedGuide: encoder={unknown} names no observed site; observed are {observed}.")
        self.encoder = nn.ModuleDict({_key(k): m for k, m in encoder.items()})

    def forward(self, batch: Mapping[str, Any], lead: int) -> list[Stream]:
        seen = {s.name: self._standardised(s, batch, lead) for s in self.inputs}
        streams = [self._joined(sites, seen, batch) for sites in self._together()]
        return streams + [seen[c.name] for c in self.covariates if not c.plates]

    def _together(self) -> list[list[Site]]:
        """Observed sites with the same plates; those without plates are on their own."""
        found: dict[Any, list[Site]] = {}
        for site in self.structure.observed:
            found.setdefault(site.plates or site.name, []).append(site)
        return list(found.values())

    def _joined(self, sites: list[Site], seen: Mapping[str, Stream], batch: Mapping[str, Any]) -> Stream:
        """Sites of the same plates side by side, what stands beside them on their left, and what is there on their right."""
        plates = sites[0].plates
        left = [c.name for c in self.covariates if c.plates and set(c.plates) <= set(plates)]
        left += [s.name for s in self.structure.observed if s.plates and set(s.plates) < set(plates)]
        own = [seen[s.name] for s in sites]
        told = [seen[k] for k in left if not seen[k].learned] + [s for s in own if not s.learned]
        learned = [seen[k] for k in left if seen[k].learned] + [s for s in own if s.learned]
        here = [_here(s).unsqueeze(-1) for s in own]
        features = broadcast_cat(*[s.features for s in (*told, *learned)], *here)
        widths = [s.features.shape[-1] for s in told]
        inputs = sum(widths[:-1]) if told and told[-1] is own[-1] else sum(widths)
        mask, there = self._whole(sites, told, own, batch)
        raw = learned[-1].raw if learned and not plates else None
        return Stream(plates, features, mask, sum(widths), inputs, there, len(learned) > 0, raw)

    def _whole(
        self, sites: list[Site], told: list[Stream], own: list[Stream], batch: Mapping[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Where any of the sites has a datum; and which of the told features, where that differs."""
        masks = [batch.get("mask", {}).get(s.name) for s in sites]
        if all(m is None for m in masks):
            return None, None
        mask = own[0].mask
        if all(m is masks[0] for m in masks) and all(s.there is None for s in own):
            return mask, None
        mask = torch.stack(torch.broadcast_tensors(*[_here(s) > 0 for s in own])).any(0)
        there = [_here(s).unsqueeze(-1).expand_as(s.features) if s.there is None else s.there for s in told]
        return mask, broadcast_cat(*there).to(own[0].features) if there else None

    def fit(self, batch: Mapping[str, Any]) -> None:
        """Take the units from what is present in simulations."""
        for site in self.inputs:
            x = site.features(batch[site.name], self.structure.nesting, 1)
            mask, entries = self._masks(site, batch, 1, x)
            there = mask if mask is None or entries is not None else mask.expand(x.shape[:-1]).unsqueeze(-1)
            standard: Any = self.standard[self.keys[site.name]]
            standard.fit(x, mask=there if entries is None else entries, who=f"AmortizedGuide, site '{site.name}'")

    def _standardised(self, site: Site, batch: Mapping[str, Any], lead: int) -> Stream:
        x = site.features(batch[site.name], self.structure.nesting, lead)
        key = self.keys[site.name]
        standard: Any = self.standard[key]
        u = standard(x.to(standard.loc))
        mask, entries = self._masks(site, batch, lead, x) if "mask" in batch else (None, None)
        if mask is not None:
            present = mask.unsqueeze(-1) if entries is None else entries
            u = torch.where(present, u, torch.zeros_like(u))
        if key in self.encoder:
            return Stream(site.plates, _encoded(self.encoder[key], u, site, entries), mask, learned=True, raw=u)
        there = None if entries is None else entries.to(u)
        return Stream(site.plates, u, mask, u.shape[-1], there=there)

    def _masks(self, site: Site, batch: Mapping[str, Any], lead: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of whole data, and of entries of data (where the mask has axes of the event)."""
        mask = batch.get("mask", {}).get(site.name)
        if mask is None:
            return None, None
        axes = mask.dim() - lead
        if axes <= site.depth:
            return site.laid_mask(mask, self.structure.nesting, lead).expand(x.shape[:-1]), None
        entries = mask.reshape(*mask.shape, *(1,) * (site.depth + len(site.event_shape) - axes))
        entries = entries.expand(batch[site.name].shape).reshape(x.shape)
        return entries.any(-1), entries


def _here(stream: Stream) -> Tensor:
    """1 where there is a datum."""
    shape = stream.features.shape[:-1]
    return stream.features.new_ones(shape) if stream.mask is None else stream.mask.to(stream.features).expand(shape)


def _key(name: str) -> str:
    return f"site_{name}".replace(".", "_")


def _encoded(encoder: nn.Module, u: Tensor, site: Site, entries: Tensor | None) -> Tensor:
    rows = u.reshape(-1, *site.event_shape)
    given: dict[str, Tensor] = {}
    if "mask" in inspect.signature(encoder.forward).parameters:
        given["mask"] = torch.ones_like(rows, dtype=torch.bool) if entries is None else entries.reshape(rows.shape)
    try:
        out = encoder(rows, **given)
    except RuntimeError as error:
        raise ValueError(
            f"AmortizedGuide: the encoder of '{site.name}' cannot read its events, which it gets as {tuple(rows.shape)}: {error}"
        ) from error
    if not isinstance(out, Tensor):
        raise TypeError(f"AmortizedGuide: the encoder of '{site.name}' gave a {type(out).__name__}, expected a tensor.")
    if out.dim() != 2 or len(out) != len(rows):
        raise ValueError(
            f"AmortizedGuide: the encoder of '{site.name}' maps {tuple(rows.shape)} to {tuple(out.shape)}; expected "
            f"({len(rows)}, features)."
        )
    return out.reshape(*u.shape[:-1], out.shape[-1])


@torch.no_grad()
def checksum(module: nn.Module) -> Tensor:
    """A number that training changes; NaN where there is nothing to train."""
    sums = [p.double().sum() for p in module.parameters()]
    return torch.stack(sums).sum() if sums else torch.tensor(torch.nan)


def by_site(encoder: nn.Module | Mapping[str, nn.Module] | str | None, sites: Sequence[Site]) -> dict[str, nn.Module]:
    """Encoders by the names of observed sites; "auto" chooses them by the shapes of events."""
    observed = [s.name for s in sites]
    if encoder is None:
        return {}
    if isinstance(encoder, str):
        if encoder != "auto":
            raise ValueError(f"AmortizedGuide: encoder={encoder!r}, expected modules by observed site, or 'auto'.")
        chosen = {s.name: summary_for(s.event_shape) for s in sites}
        return {k: network for k, network in chosen.items() if network is not None}
    if isinstance(encoder, Mapping):
        return dict(encoder)
    if len(observed) == 1:
        return {observed[0]: encoder}
    raise ValueError(f"AmortizedGuide: one encoder for observed={observed}; give a mapping {{site: encoder}}.")


def parts_of(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Some simulations after the other."""
    n = next(len(v) for v in batch.values() if isinstance(v, Tensor))
    for start in range(0, n, _PART):
        pick = lambda of, at=slice(start, start + _PART): {k: v[at] for k, v in of.items() if isinstance(v, Tensor)}  # noqa: E731
        yield pick(batch) | ({"mask": pick(batch["mask"])} if "mask" in batch else {})


def pairs(context: Tensor, u: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Contexts ``(N, C)`` and latents ``(N, D)`` of the elements that exist."""
    context = context.expand(*u.shape[:-1], -1)
    rows = u.new_ones(u.shape[:-1], dtype=torch.bool) if mask is None else mask.expand(u.shape[:-1])
    return context[rows], u[rows]
