r"""What a group of latents sees of the data: features of each set of plates, pooled over the plates that the group lacks.

A latent outside a plate must not depend on the order of the plate's data, and must take any number of them: it sees them by
a :class:`~pyro_dgm.amortized.sets.SetEncoder`. A latent inside a plate sees its own datum.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_dgm.amortized.sets import SetEncoder
from pyro_dgm.amortized.structure import Site, Structure
from pyro_dgm.amortized.summaries import summary_for
from pyro_dgm.core import InputUnits
from pyro_dgm.core.networks import broadcast_cat

__all__ = ["Pools", "Stream", "Streams", "by_site", "pairs", "parts_of", "pooled"]

_LEAST_VARIANCE = 1e-12
_PART = 1_000  # simulations whose contexts are made at once; not measured, chosen by hand


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

    longest: Tensor

    def __init__(self, structure: Structure, covariates: tuple[Site, ...], encoder: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.structure = structure
        self.covariates = covariates
        self.inputs = (*structure.observed, *covariates)
        self.keys = {s.name: _key(s.name) for s in self.inputs}
        self.standard = nn.ModuleDict({self.keys[s.name]: InputUnits(s.columns, bounded=False) for s in self.inputs})
        observed = [s.name for s in structure.observed]
        unknown = [k for k in encoder if k not in observed]
        if unknown:
            raise ValueError(f"AmortizedGuide: encoder={unknown} names no observed site; observed are {observed}.")
        self.encoder = nn.ModuleDict({_key(k): m for k, m in encoder.items()})
        _refuse_unread([s for s in structure.observed if s.varies and s.name not in encoder])
        self.register_buffer("longest", torch.zeros(len(structure.observed), dtype=torch.long))

    def forward(self, batch: Mapping[str, Any], lead: int) -> list[Stream]:
        seen = {s.name: self._standardised(s, batch, lead) for s in self.inputs}
        streams = [self._joined(sites, seen, batch) for sites in self._together()]
        return streams + [seen[c.name] for c in self.covariates if not c.plates]

    def without_network(self) -> dict[str, int]:
        """Observed sites that "auto" would read by a network and that have none, with the entries of their events."""
        sites = [s for s in self.structure.observed if self.keys[s.name] not in self.encoder]
        return {s.name: s.event_shape.numel() for s in sites if summary_for(s.event_shape) is not None}

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
            there = there if entries is None else entries
            standard: Any = self.standard[self.keys[site.name]]
            rows = _by_column(_read(site, x), site.columns)
            there = there if there is None else _by_column(there.expand(x.shape), site.columns)
            standard.fit(rows, mask=there, who=f"AmortizedGuide, site '{site.name}'")
        for i, site in enumerate(self.structure.observed):
            self.longest[i] = batch[site.name].shape[1 + site.depth] if site.varies else 0

    def entries(self, batch: Mapping[str, Any], lead: int) -> dict[str, Tensor]:
        """Of sites whose events have several entries, how many of them each datum has."""
        found: dict[str, Tensor] = {}
        for site in [s for s in self.structure.observed if s.event_shape]:
            x = site.features(batch[site.name], self.structure.nesting, lead)
            _, there = self._masks(site, batch, lead, x)
            counts = torch.tensor([x.shape[-1]]) if there is None else there.sum(-1).reshape(-1)
            found[site.name] = counts[counts > 0] if site.plates else counts
        return found

    def _standardised(self, site: Site, batch: Mapping[str, Any], lead: int) -> Stream:
        x = site.features(batch[site.name], self.structure.nesting, lead)
        key = self.keys[site.name]
        standard: Any = self.standard[key]
        mask, entries = self._masks(site, batch, lead, x)
        x, entries = self._as_long_as_trained(site, x, entries)
        u = standard(_by_column(_read(site, x.to(standard.loc)), site.columns)).reshape(x.shape)
        if mask is not None:
            present = mask.unsqueeze(-1) if entries is None else entries
            u = torch.where(present, u, torch.zeros_like(u))
        if key in self.encoder:
            raw = _moments(_by_column(u, site.columns), entries) if site.varies else u
            return Stream(site.plates, _encoded(self.encoder[key], u, site, entries), mask, learned=True, raw=raw)
        there = None if entries is None else entries.to(u)
        return Stream(site.plates, u, mask, u.shape[-1], there=there)

    def _as_long_as_trained(self, site: Site, x: Tensor, entries: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Of a series of any length, with what it lacks of the longest simulated one as missing entries at its end."""
        if not site.varies:
            return x, entries
        lacking = max(0, int(self.longest[self.structure.observed.index(site)]) * site.columns - x.shape[-1])
        entries = torch.ones_like(x, dtype=torch.bool) if entries is None else entries
        return nn.functional.pad(x, (0, lacking)), nn.functional.pad(entries, (0, lacking))

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


def _read(site: Site, x: Tensor) -> Tensor:
    """Data, or their logarithms where they are drawn as exponentials."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).log() if site.logarithmic else x


def _here(stream: Stream) -> Tensor:
    """1 where there is a datum."""
    shape = stream.features.shape[:-1]
    return stream.features.new_ones(shape) if stream.mask is None else stream.mask.to(stream.features).expand(shape)


def _key(name: str) -> str:
    return f"site_{name}".replace(".", "_")


def _by_column(x: Tensor, columns: int) -> Tensor:
    """Events as vectors; of a series of any length as rows, one for each time."""
    return x if x.shape[-1] == columns else x.reshape(*x.shape[:-1], x.shape[-1] // max(columns, 1), columns)


def _moments(u: Tensor, entries: Tensor | None) -> Tensor:
    """What series of any length are compared by: means and deviations of their columns, and the log of their length."""
    there = torch.ones_like(u) if entries is None else entries.reshape(u.shape).to(u)
    n = there.sum(-2).clamp_min(1.0)
    mean = (u * there).sum(-2) / n
    variance = ((u - mean.unsqueeze(-2)).square() * there).sum(-2) / n
    return torch.cat([mean, (variance + _LEAST_VARIANCE).sqrt(), n[..., :1].log()], -1)


def _refuse_unread(sites: list[Site]) -> None:
    for site in sites:
        raise ValueError(
            f"AmortizedGuide: events of site '{site.name}' have another size in each run, which only a network can read: "
            f"encoder='auto', or encoder={{'{site.name}': module}} with an argument mask."
        )


def _encoded(encoder: nn.Module, u: Tensor, site: Site, entries: Tensor | None) -> Tensor:
    times = [u.shape[-1] // site.columns] if site.varies else []
    rows = u.reshape(u.shape[:-1].numel(), *times, *site.event_shape[site.varies :])
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


def by_site(encoder: nn.Module | Mapping[str, nn.Module] | str | None, sites: Sequence[Site]) -> dict[str, nn.Module]:
    """Encoders by the names of observed sites; "auto" chooses them by the shapes of events."""
    observed = [s.name for s in sites]
    if encoder is None:
        return {}
    if isinstance(encoder, str):
        if encoder != "auto":
            raise ValueError(f"AmortizedGuide: encoder={encoder!r}, expected modules by observed site, or 'auto'.")
        chosen = {s.name: summary_for(s.event_shape, s.varies) for s in sites}
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
