"""A function that is called often, recorded once as a list of tensor operations, and replayed without its Python.

The list is what torch did in one call. It is that of every call if the function has no control flow on values, draws nothing
(or draws with torch only), and all that it reads is what it was. The first two are watched while it is recorded, and replays
are compared with the function at other points; of what it reads a snapshot is taken, which is looked at before each replay.
Wherever that fails the function is called, as if nothing had been recorded.
"""

from __future__ import annotations

import dis
import enum
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.tape import PLAIN, Function, Listener, Outputs, Tape, UnrecordableError, as_they_were
from pyro_dgm.core.upstream import in_func

__all__ = ["Recordable", "Records", "with_gradients"]

# Calls without a record at which one is tried for the first, second and last time. A record with its checks costs as much as
# 10 to 20 calls save (docs/howto/time.md has the table), so nobody loses more than twice what he would have gained.
_TRIED_AT = (10, 40, 160)
_CLOSE = 1e-5  # relative, between a replay and the function; on the CPU both were found to have the same bits
_ELSEWHERE = ((1.0, 0.1), (-1.0, 0.0), (10.0, 1.0))  # scale and shift of points where they are compared; chosen by hand
_NEARBY = 0.01  # standard deviation by which learned tensors are moved there; chosen by hand
_DEVICES = ("cpu", "cuda")  # what was recorded elsewhere is not known to be right
_MOST_SEEN = 5_000  # objects that are watched, beyond which nothing is recorded. Not measured; chosen by hand


class Recordable(NamedTuple):
    """A function that may be recorded, and what it depends on.

    Attributes:
        function: returns tensors, or None among them, apart from any graph.
        reads: what it reads besides its inputs: a record is right as long as these are the same objects, and hold the same.
        same: objects of which it is enough that they are the same.
        learned: leaf tensors whose values change from call to call. A function that reads others with gradients stays as it is.
        draws: whether it may draw random numbers of torch's. A replay draws the same.
    """

    function: Function
    reads: tuple[Any, ...]
    same: tuple[Any, ...] = ()
    learned: tuple[Tensor, ...] = ()
    draws: bool = False


class Records:
    """What was recorded of one function, by shapes. A copy records anew."""

    def __init__(self) -> None:
        self._calls: dict[Any, int] = {}  # without a record
        self._tries: dict[Any, int] = {}
        self._known: dict[Any, _Record] = {}

    def __reduce__(self) -> Any:
        return type(self), ()

    def __len__(self) -> int:
        return len(self._known)

    def replay(self, asked: Recordable, *inputs: Tensor) -> Outputs | None:
        """What the function returns for these inputs; None where it has to be called."""
        key = _surroundings([*inputs, *asked.learned[:1]])
        if key is None:
            return None
        record = self._known.get(key)
        if record is not None and not record.holds(asked):
            del self._known[key]
            self._calls[key] = 0
            record = None
        try:
            record = record or self._counted(key, asked, inputs)
            return None if record is None else record.tape.replay(*inputs)
        except RuntimeError:  # of a matrix that cannot be factorised, say: the function knows what to do
            return None

    def _counted(self, key: Any, asked: Recordable, inputs: tuple[Tensor, ...]) -> _Record | None:
        """A new record, if it is time for one."""
        tries = self._tries.get(key, 0)
        self._calls[key] = calls = self._calls.get(key, 0) + 1
        if tries >= len(_TRIED_AT) or calls < _TRIED_AT[tries] or torch._C._len_torch_dispatch_stack():
            return None
        self._tries[key] = tries + 1
        try:
            with fork_rng():
                self._known[key] = record = _checked(asked, tuple(x.detach() for x in inputs))
        except Exception:  # the function is called instead, and says itself what is wrong
            return None
        return record


class _Record:
    """The tape of a call, and what has to stay as it is for it to be right."""

    def __init__(self, asked: Recordable, inputs: tuple[Tensor, ...]) -> None:
        self.given = (*asked.reads, *asked.same, *asked.learned)
        self.seen = _Snapshot(asked.reads)
        self.tape = Tape(asked.function, inputs, asked.learned, asked.draws)

    def holds(self, asked: Recordable) -> bool:
        """Whether all that the function reads is what it was."""
        now = (*asked.reads, *asked.same, *asked.learned)
        if len(now) != len(self.given) or not all(map(is_, now, self.given)):
            return False
        return self.seen.unchanged() and self.tape.holds()


def _checked(asked: Recordable, inputs: tuple[Tensor, ...]) -> _Record:
    """A record that gives what the function gives, also elsewhere, and with other values of what is learned."""
    record = _Record(asked, inputs)
    for seed, (scale, shift) in enumerate(_ELSEWHERE):
        elsewhere = [scale * x + shift for x in inputs]
        with _moved(asked.learned, seed):
            expected, found = (_outcome(run, elsewhere, seed) for run in (asked.function, record.tape.replay))
        if not _close(expected, found) or not record.holds(asked):
            raise UnrecordableError("A replay differs from the function.")
    return record


def _surroundings(tensors: list[Tensor]) -> Any:
    """What a call depends on besides values; None where other tools of torch look at it, or take part."""
    outer = torch._C._len_torch_dispatch_stack()
    if (
        torch._C._len_torch_function_stack() > (outer > 0)
        or (outer and not isinstance(torch._C._get_dispatch_stack_at(0), Listener))
        or in_func()
        or torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or any(type(x) not in PLAIN or x.device.type not in _DEVICES for x in tensors)
        or any(map(torch.is_autocast_enabled, _DEVICES))
    ):
        return None
    shapes = tuple((x.shape, x.dtype, x.device) for x in tensors)
    return shapes, torch.get_default_dtype(), torch.distributions.Distribution._validate_args


@contextmanager
def _moved(learned: tuple[Tensor, ...], seed: int) -> Iterator[None]:
    """Other values nearby, which torch does not count as changes: graphs that were made before stay what they are."""
    before = [p.data for p in learned]
    try:
        for p, value in zip(learned, before, strict=True):
            p.data = value + seed * _NEARBY * torch.randn_like(value)
        yield
    finally:
        for p, value in zip(learned, before, strict=True):
            p.data = value


def _outcome(function: Function, inputs: list[Tensor], seed: int) -> Outputs | None:
    """What a function returns, and where it leaves the random numbers; None where it fails."""
    try:
        with fork_rng(seed):
            return *function(*inputs), torch.get_rng_state().double()
    except RuntimeError:
        return None


def _close(expected: Outputs | None, found: Outputs | None) -> bool:
    if expected is None or found is None:
        return expected is found
    pairs = zip(expected, found, strict=True)
    return all(a is b if a is None or b is None else _close_tensors(a, b) for a, b in pairs)


def _close_tensors(a: Tensor, b: Tensor) -> bool:
    size = a[a.isfinite()].abs()
    smallest = _CLOSE * float(size.median()) if len(size) else 0.0
    return torch.allclose(a, b, rtol=_CLOSE, atol=smallest, equal_nan=True)


def with_gradients(value: Tensor, gradients: Outputs, tensors: list[Tensor]) -> Tensor:
    """The value, with these gradients towards the tensors: those of one number, or of one number for each row."""
    return _WithGradients.apply(value, gradients, *tensors)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Outputs, *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A recorded step or density has first derivatives only, but create_graph=True asks for more. Ask them of a new "
                "objective (a copy will do): its first calls are not recorded."
            )
        if not grad.dim():
            present = iter(torch._foreach_mul([g for g in ctx.gradients if g is not None], grad))
            return None, None, *(None if g is None else next(present) for g in ctx.gradients)
        return None, None, *(g * grad.reshape(grad.shape + (1,) * (g.dim() - grad.dim())) for g in ctx.gradients)


# --- What a function reads ---

_LIBRARIES = {*sys.stdlib_module_names, "torch", "pyro", "zuko", "numpy", "opt_einsum", "pyro_dgm"}  # change nothing
_FIXED = (
    (type(None), bool, int, float, complex, str, bytes, range, slice, enum.Enum, weakref.ref, np.generic)
    + (type(...), type(NotImplemented))
    + (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.finfo, torch.iinfo)
    + (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType)
    + (types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType, types.CodeType)
)
_PARTS: dict[Any, tuple[str, ...]] = {
    partial: ("func", "args", "keywords"),
    types.MethodType: ("__func__", "__self__"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget",),
}


class _Snapshot:
    """What objects are made of: attributes, entries, and for a function its globals and its closure, however deep.

    Tensors count by identity and version, those with gradients by identity. What cannot be looked into, such as an array of
    numpy, is refused.
    """

    def __init__(self, things: Iterable[Any]) -> None:
        self.known: dict[Any, Any] = {}
        self.readers: list[Callable[[], Iterable[Any]]] = []
        self.held: list[Any] = []
        self.tensors: dict[int, tuple[Tensor, int]] = {}
        self._look(tuple(things))

    def unchanged(self) -> bool:
        """Whether everything is as it was."""
        now = [*chain.from_iterable([read() for read in self.readers])]
        return len(now) == len(self.held) and all(map(is_, now, self.held)) and as_they_were(self.tensors.values())

    def _hold(self, read: Callable[[], Iterable[Any]], names: tuple[str, ...] = ()) -> None:
        """Watch values that may be others later; of modules among them what has one of the names."""
        held = tuple(read())
        self.readers.append(read)
        self.held += held
        for x in held:
            self._look(x, names)

    def _look(self, x: Any, names: tuple[str, ...] = ()) -> None:
        if isinstance(x, Tensor):
            self.tensors |= {} if x.requires_grad else {id(x): (x, x._version)}
        elif isinstance(x, types.ModuleType):
            self._look_at_module(x, names)
        elif not isinstance(x, _FIXED) and self._is_new(id(x), x):
            if isinstance(x, types.FunctionType):
                self._look_at_function(x)
            elif isinstance(x, type):
                self._look_at_class(x)
            else:
                self._look_at_object(x)

    def _is_new(self, key: Any, x: Any) -> bool:
        new = key not in self.known
        self.known[key] = x
        if len(self.known) > _MOST_SEEN:
            raise UnrecordableError("It reads too much to watch.")
        return new

    def _look_at_function(self, f: types.FunctionType) -> None:
        codes = [*_codes(f.__code__)]
        names = tuple(dict.fromkeys(chain.from_iterable(code.co_names for code in codes)))
        self._hold(lambda: (f.__code__, f.__defaults__, f.__kwdefaults__, f.__dict__ or None))
        self._hold(lambda: [cell.cell_contents for cell in f.__closure__ or ()], names)
        if _root(f.__globals__.get("__name__")) not in _LIBRARIES:
            self._hold(partial(_entries, f.__globals__, names), names)
            _refuse_imports(codes)

    def _look_at_module(self, module: types.ModuleType, names: tuple[str, ...]) -> None:
        """What the names stand for, also in modules that it has by such a name."""
        if _root(module.__name__) in _LIBRARIES:
            return
        if not names:
            raise UnrecordableError(f"It is not known what of the module {module.__name__} is read.")
        if self._is_new((id(module), names), module):
            self._hold(partial(_entries, vars(module), names), names)

    def _look_at_class(self, x: type) -> None:
        if _root(x.__module__) not in _LIBRARIES:
            self._look((x.__bases__, vars(x)))

    def _look_at_object(self, x: Any) -> None:
        """What it consists of, and its attributes."""
        parts = next((names for kind, names in _PARTS.items() if isinstance(x, kind)), None)
        if isinstance(x, (dict, types.MappingProxyType)):
            self._hold(x.values)
            if x:
                self._hold(x.keys)
        elif isinstance(x, (list, set)):
            self._hold(x.copy)
        elif isinstance(x, (tuple, frozenset)) or parts:
            for part in x if parts is None else [getattr(x, name) for name in parts]:
                self._look(part)
        elif not hasattr(x, "__dict__"):
            raise UnrecordableError(f"A {type(x).__name__} cannot be looked into.")
        if hasattr(x, "__dict__") and type(x) is not OrderedDict:  # of which modules are full
            self._look(type(x))
            self._hold(vars(x).values)


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Some code, and that of the functions inside."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


def _refuse_imports(codes: list[types.CodeType]) -> None:
    """Modules are watched where a function has them by a name of its globals or its closure."""
    for each in chain.from_iterable(map(dis.get_instructions, codes)):
        if each.opname == "IMPORT_NAME" and _root(each.argval) not in _LIBRARIES:
            raise UnrecordableError(f"It imports {each.argval!r} when it is called.")


def _entries(space: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    return [space.get(name) for name in names]
