r"""Local latents in units of the model's own conditional prior, :math:`z = (\theta_j - E[\theta_j]) / sd[\theta_j]`.

A group effect :math:`\theta_j \sim N(\mu, \tau)` shrinks to nothing as :math:`\tau \to 0`; a network would have to follow
that over decades. In these units (the non-centred ones) its prior is standard normal whatever the globals are. The model
says mean and sd: it is run on the globals as far as the local sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_dgm.core.shapes import of_entries
from pyro_dgm.guides.amortized.arguments import Arguments
from pyro_dgm.guides.amortized.structure import Site, Structure
from pyro_dgm.guides.amortized.units import Moments
from pyro_dgm.model.handlers import EndOfRun

__all__ = ["PriorUnits"]


class PriorUnits:
    """Means and standard deviations of local real latents given the latents outside their plates.

    Args:
        arguments: of the model.
        structure: of the model.
        covariates: inputs that differ between data sets.
    """

    def __init__(self, arguments: Arguments, structure: Structure, covariates: tuple[Site, ...]) -> None:
        self.arguments, self.structure, self.covariates = arguments, structure, covariates
        self.sites: list[Site] = []
        self.sites = self._usable([s for s in structure.latents if s.plates and not s.classes and _real(s)])

    def of(self, sites: tuple[Site, ...], known: Mapping[str, Tensor], data: Mapping[str, Any]) -> Moments:
        """For sites of one group, given earlier latents laid out as ``(*lead, *plates, *event)``; the same layout."""
        wanted = [s for s in sites if s in self.sites]
        if not wanted or not known:
            return {}
        lead = max((self._lead(k, v) for k, v in known.items()), key=len)
        return self._run(wanted, known, data, lead)

    def _lead(self, name: str, value: Tensor) -> Size:
        site = next(s for s in self.structure.latents if s.name == name)
        return value.shape[: max(0, value.dim() - len(site.event_shape) - self.structure.nesting)]

    def _run(self, wanted: list[Site], known: Mapping[str, Tensor], data: Mapping[str, Any], lead: Size) -> Moments:
        rows = {k: self._rows(k, v, lead) for k, v in known.items()}
        seen = _PriorMoments({s.name for s in wanted})
        self.run(self.arguments.model, rows, data, lead, seen)
        return {s.name: tuple(self._laid(m, lead, s) for m in seen.moments[s.name]) for s in wanted}  # type: ignore[misc]

    def run(
        self,
        model: Callable[..., Any],
        rows: Mapping[str, Tensor],
        data: Mapping[str, Any],
        lead: Size,
        seen: Messenger,
    ) -> None:
        """Run a model on values ``(n, *plates, *event)`` of its sites until the handler has seen all it wants."""
        arguments = self.arguments.bound(self.arguments.args, self.arguments.kwargs) | self.inputs(data, lead)
        with pyro.validation_enabled(False), poutine.block(), poutine.condition(data=rows), seen:
            try:
                model(**arguments)
            except EndOfRun:
                pass

    def _rows(self, name: str, value: Tensor, lead: Size) -> Tensor:
        shape = value.shape[len(self._lead(name, value)) :]
        return value.expand(*lead, *shape).reshape(lead.numel(), *shape)

    def inputs(self, data: Mapping[str, Any], lead: Size) -> dict[str, Any]:
        """The model's arguments other than observations, for ``lead.numel()`` draws at once."""
        out = {k: v for k, v in data.items() if k in self.arguments.names and k not in self._observed()}
        for site in self.covariates:
            value = data[site.name]
            own = value.dim() - site.depth - len(site.event_shape)
            pad = (1,) * (self.structure.nesting - site.depth)
            value = value.reshape(*value.shape[:own], *pad, *value.shape[own:])
            out[site.name] = value.expand(*lead, *value.shape[own:]).reshape(lead.numel(), *value.shape[own:])
        return out

    def _observed(self) -> set[str]:
        return {s.name for s in self.structure.observed}

    def _laid(self, moment: Tensor, lead: Size, site: Site) -> Tensor:
        """``(n, *plates, *event)`` with the leading dimensions back in place of n."""
        full = len(site.event_shape) + self.structure.nesting + 1
        moment = moment.reshape((1,) * (full - moment.dim()) + tuple(moment.shape))
        for dim in site.dims:  # what is the same for all elements of a plate fits a plate of any size
            first = moment.narrow(dim - len(site.event_shape), 0, 1)
            moment = first if bool((moment == first).all()) else moment
        return moment.expand(lead.numel(), *moment.shape[1:]).reshape(*lead, *moment.shape[1:])

    def _usable(self, sites: list[Site]) -> list[Site]:
        """Those whose conditional moments the model gives, for three draws at once."""
        if not sites or len({s.plates for s in self.structure.latents}) < 2:
            return []
        try:
            drawn = self.arguments.simulate(3, self.structure, self._example())
        except ValueError:
            return []
        nesting, out = self.structure.nesting, []
        for site in sites:
            outer = [s for s in self.structure.latents if set(s.plates) < set(site.plates)]
            known = {s.name: s.features(drawn[s.name], nesting, 1) for s in outer}
            known = {s.name: known[s.name].reshape([*known[s.name].shape[:-1], *s.event_shape]) for s in outer}
            if known and self._gives(site, known):
                out.append(site)
        return out

    def _gives(self, site: Site, known: Mapping[str, Tensor]) -> bool:
        with torch.no_grad():
            try:
                moments = self._run([site], known, self._example(), Size([3]))[site.name]
            except (NotImplementedError, RuntimeError, ValueError, KeyError, AttributeError):
                return False
        return all(bool(m.isfinite().all()) for m in moments) and bool((moments[1] > 0).all())

    def _example(self) -> dict[str, Any]:
        given = self.arguments.bound(self.arguments.args, self.arguments.kwargs)
        return {s.name: given[s.name].expand(3, *given[s.name].shape) for s in self.covariates}


class _PriorMoments(Messenger):
    """Notes mean and sd of the wanted sites, and stops the model after the last of them."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names, self.moments = names, dict[str, tuple[Tensor, Tensor]]()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.names:
            self.moments[msg["name"]] = (msg["fn"].mean, msg["fn"].variance.sqrt().clamp_min(1e-6))
            if len(self.moments) == len(self.names):
                raise EndOfRun


def _real(site: Site) -> bool:
    return of_entries(site.support) is constraints.real
