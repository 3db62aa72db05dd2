r"""Chains that use a guide as their proposal, and the better guide that their draws make.

Many short chains run at once. In turn each makes

- a *jump*: a fresh draw u' of the guide q, accepted with probability
  :math:`\min\{1,\ p(u') q(u) / (p(u) q(u'))\}`, which leads from one mode to another;
- a *local move*: a Hamiltonian trajectory in the coordinates of the guide's component that has the largest share in q at the
  place, :math:`\theta = T_k(z)`; it is refused where another component has at its end. This leaves p as it is.

Before that, draws of the prior climb, and each mode that the guide lacks gets a component of its own. After each round of chains
the guide is fitted to their places by maximum likelihood, so that more jumps are accepted in the next; in the last round, whose
draws are returned, it stays as it is.

References:
    | Gabrié, Rotskoff & Vanden-Eijnden (2022), "Adaptive Monte Carlo augmented with normalizing flows", PNAS 119(10).
    | Vehtari et al. (2021), "Rank-normalization, folding, and localization: an improved R-hat", Bayesian Analysis 16(2).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Transform
from tqdm.auto import tqdm
from typing_extensions import Unpack

from pyro_dgm.core import frozen, zuko
from pyro_dgm.core.devices import one_at_a_time, seeded
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.pace import few_threads
from pyro_dgm.core.weights import gumbels_like
from pyro_dgm.diagnostics.containers import CONTAINER, ContainerOptions, with_defaults
from pyro_dgm.diagnostics.converters import groups_of_samples
from pyro_dgm.diagnostics.groups import container_of
from pyro_dgm.diagnostics.short_chains import refuse_not_finite
from pyro_dgm.guides.autoflow import AutoFlow
from pyro_dgm.guides.modes import Whitening, transport
from pyro_dgm.guides.start import Gaussians, gaussians_at
from pyro_dgm.model.hmc import Chains, Steps, leap, share_of
from pyro_dgm.model.log_joint import LogJoint, PulledBack, ascend, other_modes, prior_draws, spread, value_and_grad
from pyro_dgm.model.program import Model

__all__ = ["Explored", "explore"]

# Not measured one by one; chosen by hand.
_CLIMBERS, _CLIMB = 256, 64  # prior draws that climb, and their steps
_MOST_MODES = 32
_WIDE = 50  # latents above which no modes are looked for
_LOST = 5.0  # nats from a mode's Gaussian to the guide, from which the guide lacks the mode
_STARTS = 64  # draws of the guide, for each chain, of which the chains' starts are picked by weight
_ROUND = 40  # iterations of a round before the last
_FIT_STEPS, _FIT_LOOK, _FIT_ROWS, _FIT_RATE = 200, 20, 512, 1e-3
_PATIENCE = 2  # looks
_LEAST_SHARE = (
    0.1  # of a component in the jumps, as a part of an even one: one that is never proposed is never found again
)
_FINE = 0.7  # share of accepted jumps in a round, from which the guide is good enough as it is
_EASY, _SELDOM = 0.5, 4  # share of accepted jumps from which local moves are made in each fourth iteration alone
_SPLIT_RHAT = 1.01  # Vehtari et al. (2021)


@dataclass(frozen=True)
class Explored:
    """Draws of chains, and what is known of them.

    Attributes:
        idata: their container for ArviZ.
        guide: the guide as the chains' places made it, for ``from_svi``, ``explore`` and everything that takes a guide.
        jumps, moves: shares of accepted jumps and local moves.
        modes: weight and its standard error (over chains) of each component of the guide.
        rhat: the largest split R-hat of an unconstrained latent.
    """

    idata: Any = field(repr=False)
    guide: AutoFlow = field(repr=False)
    jumps: float
    moves: float
    modes: tuple[tuple[float, float], ...]
    rhat: float

    @property
    def converged(self) -> bool:
        """Whether R-hat is below 1.01, so that the chains agree."""
        return self.rhat < _SPLIT_RHAT

    def __str__(self) -> str:
        weights = ", ".join(f"{w:.3f} +- {e:.3f}" for w, e in self.modes if w > 0.0)
        advice = (
            ""
            if self.converged
            else " The chains do not agree: more rounds and draws, or a guide that is trained longer."
        )
        return (
            f"explored: R-hat {self.rhat:.3f}, {self.jumps:.0%} of the jumps and {self.moves:.0%} of the local moves accepted; "
            f"weights of the modes {weights}.{advice} A mode that no prior draw climbs to stays unseen."
        )


@checked(only=("num_samples", "num_chains", "rounds", "options"), num_samples=4, num_chains=4, rounds=0)
@one_at_a_time
def explore(
    model: Model,
    guide: AutoFlow,
    *args: Any,
    num_samples: int = 100,
    num_chains: int = 64,
    rounds: int = 3,
    progress: bool = True,
    **options: Unpack[ContainerOptions],
) -> Explored:
    """Draw from the posterior by many short chains with the guide as their proposal, and fit the guide to what they find.

    Args:
        model: a Pyro model that runs many draws at once.
        guide: a trained :class:`~pyro_dgm.AutoFlow` over one vector; it stays as it is.
        args: the model's arguments.
        num_samples: draws that are kept of each chain.
        num_chains: how many chains.
        rounds: of 40 iterations each, after which the guide is fitted anew; their draws are not kept.
        progress: show a bar over the iterations.
        options: as in :func:`~pyro_dgm.from_svi`, from ``model_kwargs`` on; ``prior`` is 0 unless it is given.

    Raises:
        TypeError: for a guide that is no ``AutoFlow``.
        ValueError: for a guide that follows plates or a series, a model that runs one draw at a time, and latents that the guide
            lacks.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model(x):
        ...     a = pyro.sample("a", dist.Normal(0.0, 3.0))
        ...     pyro.sample("x", dist.Normal(a.square(), 0.5), obs=x)
        >>> guide = dgm.AutoFlow(model, init_scale=0.3).setup(torch.tensor(4.0))  # at one of the modes, or between them
        >>> found = dgm.explore(model, guide, torch.tensor(4.0), num_samples=20, rounds=1, seed=0, progress=False)
        >>> found.idata["posterior"]["a"].shape, found.guide.modes
        ((64, 20), 3)
    """
    if not isinstance(guide, AutoFlow):
        raise TypeError(f"explore: {type(guide).__name__} is no AutoFlow. For other autoguides there is neutra.")
    complete: ContainerOptions = with_defaults(explore, options, {**CONTAINER, "prior": 0})
    kwargs = complete["model_kwargs"] or {}
    total = rounds * _ROUND + num_samples
    with seeded(complete["seed"]), tqdm(total=total, desc="modes", disable=not progress) as bar:
        guide = deepcopy(guide).setup(*args, **kwargs)
        log_joint = LogJoint(guide, model, args, kwargs, whole=True)
        _refuse(guide, log_joint)
        with few_threads(num_chains * guide.latent_dim):
            _add_lost_modes(guide, log_joint)
            refuse_not_finite("explore", log_joint, guide._posterior().sample((_CLIMBERS,)))
            chains = _Chains(guide, log_joint, num_chains)
            for i in range(rounds):
                bar.set_description(f"round {i + 1}/{rounds}")
                places = torch.stack([chains.step(bar) for _ in range(_ROUND)][_ROUND // 4 :])
                if chains.accepted()[0] >= _FINE:
                    bar.total -= (rounds - 1 - i) * _ROUND
                    break
                _fit(guide, *(half.flatten(0, 1) for half in places.chunk(2, 1)))
                chains.renew()
            bar.set_description("draws")
            chains.begin()
            u = torch.stack([chains.step(bar) for _ in range(num_samples)], 1)
        draws = log_joint.constrain(u.flatten(0, 1))[0]
        program, groups = groups_of_samples("explore", model, draws, args, complete)
    jumps, moves = chains.accepted()
    attrs = {"guide": type(guide).__name__, "jumps": jumps, "moves": moves}
    idata = container_of(program, groups, complete, attrs, num_chains, "explore")
    rhat = max(_split_rhat(column) for column in u.double().cpu().numpy().transpose(2, 0, 1))
    return Explored(idata, guide, jumps, moves, _weights(guide, u), rhat)


def _refuse(guide: AutoFlow, log_joint: LogJoint) -> None:
    reason = ""
    if guide.follows_structure:
        reason = "the guide follows plates or a series, whose elements have weights of their own"
    elif log_joint.missing:
        reason = f"latent site '{log_joint.missing[0]}' is not in the guide"
    elif not log_joint.vectorized:
        reason = "the model runs one draw at a time"
    if reason:
        raise ValueError(f"explore: {reason}. For such a model there is NUTS.")


# --- The guide: its parts, modes that it lacks, and its fit to places ---


def _parts(guide: AutoFlow) -> list[Any]:
    """The distributions of its components."""
    return [component() for component in guide._posterior.components]


def _maps(guide: AutoFlow) -> list[Transform]:
    """The map of each component from its base; of a family that has none the whitening alone."""
    found = []
    for component in guide._posterior.components:
        built = component.build(None)
        if isinstance(built, zuko.distributions.NormalizingFlow):
            found.append(transport(component, built))
        else:
            found.append(Whitening(component.loc, component.scale_tril, *component.affine.unbind()))
    return found


def _shares(guide: AutoFlow, u: Tensor) -> Tensor:
    """Log of each component's part in the density at u, ``(K, N)``."""
    each = torch.stack([part.log_prob(u) for part in _parts(guide)])
    return each + guide._posterior.log_weight[:, None].to(each)


@torch.no_grad()
def _add_lost_modes(guide: AutoFlow, log_joint: LogJoint) -> None:
    """A component for each mode that draws of the prior climb to and the guide lacks, and weights for all."""
    posterior = guide._posterior
    if guide.latent_dim > _WIDE:
        return
    prior = prior_draws(log_joint, _CLIMBERS)
    ends = ascend(log_joint, prior, spread(prior), "modes", _CLIMB)
    value = log_joint(ends).detach()
    ends = ends[value.argsort(descending=True)][: int(value.isfinite().sum())]
    if not len(ends):
        return
    found = gaussians_at(log_joint, torch.stack([ends[0], *other_modes(log_joint, ends[0], ends[1:], _MOST_MODES - 1)]))
    lost = [i for i in range(len(found.names)) if _is_lost(guide, found, i)]
    old = len(posterior.components)
    posterior.grow(old + len(lost))
    for component, i in zip(list(posterior.components)[old:], lost, strict=True):
        component.family.start_at_identity()
        component.affine.zero_()
        component.whiten(found.loc[i], found.scale_tril[i])
    if len(posterior.components) > 1:
        posterior.weigh(log_joint)


def _is_lost(guide: AutoFlow, found: Gaussians, i: int) -> bool:
    """Whether the KL divergence from this Gaussian to the guide is large."""
    gaussian = torch.distributions.MultivariateNormal(found.loc[i], scale_tril=found.scale_tril[i])
    x = gaussian.sample((_CLIMBERS,))
    return not bool((gaussian.log_prob(x) - _shares(guide, x).logsumexp(0)).mean() < _LOST)


def _fit(guide: AutoFlow, u: Tensor, held_out: Tensor) -> None:
    """Maximum likelihood of places, as long as those of other chains become likelier: of weights first, then of components."""
    posterior = guide._posterior
    with torch.no_grad():
        shares = _shares(guide, torch.cat([u, held_out])).softmax(0).mean(1)
        posterior.log_weight.copy_(shares.clamp_min(_LEAST_SHARE / len(shares)).log().log_softmax(0))
    best, kept = _loss(guide, held_out), deepcopy(posterior.state_dict())
    optimizer = torch.optim.Adam([p for p in posterior.parameters() if p.requires_grad], lr=_FIT_RATE)
    stale = 0
    for _ in range(_FIT_STEPS // _FIT_LOOK):
        for _ in range(_FIT_LOOK):
            optimizer.zero_grad()
            loss = -_shares(guide, u[torch.randint(len(u), (_FIT_ROWS,))]).logsumexp(0).mean()
            loss.backward()
            optimizer.step()
        now = _loss(guide, held_out)
        stale = 0 if now < best else stale + 1
        if now < best:
            best, kept = now, deepcopy(posterior.state_dict())
        if stale == _PATIENCE:
            break
    posterior.load_state_dict(kept)


@torch.no_grad()
def _loss(guide: AutoFlow, u: Tensor) -> float:
    """Nats; NaN counts as none better."""
    return float(-_shares(guide, u).logsumexp(0).mean())


# --- The chains ---


class _Chains:
    """Places of all chains, with the densities of model and guide there."""

    def __init__(self, guide: AutoFlow, log_joint: LogJoint, count: int) -> None:
        self.guide, self.log_joint = guide, log_joint
        with torch.no_grad():
            parts = _parts(guide)
            sizes = [count // len(parts) + (k < count % len(parts)) for k in range(len(parts))]
            u = torch.cat([_started(part, log_joint, n) for part, n in zip(parts, sizes, strict=True) if n])
            self.places = Chains(u, log_joint(u))
        self.jumps: list[float] = []
        self.moves: list[float] = []
        self.renew()

    def accepted(self) -> tuple[float, float]:
        """Shares of accepted jumps and local moves since the last beginning."""
        return float(np.mean(self.jumps)), float(np.mean(self.moves))

    def begin(self) -> None:
        """Fix how often local moves are made, by the jumps so far, and count anew."""
        self.every = _SELDOM if self.jumps and self.accepted()[0] >= _EASY else 1
        self.jumps, self.moves = [], []

    @torch.no_grad()
    def renew(self) -> None:
        """Take the guide as it is now."""
        self.begin()
        self.maps = _maps(self.guide)
        self.densities = [PulledBack(self.log_joint, each) for each in self.maps]
        self.steps = [Steps(self.guide.latent_dim) for _ in self.maps]

    @torch.no_grad()
    def step(self, bar: Any) -> Tensor:
        """One jump of each chain, and a local move where it is due; the places after them."""
        with frozen(*self.guide._posterior.parameters()):
            if len(self.jumps) % self.every == 0:
                self.moves.append(self._move())
            self.jumps.append(self._jump())
        bar.update()
        return self.places.u

    def _jump(self) -> float:
        now = self.places
        new = self.guide._posterior().sample((len(now.u),))
        log_p = self.log_joint(new).nan_to_num(-torch.inf)
        log_q = _shares(self.guide, torch.cat([now.u, new])).logsumexp(0)
        gain = log_p - now.log_p + log_q[: len(new)] - log_q[len(new) :]
        return float(now.accept(new, log_p, gain.nan_to_num(-torch.inf)).double().mean())

    def _move(self) -> float:
        """Chains in one cell of the guide move together, and those that leave it stay."""
        now = self.places
        cells = _shares(self.guide, now.u).argmax(0)
        u, gain = now.u.clone(), torch.full_like(now.log_p, -torch.inf)
        for k in cells.unique().tolist():
            u[cells == k], gain[cells == k] = self._moved(now.u[cells == k], k)
        inside = _shares(self.guide, u).argmax(0) == cells
        return float(now.accept(u, self.log_joint(u), torch.where(inside, gain, -torch.inf)).double().mean())

    def _moved(self, u: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ends of trajectories in the coordinates of a component, and what decides on them."""
        z = self.maps[k].inv(u)
        value, grad = value_and_grad(self.densities[k], z)
        new, _, _, gain = leap(self.densities[k], z, torch.randn_like(z), value, grad, self.steps[k].size)
        self.steps[k].adapt(share_of(gain))
        end = self.maps[k](new)
        fine = end.isfinite().all(-1)
        return torch.where(fine[:, None], end, u), torch.where(fine, gain, -torch.inf)


def _started(part: Any, log_joint: LogJoint, count: int) -> Tensor:
    """So many different draws of a component, picked by weight: a few heavy ones alone would start all chains at one place."""
    u = part.sample((_STARTS * count,))
    log_weight = (log_joint(u) - part.log_prob(u)).nan_to_num(-torch.inf).clamp_min(-1e30)
    return u[(log_weight + gumbels_like(log_weight)).topk(count).indices]


# --- What is known of the draws ---


@torch.no_grad()
def _weights(guide: AutoFlow, u: Tensor) -> tuple[tuple[float, float], ...]:
    """Share of the draws ``(C, n, D)`` in each component's cell, and its standard error over chains."""
    cells = _shares(guide, u.flatten(0, 1)).argmax(0).reshape(u.shape[:2])
    found = []
    for k in range(len(guide._posterior.components)):
        by_chain = (cells == k).double().mean(1)
        found.append((float(by_chain.mean()), float(by_chain.std() / len(by_chain) ** 0.5)))
    return tuple(found)


def _split_rhat(draws: np.ndarray) -> float:
    """Split R-hat of rank-normalised draws ``(C, n)``, and of their distances from the median: the larger of both."""
    n = draws.shape[1] // 2
    halves = np.concatenate([draws[:, :n], draws[:, -n:]])
    return max(_rhat(halves), _rhat(np.abs(halves - np.median(halves))))


def _rhat(draws: np.ndarray) -> float:
    ranks = draws.ravel().argsort().argsort().reshape(draws.shape)
    z = torch.special.ndtri(torch.from_numpy((ranks + 0.625) / (draws.size + 0.25)))
    within = z.var(1).mean()
    between = z.mean(1).var()
    return float(((1.0 - 1.0 / z.shape[1]) + between / within).sqrt())
