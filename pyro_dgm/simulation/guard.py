"""Work in a child process, which may hang, exit or crash without harm to the process that waits for it.

The child is a copy of this process (``fork``): nothing has to be sent to it, models in notebooks neither, and workers of
executors, which may not start processes of Python's kind, can have one. Each run of the model has an alarm of the system, which
ends the process whatever code hangs, also where nobody waits for it any more. Programs that the child started end with it.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn

import torch

from pyro_dgm.core.devices import acting_for_another
from pyro_dgm.core.pace import working

__all__ = ["Lost", "alone", "answer", "in_child", "refuse_no_children", "tell", "timed"]

_LOOK = 0.2  # seconds between looks whether a silent child is alive; a child that ends is told at once

_lock = threading.RLock()  # threads of an executor take turns; a model may simulate, too
_limit: float | None = None  # seconds of a run; in a child
_parent: Connection | None = None  # in a child


class Lost(Exception):
    """A child that ended before its work did; the message says how, and ``late`` whether by the time limit."""

    def __init__(self, message: str = "", late: bool = False) -> None:
        super().__init__(message)
        self.late = late


class _Raised:
    """An error on its way out of a child."""

    def __init__(self, error: BaseException) -> None:
        try:
            pickle.loads(pickle.dumps(error))
            self.error = error
        except Exception:
            self.error = RuntimeError(f"{type(error).__name__}: {error}")


class _End:
    """What a child sends last."""


def refuse_no_children() -> None:
    """Refuse systems on which no process can be copied."""
    if not hasattr(os, "fork"):
        raise ValueError(
            "simulate: timeout= needs fork, which this system does not have. Leave it out, or simulate under Linux, macOS or "
            "the Windows Subsystem for Linux."
        )


@contextmanager
def alone() -> Iterator[None]:
    """Within the context no other thread runs a model."""
    with _lock, acting_for_another():
        yield


@contextmanager
def timed() -> Iterator[None]:
    """In a child, the context must end in time, or the process does."""
    if _limit is None:
        yield
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def tell(item: Any) -> None:
    """In a child, send an item to the process that waits; elsewhere nothing."""
    if _parent is not None:
        _parent.send_bytes(pickle.dumps(item))


def answer(work: Callable[[], Any], timeout: float | None) -> Any:
    """What ``work()`` gives in a child; in this process without a time limit.

    >>> answer(lambda: 2 + 2, 5.0)
    4
    """
    if timeout is None:
        return work()
    (item,) = in_child(lambda: [work()], timeout)
    return item


def in_child(work: Callable[[], Iterable[Any]], timeout: float) -> Generator[Any]:
    """What ``work()`` gives, item by item, and what is told in between, from a child in which a run has so many seconds.

    Raises:
        Lost: if the child ended before the work did: by its own will, a signal, or the time limit.
        Exception: what the work raised.
    """
    reader, writer = Pipe(duplex=False)
    with alone():  # a child inherits the handlers of a run that is under way
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # or both processes write what waits
        pid = os.fork()
        if not pid:
            reader.close()  # or it would write to itself for ever, if the one who reads is killed
            _serve(work, writer, timeout)
        writer.close()  # before the next child, which would keep it open
    with suppress(OSError):
        os.setpgid(pid, pid)  # the child does it too: whoever is first
    status: list[int] = []
    try:
        yield from _received(reader, pid, status)
    except EOFError:
        raise _lost(_ended(pid, status), timeout) from None
    finally:
        _ended(pid, status)
        reader.close()


def _serve(work: Callable[[], Iterable[Any]], writer: Connection, timeout: float) -> NoReturn:
    """The life of a child."""
    global _limit, _lock, _parent
    _limit, _lock, _parent = timeout, threading.RLock(), writer
    try:
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        torch.set_num_threads(1)  # threads are not copied
        with working(None, None):
            for item in work():
                tell(item)
        tell(_End())
        sys.stdout.flush()
    except BaseException as error:
        with suppress(BaseException):
            tell(_Raised(error))
    finally:
        os._exit(0)


def _received(reader: Connection, pid: int, status: list[int]) -> Iterator[Any]:
    """Items until the last; EOFError where it does not come."""
    while True:
        while not reader.poll(_LOOK):
            status += [] if status else _looked(pid, os.WNOHANG)
            if status and not reader.poll(0.0):  # what it started may hold the pipe open
                raise EOFError
        try:
            item = pickle.loads(reader.recv_bytes())
        except OSError:
            raise EOFError from None
        if isinstance(item, _Raised):
            raise item.error
        if isinstance(item, _End):
            return
        yield item


def _ended(pid: int, status: list[int]) -> int:
    """End a child and what it started, and say how it ended."""
    with suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    status += [] if status else _looked(pid, 0)
    return status[0]


def _looked(pid: int, how: int) -> list[int]:
    try:
        found, status = os.waitpid(pid, how)
    except ChildProcessError:  # somebody else has waited for it
        return [0]
    return [status] if found else []


def _lost(status: int, timeout: float) -> Lost:
    if not os.WIFSIGNALED(status):
        return Lost(f"it ended its process (exit status {os.waitstatus_to_exitcode(status)})")
    number = os.WTERMSIG(status)
    if number == signal.SIGALRM:
        return Lost(f"it took longer than timeout={timeout:g} s", late=True)
    return Lost(f"its process was ended by {signal.Signals(number).name}")
