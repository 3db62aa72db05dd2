"""What guides over one vector of all continuous latents share: how they read a model, and how they hand out draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous, prototype_hide_fn
from torch import Tensor
from torch.distributions import biject_to

from pyro_dgm.core.random import fork_rng
from pyro_dgm.model.sites import is_enumerable, latent_sites, refuse_implicit

__all__ = ["VectorGuide"]


def _hidden(site: dict[str, Any]) -> bool:
    """What the guide leaves to the model: data, subsamples and sites that are summed out."""
    return prototype_hide_fn(site) or is_enumerable(site)


class VectorGuide(AutoContinuous):
    """Abstract: an :class:`~pyro.infer.autoguide.AutoContinuous` whose ``get_posterior`` is one law over the latent vector."""

    _prototype_hide_fn = staticmethod(_hidden)

    def __init__(self, model: Callable[..., Any], *, init_loc_fn: Callable[..., Tensor]) -> None:
        super().__init__(model, init_loc_fn=_or_zero(init_loc_fn))

    def setup(self, *args: Any, **kwargs: Any) -> Any:
        """Read the model's structure and create all parameters, without a training step; returns the guide."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with fork_rng():
            _refuse_unfit_sites(type(self).__name__, self.model, args, kwargs)
            super()._setup_prototype(*args, **kwargs)
            with poutine.block():  # a plate's index is a sample site of its own
                self._create_plates(*args, **kwargs)

    @torch.no_grad()
    def draws(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Independent posterior draws of every latent, shape ``(num_samples, *site)``, in one pass."""
        self.setup(*args, **kwargs)
        return self.constrained(self.get_posterior(*args, **kwargs).sample((num_samples,)))

    def constrained(self, latent: Tensor) -> dict[str, Tensor]:
        """Site values ``(S, *site)`` of unconstrained latent vectors ``(S, D)``."""
        num_samples = len(latent)
        nesting = max((-f.dim for f in self._prototype_frames.values()), default=0)
        latent = latent.reshape(num_samples, *(1,) * nesting, -1)
        values = {s["name"]: biject_to(s["fn"].support)(u) for s, u in self._unpack_latent(latent)}
        return {k: v.reshape(num_samples, *self.prototype_trace.nodes[k]["value"].shape) for k, v in values.items()}

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Elementwise posterior medians, from 10,000 draws with a fixed seed, in the constrained space."""
        return {k: v[0] for k, v in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Elementwise posterior quantiles, shape ``(len(quantiles), *site)``, from 10,000 draws with a fixed seed.

        The Monte-Carlo error of a median is about 0.0125 posterior standard deviations. Elementwise medians of a
        simplex need not sum to one.
        """
        with fork_rng(0):
            draws = self.draws(10_000, *args, **kwargs)
        return {k: torch.quantile(v, torch.as_tensor(quantiles).to(v), dim=0) for k, v in draws.items()}


def _refuse_unfit_sites(who: str, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    trace = poutine.block(poutine.trace(model).get_trace)(*args, **kwargs)
    refuse_implicit(who, trace)
    for name, site in latent_sites(trace):
        if is_enumerable(site):
            continue
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"{who}: site '{name}' is discrete ({type(site['fn']).__name__}); its posterior is continuous. "
                "Have it summed out: infer={'enumerate': 'parallel'}, or pyro.infer.config_enumerate(model)."
            )
        _refuse_without_bijection(who, name, site["fn"])
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"{who}: latent site '{name}' lies in plate '{frame.name}', which is subsampled "
                    f"({frame.size} of {frame.full_size}). One law over all latents cannot follow a subsample: use "
                    "the full plate, or an amortised guide for the local latents."
                )


def _refuse_without_bijection(who: str, name: str, fn: Any) -> None:
    try:
        biject_to(fn.support)
    except NotImplementedError as error:
        raise ValueError(
            f"{who}: the support of site '{name}' ({type(fn).__name__}: {fn.support}) has no bijection from the real "
            "numbers. Register one with torch.distributions.biject_to, or write the site as a transform of another."
        ) from error


def _or_zero(init_loc_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same initialisation; sites that cannot be sampled (ImproperUniform) start at 0 of the unconstrained space."""

    def init(site: dict[str, Any]) -> Tensor:
        try:
            return init_loc_fn(site)
        except NotImplementedError:
            fn, to_support = site["fn"], biject_to(site["fn"].support)
            return to_support(torch.zeros(to_support.inverse_shape(fn.shape())))

    return init
