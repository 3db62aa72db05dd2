r"""The units in which a flow works: latents of a group as one vector, standardised, each support taken care of.

``"map"``: :math:`u = T^{-1}(\theta)` with a bijection onto the support, by the normal quantile function for a box (a
uniform prior is then standard normal in :math:`u`), by ``biject_to`` otherwise. ``"truncate"``: a box is left as it is,
in units in which it reaches from :math:`-\sqrt 3` to :math:`\sqrt 3` (standard deviation 1, if it is filled evenly), and the
family is cut off at its edge.

Local latents in units of the model's own conditional prior, :math:`z = (\theta_j - E[\theta_j]) / sd[\theta_j]`.

A group effect :math:`\theta_j \sim N(\mu, \tau)` shrinks to nothing as :math:`\tau \to 0`; a network would have to follow
that over decades. In these units (the non-centred ones) its prior is standard normal whatever the globals are. The model
says mean and sd: it is run on the globals as far as the local sites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import Transform

from pyro_dgm.amortized.binding import Arguments
from pyro_dgm.amortized.structure import Site, Structure
from pyro_dgm.core import Standardize
from pyro_dgm.core.shapes import of_entries
from pyro_dgm.model.handlers import EndOfRun, run_to_end

__all__ = ["Moments", "PriorUnits", "Units", "box_of"]

Moments = dict[str, tuple[Tensor, Tensor]]


class NormalCdf(Transform):
    r"""The map :math:`u \mapsto a + (b - a)\,\Phi(u)` onto a box."""

    domain = constraints.real
    codomain = constraints.unit_interval
    bijective = True
    sign = +1

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.low, self.width = low, high - low

    def _call(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps
        return self.low + self.width * torch.special.ndtr(x).clamp(eps, 1.0 - eps)

    def _inverse(self, y: Tensor) -> Tensor:
        eps = torch.finfo(y.dtype).eps
        return torch.special.ndtri(((y - self.low) / self.width).clamp(eps, 1.0 - eps))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -0.5 * (x * x + math.log(2.0 * math.pi)) + self.width.log().expand(x.shape)


def box_of(site: Site) -> tuple[Tensor, Tensor] | None:
    """Lower and upper bounds of a site on a box, each of the event's shape; None for other supports."""
    inner = of_entries(site.support)
    if inner is constraints.unit_interval or not hasattr(inner, "upper_bound") or not hasattr(inner, "lower_bound"):
        ends: Any = (0.0, 1.0) if inner is constraints.unit_interval else None
    else:
        ends = (inner.lower_bound, inner.upper_bound)
    if ends is None:
        return None
    like = torch.empty(())  # of the default device and precision, as the guide is made
    low, high = (torch.as_tensor(e).to(like).expand(site.event_shape).clone() for e in ends)
    return low, high


class Units(nn.Module):
    """``{site: value}`` to vectors ``(..., D)`` and back, with log-determinants.

    Args:
        sites: continuous latents with the same plates.
        bounds: ``"map"`` or ``"truncate"``, for boxes.
    """

    low: Tensor
    high: Tensor

    def __init__(self, sites: Sequence[Site], bounds: str) -> None:
        super().__init__()
        self.sites, self.bounds = tuple(sites), bounds
        self.widths = [_unconstrained_width(s) if not self._left_alone(s) else s.width for s in sites]
        self.standard = Standardize(sum(self.widths))
        ends = [self._box(s, w) for s, w in zip(sites, self.widths, strict=True)]
        self.register_buffer("low", torch.cat([a for a, _ in ends]))
        self.register_buffer("high", torch.cat([b for _, b in ends]))
        self._box_units()

    @property
    def features(self) -> int:
        """D."""
        return sum(self.widths)

    @property
    def truncated(self) -> bool:
        """Whether there is a box to be cut off."""
        return any(self._left_alone(s) for s in self.sites)

    def inside(self, u: Tensor) -> Tensor:
        """Whether vectors lie in the box, shape ``(...)``."""
        x = u * self.standard.scale + self.standard.loc
        return ((x > self.low) & (x < self.high)).all(-1)

    def clamp(self, u: Tensor) -> Tensor:
        """The nearest vectors in the box."""
        gap = 1e-6 * (self.high - self.low).nan_to_num(1.0, 1.0)
        x = (u * self.standard.scale + self.standard.loc).clamp(self.low + gap, self.high - gap)
        return self.standard(x)

    def flatten(self, values: dict[str, Tensor], prior: Moments | None = None) -> tuple[Tensor, Tensor]:
        """Values ``(*batch, *event)`` as ``u`` of shape ``(*batch, D)``, and the log-determinant of the map to ``u``.

        ``prior`` holds mean and sd of real sites, in whose units they are seen.
        """
        x, log_det = self._unconstrained(values, prior or {})
        return self.standard(x), log_det - self.standard.scale.log().sum()

    def unflatten(self, u: Tensor, prior: Moments | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The inverse; per site the log-determinant of its part of the map from ``u``, shape ``(*batch)``."""
        x, values, log_dets = u * self.standard.scale + self.standard.loc, {}, {}
        scales = self.standard.scale.log().split(self.widths)
        for site, part, scale in zip(self.sites, x.split(self.widths, -1), scales, strict=True):
            value, log_det = self._to_site(site, part)
            if site.name in (prior or {}):
                value, log_det = _from_prior(site, value, log_det, *prior[site.name])  # type: ignore[index]
            values[site.name], log_dets[site.name] = value, log_det + scale.sum()
        return values, log_dets

    def fit(self, values: dict[str, Tensor], mask: Tensor | None, prior: Moments) -> None:
        """Take mean and standard deviation from simulated values."""
        x, _ = self._unconstrained(values, prior)
        rows = x.reshape(-1, self.features) if mask is None else x[mask.expand(x.shape[:-1])]
        self.standard.fit(rows)
        self._box_units()

    def edges(self) -> tuple[Tensor, Tensor]:
        """Ends of the box in units of u, each ``(D,)``; infinite where there is none. No training moves them."""
        return self.standard(self.low), self.standard(self.high)

    @torch.no_grad()
    def _box_units(self) -> None:
        boxed = self.low.isfinite()
        self.standard.loc[boxed] = 0.5 * (self.low + self.high)[boxed]
        self.standard.scale[boxed] = (self.high - self.low)[boxed] / math.sqrt(12.0)

    def _unconstrained(self, values: dict[str, Tensor], prior: Moments) -> tuple[Tensor, Tensor]:
        parts, total = [], torch.zeros(())
        for site in self.sites:
            value = values[site.name]
            if site.name in prior:
                loc, scale = prior[site.name]
                value, log_det = (value - loc) / scale, _summed(site, -scale.log().expand(value.shape))
                total = total + log_det
            part, log_det = self._from_site(site, value)
            parts.append(part)
            total = total + log_det
        return torch.cat(parts, -1), total

    def _left_alone(self, site: Site) -> bool:
        return self.bounds == "truncate" and box_of(site) is not None

    def _from_site(self, site: Site, value: Tensor) -> tuple[Tensor, Tensor]:
        batch = value.shape[: value.dim() - len(site.event_shape)]
        if self._left_alone(site):
            return value.reshape(*batch, -1), value.new_zeros(batch)
        to_site = _bijection(site, value)
        x = to_site.inv(value)
        log_det = to_site.log_abs_det_jacobian(x, value)
        return x.reshape(*batch, -1), -log_det.reshape(*batch, -1).sum(-1)

    def _to_site(self, site: Site, part: Tensor) -> tuple[Tensor, Tensor]:
        batch = part.shape[:-1]
        if self._left_alone(site):
            low, high = (torch.as_tensor(end).to(part) for end in box_of(site) or ())
            value = part.reshape([*batch, *site.event_shape])
            return torch.clamp(value, low, torch.nextafter(high, low)), part.new_zeros(batch)  # rounding leads outside
        to_site: Any = _bijection(site, part)
        x = part.reshape([*batch, *to_site.inverse_shape(site.event_shape)])
        value = to_site(x)
        return value, to_site.log_abs_det_jacobian(x, value).reshape(*batch, -1).sum(-1)

    def _box(self, site: Site, width: int) -> tuple[Tensor, Tensor]:
        box = box_of(site) if self._left_alone(site) else None
        if box is None:
            return torch.full((width,), -math.inf), torch.full((width,), math.inf)
        return box[0].reshape(-1), box[1].reshape(-1)


def _summed(site: Site, terms: Tensor) -> Tensor:
    return terms.reshape([*terms.shape[: terms.dim() - len(site.event_shape)], -1]).sum(-1)


def _from_prior(site: Site, z: Tensor, log_det: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    value = loc + scale * z
    return value, log_det + _summed(site, scale.log().expand(value.shape))


def _bijection(site: Site, like: Tensor) -> Transform:
    box = box_of(site)
    if box is not None:
        return NormalCdf(box[0].to(like), box[1].to(like))
    return biject_to(site.support)


def _unconstrained_width(site: Site) -> int:
    if box_of(site) is not None:
        return site.width
    return int(torch.Size(biject_to(site.support).inverse_shape(site.event_shape)).numel())


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
        with pyro.validation_enabled(False):
            run_to_end(poutine.condition(seen(model), data=rows), **arguments)

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
