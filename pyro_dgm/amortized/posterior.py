r"""The posterior for given data: draws, densities, a Pyro guide, and for NeuTra a map :math:`z \mapsto \theta` from a base.

Of a latent whose support moves with other latents, :math:`x = T_{\theta}(u)`, the guide learns the real number u. The model is
rewritten: a site x on ``Uniform(0, top)`` becomes a latent ``x_unconstrained`` on the real line, with the density that x gives
it, and x a deterministic site. Simulations of the plain model are converted by running it on their values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_median
from pyro.infer.reparam.reparam import Reparam
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform, biject_to
from torch.distributions.transforms import CatTransform, ComposeTransform, ReshapeTransform

from pyro_dgm.amortized.refine import Refined, refined
from pyro_dgm.amortized.structure import as_drawn
from pyro_dgm.amortized.units import PriorUnits, Units, per_row
from pyro_dgm.core import compose, zuko
from pyro_dgm.core.devices import seeded
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.pace import few_threads
from pyro_dgm.core.shapes import as_shape, as_tensor_like
from pyro_dgm.guides.modes import as_pyro
from pyro_dgm.guides.vector import VectorGuide
from pyro_dgm.model.handlers import EndOfRun
from pyro_dgm.model.sites import left_of_plates
from pyro_dgm.model.supports import onto

if TYPE_CHECKING:
    from pyro_dgm.amortized.guide import AmortizedGuide

__all__ = ["ConditionedGuide", "Transport", "Unbounded", "rewritten"]

_NAME = "{}_unconstrained"
_END = 15.0  # the real number of a value that rounding has put on an end of its support; not measured, chosen by hand


class ConditionedGuide(nn.Module):
    r"""q(latents | data) for one data set, or for many at once; made by :meth:`AmortizedGuide.condition`.

    Called, with any arguments, it is a Pyro guide for one data set: pass it to ``Importance``, ``Predictive`` or
    :func:`~pyro_dgm.from_svi` together with :attr:`model`, the user's model with the data in it.

    Args:
        guide: the amortised guide; parameters are shared with it.
        data: ``{site: value}`` of data and covariates, masks under ``"mask"``; data may have leading dimensions.
        lead: how many leading dimensions there are.
    """

    def __init__(self, guide: AmortizedGuide, data: dict[str, Any], lead: int) -> None:
        super().__init__()
        self.guide = guide
        self.data = data
        self.lead = lead

    @cached_property
    def model(self) -> Callable[..., Any]:
        """The user's model with the data in it."""
        return self.guide.conditioned_model(self.data)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self._refuse_many("called as a guide")
        return self.guide.sample_sites(self.data)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> dict[str, Tensor]:
        """Draws ``{site: (*sample_shape, *lead, *site)}``; never outside a prior's support."""
        shape = as_shape(sample_shape, "sample_shape", least=0)
        draws = self.guide.draw(self.data, self.lead, shape)
        if self.guide.unbounded is None:
            return draws
        return self.guide.unbounded.to_sites(draws, self.data, self.lead + len(shape))

    @checked()
    def log_prob(self, values: dict[str, Tensor]) -> Tensor:
        """Log density (nats) of draws ``{site: (*sample_shape, *lead, *site)}``, shape ``(*sample_shape, *lead)``.

        Raises:
            ValueError: for a latent that is missing.
        """
        values = as_drawn(self.guide.structure.latents, values, self.guide)
        values = {k: as_tensor_like("log_prob", f"'{k}'", v, None) for k, v in values.items()}
        log_det: Tensor | float = 0.0
        if self.guide.unbounded is not None:
            values, log_det = self.guide.unbounded.both(values, self.data, self.guide.leading(values))
        missing = [s.name for s in self.guide.structure.latents if s.name not in values]
        if missing:
            raise ValueError(f"log_prob: latent sites {missing} are missing; got {sorted(values)}.")
        leads = {s.name: tuple(values[s.name].shape[: s.lead_of(values[s.name])]) for s in self.guide.structure.latents}
        if len(set(leads.values())) > 1:
            raise ValueError(f"log_prob: the values' leading dimensions are {leads}, expected the same of all latents.")
        return self.guide.log_prob(values, self.data, self.lead) - log_det

    @checked(num_samples=1, proposals=1, steps=0)
    def refine(
        self,
        num_samples: int = 1000,
        *,
        proposals: int | None = None,
        steps: int | None = None,
        seed: int | None = None,
    ) -> Refined:
        r"""Draws of this data set's posterior by the model's own density: importance weights, then short Markov chains.

        Sites marked for enumeration are summed out of the density. Discrete latents without that mark need chains that do
        not exist here: then weights only.

        Args:
            num_samples: draws to return.
            proposals: draws of the guide that are weighted; None for four times as many.
            steps: steps of the chains, all draws at once; None for none where k-hat is below 0.5, otherwise 200.
            seed: makes it reproducible.

        Returns:
            Draws with k-hat, effective number, evidence and its error, and the chains' acceptance.

        Raises:
            ValueError: on many data sets at once, or where the model's density vanishes at all draws.

        Warns:
            UserWarning: where k-hat is 0.7 or more.
        """
        self._refuse_many("refined")
        entries = num_samples * sum(v.numel() for v in self.data.values() if isinstance(v, Tensor))
        with seeded(seed), few_threads(entries):
            return refined(self, num_samples, proposals or 4 * num_samples, steps)

    def transport(self) -> Transport:
        """The same posterior as an ``AutoContinuous``, for NUTS in its coordinates.

        ``dgm.neutra(posterior.model, posterior.transport())`` and ``NeuTraReparam(posterior.transport())``. The guide must be
        built with a flow, such as ``family=dgm.NSF``: the default family is no transform of a base.

        Raises:
            ValueError: on many data sets at once; for latents inside plates, discrete ones, and a family that is no flow.
        """
        self._refuse_many("asked for its transport")
        return Transport(self)

    def _refuse_many(self, what: str) -> None:
        if self.lead:
            site = self.guide.structure.observed[0].name
            raise ValueError(
                f"posterior: {what}, but it was conditioned on many data sets at once ('{site}' has shape "
                f"{tuple(self.data[site].shape)}). Condition on one data set, without the leading dimension."
            )


class Transport(VectorGuide):
    """q(latents | data) over the vector of all latents, each unconstrained by ``biject_to`` of its support.

    Made by :meth:`~pyro_dgm.amortized.posterior.ConditionedGuide.transport`. The parameters are those of the
    amortised guide.

    Args:
        posterior: of one data set, with one flow over continuous latents outside plates.

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
        return as_pyro(_built(self.amortized, self._data).base)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        group, built = self.amortized.groups[0], _built(self.amortized, self._data)
        inner = group.family.bijection(built)
        return compose([built.transform.inv, *([] if inner is None else [inner]), _unconstrained(group.units)])

    def get_posterior(self, *args: Any, **kwargs: Any) -> Distribution:
        return dist.TransformedDistribution(self.get_base_dist(), [self.get_transform()])


def _unconstrained(units: Units) -> Transform:
    """From the units of a group to the unconstrained values of its sites, side by side."""
    parts: list[Transform] = []
    for site, put in zip(units.sites, units.maps, strict=True):
        back = biject_to(site.support).inv
        inner = Size(put.inverse_shape(site.event_shape))
        outer = Size(back.forward_shape(site.event_shape))
        flat = [ReshapeTransform(Size([inner.numel()]), inner), ReshapeTransform(outer, Size([outer.numel()]))]
        parts.append(ComposeTransform([flat[0], put, back, flat[1]]))
    return compose([units.standard.transform(), CatTransform(parts, -1, units.widths)])


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
    if not isinstance(_built(posterior.guide, posterior.data), zuko.distributions.NormalizingFlow):
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


def _built(guide: AmortizedGuide, data: dict[str, Any]) -> Any:
    """What the family of the only group builds for these data."""
    group = guide.groups[0]
    context = group.context(guide.streams(data, 0), [])
    return group.family.checked_build(context.reshape(context.shape[-1]))


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
