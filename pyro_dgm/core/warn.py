"""Warnings that point at the user's line, however deep in this package they arise."""

from __future__ import annotations

import os
import pathlib
import sys
import warnings
from itertools import count

import pyro
import torch

__all__ = ["warn_user"]

_HERE = pathlib.Path(__file__).parents[1]
_INSIDE = tuple(
    f"{p}{os.sep}" for p in (_HERE, pathlib.Path(pyro.__file__).parent, pathlib.Path(torch.__file__).parent)
)


def warn_user(message: str) -> None:
    """Warn with the line of the nearest caller outside this package, Pyro and torch."""
    for level in count(1):
        frame = sys._getframe(level)
        if frame.f_back is None or not frame.f_code.co_filename.startswith(_INSIDE):
            break
    warnings.warn(message, stacklevel=level + 1)
