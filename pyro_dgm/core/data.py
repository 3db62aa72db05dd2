"""Data: integers made continuous, what tells one value or program from another, and who reads which."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import sys
import sysconfig
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np
import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import Transform, _InverseTransform
from torch.distributions.utils import lazy_property

from pyro_dgm.core.devices import device_of
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import as_tensor_like, of_entries, refuse_non_finite
from pyro_dgm.core.warn import in_short

__all__ = [
    "Dequantize",
    "Fingerprints",
    "Reading",
    "ReadsData",
    "reads",
    "reads_context",
    "refuse_outside_support",
    "seems_inverted",
    "take_units",
    "was_trained",
]

_TRAINED = 50  # changes of a parameter from which a module counts as trained; not measured, chosen by hand
_UNIT_ROWS = 10_000  # from which units are taken while a fit is prepared; not measured, chosen by hand
_UNIT_BATCHES = 20  # at most, for the same; not measured, chosen by hand


class Dequantize(nn.Module):
    r"""Integers :math:`x \in \{0, \dots, K-1\}` as real numbers: :math:`y = (x + u) / K`, :math:`u \sim U(0, 1)`.

    A density on real numbers can grow without limit at integers, so it is trained on, and scored at, ``y``. Then
    :math:`\log \int q(x + u)\,du \ge \mathbb{E}_u[\log q_y(y)] - D \log K`: the right-hand side, ``log_prob + D *
    log_scale``, is a lower bound on the log probability of the integers (Theis et al. 2016, eq. 4).

    ``y`` stays strictly inside (0, 1): 255 + u rounds to 256 in float32 about once in 130,000 draws, and a logit is
    then infinite.

    Args:
        levels: K; 256 for 8-bit images.

    Raises:
        ValueError: for ``levels`` below 2, or data that are not integers from 0 to ``levels - 1``.

    Example:
        >>> d = Dequantize(4)
        >>> y = d(torch.tensor([0, 1, 3]))
        >>> d.inverse(y), bool((y > 0).all() and (y < 1).all())
        (tensor([0., 1., 3.]), True)
    """

    @checked()
    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"Dequantize: levels is {levels}, expected at least 2 (256 for 8-bit images).")
        self.levels = int(levels)

    @property
    def log_scale(self) -> float:
        """Log-derivative of y by x, for one number: -log K."""
        return -math.log(self.levels)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = as_tensor_like("Dequantize", "data", x, None)
        x = x if x.is_floating_point() else x.float()
        if not ((x >= 0) & (x < self.levels) & (x == x.floor())).all():
            raise ValueError(
                f"Dequantize: expected integers from 0 to {self.levels - 1}, got values from {float(x.min()):.4g} to "
                f"{float(x.max()):.4g}. Pass the raw levels: not divided by 255, and without noise."
            )
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
        eps = torch.finfo(x.dtype).eps
        return ((x + noise) / self.levels).clamp(eps, 1.0 - eps)

    def inverse(self, y: Tensor) -> Tensor:
        """The integers, as floats: ``floor(K y)``; values outside [0, 1) go to the nearest level."""
        y = as_tensor_like("Dequantize", "y", y, None)
        refuse_non_finite("Dequantize", y, "values")
        return (y * self.levels).floor().clamp(0, self.levels - 1)


_LIBRARIES = tuple({sysconfig.get_path(k) for k in ("stdlib", "platstdlib", "purelib", "platlib")})
_PLAIN = (type(None), bool, int, float, complex, str, type(...), torch.dtype, torch.device, torch.layout, np.generic)
_CHANGED_BY_RUNS: tuple[tuple[type, frozenset[str]], ...] = (  # attributes that say nothing of what an object is
    (nn.Module, frozenset({"_pyro_context"})),
    (
        Messenger,
        frozenset({"_vectorized", "_indices", "counter", "dim"}),
    ),  # of a plate; its dim shows in the sites' shapes
    (Transform, frozenset({"_cached_x_y", "_inv"})),
)
_SHOWN = 40  # letters of a value in a message


class Fingerprints:
    """Short texts that differ where values, or programs, do: they stay the same in another process.

    A tensor counts by shape, dtype and numbers; a container by what is in it; a function by its bytecode, its defaults and
    the values that it closes over; another object by what pickle would keep of it, and its class's code. What libraries
    define counts by name. Globals that a function reads are not followed.

    Attributes:
        hidden: names of types that do not show what they hold (an open file, a lock). They count by type only.

    Example:
        >>> prints = Fingerprints()
        >>> prints.text(torch.zeros(2)) == prints.text(torch.zeros(2)), prints.text(0.5)
        (True, '0.5')
        >>> prints.text([torch.zeros(2)]) == prints.text([torch.ones(2)])
        False
    """

    def __init__(self) -> None:
        self.hidden: set[str] = set()
        self._known: dict[int, tuple[str, Any]] = {}  # with the value, so that no other gets its id

    def text(self, value: Any) -> str:
        """What a person may see of it, and a hash of the rest."""
        if isinstance(value, _PLAIN) and len(repr(value)) <= _SHOWN:
            return repr(value)
        try:
            code = self._hash(value)
        except RecursionError:
            code = self._not_shown(value)[0]
        if isinstance(value, (Tensor, np.ndarray)):
            return f"{type(value).__name__} {tuple(value.shape)} {value.dtype} {code}"
        return f"{getattr(value, '__qualname__', type(value).__name__)} {code}"

    def _hash(self, value: Any) -> str:
        if id(value) not in self._known:
            self._known[id(value)] = ("inside itself", value)
            self._known[id(value)] = (self._new_hash(value), value)
        return self._known[id(value)][0]

    def _new_hash(self, value: Any) -> str:
        kind, *parts = self._parts(value)
        code = hashlib.sha256(f"{kind} {len(parts)}".encode())
        for part in parts:
            code.update(part if isinstance(part, (bytes, memoryview)) else self._hash(part).encode())
        return code.hexdigest()[:16]

    def _parts(self, value: Any) -> list[Any]:
        """A name of its kind, and of what it is made: bytes, or values again."""
        name = type(value).__name__
        if isinstance(value, _PLAIN):
            return [f"{name} {value!r}"]
        if isinstance(value, (bytes, bytearray)):
            return [name, bytes(value)]
        if isinstance(value, Tensor) and value.layout is torch.strided and value.device.type != "meta":
            return [f"tensor {tuple(value.shape)} {value.dtype}", _bytes_of(value)]
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return [f"array {value.shape} {value.dtype}", value.tobytes()]
        if isinstance(value, (list, tuple)):
            return [name, *value]
        if isinstance(value, dict):
            return [name, *sorted(self._hash(k) + self._hash(v) for k, v in value.items())]
        if isinstance(value, (set, frozenset)):
            return [name, *sorted(map(self._hash, value))]
        return self._parts_of_program(value) or self._parts_of_object(value)

    def _parts_of_program(self, value: Any) -> list[Any]:
        if isinstance(value, types.FunctionType):
            cells = [_content(cell) for cell in value.__closure__ or ()]
            code = f"{value.__module__}.{value.__qualname__}" if _in_library(value.__module__) else value.__code__
            return ["function", code, value.__defaults__, value.__kwdefaults__, cells]
        if isinstance(value, types.CodeType):
            return ["code", value.co_code, value.co_consts, value.co_names, value.co_varnames, value.co_freevars]
        if isinstance(value, types.MethodType):
            return ["method", value.__func__, value.__self__]
        if isinstance(value, (staticmethod, classmethod)):
            return ["method", value.__func__]
        if isinstance(value, property):
            return ["property", value.fget, value.fset]
        if isinstance(value, functools.cached_property):
            return ["property", value.func]
        if isinstance(value, types.ModuleType):
            return [f"module {value.__name__}"]
        return self._parts_of_class(value) if isinstance(value, type) else []

    def _parts_of_class(self, cls: type) -> list[Any]:
        if _in_library(cls.__module__):
            return [f"class {cls.__module__}.{cls.__qualname__}"]
        own = {k: v for k, v in vars(cls).items() if not k.startswith("__") or isinstance(v, types.FunctionType)}
        own.pop("_abc_impl", None)  # a cache of abc
        return [f"class {cls.__qualname__}", cls.__bases__, own]

    def _parts_of_object(self, value: Any) -> list[Any]:
        try:
            made = _filled(value).__reduce_ex__(4)
        except Exception:  # whatever it raises, it does not show what it holds
            return self._not_shown(value)
        if isinstance(made, str):
            return [f"object {made}", getattr(value, "__wrapped__", None)]  # a cached function is pickled by name
        build, args, state, *entries = (*made, None)[: max(len(made), 3)]
        shown = _lasting(value, state) if isinstance(state, dict) else state
        lists = [list(i) for i in entries if i is not None and not callable(i)]
        return ["object", type(value), build, args, shown, *lists]

    def _not_shown(self, value: Any) -> list[str]:
        self.hidden.add(type(value).__qualname__)
        return [f"a {type(value).__qualname__}"]


def _bytes_of(x: Tensor) -> memoryview:
    plain = x.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "an empty cell"


def _filled(value: Any) -> Any:
    """A distribution with all that it computes when asked and then keeps, so that it looks the same before and after."""
    if not isinstance(value, Distribution):
        return value
    full = copy.copy(value)
    for name in {k for cls in type(value).__mro__ for k, v in vars(cls).items() if isinstance(v, lazy_property)}:
        with suppress(Exception):
            getattr(full, name)
    return full


def _lasting(value: Any, state: dict[str, Any]) -> dict[str, Any]:
    """An object's state without what using it changes."""
    changed = {name for kind, names in _CHANGED_BY_RUNS if isinstance(value, kind) for name in names}
    if isinstance(value, _InverseTransform):
        changed -= {"_inv"}
    if isinstance(value, nn.Module) and _in_library(type(value).__module__):  # the rest of its private names are memos
        changed |= {k for k in state if k.startswith("_")} - {"_parameters", "_buffers", "_modules"}
    changed |= {k for k in state if isinstance(getattr(type(value), str(k), None), functools.cached_property)}
    return {k: v for k, v in state.items() if k not in changed}


def _in_library(module: str | None) -> bool:
    """Whether the code is installed, not written by the user."""
    name = module or "builtins"
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return name in sys.builtin_module_names or name.split(".")[0] == "pyro_dgm" or file.startswith(_LIBRARIES)


def seems_inverted(mask: Tensor, bad: Tensor) -> bool:
    """Whether a mask that should be True where an entry was seen is True at entries without a number, and False at none.

    >>> bad = torch.tensor([True, False, False])
    >>> seems_inverted(bad, bad), seems_inverted(~bad, bad)
    (True, False)
    """
    return bool((bad & mask).any()) and not bool((bad & ~mask).any())


class ReadsData(Protocol):
    """A module that reads data, in units which it takes from them."""

    def has_units(self) -> bool:
        """Whether the units were taken before, or the module was trained without."""

    def take_units(self, *args: Any, **kwargs: Any) -> None:
        """Fix the units to data, given as at a call."""


class Reading:
    """Notes what data modules read while it is open, and lets those without units take theirs.

    Attributes:
        rows: how many rows were read, by the module that read most.
    """

    def __init__(self) -> None:
        self.data: list[int] = []  # storages of the data that are given to the objective
        self.noted: dict[Any, list[tuple[Any, ...]]] = {}
        self.refused: set[Any] = set()

    @property
    def rows(self) -> int:
        return max((sum(len(data[0]) for data in noted) for noted in self.noted.values()), default=0)

    def note(self, module: ReadsData, data: tuple[Any, ...]) -> None:
        """A module's data; the first ones give it units at once, since what it reads may be huge without."""
        if module in self.refused:
            return
        if module not in self.noted:
            if module.has_units():
                self.refused.add(module)
                return
            module.take_units(*data)
        self.noted.setdefault(module, []).append(data)

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor is one of the data, or a part of one: nothing was computed to make it."""
        return x.untyped_storage()._cdata in self.data

    def close(self) -> None:
        """Take the units anew from all that was noted."""
        for module, noted in self.noted.items():
            if len(noted) > 1:
                module.take_units(*(None if part[0] is None else torch.cat(part) for part in zip(*noted, strict=True)))


_OPEN: list[Reading] = []


def reads(module: ReadsData, data: Tensor, *more: Tensor | None) -> None:
    """Said by a module of data that it reads: they give it its units while a fit is prepared."""
    if _OPEN and len(data) > 1:
        _OPEN[-1].note(module, (data, *more))


def reads_context(family: Any, context: Tensor | None) -> None:
    """Said by a family of each context: if it is data, and was not computed, it gives the family's units."""
    if _OPEN and isinstance(context, Tensor) and _OPEN[-1].holds(context):
        reads(family, context.reshape(-1, context.shape[-1]))


@contextmanager
def reading() -> Iterator[Reading]:
    """Let modules tell what they read."""
    _OPEN.append(Reading())
    try:
        yield _OPEN[-1]
    finally:
        _OPEN.pop()


def was_trained(module: nn.Module) -> bool:
    """Whether an optimiser has changed the parameters many times, as far as torch counts."""
    return max((p._version for p in module.parameters()), default=0) > _TRAINED


def take_units(run: nn.Module, batches: Iterator[tuple[Any, ...]], example: tuple[Any, ...]) -> None:
    """Run an objective on an example, and on more batches where its parts read them without having units.

    An objective that prepares its parts by itself gives them units then.
    """
    with reading() as noted:
        noted.refused = {part for module in run.modules() if hasattr(module, "prepare") for part in module.modules()}
        noted.data = _storages(example)
        run(*example)
        for _ in range(_UNIT_BATCHES - 1):
            if not noted.noted or noted.rows >= _UNIT_ROWS:
                break
            batch = next(batches)
            noted.data = _storages(batch)
            run(*batch)
    noted.close()


def _storages(args: Any) -> list[int]:
    """Where the tensors among arguments, and in containers among them, have their numbers."""
    if isinstance(args, Tensor):
        return [args.untyped_storage()._cdata] if args.layout is torch.strided else []
    values = args.values() if isinstance(args, dict) else args if isinstance(args, (tuple, list)) else ()
    return [storage for value in values for storage in _storages(value)]


def refuse_outside_support(who: str, family: Any, rows: Any) -> None:
    """Refuse rows of events outside of the support that a family was given, and say how many there are and where the first is."""
    support, event = family._support, tuple(family.event_shape)
    if not is_validation_enabled() or not isinstance(rows, Tensor) or support is None or rows.shape[1:] != event:
        return
    entries = of_entries(support)
    each = entries.event_dim == 0
    inside = (entries if each else support).check(rows.to(device_of(family)))
    if bool(inside.all()):
        return
    first = (~inside).nonzero()[0].tolist()
    column = f", column {first[1] if len(first) == 2 else first[1:]}" if first[1:] else ""
    value = f": {float(rows[tuple(first)]):.4g}" if each else ""
    raise ValueError(
        f"{who}: {int((~inside).sum())} of {inside.numel()} {'values' if each else 'rows'} lie outside the support "
        f"{in_short(support)}, the first in row {first[0]}{column}{value}. Clean the data, or build the family with support=..."
    )
