"""A folder of arrays that are filled bit by bit: what it was begun with, who writes in it, and files of the right size.

``manifest.json`` is written last of all when a folder is begun: where it is, all files are there in full. Each array is one
``.npy`` file, allocated before the first simulation, and ``lock`` names the process that writes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Size, Tensor

from pyro_dgm.core.files import PART, new_part, only_here, refuse_link, reserve, unwritten

__all__ = ["Kind", "allocate", "begun", "checked_header", "larger", "locked", "mapped", "no_room"]

Kind = tuple[Size, torch.dtype]

_MANIFEST = "manifest.json"
_CLOSE = 1e-3  # of a standard deviation: proposals within it are the same. Not measured; chosen by hand


# --- Who writes ---------------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: str | Path | None) -> Iterator[Path | None]:
    """The folder, made if need be, for this call alone. What a killed call left unfinished is removed.

    Raises:
        ValueError: if the path is no folder, or a link.
        RuntimeError: if another call writes in it.
        OSError: if nothing can be written there.
    """
    if path is None:
        yield None
        return
    folder = _made(Path(path))
    with only_here(f"simulate: {folder}", folder / "lock"):
        for stale in folder.glob(f"*{PART}*"):
            stale.unlink()
        yield folder


def _made(folder: Path) -> Path:
    refuse_link("simulate: the folder", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"simulate: path={str(folder)!r} is, or goes through, a file; expected a folder.") from error
    except OSError as error:
        raise unwritten(f"simulate: {folder}", folder, 0, error) from error
    return folder


# --- What it was begun with ---------------------------------------------------------------------------------------------


def begun(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the folder was begun with; None where it is new.

    Args:
        wanted: settings; those that are dictionaries are compared entry by entry. A seed of None is any.

    Raises:
        ValueError: if it was begun with something else, or if that cannot be known.
    """
    path = folder / _MANIFEST
    refuse_link("simulate: the manifest", path)
    if not path.exists():
        if any(folder.glob("site-*.npy")) or (folder / "status.npy").exists():
            raise ValueError(f"simulate: {folder} holds arrays but no {_MANIFEST}. {_unknown(folder)}")
        return None
    found = _read(path)
    differ = _differences(found, wanted)
    if differ:
        raise ValueError(
            f"simulate: {folder} was begun with other settings ({'; '.join(differ)}). Give the same ones to go on. For these, "
            "give another path, or delete the folder."
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"simulate: {path} is cut off or damaged ({error}). {_unknown(path.parent)}") from error
    if not isinstance(found, dict) or not isinstance(found.get("seed"), int):
        raise ValueError(f"simulate: {path} holds no settings with a seed. {_unknown(path.parent)}")
    if "model" not in found:
        raise ValueError(
            f"simulate: {path} was written by an older version, which did not note the model and its arguments. "
            f"{_unknown(path.parent)}"
        )
    return found


def _unknown(folder: Path) -> str:
    return f"So it cannot be known what was drawn there: give another path, or delete {folder}."


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    same_proposal = _same_proposal(found.get("proposal"), wanted.get("proposal"))
    told = [] if same_proposal else ["proposal, which is another one, or was and is not both given"]
    now = _entries(wanted)
    before = _entries(found)
    for name in [*now, *(k for k in before if k not in now)]:
        a = before.get(name, "not there")
        b = now.get(name, "not there")
        if a != b and not (name == "seed" and b is None):
            told.append(f"{name} {_shown(a)}, now {_shown(b)}")
    return told


def _entries(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if name != "proposal":
            flat |= (
                {f"{name.removesuffix('s')} '{k}'": v for k, v in value.items()}
                if isinstance(value, dict)
                else {name: value}
            )
    return flat


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _same_proposal(a: Any, b: Any) -> bool:
    """Whether two lists of ``[mean, sd]`` agree but for rounding, which differs between machines."""
    if not isinstance(a, list) or not isinstance(b, list) or len(a) != len(b):
        return a == b
    return all(abs(m - n) <= _CLOSE * s and abs(s - t) <= _CLOSE * s for (m, s), (n, t) in zip(a, b, strict=True))


# --- Arrays -------------------------------------------------------------------------------------------------------------


def allocate(folder: Path, arrays: Mapping[str, Kind], settings: Mapping[str, Any] | None = None) -> None:
    """Files of zeros, with all their blocks on the disk, so that no later write can find it full; all, or none.

    Args:
        settings: of a folder that begins with these files.

    Raises:
        OSError: if there is no room; it names what is needed and what is free.
    """
    needed = sum(map(_bytes, arrays.values()))
    parts: dict[str, Path] = {}
    try:
        for name, kind in arrays.items():
            file, parts[f"{name}.npy"] = new_part(folder / name)
            with file:
                _fill(file, kind)
        if settings is not None:
            file, parts[_MANIFEST] = new_part(folder / _MANIFEST)
            with file:
                file.write(json.dumps(settings, indent=1).encode())
    except OSError as error:
        for part in parts.values():
            part.unlink()
        raise no_room(folder, needed, error) from error
    for name, part in parts.items():  # the manifest last
        os.replace(part, folder / name)


def larger(folder: Path, name: str, old: Tensor, shape: Size) -> Tensor:
    """Another file in the place of an array's, with more room and the same values; a kill leaves one of them."""
    wider = f"{name}-wider{PART}"
    allocate(folder, {wider: (shape, old.dtype)})
    new = mapped(folder, wider, (shape, old.dtype))
    new[tuple(slice(m) for m in old.shape)] = old
    os.replace(folder / f"{wider}.npy", folder / f"{name}.npy")
    return new


def _fill(file: BinaryIO, kind: Kind) -> None:
    shape, dtype = kind
    described = {"descr": np.lib.format.dtype_to_descr(_numpy(dtype)), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(file, described)
    file.flush()
    reserve(file, file.tell(), _bytes(kind))


def _bytes(kind: Kind) -> int:
    return math.prod(kind[0]) * _numpy(kind[1]).itemsize


def _numpy(dtype: torch.dtype) -> np.dtype:
    try:
        return torch.zeros((), dtype=dtype).numpy().dtype
    except TypeError as error:
        raise ValueError(
            f"simulate: path=: no .npy file holds {dtype}. Let the model draw float32, or leave out path=."
        ) from error


def no_room(folder: Path, needed: int, error: OSError) -> OSError:
    """The error of a write that failed."""
    return unwritten(f"simulate: {folder}", folder, needed, error, ", or draw fewer")


def mapped(folder: Path, name: str, kind: Kind, *, sized: bool = False, private: bool = False) -> Tensor:
    """An array of the folder, in which writing writes to the disk, or not if it is private.

    Args:
        sized: it may have grown beyond its shape.

    Raises:
        ValueError: if its file is missing, cut off, too long, or of another shape or dtype.
    """
    path = folder / f"{name}.npy"
    return _map(path, checked_header(path, kind, sized), "c" if private else "r+")


def checked_header(path: Path, kind: Kind, sized: bool = False) -> tuple[Size, np.dtype, int]:
    """Shape and dtype of a whole file, and where its values begin; see :func:`mapped`."""
    if path.is_symlink():
        raise _bad_file(path, "it is a link")
    try:
        header = _header(path)
    except Exception as error:  # numpy raises several kinds
        raise _bad_file(path, f"it cannot be read ({error})") from error
    shape, dtype, start = header
    fits = len(shape) == len(kind[0]) and shape[0] == kind[0][0]
    fits = fits and (all(a >= b for a, b in zip(shape, kind[0], strict=True)) if sized else shape == kind[0])
    if not fits or dtype != _numpy(kind[1]):
        raise _bad_file(path, f"it holds {dtype} {tuple(shape)}, expected {_numpy(kind[1])} {tuple(kind[0])}")
    size = path.stat().st_size
    expected = start + shape.numel() * dtype.itemsize
    if size != expected:
        raise _bad_file(path, f"it has {size:,} bytes, expected {expected:,}")
    return header


def _header(path: Path) -> tuple[Size, np.dtype, int]:
    """Shape, dtype, and where the values begin."""
    with path.open("rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not of the version that is written here")
        shape, reverse, dtype = np.lib.format.read_array_header_1_0(file)
        if reverse:
            raise ValueError("its axes are in reverse order")
        return Size(shape), dtype, file.tell()


def _map(path: Path, header: tuple[Size, np.dtype, int], mode: Any) -> Tensor:
    shape, dtype, start = header
    if not shape.numel():  # nothing can be mapped
        return torch.from_numpy(np.zeros(shape, dtype))
    return torch.from_numpy(np.memmap(path, dtype, mode, start, tuple(shape)))


def _bad_file(path: Path, fault: str) -> ValueError:
    return ValueError(
        f"simulate: {path} is not what was written there: {fault}. Draws are lost: put the file back from a copy, or give "
        f"another path, or delete {path.parent}."
    )
