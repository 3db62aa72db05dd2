"""What distributions and their transforms are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor, nn
from torch.distributions import Transform, TransformedDistribution, constraints
from torch.distributions.transforms import (
    ComposeTransform,
    IndependentTransform,
    ReshapeTransform,
    _InverseTransform,
)

__all__ = ["declares_support", "holds_grad", "made_of", "simple_parts", "unwrapped"]


def unwrapped(fn: Any) -> Any:
    """The distribution below ``to_event``, ``mask`` and ``expand``."""
    while isinstance(fn, (MaskedDistribution, ExpandedDistribution, torch.distributions.Independent)):
        fn = fn.base_dist
    return fn


def declares_support(kind: type) -> bool:
    """Whether a family of transformed distributions has its own word on where it lives, not what its last transform says."""
    return any("support" in c.__dict__ for c in kind.__mro__[: kind.__mro__.index(TransformedDistribution)])


def simple_parts(transforms: Iterable[Transform]) -> Iterator[Transform]:
    """The transforms one after the other, out of compositions, inverses and added event dimensions."""
    for t in transforms:
        if isinstance(t, ComposeTransform):
            yield from simple_parts(t.parts)
        elif isinstance(t, IndependentTransform):
            yield from simple_parts([t.base_transform])
        elif isinstance(t, _InverseTransform) and not _is_simple(t.inv):
            yield from (part.inv for part in reversed(list(simple_parts([t.inv]))))
        elif not isinstance(t, ReshapeTransform):
            yield t


def _is_simple(t: Transform) -> bool:
    return not isinstance(t, ComposeTransform | IndependentTransform | ReshapeTransform)


def made_of(thing: Any) -> dict[str, Any]:
    """The attributes of a constraint or a transform, without what it remembers of its last value."""
    inverse = isinstance(thing, _InverseTransform)  # any other transform holds its inverse, which holds it
    return {k: v for k, v in vars(thing).items() if not k.startswith("_cached") and (inverse or k != "_inv")}


def holds_grad(thing: Any) -> bool:
    """Whether a constraint or a transform holds a tensor that requires grad, in its parts too."""
    if isinstance(thing, Tensor):
        return thing.requires_grad
    if isinstance(thing, nn.Module) and any(p.requires_grad for p in thing.parameters()):
        return True
    if isinstance(thing, list | tuple):
        return any(holds_grad(t) for t in thing)
    if not isinstance(thing, constraints.Constraint | Transform):
        return callable(thing)  # a function may hold anything
    return any(holds_grad(v) for v in made_of(thing).values())
