r"""What a group of latents sees of the data: features of each observed site, pooled over the plates that the group lacks.

A latent outside a plate must not depend on the order of the plate's data, and must take any number of them: it sees
:math:`\rho\big(\frac1n \sum_i \phi(x_i), \log n\big)` (Zaheer et al. 2017, "Deep sets", theorem 2), with two layers of
such means, so that each datum is seen beside the others. A latent inside a plate sees its own datum.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_dgm.amortized.structure import Site, Structure
from pyro_dgm.core import InputUnits
from pyro_dgm.core.networks import MLP, broadcast_cat

__all__ = ["SetEncoder", "Stream", "Streams", "pooled"]


@dataclass
class Stream:
    """Features ``(*lead, *plates, F)`` of data or of latents, and where there is one, ``(*lead, *plates)`` or None."""

    plates: tuple[str, ...]
    features: Tensor
    mask: Tensor | None = None


class SetEncoder(nn.Module):
    """Elements ``(*batch, F)`` pooled over chosen batch dimensions (which become 1): ``(*batch, out_features)``.

    Args:
        in_features: F.
        out_features: length of the summary.
        hidden_features: width of the networks on single elements.
    """

    def __init__(self, in_features: int, out_features: int = 32, hidden_features: int = 64) -> None:
        super().__init__()
        h = hidden_features
        self.first = MLP(in_features, h, (h,))
        self.second = MLP(2 * h + 1, h, (h,))
        self.last = MLP(h + 1, out_features, (h,))
        self.out_features = out_features

    def forward(self, x: Tensor, dims: list[int], mask: Tensor | None = None) -> Tensor:
        """``dims`` are negative dimensions of the batch; ``mask`` has the batch's shape, True where there is a datum."""
        elements = self.first(x)
        whole = torch.cat(pooled(elements, dims, mask), -1).expand(*elements.shape[:-1], -1)
        elements = self.second(torch.cat([elements, whole], -1))
        return self.last(torch.cat(pooled(elements, dims, mask), -1))


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
    """The data as features, one stream for each observed site: standardised, through the user's encoder where there is one.

    Beside a site stand the covariates of its plates, and whether there is a datum; what is missing is zero. A covariate
    without plates has a stream of its own.

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
        self.standard = nn.ModuleDict({self.keys[s.name]: InputUnits(s.width) for s in self.inputs})
        observed = [s.name for s in structure.observed]
        unknown = [k for k in encoder if k not in observed]
        if unknown:
            raise ValueError(f"AmortizedGuide: encoder={unknown} names no observed site; observed are {observed}.")
        self.encoder = nn.ModuleDict({_key(k): m for k, m in encoder.items()})

    def forward(self, batch: Mapping[str, Any], lead: int) -> list[Stream]:
        inputs = {s.name: self._standardised(s, batch, lead) for s in self.inputs}
        streams: list[Stream] = []
        for site in self.structure.observed:
            own = inputs[site.name]
            here = own.features.new_ones(own.features.shape[:-1]) if own.mask is None else own.mask.to(own.features)
            beside = [
                inputs[c.name].features for c in self.covariates if c.plates and set(c.plates) <= set(site.plates)
            ]
            streams.append(Stream(site.plates, broadcast_cat(own.features, *beside, here.unsqueeze(-1)), own.mask))
        return streams + [inputs[c.name] for c in self.covariates if not c.plates]

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
            u = _encoded(self.encoder[key], u, site, entries)
        return Stream(site.plates, u, mask)

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


def _key(name: str) -> str:
    return f"site_{name}".replace(".", "_")


def _encoded(encoder: nn.Module, u: Tensor, site: Site, entries: Tensor | None) -> Tensor:
    rows = u.reshape(-1, *site.event_shape)
    if "mask" in inspect.signature(encoder.forward).parameters:
        present = torch.ones_like(rows, dtype=torch.bool) if entries is None else entries.reshape(rows.shape)
        out = encoder(rows, mask=present)
    else:
        out = encoder(rows)
    if out.dim() != 2 or len(out) != len(rows):
        raise ValueError(
            f"AmortizedGuide: the encoder of '{site.name}' maps {tuple(rows.shape)} to {tuple(out.shape)}; expected "
            f"({len(rows)}, features)."
        )
    return out.reshape(*u.shape[:-1], -1)
