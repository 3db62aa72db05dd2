"""Has an optimisation converged? R-hat of its iterates, and their average."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor, nn

__all__ = ["IterateMonitor", "split_rhat"]


class IterateMonitor:
    """Keeps the last iterates of an optimisation at a constant step size and says whether they have become stationary.

    Once they are, the average over the window is a better end than the last iterate, whose noise is that of one step.

    Args:
        parameters: a module (a guide), or a function that returns named tensors; None for Pyro's param store.
        window: number of iterates that are kept.

    Raises:
        ValueError: for a window below 20, or where nothing was recorded yet.

    References:
        | Welandawe, Andersen, Vehtari & Huggins (2022), "Robust, automated, and accurate black-box variational inference",
          arXiv 2203.15945: split R-hat below 1.1 of iterates, and averaging from there.

    Example:
        >>> import torch
        >>> state = {}
        >>> monitor = IterateMonitor(lambda: state.items(), window=100)
        >>> for i in range(100):
        ...     state = {"drifts": torch.tensor(float(i)), "alternates": torch.tensor((-1.0) ** i)}
        ...     monitor.record()
        >>> rhat = monitor.rhat()
        >>> rhat["drifts"] > 1.5, rhat["alternates"] < 1.1, monitor.converged()
        (True, True, False)
    """

    def __init__(
        self, parameters: nn.Module | Callable[[], Iterable[tuple[str, Tensor]]] | None = None, window: int = 200
    ) -> None:
        if window < 20:
            raise ValueError(f"IterateMonitor: window={window}; R-hat of iterates needs at least 20.")
        self._named = _reader(parameters)
        self._kept: deque[dict[str, Tensor]] = deque(maxlen=window)

    def record(self) -> None:
        """Keep the present values; call it after each step."""
        self._kept.append({k: v.detach().clone() for k, v in self._named()})

    def rhat(self) -> dict[str, float]:
        """The largest split R-hat of each parameter over the window; infinite before the window is full."""
        if not self._kept:
            raise ValueError("IterateMonitor: nothing was recorded; call record() after each step.")
        if len(self._kept) < (self._kept.maxlen or 0):
            return {k: math.inf for k in self._kept[-1]}
        return {k: float(split_rhat(self._stacked(k).double()).max()) for k in self._kept[-1]}

    def converged(self, threshold: float = 1.1) -> bool:
        """Whether no parameter's R-hat is above the threshold."""
        return max(self.rhat().values()) < threshold

    def average(self) -> dict[str, Tensor]:
        """Mean of every parameter over the window."""
        if not self._kept:
            raise ValueError("IterateMonitor: nothing was recorded; call record() after each step.")
        return {k: self._stacked(k).mean(0) for k in self._kept[-1]}

    def _stacked(self, name: str) -> Tensor:
        return torch.stack([kept[name] for kept in self._kept])


def _reader(parameters: Any) -> Callable[[], Iterable[tuple[str, Tensor]]]:
    if isinstance(parameters, nn.Module):
        return parameters.named_parameters
    return parameters if parameters is not None else lambda: pyro.get_param_store().named_parameters()


def split_rhat(iterates: Tensor) -> Tensor:
    r"""R-hat of the two halves of a path, shape ``(T, ...) -> (...)``: :math:`\sqrt{(W (n-1)/n + B/n) / W}`.

    A constant path has R-hat 1.

    Example:
        >>> bool(split_rhat(torch.arange(100.0)) > 2.0), float(split_rhat(torch.ones(100)))
        (True, 1.0)
    """
    return split_gelman_rubin(iterates[None]).nan_to_num(nan=1.0, posinf=torch.inf)
