"""Warnings that point at the user's line, however deep in this package they arise."""

from __future__ import annotations

import pathlib
import sys
import warnings
from itertools import count

import pyro
import torch

__all__ = ["warn_user"]

_INSIDE = tuple(
    str(pathlib.Path(f).parent) for f in (str(pathlib.Path(__file__).parent), pyro.__file__, torch.__file__)
)


def warn_user(message: str) -> None:
    """Warn with the line of the nearest caller outside this package, Pyro and torch."""
    for level in count(1):
        frame = sys._getframe(level)
        if frame.f_back is None or not frame.f_code.co_filename.startswith(_INSIDE):
            break
    warnings.warn(message, stacklevel=level + 1)
