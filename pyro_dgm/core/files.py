"""Files that are there in full or not at all: who writes them, whether there is room, and whether they are what was written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import sys
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pyro_dgm.core.kinds import LARGEST

if sys.platform != "win32":
    import fcntl

__all__ = [
    "PART", "load_state", "new_part", "only_here", "read_state", "refuse_link", "refuse_no_place", "refuse_no_room", "reserve",
    "save_state", "size_of", "unwritten",
]  # fmt: skip

PART = ".dgm-part"  # in the names of files that are not finished
_CHUNK = 2**24  # bytes of zeros that are written at once
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_HELD: dict[tuple[int, Path], object] = {}  # process and file; the system's locks do not tell threads apart


# --- Who writes ---------------------------------------------------------------------------------------------------------


@contextmanager
def only_here(what: str, lock: Path) -> Iterator[None]:
    """Within the context ``what`` is written by this call alone. ``lock`` is a file that names the process meanwhile.

    The system takes its lock on that file back when the process ends, however it ends.

    Raises:
        RuntimeError: if another call writes it, of this process or another, or of another machine, which cannot be asked.
        OSError: if nothing can be written there.
    """
    mine = object()
    place = (os.getpid(), lock.parent.resolve() / lock.name)
    if _HELD.setdefault(place, mine) is not mine:
        raise RuntimeError(_in_use(what, lock, f"another call of this process, {os.getpid()}"))
    try:
        file = _owned(what, lock)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
                lock.unlink()
            os.close(file)
    finally:
        del _HELD[place]


def _owned(what: str, lock: Path) -> int:
    """The open file, signed; not one that its last owner removed while we opened it."""
    while True:
        try:
            file = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            raise unwritten(what, lock.parent, 0, error) from error
        try:
            _refuse_other_owner(what, lock, file)
            _sign(what, lock, file)
            if lock.exists() and os.path.samestat(os.fstat(file), lock.stat()):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _sign(what: str, lock: Path, file: int) -> None:
    try:
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    except OSError as error:
        raise unwritten(what, lock.parent, 0, error) from error


def _refuse_other_owner(what: str, lock: Path, file: int) -> None:
    sure = _locked_by_the_system(what, lock, file)
    owner = _owner(file)
    if not owner:
        return
    here = owner.get("host") == socket.gethostname()
    if not here or (not sure and _alive(owner.get("pid"))):
        raise RuntimeError(_in_use(what, lock, f"process {owner.get('pid')} on {owner.get('host')}"))


def _locked_by_the_system(what: str, lock: Path, file: int) -> bool:
    """False where the file system knows no locks; then the process number must do."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            owner = _owner(file)
            who = f"process {owner.get('pid')} on {owner.get('host')}" if owner else "another process"
            raise RuntimeError(_in_use(what, lock, who)) from None
        return False
    return True


def _owner(file: int) -> dict[str, Any]:
    os.lseek(file, 0, os.SEEK_SET)
    text = os.read(file, 1_000)
    try:
        found = json.loads(text or b"{}")
    except ValueError:  # killed while it was written
        return {}
    return found if isinstance(found, dict) else {}


def _alive(pid: Any) -> bool:
    if sys.platform == "win32" or not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _in_use(what: str, lock: Path, who: str) -> str:
    return (
        f"{what} is in use by {who}. Two calls cannot write there at once: wait for the other to end, give each its own path, "
        f"or, if that process is gone, delete {lock}."
    )


# --- Whether there is a place, and room ---------------------------------------------------------------------------------


def refuse_link(what: str, path: Path) -> None:
    """Refuse a link, through which another's file would be written, or which a file would replace."""
    if os.path.islink(path):
        raise ValueError(
            f"{what} {path} is a link to {os.readlink(path)}; links are not followed. Give the path itself."
        )


def refuse_no_place(what: str, path: Path) -> None:
    """Refuse a path at which no file can be written."""
    refuse_link(what, path)
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        why = "is a folder" if os.path.isdir(path) else f"cannot be saved: there is no folder {path.parent}"
        raise ValueError(f"{what} {path} {why}. Name a file in a folder that exists.")


def refuse_no_room(what: str, path: Path, needed: int) -> None:
    """Refuse a file of so many bytes where the disk has no room for it, or nothing can be written: by trying.

    Raises:
        OSError: which names what is needed and what is free.
    """
    try:
        file, part = new_part(path)
        try:
            with file:
                reserve(file, 0, needed)
        finally:
            part.unlink()
    except OSError as error:
        raise unwritten(f"{what} {path}", path.parent, needed, error) from error


def new_part(path: Path) -> tuple[BinaryIO, Path]:
    """A new file with a name of its own: neither another process's file nor the target of a link is overwritten."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PART}")
    return part.open("xb"), part


def reserve(file: BinaryIO, start: int, size: int) -> None:
    """Zeros from there on, with all their blocks on the disk: neither a write nor a memory map finds it full later."""
    if size > LARGEST:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    if hasattr(os, "posix_fallocate") and size:
        try:
            return os.posix_fallocate(file.fileno(), start, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    for done in range(0, size, _CHUNK):
        file.write(bytes(min(_CHUNK, size - done)))
    file.flush()


def unwritten(what: str, folder: Path, needed: int, error: OSError, advice: str = "") -> OSError:
    """The error of a write that failed: what was to be written, how much, how much is free, and what to do."""
    if error.errno not in _FULL:
        return OSError(
            error.errno, f"{what}: nothing can be written in {folder} ({error.strerror}). Give another path."
        )
    free = shutil.disk_usage(folder).free
    return OSError(
        error.errno,
        f"{what} needs {needed:,} bytes, and {free:,} are free there ({error.strerror}). Make room, or give a path on another "
        f"disk{advice}. What was saved before is kept.",
    )


# --- States ---------------------------------------------------------------------------------------------------------------


def save_state(what: str, path: str | Path, state: dict[str, Any]) -> None:
    """Write beside the file and move over it, so that a kill leaves the old state or the new one.

    Raises:
        OSError: if there is no room, or nothing can be written; a file that was there stands.
    """
    path = Path(path)
    try:
        file, part = new_part(path)
        try:
            with file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch hides what the system said
        if not isinstance(cause, OSError):
            raise
        raise unwritten(f"{what} {path}", path.parent, size_of(state), cause) from error


def load_state(path: str | Path) -> Any:
    """What :func:`save_state` wrote, on the CPU, wherever it came from; None where there is no file. No code of it runs."""
    if not Path(path).exists():
        return None
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()  # torch does not look at the checksums
    if damaged:
        raise zipfile.BadZipFile(f"{path}: the checksum of {damaged} does not fit its values")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_state(who: str, path: str | Path, kind: str, advice: str) -> Any:
    """The same of a file that has to be there.

    Raises:
        FileNotFoundError: if it is not.
        ValueError: if it cannot be read: it is damaged, or another ``kind`` of file; with the advice.
    """
    try:
        state = load_state(path)
    except Exception as error:  # torch raises a dozen kinds
        raise ValueError(
            f"{who}: {path} cannot be read ({type(error).__name__}). It is cut off or damaged, or {kind}. {advice}"
        ) from None
    if state is None:
        raise FileNotFoundError(f"{who}: there is no file {path}.")
    return state


def size_of(state: Any) -> int:
    """Bytes of all tensors in lists and mappings."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    inside = state.values() if isinstance(state, Mapping) else state if isinstance(state, Sequence) else ()
    return 0 if isinstance(state, str) else sum(map(size_of, inside))
