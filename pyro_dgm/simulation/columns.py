"""Sites of simulations, in memory or on the disk: rows are read when they are asked for, and those that are not stay there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor

from pyro_dgm.core.kinds import shown
from pyro_dgm.simulation.folder import Kind, checked_header, mapped

__all__ = ["Column", "MaskColumn", "Sites", "axes_that_differ", "index_of"]

Index = slice | Tensor


class Column:
    """Rows of a site in a file.

    Args:
        folder, name, kind: of the file, see :func:`~pyro_dgm.simulation.folder.mapped`.
        shape: of one row, which has more room in the file.
        rows: numbers of the rows; None for all.
    """

    def __init__(self, folder: Path, name: str, kind: Kind, shape: Size, rows: Tensor | None = None) -> None:
        self.file = (folder, name, kind)
        self.rows = rows
        self.shape = Size((kind[0][0] if rows is None else len(rows), *shape))
        self.itemsize = kind[1].itemsize
        self.whole: list[Tensor] = []  # as a user has it, who may have changed it; of all columns of the file

    def pick(self, index: Index) -> Column:
        """Some of its rows."""
        rows = torch.arange(len(self))[index] if self.rows is None else self.rows[index]
        folder, name, kind = self.file
        column = Column(folder, name, kind, self.shape[1:], rows)
        column.whole = self.whole
        return column

    def tensor(self) -> Tensor:
        """Mapped from the disk if it is the whole file, otherwise a copy in memory; changes do not go back to the disk."""
        cut = (slice(None), *(slice(m) for m in self.shape[1:]))
        if self.rows is not None:
            return self.whole[0][self.rows][cut] if self.whole else self._read(self.rows)[cut]
        if not self.whole:
            self.whole.append(mapped(*self.file, private=True))
        return self.whole[0][cut]

    def _read(self, rows: Tensor) -> Tensor:
        """A copy, without a map: what a map touches, and much beside it, would count as this process's memory."""
        folder, name, kind = self.file
        path = folder / f"{name}.npy"
        shape, dtype, start = checked_header(path, kind)
        found = np.empty((len(rows), *shape[1:]), dtype)
        breaks = (torch.nonzero(rows.diff() != 1)[:, 0] + 1).tolist()
        with path.open("rb") as file:
            for first, last in zip([0, *breaks], [*breaks, len(rows)], strict=True):
                part = found[first:last]
                file.seek(start + (int(rows[first]) if len(rows) else 0) * (part.nbytes // max(len(part), 1)))
                if file.readinto(part.reshape(-1).view(np.uint8).data) < part.nbytes:
                    raise ValueError(f"Simulations: {path} was cut off. Simulate again in another folder.")
        return torch.from_numpy(found)

    def __len__(self) -> int:
        return self.shape[0]


class MaskColumn:
    """What is there of a padded site, made from its sizes ``(n, axes)``.

    >>> MaskColumn(torch.tensor([[1], [3]]), [3]).tensor()
    tensor([[ True, False, False],
            [ True,  True,  True]])
    """

    def __init__(self, sizes: Tensor, largest: Sequence[int]) -> None:
        self.sizes = sizes
        self.largest = largest
        self.shape = Size((len(sizes), *largest))
        self.rows = sizes
        self.itemsize = torch.bool.itemsize

    def pick(self, index: Index) -> MaskColumn:
        """Some of its rows."""
        return MaskColumn(self.sizes[index], self.largest)

    def tensor(self) -> Tensor:
        """True where there is a value."""
        axes = len(self.largest)
        mask = torch.ones(len(self.sizes), *(1,) * axes, dtype=torch.bool)
        for axis, most in enumerate(self.largest):
            inside = torch.arange(most) < self.sizes[:, axis, None]
            mask = mask & inside.reshape(-1, *(most if a == axis else 1 for a in range(axes)))
        return mask

    def __len__(self) -> int:
        return len(self.sizes)


class Sites(Mapping[str, Tensor]):
    """Tensors by site, some of which are read when they are asked for.

    >>> list(Sites({"x": torch.zeros(2)}).picked(slice(1)).values())
    [tensor([0.])]
    """

    def __init__(self, columns: Mapping[str, Tensor | Column | MaskColumn]) -> None:
        self.columns = dict(columns)
        self.made = {k: v for k, v in columns.items() if not isinstance(v, Column | MaskColumn)}

    def __getitem__(self, key: str) -> Tensor:
        column = self.columns[key]
        if key not in self.made and not isinstance(column, Tensor):
            self.made[key] = column.tensor()
        return self.made[key]

    def picked(self, index: Index) -> Sites:
        """These rows of each."""
        return Sites({k: self._picked(k, index) for k in self.columns})

    def _picked(self, key: str, index: Index) -> Tensor | Column | MaskColumn:
        column = self.columns[key]
        in_memory = isinstance(column, Tensor) or (key in self.made and column.rows is not None)
        return self[key][index] if in_memory or isinstance(column, Tensor) else column.pick(index)

    @property
    def on_disk(self) -> bool:
        """Whether rows are left on the disk until they are asked for."""
        return any(isinstance(c, Column) for c in self.columns.values())

    def in_memory(self) -> Sites:
        """With everything read that is not memory-mapped."""
        return Sites(dict(self))

    def bytes(self) -> int:
        """Of all columns."""
        return sum(c.shape.numel() * c.itemsize for c in self.columns.values())

    def shape(self, key: str) -> Size:
        """Of a site, ``(n, *site)``."""
        return self.columns[key].shape

    def __contains__(self, key: object) -> bool:
        return key in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


def axes_that_differ(sizes: Tensor) -> int:
    """How many axes of a site there are up to the last one whose size differs between simulations ``(n, axes)``."""
    differs = torch.nonzero((sizes != sizes[0]).any(0))[:, 0].tolist()
    return differs[-1] + 1 if differs else 0


def index_of(key: Any, n: int) -> Index:
    """What picks rows from each of n: a slice, or their numbers or truths."""
    if isinstance(key, slice):
        rows = range(n)[key]
        return slice(rows.start, rows.stop, rows.step) if rows.step > 0 else torch.tensor(rows, dtype=torch.long)
    numbers = isinstance(key, (int, list, range, np.ndarray, np.generic, Tensor))
    index = torch.as_tensor(key).cpu() if numbers else None
    if index is None or index.dim() > 1 or (index.numel() and (index.is_floating_point() or index.is_complex())):
        raise TypeError(
            f"Simulations: [{shown(key)}]: expected a site, a number, a slice, or a vector of numbers or of truths."
        )
    _refuse_outside(index, n)
    return index if index.dtype is torch.bool else index.reshape(-1).long() % max(n, 1)


def _refuse_outside(index: Tensor, n: int) -> None:
    if index.dtype is torch.bool:
        if index.shape != (n,):
            raise IndexError(f"Simulations: an index of truths has shape {tuple(index.shape)}, expected ({n},).")
        return
    outside = index[(index < -n) | (index >= n)]
    if len(outside):
        raise IndexError(f"Simulations: there is no number {int(outside[0])} among {n}; expected {-n} to {n - 1}.")
