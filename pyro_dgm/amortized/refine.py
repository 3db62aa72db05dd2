r"""From an amortised posterior to the posterior of one data set, by the model's own density.

1. Importance weights :math:`w = p(x, \theta) / q(\theta \mid x)`, Pareto-smoothed, say how far off q is (k-hat, effective
   draws) and estimate the evidence, :math:`\log p(x) \approx \log \bar w`.
2. Draws picked in proportion to w are moved by many short Markov chains at once. Each step proposes either a fresh draw of q
   (independence: it changes modes) or a difference of two other chains' states (it follows scale and correlation without
   tuning), and accepts by Metropolis and Hastings' rule, so the posterior stays as it is.

Both densities are functions of one vector of all latents, for many vectors at once.

Sources: Vehtari et al. (2024), JMLR 25(72); ter Braak & Vrugt (2008), "Differential evolution Markov chain with snooker
updater and fewer chains", Statistics and Computing 18, eqs. 1-2.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Size, Tensor

from pyro_dgm.amortized.units import Units
from pyro_dgm.core.devices import device_of
from pyro_dgm.core.distribution import NoDensityError
from pyro_dgm.core.pace import steps
from pyro_dgm.core.warn import warn_user
from pyro_dgm.core.weights import K_LIMIT, evidence_error, log_mean, psis, stratified
from pyro_dgm.model.hmc import Chains
from pyro_dgm.model.sites import lacks_density
from pyro_dgm.model.vectorize import NOT_VECTORIZED, Engine

if TYPE_CHECKING:
    from pyro_dgm.amortized.posterior import ConditionedGuide

__all__ = ["JUMP_EVERY", "Joint", "Refined", "Vectors", "by_difference", "picked", "refined", "run_chains", "smoothed"]

_LIKELY = 0.5  # Pareto k below which weights are all that is needed (Vehtari et al. 2024)
_EQUAL = 0.98  # share of effective draws above which weights are as good as equal; not measured, chosen by hand
_PARTS = 8  # of the draws that are weighed; the bar moves after each
_STEPS = 200  # of the chains, where weights are not enough; not measured, chosen by hand
_FRESH_EVERY = 20  # steps; a fresh draw asks the flow three times, a difference only the model
JUMP_EVERY = 4  # steps; a whole difference leads from one mode to another (ter Braak & Vrugt 2008: 5 or 10)
_JITTER = 1e-4  # standard deviation, in the units of the vectors, by which chains that share a point part
_CLIMBERS, _CLIMB_STEPS = 16, 200  # towards a mode; not measured, chosen by hand
_CLIMB_RATE = 0.05  # the same, in the units of the vectors


@dataclass
class Refined:
    """Draws of one data set's posterior, and what is known of their quality.

    Attributes:
        draws: ``{site: (n, *site)}`` with n the ``num_samples`` of ``refine``, in the latents' own units; of one also
            ``refined[site]``. They count alike: weights were used up by picking them, so a mean is ``draws[site].mean(0)``.
            Some repeat where no chains ran. For ArviZ: ``from_posterior_samples(posterior.model, refined.draws)``.
        khat: Pareto k of the guide's importance weights; 0.7 and more is bad.
        ess: effective number among the ``proposed`` draws of the guide; so many of the draws are worth something where
            no chains ran.
        proposed: how many draws of the guide were weighted.
        log_evidence: estimate of log p(x), nats.
        log_evidence_error: its standard error; infinite where k-hat is bad.
        acceptance: share of accepted steps of the chains, of fresh draws and of differences; empty without chains.
        moved: share of the chains that left their starting point.
    """

    draws: dict[str, Tensor]
    khat: float
    ess: float
    proposed: int
    log_evidence: float
    log_evidence_error: float
    acceptance: dict[str, float] = field(default_factory=dict)
    moved: float = 0.0

    def __getitem__(self, site: str) -> Tensor:
        return self.draws[site]

    @property
    def good(self) -> bool:
        """Whether importance weights alone carry the draws: k-hat below 0.7, or weights that hardly differ at all."""
        return _carried(self.khat, self.ess / self.proposed)

    def __str__(self) -> str:
        chains = "".join(f", {k} accepted {v:.0%}" for k, v in self.acceptance.items())
        return (
            f"Refined({len(next(iter(self.draws.values())))} draws, k-hat {self.khat:.2f}, ess {self.ess:.0f} of "
            f"{self.proposed}, log evidence {self.log_evidence:.3f} +- {self.log_evidence_error:.3f}{chains})"
        )


def refined(posterior: ConditionedGuide, n: int, proposals: int, moves: int | None) -> Refined:
    """Weights, and chains where the weights ask for them, or for so many steps."""
    joint = Joint(posterior)
    if joint.discrete:
        moves = 0
    if moves is not None:
        return _refined(joint, n, proposals, moves)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = _refined(joint, n, proposals, 0)
    enough = first.khat < _LIKELY and first.ess > n
    return first if enough or first.ess > _EQUAL * proposals else _refined(joint, n, proposals, _STEPS)


@torch.no_grad()
def _refined(joint: Joint, n: int, proposals: int, moves: int) -> Refined:
    """Weights, then so many steps of ``n`` chains."""
    u = joint.sample(proposals)
    log_p, log_q = _densities(joint, u)
    finite = log_p.isfinite()
    if not finite.any():
        raise ValueError(
            f"refine: the model's density is zero or NaN at all {proposals} draws of the guide. The data are not what the "
            "model simulates, or the guide is not trained."
        )
    log_w = torch.where(finite, log_p - log_q, -torch.inf).double()
    smooth, k = smoothed(log_w.cpu())
    ess = float(1.0 / np.square(smooth).sum())
    error = evidence_error(log_w.cpu().numpy(), np.log(smooth, where=smooth > 0, out=np.full_like(smooth, -np.inf)), k)
    index = picked(smooth, n)
    chains = Chains(u[index], log_p[index].double())
    accepted = run_chains(chains, joint, moves) if moves and n > 3 else {}
    moved = float((chains.u != u[index]).any(-1).double().mean())
    _warn(k, ess, proposals, moves, accepted)
    evidence = float(log_mean(log_w.cpu().numpy()))
    return Refined(joint.unpack(chains.u), k, ess, proposals, evidence, error, accepted, moved)


def _densities(joint: Joint, u: Tensor) -> tuple[Tensor, Tensor]:
    """Of model and guide at all vectors, part by part."""
    parts = u.chunk(_PARTS)
    found = [(joint.log_p(parts[i]), joint.log_q(parts[i])) for i, _ in steps("weights", len(parts))]
    log_p, log_q = zip(*found, strict=True)
    return torch.cat(log_p), torch.cat(log_q)


def run_chains(
    chains: Chains, joint: Joint, count: int, populations: int = 1, name: str = "chains"
) -> dict[str, float]:
    """Move chains so often; the share of accepted proposals of each kind. Equal populations, side by side, stay independent."""
    shares: dict[str, list[float]] = {"fresh draws": [], "differences": []}
    for i, _ in steps(name, count):
        if i % _FRESH_EVERY == _FRESH_EVERY - 1:
            shares["fresh draws"].append(_fresh(chains, joint))
        else:
            shares["differences"].append(_difference(chains, joint, i % JUMP_EVERY == JUMP_EVERY - 1, populations))
    return {k: sum(v) / len(v) for k, v in shares.items() if v}


def _fresh(chains: Chains, joint: Joint) -> float:
    """Independence step: the proposal is the guide. It changes modes."""
    u = joint.sample(len(chains.u))
    log_p = _finite(joint.log_p(u))
    log_ratio = log_p - joint.log_q(u).double() - chains.log_p + joint.log_q(chains.u).double()
    return float(chains.accept(u, log_p, log_ratio).double().mean())


def _difference(chains: Chains, joint: Joint, jump: bool, populations: int) -> float:
    """Half of each population at a time moves by the difference of two chains of its other half, which stays as it is."""
    n = len(chains.u)
    order = torch.rand(populations, n // populations, device="cpu").argsort(1)
    order = order + torch.arange(populations, device="cpu")[:, None] * order.shape[1]
    taken = torch.zeros_like(chains.log_p, dtype=torch.bool)
    half = order.shape[1] // 2
    for places, rest in ((order[:, :half], order[:, half:]), (order[:, half:], order[:, :half])):
        a = torch.randint(rest.shape[1], places.shape, device="cpu")
        b = (a + torch.randint(1, rest.shape[1], places.shape, device="cpu")) % rest.shape[1]
        movers, one, other = places.flatten(), rest.gather(1, a).flatten(), rest.gather(1, b).flatten()
        u = by_difference(chains.u[movers], chains.u[one] - chains.u[other], jump)
        u = u + _JITTER * torch.randn_like(u)
        moving = Chains(chains.u[movers], chains.log_p[movers])
        log_p = _finite(joint.log_p(u))
        taken[movers] = moving.accept(u, log_p, log_p - moving.log_p)
        chains.u[movers] = moving.u
        chains.log_p[movers] = moving.log_p
    return float(taken.double().mean())


def by_difference(u: Tensor, difference: Tensor, jump: bool, longest: float = 1.0) -> Tensor:
    """Vectors ``(n, D)`` moved along differences of others: by a part at random, or by all of it."""
    if jump:
        return u + difference
    return u + longest * 2.38 / math.sqrt(2.0 * u.shape[1]) * torch.rand(len(u), 1, device=u.device) * difference


def _finite(log_p: Tensor) -> Tensor:
    return log_p.double().nan_to_num(nan=-torch.inf, posinf=-torch.inf)


def smoothed(log_w: Tensor) -> tuple[np.ndarray, float]:
    """Smoothed weights of all draws, summing to one, and Pareto k; draws of density zero have weight zero."""
    finite = log_w.isfinite().numpy()
    smooth, k = psis(log_w.numpy()[finite])
    out = np.zeros(len(log_w))
    out[finite] = np.exp(smooth)
    return out / out.sum(), k


def picked(weights: np.ndarray, n: int) -> Tensor:
    """Indices in proportion to the weights, in random order."""
    index = stratified(weights, n, torch.rand(n, dtype=torch.float64, device="cpu").numpy())
    return torch.from_numpy(index)[torch.randperm(n, device="cpu")]


def _carried(k: float, effective: float) -> bool:
    """Of weights within some per cent of each other even a heavy tail moves nothing."""
    return k < K_LIMIT or effective > _EQUAL


def _warn(k: float, ess: float, proposals: int, moves: int, accepted: dict[str, float]) -> None:
    if _carried(k, ess / proposals):
        return
    after = "They were not moved by chains: pass steps=200."
    if moves:
        shares = ", ".join(f"{kind} accepted {share:.1%}" for kind, share in accepted.items())
        after = f"The draws come from {moves} steps of chains ({shares}); a mode that the guide misses is still missed."
    warn_user(
        f"refine: k-hat is {k:.2f} ({ess:.0f} effective draws); the guide is far from this data set's posterior, and "
        f"importance weights alone do not repair it, nor is the evidence to be believed. {after}"
    )


class Vectors:
    """Draws and density of a guide over vectors ``(N, D)``: the continuous latents, mapped to all numbers, side by side.

    Args:
        posterior: of one data set.
    """

    def __init__(self, posterior: ConditionedGuide) -> None:
        self.posterior = posterior
        self.sites = posterior.guide.structure.latents
        self.discrete = any(s.classes for s in self.sites)
        where = device_of(posterior.guide)
        self.units = {s.name: Units([s]).to(where) for s in self.sites if not s.classes}
        self.shapes = {k: v.shape[1:] for k, v in self._drawn(1).items()}

    def sample(self, n: int) -> Tensor:
        """Draws of the guide."""
        return self.pack(self._drawn(n))

    @torch.no_grad()
    def _drawn(self, n: int) -> dict[str, Tensor]:
        """Draws of the rewritten model's latents."""
        return self.posterior.guide.draw(self.posterior.data, 0, Size([n]))

    def pack(self, values: dict[str, Tensor]) -> Tensor:
        """Draws ``{site: (N, *site)}`` as vectors."""
        return torch.cat([self._packed(s, values[s.name]) for s in self.sites], -1)

    def unpack(self, u: Tensor) -> dict[str, Tensor]:
        """Vectors as draws."""
        values, unbounded = self._unpacked(u)[0], self.posterior.guide.unbounded
        return values if unbounded is None else unbounded.to_sites(values, self.posterior.data, 1)

    def log_q(self, u: Tensor) -> Tensor:
        """Log density of the guide over vectors, nats."""
        values, log_det = self._unpacked(u)
        with pyro.validation_enabled(False):
            return self.posterior.guide.log_prob(values, self.posterior.data, 0).double() + log_det

    def _packed(self, site: Any, value: Tensor) -> Tensor:
        if site.classes:
            return value.reshape(len(value), -1).to(torch.get_default_dtype())
        return self.units[site.name].flatten({site.name: value})[0].reshape(len(value), -1)

    def _unpacked(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        values, log_det, at = {}, u.new_zeros(len(u), dtype=torch.float64), 0
        for site in self.sites:
            batch = self.shapes[site.name][: site.depth]
            width = batch.numel() * (site.width if site.classes else self.units[site.name].features)
            part, at = u[:, at : at + width].reshape(len(u), *batch, -1), at + width
            if site.classes:
                values[site.name] = part.reshape(len(u), *self.shapes[site.name]).to(site.dtype)
                continue
            value, log_dets = self.units[site.name].unflatten(part)
            values[site.name] = value[site.name]
            log_det = log_det + log_dets[site.name].double().reshape(len(u), -1).sum(-1)
        return values, log_det

    def mode(self, n: int) -> dict[str, Tensor]:
        """Where the guide's density of the latents themselves is largest: the best of n draws, after gradient steps uphill."""
        u = self.sample(n)
        value = self._constrained(u)
        u = u[value.argsort(descending=True)[:_CLIMBERS]].requires_grad_()
        optimizer = torch.optim.Adam([u], lr=_CLIMB_RATE)
        for i in range(_CLIMB_STEPS):
            optimizer.param_groups[0]["lr"] = _CLIMB_RATE * (1.0 - i / _CLIMB_STEPS)
            with torch.enable_grad():
                loss = -self._constrained(u).nan_to_num(0.0, 0.0, 0.0).sum()
                u.grad = torch.autograd.grad(loss, u)[0].nan_to_num(0.0)
            optimizer.step()
        end = u.detach()
        best = end[self._constrained(end).nan_to_num(-torch.inf).argmax()]
        return {k: v[0] for k, v in self.unpack(best[None]).items()}

    def _constrained(self, u: Tensor) -> Tensor:
        """Log density of the latents that vectors stand for."""
        with pyro.validation_enabled(False):
            return self.posterior.guide.log_prob(self._unpacked(u)[0], self.posterior.data, 0)


class Joint(Vectors):
    """The same, beside the density of the model."""

    def __init__(self, posterior: ConditionedGuide) -> None:
        _refuse_without_density(posterior)
        super().__init__(posterior)
        nesting = posterior.guide.structure.nesting
        model = posterior.guide.conditioned_model(posterior.data, rewritten=True)
        self.engine = Engine(model, (), {}, nesting, {s.name: len(s.event_shape) for s in self.sites})
        self.how, fault = self.engine.find_how(self._drawn(3))
        if self.how == "loop":
            warn_user(NOT_VECTORIZED.format(fault))

    def log_p(self, u: Tensor) -> Tensor:
        """Log joint density of the model over vectors, nats; NaN where it has none."""
        values, log_det = self._unpacked(u)
        with pyro.validation_enabled(False), poutine.block():
            return self.engine.log_joint(values, self.how).double() + log_det


def _refuse_without_density(posterior: ConditionedGuide) -> None:
    with torch.no_grad(), pyro.validation_enabled(False):  # a draw of the prior may be one that fails
        trace = poutine.trace(posterior.model).get_trace()
    for site in posterior.guide.structure.observed:
        if lacks_density(trace.nodes[site.name]):
            raise NoDensityError(
                f"refine: the data '{site.name}' of the model have no density (they are computed, or drawn by a simulator), so "
                "draws cannot be weighed or moved. Check the guide with sbc and misspecification; more simulations, or "
                "ensemble=5, make it better."
            )
