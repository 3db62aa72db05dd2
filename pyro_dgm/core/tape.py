"""What a call of a function did, as a program of tensor operations.

Operations are seen below autograd, so a program holds those of the backward pass too, if the function asks for gradients.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["PLAIN", "Function", "Listener", "Outputs", "Tape", "UnrecordableError", "as_they_were"]

Outputs = tuple[Tensor | None, ...]
Function = Callable[..., Outputs]
PLAIN = (Tensor, nn.Parameter)

_MOST_KEPT = 2**26  # bytes that are computed once and kept. Not measured; chosen by hand


class UnrecordableError(Exception):
    """What a function reads or does cannot be watched."""


class _Call:
    """An operation with its arguments and results, and the memory of both."""

    def __init__(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.op = op
        self.args = args
        self.kwargs = kwargs
        self.result = result
        self.given = _tensors((args, kwargs))
        self.made = _tensors(result)
        self.reads = set(map(_place, self.given))
        self.results = set(map(_place, self.made))
        self.memory = self.reads | self.results
        self.draws = torch.Tag.nondeterministic_seeded in op.tags

    def writes_to(self) -> set[int]:
        """The memory that it changes."""
        if not self.op._schema.is_mutable:
            return set()
        named = zip(self.op._schema.arguments, self.args, strict=False)
        by_name = [(a, self.kwargs[a.name]) for a in self.op._schema.arguments if a.name in self.kwargs]
        changed = [v for a, v in [*named, *by_name] if a.alias_info is not None and a.alias_info.is_write]
        return set(map(_place, _tensors(changed)))

    def looks_at(self, live: set[int]) -> bool:
        """Whether values decide on what Python sees of the result: a number, or a shape."""
        if torch.Tag.dynamic_output_shape in self.op.tags:
            if self.op is not torch.ops.aten.index.Tensor:
                return True
            return any(t.dtype in (torch.bool, torch.uint8) and _place(t) in live for t in _tensors(self.args[1]))
        return torch.Tag.data_dependent_output in self.op.tags


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [t for part in parts for t in _tensors(part)]


def _place(t: Tensor) -> int:
    """The memory of a tensor, which views share."""
    if type(t) not in PLAIN or t.layout != torch.strided:
        raise UnrecordableError(f"A {type(t).__name__} may do more than its operations say.")
    return t.untyped_storage()._cdata


class Listener(TorchDispatchMode):
    """Writes down what torch does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, result))
        return result


class _Looks(TorchFunctionMode):
    """Refuses to show Python the numbers in a tensor by ways that are no operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _LOOKS:
            raise UnrecordableError(f"{func.__name__} reads the numbers of a tensor.")
        return func(*args, **(kwargs or {}))


_LOOKS = {"numpy", "__array__", "tolist", "data_ptr", "__dlpack__", "storage", "untyped_storage"}


class Tape:
    """The operations of one call of a function, as a program.

    What neither an input, a learned tensor nor a draw enters is left out, and its result kept. Memory that is written to is
    made anew at each replay.
    """

    def __init__(
        self, function: Function, inputs: tuple[Tensor, ...], learned: tuple[Tensor, ...], draws: bool
    ) -> None:
        if any(p._backward_hooks for p in learned):
            raise UnrecordableError("A hook would change its gradients twice: in the record, and where they arrive.")
        self.learned = learned
        states = _other_random_states()
        with _Looks(), Listener() as listener:
            outputs = function(*inputs)
        if states != _other_random_states():
            raise UnrecordableError("It draws random numbers of Python's or numpy's.")
        calls = [_Call(*call) for call in listener.calls]
        changing = [*inputs, *learned]
        live, written = _live(calls, changing, draws)
        self.outside = _outside(calls, changing)
        self.there = [t is not None for t in outputs]
        wanted = [t for t in outputs if t is not None]
        program = _Program(live, written, changing, [t for t, _ in self.outside])
        needed = _needed(_changing(calls, live), wanted)
        for call in needed:
            program.add(call)
        self.program = program.python(wanted)
        # TorchScript leaves out what has no result, as the check after a Cholesky factor
        self.compiled = _compiled(self.program, changing) if all(c.made for c in needed) else self.program

    def replay(self, *inputs: Tensor) -> Outputs:
        """What the function would return."""
        run = self.program if torch._C._len_torch_dispatch_stack() else self.compiled
        with torch.no_grad(), torch.jit.optimized_execution(False):
            found = iter(run(*inputs, *self.learned))
        return tuple(next(found) if there else None for there in self.there)

    def holds(self) -> bool:
        """Whether tensors of outside are what they were."""
        return as_they_were(self.outside)


def as_they_were(tensors: Iterable[tuple[Tensor, int]]) -> bool:
    """Whether tensors without gradients have the versions that they had."""
    return all(t._version == version and not t.requires_grad for t, version in tensors)


def _compiled(program: Function, inputs: list[Tensor]) -> Function:
    """The program run by TorchScript, which takes half the time; by Python, where a torch has none: it is deprecated."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.trace(program, tuple(x.detach() for x in inputs), check_trace=False)
    except Exception:
        return program


def _other_random_states() -> Any:
    state = np.random.get_state(legacy=False)["state"]
    return random.getstate(), state["pos"], state["key"].tobytes()


def _live(calls: list[_Call], changing: list[Tensor], draws: bool) -> tuple[set[int], set[int]]:
    """The memory that differs from call to call, and that part of it which is written to after it was made."""
    live = set(map(_place, changing))
    own: set[int] = set()
    written: set[int] = set()
    for call in calls:
        own |= call.memory - call.reads
        written |= call.writes_to()
        if call.draws:
            if not draws:
                raise UnrecordableError(f"{call.op} draws.")
            live |= call.results
    if written - own:
        raise UnrecordableError("It writes to a tensor of outside.")
    live |= written
    size = 0
    while size < len(live):
        size = len(live)
        for call in calls:
            if not live.isdisjoint(call.memory):
                live |= call.results
    return live, written


def _outside(calls: list[_Call], changing: list[Tensor]) -> list[tuple[Tensor, int]]:
    """Tensors that were there before, with their versions."""
    known = set(map(id, changing))
    found: dict[int, Tensor] = {}
    for call in calls:
        found |= {id(t): t for t in call.given if id(t) not in known}
        known |= set(map(id, call.made))
    if any(t.requires_grad for t in found.values()):
        raise UnrecordableError("A tensor of outside has gradients.")
    return [(t, t._version) for t in found.values()]


def _changing(calls: list[_Call], live: set[int]) -> list[_Call]:
    """Operations whose results differ from call to call."""
    found = [call for call in calls if not live.isdisjoint(call.memory)]
    for call in found:
        if not live.isdisjoint(call.reads) and call.looks_at(live):
            raise UnrecordableError(f"{call.op} looks at values.")
    return found


def _needed(calls: list[_Call], outputs: list[Tensor]) -> list[_Call]:
    """Without operations whose results nobody reads."""
    wanted = {id(t) for t in outputs}
    kept = []
    for call in reversed(calls):
        if not call.made or call.draws or call.op._schema.is_mutable or wanted & set(map(id, call.made)):
            wanted |= set(map(id, call.given))
            kept.append(call)
    return kept[::-1]


class _Program:
    """Python code of one operation a line, in which memory is given back after its last use.

    An operation that was done before, on memory that nothing writes to, is not done again.
    """

    def __init__(self, live: set[int], written: set[int], inputs: list[Tensor], known: list[Tensor]) -> None:
        self.live = live
        self.written = written
        self.known = set(map(id, known))
        self.names = {id(t): f"x{i}" for i, t in enumerate(inputs)}
        self.head = ", ".join(self.names.values())
        self.lines: list[str] = []
        self.done: dict[str, _Call] = {}
        self.last: dict[str, int] = {}  # line in which a variable is used
        self.space: dict[str, Any] = {}
        self.kept: dict[int, int] = {}  # bytes by place

    def add(self, call: _Call) -> None:
        args = [self._name(a) for a in call.args] + [f"{k}={self._name(v)}" for k, v in call.kwargs.items()]
        text = f"{self._constant(call.op)}({', '.join(args)})"
        before = self.done.get(text)
        if call.op is torch.ops.aten.detach.default:
            self.names[id(call.result)] = args[0]
        elif before is not None:
            self.names |= {id(t): self.names[id(b)] for t, b in zip(call.made, before.made, strict=True)}
        else:
            self.lines.append(self._target(call.result) + text)
            if self.written.isdisjoint(call.memory) and not call.draws:
                self.done[text] = call

    def _target(self, result: Any) -> str:
        if isinstance(result, Tensor):
            return f"{self._new(result)} = "
        if not isinstance(result, (list, tuple)) or not result:
            return ""
        return "".join(f"{self._new(r) if isinstance(r, Tensor) else '_'}, " for r in result) + "= "

    def _new(self, t: Tensor) -> str:
        self.names[id(t)] = name = f"v{len(self.last)}"
        self.last[name] = len(self.lines)
        return name

    def _name(self, value: Any) -> str:
        if isinstance(value, (list, tuple)) and _tensors(value):
            return f"[{', '.join(map(self._name, value))}]"
        if id(value) in self.names:
            name = self.names[id(value)]
            if name in self.last:
                self.last[name] = len(self.lines)
            return name
        return repr(value) if value is None or type(value) in (bool, int) else self._constant(value)

    def _constant(self, value: Any) -> str:
        self.space[f"c{id(value)}"] = value
        if isinstance(value, Tensor) and id(value) not in self.known:
            if _place(value) in self.live:
                raise UnrecordableError("A tensor came from nowhere.")
            self.kept[_place(value)] = value.untyped_storage().nbytes()
        return f"c{id(value)}"

    def python(self, outputs: list[Tensor]) -> Function:
        results = "".join(f"{self._name(t)}, " for t in outputs)
        if sum(self.kept.values()) > _MOST_KEPT:
            raise UnrecordableError("It would keep too much memory.")
        done: dict[int, list[str]] = {}
        for name, line in self.last.items():
            done.setdefault(line, []).append(name)
        body = [f"{line}; {' = '.join([*done[i], 'None'])}" if i in done else line for i, line in enumerate(self.lines)]
        exec("\n    ".join([f"def replay({self.head}):", *body, f"return {results}"]), self.space)
        self.space["replay"].__module__ = __name__
        return self.space["replay"]
