"""Tensors of a module: where they are, moved, frozen, compared; devices' random numbers, and whose turn it is to draw them."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from pyro_dgm.core.shapes import check_number
from pyro_dgm.core.upstream import passing
from pyro_dgm.core.warn import warn_user

__all__ = [
    "acting_for_another",
    "as_array",
    "device_of",
    "fork_rng",
    "frozen",
    "one_at_a_time",
    "put_random_states",
    "random_states",
    "same_bits",
    "seed_everywhere",
    "seeded",
    "to_device",
]

F = TypeVar("F", bound=Callable[..., Any])

_TURNS: dict[int, Any] = {}  # by process: one that was forked has a lock of its own, whoever held its parent's
_ACTS = threading.local()


def one_at_a_time(function: F) -> F:
    """Calls of all such functions wait for one another where they come from several threads; a warning says so.

    Pyro's handlers, its param store and torch's random state belong to the process: two calls at once would write into each
    other's. Within a thread calls may be nested.
    """

    @functools.wraps(function)
    def waiting(*args: Any, **kwargs: Any) -> Any:
        if getattr(_ACTS, "depth", 0):
            return function(*args, **kwargs)
        turn = _TURNS.setdefault(os.getpid(), threading.RLock())
        if not turn.acquire(blocking=False):
            warn_user(
                f"{function.__name__}: another thread of this process is at work, and Pyro's handlers, its parameters and "
                "torch's random state belong to the process: this call waits for it. Use processes for calls at the same time; "
                "what another call waits for has to be made in its thread."
            )
            turn.acquire()
        try:
            return function(*args, **kwargs)
        finally:
            turn.release()

    return cast(F, waiting)


@contextmanager
def acting_for_another() -> Iterator[None]:
    """Within the context this thread works for a caller whose turn it is, and which waits for it: it need not wait itself."""
    _ACTS.depth = getattr(_ACTS, "depth", 0) + 1
    try:
        yield
    finally:
        _ACTS.depth -= 1


def device_of(module: nn.Module) -> torch.device | None:
    """The device of the first parameter, or buffer; None where there is none yet."""
    tensor = next(module.parameters(), next(module.buffers(), None))
    return None if tensor is None else tensor.device


def to_device(data: Any, device: torch.device | None) -> Any:
    """All tensors of a tuple, list or mapping on the device; anything else as it is."""
    if isinstance(data, Tensor):
        return data if device is None else data.to(device)
    if isinstance(data, Mapping):
        return {k: to_device(v, device) for k, v in data.items()}
    return type(data)(to_device(v, device) for v in data) if type(data) in (tuple, list) else data


def as_array(x: Tensor) -> np.ndarray:
    """A tensor's numbers for numpy, which has no bfloat16: that becomes float32."""
    x = x.detach().cpu()
    return (x.float() if x.dtype is torch.bfloat16 else x).numpy()


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draws inside come from the seed and do not advance the global random state; with None they do.

    Example:
        >>> with seeded(0):
        ...     a = torch.rand(1)
        >>> with seeded(0):
        ...     b = torch.rand(1)
        >>> bool(a == b)
        True
    """
    if seed is None:
        yield
        return
    check_number("seeded", "seed", seed, least=-(2**63), whole=True)
    if seed >= 2**64:
        raise ValueError(f"seeded: seed={seed}, expected less than 2**64.")
    with fork_rng(seed):
        yield


@contextmanager
def fork_rng(seed: int | None = None) -> Iterator[None]:
    """Draws inside do not advance the global random state; they come from the seed, where there is one."""
    before = random_states()
    try:
        if seed is not None:
            seed_everywhere(seed)
        yield
    finally:
        put_random_states(before)


def random_states() -> list[Tensor]:
    """Of the CPU, then of each accelerator, if one was used."""
    return [torch.get_rng_state()] + [module.get_rng_state(*at) for module, at in _generators()]


def put_random_states(states: list[Tensor]) -> None:
    """Go on from there; states of devices that this machine lacks are left out."""
    torch.set_rng_state(states[0])
    for state, (module, at) in zip(states[1:], _generators(), strict=False):
        module.set_rng_state(state, *at)


def seed_everywhere(seed: int) -> None:
    """As ``torch.manual_seed``, which is slow and queues a call for every absent device."""
    seed = int(seed)  # also numpy's
    torch.default_generator.manual_seed(seed)
    module = _accelerator()
    if module is not None:
        getattr(module, "manual_seed_all", module.manual_seed)(seed)


def _accelerator() -> Any:
    """Torch's module of the accelerator; None without one, or where nothing was put on it yet."""
    try:
        device = torch.accelerator.current_accelerator()
    except RuntimeError:  # torch 2.6, where there is none
        return None
    if device is None:
        return None
    module = torch.get_device_module(device)
    used = getattr(module, "is_initialized", torch.accelerator.is_available)  # Apple's has no such function
    return module if used() else None


def _generators() -> list[tuple[Any, tuple[int, ...]]]:
    """Module and index of each; Apple's one device takes no index."""
    module = _accelerator()
    if module is None:
        return []
    return [(module, () if module is torch.mps else (i,)) for i in range(module.device_count())]


@contextmanager
def frozen(*tensors: Tensor) -> Iterator[None]:
    """Within the context no gradient is recorded towards the given leaf tensors.

    >>> w = torch.nn.Parameter(torch.tensor(2.0))
    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> with frozen(w):
    ...     y = w * x
    >>> torch.autograd.grad(y, [x, w], allow_unused=True)
    (tensor(2.), None)
    """
    for t in tensors:
        if not isinstance(t, Tensor):
            raise TypeError(f"frozen: got a {type(t).__name__}, expected tensors, such as *module.parameters().")
        if t.requires_grad and not t.is_leaf:
            raise ValueError("frozen: a tensor is the result of a computation, expected leaves, such as parameters.")
    live = [t for t in tensors if t.requires_grad]
    for t in live:
        t.requires_grad_(False)
    try:
        yield
    finally:
        for t in live:
            t.requires_grad_(True)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the last bit, NaN equal to itself; False where no number may be looked at (vmap, JIT).

    >>> same_bits(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]))
    True
    """
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or torch.jit.is_tracing():
        return False
    if passing(a, b):
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().view(bits), b.detach().view(bits))
