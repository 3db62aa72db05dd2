"""Simulations in tasks: which ones there are, and who does them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import islice
from queue import SimpleQueue
from typing import Any

from pyro_dgm.simulation.blocks import Blocks, Part, run_job, run_job_in_child, run_whole_job

__all__ = ["done_here", "jobs_of", "parts_of"]

# Not measured; chosen by hand.
_LEAST_TASKS, _MOST_TASKS = 64, 10_000  # that wait at an executor
_BYTES = 2**28  # of their results

_DASK_ENDED = ("KilledWorker",)


def jobs_of(missing: list[int], size: int, n: int, block: int) -> list[tuple[int, int]]:
    """Ranges of whole blocks that hold all that is missing."""
    blocks = sorted({i // block for i in missing})
    per_job = -(-size // block)
    jobs: list[tuple[int, int]] = []
    for b in blocks:
        start = b * block
        stop = min(start + block, n)
        if jobs and jobs[-1][1] == start and start - jobs[-1][0] < per_job * block:
            jobs[-1] = (jobs[-1][0], stop)
        else:
            jobs.append((start, stop))
    return jobs


def parts_of(
    blocks: Blocks, jobs: list[tuple[int, int]], seed: int, executor: Executor | None, timeout: float | None
) -> Generator[Part]:
    """Parts as they come; a bounded number of tasks waits at the executor, and no result is kept."""
    if executor is None:
        for start, stop in jobs:
            with closing(done_here(blocks, start, stop, seed, timeout)) as parts:
                yield from parts
        return
    done: SimpleQueue[Any] = SimpleQueue()
    waiting: set[Any] = set()
    todo = iter(jobs)
    most = _tasks(blocks, jobs)
    try:
        while True:
            for start, stop in islice(todo, most - len(waiting)):
                waiting.add(future := _explained(executor.submit, run_whole_job, blocks, start, stop, seed, timeout))
                future.add_done_callback(done.put)
            if not waiting:
                return
            waiting.remove(future := done.get())
            yield from _explained(future.result)
    finally:
        for future in waiting:
            future.cancel()
        if isinstance(executor, ThreadPoolExecutor):
            wait(waiting)  # threads cannot be stopped, and another call may begin now


def done_here(blocks: Blocks, start: int, stop: int, seed: int, timeout: float | None) -> Generator[Part]:
    """Parts that this process makes, or children of it."""
    if timeout is None:
        return run_job(blocks, start, stop, seed)
    return run_job_in_child(blocks, start, stop, seed, timeout)


def _tasks(blocks: Blocks, jobs: list[tuple[int, int]]) -> int:
    """How many tasks wait at the executor: their results must fit in memory if the disk is slow."""
    longest = max((stop - start for start, stop in jobs), default=1)
    numbers = longest * sum(shape.numel() for shape in blocks.shapes.values())
    return max(_LEAST_TASKS, min(_MOST_TASKS, _BYTES // (8 * max(numbers, 1))))


def _explained(asked: Callable[..., Any], *args: Any) -> Any:
    """What an executor answers, or why it does not."""
    try:
        return asked(*args)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if "pickle" not in str(error).lower() and "local object" not in str(error):
            raise
        raise TypeError(
            f"simulate: the model or its arguments cannot be sent to the executor's processes ({error}). Define the model "
            "at the top of a module, not inside a function or as a lambda, or use an executor that sends functions by "
            "value (loky, Dask)."
        ) from error
    except Exception as error:
        if not isinstance(error, BrokenExecutor) and type(error).__name__ not in _DASK_ENDED:
            raise
        raise RuntimeError(
            f"simulate: a process of the executor ended ({type(error).__name__}). Does a simulation end its process (os._exit, "
            "a crash of compiled code)? Give timeout=, seconds for a run, and such simulations are left out and counted. Or is "
            "memory used up? Then use fewer processes. With path= the same call goes on from here, with a new executor."
        ) from error
