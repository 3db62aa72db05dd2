"""Data in, batches out: whole, in shuffled minibatches, or from a DataLoader."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyro_dgm.core.data import Fingerprints, seems_inverted
from pyro_dgm.core.devices import put_random_states, random_states, to_device
from pyro_dgm.core.shapes import as_tensor_like, from_arrays

__all__ = [
    "BatchStream",
    "FEW",
    "Batches",
    "ChangedBatches",
    "as_args",
    "described",
    "few_rows",
    "first_rows",
    "held_out_split",
    "largest_of",
    "named_tensors",
    "non_finite",
    "picked",
    "refuse_non_finite_data",
    "row_count",
    "some_rows",
]

FEW = 3_000  # rows up to which a density is fitted with care for them (docs/benchmarks/small.md)
_FIRST_ROWS = 10_000  # from which units are taken. Not measured; chosen by hand


# Of rows on the disk. Not measured; chosen by hand.
_RUN = 2**20  # bytes that lie together and are read together
_SHUFFLED = 2**26  # bytes of such runs, from all over the data, that are mixed in memory


class Batches:
    """Batches of ``data``; ``iter`` gives them without end. ``epoch`` is their number in one pass, None for whole data.

    Args:
        data: a tensor, a tuple of an objective's arguments, a mapping of tensors (one argument: a batch is then a
            dictionary), or a DataLoader. Mappings on the disk (:func:`on_disk`) are read in parts, in an order that is random
            within parts of 64 MiB.
        batch_size: rows per batch; None passes everything each time.
        device: where batches are moved; None leaves them.
    """

    def __init__(self, data: Any, batch_size: int | None, device: torch.device | None = None) -> None:
        self.device = device
        self.loader = data if isinstance(data, DataLoader) else None
        self.args = () if self.loader else as_args(data)
        self.rows = None if self.loader or batch_size is None else _rows(self.args)
        self.args = self.args if self.rows else to_device(self.args, device)
        self.batch_size = int(batch_size or 0)
        self.in_parts = self.rows is not None and any(map(on_disk, self.args))
        self.epoch = self._epoch()
        self.agreed: Callable[[Tensor], Tensor] = lambda order: order  # on the order of rows, among several processes

    def _epoch(self) -> int | None:
        if self.loader is not None:
            return len(self.loader)
        return None if self.rows is None else -(-self.rows // self.batch_size)

    def example(self) -> tuple[Any, ...]:
        """Arguments for a first run: everything, or one batch."""
        if self.loader is not None:
            return to_device(as_args(next(iter(self.loader))), self.device)
        return self.args if self.rows is None else self._take(torch.arange(min(self.batch_size, self.rows)))

    def __iter__(self) -> BatchStream:
        return BatchStream(self)

    def without_end(self) -> Iterator[tuple[Any, ...]]:
        """One pass after the other, each in an order of its own."""
        while True:
            yield from self._one_pass()

    def _one_pass(self) -> Iterable[tuple[Any, ...]]:
        if self.loader is not None:
            return (to_device(as_args(batch), self.device) for batch in self.loader)
        if self.rows is None:
            return [self.args]
        if self.in_parts:
            return self._in_parts(self.rows)
        return (self._take(index) for index in self.agreed(torch.randperm(self.rows)).split(self.batch_size))

    def _in_parts(self, rows: int) -> Iterator[tuple[Any, ...]]:
        """Runs of rows in a random order, many at a time, which are mixed in memory."""
        each = _bytes_of_row(self.args)
        runs = torch.arange(rows).split(max(1, _RUN // each))
        order = torch.cat([runs[i] for i in self.agreed(torch.randperm(len(runs))).tolist()])
        for part in order.split(self.batch_size * max(1, _SHUFFLED // (each * self.batch_size))):
            read = picked(self.args, part)
            refuse_non_finite_data(read)
            for index in self.agreed(torch.randperm(len(part))).split(self.batch_size):
                yield to_device(picked(read, index), self.device)

    def _take(self, index: Tensor) -> tuple[Any, ...]:
        return to_device(picked(self.args, index), self.device)


class BatchStream:
    """Batches without end; a checkpoint can keep its place within an epoch, and the random state with it."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.epoch = batches.epoch
        self.position = 0
        self._epoch_rng = random_states()
        self._iterator = batches.without_end()

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> tuple[Any, ...]:
        if self.epoch and self.position % self.epoch == 0:
            self._epoch_rng = random_states()
        self.position += 1
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """What :meth:`resume` needs."""
        return {"position": self.position, "epoch_rng": self._epoch_rng, "rng": random_states()}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a kept state: the batches of the epoch so far are drawn again and dropped."""
        put_random_states(state["epoch_rng"])
        self._iterator = self.batches.without_end()
        done = state["position"] % self.epoch if self.epoch else 0
        self.position = state["position"] - done
        for _ in range(done):
            next(self)
        put_random_states(state["rng"])


class ChangedBatches:
    """Batches on their way through a change, such as dequantisation."""

    def __init__(self, stream: BatchStream, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> None:
        self.stream = stream
        self.change = change

    def __iter__(self) -> ChangedBatches:
        return self

    def __next__(self) -> tuple[Any, ...]:
        return self.change(next(self.stream))


def held_out_split(data: Any, fraction: float) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Split the rows of all tensors into training and held-out data, at random."""
    args = as_args(data)
    rows = _rows(args)
    held = max(1, round(fraction * rows))
    if not 0.0 < fraction < 1.0 or held >= rows:
        raise ValueError(
            f"fit: validation={fraction} of {rows} rows; expected a fraction that leaves rows on both sides."
        )
    order = torch.randperm(rows)
    kept, left = order[held:], picked(args, order[:held])
    if any(map(on_disk, args)):  # what lies together is read together
        return tuple(a[kept.sort().values] if on_disk(a) else picked((a,), kept)[0] for a in args), left
    return picked(args, kept), left


def as_args(data: Any) -> tuple[Any, ...]:
    """The objective's arguments that data stand for, apart from the graph that made them: a fit goes through it many times."""
    args = tuple(data) if isinstance(data, tuple | list) else (data,)
    args = from_arrays("fit", tuple(_as_dict(a) if isinstance(a, Mapping) and not on_disk(a) else a for a in args))
    return tuple(_detached(a) for a in args)


def on_disk(data: Any) -> bool:
    """Whether it is a mapping whose rows are read when they are asked for: large :class:`~pyro_dgm.Simulations` of a folder."""
    return isinstance(data, Mapping) and getattr(data, "on_disk", False)


def _detached(value: Any) -> Any:
    if on_disk(value):
        return value
    if isinstance(value, Mapping):
        return {k: _detached(v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_detached(v) for v in value)
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def largest_of(objective: nn.Module, batches: Batches) -> int:
    """About how many entries the largest tensor of a step has: rows, or draws, times the widest layer, or times the data."""
    widest = max((max(p.shape, default=1) for p in objective.parameters()), default=1)
    tensors = [t for _, t in named_tensors(batches.example())]
    rows = max((len(t) for t in tensors if t.dim()), default=1)
    entries = max((t.numel() for t in tensors), default=1)
    draws = getattr(getattr(objective, "elbo", objective), "num_particles", 1)
    return max(rows * widest, draws * widest, draws * entries)


def described(data: Any) -> Any:
    """Data in few words that tell other data apart: of tensors shape, dtype and a checksum of the values."""
    if isinstance(data, DataLoader):
        tensors = getattr(data.dataset, "tensors", None)
        return [f"a loader of {len(data)} batches", data.batch_size, described(tensors)]
    if on_disk(data):
        return _described_on_disk(data)
    if isinstance(data, Mapping):
        return {str(k): described(v) for k, v in data.items()}
    if isinstance(data, tuple | list):
        return [described(v) for v in data]
    if isinstance(data, Tensor):
        return _described_tensor(data)
    if isinstance(data, np.ndarray):
        return Fingerprints().text(data)
    return repr(data) if isinstance(data, bool | int | float | str | None) else type(data).__name__


def _described_tensor(x: Tensor) -> str:
    x = x.detach().cpu().to_dense()
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} (checksum {_checksum(x):08x})"


def _checksum(x: Tensor, before: int = 0) -> int:
    return zlib.crc32(x.reshape(-1).contiguous().view(torch.uint8).numpy().data, before)


def _described_on_disk(data: Any) -> list[Any]:
    """A checksum of all, part by part."""
    found: dict[str, int] = {}
    rows = max(1, _SHUFFLED // _bytes_of_row((data,)))
    for part in torch.arange(len(data)).split(rows):
        for name, x in named_tensors(picked((data,), part)):
            found[name] = _checksum(x, found.get(name, 0))
    return ["read in parts", {k: f"checksum {v:08x}" for k, v in found.items()}]


def _as_dict(data: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as a dictionary; masks that it has as an attribute (simulations of ragged plates) under "mask"."""
    masks = getattr(data, "mask", None)
    return {k: data[k] for k in data} | ({"mask": dict(masks)} if masks else {})


def picked(args: tuple[Any, ...], index: Tensor) -> tuple[Any, ...]:
    """These rows of every tensor, also of those in mappings."""
    return tuple(_as_dict(a[index]) if on_disk(a) else _of_tensors(lambda t: t[index.to(t.device)], a) for a in args)


def _bytes_of_row(args: tuple[Any, ...]) -> int:
    return max(1, sum(t.numel() * t.itemsize for _, t in named_tensors(picked(args, torch.arange(1))) if t.dim()))


def _of_tensors(change: Callable[[Tensor], Tensor], argument: Any) -> Any:
    if isinstance(argument, Mapping):
        return {k: _of_tensors(change, v) for k, v in argument.items()}
    return change(argument) if isinstance(argument, Tensor) and argument.dim() else argument


def named_tensors(args: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    """All tensors among the arguments and in mappings among them, with a name for messages."""
    for i, a in enumerate(args):
        entries = {f"'{k}'": v for k, v in a.items()} if isinstance(a, Mapping) else {f"argument {i}": a}
        yield from ((name, value) for name, value in entries.items() if isinstance(value, Tensor))


def row_count(data: Any) -> int | None:
    """Rows of the data, where they are tensors with one first dimension."""
    if isinstance(data, DataLoader):
        return None
    sizes = _lengths(as_args(data))
    return sizes.pop() if len(sizes) == 1 else None


def _lengths(args: tuple[Any, ...]) -> set[int]:
    """First dimensions of all tensors; of those on the disk without reading them."""
    in_memory = named_tensors(tuple(a for a in args if not on_disk(a)))
    return {a.shape[0] for _, a in in_memory if a.dim()} | {len(a) for a in args if on_disk(a)}


def _rows(args: tuple[Any, ...]) -> int:
    if any(a.layout is not torch.strided for _, a in named_tensors(tuple(a for a in args if not on_disk(a)))):
        raise TypeError("fit: minibatches need dense tensors, got sparse ones. Convert them: x.to_dense().")
    sizes = _lengths(args)
    if len(sizes) != 1:
        raise ValueError(
            f"fit: minibatches need tensors with one common first dimension, got {sorted(sizes) or 'no tensors'}. "
            "Pass tensors of equal length, a DataLoader, or leave batch_size out."
        )
    return sizes.pop()


def refuse_non_finite_data(args: tuple[Any, ...]) -> None:
    """Refuse tensors with NaN or infinity where no mask says that they are missing."""
    report = non_finite(args)
    if report:
        raise ValueError(f"fit: {report}. Clean the data, or model what is missing with a boolean mask.")


def non_finite(args: tuple[Any, ...]) -> str:
    """Which tensors among the arguments hold NaN or infinity; empty where none does.

    Entries that a boolean tensor of the same shape, a mask, says are missing are not looked at.
    """
    named = list(named_tensors(args))
    seen = {mask.shape: mask for _, mask in named if mask.dtype == torch.bool}
    dense = [(name, a) for name, a in named if a.is_floating_point() and a.layout is torch.strided and not a.is_meta]
    found = [(a, _bad_entries(name, a, seen.get(a.shape))) for name, a in dense]
    return "; ".join(text + _mask_of_numbers(a, named) for a, text in found if text)


def _mask_of_numbers(a: Tensor, named: list[tuple[str, Tensor]]) -> str:
    """What to write where a mask was given as numbers."""
    for name, mask in named:
        if mask.shape == a.shape and mask.dtype != torch.bool and bool(((mask == 0) | (mask == 1)).all()):
            return f". {name} holds 0 and 1 as {mask.dtype}; a mask is boolean: pass it as .bool()"
    return ""


def _bad_entries(name: str, a: Tensor, seen: Tensor | None) -> str:
    if a.isfinite().all():
        return ""
    bad = ~a.isfinite()
    count = int((bad if seen is None else bad & seen).sum())
    if not count:
        return ""
    inverted = seen is not None and seems_inverted(seen, bad)
    told = ", all where the mask is True, which says seen: it seems to be inverted, pass ~mask" if inverted else ""
    return f"{name} (shape {tuple(a.shape)}) holds {count} NaN or infinite entries{told}"


def few_rows(batches: Iterator[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """All rows behind the batches of a fit, each once, where they are few; None where they are many, or not known."""
    if isinstance(batches, ChangedBatches):
        rows = few_rows(batches.stream)
        return None if rows is None else batches.change(rows)
    if not isinstance(batches, BatchStream) or batches.batches.loader is not None:
        return None
    count = row_count(batches.batches.args)
    if count is None or count > FEW:
        return None
    return picked(batches.batches.args, torch.arange(count)) if batches.batches.in_parts else batches.batches.args


def some_rows(batches: Iterator[tuple[Any, ...]], most: int) -> tuple[Any, ...] | None:
    """So many of the rows behind the batches of a fit, at most, in a random order; None where they are not known."""
    if isinstance(batches, ChangedBatches):
        rows = some_rows(batches.stream, most)
        return None if rows is None else batches.change(rows)
    if not isinstance(batches, BatchStream) or batches.batches.rows is None:
        return None
    return batches.batches._take(torch.randperm(batches.batches.rows)[:most])


def first_rows(
    batches: Iterator[tuple[Any, ...]], least: int = _FIRST_ROWS, most_batches: int = 20
) -> tuple[Tensor, Tensor | None]:
    """The next rows of the data with their contexts: so many at least, where the batches suffice for it."""
    found: list[tuple[Any, ...]] = []
    while len(found) < most_batches and sum(len(batch[0]) for batch in found) < least:
        found.append(next(batches))
    columns = [
        torch.cat([as_tensor_like("fit", "data", part, None) for part in parts]) for parts in zip(*found, strict=True)
    ]
    return columns[0], columns[1] if len(columns) > 1 else None
