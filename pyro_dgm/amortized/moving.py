r"""Latents whose support moves with other latents, :math:`x = T_{\theta}(u)`: an amortised guide learns the real number u.

The model is rewritten: a site x on ``Uniform(0, top)`` becomes a latent ``x_unconstrained`` on the real line, with the density
that x gives it, and x a deterministic site. Simulations of the plain model are converted by running it on their values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam.reparam import Reparam
from torch import Size, Tensor

from pyro_dgm.amortized.units import PriorUnits, per_row
from pyro_dgm.model.handlers import EndOfRun
from pyro_dgm.model.sites import left_of_plates
from pyro_dgm.model.supports import onto

__all__ = ["Unbounded", "rewritten"]

_NAME = "{}_unconstrained"
_END = 15.0  # the real number of a value that rounding has put on an end of its support; not measured, chosen by hand


class _OnRealNumbers(Reparam):
    """Samples the unconstrained value, and computes the site from it."""

    def apply(self, msg: Any) -> Any:
        fn, name = msg["fn"], msg["name"]
        to_support = onto(fn, None)
        given = None if msg["value"] is None else to_support.inv(msg["value"])
        base = dist.TransformedDistribution(fn, [to_support.inv])
        u = pyro.sample(_NAME.format(name), base, obs=given if msg["is_observed"] else None)
        value = to_support(u)
        return {"fn": dist.Delta(value, event_dim=fn.event_dim).mask(False), "value": value, "is_observed": True}


def rewritten(model: Callable[..., Any], names: frozenset[str]) -> Callable[..., Any]:
    """The model with these sites on the real line."""
    config = {name: _OnRealNumbers() for name in names}

    @functools.wraps(model.forward if isinstance(model, torch.nn.Module) else model)
    def run(*args: Any, **kwargs: Any) -> Any:
        with poutine.reparam(config=config):
            return model(*args, **kwargs)

    return run


class Unbounded:
    """Between the sites of the plain model and those of the rewritten one.

    Args:
        model: the plain model.
        names: of the sites that were rewritten.
        prior: knows how a model is run on values that are laid out with leading dimensions.
    """

    def __init__(self, model: Callable[..., Any], names: frozenset[str], prior: PriorUnits) -> None:
        self.model = model
        self.prior = prior
        self.names = {name: _NAME.format(name) for name in sorted(names)}

    def to_real(self, values: Mapping[str, Any], data: Mapping[str, Any], lead: int) -> dict[str, Any]:
        """Values of the plain sites ``(*lead, *site)``, with those on the real line beside them."""
        if all(u in values for u in self.names.values()):
            return dict(values)
        return self.both(values, data, lead)[0]

    def to_sites(self, values: Mapping[str, Tensor], data: Mapping[str, Any], lead: int) -> dict[str, Tensor]:
        """Values ``(*lead, *site)`` of the plain model's latents, from those of the rewritten one."""
        both = self.both(values, data, lead)[0]
        return {k: v for k, v in both.items() if k not in self.names.values()}

    def both(
        self, values: Mapping[str, Any], data: Mapping[str, Any], lead: int
    ) -> tuple[dict[str, Any], Tensor | float]:
        """Latents of both models, from those of either, and the log-determinant of the map to the plain ones, ``(*lead)``.

        Values that lack a site come back as they are.
        """
        if any(x not in values and u not in values for x, u in self.names.items()):
            return dict(values), 0.0
        shape = self._lead(values, lead)
        found = self._found(values, data, lead)
        made = {x: self._bare(x, found[x].value, shape) for x in self.names}
        made |= {u: self._bare(x, found[x].real, shape) for x, u in self.names.items()}
        log_dets = (f.log_det.reshape(*shape, f.log_det.shape[1:].numel()) for f in found.values())
        return dict(values) | made, sum(each.sum(-1) for each in log_dets)

    def placed(self, values: Mapping[str, Tensor], data: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        """Value and log-determinant of each rewritten site, ``(n, *plates, *event)`` and ``(n, *plates)``.

        ``values`` are those of a traced run ``(*particles, *plates, *event)``, with all plates of the model.
        """
        nesting = self.prior.structure.nesting
        lead = next(v.dim() - nesting - len(self.prior.latents[k].event_shape) for k, v in values.items())
        return {x: (f.value, f.log_det) for x, f in self._found(values, data, lead).items()}

    def _found(self, values: Mapping[str, Any], data: Mapping[str, Any], lead: int) -> dict[str, _MovingSite]:
        """Each rewritten site, in one run of the plain model on all values; a real number counts before the site's value."""
        real = {x: self._row(u, values[u], lead) for x, u in self.names.items() if u in values}
        plain = self.names.keys() | (self.prior.latents.keys() - self.names.values())
        given = {k: self._row(k, v, lead) for k, v in values.items() if k in plain and k not in real}
        note = _NoteMovingSites(set(self.names), real, 1 + self.prior.structure.nesting)
        self.prior.run(self.model, given, data, self._lead(values, lead), note)
        return note.found

    def _lead(self, values: Mapping[str, Any], lead: int) -> Size:
        return next(v.shape[:lead] for k, v in values.items() if k in self.prior.latents or k in self.names)

    def _row(self, name: str, value: Tensor, lead: int) -> Tensor:
        """``(n, 1, .., *plates, *event)``, of a value that may have all plates already."""
        event_dim = (
            value.dim() - lead - self._depth(name) if name in self.names else len(self.prior.latents[name].event_shape)
        )
        rows = value.reshape(value.shape[:lead].numel(), *value.shape[lead:])
        return left_of_plates(rows, event_dim, self.prior.structure.nesting)

    def _bare(self, name: str, value: Tensor, shape: Size) -> Tensor:
        """A run's value as ``(*lead, *plates, *event)``."""
        plates_end = 1 + self.prior.structure.nesting
        return value.reshape(*shape, *value.shape[plates_end - self._depth(name) :])

    def _depth(self, name: str) -> int:
        return self.prior.latents[self.names.get(name, name)].depth


class _MovingSite(NamedTuple):
    """A site in a run of the plain model: its real number, its value, and the log-determinant between them."""

    real: Tensor  # (n, *plates, *event)
    value: Tensor
    log_det: Tensor  # (n, *plates)


class _NoteMovingSites(poutine.messenger.Messenger):
    """Notes the wanted sites; those of which the real number is known get their value from it."""

    def __init__(self, names: set[str], real: Mapping[str, Tensor], batch: int) -> None:
        super().__init__()
        self.names = names
        self.real = real
        self.batch = batch
        self.found: dict[str, _MovingSite] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.real:
            msg["value"] = onto(msg["fn"], None)(self.real[msg["name"]])

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.names:
            self.found[msg["name"]] = self._noted(msg)
            if len(self.found) == len(self.names):
                raise EndOfRun

    def _noted(self, msg: dict[str, Any]) -> _MovingSite:
        to_support = onto(msg["fn"], None)
        value = msg["value"]
        real = self.real.get(msg["name"])
        if real is None:
            real = to_support.inv(value).nan_to_num(0.0, _END, -_END)
        log_det = to_support.log_abs_det_jacobian(real, to_support(real))
        return _MovingSite(real, value, per_row(log_det, self.batch))
