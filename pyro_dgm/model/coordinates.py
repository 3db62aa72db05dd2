r"""The continuous latents of a model as one vector of real numbers, :math:`\theta = T(u),\ u \in R^D`.

The map of a site leads onto its support. Where that follows other latents, as in ``Uniform(0, top)``, it is the support that the
site has in the run at hand, so the latents before it are known: the model is run, and each site takes its part of the vector.

A site may also be measured in units of its own prior given the latents before it: of ``Normal(mu, tau)`` the coordinate is
:math:`(\theta - \mu) / \tau`, so that a centred model and a non-centred one are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Size, Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform

from pyro_dgm.core.upstream import whole_plates
from pyro_dgm.model.handlers import EndOfRun, run_to_end
from pyro_dgm.model.sites import Site, latent_sites
from pyro_dgm.model.supports import onto, place_of, same_support, unwrapped

__all__ = ["Constrain", "Coordinates", "HasCoordinates", "Latent", "Whole", "as_run", "in_units_of"]


@dataclass(frozen=True)
class Latent:
    """A site in one run.

    Attributes:
        shape: of its value.
        inner: of its value mapped to real numbers.
        inner_dim: how many dimensions of ``inner`` belong to the event.
        fn: its distribution.
        place: where that lives, to be compared with other runs.
    """

    shape: Size
    inner: Size
    inner_dim: int
    fn: Any
    place: Any

    @classmethod
    def of(cls, site: Site) -> Latent:
        fn = site["fn"]
        shape = site["value"].shape
        inner = onto(fn, None).inv(site["value"].detach()).shape
        return cls(shape, inner, fn.event_dim + len(inner) - len(shape), fn, place_of(fn))


@dataclass(frozen=True)
class Coordinates:
    """Sites of a model, in the order of the vector.

    Attributes:
        latents: by name.
        moving: sites whose support follows other latents or parameters.
        relative: sites in units of their own prior given the latents before them; they move, too.
        circular: sites that live on a circle.
        centre: where each circle's coordinate is zero, shape ``(D,)``; None without circles.
        whole: whether subsampled plates are run whole: the latents are then those of all rows.
    """

    latents: dict[str, Latent]
    moving: frozenset[str] = frozenset()
    relative: frozenset[str] = frozenset()
    circular: frozenset[str] = frozenset()
    centre: Tensor | None = None
    whole: bool = False

    @classmethod
    def of(cls, guide: AutoContinuous) -> Coordinates:
        """Those of a guide that was set up, with the supports of its prototype."""
        return cls({k: Latent.of(s) for k, s in latent_sites(guide.prototype_trace)})

    @property
    def dim(self) -> int:
        """D."""
        return sum(latent.inner.numel() for latent in self.latents.values())

    def parts(self, u: Tensor) -> dict[str, Tensor]:
        """Each site's part of vectors ``(*batch, D)``; the batch stands left of the site's plates."""
        sizes = [latent.inner.numel() for latent in self.latents.values()]
        out = {}
        for (name, latent), part in zip(self.latents.items(), u.split(sizes, -1), strict=True):
            shape = torch.broadcast_shapes(latent.inner, u.shape[:-1] + (1,) * latent.inner_dim)
            out[name] = part.reshape(shape)
        return out

    def bijection(self, name: str, fn: Any) -> Transform:
        """The map onto the support that the site has with this distribution, or from this distribution's units."""
        if name in self.relative:
            return in_units_of(fn) or onto(fn, None)
        return onto(fn, self._centre_of(name) if name in self.circular else None)

    def constrain(self, u: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values and log-determinants by site, of entries that are mapped alone; where no support moves."""
        values: dict[str, Tensor] = {}
        log_dets: dict[str, Tensor] = {}
        for name, part in self.parts(u).items():
            to_support = self.bijection(name, self.latents[name].fn)
            values[name] = to_support(part)
            log_dets[name] = _log_det(to_support, part, values[name])
        return values, log_dets

    def vector(self, sites: Iterable[tuple[str, Any, Tensor]], rows: int | None = None) -> Tensor:
        """Values ``(name, distribution, value)`` as vectors ``(rows, D)``; as one vector where no rows are given."""
        found = {name: self.bijection(name, fn).inv(value) for name, fn, value in sites if name in self.latents}
        shape = (-1,) if rows is None else (rows, -1)
        return torch.cat([found[name].reshape(shape) for name in self.latents], -1)

    def refuse_another_support(self, name: str, fn: Any) -> None:
        """The support of a site that does not move is that of the prototype."""
        if name not in self.circular and not same_support(place_of(fn), self.latents[name].place):
            raise ValueError(
                f"The support of latent site '{name}' ({type(fn).__name__}) is not that of the run in which the guide was set "
                "up, so the guide's draws would lie outside. It depends on the arguments, or in rare cases on other latents by "
                "way of Python numbers: build a guide for these arguments, or use tensors."
            )

    def misfit(self, name: str, fn: Any) -> ValueError:
        """Of a site that has another size in this run."""
        here, before = tuple(fn.shape()), tuple(self.latents[name].shape)
        return ValueError(
            f"Latent site '{name}' has shape {here} with these arguments, and {before} in the run in which the guide was set "
            "up. Its vector of latents has a fixed length: build a guide for these data."
        )

    def _centre_of(self, name: str) -> Tensor:
        if self.centre is None:
            raise ValueError(f"Coordinates: site '{name}' is circular and no centre was given.")
        return self.parts(self.centre)[name]


def _log_det(to_support: Transform, x: Tensor, y: Tensor) -> Tensor:
    """Of each entry of an event, where the entries are mapped one by one."""
    while isinstance(to_support, IndependentTransform):
        to_support = to_support.base_transform
    return to_support.log_abs_det_jacobian(x, y)


_LOCATED = tuple(getattr(torch.distributions, k) for k in ("Normal", "StudentT", "Laplace", "Cauchy", "Gumbel"))


def in_units_of(fn: Any) -> Transform | None:
    """The map from the units of a distribution's own location and scale to its values; None where it has no such."""
    inner = unwrapped(fn)
    to_value = _located(inner)
    more = fn.event_dim - inner.event_dim
    return IndependentTransform(to_value, more) if to_value is not None and more else to_value


def _located(fn: Any) -> Transform | None:
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return _Tilted(fn.loc, fn.scale_tril)
    if isinstance(fn, _LOCATED):
        return AffineTransform(fn.loc, fn.scale)
    if isinstance(fn, torch.distributions.LogNormal):
        return ComposeTransform([AffineTransform(fn.loc, fn.scale), *fn.transforms])
    return None


class _Tilted(Transform):
    """``y = L x + m`` for vectors, L lower triangular (that of Pyro has no log-determinant for batches of L)."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__()
        self.loc = loc
        self.scale_tril = scale_tril

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + (self.scale_tril @ x[..., None])[..., 0]

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.scale_tril, (y - self.loc)[..., None], upper=False)[..., 0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1).expand(x.shape[:-1])


@runtime_checkable
class HasCoordinates(Protocol):
    """A guide that keeps its own coordinates: they may move with the latents, or be cut open at a place of the circle."""

    @property
    def coordinates(self) -> Coordinates:
        """As they are now."""


class Constrain(poutine.messenger.Messenger):
    """Gives latents their values from real numbers, each by the support that it has in this run; keeps what was given.

    Args:
        coordinates: of the model.
        u: vectors ``(*batch, D)``.
        stop: end the run after the last latent.
        compare: whether supports that do not move are checked to be those of the prototype; under vmap they cannot be.
    """

    def __init__(self, coordinates: Coordinates, u: Tensor, *, stop: bool = False, compare: bool = True) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.parts = coordinates.parts(u)
        self.stop = stop
        self.compare = compare
        self.values: dict[str, Tensor] = {}
        self.log_dets: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if name not in self.parts or msg["is_observed"]:
            return
        if self.compare and name not in self.coordinates.moving:
            self.coordinates.refuse_another_support(name, msg["fn"])
        to_support = self.coordinates.bijection(name, msg["fn"])
        try:
            value = to_support(self.parts[name])
        except RuntimeError as error:
            raise self.coordinates.misfit(name, msg["fn"]) from error
        self.values[name] = msg["value"] = value
        self.log_dets[name] = _log_det(to_support, self.parts[name], value)
        msg["infer"] = {k: v for k, v in msg["infer"].items() if k != "enumerate"}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if self.stop and len(self.values) == len(self.parts):
            raise EndOfRun

    def run(self, model: Callable[..., Any], args: Any, kwargs: Any) -> Constrain:
        """Run the model as far as its last latent; nothing of it is seen outside."""
        run_to_end(self(model), *args, **kwargs)
        return self


@dataclass(frozen=True)
class Whole:
    """A model whose subsampled plates are run with all of their rows."""

    model: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with whole_plates():
            return self.model(*args, **kwargs)


def as_run(guide: Any, model: Callable[..., Any]) -> Callable[..., Any]:
    """The model that the guide's latents belong to: with all rows of its plates, where the guide holds them."""
    return Whole(model) if isinstance(guide, HasCoordinates) and guide.coordinates.whole else model
