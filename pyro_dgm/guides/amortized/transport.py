r"""The posterior of one data set as an ``AutoContinuous``: a map :math:`z \mapsto \theta` from a base, as NeuTra asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_median
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to, constraints

from pyro_dgm.core import compose, zuko
from pyro_dgm.guides.amortized.units import Units
from pyro_dgm.guides.autoflow import as_pyro
from pyro_dgm.guides.vector import VectorGuide

if TYPE_CHECKING:
    from pyro_dgm.guides.amortized.posterior import ConditionedGuide

__all__ = ["Transport"]


class Transport(VectorGuide):
    """q(latents | data) over the vector of all latents, each unconstrained by ``biject_to`` of its support.

    Made by :meth:`~pyro_dgm.guides.amortized.posterior.ConditionedGuide.transport`. The parameters are those of the
    amortised guide.

    Args:
        posterior: of one data set, with one flow over continuous latents outside plates, and no box cut off.

    Raises:
        ValueError: for another posterior; it says what is in the way.
    """

    def __init__(self, posterior: ConditionedGuide) -> None:
        _refuse(posterior)
        super().__init__(posterior.model, init_loc_fn=init_to_median)
        self.amortized = posterior.guide
        self._data = posterior.data
        self.setup()
        _refuse_circles(self.coordinates.circular)

    def get_base_dist(self) -> Distribution:
        return as_pyro(self._built().base)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        group, built = self.amortized.groups[0], self._built()
        inner = group.family.bijection(built)
        return compose([built.transform.inv, *([] if inner is None else [inner]), _Unconstrained(group.units)])

    def get_posterior(self, *args: Any, **kwargs: Any) -> Distribution:
        return dist.TransformedDistribution(self.get_base_dist(), [self.get_transform()])

    def _built(self) -> Any:
        group = self.amortized.groups[0]
        context = group.context(self.amortized.streams(self._data, 0), [])
        return group.family.checked_build(context.reshape(context.shape[-1]))


class _Unconstrained(Transform):
    """From the units of a group to the unconstrained values of its sites, side by side."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, units: Units) -> None:
        super().__init__()
        self.units = units

    def _call(self, u: Tensor) -> Tensor:
        return self.call_and_ladj(u)[0]

    def _inverse(self, x: Tensor) -> Tensor:
        values = {}
        for site, part in zip(self.units.sites, x.split(self.units.widths, -1), strict=True):
            to_site: Any = biject_to(site.support)
            values[site.name] = to_site(part.reshape([*x.shape[:-1], *to_site.inverse_shape(site.event_shape)]))
        return self.units.flatten(values)[0]

    def call_and_ladj(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Image and log-determinant."""
        values, log_dets = self.units.unflatten(u)
        parts, total = [], torch.zeros(())
        for site in self.units.sites:
            to_site = biject_to(site.support)
            x = to_site.inv(values[site.name])
            log_det = to_site.log_abs_det_jacobian(x, values[site.name])
            parts.append(x.reshape(*u.shape[:-1], -1))
            total = total + log_dets[site.name] - log_det.reshape(*u.shape[:-1], -1).sum(-1)
        return torch.cat(parts, -1), total

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]


def _refuse(posterior: ConditionedGuide) -> None:
    groups = list(posterior.guide.groups)
    inside = [s.name for g in groups for s in g.sites if g.plates]
    discrete = [s.name for g in groups for s in g.discrete]
    if inside or discrete:
        what = f"latents {inside} lie in plates" if inside else f"latents {discrete} are discrete"
        raise ValueError(
            f"transport: {what}, and NeuTra needs one map from a base to all latents. Start NUTS at draws, "
            "NUTS(posterior.model, init_strategy=init_to_value(values=posterior.sample())), or use AutoFlow with dgm.neutra."
        )
    if len(groups) > 1:
        raise ValueError(
            f"transport: the model falls into parts, {[[s.name for s in g.sites] for g in groups]}, that are independent given "
            "the data, each with a flow of its own. Infer them as models of their own."
        )
    if groups[0].truncated:
        raise ValueError(
            "transport: a prior's box is cut off the flow, which is then no map from a base. Build the guide with "
            "AmortizedGuide(..., bounds='map')."
        )
    if not _is_flow(groups[0]):
        raise ValueError(
            f"transport: {type(groups[0].family).__name__} is no transform of a base. Build the guide with a flow, such as "
            "family=dgm.NSF."
        )


def _refuse_circles(circular: frozenset[str]) -> None:
    if circular:
        raise ValueError(
            f"transport: latent site '{sorted(circular)[0]}' lives on a circle, which has no map from a base. Use AutoFlow with "
            "dgm.neutra, or posterior.refine()."
        )


def _is_flow(group: Any) -> bool:
    built = group.family.build(torch.zeros(group.context_features))
    return isinstance(built, zuko.distributions.NormalizingFlow)
