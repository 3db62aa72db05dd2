r"""The log joint density of a model as a function of the unconstrained latent vector, for many vectors at once.

.. math:: \log p(x, T(u)) + \log|\det J_T(u)|, \qquad u \in R^D
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

from pyro_dgm.core.random import fork_rng
from pyro_dgm.model.sites import is_enumerable, latent_sites
from pyro_dgm.model.vectorize import (
    NOT_VECTORIZED,
    How,
    how_to_vectorize,
    joint_alone,
    joint_in_plate,
    joint_of_rows,
    plate_nesting,
    together,
)

__all__ = ["LogJoint", "prior_draws", "value_and_grad"]


def value_and_grad(log_density: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """A log density of many points and its gradient; where either is not finite the value is -inf and the gradient zero."""
    u = u.detach().requires_grad_()
    with torch.enable_grad():
        value = log_density(u)
        total = torch.where(value.isfinite(), value, torch.zeros_like(value)).sum()
        (grad,) = torch.autograd.grad(total, u)
    inside = value.isfinite() & grad.isfinite().all(-1)
    return torch.where(inside, value, -torch.inf).detach(), torch.where(inside[:, None], grad, 0.0)


class LogJoint:
    """``log_joint(u)``: shape ``(N, D) -> (N,)``, in nats, differentiable; NaN and failed Cholesky factors become -inf.

    All N vectors run in one outer plate or by vmap, as a check against single runs allows; otherwise one by one, with a
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
        with pyro.validation_enabled(False), fork_rng():
            conditioned = poutine.trace(poutine.condition(model, data=known))
            trace = poutine.block(conditioned.get_trace)(*args, **kwargs)
        self.nesting = plate_nesting(trace)
        self.missing = [n for n, s in latent_sites(trace) if not is_enumerable(s)]
        self.how = self._find_how()

    def __call__(self, u: Tensor) -> Tensor:
        with pyro.validation_enabled(False), poutine.block(hide_types=["sample"]):
            value = self._parallel(u) if self.vectorized else torch.stack([self._single(v) for v in u])
        return value.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)

    def at(self, *args: Any, **kwargs: Any) -> LogJoint:
        """The same density, of other data."""
        self.args, self.kwargs = args, kwargs
        return self

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log joint and its gradient; where either is not finite the value is -inf and the gradient zero."""
        return value_and_grad(self, u)

    def _parallel(self, u: Tensor) -> Tensor:
        """All draws in one run; those whose matrices cannot be factorised are found by halving, and get -inf."""
        try:
            return self._together(u)
        except torch.linalg.LinAlgError:
            if len(u) == 1:
                return 0.0 * u.sum(-1) - torch.inf
            return torch.cat([self._parallel(half) for half in u.split(-(-len(u) // 2))])

    @property
    def vectorized(self) -> bool:
        """Whether many vectors run at once."""
        return self.how != "loop"

    def _together(self, u: Tensor) -> Tensor:
        values, log_det = self._constrain(u.reshape(len(u), *(1,) * self.nesting, self.dim))
        if self.how == "vmap":
            rows = {k: v.reshape(len(u), *self._shapes[k]) for k, v in values.items()}
            return log_det + joint_of_rows(self.model, rows, self.args, self.kwargs)
        return log_det + joint_in_plate(self.model, values, len(u), self.nesting, self.args, self.kwargs)

    def _single(self, u: Tensor) -> Tensor:
        try:
            return self._alone(u)
        except torch.linalg.LinAlgError:
            return 0.0 * u.sum() - torch.inf

    def _alone(self, u: Tensor) -> Tensor:
        values, log_det = self._constrain(u)
        return log_det + joint_alone(self.model, values, self.nesting, self.args, self.kwargs)

    def _constrain(self, latent: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Constrained site values, and the log-determinant of each draw (one draw where ``latent`` is a vector)."""
        values, log_det, rows = {}, latent.new_zeros(()), latent.shape[:1] if latent.dim() > 1 else ()
        for site, v in self.guide._unpack_latent(latent):
            to_support = biject_to(site["fn"].support)
            values[site["name"]] = to_support(v)
            terms = to_support.log_abs_det_jacobian(v, values[site["name"]])
            log_det = log_det + terms.reshape(*rows, -1).sum(-1)
        return values, log_det

    def _find_how(self) -> How:
        with fork_rng(0), torch.no_grad():
            loc = self.guide._init_loc()
            u = loc + 0.1 * torch.randn(3, self.dim).to(loc)
            values, _ = self._constrain(u.reshape(3, *(1,) * self.nesting, self.dim))
        how, fault = how_to_vectorize(self.model, values, self._shapes, self.nesting, self.args, self.kwargs)
        if how == "loop":
            warnings.warn(NOT_VECTORIZED.format(fault), stacklevel=3)
        return how


@torch.no_grad()
def prior_draws(log_joint: LogJoint, n: int) -> Tensor:
    """Unconstrained prior draws, shape ``(n, D)``; sites without a sampler draw standard normals."""
    guide, rows = log_joint.guide, []
    with pyro.validation_enabled(False), poutine.block(), _AnySite():
        if log_joint.how == "plate":
            model = together(log_joint.model, n, log_joint.nesting)
            return _packed(poutine.trace(model).get_trace(*log_joint.args, **log_joint.kwargs), guide, n)
        for _ in range(n):
            trace = poutine.trace(log_joint.model).get_trace(*log_joint.args, **log_joint.kwargs)
            rows.append(_packed(trace, guide, 1))
    return torch.cat(rows)


def _packed(trace: poutine.Trace, guide: Any, n: int) -> Tensor:
    sites = [(s["value"], biject_to(s["fn"].support)) for k, s in latent_sites(trace) if k in guide.prototype_trace]
    u = torch.cat([to_support.inv(value).reshape(n, -1) for value, to_support in sites], -1)
    return u.nan_to_num(0.0, 1e3, -1e3)


class _AnySite(poutine.messenger.Messenger):
    """Lets latent sites without a sampler (ImproperUniform) draw standard normals in unconstrained space."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["value"] is None and type(msg["fn"]).__name__ == "ImproperUniform":
            to_support = biject_to(msg["fn"].support)
            msg["value"] = to_support(torch.randn(to_support.inverse_shape(msg["fn"].shape())))
