r"""What the weights cannot see: whether MCMC leaves the guide's draws where they are, and whether other modes exist.

Short Hamiltonian chains start at draws of the guide, in the guide's own coordinates :math:`\theta = T(z)`. If q is the
posterior, their law does not change. Apart from that, draws of the prior climb, and a valley of a nat between where they
arrive and the guide's best draw is another mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor
from torch.distributions.transforms import IndependentTransform, Transform

from pyro_dgm.core import frozen
from pyro_dgm.core.basins import barrier, other_basins
from pyro_dgm.core.log_joint import LogJoint, prior_draws
from pyro_dgm.core.module import forward_and_ladj
from pyro_dgm.core.vectorize import Model
from pyro_dgm.diagnostics.khat import Exploration

__all__ = ["explore", "joint"]

Target = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # z -> log density, its gradient, theta


def explore(model: Model, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any], chains: int = 512) -> Exploration:
    """Look around the guide's draws; a guide or model for which that cannot be done in one batch is left alone.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> guide = dgm.AutoFlow(model, init_loc_fn=pyro.infer.autoguide.init_to_mean, init_scale=0.3)
        >>> guide.setup().get_posterior().event_shape
        torch.Size([1])
        >>> explore(model, guide, (), {}).moved  # a guide that is too narrow
        True
    """
    if not isinstance(guide, AutoContinuous):
        return Exploration()
    with frozen(*guide.parameters()):
        log_joint = LogJoint(guide, model, args, kwargs)
        if log_joint.missing or not log_joint.vectorized:
            return Exploration()
        u = guide.get_posterior(*args, **kwargs).sample((chains,)).detach()
        try:
            transform = joint(guide.get_transform(*args, **kwargs))
        except NotImplementedError:  # a mixture is no transform: no chains, and valleys are looked for in theta
            return Exploration(other_modes=_other_modes(log_joint, lambda x: x, log_joint, u))
        target = _pulled_back(log_joint, transform)
        found = _other_modes(log_joint, transform.inv, lambda z: target(z)[0], u)
        return Exploration(*_drift(target, transform.inv(u).detach(), u), found)


def joint(transform: Transform) -> Transform:
    """The transform with one log-determinant for the whole vector (elementwise ones give one per entry)."""
    return IndependentTransform(transform, 1) if transform.domain.event_dim == 0 else transform


def _drift(target: Target, z: Tensor, u: Tensor) -> tuple[float, float, float]:
    end, acceptance = _chains(target, z)
    low, centre, high = u.quantile(u.new_tensor([0.16, 0.5, 0.84]), 0)
    reach = 1.5 * (high - low)  # three robust sds: the sd of a heavy tail is too noisy to compare
    start, end = (x.clamp(centre - reach, centre + reach) for x in (u, end))
    shift = (end.mean(0) - start.mean(0)) / start.std(0)
    return float(shift.abs().max()), float((end.std(0) / start.std(0)).log().abs().max()), acceptance


def _pulled_back(log_joint: LogJoint, transform: Any) -> Target:
    """The log density of z, its gradient and theta = T(z); where either is not finite, -inf and 0."""

    def target(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            u, ladj = forward_and_ladj(transform, z)
            value = log_joint(u) + ladj
            (grad,) = torch.autograd.grad(torch.where(value.isfinite(), value, 0.0).sum(), z)
        inside = value.isfinite() & grad.isfinite().all(-1)
        return torch.where(inside, value, -math.inf).detach(), torch.where(inside[:, None], grad, 0.0), u.detach()

    return target


@torch.no_grad()
def _chains(target: Target, z: Tensor, iterations: int = 12, leapfrogs: int = 8) -> tuple[Tensor, float]:
    """The chains' last theta, and their acceptance; the step size follows the acceptance of the batch."""
    step, shares = 0.5 * z.shape[-1] ** -0.25, []
    value, grad, u = target(z)
    for _ in range(iterations):
        p = torch.randn_like(z)
        new, new_p, (new_value, new_grad, new_u) = _leapfrog(target, z, p, grad, step, leapfrogs)
        gain = (new_value - value + 0.5 * (p.square() - new_p.square()).sum(-1)).nan_to_num(-math.inf)
        taken = (torch.rand_like(gain).log() < gain)[:, None]
        z, u, grad = torch.where(taken, new, z), torch.where(taken, new_u, u), torch.where(taken, new_grad, grad)
        value = torch.where(taken[:, 0], new_value, value)
        shares.append(float(gain.clamp_max(0.0).exp().mean()))
        step *= 1.15 if shares[-1] > 0.8 else 0.7 if shares[-1] < 0.6 else 1.0
    return u, sum(shares[iterations // 2 :]) / (iterations - iterations // 2)


def _leapfrog(target: Target, z: Tensor, p: Tensor, grad: Tensor, step: float, n: int) -> Any:
    for _ in range(n):
        p = p + 0.5 * step * grad
        z = z + step * p
        value, grad, u = target(z)
        p = p + 0.5 * step * grad
    return z, p, (value, grad, u)


def _other_modes(log_joint: LogJoint, to_z: Any, density: Any, u: Tensor) -> int:
    """Other basins, as dense as the guide's draws, with a valley between them and the nearest draws.

    Valleys are looked for on straight lines of z, where a funnel that the guide follows is straight.
    """
    value = log_joint(u).detach()
    prior = prior_draws(log_joint, 256)
    spread = (prior.quantile(0.84, 0) - prior.quantile(0.16, 0)).div(2).clamp(1e-3, 1e3)
    ends = other_basins(log_joint, u[value.argmax()], prior, spread)
    dense = [end for end in ends if float(log_joint(end[None])) > float(value.median()) - 6.0]
    return sum(_apart(density, to_z(end[None])[0], to_z(u), end, u) for end in dense)


def _apart(density: Any, z_end: Tensor, z: Tensor, end: Tensor, u: Tensor) -> bool:
    near = ((u - end) / u.std(0)).square().sum(-1).argsort()[:8]
    return all(barrier(density, z_end, z[i]) > 1.0 for i in near)
