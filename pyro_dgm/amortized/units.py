r"""The units in which a flow works: latents of a group as one vector of real numbers, each support taken care of.

A support is reached by a bijection :math:`\theta = T(x)` from the real numbers: by the normal distribution function for a box
(a uniform prior is then standard normal), by ``biject_to`` otherwise. A family that keeps boxes by itself sees a box
stretched to :math:`(-\sqrt 3, \sqrt 3)`, which has standard deviation 1 if it is filled evenly. Other numbers are
standardised by simulations, :math:`u = (x - m) / s`, long tails compressed before (``core/units.py``).

Before that, real latents inside plates are seen in units of the model's own conditional prior,
:math:`z = (\theta_j - E[\theta_j]) / sd[\theta_j]`. A group effect :math:`\theta_j \sim N(\mu, \tau)` shrinks to nothing as
:math:`\tau \to 0`; a network would have to follow that over decades. In these units (the non-centred ones) its prior is
standard normal whatever the globals are. The model says mean and sd: it is run on the globals as far as the local sites.
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
from pyro_dgm.core.networks import LOG_WIDTHS, broadcast_cat, chosen_place_and_width
from pyro_dgm.core.shapes import is_real, of_entries
from pyro_dgm.model.handlers import EndOfRun, run_to_end

__all__ = ["BesidePrior", "Moments", "PriorUnits", "Units", "per_row"]

Moments = dict[str, tuple[Tensor, Tensor]]

_HALF_WIDTH = math.sqrt(3.0)  # of a box with standard deviation 1
_LEAST_SD = 1e-6  # of a conditional prior; not measured, chosen by hand


class NormalCdf(Transform):
    r"""The map :math:`x \mapsto a + (b - a)\,\Phi(x)` onto a box.

    It stays off the ends of the box, which torch's ``CumulativeDistributionTransform`` reaches from 6 on in float32 and maps
    back to infinity; and it takes values on any device, which an ``AffineTransform`` onto the box does not.
    """

    domain = constraints.real
    codomain = constraints.unit_interval
    bijective = True
    sign = +1

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.low = low
        self.width = high - low

    def _call(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps
        return self.low.to(x) + self.width.to(x) * torch.special.ndtr(x).clamp(eps, 1.0 - eps)

    def _inverse(self, y: Tensor) -> Tensor:
        eps = torch.finfo(y.dtype).eps
        return torch.special.ndtri(((y - self.low.to(y)) / self.width.to(y)).clamp(eps, 1.0 - eps))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.width.to(x).log() - 0.5 * (x * x + math.log(2.0 * math.pi))


class Stretched(Transform):
    r"""The map from :math:`(-\sqrt 3, \sqrt 3)` onto a box; what rounding moves outside is put back."""

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.low = low
        self.highest = torch.nextafter(high, low)
        self.middle = 0.5 * (low + high)
        self.scale = (high - low) / (2.0 * _HALF_WIDTH)

    def _call(self, x: Tensor) -> Tensor:
        return torch.clamp(self.middle.to(x) + self.scale.to(x) * x, self.low.to(x), self.highest.to(x))

    def _inverse(self, y: Tensor) -> Tensor:
        return (y - self.middle.to(y)) / self.scale.to(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale.to(x).log().expand(x.shape)


def _onto(site: Site, keeps_boxes: bool) -> Transform:
    """The map from real numbers onto a site's support, or onto its box from the one that the family keeps."""
    inner: Any = of_entries(site.support)
    if not isinstance(inner, constraints.interval | constraints.half_open_interval):
        return biject_to(site.support)
    like = torch.empty(())  # of the default device and precision, as the guide is made
    low, high = (torch.as_tensor(e).to(like).expand(site.event_shape) for e in (inner.lower_bound, inner.upper_bound))
    return Stretched(low, high) if keeps_boxes else NormalCdf(low, high)


class Units(nn.Module):
    """``{site: value}`` to vectors ``u`` of shape ``(..., D)`` and back, with log-determinants.

    Args:
        sites: continuous latents with the same plates.
        keeps_boxes: whether the family that works in these units keeps boxes by itself.

    Attributes:
        widths: numbers of each site.
        features: D.
    """

    def __init__(self, sites: Sequence[Site], keeps_boxes: bool = False) -> None:
        super().__init__()
        self.sites = tuple(sites)
        self.maps = [_onto(s, keeps_boxes) for s in sites]
        self.widths = [Size(m.inverse_shape(s.event_shape)).numel() for s, m in zip(sites, self.maps, strict=True)]
        self.features = sum(self.widths)
        self.standard = Standardize(self.features)

    def box(self) -> tuple[Tensor, Tensor]:
        """Ends of what the family is to keep, each ``(D,)``; infinite where it has nothing to keep."""
        ends = [_HALF_WIDTH if isinstance(m, Stretched) else math.inf for m in self.maps]
        high = torch.cat([torch.full((n,), end) for n, end in zip(self.widths, ends, strict=True)])
        return -high, high

    def flatten(self, values: Mapping[str, Tensor], prior: Moments | None = None) -> tuple[Tensor, Tensor]:
        """Values ``(*batch, *event)`` as ``u`` of shape ``(*batch, D)``, and the log-determinant of the map to ``u``.

        ``prior`` holds mean and sd of real sites, in whose units they are seen.
        """
        parts: list[Tensor] = []
        total = torch.zeros((), device=self.standard.loc.device)
        for site, onto in zip(self.sites, self.maps, strict=True):
            value = values[site.name]
            if prior and site.name in prior:
                loc, scale = prior[site.name]
                value = (value - loc) / scale
                total = total - _summed(site, scale.log().expand(value.shape))
            batch = value.shape[: value.dim() - len(site.event_shape)]
            x = onto.inv(value)
            total = total - per_row(onto.log_abs_det_jacobian(x, value), len(batch))
            parts.append(x.reshape(*batch, x.shape[len(batch) :].numel()))
        x = torch.cat(parts, -1)
        u = self.standard(x)
        return u, total - self.standard.log_slopes(u).sum(-1)

    def unflatten(self, u: Tensor, prior: Moments | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The inverse; per site the log-determinant of its part of the map from ``u``, shape ``(*batch)``."""
        values: dict[str, Tensor] = {}
        log_dets: dict[str, Tensor] = {}
        parts = self.standard.inverse(u).split(self.widths, -1)
        slopes = self.standard.log_slopes(u).split(self.widths, -1)
        for site, onto, part, slope in zip(self.sites, self.maps, parts, slopes, strict=True):
            x = part.reshape([*u.shape[:-1], *onto.inverse_shape(site.event_shape)])
            value = onto(x)
            log_det = per_row(onto.log_abs_det_jacobian(x, value), u.dim() - 1)
            if prior and site.name in prior:
                loc, scale = prior[site.name]
                value = loc + scale * value
                log_det = log_det + _summed(site, scale.log().expand(value.shape))
            values[site.name] = value
            log_dets[site.name] = log_det + slope.sum(-1)
        return values, log_dets

    @torch.no_grad()
    def fit(self, values: Mapping[str, Tensor], mask: Tensor | None, prior: Moments) -> None:
        """Take units from simulated values; those of a kept box stay what they are."""
        self.standard.forget()
        x, _ = self.flatten(values, prior)
        free = ~self.box()[1].isfinite().to(x.device)
        there = x.new_ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask.expand(x.shape[:-1])
        self.standard.fit(
            x, mask=there.unsqueeze(-1) & free, who=f"AmortizedGuide, latents {[s.name for s in self.sites]}"
        )


def per_row(terms: Tensor, batch: int) -> Tensor:
    """The sum over all but the first ``batch`` dimensions, of no rows too."""
    return terms.reshape(*terms.shape[:batch], terms.shape[batch:].numel()).sum(-1)


def _summed(site: Site, terms: Tensor) -> Tensor:
    """The sum over a site's events."""
    return per_row(terms, terms.dim() - len(site.event_shape))


class PriorUnits:
    """Means and standard deviations of local real latents given the latents outside their plates.

    Args:
        arguments: of the model.
        structure: of the model.
        covariates: inputs that differ between data sets.
    """

    def __init__(self, arguments: Arguments, structure: Structure, covariates: tuple[Site, ...]) -> None:
        self.arguments = arguments
        self.structure = structure
        self.covariates = covariates
        self.latents = {s.name: s for s in structure.latents}
        self.sites = self._usable([s for s in structure.latents if s.plates and not s.classes and is_real(s.support)])

    def of(self, sites: tuple[Site, ...], known: Mapping[str, Tensor], data: Mapping[str, Any]) -> Moments:
        """For sites of one group, given earlier latents laid out as ``(*lead, *plates, *event)``; the same layout."""
        wanted = [s for s in sites if s in self.sites]
        if not wanted or not known:
            return {}
        lead = max((self._lead(k, v) for k, v in known.items()), key=len)
        return self._run(wanted, known, data, lead)

    def _lead(self, name: str, value: Tensor) -> Size:
        plates = value.dim() - len(self.latents[name].event_shape) - self.structure.nesting
        return value.shape[: max(0, plates)]

    def _run(self, wanted: list[Site], known: Mapping[str, Tensor], data: Mapping[str, Any], lead: Size) -> Moments:
        rows = {k: self._rows(k, v, lead) for k, v in known.items()}
        seen = _PriorMoments({s.name for s in wanted})
        self.run(self.arguments.model, rows, data, lead, seen)
        moments = {s.name: [self._laid(m, lead, s) for m in seen.moments[s.name]] for s in wanted}
        return {name: (mean, sd) for name, (mean, sd) in moments.items()}

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
        observed = {s.name for s in self.structure.observed}
        sizes = self.arguments.sized(data, self.structure) if observed <= data.keys() else {}
        out = sizes | {k: v for k, v in data.items() if k in self.arguments.names and k not in observed}
        for site in self.covariates:
            own = site.lead_of(data[site.name])
            value = site.laid(data[site.name], self.structure.nesting, own)
            out[site.name] = value.expand(*lead, *value.shape[own:]).reshape(lead.numel(), *value.shape[own:])
        return out

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
        usable: list[Site] = []
        for site in sites:
            outer = [s for s in self.structure.latents if set(s.plates) < set(site.plates)]
            known = {s.name: s.laid(drawn[s.name], self.structure.nesting, 1) for s in outer}
            if known and self._gives(site, known):
                usable.append(site)
        return usable

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
        self.names = names
        self.moments: Moments = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.names:
            self.moments[msg["name"]] = (msg["fn"].mean, msg["fn"].variance.sqrt().clamp_min(_LEAST_SD))
            if len(self.moments) == len(self.names):
                raise EndOfRun


class BesidePrior(nn.Module):
    r"""What the data alone say of latents inside plates, put beside their prior given the latents outside.

    The data of an element place it at :math:`m \pm w` by a regression; a normal prior :math:`N(a, b)` makes of that, in the
    prior's units and with :math:`v = w / b`,

    .. math:: \frac{(m - a) / b}{1 + v^2} \pm \frac{v}{\sqrt{1 + v^2}}.

    These two are features of the context: a network would have to learn ratios over decades.

    Args:
        sites: real latents of a group.
        features: of the context, without earlier latents.
    """

    slope: Tensor
    offset: Tensor
    log_slope: Tensor
    log_offset: Tensor

    def __init__(self, sites: Sequence[Site], features: int) -> None:
        super().__init__()
        self.sites = tuple(sites)
        width = sum(s.width for s in sites)
        self.features = features
        self.standard = Standardize(width)
        self.register_buffer("slope", torch.zeros(width, features))
        self.register_buffer("offset", torch.zeros(width))
        self.register_buffer("log_slope", torch.zeros(width, features))
        self.register_buffer("log_offset", torch.zeros(width))

    def forward(self, context: Tensor, prior: Moments) -> Tensor:
        """The context with these features on its right."""
        told = context[..., : self.features]
        scale = self.standard.scale
        place = (told @ self.slope.mT + self.offset) * scale + self.standard.loc
        log_width = (told @ self.log_slope.mT + self.log_offset).clamp(*LOG_WIDTHS) + scale.log()
        mean, sd = (torch.cat([self._flat(s, prior[s.name][i]) for s in self.sites], -1) for i in range(2))
        log_ratio = log_width - sd.log()
        left = nn.functional.softplus(2.0 * log_ratio)
        return broadcast_cat(context, (place - mean) / sd * torch.exp(-left), log_ratio - 0.5 * left)

    def _flat(self, site: Site, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[: x.dim() - len(site.event_shape)], site.event_shape.numel())

    def values(self, values: Mapping[str, Tensor]) -> Tensor:
        """Latents as one vector."""
        return torch.cat([self._flat(s, values[s.name]) for s in self.sites], -1)

    @torch.no_grad()
    def fit(self, context: Tensor, x: Tensor, *columns: Tensor) -> None:
        """The regression of latents ``(N, D)`` on contexts ``(N, C)``, of which some are steady, counts and bent."""
        self.standard.fit(x)
        own = [c[: self.features] for c in columns]
        found = chosen_place_and_width(context[:, : self.features], self.standard(x), *own)
        for buffer, new in zip((self.slope, self.offset, self.log_slope, self.log_offset), found, strict=True):
            buffer.copy_(new)
