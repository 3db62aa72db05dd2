"""Batch, event and context shapes, and numbers that are settings: what is checked, and the text of every such error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor
from torch.distributions import constraints

if TYPE_CHECKING:
    from pyro_dgm.core.module import DistributionModule

__all__ = [
    "as_shape",
    "broadcast_batch",
    "check_batch",
    "check_built",
    "check_context",
    "check_number",
    "check_support",
    "check_value_shape",
    "of_entries",
    "refuse_non_finite",
]


def as_shape(shape: int | Iterable[int]) -> Size:
    """The event shape of an int (a vector) or of a tuple; ``()`` is a scalar event.

    >>> as_shape(3), as_shape(()), as_shape((28, 28))
    (torch.Size([3]), torch.Size([]), torch.Size([28, 28]))
    """
    size = Size((shape,) if isinstance(shape, int) else tuple(shape))
    if any(n < 1 for n in size):
        raise ValueError(f"event_shape must hold positive sizes, got {tuple(size)}.")
    return size


def check_context(family: DistributionModule, context: Tensor | None) -> Tensor | None:
    """Refuse a context that the family was not built for."""
    name, expected = type(family).__name__, family.context_features
    if context is None:
        if expected:
            raise ValueError(
                f"{name}: no context given, expected shape (..., {expected}). Call it as family(context); for an "
                "unconditional family leave context_features out."
            )
        return None
    if not expected:
        raise ValueError(
            f"{name}: got a context of shape {tuple(context.shape)}, but the family is unconditional. Build it with "
            f"{name}(..., context_features={context.shape[-1] if context.dim() else 1})."
        )
    if not context.dim() or context.shape[-1] != expected:
        got = context.shape[-1] if context.dim() else "no"
        raise ValueError(
            f"{name}: context has {got} features, expected {expected} (context shape {tuple(context.shape)}). Build "
            f"it with {name}(..., context_features={got}) or pass the columns you trained on."
        )
    return context


def check_built(family: DistributionModule, event_shape: Size, expected: Size) -> None:
    """Refuse a ``build`` whose event shape is not the declared one (flat or in shape)."""
    if event_shape not in (expected, Size((expected.numel(),))):
        raise ValueError(
            f"{type(family).__name__}.build returned event shape {tuple(event_shape)}, expected {tuple(expected)} "
            f"(event_shape {tuple(family.event_shape)}). Use .to_event(n) to move batch dimensions into the event."
        )


def check_value_shape(name: str, value: Tensor, event_shape: Size) -> None:
    """Refuse a value whose rightmost dimensions are not the event."""
    n = len(event_shape)
    if value.dim() < n or value.shape[value.dim() - n :] != event_shape:
        raise ValueError(
            f"{name}: value has shape {tuple(value.shape)}, expected (..., {', '.join(map(str, event_shape))}): its "
            f"last {n} dimension(s) must be the event shape {tuple(event_shape)}."
        )


def broadcast_batch(name: str, value_batch: Size, batch_shape: Size) -> Size:
    """The batch shape of a score: the value's and the distribution's batch shapes, broadcast."""
    if not batch_shape:
        return value_batch
    try:
        return torch.broadcast_shapes(value_batch, batch_shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: the value's batch shape {tuple(value_batch)} does not broadcast with the distribution's batch "
            f"shape {tuple(batch_shape)}. Add singleton dimensions to the context or to the value."
        ) from error


def check_support(name: str, value: Tensor, support: constraints.Constraint) -> None:
    """Refuse NaN and values outside the support (only asked while Pyro validates)."""
    if _is_real(support) and value.sum().isfinite():  # one pass where all is well
        return
    inside = support.check(value)
    if not inside.all():
        bad = int((~inside).sum())
        raise ValueError(
            f"{name}: {bad} of {inside.numel()} values lie outside the support {support} or are NaN "
            f"(NaN entries: {int(value.isnan().sum())}). Clean the data, or build the family with support=..."
        )


def check_batch(name: str, family: DistributionModule, x: Tensor, context: Tensor | None) -> None:
    """Refuse events and contexts that do not fit a family, or hold NaN."""
    shape, event = tuple(x.shape), tuple(family.event_shape)
    if x.dim() != 1 + len(event) or shape[1:] != event:
        raise ValueError(
            f"{name}: data have shape {shape}, expected (N, {', '.join(map(str, event))}): rows of events."
        )
    if (context is None) != (family.context_features == 0):
        raise ValueError(
            f"{name}: {type(family).__name__} has context_features={family.context_features}, but the data hold "
            f"{'no' if context is None else 'a'} context. Pass (x, context) for a conditional family, (x,) otherwise."
        )
    refuse_non_finite(name, x)


def refuse_non_finite(who: str, rows: Tensor, what: str = "rows") -> None:
    """Refuse ``(N, ...)`` of which some rows hold NaN or infinity, and say how many."""
    if rows.sum().isfinite() or rows.isfinite().all():  # one pass where all is well
        return
    bad = int((~rows.isfinite()).reshape(len(rows), -1).any(-1).sum())
    raise ValueError(f"{who}: {bad} of {len(rows)} {what} hold NaN or infinity. Clean the data.")


def check_number(
    owner: str,
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    whole: bool = False,
    advice: str = "",
) -> None:
    """Refuse a setting that is no finite number, no whole one where it counts something, or too small.

    >>> check_number("fit", "max_steps", 10, least=1, whole=True)
    >>> check_number("fit", "lr", float("nan"), above=0)
    Traceback (most recent call last):
    ValueError: fit: lr=nan, expected a finite number > 0.
    """
    bounds = [f">= {least:g}"] if least is not None else []
    bounds += [f"> {above:g}"] if above is not None else []
    expected = " ".join(["a whole number" if whole else "a finite number", *bounds])
    message = " ".join([f"{owner}: {name}={value!r}, expected {expected}.", advice]).strip()
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise TypeError(message)
    too_small = (least is not None and value < least) or (above is not None and value <= above)
    if too_small or not math.isfinite(value):
        raise ValueError(message)


def _is_real(support: constraints.Constraint) -> bool:
    return of_entries(support) is constraints.real


def of_entries(support: Any) -> Any:
    """The constraint on single entries, of one on whole events.

    >>> of_entries(constraints.real_vector)
    Real()
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support
