r"""The variational autoencoder: a model :math:`p(z)\,p(x \mid z)` and a guide :math:`q(z \mid x)` of three families.

.. math:: \log p(x) \ge E_{q(z|x)}\big[\log p(x \mid z) + \log p(z) - \log q(z \mid x)\big]

(Ruthotto & Haber 2021, section 4; Kingma & Welling 2014, arXiv 1312.6114.) Below the pair stands what its parts must agree on.
"""

from __future__ import annotations

import itertools
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution

from pyro_dgm.core import DistributionModule, LearnedDistribution, Standardize, broadcast_cat
from pyro_dgm.core.data import reads, was_trained
from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.networks import refuse_batch_norm
from pyro_dgm.core.shapes import as_tensor_like, check_value_shape, reference
from pyro_dgm.core.warn import listed, warn_user
from pyro_dgm.vae.conditional import (
    Conditional,
    cut,
    drawn_or,
    refuse_context,
    refuse_data,
    refuse_mismatch,
    refuse_width_of_posterior,
)
from pyro_dgm.vae.likelihoods import refuse_outside

__all__ = ["VAE", "as_data", "mean_of", "plate", "prior_given", "register"]

_DRAWS = 32  # behind a mean that has no closed form; not measured, chosen by hand
_ACTIVE_VARIANCE = 0.01  # of E[z|x] over the data: Burda et al. (2016), section 5.2
_COLLAPSED_SHARE = 0.1  # a fit that ends with fewer active units is warned about; not measured, chosen by hand
_COLLAPSE_DRAWS = 16  # of each row's latent; not measured, chosen by hand
_COLLAPSE_ROWS = (10, 1000)  # rows that the warning needs, and at most looks at; not measured, chosen by hand


class VAE(nn.Module):
    r"""A model/guide pair made of a prior, a likelihood and a posterior, for anything in Pyro that takes such a pair.

    ``model(x, context, mask)`` samples ``z ~ prior(context)`` and observes ``x ~ likelihood([z, context])`` in a plate
    ``data`` over the rows; ``guide`` with the same arguments samples ``z ~ posterior([x, mask, context])``. Without ``x``
    the model simulates ``rows`` rows. Both are modules, so ``Trace_ELBO()(vae.model, vae.guide)``, ``SVI``,
    ``Predictive``, ``NUTS`` and :func:`~pyro_dgm.fit` take them as they are.

    Args:
        prior: a family over the latent, with the context's features, or without a context. Its size is the latent's: too few
            costs nats, too many hardly any, so compare ``evaluate.evidence_bound`` of new rows over sizes.
        likelihood: a family over ``x`` whose context is the (flat) latent, followed by the context if there is one.
        posterior: a family over the latent whose context is the flat ``x``, followed by the mask (1 = seen) and by the
            context where these are used.
        size: rows of the whole data set, which scales a minibatch's terms to it; needed beside global latents. None
            counts each call's rows once.

    Raises:
        ValueError: where the families do not fit each other, the networks hold batch normalisation (it makes rows
            depend on each other), or ``x``, ``context`` and ``mask`` do not fit the families.

    Note:
        ``fit`` takes the units of what the encoder reads, of the context, and of the data under ``vae.normal`` (of logarithms
        under ``vae.log_normal``) from the data (:meth:`standardize` before a loop of your own): an unscaled table is scored in
        its own units, exactly. Other likelihoods of real numbers are read in the data's units, so scale the data for them.

        With a mask, entries that were not seen may hold anything, NaN as well: the encoder gets
        zeros there, and the likelihood skips them. A row without any seen entry is fine: its evidence is one.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> vae = dgm.VAE(
        ...     prior=dgm.vae.StandardNormal(2),
        ...     likelihood=dgm.vae.Conditional(5, 2, dgm.vae.normal, shared=("log_scale",)),
        ...     posterior=dgm.vae.Conditional(2, 5, dgm.vae.normal),
        ... )
        >>> x = torch.randn(100, 5)
        >>> history = dgm.fit(dgm.STL_ELBO(1)(vae.model, vae.guide), x, max_steps=20, batch_size=25, progress=False)
        >>> vae.generate(3).shape, vae.embed(x).shape
        (torch.Size([3, 5]), torch.Size([100, 2]))
    """

    @checked()
    def __init__(
        self,
        prior: DistributionModule,
        likelihood: DistributionModule,
        posterior: DistributionModule,
        *,
        size: int | None = None,
    ) -> None:
        super().__init__()
        refuse_mismatch(prior, likelihood, posterior)
        for family in (prior, likelihood, posterior):
            refuse_batch_norm(f"VAE: {type(family).__name__}", family)
        self.model = Decoder(prior, likelihood, size)
        self.guide = Encoder(posterior, likelihood.event_shape, size, self.model.extra)

    @property
    def prior(self) -> DistributionModule:
        """The family of the latent."""
        return self.model.prior

    @property
    def likelihood(self) -> DistributionModule:
        """The family of the data given the latent."""
        return self.model.likelihood

    @property
    def posterior(self) -> DistributionModule:
        """The family of the latent given the data."""
        return self.guide.posterior

    def standardize(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> VAE:
        """Fix all units to data ``(N, *event)``, which ``fit`` does by itself; returns the VAE."""
        x, context, mask = as_data(self.likelihood, self.likelihood.event_shape, x, context, mask)
        self.guide.take_units(x, context, mask)
        self.model.take_units(x, context, mask)
        return self

    def encode(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> LearnedDistribution:
        """The posterior :math:`q(z|x)`, batch shape ``(N,)``."""
        return self.posterior(self.guide.inputs(x, context, mask))

    def decode(self, z: Tensor, context: Tensor | None = None) -> LearnedDistribution:
        """The distribution of data for latents of shape ``(*batch, *latent)``."""
        return self.likelihood(self.model.inputs(z, context))

    @torch.no_grad()
    def generate(self, rows: int = 1, context: Tensor | None = None) -> Tensor:
        """Draws of data, shape ``(rows, *event)``; with a context one row for each of its rows."""
        context = _context(self.prior, context)
        n = rows if context is None else len(torch.atleast_2d(context))
        z = prior_given(self.prior, context).expand(Size([n])).sample()
        return self.decode(z, context).sample()

    @torch.no_grad()
    def embed(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, draws: int = _DRAWS
    ) -> Tensor:
        """The posterior mean of each row, shape ``(N, *latent)``; without a closed form the mean of seeded draws."""
        return mean_of(self.encode(x, context, mask), draws)

    def log_joint(self, x: Tensor, z: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        r""":math:`\log p(x, z)` of each row, in nats; latents of shape ``(*batch, N, *latent)`` give ``(*batch, N)``."""
        x, context, mask = as_data(self.likelihood, self.likelihood.event_shape, x, context, mask)
        likelihood, x = self.model.observation(x, z, context, mask)
        return prior_given(self.prior, context).log_prob(z) + likelihood.log_prob(x)


class Decoder(nn.Module):
    """The Pyro model of a VAE; see :class:`VAE` for its arguments."""

    def __init__(self, prior: DistributionModule, likelihood: DistributionModule, size: int | None) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood
        self.size = size

    @property
    def extra(self) -> int:
        """Length of the context, which the likelihood reads behind the latent."""
        return self.likelihood.context_features - self.prior.features

    def forward(
        self, x: Tensor | None = None, context: Tensor | None = None, mask: Tensor | None = None, rows: int = 1
    ) -> Tensor:
        if x is not None:
            x, context, mask = as_data(self.likelihood, self.likelihood.event_shape, x, context, mask)
            reads(self, x, context, mask)
        register("prior", self.prior)
        register("likelihood", self.likelihood)
        n = next((len(t) for t in (x, context) if t is not None), rows)
        with self.likelihood.holding(self.likelihood.sampled_weights()), plate(n, self.size):
            z = pyro.sample("z", prior_given(self.prior, context))
            if x is None:
                return pyro.sample("x", self.likelihood(self.inputs(z, context)))
            likelihood, x = self.observation(x, z, context, mask)
            return pyro.sample("x", likelihood, obs=x)

    def has_units(self) -> bool:
        """Whether units were taken before, or the networks were trained without."""
        units: list[Standardize | None] = [self.likelihood.event_units()]
        units += [f.context_units for f in (self.likelihood, self.prior) if f.context_features]
        return any(u is not None and u.known for u in units) or was_trained(self.likelihood)

    @torch.no_grad()
    def take_units(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Fix the units of the data and of the context; the latent beside it has none."""
        if isinstance(self.likelihood, Conditional):
            self.likelihood.fit_events(x, mask)
        elif mask is None:
            self.likelihood.fit_events(x)
        if context is None or len(context) < 2:
            return
        latents = context.new_zeros(len(context), self.likelihood.context_features - context.shape[-1])
        rows = torch.cat([latents, context], -1)
        is_context = torch.arange(rows.shape[-1], device=rows.device) >= rows.shape[-1] - context.shape[-1]
        self.likelihood.context_units.fit(rows, mask=is_context, who="VAE, context")
        if self.prior.context_features:
            self.prior.context_units.fit(context, who="VAE, context")

    def inputs(self, z: Tensor, context: Tensor | None) -> Tensor:
        """The likelihood's context: the flat latent and the context."""
        z = as_tensor_like("VAE", "latent", z, reference(self.likelihood))
        check_value_shape("VAE, latent", z, self.prior.event_shape)
        context = _context(self.likelihood, context)
        refuse_context(self.extra, self.prior.features, context)
        return broadcast_cat(_flat(z, self.prior.event_shape), context)

    def observation(
        self, x: Tensor, z: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[TorchDistribution, Tensor]:
        """The distribution of x, without its unseen entries, and x with something valid in their place."""
        inputs = self.inputs(z, context)
        if mask is not None:
            return self._masked(x, inputs, mask)
        likelihood = self.likelihood(inputs)
        return likelihood, refuse_outside(likelihood, x, few=True)

    def _masked(self, x: Tensor, inputs: Tensor, mask: Tensor) -> tuple[TorchDistribution, Tensor]:
        """Unseen entries get a draw, which lies in the support, and the mask takes them out of the score."""
        if not isinstance(self.likelihood, Conditional):
            raise ValueError(
                f"VAE: a mask needs a likelihood with independent entries, and {type(self.likelihood).__name__} is "
                "joint. Use vae.Conditional as the likelihood."
            )
        entries = self.likelihood.entries(inputs)
        with torch.no_grad():
            drawn = drawn_or(x, entries).to(x.dtype).reshape(-1, *x.shape)[0]  # of the first particle
        filled = refuse_outside(entries, torch.where(mask, x, drawn))
        return entries.mask(mask).to_event(len(self.likelihood.event_shape)), filled


class Encoder(nn.Module):
    """The Pyro guide of a VAE; see :class:`VAE` for its arguments."""

    def __init__(self, posterior: DistributionModule, event_shape: Size, size: int | None, extra: int) -> None:
        super().__init__()
        self.posterior = posterior
        self.event_shape = event_shape
        self.size = size
        self.extra = extra  # length of the context

    def forward(
        self, x: Tensor | None = None, context: Tensor | None = None, mask: Tensor | None = None, rows: int = 1
    ) -> Tensor:
        if x is None:
            raise ValueError("VAE.guide: it needs the data x; to draw from the prior run Predictive without the guide.")
        inputs = self.inputs(x, context, mask)
        register("posterior", self.posterior)
        with plate(len(x), self.size):
            return pyro.sample("z", self.posterior(inputs))

    def has_units(self) -> bool:
        """Whether units were taken before, or the networks were trained without."""
        return self.posterior.has_units()

    @torch.no_grad()
    def take_units(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Fix the units of what the encoder reads: seen entries and the context; a mask stays 0 and 1."""
        seen = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        rows = [_flat(part, self.event_shape).to(x) for part in (x, mask) if part is not None]
        there = [_flat(seen, self.event_shape)]
        there += [] if mask is None else [torch.zeros_like(there[0])]
        there += [] if context is None else [torch.ones_like(context, dtype=torch.bool)]
        inputs = self._joined(rows, context)
        units = self.posterior.context_units
        units.fit(inputs, mask=torch.cat(there, -1), who="VAE")
        if len(self.event_shape) > 1:
            units.share(x[seen], self.event_shape.numel())

    def _middle(self, x: Tensor) -> Tensor:
        """Entries that are 0 in the encoder's units."""
        middle = self.posterior.context_units.middle()[: self.event_shape.numel()]
        return middle.to(x).reshape(self.event_shape)

    def inputs(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """The encoder's input: the flat data with its middle where nothing was seen, the mask, the context."""
        x, context, mask = as_data(self.posterior, self.event_shape, x, context, mask)
        reads(self, x, context, mask)
        seen = x if mask is None else torch.where(mask, x, self._middle(x))
        parts = [_flat(part, self.event_shape).to(x.dtype) for part in (seen, mask) if part is not None]
        return self._joined(parts, context)

    def _joined(self, parts: list[Tensor], context: Tensor | None) -> Tensor:
        """The posterior's context: the flat data, maybe their mask, maybe a context."""
        refuse_context(self.extra, self.posterior.features, context)
        inputs = broadcast_cat(*parts, context)
        refuse_width_of_posterior(self.posterior, inputs, parts, context)
        return inputs

    @torch.no_grad()
    def finish(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, rows: int = 1) -> None:
        """Warn, once a fit has ended, of columns never seen, and where the posterior does not depend on the data (collapse)."""
        x, context, mask = as_data(self.posterior, self.event_shape, x, context, mask)
        if mask is not None:
            self._tell_of_unseen(mask)
        if len(x) < _COLLAPSE_ROWS[0]:
            return
        few = slice(_COLLAPSE_ROWS[1])
        q = self.posterior(self.inputs(x[few], cut(context, few), cut(mask, few)))
        z = _flat(q.sample((_COLLAPSE_DRAWS,)), self.posterior.event_shape)
        between = z.mean(0).var(0) - z.var(0).mean(0) / len(z)  # the draws' own noise is taken off
        active = int((between > _ACTIVE_VARIANCE).sum())
        if active <= _COLLAPSED_SHARE * z.shape[-1]:
            warn_user(
                f"VAE: posterior collapse: {active} of {z.shape[-1]} latent units vary with the data (variance of "
                f"E[z|x] over the data above {_ACTIVE_VARIANCE}). Warm the KL term up "
                "(WeightedKL_ELBO(warmup_steps=...)), give it free bits, or take a weaker decoder."
            )

    def _tell_of_unseen(self, mask: Tensor) -> None:
        """Columns without a seen entry, in these rows and in those that gave the units."""
        units, seen = self.posterior.context_units, _flat(mask, self.event_shape).any(0)
        unknown = ((units.loc == 0) & (units.scale == 1))[: len(seen)].to(seen.device)
        never = (unknown & ~seen).nonzero().flatten().tolist()
        if never:
            warn_user(
                f"VAE: column {listed(never)} was seen in no row. No entry trains it, so what is drawn or imputed "
                "there says nothing. Leave such a column out, or bring rows in which it was seen."
            )


def prior_given(prior: DistributionModule, context: Tensor | None) -> Distribution:
    """The prior for a context, which an unconditional one does not take."""
    return prior(context if prior.context_features else None)


def mean_of(q: Distribution, draws: int = _DRAWS) -> Tensor:
    """The mean of a distribution; without a closed form that of draws, which come from a seed of their own."""
    try:
        return q.mean
    except NotImplementedError:
        with fork_rng(0):
            return q.sample(Size([draws])).mean(0)


def _flat(x: Tensor, event_shape: Size) -> Tensor:
    """Events as vectors; scalars as vectors of one number."""
    return x.flatten(-len(event_shape)) if event_shape else x.unsqueeze(-1)


def plate(rows: int, size: int | None) -> pyro.plate:
    """The plate of the data: these rows, as a part of ``size`` rows where a size is given."""
    if not rows:
        raise ValueError("VAE: no rows, expected one or more: a loss or a trace of nothing is not defined.")
    if size is None or size == rows:
        return pyro.plate("data", rows, dim=-1)
    if size < rows:
        raise ValueError(
            f"VAE: got {rows} rows, more than size={size}, the rows of all data. Build the VAE with size={rows}."
        )
    return pyro.plate("data", size, subsample=torch.arange(rows), dim=-1)


_count = itertools.count()
_numbers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # families that have gone into Pyro's store


def register(role: str, family: nn.Module) -> None:
    """Put the parameters into Pyro's store, for ``SVI``; refuse a store that holds others under these names.

    Each family has a number in its names, so that several VAEs do not meet. Parameters that are frozen for the moment
    are left out.
    """
    name = f"vae.{role}{_number(family)}"
    for key, value in family.named_parameters():
        if value.requires_grad and pyro.param(f"{name}$$${key}", value, event_dim=value.dim()) is not value:
            raise ValueError(
                f"VAE: the param store holds another tensor under '{name}$$${key}', read from a file or left by an "
                "earlier model, which would be trained instead. Call pyro.clear_param_store(); to save and load a VAE use "
                "its state_dict."
            )


def _number(family: nn.Module) -> int:
    if family not in _numbers:
        _numbers[family] = next(_count)
    return _numbers[family]


def as_data(
    family: DistributionModule, event_shape: Size, x: Tensor, context: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Data, context and mask as tensors of a family's kind, or an error that says what does not fit."""
    x, context = as_tensor_like("VAE", "x", x, reference(family)), _context(family, context)
    mask = None if mask is None else as_tensor_like("VAE", "mask", mask, None)
    refuse_data(event_shape, x, context, mask)
    return x, context, mask


def _context(family: DistributionModule, context: Tensor | None) -> Tensor | None:
    return None if context is None else as_tensor_like("VAE", "context", context, reference(family))
