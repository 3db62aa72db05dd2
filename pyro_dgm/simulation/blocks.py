"""One block of simulations from its own random state: the same draws whatever else runs, wherever it runs.

Blocks have a fixed size, so neither ``batch_size`` nor the executor nor an interruption changes a draw.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.util import get_rng_state, set_rng_state
from torch import Size, Tensor

from pyro_dgm.core.random import fork_rng, seed_everywhere
from pyro_dgm.model.handlers import Given, Redraw
from pyro_dgm.model.sites import is_drawn
from pyro_dgm.model.vectorize import How, in_draws_plate

__all__ = ["Part", "Blocks", "random_state", "run_job", "run_whole_job"]

_ONE_AT_A_TIME = threading.Lock()  # Pyro's handlers and torch's random state belong to the process, not to a thread
_BLOCK = 1_000
_BYTES = 2**27


@dataclass
class Part:
    """Consecutive simulations.

    Attributes:
        start, count: number of the first, and how many.
        values: ``{site: [value or None, ...]}`` one by one, or ``{site: (m, *site)}`` of a vectorised run.
        faults: what is wrong, by number, for those that failed.
        tried: how many draws of a proposal were tried.
    """

    start: int
    count: int
    values: dict[str, Any]
    faults: dict[int, str]
    tried: int = 0


@dataclass(frozen=True)
class Blocks:
    """Blocks of simulations of a model: its arguments, and how many draws share one run. It can be pickled if they can.

    Attributes:
        shapes: of every site in a single run.
        event_dims: how many of a site's dimensions belong to its event.
        nesting: depth of the plates.
        how: "plate" or "loop".
        redraw: draw data that the arguments give anew.
        propose: gives ``n`` draws of some latents, and how many it tried, where they do not come from the prior.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: dict[str, Size]
    event_dims: dict[str, int]
    nesting: int = 0
    how: How = "loop"
    redraw: bool = True
    propose: Callable[[Blocks, int], tuple[dict[str, Tensor], int]] | None = None

    @property
    def block(self) -> int:
        """How many simulations share a random state."""
        if self.how == "loop":
            return 1
        numbers = sum(s.numel() for s in self.shapes.values())
        return max(1, min(_BLOCK, _BYTES // (8 * max(numbers, 1))))

    def trace(self, n: int | None = None, given: dict[str, Tensor] | None = None) -> poutine.Trace:
        """One run with data drawn anew: of one draw, or of ``n`` draws in a plate left of all others.

        ``given`` has the values of some latents, ``{site: (*site)}`` or ``{site: (n, *site)}``.
        """
        values = given or {}
        if n is not None:
            values = {k: self.in_plate(k, v) for k, v in values.items()}
        model = Given(values)(Redraw()(self.model) if self.redraw else self.model)
        with torch.no_grad(), poutine.block():
            run = model if n is None else in_draws_plate(model, n, self.nesting)
            return poutine.trace(run).get_trace(*self.args, **self.kwargs)

    def rows(self, trace: poutine.Trace, n: int) -> dict[str, Tensor]:
        """The sites of ``n`` draws run together, ``{site: (n, *site)}``."""
        return {k: trace.nodes[k]["value"].detach().reshape(n, *shape) for k, shape in self.shapes.items()}

    def in_plate(self, name: str, value: Tensor) -> Tensor:
        """Rows ``(n, *site)`` with the draws left of all plates."""
        batch = value.dim() - 1 - self.event_dims[name]
        return value.reshape(len(value), *(1,) * (self.nesting - batch), *value.shape[1:])


def run_job(blocks: Blocks, start: int, stop: int, seed: int) -> Generator[Part]:
    """Simulations ``start`` to ``stop``, block by block; the process's random state is left as it was."""
    with _ONE_AT_A_TIME, random_state(seed):
        for first in range(start, stop, blocks.block):
            _set_state(seed, first)
            yield _block(blocks, first, min(blocks.block, stop - first), seed)


def run_whole_job(blocks: Blocks, start: int, stop: int, seed: int) -> list[Part]:
    """The same in a list, which another process can send back."""
    return list(run_job(blocks, start, stop, seed))


def _block(blocks: Blocks, first: int, n: int, seed: int) -> Part:
    given, tried = blocks.propose(blocks, n) if blocks.propose else ({}, 0)
    part = _drawn(blocks, first, n, seed, given)
    part.tried = tried
    return part


def _drawn(blocks: Blocks, first: int, n: int, seed: int, given: dict[str, Tensor]) -> Part:
    if blocks.how == "plate":
        try:
            return _together(blocks, first, n, given)
        except Exception:  # one draw of the block may have failed; it is found one by one
            pass
    return _one_by_one(blocks, first, n, seed, given)


def _together(blocks: Blocks, first: int, n: int, given: dict[str, Tensor]) -> Part:
    values = blocks.rows(blocks.trace(n, given), n)
    faults: dict[int, str] = {}
    for k, v in values.items():
        bad = ~v.reshape(n, -1).isfinite().all(1)
        faults = {first + i: f"site '{k}' is not finite" for i in torch.nonzero(bad)[:, 0].tolist()} | faults
    return Part(first, n, values, faults)


def _one_by_one(blocks: Blocks, first: int, n: int, seed: int, given: dict[str, Tensor]) -> Part:
    values: dict[str, list[Tensor | None]] = {k: [] for k in blocks.shapes}
    faults: dict[int, str] = {}
    for i in range(n):
        if n > 1:
            _set_state(seed, first + i)
        row, fault = _single(blocks, {k: v[i] for k, v in given.items()})
        faults |= {first + i: fault} if fault else {}
        for k in values:
            values[k].append(row.get(k))
    return Part(first, n, values, faults)


def _single(blocks: Blocks, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], str | None]:
    try:
        nodes = blocks.trace(None, given).nodes
    except Exception as error:
        return {}, f"{type(error).__name__}: {error}".splitlines()[0]
    drawn = {k: s["value"].detach() for k, s in nodes.items() if is_drawn(s)}
    if set(drawn) != set(blocks.shapes):
        return {}, f"its sites {sorted(drawn)} are not those of the first run"
    bad = next((k for k, v in drawn.items() if not v.isfinite().all()), None)
    return drawn, bad and f"site '{bad}' is not finite"


@contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Random numbers of torch, numpy and Python from a seed; afterwards they go on as before."""
    before = get_rng_state()
    try:
        with fork_rng():
            _set_state(seed, 0)
            yield
    finally:
        set_rng_state(before)


def _set_state(seed: int, index: int) -> None:
    """The random state that belongs to one simulation, or block, of a seed."""
    state = _scrambled(_scrambled(seed) + index)  # neighbouring seeds share nothing
    seed_everywhere(state)
    random.seed(state)
    np.random.seed(state)


def _scrambled(x: int) -> int:
    """A permutation of the 32-bit numbers (all that torch's generator reads of a seed), so that no two blocks share one."""
    x &= 0xFFFFFFFF
    for factor in (0x7FEB352D, 0x846CA68B):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
        x ^= x >> 15
    return x ^ (x >> 16)
