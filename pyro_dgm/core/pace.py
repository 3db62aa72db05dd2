"""Time, progress and threads: what runs inside a fit keeps to its seconds, shows on its bar, and uses threads that pay.

Work that no descent knows of (a search for where to start, what settles at the end) asks :func:`steps` for the numbers of its
steps. Outside a fit these are plain numbers; inside they move the fit's bar under a name, and end when their time does.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm.auto import tqdm

__all__ = [
    "UNCOUNTED",
    "Interruption",
    "few_threads",
    "in_fit",
    "moved",
    "on_bar",
    "seconds_left",
    "show",
    "steps",
    "took",
    "within",
    "working",
]

# Entries of the largest tensor of a step (rows x width), from which it keeps torch's threads. Measured by steps of Adam on
# three layers, on 2 cores with 4 busy processes beside: two threads take 25 times as long as one at 4,000 entries, 6 to 14 times
# at 200,000, and twice as long at 4 million. With the cores to itself a step gains from the second thread from 60,000 on, at
# most a factor of 2. ``docs/howto/time.md`` has the table.
SMALL = 200_000

UNCOUNTED = "{desc}"  # format of a bar before a piece of work with a number begins on it

_PYRO_TELLS = "pyro.infer.elbo"  # its "Guessed max_plate_nesting" would break the bar


@dataclass(frozen=True)
class Pace:
    """Whose time it is: until when, by ``time.perf_counter``, and the bar that shows it."""

    deadline: float = math.inf
    bar: Any = None
    history: Any = None  # of the fit, where :func:`took` notes trainings


_NONE = Pace()
_PACE: ContextVar[Pace] = ContextVar("pace", default=_NONE)


@contextmanager
def working(seconds: float | None, bar: Any, history: Any = None) -> Iterator[None]:
    """Within the context work has so many seconds from now, shows on this bar, and Pyro prints nothing into it."""
    token = _PACE.set(Pace(_deadline(seconds), bar, history))
    logger = logging.getLogger(_PYRO_TELLS)
    quiet = _Quiet(threading.get_ident())
    logger.addFilter(quiet)
    try:
        yield
    finally:
        logger.removeFilter(quiet)
        _PACE.reset(token)


@contextmanager
def on_bar(name: str, shown: bool) -> Iterator[Any]:
    """Within the context work shows on a bar of its own, which stands still and unseen where it is not to be shown."""
    bar = tqdm(desc=name, bar_format=UNCOUNTED, disable=not shown, mininterval=0.5, miniters=1)
    with bar, working(None, bar):
        yield bar


class _Quiet(logging.Filter):
    """Leaves out what one thread tells below a warning."""

    def __init__(self, thread: int) -> None:
        super().__init__()
        self.thread = thread

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or threading.get_ident() != self.thread


@contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """Within the context work has so many seconds, if so many are left; None for no limit of its own."""
    pace = _PACE.get()
    token = _PACE.set(replace(pace, deadline=min(pace.deadline, _deadline(seconds))))
    try:
        yield
    finally:
        _PACE.reset(token)


def _deadline(seconds: float | None) -> float:
    return math.inf if seconds is None else time.perf_counter() + seconds


def seconds_left() -> float:
    """Seconds until the work at hand has to end: not below 0; infinity without a limit.

    >>> seconds_left()
    inf
    """
    return max(0.0, _PACE.get().deadline - time.perf_counter())


def steps(name: str, total: int, share: float = 1.0) -> Iterator[tuple[int, float]]:
    """Numbers and shares of the way of at most ``total`` steps, one at least; their time is a share of what is left.

    >>> list(steps("walk", 2))
    [(0, 0.0), (1, 0.5)]
    """
    bar = _PACE.get().bar
    began = time.perf_counter()
    seconds = share * seconds_left()
    if bar is not None:
        show(bar, name, total)
    for i in range(total):
        used = (time.perf_counter() - began) / seconds if seconds else 1.0
        if i and used >= 1.0:
            return
        yield i, max(i / total, min(used, 1.0) if seconds < math.inf else 0.0)
        if bar is not None:
            bar.update()


def moved() -> None:
    """Move the bar by one."""
    bar = _PACE.get().bar
    if bar is not None and bar.n < (bar.total or math.inf):
        bar.update()


def in_fit() -> bool:
    """Whether a fit is at work, which looks at its losses itself."""
    return _PACE.get().history is not None


def took(stage: tuple[str, int, float, float]) -> None:
    """Note a training by name, steps, first and last loss in the history of the fit that is at work."""
    history = _PACE.get().history
    if history is not None:
        history.stages.append(stage)


def show(bar: Any, name: str, total: int | None, done: int = 0) -> None:
    """Begin a named piece of work on a bar, or go on with one of which so much is done."""
    bar.bar_format = None
    bar.set_description_str(name, refresh=False)
    bar.set_postfix_str("", refresh=False)
    bar.reset(total=total)
    if done:
        bar.initial = bar.n = bar.last_print_n = done


class Interruption:
    """Within the context the first Ctrl-C only says that it was asked for one, so that no step is left half done.

    A second one is raised at once. Elsewhere than in the main thread, or where Ctrl-C means something of the user's own,
    nothing is changed.
    """

    def __init__(self) -> None:
        self.asked = False
        self.before: Any = None

    def __enter__(self) -> None:
        ours = threading.current_thread() is threading.main_thread()
        if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self.before = signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *error: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


_LOCK = threading.Lock()
_DEPTH = threading.local()
_users = 0
_before = 1


@contextmanager
def few_threads(entries: float) -> Iterator[None]:
    """Within the context torch has one thread where a step's largest tensor has few entries; then as many as before.

    Contexts may be nested, also in several threads of Python at once: the last that leaves finds what the first one found.

    >>> before = torch.get_num_threads()
    >>> with few_threads(100):
    ...     torch.get_num_threads()
    1
    >>> torch.get_num_threads() == before
    True
    """
    depth = getattr(_DEPTH, "value", 0)
    if depth or entries >= SMALL:
        yield
        return
    _enter()
    _DEPTH.value = 1
    try:
        yield
    finally:
        _DEPTH.value = 0
        _leave()


def _enter() -> None:
    global _users, _before
    with _LOCK:
        if not _users:
            _before = torch.get_num_threads()
        _users += 1
        torch.set_num_threads(1)  # of this thread of Python, and of those that begin


def _leave() -> None:
    global _users
    with _LOCK:
        _users -= 1
        torch.set_num_threads(_before)
