r"""A first arrangement of a generator's draws: sliced Wasserstein distance, without a critic.

.. math:: SW(x, y) = E_w \int_0^1 |F^{-1}_{w \cdot x}(u) - F^{-1}_{w \cdot y}(u)|\, du, \qquad |w| = 1

It sees every mode and its mass from the first step, so adversarial training starts without a mode to find, and has edges left
to sharpen (Deshpande et al. 2018, arXiv 1803.11188).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pyro_dgm.core import DistributionModule, Standardize
from pyro_dgm.core.data import first_rows

__all__ = ["arrange", "sliced_distance"]

_ROWS, _SLICES, _LR = 1024, 64, 2e-3


def sliced_distance(x: Tensor, y: Tensor, slices: int = _SLICES) -> Tensor:
    """Mean distance of the sorted projections of rows ``(N, D)``, over random directions; differentiable."""
    w = normalize(torch.randn(x.shape[-1], slices).to(x), dim=0)
    return ((x @ w).sort(0)[0] - (y @ w).sort(0)[0]).abs().mean()


def arrange(
    generator: DistributionModule, units: Callable[[Tensor], Tensor], batches: Iterator[tuple[Any, ...]], steps: int
) -> None:
    """Move a generator's draws near to the data, in some steps of Adam; with a context, jointly with it."""
    parameters = [p for p in generator.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, _LR)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _LR * (1.0 - step / steps)
        x, context = first_rows(batches, _ROWS, most_batches=_ROWS)
        draws = generator().rsample((len(x),)) if context is None else generator(context).rsample()
        there, here = (_joined(units(r.reshape(len(r), -1)), context) for r in (x, draws))
        loss = sliced_distance(there, here)
        optimizer.zero_grad(set_to_none=True)
        if loss.isfinite():
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _joined(rows: Tensor, context: Tensor | None) -> Tensor:
    """Rows beside their contexts in units of these."""
    if context is None:
        return rows
    return torch.cat([rows, Standardize(context.shape[-1]).to(context).fit(context)(context)], -1)
