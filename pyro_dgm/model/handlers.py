"""Handlers that change what a run of a model draws."""

from __future__ import annotations

from typing import Any

from pyro import poutine
from torch import Tensor

from pyro_dgm.model.sites import is_data

__all__ = ["Given", "Redraw"]


class Redraw(poutine.messenger.Messenger):
    """Draws observed data anew; deterministic and factor sites stay what they are."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_data(msg):
            msg["is_observed"], msg["value"] = False, None


class Given(poutine.messenger.Messenger):
    """Gives latent sites (and the index of plates) their values; they are then not enumerated."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["infer"] = {k: v for k, v in msg["infer"].items() if k != "enumerate"}
