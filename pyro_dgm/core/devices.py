"""Where a module is, and data moved to it: moving the module is all that a GPU asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["device_of", "to_device"]


def device_of(module: nn.Module) -> torch.device | None:
    """The device of the first parameter, or buffer; None where there is none yet."""
    tensor = next(module.parameters(), next(module.buffers(), None))
    return None if tensor is None else tensor.device


def to_device(data: Any, device: torch.device | None) -> Any:
    """All tensors of a tuple, list or mapping on the device; anything else as it is."""
    if isinstance(data, Tensor):
        return data if device is None else data.to(device)
    if isinstance(data, Mapping):
        return {k: to_device(v, device) for k, v in data.items()}
    return type(data)(to_device(v, device) for v in data) if type(data) in (tuple, list) else data
