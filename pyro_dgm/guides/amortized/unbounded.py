r"""Latents whose support follows other latents, for a guide that wants fixed ones: :math:`x = T_{\theta}(u)`, with u learned.

The model is rewritten: a site x on ``Uniform(0, top)`` becomes a latent ``x_unconstrained`` on the real line, with the density
that x gives it, and x a deterministic site. Simulations of the plain model are converted by running it on their values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam.reparam import Reparam
from torch import Size, Tensor
from torch.distributions import Transform

from pyro_dgm.guides.amortized.prior_units import PriorUnits
from pyro_dgm.guides.amortized.structure import Site
from pyro_dgm.model.supports import onto

__all__ = ["Unbounded", "rewritten"]

_NAME = "{}_unconstrained"


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
        prior: knows how the model is run on values that are laid out with leading dimensions.
    """

    def __init__(self, model: Callable[..., Any], names: frozenset[str], prior: PriorUnits) -> None:
        self.model, self.prior = model, prior
        self.names = {name: _NAME.format(name) for name in sorted(names)}
        self.sites = {s.name: s for s in prior.structure.latents}

    def to_real(self, values: Mapping[str, Any], data: Mapping[str, Any], lead: int) -> dict[str, Any]:
        """Values of the plain sites ``(*lead, *site)``, with those on the real line beside them."""
        if all(u in values for u in self.names.values()) or any(x not in values for x in self.names):
            return dict(values)
        found, real = self._seen(values, {}, data, lead), {}
        for x, u in self.names.items():
            value, to_support = found[x]
            real[u] = self._bare(u, to_support.inv(value).nan_to_num(0.0, 15.0, -15.0), values, lead)
        return dict(values) | real

    def to_sites(
        self, values: Mapping[str, Tensor], data: Mapping[str, Any], lead: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Values ``(*lead, *site)`` of the plain model's latents, and the log-determinant of the map to them, ``(*lead)``."""
        real = {x: values[u] for x, u in self.names.items()}
        found, shape = self._seen(values, real, data, lead), self._lead(values, lead)
        kept = {k: v for k, v in values.items() if k not in self.names.values()}
        made = {x: self._bare(u, found[x][0], values, lead) for x, u in self.names.items()}
        rows = [self._log_det(x, real[x], found[x], shape).reshape(*shape, -1).sum(-1) for x in self.names]
        return kept | made, torch.stack(rows).sum(0)

    def placed(self, values: Mapping[str, Tensor], data: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        """Value and log-determinant of each rewritten site, ``(n, *plates, *event)`` and ``(n, *plates)``.

        ``values`` are those of a traced run ``(*particles, *plates, *event)``, with all plates of the model.
        """
        lead = next(v.dim() - self._dims(k) for k, v in values.items())
        shape, nesting = self._lead(values, lead), self.prior.structure.nesting
        found = self._seen(values, {x: values[u] for x, u in self.names.items()}, data, lead, wide=True)
        out = {}
        for x, u in self.names.items():
            log_det = self._log_det(x, values[u], found[x], shape, wide=True)
            out[x] = (found[x][0], log_det.reshape(*log_det.shape[: 1 + nesting], -1).sum(-1))
        return out

    def _dims(self, name: str) -> int:
        return self.prior.structure.nesting + len(self.sites[name].event_shape)

    def _log_det(
        self, x: str, u: Tensor, found: tuple[Tensor, Transform], shape: Size, *, wide: bool = False
    ) -> Tensor:
        real = self._row(self.sites[self.names[x]], u, shape, wide=wide)
        return found[1].log_abs_det_jacobian(real, found[0])

    def _seen(
        self,
        values: Mapping[str, Any],
        real: Mapping[str, Tensor],
        data: Mapping[str, Any],
        lead: int,
        *,
        wide: bool = False,
    ) -> dict[str, tuple[Tensor, Transform]]:
        """Value and map of each rewritten site, in one run of the plain model on all values."""
        shape = self._lead(values, lead)
        sites = {k: s for k, s in self.sites.items() if k not in self.names.values()}
        sites |= {x: self.sites[u] for x, u in self.names.items()}
        plain = {
            k: self._row(s, values[k], shape, wide=wide) for k, s in sites.items() if k not in real and k in values
        }
        seen = _Seen(set(self.names), {x: self._row(sites[x], u, shape, wide=wide) for x, u in real.items()})
        own = self.prior.arguments
        arguments = own.bound(own.args, own.kwargs) | self.prior.inputs(data, shape)
        with pyro.validation_enabled(False), poutine.block(), poutine.condition(data=plain), seen:
            try:
                self.model(**arguments)
            except _AllSeen:
                pass
        return seen.found

    def _lead(self, values: Mapping[str, Any], lead: int) -> Size:
        return next(v.shape[:lead] for k, v in values.items() if k in self.sites or k in self.names)

    def _row(self, site: Site, value: Tensor, shape: Size, *, wide: bool = False) -> Tensor:
        """``(n, 1, .., *plates, *event)``; a wide value has all plates already."""
        pad = () if wide else (1,) * (self.prior.structure.nesting - site.depth)
        return value.reshape(shape.numel(), *pad, *value.shape[len(shape) :])

    def _bare(self, name: str, value: Tensor, values: Mapping[str, Any], lead: int) -> Tensor:
        """A run's value as ``(*lead, *plates, *event)``."""
        event = value.dim() - 1 - self.prior.structure.nesting
        own = value.shape[value.dim() - event - self.sites[name].depth :]
        return value.reshape(*self._lead(values, lead), *own)


class _AllSeen(Exception):
    pass


class _Seen(poutine.messenger.Messenger):
    """Notes value and map of the wanted sites; those of which the real number is known get their value from it."""

    def __init__(self, names: set[str], real: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names, self.real, self.found = names, real, dict[str, tuple[Tensor, Transform]]()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.real:
            msg["value"] = onto(msg["fn"], None)(self.real[msg["name"]])

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.names:
            self.found[msg["name"]] = (msg["value"], onto(msg["fn"], None))
            if len(self.found) == len(self.names):
                raise _AllSeen
