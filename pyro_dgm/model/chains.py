r"""Chains: latents that, given the global ones, hang together with their neighbours only, as those of a time series do.

Ordered by time and cut into K blocks, the Hessian of the log joint in them has blocks on the diagonal and next to it. Products
with 3 B vectors, each with a one in every third block, give all of it (Curtis, Powell & Reid 1974); products with random vectors
say whether that is all. So a chain is found by what the density is, not by how the model is written: a random walk that is one
site, a vector with ``pyro.factor`` of its differences, level and slope side by side, a ``pyro.markov`` loop.

A matrix of such blocks is factorised in :math:`\log_2 K` batched steps, in the order of odd-even reduction: blocks 1, 3, 5, ...
hang together by way of the others only, so all of them are eliminated at once (Heller 1976, "Some aspects of the cyclic reduction
algorithm for block tridiagonal linear systems").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_dgm.core.devices import fork_rng
from pyro_dgm.model.elements import NotFactoredError
from pyro_dgm.model.log_joint import LogJoint

__all__ = ["BandBlocks", "BandedChain", "BlockFactor", "Derivatives"]

# Chosen by hand; not measured.
_LONG = 20  # entries of a site that may be steps of a chain
_SHORTER = 0.9  # of the longest site's steps, that others of the chain have at least: a first step may be another site
_WIDEST = 8  # latents of a block
_MOST_GLOBALS = 64
_DENSE = 0.2  # share of the latents that a global one touches
_AT_ONCE = 64
_NOTHING = 1e-9  # a second derivative that is none
_CLOSE = {torch.float64: 1e-7, torch.float32: 1e-3}  # relative, of two products with a Hessian that are the same


class Derivatives(NamedTuple):
    """Of the log joint in the chain: its value ``(n,)``, gradient ``(n, K, B)``, and blocks of minus its Hessian."""

    value: Tensor
    gradient: Tensor
    diagonal: Tensor
    lower: Tensor


class BandBlocks(NamedTuple):
    """Something of a mean ``(n, K, B)``, and of blocks of a precision on and below its diagonal."""

    mean: Tensor
    diagonal: Tensor
    lower: Tensor


class BandedChain:
    """The latents of a chain, and the derivatives of the log joint in them.

    Attributes:
        latents: where they stand in the vector of all, ``(N,)``; K blocks of B each, of which the last may be filled up.
        inside: which places of the blocks are latents, ``(K, B)``.
        stride: the chain is one of sums over this stride, as that of ``e.cumsum(-1)`` is; 0 for the latents themselves.
        free: where the global latents stand, ``(G,)``.
        sites: the sites of the chain.
        normal: whether the latents are normal given the global ones: the Hessian is the same wherever they are.

    Raises:
        NotFactoredError: where there is no such chain.
    """

    def __init__(self, log_joint: LogJoint) -> None:
        if not log_joint.vectorized or log_joint.rounds > 1:
            raise NotFactoredError("the model does not run in a plate, or by vmap")
        self.log_joint = log_joint
        self.dtype = log_joint.guide._init_loc().dtype
        try:
            with fork_rng(0):
                self.dtype = self._precision()
                self._fit(*self._candidates())
                self.normal = self._is_normal()
        except RuntimeError as error:
            raise NotFactoredError("it has no second derivatives") from error
        parts = log_joint.coordinates.parts(torch.arange(log_joint.dim, device="cpu"))
        self.sites = tuple(k for k, place in parts.items() if torch.isin(place, self.latents).any())
        self.learns = False
        self.seen: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.near = self.split(self._somewhere(1, 0.0))[1][0]

    def foreseen(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where the law given globals ``(n, G)`` is looked for, and its spread; None before any was found."""
        if self.seen is None:
            return self.near.to(g).expand(len(g), -1, -1), None
        h = torch.cat([torch.ones_like(g[:, :1]), (g - self.seen[0]) / self.seen[1]], 1)
        return torch.einsum("nh,hkb->nkb", h, self.seen[2]), torch.einsum("nh,hkb->nkb", h, self.seen[3]).exp()

    def learn(self, g: Tensor, x: Tensor, spread: Tensor) -> None:
        """Take what was found for some globals as linear in these, from now on."""
        centre, scale = g.mean(0), g.std(0).clamp_min(1e-6)
        h = torch.cat([torch.ones_like(g[:, :1]), (g - centre) / scale], 1)
        solve = torch.linalg.solve(h.T @ h + 1e-2 * torch.eye(h.shape[1]).to(h), h.T)
        linear = [torch.einsum("hn,nkb->hkb", solve, t) for t in (x, spread.clamp_min(1e-9).log())]
        self.seen = (centre, scale, linear[0], linear[1])

    @property
    def size(self) -> int:
        """The number of latents."""
        return len(self.latents)

    def join(self, g: Tensor, x: Tensor) -> Tensor:
        """Vectors ``(*batch, D)`` of globals ``(*batch, G)`` and latents ``(*batch, K, B)``."""
        flat = self.flat(x)
        if self.stride:
            flat = torch.cat([flat[..., : self.stride], flat[..., self.stride :] - flat[..., : -self.stride]], -1)
        return torch.cat([g, flat], -1)[..., self.place.to(g.device)]

    def split(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Globals and latents of vectors."""
        flat = u[..., self.latents.to(u.device)]
        sums = flat.unflatten(-1, (-1, self.stride)).cumsum(-2).flatten(-2) if self.stride else flat
        return u[..., self.free.to(u.device)], self.blocked(sums)

    def blocked(self, flat: Tensor) -> Tensor:
        """Vectors ``(*batch, N)`` of a value for each latent, in blocks."""
        missing = self.inside.numel() - flat.shape[-1]
        return torch.nn.functional.pad(flat, (0, missing)).unflatten(-1, self.inside.shape)

    def flat(self, x: Tensor) -> Tensor:
        """The same, without what fills the last block."""
        return x.flatten(-2)[..., : self.size]

    def value(self, g: Tensor, x: Tensor) -> Tensor:
        """The log joint, ``(n,)``."""
        return self.log_joint.evaluated(self.join(g, x))

    def derivatives(self, g: Tensor, x: Tensor, spread: Tensor | None = None) -> Derivatives:
        """At x; with a ``spread`` (standard deviations of normal laws), means over these by three points of each latent."""
        made = self._graph(g.detach(), x.detach().requires_grad_(), spread)
        return Derivatives(*(t.detach() for t in made))

    def pulled_back(self, g: Tensor, at: BandBlocks, towards: BandBlocks, spread: Tensor | None = None) -> Tensor:
        """The gradient towards g of a mode and of the blocks there, ``at``, where theirs is ``towards``."""
        g, x = g.detach().requires_grad_(), at.mean.detach().requires_grad_()
        made = self._graph(g, x, spread, twice=True)
        asked = [(t, w) for t, w in zip(made[2:], towards[1:], strict=True) if t.requires_grad]
        direct = through = None
        if asked:
            blocks, weights = zip(*asked, strict=True)
            direct, through = torch.autograd.grad(blocks, [g, x], weights, retain_graph=True, allow_unused=True)
        mean = towards.mean if through is None else towards.mean + through
        (moved,) = torch.autograd.grad(made.gradient, g, BlockFactor(at.diagonal, at.lower).solve(mean))
        return moved if direct is None else moved + direct

    def _graph(self, g: Tensor, x: Tensor, spread: Tensor | None = None, *, twice: bool = False) -> Derivatives:
        with torch.enable_grad():
            value = self._averaged(g, x, spread)
            (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
            if not gradient.requires_grad:
                raise NotFactoredError("its density is linear in them")
            columns = [
                torch.autograd.grad(gradient, x, probe.expand_as(x), retain_graph=True, create_graph=twice)[0]
                for probe in self._probes(x)
            ]
            return Derivatives(value, gradient, *self._blocks(columns))

    def _averaged(self, g: Tensor, x: Tensor, spread: Tensor | None) -> Tensor:
        if spread is None:
            return self.value(g, x)
        away = math.sqrt(3.0) * spread
        value = self.value(g.repeat(3, 1), torch.cat([x, x + away, x - away])).reshape(3, -1)
        return value[0] * (2.0 / 3.0) + (value[1] + value[2]) / 6.0

    def _probes(self, like: Tensor) -> Iterator[Tensor]:
        """Vectors ``(K, B)`` with a one in every third block."""
        for first in range(min(3, len(self.inside))):
            for each in range(self.inside.shape[1]):
                probe = torch.zeros(self.inside.shape).to(like)
                probe[first::3, each] = 1.0
                yield probe

    def _blocks(self, products: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Minus the Hessian's blocks on the diagonal and below it, of its products with the probes."""
        count, width = self.inside.shape
        # (n, K, B, 3, B): rows of block k, by the probe
        by_first = -torch.stack(products, -1).unflatten(-1, (-1, width))
        k = torch.arange(count)
        diagonal = by_first[:, k, :, k % 3]
        lower = by_first[:, k[1:], :, k[:-1] % 3]
        diagonal = 0.5 * (diagonal + diagonal.mT).movedim(0, 1) + torch.diag_embed((~self.inside).to(diagonal))
        return diagonal, lower.movedim(0, 1)

    # --- How it is found ---

    def _precision(self) -> torch.dtype:
        """float64 where the model runs in it: thousands of steps add up."""
        u = self._somewhere(3, 0.3)
        for dtype in (torch.float64, u.dtype):
            with suppress(RuntimeError, ValueError, TypeError):
                value = self.log_joint.evaluated(u.to(dtype))
                if bool(value.isfinite().all()):
                    return dtype
        raise NotFactoredError("a term is not finite, where it was looked")

    def _somewhere(self, n: int, far: float) -> Tensor:
        loc = self.log_joint.guide._init_loc().detach()
        return (loc + far * torch.randn(n, len(loc)).to(loc)).to(self.dtype)

    def _candidates(self) -> tuple[Tensor, int, list[int]]:
        """Latents that may be a chain, by time, how many there are each time, and how wide its blocks may be."""
        coordinates = self.log_joint.coordinates
        places = coordinates.parts(torch.arange(coordinates.dim, device="cpu"))
        longest = max(max(p.shape, default=1) for p in places.values())
        if longest < _LONG:
            return self._sparse(), 1, list(range(1, _WIDEST + 1))
        columns = []
        for place in places.values():
            steps = max(place.shape, default=1)
            if steps >= _SHORTER * longest:
                first = place.movedim(place.shape.index(steps), 0).reshape(steps, -1)
                columns.append(torch.nn.functional.pad(first, (0, 0, longest - steps, 0), value=-1))
        each, order = sum(c.shape[1] for c in columns), torch.cat(columns, 1).flatten()
        return order[order >= 0], each, [m * each for m in range(1, 5) if m * each <= _WIDEST]

    def _sparse(self) -> Tensor:
        """Latents that few others depend on, in the order of the model: steps of a loop."""
        u = self._somewhere(1, 0.3)
        size = u.shape[1]
        rows = torch.eye(size, dtype=torch.bool).split(_AT_ONCE)
        found = [_product(self.log_joint.evaluated, u.expand(len(some), -1), some.to(u)) for some in rows]
        touched = [(each.abs() > _NOTHING).sum(1) for each in found]
        return (torch.cat(touched) <= _DENSE * size).nonzero()[:, 0]

    def _cut(self, latents: Tensor, width: int) -> None:
        """Into blocks of so many."""
        self.latents = latents
        free = torch.ones(self.log_joint.dim, dtype=torch.bool)
        free[latents] = False
        self.free = free.nonzero()[:, 0]
        self.inside = (torch.arange(len(latents) + -len(latents) % width) < len(latents)).reshape(-1, width)
        self.place = torch.cat([self.free, latents]).argsort()

    def _fit(self, latents: Tensor, each: int, widths: list[int]) -> None:
        """Cut into blocks so wide that the Hessian is zero outside of them; else that in their sums."""
        outside = self.log_joint.dim - len(latents)
        if len(latents) < _LONG or not 1 <= outside <= _MOST_GLOBALS:
            raise NotFactoredError("no latents that follow one another, with some others outside of them, were found")
        for self.stride in (0, each) if len(latents) % each == 0 else (0,):
            for width in widths:
                self._cut(latents, width)
                if self._is_banded():
                    return
        raise NotFactoredError("its latents hang together more than those of a chain do")

    def _is_banded(self) -> bool:
        """Whether products of the blocks with random vectors are those of the Hessian."""
        g, x = self.split(self._somewhere(2, 0.3))
        v = torch.randn_like(x) * self.inside.to(x)
        full = _product(partial(self.value, g), x, v)
        found = self.derivatives(g, x)
        blocks, size = self._times(found, v), self._times(Derivatives(*(t.abs() for t in found)), v.abs())
        return bool(((full + blocks).abs() <= _CLOSE[self.dtype] * (size + size.mean())).all())

    def _times(self, found: Derivatives, x: Tensor) -> Tensor:
        """The blocks times vectors."""
        out = (found.diagonal @ x[..., None])[..., 0]
        out[:, 1:] += (found.lower @ x[:, :-1, :, None])[..., 0]
        out[:, :-1] += (found.lower.mT @ x[:, 1:, :, None])[..., 0]
        return out * self.inside.to(x)

    def _is_normal(self) -> bool:
        """Whether the Hessian is the same elsewhere in the chain."""
        g, x = self.split(self._somewhere(2, 0.3))
        here, there = self.derivatives(g, x), self.derivatives(g, x + torch.randn_like(x) * self.inside.to(x))
        pairs = zip(here[2:], there[2:], strict=True)
        return all(bool(((a - b).abs() <= _CLOSE[self.dtype] * (a.abs() + a.abs().mean())).all()) for a, b in pairs)


def _product(log_density: Callable[[Tensor], Tensor], at: Tensor, v: Tensor) -> Tensor:
    """Of the Hessian with vectors v."""
    with torch.enable_grad():
        at = at.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(log_density(at).sum(), at, create_graph=True)
        return torch.autograd.grad(gradient, at, v)[0] if gradient.requires_grad else torch.zeros_like(at)


# --- Matrices of blocks next to the diagonal ---


class _Level(NamedTuple):
    """Blocks that are eliminated together: roots ``(*batch, k, B, B)``, and the factor's blocks left and right of the others."""

    root: Tensor
    left: Tensor
    right: Tensor


class BlockFactor:
    """The factor of ``diagonal (*batch, K, B, B)`` and ``lower (*batch, K - 1, B, B)``; not finite where it is not positive.

    Vectors are ``(*batch, K, B)``.
    """

    def __init__(self, diagonal: Tensor, lower: Tensor) -> None:
        self.alone = diagonal.shape[-1] == 1
        self.levels: list[_Level] = []
        while diagonal.shape[-3] > 1:
            diagonal, lower = self._halved(diagonal, lower)
        self.last = self._root(diagonal)

    def _halved(self, diagonal: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
        """Eliminate every other block, the first one first."""
        root = self._root(diagonal[..., ::2, :, :])
        kept = diagonal[..., 1::2, :, :]
        count = kept.shape[-3]
        left = self._divided(lower[..., ::2, :, :], root[..., :count, :, :])
        right = self._divided(lower[..., 1::2, :, :].mT, root[..., 1:, :, :])
        self.levels.append(_Level(root, left, right))
        reduced = kept - self._times(left, left.mT) - _padded(self._times(right, right.mT), count)
        return reduced, -self._times(left[..., 1:, :, :], right[..., : count - 1, :, :].mT)

    def _root(self, blocks: Tensor) -> Tensor:
        return blocks.sqrt() if self.alone else torch.linalg.cholesky_ex(blocks)[0]

    def _divided(self, blocks: Tensor, root: Tensor) -> Tensor:
        """``blocks @ inverse(root).T``."""
        return blocks / root if self.alone else torch.linalg.solve_triangular(root.mT, blocks, upper=True, left=False)

    def _times(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b if self.alone else a @ b

    def _solved(self, root: Tensor, b: Tensor, *, transposed: bool = False) -> Tensor:
        if self.alone:
            return b / root
        return torch.linalg.solve_triangular(root.mT if transposed else root, b, upper=transposed)

    @property
    def log_det(self) -> Tensor:
        """The logarithm of the determinant of L, ``(*batch,)``."""
        roots = [level.root for level in self.levels] + [self.last]
        return sum(r.diagonal(dim1=-2, dim2=-1).log().sum((-1, -2)) for r in roots)  # type: ignore[return-value]

    def solve(self, b: Tensor) -> Tensor:
        """:math:`A^{-1} b`."""
        return self._up(self._down(b[..., None], 0), 0)[..., 0]

    def up(self, b: Tensor) -> Tensor:
        """:math:`L^{-\\top} b`: of standard normal b, a draw with precision A."""
        return self._up(b[..., None], 0)[..., 0]

    def whitened(self, x: Tensor) -> Tensor:
        """:math:`L^\\top x`, what :meth:`up` undoes."""
        return self._whitened(x[..., None], 0)[..., 0]

    def _down(self, b: Tensor, depth: int) -> Tensor:
        if depth == len(self.levels):
            return self._solved(self.last, b)
        level, count = self.levels[depth], b.shape[-3] // 2
        first = self._solved(level.root, b[..., ::2, :, :])
        rest = b[..., 1::2, :, :] - self._times(level.left, first[..., :count, :, :])
        rest = rest - _padded(self._times(level.right, first[..., 1:, :, :]), count)
        return _woven(first, self._down(rest, depth + 1))

    def _up(self, b: Tensor, depth: int) -> Tensor:
        if depth == len(self.levels):
            return self._solved(self.last, b, transposed=True)
        rest = self._up(b[..., 1::2, :, :], depth + 1)
        first = b[..., ::2, :, :] - self._coupled(rest, depth)
        return _woven(self._solved(self.levels[depth].root, first, transposed=True), rest)

    def _whitened(self, x: Tensor, depth: int) -> Tensor:
        if depth == len(self.levels):
            return self._times(self.last.mT, x)
        rest = x[..., 1::2, :, :]
        first = self._times(self.levels[depth].root.mT, x[..., ::2, :, :]) + self._coupled(rest, depth)
        return _woven(first, self._whitened(rest, depth + 1))

    def _coupled(self, rest: Tensor, depth: int) -> Tensor:
        """What those that stay add to those that were eliminated."""
        level = self.levels[depth]
        right = level.right.shape[-3]
        count = level.root.shape[-3]
        after = _padded(self._times(level.left.mT, rest), count)
        return after + _padded(self._times(level.right.mT, rest[..., :right, :, :]), count, first=1)


def _padded(blocks: Tensor, count: int, *, first: int = 0) -> Tensor:
    """With zero blocks before and behind, ``count`` in all."""
    return torch.nn.functional.pad(blocks, (0, 0, 0, 0, first, count - first - blocks.shape[-3]))


def _woven(even: Tensor, odd: Tensor) -> Tensor:
    """Blocks in their order, of those at even and at odd places."""
    pair = torch.stack([even[..., : odd.shape[-3], :, :], odd], -3).flatten(-4, -3)
    return pair if even.shape[-3] == odd.shape[-3] else torch.cat([pair, even[..., -1:, :, :]], -3)
