"""Samples as rows: what is checked before anything is compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_rows", "exactly_centred", "featured", "same_features", "squared_distances"]


def as_rows(who: str, what: str, x: Any, minimum: int = 2) -> Tensor:
    """``x`` of shape ``(N, *event)`` as finite floating rows ``(N, D)``."""
    rows = torch.as_tensor(x).detach()
    if not rows.dim() or len(rows) < minimum:
        raise ValueError(
            f"{who}: {what} has shape {tuple(rows.shape)}, expected (N, ...) with N >= {minimum} rows, one row a draw."
        )
    rows = rows.reshape(len(rows), -1)
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    if not rows.isfinite().all():
        raise ValueError(
            f"{who}: {int((~rows.isfinite()).any(-1).sum())} of {len(rows)} rows of {what} hold NaN or inf."
        )
    return rows


def same_features(who: str, **samples: Any) -> list[Tensor]:
    """Several samples as rows of the same length, device and precision."""
    rows = {name: as_rows(who, name, x) for name, x in samples.items()}
    if len({r.shape[1] for r in rows.values()}) > 1:
        sizes = ", ".join(f"{name} has {r.shape[1]}" for name, r in rows.items())
        raise ValueError(f"{who}: numbers per row differ: {sizes}. Pass draws of one space, one row a draw.")
    first = max(rows.values(), key=lambda r: r.dtype.itemsize)
    return [r.to(first) for r in rows.values()]


def featured(features: Callable[[Tensor], Tensor] | None, x: Any, batch_size: int = 512) -> Any:
    """``features(x)`` without a graph, in batches; ``x`` itself where there are no features."""
    if features is None:
        return x
    with torch.no_grad():
        return torch.cat([features(part) for part in torch.as_tensor(x).split(batch_size)])


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances ``(len(a), len(b))`` by one matrix product: centre the rows first."""
    return torch.addmm(b.square().sum(-1), a, b.T, alpha=-2.0).add_(a.square().sum(-1, keepdim=True)).clamp_(min=0.0)


def exactly_centred(*samples: Tensor) -> list[Tensor]:
    """Rows in float64 around a common centre of integers: equal rows of integers (images) are at distance 0 exactly."""
    centre = samples[0].double().mean(0).round()
    return [s.double() - centre for s in samples]
