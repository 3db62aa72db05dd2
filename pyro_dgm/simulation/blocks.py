"""Simulations in blocks, each from its own random state: the same draws whatever else runs, wherever it runs.

Blocks have a fixed size, so neither ``batch_size`` nor the executor nor an interruption changes a draw. The draws of a block
are made in one run if that gives the densities, or the draws, of single runs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.util import get_rng_state, set_rng_state
from torch import Size, Tensor

from pyro_dgm.core.devices import fork_rng, seed_everywhere
from pyro_dgm.model.handlers import Redraw
from pyro_dgm.model.sites import is_drawn
from pyro_dgm.model.supports import unwrapped
from pyro_dgm.model.vectorize import Engine, How, first_line
from pyro_dgm.simulation.guard import Lost, alone, in_child, tell, timed

__all__ = [
    "Blocks",
    "Part",
    "Resizable",
    "TOO_FEW",
    "fault_of_plate",
    "random_state",
    "run_job",
    "run_job_in_child",
    "run_whole_job",
]

TOO_FEW = "too few simulations for a check"

# Not measured; chosen by hand.
_BLOCK = 1_000  # simulations in a block, at most
_BYTES = 2**27  # of its values, at most
_FEW = 5  # draws whose densities are compared
_MANY = 40  # single runs at each setting where draws are compared; that costs more than it saves below 4 times as many
_ALARM = 1e-5  # probability that equal distributions are told apart
_BLOCK_OF_SIZE = 25  # simulations that share the sizes of their plates

_TRIED = ""  # no name of a site


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
class Resizable:
    """A plate whose size is an argument.

    Attributes:
        argument: its name, or its place among those without names.
        more: by how much the plate is larger.
        least, most: between which sizes are drawn, evenly in their logarithm.
        axes: of each site, which axis the plate is.
    """

    argument: str | int
    more: int
    least: int
    most: int
    axes: dict[str, int]

    def size_of(self, block: int) -> int:
        """The size in a block: the largest in the first, the least in the second, at random in others."""
        low, high = math.log(self.least), math.log(self.most + 1)
        drawn = math.floor(math.exp(low + (high - low) * float(torch.rand(()))))
        return {0: self.most, 1: self.least}.get(block, min(self.most, drawn))


@dataclass(frozen=True)
class Blocks(Engine):
    """Blocks of simulations of a model with its arguments. They can be pickled if model and arguments can.

    Attributes:
        shapes: of every site in a single run.
        how: "plate" or "loop".
        redraw: draw data that the arguments give anew.
        propose: gives ``n`` draws of some latents, and how many it tried, where they do not come from the prior.
        plates: those whose size each block draws.
        first: the random state of a run that comes to its end.
        call: a word for the call of :func:`~pyro_dgm.simulate`, by which processes know what they have run before.
    """

    shapes: dict[str, Size] = field(default_factory=dict)
    how: How = "loop"
    redraw: bool = True
    propose: Callable[[Blocks, int], tuple[dict[str, Tensor], int]] | None = None
    plates: tuple[Resizable, ...] = ()
    first: int = 0
    call: str = ""

    @property
    def block(self) -> int:
        """How many simulations share a random state."""
        if self.how == "loop":
            return 1
        numbers = sum(s.numel() for s in self.shapes.values())
        return max(1, min(_BLOCK_OF_SIZE if self.plates else _BLOCK, _BYTES // (8 * max(numbers, 1))))

    def resized(self, sizes: Sequence[int]) -> Blocks:
        """The same with plates of these sizes."""
        args = list(self.args)
        kwargs = dict(self.kwargs)
        shapes = {k: list(s) for k, s in self.shapes.items()}
        for plate, size in zip(self.plates, sizes, strict=True):
            if isinstance(plate.argument, int):
                args[plate.argument] = size - plate.more
            else:
                kwargs[plate.argument] = size - plate.more
            for site, axis in plate.axes.items() if shapes else []:
                shapes[site][axis] = size
        return replace(self, args=tuple(args), kwargs=kwargs, shapes={k: Size(s) for k, s in shapes.items()})

    def simulation(self, n: int | None = None, given: dict[str, Tensor] | None = None) -> poutine.Trace:
        """One run with data drawn anew, see :meth:`~pyro_dgm.model.vectorize.Engine.trace`."""
        with timed(), torch.no_grad(), poutine.block():
            return self.trace(n, given, Redraw()(self.model) if self.redraw else self.model)

    def rows(self, trace: poutine.Trace, n: int) -> dict[str, Tensor]:
        """The sites of ``n`` draws run together, ``{site: (n, *site)}``."""
        return {k: trace.nodes[k]["value"].detach().reshape(n, *shape) for k, shape in self.shapes.items()}


def run_job(blocks: Blocks, start: int, stop: int, seed: int, apart: bool = False) -> Generator[Part]:
    """Simulations ``start`` to ``stop``, block by block; the process's random state is left as it was.

    Args:
        apart: make the first block one by one, which is done anyway from a start inside of it.
    """
    with alone(), random_state(seed):
        for first in range(start - start % blocks.block, stop, blocks.block):
            _set_state(seed, first)
            n = min(blocks.block, stop - first)
            yield from _block(blocks, first, n, seed, max(0, start - first), apart or first < start)
            apart = False


def run_whole_job(blocks: Blocks, start: int, stop: int, seed: int, timeout: float | None = None) -> list[Part]:
    """The same in a list, which another process can send back; in children with a time limit, if there is one."""
    if timeout is None:
        return list(run_job(blocks, start, stop, seed))
    _warm(blocks)
    return list(run_job_in_child(blocks, start, stop, seed, timeout))


def run_job_in_child(blocks: Blocks, start: int, stop: int, seed: int, timeout: float) -> Generator[Part]:
    """The same in a child, and in another one after each simulation that hangs, exits or crashes: it counts as failed.

    A block of many draws in one run is made draw by draw then, since it is not known whose fault it was. What took too long is
    tried once more: it may have waited for a machine that was busy (of 5,000 runs of a millisecond 3 took half a second with six
    processes on two cores).
    """
    apart, late = False, -1
    while start < stop:
        drawn: dict[str, Any] = {}
        work = partial(run_job, blocks, start, stop, seed, apart)
        try:
            with closing(in_child(work, timeout)) as items:
                for item in items:
                    if not isinstance(item, Part):
                        drawn |= item
                        continue
                    yield item
                    start, drawn = start + item.count, {}
            return
        except Lost as lost:
            if lost.late and late != start:
                late = start
                continue
            late = -1
            apart = blocks.how == "plate" and start % blocks.block == 0 and not apart
            if apart and not drawn:
                continue
            yield _failed(blocks, start, drawn, str(lost))
            start, apart = start + 1, False


_warmed = ""  # the call whose model this process has run


def _warm(blocks: Blocks) -> None:
    """Run the model once in this process, whose children then need not import or compile anything in their first run."""
    global _warmed
    if blocks.call != _warmed:
        with alone(), random_state(blocks.first):
            blocks.simulation()
        _warmed = blocks.call


def _block(blocks: Blocks, first: int, n: int, seed: int, since: int, apart: bool) -> Iterator[Part]:
    """A block in one run; where that fails, or apart is wanted, draw by draw from the one with number ``since`` in it."""
    given, tried = blocks.propose(blocks, n) if blocks.propose else ({}, 0)
    if blocks.plates:
        blocks = blocks.resized([plate.size_of(first // blocks.block) for plate in blocks.plates])
    together = None if apart or blocks.how == "loop" else _together(blocks, first, n, given)
    if together:
        together.tried = tried
        yield together
        return
    for i in range(since, n):
        if n > 1:
            _set_state(seed, first + i)
        tell({_TRIED: tried if i == 0 else 0})
        row, fault = _single(blocks, {k: v[i] for k, v in given.items()})
        values = {k: [row.get(k)] for k in blocks.shapes}
        yield Part(first + i, 1, values, {first + i: fault} if fault else {}, tried if i == 0 else 0)


def _together(blocks: Blocks, first: int, n: int, given: dict[str, Tensor]) -> Part | None:
    """None where a run fails: one draw of the block may have, which is found one by one."""
    try:
        values = blocks.rows(blocks.simulation(n, given), n)
    except (Exception, SystemExit):
        return None
    faults: dict[int, str] = {}
    for k, v in values.items():
        bad = ~v.reshape(n, -1).isfinite().all(1)
        faults = {first + i: f"site '{k}' is not finite" for i in torch.nonzero(bad)[:, 0].tolist()} | faults
    return Part(first, n, values, faults)


def _single(blocks: Blocks, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], str | None]:
    seen = _Told()
    try:
        replace(blocks, model=seen(blocks.model)).simulation(None, given)
    except (Exception, SystemExit) as error:
        return _fitting(blocks, seen.values), f"{type(error).__name__}: {error}".splitlines()[0]
    drawn = seen.values
    if set(drawn) != set(blocks.shapes):
        return {}, f"its sites {sorted(drawn)} are not those of the first run"
    bad = next((k for k, v in drawn.items() if not v.isfinite().all()), None)
    return drawn, bad and f"site '{bad}' is not finite"


def _failed(blocks: Blocks, number: int, drawn: dict[str, Any], fault: str) -> Part:
    """A simulation that did not come back, with what it drew before."""
    values = _fitting(blocks, drawn)
    return Part(number, 1, {k: [values.get(k)] for k in blocks.shapes}, {number: fault}, drawn.get(_TRIED, 0))


def _fitting(blocks: Blocks, drawn: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in drawn.items() if k in blocks.shapes and v.shape == blocks.shapes[k]}


class Drawn(poutine.messenger.Messenger):
    """Keeps what a run draws, also of one that fails later."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if is_drawn(msg) and isinstance(msg["value"], Tensor):
            self.values[msg["name"]] = msg["value"].detach()


class _Told(Drawn):
    """In a child, tells what is drawn at once: the run may never come to its end."""

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        super()._pyro_post_sample(msg)
        if msg["name"] in self.values:
            tell({msg["name"]: self.values[msg["name"]]})


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


def fault_of_plate(blocks: Blocks, n: int) -> str:
    """Why runs of many draws differ from single runs; empty where they do not.

    The log joint of a few draws of all sites is compared. Sites without a density, and values that were computed with noise
    of their own, are compared by their draws: single runs at each of two settings of the latents, against one run.
    """
    with random_state(0):
        try:
            return _fault_of_plate(blocks, n)
        except (Exception, SystemExit) as error:
            return f"a run failed: {error}"


def _fault_of_plate(blocks: Blocks, n: int) -> str:
    traces = [blocks.simulation() for _ in range(_FEW)]
    shapes = [{k: s["value"].shape for k, s in t.nodes.items() if is_drawn(s)} for t in traces]
    if any(found != blocks.shapes for found in shapes):
        return "the sites or their shapes differ between runs"
    opaque = [k for k in blocks.shapes if _opaque(traces[0].nodes[k])]
    if opaque and n < 4 * _MANY:
        return TOO_FEW
    return _densities_differ(blocks, traces, opaque) or _draws_differ(blocks, traces, opaque, _MANY)


def _opaque(site: dict) -> bool:
    """Whether the density says nothing: there is none, or the value is a computed one."""
    if isinstance(unwrapped(site["fn"]), Delta):
        return True
    try:
        return not torch.is_tensor(site["fn"].log_prob(site["value"]))
    except (NotImplementedError, AttributeError):
        return True


def _densities_differ(blocks: Blocks, traces: list[poutine.Trace], opaque: list[str]) -> str:
    scored = [k for k in blocks.shapes if k not in opaque]
    if not scored:
        return ""
    rows = {k: torch.stack([t.nodes[k]["value"] for t in traces]) for k in scored}
    fn = poutine.block(blocks.model, hide=opaque) if opaque else blocks.model
    how, fault = Engine(fn, blocks.args, blocks.kwargs, blocks.nesting, blocks.event_dims).find_how(rows)
    return "" if how == "plate" else fault


def _draws_differ(blocks: Blocks, traces: list[poutine.Trace], opaque: list[str], m: int) -> str:
    """Compare draws of the opaque sites at two settings of the others, which one run holds side by side."""
    if not opaque:
        return ""
    rest = [k for k in blocks.shapes if k not in opaque]
    settings = [{k: t.nodes[k]["value"] for k in rest} for t in traces[:2]]
    rows = {k: torch.cat([s[k].expand(m, *s[k].shape) for s in settings]) for k in rest}
    try:
        together = blocks.rows(blocks.simulation(2 * m, rows), 2 * m)
    except Exception as error:
        return first_line(error)
    single = [[blocks.simulation(None, given).nodes for _ in range(m)] for given in settings]
    for k in opaque:
        for i, runs in enumerate(single):
            alone = torch.stack([nodes[k]["value"] for nodes in runs]).reshape(m, -1)
            if _far(alone, together[k][i * m : (i + 1) * m].reshape(m, -1)):
                return f"draws of site '{k}' made together differ from those of single runs"
    return ""


def _far(a: Tensor, b: Tensor) -> bool:
    """Whether any column's empirical distributions are further apart than chance allows; equal numbers count as ties."""
    scale = torch.maximum(a.abs().amax(0), b.abs().amax(0)).double().clamp_min(1e-12)
    a = (a / scale * 1e4).round()
    b = (b / scale * 1e4).round()
    points = torch.cat([a, b])
    below_a = (a[None] <= points[:, None]).double().mean(1)
    below_b = (b[None] <= points[:, None]).double().mean(1)
    if bool(((b == b[0]).all(0) & (a != a[0]).any(0)).any()):
        return True  # all draws together share their noise
    far = math.sqrt(math.log(2.0 * a.shape[1] / _ALARM) / len(a))  # Kolmogorov and Smirnov, for every column
    return bool((below_a - below_b).abs().max() > far)
