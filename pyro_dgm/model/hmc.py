r"""Many short Hamiltonian chains at once, and how far they leave a guide where weights of many latents say too little.

A gap of :math:`\mathrm{KL}(q\|p)` that is spread over hundreds of latents makes importance weights useless and is in none of
them to be seen. Chains that start at draws of q stay where q is right. They are compared with q in every latent, and in the
directions in which the score says that q is most wrong: with :math:`r = \nabla\log p - \nabla\log q` those of the mean
:math:`E_q r` and of the extreme eigenvectors of :math:`E_q[r z^\top]`, which for Gaussians is :math:`I - \Sigma_p^{-1}`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_dgm.model.log_joint import Density, PulledBack, derived, pulled_back, value_and_grad

__all__ = [
    "Chains",
    "Clamped",
    "Moved",
    "Steps",
    "deviation",
    "leap",
    "near_in_each",
    "opposite",
    "share_of",
    "trajectories",
]

_LENGTH = 0.5 * math.pi  # of a trajectory: a quarter of a normal's period, after which places are as good as new
_LEAPFROGS = 8  # at most
_ROBUST_SDS = 1.5  # of the 68 % interval: three sds. Not measured; chosen by hand

# Of the long chains. Logistic regressions of D = 30, 100, 300 whose Gaussians are right deviate by .04 to .09, mostly by chance.
_CHAINS = 512  # in pairs of opposite starts and momenta
_FORGOTTEN, _ITERATIONS = 6, 18
_DRAWS = 4096  # of q, which places are compared with
_SCORED = 1024  # of these, by which directions are found
_STALE = 0.3  # correlation of a coordinate with where its chain began, above which the chains have not moved enough
_GAP_A_LATENT = 0.01  # nats; above it chains are not asked. Chosen by hand


class Moved(NamedTuple):
    """Places of all chains ``(C, D)`` after an iteration, and the share of proposals that were accepted."""

    z: Tensor
    share: float


@torch.no_grad()
def opposite(base: Density, z: Tensor) -> Tensor:
    """Half of the draws z of a base, and their opposites where it is symmetric; all of them where it is not."""
    half = z[: len(z) // 2]
    symmetric = torch.allclose(base(half), base(-half), atol=1e-3)
    return torch.cat([half, -half]) if symmetric else z


@torch.no_grad()
def trajectories(density: Density, z: Tensor) -> Iterator[Moved]:
    """Iterations of chains that start at ``z (C, D)``, C even, for ever; the second half has the opposite momenta."""
    steps = Steps(z.shape[-1])
    value, grad = value_and_grad(density, z)
    while True:
        z, value, grad, share = _iterated(density, z, value, grad, steps.size)
        steps.adapt(share)
        yield Moved(z, share)


class Steps:
    """The size of leapfrog steps for so many dimensions, which follows the share of accepted proposals."""

    def __init__(self, dim: int) -> None:
        self.size = 0.5 * dim**-0.25

    def adapt(self, share: float) -> None:
        """After a proposal of all chains."""
        self.size *= 1.15 if share > 0.8 else 0.7 if share < 0.6 else 1.0


def _iterated(
    density: Density, z: Tensor, value: Tensor, grad: Tensor, step: float
) -> tuple[Tensor, Tensor, Tensor, float]:
    n = len(z) // 2
    p = torch.randn_like(z[:n])
    p = torch.cat([p, -p])
    new, new_value, new_grad, gain = leap(density, z, p, value, grad, step)
    taken = torch.rand_like(gain[:n]).log().repeat(2) < gain
    z = torch.where(taken[:, None], new, z)
    grad = torch.where(taken[:, None], new_grad, grad)
    return z, torch.where(taken, new_value, value), grad, share_of(gain)


def leap(
    density: Density, z: Tensor, p: Tensor, value: Tensor, grad: Tensor, step: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Place, log density and gradient at the end of trajectories, and the log ratios by which the ends are accepted."""
    before = value - 0.5 * p.square().sum(-1)
    for _ in range(min(_LEAPFROGS, max(2, round(_LENGTH / step)))):
        p = p + 0.5 * step * grad
        z = z + step * p
        value, grad = value_and_grad(density, z)
        p = p + 0.5 * step * grad
    return z, value, grad, (value - 0.5 * p.square().sum(-1) - before).nan_to_num(-math.inf)


def share_of(gain: Tensor) -> float:
    """The expected share of accepted proposals."""
    return float(gain.clamp_max(0.0).exp().mean())


@dataclass
class Chains:
    """Where the chains are, ``(n, D)``, and the model's log density there."""

    u: Tensor
    log_p: Tensor

    def accept(self, u: Tensor, log_p: Tensor, log_ratio: Tensor) -> Tensor:
        """Metropolis: move where a uniform number is below the ratio; returns where."""
        take = torch.rand_like(log_ratio).log() < log_ratio
        self.u = torch.where(take.unsqueeze(-1), u, self.u)
        self.log_p = torch.where(take, log_p, self.log_p)
        return take


class Clamped(NamedTuple):
    """Draws ``(n, D)`` within three robust sds of their medians: the sd of a heavy tail is too noisy to compare."""

    low: Tensor
    high: Tensor
    draws: Tensor

    @classmethod
    def of(cls, draws: Tensor) -> Clamped:
        low, centre, high = draws.quantile(draws.new_tensor([0.16, 0.5, 0.84]), 0)
        reach = _ROBUST_SDS * (high - low)
        return cls(centre - reach, centre + reach, draws.clamp(centre - reach, centre + reach))

    def clamp(self, places: Tensor) -> Tensor:
        """Places of chains within the same bounds."""
        return places.clamp(self.low, self.high)

    def changes(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """By how many sds the mean of clamped places ``(m, D)`` is elsewhere, and by how much their log sd is larger."""
        sd = self.draws.std(0)
        return (places.mean(0) - self.draws.mean(0)) / sd, (places.std(0) / sd).log()


def near_in_each(log_weight: Tensor, latents: int) -> bool:
    """Whether the gap of log weights, by latent, is so small that chains can say that q is right."""
    gap = log_weight.double().logsumexp(0) - math.log(len(log_weight)) - log_weight.double().mean()
    return bool(gap < _GAP_A_LATENT * latents)


@torch.no_grad()
def deviation(density: PulledBack, q: Distribution) -> float:
    """The largest change of a mean (in sd) or of a log sd along chains, over latents and the worst directions.

    Infinite where q is too far off, or where the chains do not move enough to tell.

    Args:
        density: of the model, pulled back by the transform of q from its base.
        q: over the latent vector.
    """
    transform, base = density.transform, partial(pulled_back, q.log_prob, density.transform)
    u = q.sample((_DRAWS,))
    z = transform.inv(u)
    value, grad = value_and_grad(density, z[:_SCORED])
    own, own_grad = derived(base, z[:_SCORED])
    if not near_in_each(value - own, z.shape[-1]):
        return math.inf
    axes = _worst_directions(grad - own_grad, z[:_SCORED])
    latents, along = Clamped.of(u), Clamped.of(z @ axes)
    start = opposite(base, z[-_CHAINS:])
    places = [moved.z for _, moved in zip(range(_ITERATIONS), trajectories(density, start), strict=False)][_FORGOTTEN:]
    if not torch.stack([_correlation(start, some) for some in places]).mean(0).abs().max() < _STALE:
        return math.inf
    found = [
        *latents.changes(torch.cat([latents.clamp(transform(some)) for some in places])),
        *along.changes(torch.cat([along.clamp(some @ axes) for some in places])),
    ]
    return float(torch.cat(found).abs().max().nan_to_num(math.inf))


def _worst_directions(r: Tensor, z: Tensor) -> Tensor:
    """Unit columns ``(D, 3)``: the mean of the score r, and the extreme eigenvectors of its product with z."""
    product = r.T @ z / len(z)
    vectors = torch.linalg.eigh(product + product.T).eigenvectors
    shift = torch.where(r.any(), r.mean(0), vectors[:, 0])  # an exact q has no score at all
    return torch.stack([torch.nn.functional.normalize(shift, dim=0), vectors[:, 0], vectors[:, -1]], 1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of each coordinate of rows ``(n, D)``."""
    a, b = ((x - x.mean(0)) / x.std(0) for x in (a, b))
    return (a * b).mean(0)
