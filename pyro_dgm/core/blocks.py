r"""Symmetric matrices of blocks next to the diagonal, factorised in :math:`\log_2 K` batched steps.

.. math:: A = \begin{pmatrix} D_1 & E_1^\top & \\ E_1 & D_2 & E_2^\top \\ & E_2 & \ddots \end{pmatrix} = L L^\top

in the order of odd-even reduction: blocks 1, 3, 5, ... hang together by way of the others only, so all of them are eliminated at
once, and what is left is such a matrix of half as many blocks. Cost and memory are linear in K, and all of it has gradients.

References:
    | Heller (1976), "Some aspects of the cyclic reduction algorithm for block tridiagonal linear systems", SIAM J. Num. Anal. 13.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BlockFactor"]


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
        reduced = kept - self._times(left, left.mT)
        reduced = reduced - _padded(self._times(right, right.mT), count)
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
        return self.up(self.down(b))

    def down(self, b: Tensor) -> Tensor:
        """:math:`L^{-1} b`."""
        return self._down(b[..., None], 0)[..., 0]

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
