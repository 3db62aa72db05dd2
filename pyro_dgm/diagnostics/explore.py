r"""What the weights cannot see: whether MCMC leaves the guide's draws where they are, and whether other modes exist.

Short Hamiltonian chains start at draws of the guide, in the guide's own coordinates :math:`\theta = T(z)`. If q is the
posterior, their distribution does not change. Apart from that, draws of the prior climb; where they arrive is another mode if
a valley of a nat separates it from the guide's best draw.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor
from torch.distributions import Transform

from pyro_dgm.core import frozen
from pyro_dgm.core.module import whole_event
from pyro_dgm.diagnostics.khat import Exploration
from pyro_dgm.model.log_joint import Density, LogJoint, pulled_back, uncovered, value_and_grad
from pyro_dgm.model.vectorize import How, Model

__all__ = ["explore"]

_CHAINS = 512  # their noise is 0.12 to 0.16 sd in the largest drift of a coordinate
_ITERATIONS = (
    12  # with 8 leapfrog steps each they left 33 of 34 bad fits and 1 of 71 good ones, in a CPU second (6 at most)
)
_LEAPFROGS = 8
_ROUNDS = 20  # runs of the model for one density, of which there are some 160. Not measured; chosen by hand
_ROBUST_SDS = 1.5  # of the 68 % interval: three sds. Not measured; chosen by hand


def explore(
    model: Model, guide: Model, args: tuple[Any, ...], kwargs: dict[str, Any], how: How | None = None
) -> Exploration:
    """Look around the guide's draws; where that cannot be done in one batch, the result says why.

    A subsampled plate is visited whole at every step: the chains need one fixed density. ``how`` many draws of the model run
    is asked where it is not given.

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
        return Exploration(unseen="the guide has no vector of all latents")
    with frozen(*guide.parameters()):
        log_joint = LogJoint(guide, model, args, kwargs, whole=True, how=how)
        unseen = _reason_not_to(log_joint)
        if unseen:
            return Exploration(unseen=unseen)
        u = guide.get_posterior(*args, **kwargs).sample((_CHAINS,)).detach()
        try:
            transform = whole_event(guide.get_transform(*args, **kwargs), 1)
        except NotImplementedError:  # a mixture is no transform: no chains, and valleys are looked for in theta
            return Exploration(other_modes=len(uncovered(log_joint, u, lambda x: x, log_joint)))
        density = pulled_back(log_joint, transform)
        # valleys are looked for in z, where funnels are straight
        found = len(uncovered(log_joint, u, transform.inv, lambda z: value_and_grad(density, z)[0]))
        drift, drift_sd, acceptance = _drift(density, transform, u)
        return Exploration(drift, drift_sd, acceptance, found)


def _reason_not_to(log_joint: LogJoint) -> str:
    if log_joint.missing:
        return f"latent site '{log_joint.missing[0]}' is not in the guide"
    if not log_joint.vectorized:
        return "the model runs one draw at a time"
    if log_joint.rounds > _ROUNDS:
        return f"a pass over the subsampled plate takes {log_joint.rounds} runs of the model"
    return ""


def _drift(density: Density, transform: Transform, u: Tensor) -> tuple[float, float, float]:
    """Largest changes of a mean, in sd, and of a log sd, from the draws u to where chains end; and their acceptance."""
    z, acceptance = _run_chains(density, transform.inv(u).detach())
    low, centre, high = u.quantile(u.new_tensor([0.16, 0.5, 0.84]), 0)
    reach = _ROBUST_SDS * (high - low)  # the sd of a heavy tail is too noisy to compare
    start, end = (x.clamp(centre - reach, centre + reach) for x in (u, transform(z).detach()))
    shift = (end.mean(0) - start.mean(0)) / start.std(0)
    return float(shift.abs().max()), float((end.std(0) / start.std(0)).log().abs().max()), acceptance


@torch.no_grad()
def _run_chains(density: Density, z: Tensor) -> tuple[Tensor, float]:
    """The chains' last z, and their acceptance in the second half; the step size follows that of the batch."""
    step = 0.5 * z.shape[-1] ** -0.25
    shares = []
    value, grad = value_and_grad(density, z)
    for _ in range(_ITERATIONS):
        p = torch.randn_like(z)
        new, new_p, new_value, new_grad = _leapfrog(density, z, p, grad, step)
        gain = (new_value - value + 0.5 * (p.square() - new_p.square()).sum(-1)).nan_to_num(-math.inf)
        taken = torch.rand_like(gain).log() < gain
        z = torch.where(taken[:, None], new, z)
        grad = torch.where(taken[:, None], new_grad, grad)
        value = torch.where(taken, new_value, value)
        shares.append(float(gain.clamp_max(0.0).exp().mean()))
        if shares[-1] > 0.8:
            step *= 1.15
        elif shares[-1] < 0.6:
            step *= 0.7
    half = shares[_ITERATIONS // 2 :]
    return z, sum(half) / len(half)


def _leapfrog(
    density: Density, z: Tensor, p: Tensor, grad: Tensor, step: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Place, momentum, log density and gradient at the end of a trajectory."""
    value = grad.new_zeros(len(z))
    for _ in range(_LEAPFROGS):
        p = p + 0.5 * step * grad
        z = z + step * p
        value, grad = value_and_grad(density, z)
        p = p + 0.5 * step * grad
    return z, p, value, grad
