r"""The log joint density of a model as a function of the unconstrained latent vector, for many vectors at once.

.. math:: \log p(x, T(u)) + \log|\det J_T(u)|, \qquad u \in R^D
"""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

from pyro_dgm.core.sites import latent_sites
from pyro_dgm.core.vectorize import NOT_VECTORIZED, log_probs, per_draw, plate_nesting, together, vectorization_fault

__all__ = ["LogJoint"]


class LogJoint:
    """``log_joint(u)``: shape ``(N, D) -> (N,)``, in nats, differentiable; NaN becomes -inf.

    All N vectors run in one outer plate, if a check against single runs allows it; otherwise one by one, with a
    warning.

    Args:
        guide: a guide that was set up (it knows the sites, their order and supports).
        model: the model whose density is asked.
        args, kwargs: the model's arguments.
    """

    def __init__(self, guide: AutoContinuous, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.guide, self.model, self.args, self.kwargs = guide, model, args, kwargs
        self.dim = guide.latent_dim
        known = {k: s["value"] for k, s in latent_sites(guide.prototype_trace)}
        self._shapes = {k: v.shape for k, v in known.items()}
        with pyro.validation_enabled(False), torch.random.fork_rng(devices=[]):
            conditioned = poutine.trace(poutine.condition(model, data=known))
            trace = poutine.block(conditioned.get_trace)(*args, **kwargs)
        self.nesting = plate_nesting(trace)
        self.missing = [n for n, _ in latent_sites(trace)]
        self.vectorized = self._vectorizes()

    def __call__(self, u: Tensor) -> Tensor:
        with pyro.validation_enabled(False), poutine.block():
            value = self._parallel(u) if self.vectorized else torch.stack([self._single(v) for v in u])
        return value.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log joint and its gradient; where either is not finite the value is -inf and the gradient zero."""
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            value = self(u)
            total = torch.where(value.isfinite(), value, torch.zeros_like(value)).sum()
            (grad,) = torch.autograd.grad(total, u)
        inside = value.isfinite() & grad.isfinite().all(-1)
        return torch.where(inside, value, -torch.inf).detach(), torch.where(inside[:, None], grad, 0.0)

    def _parallel(self, u: Tensor) -> Tensor:
        values, log_det = self._constrain(u.reshape(len(u), *(1,) * self.nesting, self.dim))
        run = together(poutine.condition(self.model, data=values), len(u), self.nesting)
        return per_draw([log_det, *log_probs(poutine.trace(run).get_trace(*self.args, **self.kwargs))], len(u))

    def _single(self, u: Tensor) -> Tensor:
        values, log_det = self._constrain(u)
        trace = poutine.trace(poutine.condition(self.model, data=values)).get_trace(*self.args, **self.kwargs)
        return sum((t.sum() for t in log_probs(trace)), log_det)

    def _constrain(self, latent: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Constrained site values, and the log-determinant of each draw (one draw where ``latent`` is a vector)."""
        values, log_det, rows = {}, latent.new_zeros(()), latent.shape[:1] if latent.dim() > 1 else ()
        for site, v in self.guide._unpack_latent(latent):
            to_support = biject_to(site["fn"].support)
            values[site["name"]] = to_support(v)
            terms = to_support.log_abs_det_jacobian(v, values[site["name"]])
            log_det = log_det + terms.reshape(*rows, -1).sum(-1)
        return values, log_det

    def _vectorizes(self) -> bool:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            loc = self.guide._init_loc()
            u = loc + 0.1 * torch.randn(3, self.dim).to(loc)
            values, _ = self._constrain(u.reshape(3, *(1,) * self.nesting, self.dim))
        fault = vectorization_fault(self.model, values, self._shapes, self.nesting, self.args, self.kwargs)
        if fault is not None:
            warnings.warn(NOT_VECTORIZED.format(fault), stacklevel=3)
        return fault is None
