"""The posterior for given data: draws, densities, and a Pyro guide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor, nn

from pyro_dgm.core.random import fork_rng, seeded
from pyro_dgm.guides.amortized.densities import refined
from pyro_dgm.guides.amortized.refined import Refined
from pyro_dgm.guides.amortized.transport import Transport

if TYPE_CHECKING:
    from pyro_dgm.guides.amortized.guide import AmortizedGuide

__all__ = ["ConditionedGuide"]


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
        self.guide, self.data, self.lead = guide, data, lead
        self.model = guide.conditioned_model(data)
        self._masses: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self._refuse_many("called as a guide")
        return self.guide.trace_draws(self.data)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> dict[str, Tensor]:
        """Draws ``{site: (*sample_shape, *lead, *site)}``; never outside a prior's support."""
        draws, unbounded = self.guide.draw(self.data, self.lead, Size(sample_shape)), self.guide.unbounded
        if unbounded is None:
            return draws
        return unbounded.to_sites(draws, self.data, self.lead + len(Size(sample_shape)))

    def log_prob(self, values: dict[str, Tensor]) -> Tensor:
        """Log density (nats) of draws ``{site: (*sample_shape, *lead, *site)}``, shape ``(*sample_shape, *lead)``.

        Where a box was cut off the flow, the error that Monte Carlo leaves in the density's constant is
        :attr:`log_prob_error`; it is the same for all draws of one data set.

        Raises:
            ValueError: for a latent that is missing.
        """
        lead = self._leading(values)
        unbounded: Any = self.guide.unbounded
        log_det: Any = 0.0
        if unbounded is not None:
            values, log_det = unbounded.both(values, self.data, lead)
        missing = [s.name for s in self.guide.structure.latents if s.name not in values]
        if missing:
            raise ValueError(f"log_prob: latent sites {missing} are missing; got {sorted(values)}.")
        return self.guide.score(values, self.data, self.lead, self.masses()[0]) - log_det

    def _leading(self, values: dict[str, Tensor]) -> int:
        """Dimensions of draws and data sets that stand left of the sites."""
        site = next((s for s in self.guide.structure.latents if s.name in values), None)
        return 0 if site is None else values[site.name].dim() - site.depth - len(site.event_shape)

    def masses(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """For each group the share of its flow inside the box, and the error; estimated once."""
        if self._masses is None:
            with fork_rng(0):
                self._masses = self.guide.masses(self.data, self.lead)
        return self._masses

    @property
    def log_prob_error(self) -> Tensor:
        """Standard error of ``log_prob`` common to all draws, in nats, shape ``(*lead,)``; 0 where nothing was cut off."""
        shares, errors = self.masses()
        terms = [(e / s).square() for s, e in zip(shares, errors, strict=True) if s is not None and e is not None]
        return sum(terms, torch.zeros(())).sqrt()

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
        with seeded(seed):
            return refined(self, num_samples, proposals or 4 * num_samples, steps)

    def transport(self) -> Transport:
        """The same posterior as an ``AutoContinuous``, for NUTS in its coordinates.

        ``dgm.neutra(posterior.model, posterior.transport())`` and ``NeuTraReparam(posterior.transport())``. The guide must be
        built with a flow, such as ``family=dgm.NSF``: the default family is no transform of a base.

        Raises:
            ValueError: on many data sets at once; for latents inside plates, discrete ones, a box that is cut off
                (build the guide with ``bounds="map"``), and a family that is no flow.
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
