r"""The posterior for given data: draws, densities, a Pyro guide, and for NeuTra a map :math:`z \mapsto \theta` from a base."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_median
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform, biject_to
from torch.distributions.transforms import CatTransform, ComposeTransform, ReshapeTransform

from pyro_dgm.amortized.group import Turn
from pyro_dgm.amortized.refine import Refined, Vectors, refined
from pyro_dgm.amortized.structure import as_drawn
from pyro_dgm.amortized.units import Units
from pyro_dgm.core import compose, zuko
from pyro_dgm.core.devices import seeded
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.pace import few_threads, on_bar
from pyro_dgm.core.shapes import as_shape, as_tensor_like
from pyro_dgm.flows.ensemble import Ensemble
from pyro_dgm.guides.modes import as_pyro
from pyro_dgm.guides.vector import VectorGuide

if TYPE_CHECKING:
    from pyro_dgm.amortized.guide import AmortizedGuide

__all__ = ["ConditionedGuide", "Transport"]


class ConditionedGuide(nn.Module):
    r"""q(latents | data) for one data set, or for many at once; made by :meth:`AmortizedGuide.condition`.

    Called, with any arguments, it is a Pyro guide for one data set: pass it to ``Importance``, ``Predictive`` or
    :func:`~pyro_dgm.from_svi` together with :attr:`model`, the user's model with the data in it.

    Args:
        guide: the amortised guide; parameters are shared with it.
        data: ``{site: value}`` of data and covariates, masks under ``"mask"``; data may have leading dimensions.
        lead: how many leading dimensions there are.

    Example:
        >>> import warnings, torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model(x=None):
        ...     return pyro.sample("x", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=x)
        >>> warnings.simplefilter("ignore")  # it is not trained
        >>> dgm.AmortizedGuide(model, ["x"]).condition(x=torch.tensor(2.0))
        posterior of mu given x ()
    """

    def __init__(self, guide: AmortizedGuide, data: dict[str, Any], lead: int) -> None:
        super().__init__()
        self.guide = guide
        self.data = data
        self.lead = lead

    def __repr__(self) -> str:
        latents = ", ".join(s.name for s in self.guide.structure.latents)
        data = ", ".join(f"{k} {tuple(v.shape)}" for k, v in self.data.items() if isinstance(v, Tensor))
        return f"posterior of {latents} given {data}"

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
        progress: bool = True,
        seed: int | None = None,
    ) -> Refined:
        r"""Draws of this data set's posterior by the model's own density: importance weights, then short Markov chains.

        Sites marked for enumeration are summed out of the density. Discrete latents without that mark need chains that do
        not exist here: then weights only.

        Args:
            num_samples: draws to return.
            proposals: draws of the guide that are weighted; None for four times as many.
            steps: steps of the chains, all draws at once; None for none where k-hat is below 0.5, otherwise 200.
            progress: show a bar, of the weights and of the chains.
            seed: makes it reproducible.

        Returns:
            A :class:`~pyro_dgm.amortized.refine.Refined`: ``refined["theta"]`` or ``refined.draws`` are the draws, beside
            them k-hat, effective number, evidence and its error, and the chains' acceptance.

        Raises:
            ValueError: on many data sets at once, or where the model's density vanishes at all draws.

        Warns:
            UserWarning: where k-hat is 0.7 or more.
        """
        self._refuse_many("refined")
        entries = num_samples * sum(v.numel() for v in self.data.values() if isinstance(v, Tensor))
        with seeded(seed), few_threads(entries), on_bar("weights", progress):
            return refined(self, num_samples, proposals or 4 * num_samples, steps)

    @torch.no_grad()
    @checked(num_samples=1)
    def mode(self, num_samples: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """The latents ``{site: value}`` at which this density is largest (MAP), of one data set.

        The best of so many draws after gradient steps uphill; a mode that no draw is near is not found. It depends on how the
        latents are measured (the mode of a logarithm is elsewhere), and a discrete latent keeps the value of its draw.

        Raises:
            ValueError: on many data sets at once.
        """
        self._refuse_many("asked for its mode")
        with seeded(seed):
            return Vectors(self).mode(num_samples)

    @torch.no_grad()
    @checked(num_samples=2)
    def disagreement(self, num_samples: int = 1000) -> tuple[Tensor, Tensor]:
        """How far the members of an ensemble are from their mixture, nats, and the standard error; each of shape ``(*lead)``.

        The mutual information of a draw and its member, summed over the elements of plates: 0 where all agree, log K for each
        where no two overlap. Large where the simulations say too little of these data.

        Raises:
            ValueError: for a guide that is no ensemble.
        """
        if not any(isinstance(group.family, Ensemble) for group in self.guide.groups):
            raise ValueError(
                "disagreement: the guide is no ensemble. Make it so: AmortizedGuide(model, ..., ensemble=5)."
            )
        draws = self.guide.draw(self.data, self.lead, Size([num_samples]))
        each = self.guide.log_prob(draws, self.data, self.lead, _disagreement)
        return each.mean(0), each.std(0) / num_samples**0.5

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


def _disagreement(turn: Turn) -> Tensor:
    """Of a group's ensemble, for each element of its plates."""
    family: Any = turn.group.family
    if turn.u is None or not isinstance(family, Ensemble):
        return torch.zeros(())
    return turn.present(family.disagreement(turn.context, turn.u))


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
