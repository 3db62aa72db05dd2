r"""The ELBO trained with a weight on its KL term, and reported without.

.. math:: E_q[\log p(x \mid z)] - \beta_t\, \max(\mathrm{KL}, \lambda)

The weight acts on the gradient alone: the value is always minus the unweighted ELBO, so losses compare between weights and
with other bounds (a weighted ELBO is no bound for beta < 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.elbo import ELBOModule
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import check_number
from pyro_dgm.core.warn import plain_errors, told_unless_finite, warn_user
from pyro_dgm.model.sites import latent_sites, plate_frames, sample_sites, write_log_probs
from pyro_dgm.objectives.agreement import Pair

__all__ = ["WeightedKL_ELBO"]


class WeightedKL_ELBO(Trace_ELBO):
    r"""Evidence lower bound with a weighted KL term: beta-VAE, KL warm-up and free bits, as a loss in nats.

    The KL of a latent site is in closed form where torch has one (a Gaussian posterior under a Gaussian prior), otherwise
    estimated by the draw. ``WeightedKL_ELBO(...)(model, guide)`` counts its training steps in a buffer, which checkpoints
    keep; when a fit ends before the warm-up does, a warning says so. Not for ``SVI``, which reports and differentiates
    one number: use the module with :func:`~pyro_dgm.fit` or a torch optimiser.

    Args:
        beta: weight of the KL term after the warm-up; above 1 for disentangling (Higgins et al. 2017).
        warmup_steps: training steps over which the weight rises from 0 to ``beta`` (Bowman et al. 2016).
        free_nats: nats per datum below which a latent site's KL, averaged over the batch, is not pushed (Kingma et al.
            2016, arXiv 1606.04934, eq. 15, with one group per site).

    Raises:
        ValueError: for a negative argument.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> vae = dgm.VAE(
        ...     dgm.vae.StandardNormal(1),
        ...     dgm.vae.Conditional(3, 1, dgm.vae.normal),
        ...     dgm.vae.Conditional(1, 3, dgm.vae.normal),
        ... )
        >>> x = torch.randn(10, 3)
        >>> def loss(beta):
        ...     torch.manual_seed(0)
        ...     return WeightedKL_ELBO(beta)(vae.model, vae.guide)(x).item()
        >>> loss(1.0) == loss(4.0)   # what is reported does not depend on the weight
        True
    """

    @checked()
    def __init__(self, beta: float = 1.0, *, warmup_steps: int = 0, free_nats: float = 0.0) -> None:
        check_number("WeightedKL_ELBO", "beta", beta, least=0)
        check_number("WeightedKL_ELBO", "warmup_steps", warmup_steps, least=0, whole=True)
        check_number("WeightedKL_ELBO", "free_nats", free_nats, least=0)
        super().__init__()
        self.beta = beta
        self.warmup_steps = warmup_steps
        self.free_nats = free_nats

    @checked()
    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> ELBOModule:
        return _WeightedModule(model, guide, self)

    @plain_errors()
    def terms(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Tensor, list[tuple[Tensor, float]]]:
        """The expected log likelihood, and for each latent site its KL (both scaled) with the rows that it stands for."""
        pair = Pair.of(model, guide, args, kwargs)
        guide_trace = pair.trace(guide)
        model_trace = pair.trace(poutine.replay(model, trace=guide_trace))
        model_trace, guide_trace = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
        write_log_probs(model_trace)
        write_log_probs(guide_trace)
        kls = [_kl(_of_model(k, model_trace), s) for k, s in latent_sites(guide_trace)]
        observed = [s["log_prob_sum"] for _, s in sample_sites(model_trace) if s["is_observed"]]
        return sum(observed, torch.zeros(())), kls


class _WeightedModule(ELBOModule):
    """The bound of one pair, which counts the steps of its warm-up."""

    steps: Tensor

    def __init__(self, model: Any, guide: Any, elbo: WeightedKL_ELBO) -> None:
        super().__init__(model, guide, elbo)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def weight(self) -> float:
        """The present weight of the KL term."""
        warm = self.elbo.warmup_steps
        return self.elbo.beta * (min(1.0, int(self.steps) / warm) if warm else 1.0)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        likelihood, kls = self.elbo.terms(self.model, self.guide, args, kwargs)
        total = sum((kl for kl, _ in kls), torch.zeros(()))
        pushed = sum((kl.clamp(min=self.elbo.free_nats * rows) for kl, rows in kls), torch.zeros(()))
        trained = likelihood - self.weight() * pushed
        reported = likelihood - total
        if torch.is_grad_enabled():
            self.steps += 1
        return told_unless_finite("WeightedKL_ELBO", -(trained + (reported - trained).detach()))

    def finish(self, *args: Any, **kwargs: Any) -> None:
        """Say, once a fit has ended, that the weight never reached its value."""
        if 0 < int(self.steps) < self.elbo.warmup_steps:
            warn_user(
                f"WeightedKL_ELBO: training ended after {int(self.steps)} of {self.elbo.warmup_steps} warm-up steps, with "
                f"a KL weight of {self.weight():.2f} instead of {self.elbo.beta:g}: the posterior is not fitted to the "
                "ELBO. Train longer, or shorten warmup_steps."
            )


def _of_model(name: str, trace: poutine.Trace) -> Any:
    """The model's site of that name; autoguides sample others, of which the KL is not known site by site."""
    if name not in trace.nodes:
        raise ValueError(
            f"WeightedKL_ELBO: guide site '{name}' is no latent of the model. It needs a guide that samples the model's latents "
            "themselves, as that of a VAE; use STL_ELBO or Trace_ELBO for autoguides."
        )
    return trace.nodes[name]


def _kl(prior: Any, posterior: Any) -> tuple[Tensor, float]:
    """KL of one latent site, scaled as its terms of the ELBO are, and the (scaled) number of rows."""
    try:
        kl = kl_divergence(posterior["fn"], prior["fn"])
    except NotImplementedError:
        kl = None
    rows = float(math.prod(frame.full_size or frame.size for frame in plate_frames(posterior)))
    if kl is None or posterior["mask"] is not None or not isinstance(posterior["scale"], float | int):
        return posterior["log_prob_sum"] - prior["log_prob_sum"], rows
    return posterior["scale"] * kl.sum(), rows
