r"""A posterior that follows a chain: globals by a flow, the latents of a time series given them normal, with banded precision.

.. math:: q(g, x) = q(g)\, N\big(x;\ m(g),\ \Lambda(g)^{-1}\big)

Nothing of the chain is learned: for each g its mean and precision are found from the model's own derivatives. Where the model
is linear and normal given g, one Newton step gives the exact law, and :math:`\log p(y, g) = \log p(y, m, g) - \log q(m \mid g)`.
Elsewhere it is the best normal law by the reverse KL, found by Newton steps on means of gradient and Hessian,

.. math:: E_q[\nabla_x \log p(y, x, g)] = 0, \qquad \Lambda = -E_q[\nabla_x^2 \log p(y, x, g)],

taken by three points of each latent's marginal (exact to the fifth order where the part that is not quadratic is one of single
latents, as that of counts or of a stochastic volatility is). The chain is then integrated out by importance sampling, with draws
in pairs of opposite sign (Shephard & Pitt 1997; Richard & Zhang 2007).

Weights of the globals with K random draws of the chain, of which one is kept by its weight, are exact weights of both (Andrieu,
Doucet & Holenstein 2010): that they are even says that globals and chain are right.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Transform

from pyro_dgm.core import DistributionModule
from pyro_dgm.core.module import OnePass
from pyro_dgm.core.pace import steps
from pyro_dgm.guides.modes import GivenGlobals, log_normal, whitened
from pyro_dgm.guides.plate_start import draws_for, outer_step
from pyro_dgm.model.chains import BandBlocks, BandedChain, BlockFactor, Derivatives
from pyro_dgm.model.handlers import apart
from pyro_dgm.model.log_joint import LogJoint, prior_draws, spread

__all__ = ["ChainPosterior", "start_chain"]

_NEWTON = 12  # steps to the mode, and then to the best normal law
_MEANS = 8
_NEAR = 1.0  # half the squared length of a Newton step, in nats, below which the mode is near
_STILL = 0.05  # the same, of the last step to the best normal law: what is left is of second order
_EXACT = 1e-8  # the same, where draws and densities are asked one by one
_RIDGES = 10
_DRAWS = 8  # of a chain that is not normal, in a step
_ENTRIES = 2**21  # latents at once
_LEAST = 8
_STEPS = 24
_POINTS = 64  # at which the marginal density is learned, for each global and one more
_MOST_POINTS = 512
_WIDER = 1.5  # sd of these, in those of the normal law that was found
_LOWEST = 20.0  # nats below the highest, of points that are used
_LENGTHS = (1.0, 1.5, 2.5, 4.0, 6.0, 10.0)
_NOISES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1)  # variance over that of the process
_RATES = (0.5, 0.1)


@torch.no_grad()
def found_laws(chain: BandedChain, g: Tensor, *, still: float = _STILL) -> tuple[BandBlocks, Tensor | None]:
    """The best normal law for each row of globals ``(n, G)``, and the spread of the points that gave it."""
    if chain.normal:
        made = chain.derivatives(g, chain.near.to(g).expand(len(g), -1, -1))
        diagonal, factor = factorised(made)
        return BandBlocks(chain.near + factor.solve(made.gradient), diagonal, made.lower), None
    x, spread = chain.foreseen(g)
    if spread is None:
        x, spread = _climbed(chain, g, x)
    for _ in range(_MEANS):
        made = chain.derivatives(g, x, spread)
        diagonal, factor = factorised(made)
        move = factor.solve(made.gradient)
        x = x + move
        if _length(made, move) < still:
            break
        spread = deviations(diagonal, made.lower)
    if chain.learns:
        chain.learn(g, x, spread)
    return BandBlocks(x, diagonal, made.lower), spread


def _climbed(chain: BandedChain, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A point near the mode, by Newton steps that are shortened where the density falls, and the spread around it."""
    made = chain.derivatives(g, x)
    share = torch.ones_like(made.value)
    for _ in range(_NEWTON):
        diagonal, factor = factorised(made)
        move = factor.solve(made.gradient)
        if _length(made, move) < _NEAR:
            break
        trial = x + share[:, None, None] * move
        there = chain.derivatives(g, trial)
        better = there.value.isfinite() & (there.value >= made.value)
        share = torch.where(better, (2.0 * share).clamp_max(1.0), 0.25 * share)
        x = _where(better, trial, x)
        made = Derivatives(*(_where(better, a, b) for a, b in zip(there, made, strict=True)))
    return x, deviations(diagonal, made.lower)


def _where(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(rows.reshape(-1, *(1,) * (a.dim() - 1)), a, b)


def _length(made: Derivatives, move: Tensor) -> float:
    """Half the squared length of a step, in nats: that of the row that is farthest but for one in twenty."""
    return 0.5 * float((made.gradient * move).sum((-1, -2)).abs().quantile(0.95))


def factorised(made: Derivatives) -> tuple[Tensor, BlockFactor]:
    """Blocks of a precision that is positive, by a ridge where minus the Hessian is not, and its factor."""
    diagonal = made.diagonal
    factor = BlockFactor(diagonal, made.lower)
    eye = torch.eye(diagonal.shape[-1]).to(diagonal)
    ridge = 1e-3 * made.diagonal.abs().mean((-1, -2, -3))
    for _ in range(_RIDGES):
        fine = factor.log_det.isfinite()
        if bool(fine.all()):
            break
        diagonal = diagonal + torch.where(fine, 0.0, ridge)[:, None, None, None] * eye
        factor, ridge = BlockFactor(diagonal, made.lower), 3.0 * ridge
    return diagonal, factor


@torch.enable_grad()
def deviations(diagonal: Tensor, lower: Tensor) -> Tensor:
    """Marginal standard deviations ``(n, K, B)``: the derivative of the log determinant is the covariance."""
    diagonal = diagonal.detach().requires_grad_()
    (half,) = torch.autograd.grad(BlockFactor(diagonal, lower.detach()).log_det.sum(), diagonal)
    return (2.0 * half.diagonal(dim1=-2, dim2=-1)).sqrt()


class _Followed(torch.autograd.Function):
    """Means and precisions for globals, with gradients towards these: those of a mode, by the implicit function theorem."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, chain: BandedChain, still: float) -> tuple[Tensor, ...]:
        ctx.chain, ctx.g = chain, g.detach().to(chain.dtype)
        with apart():  # a guide's draw may lie in plates that are not the model's
            ctx.at, ctx.spread = found_laws(chain, ctx.g, still=still)
        return tuple(ctx.at)

    @staticmethod
    def backward(ctx: Any, *towards: Tensor) -> tuple[Tensor, None, None]:
        grad = ctx.chain.pulled_back(ctx.g, ctx.at, BandBlocks(*towards), ctx.spread)
        return grad, None, None


class ChainLaw:
    """The law of a chain given n vectors of globals."""

    def __init__(self, chain: BandedChain, g: Tensor, still: float = _STILL) -> None:
        self.chain = chain
        self.mean, diagonal, lower = _Followed.apply(g, chain, still)
        self.factor = BlockFactor(diagonal, lower)

    def place(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The latents of standard normal ``z (*batch, n, N)``, in blocks, and log determinants ``(n,)``."""
        return self.mean + self.factor.up(self.chain.blocked(z)), -self.factor.log_det

    def undo(self, x: Tensor) -> Tensor:
        """The z of latents."""
        return self.chain.flat(self.factor.whitened(x - self.mean))


class ChainPosterior(GivenGlobals):
    """A family over :math:`R^D` of which some entries are a chain, given the others.

    Args:
        family: of the globals, over vectors of length G.
        loc: the centre, shape ``(D,)``.
        scale: the standard deviation of the globals at the start, in each dimension.
        chain: of the model and its data. A copy has none until it is given one.
    """

    def __init__(self, family: DistributionModule, loc: Tensor, scale: float, chain: BandedChain) -> None:
        super().__init__(family, loc, scale, chain.free)
        self.chain: BandedChain | None = chain
        self.sites = chain.sites
        self.learned: Learned | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "chain": None, "learned": None}

    def placed(self, outer: Transform) -> Transform:
        return _WithChain(self.known_chain(), self.size, outer)

    def factors_of(self, log_joint: LogJoint) -> BandedChain:
        return BandedChain(log_joint)

    def use(self, factors: BandedChain) -> None:
        if self.chain is not factors:
            self.chain, self.learned = factors, None

    def known_chain(self) -> BandedChain:
        if self.chain is None:
            raise ValueError(
                "AutoFlow: the chain given the globals is that of the model, which a pickled guide has lost. Build the guide of "
                "the model anew and load its state_dict."
            )
        return self.chain

    # --- The chain integrated out ---

    def at_once(self, chain: BandedChain) -> int:
        """How many draws of the globals are run together."""
        return max(_LEAST, _ENTRIES // (chain.size * (1 if chain.normal else _DRAWS)))

    def particles(self, most: int) -> int:
        """How many draws of the globals a step has."""
        return min(most, self.at_once(self.known_chain()))

    def marginal(self, chain: BandedChain, g: Tensor) -> Tensor:
        """The log density of globals ``(n, G)`` with the chain integrated out, in nats; where it was learned, that."""
        if self.learned is not None:
            return self.learned(g)
        return torch.cat([self._marginal(chain, some) for some in g.split(self.at_once(chain))])

    def _marginal(self, chain: BandedChain, g: Tensor) -> Tensor:
        if chain.normal:
            law = ChainLaw(chain, g)
            z = law.mean.new_zeros(1, len(g), chain.size)
            return self._log_ratio(law, g, *law.place(z), z)[0]
        return self.inner(chain, g, _DRAWS)[1].logsumexp(0) - math.log(_DRAWS)

    @torch.no_grad()
    def learn(self, chain: BandedChain) -> None:
        """Learn the marginal density around where the globals are: training is then no run of the model, but a verdict is."""
        self.learned = None
        outer = self.outer
        w = _WIDER * torch.randn(min(_MOST_POINTS, _POINTS * (1 + self.size)), self.size).to(outer.loc)
        g = outer.loc + w @ outer.scale_tril.mT
        value = self.marginal(chain, g)
        dense = value > value.max() - _LOWEST
        if int(dense.sum()) >= _POINTS:
            self.learned = Learned(
                outer.loc.clone(), outer.scale_tril.clone(), w[dense].double(), value[dense].double()
            )

    def inner(self, chain: BandedChain, g: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """Draws of the chain ``(S, n, K, B)`` in pairs of opposite sign, and log density over that of q, ``(S, n)``."""
        law = ChainLaw(chain, g)
        z = torch.randn(draws // 2, len(g), chain.size).to(law.mean)
        z = torch.cat([z, -z])
        x, ladj = law.place(z)
        return x, self._log_ratio(law, g, x, ladj, z)

    def _log_ratio(self, law: ChainLaw, g: Tensor, x: Tensor, ladj: Tensor, z: Tensor) -> Tensor:
        rows = g.to(x).expand(*x.shape[:2], -1)
        log_p = law.chain.value(rows.flatten(0, 1), x.flatten(0, 1)).reshape(x.shape[:2])
        return log_p - log_normal(z) + ladj

    @torch.no_grad()
    def chosen(self, chain: BandedChain, g: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """Vectors ``(n, D)``, of each row one of its chains by their weights; and the log densities of the globals."""
        x, log_ratio = self.inner(chain, g, draws)
        kept = x[Categorical(logits=log_ratio.T).sample(), torch.arange(len(g))]
        return chain.join(g.to(x), kept), log_ratio.logsumexp(0) - math.log(draws)


class Learned:
    r"""A log density that was evaluated at some points, as a Gaussian process around a normal law.

    .. math:: \log p(w) = c - \tfrac12 |w|^2 + f(w), \qquad f \sim GP(0,\ \sigma^2 e^{-|w - w'|^2 / 2 \ell^2})

    Far from all points it is the normal law. Length and noise are those of the largest likelihood on a grid.

    Args:
        loc, scale_tril: of the normal law, in units of the globals.
        w, value: points in units of that law ``(n, G)``, and the log density there, in nats.
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor, w: Tensor, value: Tensor) -> None:
        self.loc, self.scale_tril, self.w = loc, scale_tril, w
        rest = value + 0.5 * w.square().sum(-1)
        self.level = rest.mean()
        distance = torch.cdist(w, w).square()
        found = [self._fitted(distance, rest - self.level, *each) for each in itertools.product(_LENGTHS, _NOISES)]
        _, self.length, self.alpha = max(found, key=lambda each: each[0])

    @staticmethod
    def _fitted(distance: Tensor, rest: Tensor, length: float, noise: float) -> tuple[float, float, Tensor]:
        """The log likelihood, and the weights of the points."""
        tril = torch.linalg.cholesky((-0.5 * distance / length**2).exp() + noise * torch.eye(len(rest)).to(rest))
        alpha = torch.cholesky_solve(rest[:, None], tril)[:, 0]
        likelihood = -0.5 * len(rest) * torch.log(rest @ alpha) - tril.diagonal().log().sum()
        return float(likelihood), length, alpha

    def __call__(self, g: Tensor) -> Tensor:
        w = whitened(g, self.loc, self.scale_tril).double()
        distance = (w[:, None] - self.w).square().sum(-1)
        return self.level - 0.5 * w.square().sum(-1) + (-0.5 * distance / self.length**2).exp() @ self.alpha


class _WithChain(OnePass):
    """From a flow's globals and standard normals to the vector of all latents."""

    def __init__(self, chain: BandedChain, size: int, outer: Transform) -> None:
        super().__init__()
        self.chain = chain
        self.size = size
        self.outer = outer

    def call_and_ladj(self, v: Tensor) -> tuple[Tensor, Tensor]:
        rows = v.reshape(-1, v.shape[-1])
        g = self.outer(rows[:, : self.size])
        ladj = self.outer.log_abs_det_jacobian(rows[:, : self.size], g)
        x, more = ChainLaw(self.chain, g, _EXACT).place(rows[:, self.size :].to(self.chain.dtype))
        u = self.chain.join(g.to(x), x).to(v)
        return u.reshape(v.shape), (ladj + more.to(v)).reshape(v.shape[:-1])

    def _inverse(self, y: Tensor) -> Tensor:
        rows = y.reshape(-1, y.shape[-1])
        g, x = self.chain.split(rows)
        z = ChainLaw(self.chain, g, _EXACT).undo(x.to(self.chain.dtype))
        return torch.cat([self.outer.inv(g), z.to(y)], -1).reshape(y.shape)


def start_chain(log_joint: LogJoint, chain: BandedChain, posterior: ChainPosterior) -> None:
    """Whiten the globals by the prior's draws, then by natural gradients, the chain integrated out."""
    u = chain.split(prior_draws(log_joint, 256))[0]
    posterior.whiten(u.median(0).values, spread(u).diag())
    n = draws_for(posterior.size)
    chain.learns = True
    for _, progress in steps("start: globals", _STEPS, 0.8):
        outer_step(chain, posterior, n, _RATES[0] * (_RATES[1] / _RATES[0]) ** progress)
    chain.learns = False
