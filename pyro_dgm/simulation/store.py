"""Simulations of a model, and where they are kept while they are made: in memory, or in files that survive a kill.

The files are memory-mapped. A folder holds ``manifest.json``, one ``.npy`` file for each site, and ``status.npy`` with one
byte for each simulation (0 to be done, 1 good, 2 left out). A row's byte is written after its values, so what is marked is
there.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Size, Tensor

from pyro_dgm.simulation.blocks import Part
from pyro_dgm.train.history import load_checkpoint, save_checkpoint

__all__ = ["Simulations", "Store", "manifest"]


class Simulations(Mapping[str, Tensor]):
    """``n`` independent draws of a model's latents and data, as a mapping from site to tensor.

    ``sims["x"]`` has shape ``(n, *site)``; ``sims[:100]`` and ``sims[index]`` are simulations again. ``len(sims)`` is the
    number of simulations, not of sites. Sites whose size differs between simulations (a plate of random length) are
    padded with zeros at the end to the largest, and ``sims.mask`` says what is there.

    Args:
        values: ``{site: (n, *site)}``.
        observed: names of the data sites; the others are latents.
        mask: ``{site: (n, *sizes)}``, True where there is a value, for padded sites only. It has the axes of the site up to
            the last one whose size differs: ``(n, J)`` for data ``(n, J, 2)`` with J of random size.
        failed: numbers of the simulations that were left out, shape ``(f,)``.
        reasons: why, and how many each.
        args: the model's arguments.
        seed: from which they can be drawn again.
        acceptance: share of prior draws that a proposal accepted; None where there was none.

    Raises:
        ValueError: where the first dimensions differ, or a mask or an observed name has no site.

    Example:
        >>> sims = Simulations({"t": torch.zeros(5), "x": torch.zeros(5, 3)}, ["x"])
        >>> sims
        Simulations(5: t (), observed x (3,))
        >>> len(sims[1:3]), sims[1:3]["x"].shape
        (2, torch.Size([2, 3]))
    """

    def __init__(self, values: Mapping[str, Tensor], observed: Any, *, mask: Mapping[str, Tensor] | None = None,
                 failed: Tensor | None = None, reasons: Mapping[str, int] | None = None, args: tuple[Any, ...] = (),
                 seed: int | None = None, acceptance: float | None = None) -> None:  # fmt: skip
        self._values = dict(values)
        self.observed = tuple(observed)
        self.mask = dict(mask or {})
        self.failed = torch.zeros(0, dtype=torch.long) if failed is None else failed
        self.reasons = dict(reasons or {})
        self.args = tuple(args)
        self.seed = seed
        self.acceptance = acceptance
        self._refuse_bad()

    def _refuse_bad(self) -> None:
        sizes = {k: len(v) for k, v in (*self._values.items(), *self.mask.items())}
        if len(set(sizes.values())) != 1:
            raise ValueError(
                f"Simulations: sites have different numbers of rows, {sizes}; expected one number for all."
            )
        unknown = [k for k in (*self.observed, *self.mask) if k not in self._values]
        if unknown:
            raise ValueError(f"Simulations: {unknown} are not among the sites {list(self._values)}.")

    @overload
    def __getitem__(self, key: str) -> Tensor: ...
    @overload
    def __getitem__(self, key: slice | Tensor) -> Simulations: ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if key not in self._values:
                raise KeyError(f"No site '{key}' among the simulated ones, {list(self._values)}.")
            return self._values[key]
        return self._rows(slice(key, key + 1 or None) if isinstance(key, int) else key)

    def _rows(self, index: Any) -> Simulations:
        pick = lambda of: {k: v[index] for k, v in of.items()}  # noqa: E731
        return Simulations(pick(self._values), self.observed, mask=pick(self.mask), args=self.args, seed=None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(next(iter(self._values.values())))

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the sites that are not observed."""
        return tuple(k for k in self._values if k not in self.observed)

    def __repr__(self) -> str:
        site = lambda k: f"{k} {tuple(self._values[k].shape[1:])}{' masked' if k in self.mask else ''}"  # noqa: E731
        parts = [site(k) for k in self.latents] + [f"observed {site(k)}" for k in self.observed]
        left_out = f"; {len(self.failed)} failed and left out" if len(self.failed) else ""
        accepted = "" if self.acceptance is None else f"; {self.acceptance:.2g} of the prior accepted"
        return f"Simulations({len(self):,}: {', '.join(parts)}{left_out}{accepted})"

    def save(self, path: str | Path) -> None:
        """Write everything but the model's arguments to one file, whole or not at all."""
        state = {"values": {k: v.clone() for k, v in self._values.items()}, "mask": self.mask, "failed": self.failed}
        state |= {"observed": list(self.observed), "reasons": self.reasons, "seed": self.seed}
        save_checkpoint(path, state | {"acceptance": self.acceptance})

    @classmethod
    def load(cls, path: str | Path) -> Simulations:
        """Read what :meth:`save` wrote (with ``weights_only=True``).

        Raises:
            FileNotFoundError: if there is no such file.
        """
        state = load_checkpoint(path)
        if state is None:
            raise FileNotFoundError(f"Simulations.load: there is no file {path}.")
        return cls(state.pop("values"), state.pop("observed"), **state)


_GOOD, _LEFT_OUT = 1, 2
_FAULTS = "faults.jsonl"


class Store:
    """Rows of all sites for ``n`` simulations, filled in any order.

    Args:
        n: number of simulations.
        sites: ``{site: (shape, dtype)}`` of a single run.
        folder: on disk; None for memory.
        sized: the size of a site may differ between simulations.
    """

    def __init__(self, n: int, sites: dict[str, tuple[Size, torch.dtype]], folder: Path | None, sized: bool) -> None:
        self.n = n
        self.folder = folder
        self.files = {k: f"site-{i}" for i, k in enumerate(sites)}
        self.faults = self._known_faults()
        self.status = self._array("status", Size((n,)), torch.uint8)
        self.tried = self._array("tried", Size((n,)), torch.int64)
        self.values = {k: self._array(self.files[k], Size((n, *s)), d) for k, (s, d) in sites.items()}
        with_axes = [k for k, (s, _) in sites.items() if sized and len(s)]
        self.sizes = {
            k: self._array(f"{self.files[k]}-sizes", Size((n, len(sites[k][0]))), torch.int32) for k in with_axes
        }

    def _array(self, name: str, shape: Size, dtype: torch.dtype) -> Tensor:
        """Zeros, or what the file of that name holds."""
        if self.folder is None:
            return torch.zeros(shape, dtype=dtype)
        path = self.folder / f"{name}.npy"
        if not path.exists():
            kind = torch.zeros((), dtype=dtype).numpy().dtype
            np.lib.format.open_memmap(f"{path}.part", mode="w+", dtype=kind, shape=tuple(shape)).flush()
            os.replace(f"{path}.part", path)
        return torch.from_numpy(np.lib.format.open_memmap(path, mode="r+"))

    def write(self, part: Part) -> None:
        """Keep a part; then mark it as done."""
        rows = slice(part.start, part.start + part.count)
        for name, values in part.values.items():
            if isinstance(values, Tensor):
                self.values[name][rows] = values
            else:
                self._write_each(name, part.start, values)
        self.tried[part.start] = part.tried
        self._note(part.faults)
        marks = torch.full((part.count,), _GOOD, dtype=torch.uint8)
        marks[[i - part.start for i in part.faults]] = _LEFT_OUT
        self.status[rows] = marks

    def _note(self, faults: dict[int, str]) -> None:
        self.faults |= faults
        if self.folder is not None and faults:
            with (self.folder / _FAULTS).open("a") as file:
                file.writelines(json.dumps([i, f]) + "\n" for i, f in faults.items())

    def _known_faults(self) -> dict[int, str]:
        path = self.folder and self.folder / _FAULTS
        if path is None or not path.exists():
            return {}
        whole = [line for line in path.read_text().splitlines() if line.endswith("]")]  # the last may be cut off
        return dict(json.loads(line) for line in whole)

    def _write_each(self, name: str, start: int, values: list[Tensor | None]) -> None:
        for i, value in enumerate(values, start):
            if value is None:
                continue
            if name in self.sizes:
                self._make_room(name, value.shape)
                self.sizes[name][i] = torch.tensor(value.shape, dtype=torch.int32)
            index: Any = (i, *(slice(m) for m in value.shape))
            self.values[name][index] = value

    def _make_room(self, name: str, shape: Size) -> None:
        """Twice the room along an axis that is too short, so that it is seldom done."""
        now = self.values[name]
        if len(shape) != now.dim() - 1:
            raise ValueError(
                f"simulate: site '{name}' has {len(shape)} dimensions in one simulation and {now.dim() - 1} in another. "
                "Only the sizes of its dimensions may differ."
            )
        room = Size(
            have if have >= need else max(2 * have, need) for have, need in zip(now.shape[1:], shape, strict=True)
        )
        if room == now.shape[1:]:
            return
        where = f"{self.files[name]}-{'-'.join(map(str, room))}"
        larger = self._array(where, Size((self.n, *room)), now.dtype)
        larger[(slice(None), *(slice(m) for m in now.shape[1:]))] = now
        self.values[name] = larger
        if self.folder is not None:  # the old file goes last, so that a kill leaves one of them
            os.replace(self.folder / f"{where}.npy", self.folder / f"{self.files[name]}.npy")

    def _private(self, name: str) -> Tensor:
        """A site's values, of which changes do not go back to the disk."""
        if self.folder is None:
            return self.values[name]
        return torch.from_numpy(np.lib.format.open_memmap(self.folder / f"{self.files[name]}.npy", mode="c"))

    def missing(self) -> Tensor:
        """Numbers of the simulations that are still to be done."""
        return torch.nonzero(self.status == 0)[:, 0]

    def reasons(self) -> Counter[str]:
        """Why simulations were left out, and how many each."""
        return Counter(self.faults.values())

    def simulations(self, observed: tuple[str, ...], args: tuple[Any, ...], seed: int) -> Simulations:
        """The good ones. On disk they stay memory-mapped where none was left out."""
        good = self.status == _GOOD
        values = {k: self._private(k) for k in self.values}
        mask: dict[str, Tensor] = {}
        if not bool(good.all()):
            values = {k: v[good] for k, v in values.items()}
        for name, sizes in self.sizes.items():
            values[name], there = _cropped(values[name], sizes[good].long())
            mask |= {} if there is None else {name: there}
        tried = int(self.tried.sum())
        return Simulations(
            values,
            observed,
            mask=mask,
            failed=torch.nonzero(self.status == _LEFT_OUT)[:, 0],
            reasons=self.reasons(),
            args=args,
            seed=seed,
            acceptance=self.n / tried if tried else None,
        )


def _cropped(values: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor | None]:
    """Padded to the largest size only, and the mask along the axes up to the last one that differs."""
    largest = sizes.amax(0).tolist()
    values = values[(slice(None), *(slice(m) for m in largest))]
    differs = torch.nonzero((sizes != sizes[0]).any(0))[:, 0].tolist()
    if not differs:
        return values, None
    mask = torch.ones(len(sizes), *(1,) * (differs[-1] + 1), dtype=torch.bool)
    for axis in range(differs[-1] + 1):
        inside = torch.arange(largest[axis]) < sizes[:, axis, None]
        mask = mask & inside.reshape(len(sizes), *(largest[axis] if a == axis else 1 for a in range(differs[-1] + 1)))
    return values, mask


def manifest(folder: Path, wanted: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """What the folder was begun with; where it is new, ``fresh`` is written.

    Raises:
        ValueError: if it was begun with something else.
    """
    path = folder / "manifest.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "manifest.json.part"
        part.write_text(json.dumps(fresh, indent=1))
        os.replace(part, path)
        return fresh
    found = json.loads(path.read_text())
    differ = [k for k in wanted if k != "seed" and found.get(k) != wanted[k]]
    if wanted["seed"] is not None and found["seed"] != wanted["seed"]:
        differ.append("seed")
    if differ:
        now = ", ".join(f"{k} {found.get(k)!r}, now {wanted[k]!r}" for k in differ)
        raise ValueError(
            f"simulate: {folder} was begun with other settings ({now}). Give the same ones to go on, or another path."
        )
    return found
