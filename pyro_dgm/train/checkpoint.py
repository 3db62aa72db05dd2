"""State on disk: written whole or not at all, read with ``weights_only=True``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write beside the file and move over it, so that a kill leaves the old state or the new one."""
    part = Path(f"{path}.part")
    torch.save(state, part)
    os.replace(part, path)


def load_checkpoint(path: str | Path) -> dict[str, Any] | None:
    """The saved state, on the CPU, wherever it was saved from; None where there is no file."""
    if not Path(path).exists():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)
