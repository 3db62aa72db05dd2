"""The model's joint density and the guide's, as functions of one vector of all latents, for many vectors at once."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Size, Tensor

from pyro_dgm.core.devices import device_of
from pyro_dgm.core.warn import warn_user
from pyro_dgm.guides.amortized.refined import Refined, refine
from pyro_dgm.guides.amortized.units import Units
from pyro_dgm.model.layout import left_of_plates
from pyro_dgm.model.vectorize import NOT_VECTORIZED, find_vectorization, joint_alone, joint_in_plate, joint_of_rows

if TYPE_CHECKING:
    from pyro_dgm.guides.amortized.posterior import ConditionedGuide

__all__ = ["Joint", "refined"]

_LIKELY = 0.5  # Pareto k below which weights are all that is needed
_STEPS = 200


def refined(posterior: ConditionedGuide, n: int, proposals: int, steps: int | None) -> Refined:
    """Weights, and chains where the weights ask for them."""
    joint = Joint(posterior)
    error = float(posterior.log_prob_error)
    run = lambda k: refine(joint.sample, joint.log_q, joint.log_p, joint.unpack, n, proposals, k, error)  # noqa: E731
    if joint.discrete or steps is not None:
        return run(0 if joint.discrete else steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = run(0)
    return first if (first.khat < _LIKELY and first.ess > n) or first.ess > 0.98 * proposals else run(_STEPS)


class Joint:
    """Densities over vectors ``(N, D)``: the continuous latents, mapped to all numbers, side by side.

    Args:
        posterior: of one data set.
    """

    def __init__(self, posterior: ConditionedGuide) -> None:
        self.posterior, structure = posterior, posterior.guide.structure
        self.nesting = structure.nesting
        self.sites = structure.latents
        self.discrete = any(s.classes for s in self.sites)
        self.model = posterior.guide.conditioned_model(posterior.data, rewritten=True)
        example = self._drawn(3)
        where = device_of(posterior.guide)
        self.units = {s.name: Units([s], "map").to(where) for s in self.sites if not s.classes}
        self.shapes = {k: v.shape[1:] for k, v in example.items()}
        self.how, fault = find_vectorization(self.model, self._in_plate(example), self.shapes, self.nesting, (), {})
        if self.how == "loop":
            warn_user(NOT_VECTORIZED.format(fault))

    def sample(self, n: int) -> Tensor:
        """Draws of the guide."""
        return self.pack(self._drawn(n))

    @torch.no_grad()
    def _drawn(self, n: int) -> dict[str, Tensor]:
        """Draws of the rewritten model's latents."""
        return self.posterior.guide.draw(self.posterior.data, 0, Size([n]))

    def pack(self, values: dict[str, Tensor]) -> Tensor:
        """Draws ``{site: (N, *site)}`` as vectors."""
        return torch.cat([self._packed(s, values[s.name]) for s in self.sites], -1)

    def unpack(self, u: Tensor) -> dict[str, Tensor]:
        """Vectors as draws."""
        values, unbounded = self._unpacked(u)[0], self.posterior.guide.unbounded
        return values if unbounded is None else unbounded.to_sites(values, self.posterior.data, 1)

    def log_q(self, u: Tensor) -> Tensor:
        """Log density of the guide over vectors, nats."""
        values, log_det = self._unpacked(u)
        with pyro.validation_enabled(False):
            masses = self.posterior.masses()[0]
            return self.posterior.guide.score(values, self.posterior.data, 0, masses).double() + log_det

    def log_p(self, u: Tensor) -> Tensor:
        """Log joint density of the model over vectors, nats; NaN where it has none."""
        values, log_det = self._unpacked(u)
        with pyro.validation_enabled(False), poutine.block():
            return self._joint(values).double() + log_det

    def _joint(self, values: dict[str, Tensor]) -> Tensor:
        model, n = self.model, len(next(iter(values.values())))
        if self.how == "plate":
            return joint_in_plate(model, self._in_plate(values), n, self.nesting, (), {})
        if self.how == "vmap":
            return joint_of_rows(model, values, (), {})
        rows = [{k: v[i] for k, v in values.items()} for i in range(n)]
        return torch.stack([joint_alone(model, row, self.nesting, (), {}) for row in rows])

    def _in_plate(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values with the draws left of all plates: ``(n, 1, .., *plates, *event)``."""
        return {s.name: left_of_plates(values[s.name], len(s.event_shape), self.nesting) for s in self.sites}

    def _packed(self, site: Any, value: Tensor) -> Tensor:
        if site.classes:
            return value.reshape(len(value), -1).to(torch.get_default_dtype())
        return self.units[site.name].flatten({site.name: value})[0].reshape(len(value), -1)

    def _unpacked(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        values, log_det, at = {}, u.new_zeros(len(u), dtype=torch.float64), 0
        for site in self.sites:
            batch = self.shapes[site.name][: site.depth]
            width = batch.numel() * (site.width if site.classes else self.units[site.name].features)
            part, at = u[:, at : at + width].reshape(len(u), *batch, -1), at + width
            if site.classes:
                values[site.name] = part.reshape(len(u), *self.shapes[site.name]).to(site.dtype)
                continue
            value, log_dets = self.units[site.name].unflatten(part)
            values[site.name] = value[site.name]
            log_det = log_det + log_dets[site.name].double().reshape(len(u), -1).sum(-1)
        return values, log_det
