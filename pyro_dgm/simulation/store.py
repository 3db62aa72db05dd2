"""Simulations of a model, and where they are kept while they are made: in memory, or in files that survive a kill.

The files are memory-mapped. A folder holds one ``.npy`` file for each site, and ``status.npy`` with one byte for each
simulation (0 to be done, 1 good, 2 left out). A row's byte is written after its values, so what is marked is there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torch import Size, Tensor

from pyro_dgm.core.files import read_state, refuse_link, refuse_no_place, save_state
from pyro_dgm.core.kinds import checked, shown
from pyro_dgm.core.shapes import as_tensor_like, spreads
from pyro_dgm.core.warn import plain_errors
from pyro_dgm.simulation.blocks import Part
from pyro_dgm.simulation.columns import Column, MaskColumn, Sites, axes_that_differ, index_of
from pyro_dgm.simulation.folder import Kind, allocate, larger, mapped, no_room

__all__ = ["Simulations", "Store"]


class Simulations(Mapping[str, Tensor]):
    """``n`` independent draws of a model's latents and data, as a mapping from site to tensor.

    ``sims["x"]`` has shape ``(n, *site)``; ``sims[:100]`` and ``sims[index]`` are simulations again. ``len(sims)`` is the
    number of simulations, not of sites. Those of ``simulate(path=)`` stay on the disk if they have more than 256 MiB:
    ``sims[index]`` reads its rows when a site of it is asked for, and ``sims["x"]`` is memory-mapped. Sites whose size differs
    between simulations (a plate of random length) are padded with zeros at the end to the largest, and ``sims.mask`` says what
    is there.

    Args:
        values: ``{site: (n, *site)}``.
        observed: names of the data sites; the others are latents.
        mask: ``{site: (n, *sizes)}``, True where there is a value, for padded sites only. It has the axes of the site up to
            the last one whose size differs: ``(n, J)`` for data ``(n, J, 2)`` with J of random size.
        failed: numbers of the simulations that were left out, shape ``(f,)``.
        failed_latents: their parameters, ``{latent: (f, *site)}``; NaN (whole numbers: 0) where it failed before they were drawn.
        reasons: why, and how many each.
        args: the model's arguments.
        seed: from which they can be drawn again.
        acceptance: share of prior draws that a proposal accepted; None where there was none.

    Raises:
        ValueError: where the first dimensions differ, or a mask or an observed name has no site, or a name comes twice.
        TypeError: where a value is no tensor.

    Example:
        >>> sims = Simulations({"t": torch.zeros(5), "x": torch.zeros(5, 3)}, ["x"])
        >>> sims
        Simulations(5: t (), observed x (3,))
        >>> len(sims[1:3]), sims[1:3]["x"].shape
        (2, torch.Size([2, 3]))
    """

    @checked(only=("mask", "failed", "failed_latents", "reasons", "args", "seed", "acceptance"))
    def __init__(self, values: Mapping[str, Tensor], observed: Any, *, mask: Mapping[str, Tensor] | None = None,
                 failed: Tensor | None = None, failed_latents: Mapping[str, Tensor] | None = None,
                 reasons: Mapping[str, int] | None = None, args: tuple[Any, ...] = (), seed: int | None = None,
                 acceptance: float | None = None) -> None:  # fmt: skip
        if not isinstance(values, Mapping):
            raise TypeError(f"Simulations: values is {shown(values)}, expected a dictionary of tensors, by site.")
        self._values = values if isinstance(values, Sites) else Sites(values)
        if not isinstance(observed, Iterable) or not all(isinstance(name, str) for name in observed):
            raise TypeError(f"Simulations: observed is {shown(observed)}, expected a list of names.")
        self.observed = (observed,) if isinstance(observed, str) else tuple(observed)
        self.mask = mask if isinstance(mask, Sites) else Sites(mask or {})
        self.failed = torch.zeros(0, dtype=torch.long) if failed is None else failed
        self.failed_latents = dict(failed_latents or {})
        self.reasons = dict(reasons or {})
        self.args = tuple(args)
        self.seed = seed
        self.acceptance = acceptance
        self._refuse_bad()

    def _refuse_bad(self) -> None:
        for k, v in (*self._values.made.items(), *self.mask.made.items()):
            if not isinstance(v, Tensor) or not v.dim():
                what = "a number" if isinstance(v, Tensor) else f"a {type(v).__name__}"
                raise TypeError(f"Simulations: site '{k}' is {what}, expected a tensor (n, *site).")
            if not v.is_complex():
                as_tensor_like("Simulations", f"site '{k}'", v, None)  # sparse ones and their like are refused
        sizes = {k: sites.shape(k)[0] for sites in (self._values, self.mask) for k in sites}
        if len(set(sizes.values())) != 1:
            raise ValueError(
                f"Simulations: sites have different numbers of rows, {sizes}; expected one number for all."
            )
        unknown = [k for k in (*self.observed, *self.mask) if k not in self._values]
        if unknown:
            raise ValueError(f"Simulations: {unknown} are not among the sites {list(self._values)}.")
        for k, mask in self.mask.made.items():
            _refuse_mask(k, mask, tuple(self._values.shape(k)))
        shapes = {k: tuple(getattr(v, "shape", ())) for k, v in self.failed_latents.items()}
        if any(shape[:1] != (len(self.failed),) for shape in shapes.values()):
            raise ValueError(
                f"Simulations: failed_latents have shapes {shapes}, expected tensors of {len(self.failed)} rows, one for each "
                "number in failed."
            )
        if len(set(self.observed)) < len(self.observed):
            raise ValueError(f"Simulations: observed={list(self.observed)} names a site twice. Give each name once.")

    @overload
    def __getitem__(self, key: str) -> Tensor: ...
    @overload
    def __getitem__(self, key: slice | Tensor) -> Simulations: ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if key not in self._values:
                raise KeyError(f"No site '{key}' among the simulated ones, {list(self._values)}.")
            return self._values[key]
        index = index_of(key, len(self))
        values, mask = self._values.picked(index), self.mask.picked(index)
        return Simulations(values, self.observed, mask=mask, args=self.args, seed=None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return self._values.shape(next(iter(self._values)))[0]

    @property
    def on_disk(self) -> bool:
        """Whether rows stay on the disk until they are asked for; ``fit`` then reads them in parts."""
        return self._values.on_disk

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the sites that are not observed."""
        return tuple(k for k in self._values if k not in self.observed)

    def __repr__(self) -> str:
        site = lambda k: f"{k} {tuple(self._values.shape(k)[1:])}{' masked' if k in self.mask else ''}"  # noqa: E731
        parts = [site(k) for k in self.latents] + [f"observed {site(k)}" for k in self.observed]
        left_out = f"; {len(self.failed)} failed and left out" if len(self.failed) else ""
        accepted = "" if self.acceptance is None else f"; {self.acceptance:.2g} of the prior accepted"
        return f"Simulations({len(self):,}: {', '.join(parts)}{left_out}{accepted})"

    @checked()
    def save(self, path: str | Path) -> None:
        """Write everything but the model's arguments to one file, whole or not at all.

        Raises:
            ValueError: if the path is a folder, a link, or in a folder that is not there.
            OSError: if nothing can be written there, or the disk is full; a file that was there stands.
        """
        refuse_no_place("Simulations.save: the file", Path(path))
        state: dict[str, Any] = {"values": {k: v.clone() for k, v in self._values.items()}, "mask": dict(self.mask)}
        state |= {"failed": self.failed}
        state |= {"observed": list(self.observed), "reasons": self.reasons, "seed": self.seed}
        state |= {"failed_latents": {k: v.clone() for k, v in self.failed_latents.items()}}
        save_state("Simulations.save: the file", path, state | {"acceptance": self.acceptance})

    @classmethod
    @checked()
    def load(cls, path: str | Path) -> Simulations:
        """Read what :meth:`save` wrote (with ``weights_only=True``).

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, or holds something else.
        """
        advice = "Delete it, and save the simulations again."
        state = read_state("Simulations.load", path, "another kind of file", advice)
        known = {"values", "observed", "mask", "failed", "failed_latents", "reasons", "seed", "acceptance"}
        if not isinstance(state, dict) or not {"values", "observed"} <= state.keys() <= known:
            raise ValueError(f"Simulations.load: {path} was not written by Simulations.save. Give the file that was.")
        return cls(state.pop("values"), state.pop("observed"), **state)


_GOOD, _LEFT_OUT = 1, 2
_IN_MEMORY = 2**28  # bytes of simulations up to which a folder's are read at once. Not measured; chosen by hand
_WRITTEN = (
    2**26
)  # bytes after which files are mapped anew: pages that were written count as this process's memory till then
_FAULTS = "faults.jsonl"
_LOST = "a reason that was lost with its line of faults.jsonl"


class Store:
    """Rows of all sites for ``n`` simulations, filled in any order.

    Args:
        n: number of simulations.
        sites: ``{site: (shape, dtype)}`` of a single run.
        folder: on disk; None for memory.
        sized: the size of a site may differ between simulations.
        settings: what to note in a new folder; None for one whose files are there.
    """

    def __init__(
        self,
        n: int,
        sites: dict[str, Kind],
        folder: Path | None,
        sized: bool,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.n = n
        self.folder = folder
        self.files = {k: f"site-{i}" for i, k in enumerate(sites)}
        kinds: dict[str, Kind] = {"status": (Size((n,)), torch.uint8), "tried": (Size((n,)), torch.int64)}
        kinds |= {self.files[k]: (Size((n, *s)), d) for k, (s, d) in sites.items()}
        with_axes = [k for k, (s, _) in sites.items() if sized and len(s)]
        kinds |= {f"{self.files[k]}-sizes": (Size((n, len(sites[k][0]))), torch.int32) for k in with_axes}
        if folder is not None and settings is not None:
            allocate(folder, kinds, settings)
        grown = {self.files[k] for k in with_axes}
        arrays = {k: self._array(k, kind, k in grown) for k, kind in kinds.items()}
        self.status = arrays["status"]
        self.tried = arrays["tried"]
        self.values = {k: arrays[file] for k, file in self.files.items()}
        self.written = 0
        self.sizes = {k: arrays[f"{self.files[k]}-sizes"] for k in with_axes}
        self._refuse_bad()
        self.faults = self._known_faults()

    def _array(self, name: str, kind: Kind, grown: bool) -> Tensor:
        shape, dtype = kind
        if self.folder is None:
            with plain_errors():
                return torch.zeros(shape, dtype=dtype)
        return mapped(self.folder, name, kind, sized=grown)

    def _refuse_bad(self) -> None:
        """Marks and sizes that were never written here."""
        bad = {"status": self.status > _LEFT_OUT, "tried": self.tried < 0}
        for k, sizes in self.sizes.items():
            room = torch.tensor(self.values[k].shape[1:])
            bad[f"{self.files[k]}-sizes"] = (sizes < 0) | (sizes > room)
        for name in [k for k, wrong in bad.items() if bool(wrong.any())]:
            raise ValueError(
                f"simulate: {self.folder}/{name}.npy is damaged: it holds values that are never written there. It cannot be "
                f"known which draws are good: give another path, or delete {self.folder}."
            )

    def write(self, part: Part) -> None:
        """Keep a part; then mark it as done."""
        rows = slice(part.start, part.start + part.count)
        for name, values in part.values.items():
            if isinstance(values, Tensor):
                self.values[name][(rows, *(slice(m) for m in values.shape[1:]))] = values
                if name in self.sizes:
                    self.sizes[name][rows] = torch.tensor(values.shape[1:], dtype=torch.int32)
            else:
                self._write_each(name, part.start, values)
        self._let_go(part)
        self.tried[part.start] = part.tried
        self._note(part.faults)
        marks = torch.full((part.count,), _GOOD, dtype=torch.uint8)
        marks[[i - part.start for i in part.faults]] = _LEFT_OUT
        self.status[rows] = marks

    def _let_go(self, part: Part) -> None:
        """Map the files anew from time to time; the system writes what was written to them."""
        self.written += part.count * sum(v[0].numel() * v.itemsize for v in self.values.values())
        if self.folder is None or self.written < _WRITTEN:
            return
        self.written = 0
        for k, v in self.values.items():
            self.values[k] = mapped(self.folder, self.files[k], (v.shape, v.dtype))

    def _note(self, faults: dict[int, str]) -> None:
        self.faults |= faults
        if self.folder is None or not faults:
            return
        text = "".join(json.dumps([i, f]) + "\n" for i, f in faults.items())
        try:
            with (self.folder / _FAULTS).open("a") as file:
                file.write(text)
        except OSError as error:
            raise no_room(self.folder, len(text), error) from error

    def _known_faults(self) -> dict[int, str]:
        """Why simulations were left out; lines that a kill cut off say nothing."""
        path = self.folder and self.folder / _FAULTS
        if path:
            refuse_link("simulate: the file", path)
        text = path.read_text(encoding="utf-8", errors="replace") if path and path.exists() else ""
        if path and text and not text.endswith("\n"):
            with path.open("a") as file:  # the next line must not go on with this one
                file.write("\n")
        read = dict(entry for entry in map(_fault, text.splitlines()) if entry)
        return {i: read.get(i, _LOST) for i in torch.nonzero(self.status == _LEFT_OUT)[:, 0].tolist()}

    def _write_each(self, name: str, start: int, values: list[Tensor | None]) -> None:
        for i, value in enumerate(values, start):
            if value is None:
                if self.values[name].is_floating_point():
                    self.values[name][i] = torch.nan
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
        self.values[name] = self._larger(name, now, Size((self.n, *room)))

    def _larger(self, name: str, now: Tensor, shape: Size) -> Tensor:
        if self.folder is not None:
            return larger(self.folder, self.files[name], now, shape)
        new = torch.zeros(shape, dtype=now.dtype)
        new[tuple(slice(m) for m in now.shape)] = now
        return new

    def _column(self, name: str, rows: Tensor | None, sizes: Tensor | None) -> Tensor | Column:
        """Some rows of a site, without the room that none of them needs."""
        now = self.values[name]
        shape = now.shape[1:] if sizes is None else Size(sizes.amax(0).tolist())
        if self.folder is not None:
            return Column(self.folder, self.files[name], (now.shape, now.dtype), shape, rows)
        cut = now[(slice(None), *(slice(m) for m in shape))]
        return cut if rows is None else cut[rows]

    def missing(self) -> Tensor:
        """Numbers of the simulations that are still to be done."""
        return torch.nonzero(self.status == 0)[:, 0]

    def reasons(self) -> Counter[str]:
        """Why simulations were left out, and how many each."""
        return Counter(self.faults.values())

    def simulations(self, observed: tuple[str, ...], args: tuple[Any, ...], seed: int) -> Simulations:
        """The good ones. On disk they stay there if they are many."""
        good = self.status == _GOOD
        left_out = not bool(good.all())
        rows = torch.nonzero(good)[:, 0] if left_out else None
        sizes = {k: (v if rows is None else v[rows]).long() for k, v in self.sizes.items()}
        values = Sites({k: self._column(k, rows, sizes.get(k)) for k in self.values})
        padded = {k: axes_that_differ(v) for k, v in sizes.items()}
        mask = Sites({k: MaskColumn(sizes[k], values.shape(k)[1 : 1 + axes]) for k, axes in padded.items() if axes})
        if self.folder is None or values.bytes() <= _IN_MEMORY:
            values, mask = values.in_memory(), mask.in_memory()
        tried = int(self.tried.sum())
        return Simulations(
            values,
            observed,
            mask=mask,
            failed=torch.nonzero(~good)[:, 0],
            failed_latents={k: self.values[k][~good] for k in self.values if k not in observed} if left_out else {},
            reasons=self.reasons(),
            args=args,
            seed=seed,
            acceptance=self.n / tried if tried else None,
        )


def _fault(line: str) -> tuple[int, str] | None:
    try:
        number, reason = json.loads(line)
    except (ValueError, TypeError):
        return None
    return (number, reason) if isinstance(number, int) and isinstance(reason, str) else None


def _refuse_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a mask that is not boolean, or whose sizes are not the first ones of its site."""
    if mask.dtype != torch.bool or not spreads(mask.shape[::-1], shape[::-1]):
        line = "" if mask.dtype == torch.bool else " Of 0 and 1 it is mask.bool()."
        raise ValueError(
            f"Simulations: the mask of '{name}' has {mask.dtype} and shape {tuple(mask.shape)}, expected torch.bool (True where "
            f"there is a datum) and {shape}, or its first sizes.{line}"
        )
