"""Handlers that change what a run of a model draws."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_dgm.model.sites import is_data

__all__ = ["EndOfRun", "Given", "Redraw", "Undrawn"]


class EndOfRun(Exception):
    """Raised by a handler that has seen all it wants of a run of a model."""


class Undrawn(ValueError):
    """A run of a model that draws its data anew failed; its cause says how.

    Attributes:
        site: the site that could not be drawn; None where the model failed between two sites.
        anew: whether data had been drawn anew before.
    """

    def __init__(self, redraw: Redraw, error: Exception) -> None:
        self.site, self.anew = redraw.at, redraw.anew
        what = f"site '{self.site}' could not be drawn" if self.site else f"the model failed after {redraw.last}"
        self.reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
        super().__init__(f"{what} ({self.reason.rstrip('.')})")


class Redraw(poutine.messenger.Messenger):
    """Draws observed data anew, in the shape of the data; deterministic and factor sites stay what they are.

    Args:
        leave: data that stay what they are too.

    Attributes:
        at: the site that is being drawn.
        last: the last one that was drawn, in words.
        anew: whether any data were drawn in this run.
    """

    def __init__(self, leave: Collection[str] = ()) -> None:
        super().__init__()
        self.leave = leave
        self._start()

    def _start(self) -> None:
        self.at: str | None = None
        self.last, self.anew = "its start", False

    def __enter__(self) -> Redraw:
        self._start()
        return super().__enter__()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        self.at = msg["name"]
        if is_data(msg) and msg["name"] not in self.leave:
            msg["fn"] = _as_wide_as(msg["value"], msg["fn"])
            msg["is_observed"], msg["value"] = False, None
            self.anew = True

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        self.at, self.last = None, f"site '{msg['name']}'"


def _as_wide_as(value: Any, fn: Any) -> Any:
    """The distribution of independent data in the shape of the value, as its density counts them."""
    if not isinstance(value, Tensor):
        return fn
    try:
        batch = torch.broadcast_shapes(value.shape[: value.dim() - fn.event_dim], fn.batch_shape)
        return fn if batch == fn.batch_shape else fn.expand(batch)
    except (RuntimeError, NotImplementedError):
        return fn


class Given(poutine.messenger.Messenger):
    """Gives latent sites (and the index of plates) their values; they are then not enumerated."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["infer"] = {k: v for k, v in msg["infer"].items() if k != "enumerate"}
