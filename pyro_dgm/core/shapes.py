"""The door of the package: what comes in becomes tensors of the right kind and shape, or an error that says what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_dgm.core.upstream import unseen
from pyro_dgm.core.warn import in_short

if TYPE_CHECKING:
    from pyro_dgm.core.module import DistributionModule

__all__ = [
    "ShapeAttribute",
    "as_count",
    "as_shape",
    "as_tensor_like",
    "broadcast_batch",
    "check_batch",
    "check_context",
    "check_number",
    "check_support",
    "check_value_shape",
    "fitting_context",
    "from_arrays",
    "in_context_units",
    "is_moderate",
    "is_real",
    "of_entries",
    "reference",
    "refuse_immoderate",
    "refuse_non_finite",
    "refuse_two_precisions",
    "spreads",
]

_LARGEST: Any = {True: 2**64, False: torch.finfo(torch.float64).max}  # of settings, by whether they are whole
_ADDRESSED = 2**45  # numbers of 4 bytes: processors address no more
_NUMBERS = "biuf"  # numpy's kinds that become tensors: booleans, integers with and without a sign, floats


def as_tensor_like(who: str, what: str, value: Any, like: Tensor | None) -> Tensor:
    """The value in the precision and on the device of ``like``; without one, in its own. Gradients go through.

    Arrays of numpy and pandas, lists of numbers and tensors of another dtype are converted. A tensor that fits is returned
    as it is, which costs a comparison.

    Raises:
        TypeError: for what is no array of real numbers: text, objects, complex or sparse data, ragged lists, None.

    >>> as_tensor_like("NSF", "value", [[1, 2]], torch.zeros(3))
    tensor([[1., 2.]])
    """
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested:
        if not _is_odd(value) if like is None else value.dtype is like.dtype and value.device == like.device:
            return value
    tensor = value if isinstance(value, Tensor) else _from_array(who, what, value)
    _refuse_other_kinds(who, what, tensor)
    return tensor if like is None else tensor.to(dtype=like.dtype, device=like.device)


def from_arrays(who: str, value: Any) -> Any:
    """Data with the arrays of numpy and pandas in them, also in containers, as tensors; floats in torch's default precision.

    Integers and booleans stay what they are: a model may count with them. Tensors, lists of numbers and the rest stay.

    >>> from_arrays("fit", {"x": np.zeros(2), "n": 3})
    {'x': tensor([0., 0.]), 'n': 3}
    """
    if isinstance(value, dict):
        return {k: from_arrays(who, v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(from_arrays(who, v) for v in value)
    if isinstance(value, Tensor) and _is_odd(value):
        _refuse_other_kinds(who, "data", value)
    if isinstance(value, Tensor | np.generic | type) or not hasattr(value, "__array__"):
        return value
    tensor = _from_array(who, "data", value)
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def _is_odd(x: Tensor) -> bool:
    return x.is_meta or x.is_complex() or x.is_quantized or x.is_nested


def _from_array(who: str, what: str, value: Any) -> Tensor:
    """What numpy can read as numbers, as a tensor of its own."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{who}: {what} is a masked array, whose mask would be lost. Fill it: {what}.filled(0.0).")
    try:
        array = None if value is None else np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # ragged lists, tensors with gradients in a list
        array = None
    if array is None or array.dtype.kind not in _NUMBERS:
        got = type(value).__name__ if array is None else f"{type(value).__name__} of dtype {array.dtype}"
        raise TypeError(
            f"{who}: {what} is {got}, expected a tensor or array of real numbers. Convert it, as by {_advice(value, array)}."
        )
    return torch.from_numpy(np.array(array, np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")))


def _advice(value: Any, array: np.ndarray | None) -> str:
    """The line that makes a tensor of a value that was refused."""
    if array is not None and array.dtype.kind == "c":
        return "np.stack([x.real, x.imag], -1)"
    if isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) for v in value):
        return "torch.stack(x), of rows of equal length"
    if array is not None and any(isinstance(v, str) for v in array.flat):
        return "pandas.factorize(column)[0], of a column of words"
    return "torch.as_tensor(np.asarray(x, dtype='float32'))"


def _refuse_other_kinds(who: str, what: str, tensor: Tensor) -> None:
    """Refuse tensors whose conversion would lose something."""
    line = ""
    if tensor.is_complex():
        line = "torch.view_as_real(x)"
    elif tensor.is_nested or tensor.layout is not torch.strided:
        line = "torch.nested.to_padded_tensor(x, 0.0)" if tensor.is_nested else "x.to_dense()"
    elif tensor.is_quantized:
        line = "x.dequantize()"
    elif tensor.is_meta:
        line = "torch.zeros_like(x, device='cpu')"
    if line:
        kind = "nested" if tensor.is_nested else f"{tensor.dtype} in the layout {tensor.layout}, on {tensor.device}"
        raise TypeError(f"{who}: {what} is a tensor ({kind}), expected real numbers, dense. Convert it, as by {line}.")


def reference(module: nn.Module) -> Tensor | None:
    """The first floating parameter or buffer, which says dtype and device of a module; None without one."""
    waiting: list[nn.Module | None] = [module]
    for each in waiting:  # it grows meanwhile
        if each is None:
            continue
        for tensor in (*each._parameters.values(), *each._buffers.values()):
            if tensor is not None and tensor.is_floating_point():
                return tensor
        waiting += [m for name, m in each._modules.items() if name != "context_units"]  # which follow the module's kind
    return None


def refuse_two_precisions(who: str, module: nn.Module) -> None:
    """Refuse parts whose parameters have different dtypes: no product of them is defined."""
    found = sorted({str(p.dtype) for p in module.parameters() if p.is_floating_point()})
    if len(found) > 1:
        raise TypeError(
            f"{who}: its parts have parameters of {' and '.join(found)}. Bring them to one: module.float()."
        )


def as_shape(shape: int | Iterable[int], what: str = "event_shape", least: int = 1) -> Size:
    """The shape of an int (a vector) or of a tuple or list; ``()`` is a scalar event.

    >>> as_shape(3), as_shape(()), as_shape([28, 28])
    (torch.Size([3]), torch.Size([]), torch.Size([28, 28]))
    """
    sizes = shape if type(shape) is Size else Size(_integers(shape, what))
    if any(n < least for n in sizes) or math.prod(sizes) >= _ADDRESSED:
        allowed = "positive sizes" if least == 1 else "no negative sizes"
        allowed = allowed if all(n < 2**31 for n in sizes) else "sizes of fewer than 2**45 numbers"
        raise ValueError(f"{what} must hold {allowed}, got {tuple(sizes)}; () is a single number.")
    return sizes


def _integers(shape: Any, what: str) -> tuple[int, ...]:
    try:
        one = not isinstance(shape, Iterable) or not getattr(shape, "ndim", 1)
        return tuple(map(index, (shape,) if one else shape))
    except (TypeError, RuntimeError) as error:  # the latter of torch, for a tensor on the meta device
        raise TypeError(
            f"{what} is {' '.join(repr(shape).split())[:200]}, expected an integer or a tuple of integers, such as 3 or (28, 28)."
        ) from error


def as_count(who: str, what: str, value: int) -> int:
    """A number of features, 0 or more.

    >>> as_count("MAF", "context_features", 2)
    2
    """
    try:
        count = index(value)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{who}: {what} is {' '.join(repr(value).split())[:80]}, expected an integer.") from error
    if not 0 <= count < 2**63:
        raise ValueError(f"{who}: {what} is {count}, expected 0 (none) or more, below 2**63.")
    return count


class ShapeAttribute:
    """An attribute that is a shape, also where a subclass sets it to an int, a tuple or a list."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Size:
        try:
            return instance.__dict__[self.name]
        except (KeyError, AttributeError):
            raise AttributeError(f"{self.name} is not set: call super().__init__(event_shape) first.") from None

    def __set__(self, instance: Any, value: int | Iterable[int]) -> None:
        instance.__dict__[self.name] = as_shape(value, f"{type(instance).__name__}: {self.name}")


def check_context(family: DistributionModule, context: Tensor | None) -> Tensor | None:
    """The context as a family's networks read it; one that does not fit is refused, and while Pyro validates one with NaN."""
    context = fitting_context(type(family).__name__, family, context)
    return None if context is None else in_context_units(type(family).__name__, family, context)


def fitting_context(who: str, module: Any, context: Any) -> Tensor | None:
    """The context as a tensor, or an error where a family, critic or ratio was built for another one, or for none."""
    name, expected = type(module).__name__.removeprefix("Pyro"), module.context_features
    if context is None:
        if expected:
            raise ValueError(
                f"{who}: no context given, expected shape (..., {expected}). Pass it too, as in family(context); to do "
                f"without, build {name}(...) without context_features."
            )
        return None
    context = as_tensor_like(who, "context", context, None)
    got = context.shape[-1] if context.dim() else 1
    if not expected:
        raise ValueError(
            f"{who}: got a context of shape {tuple(context.shape)}, but {name} is unconditional. Build it with "
            f"{name}(..., context_features={got}), or leave the context out.{_what_it_may_be(module, context)}"
        )
    if not context.dim() or got != expected:
        raise ValueError(
            f"{who}: context has {got if context.dim() else 'no'} features, expected {expected} (context shape "
            f"{tuple(context.shape)}). Build it with {name}(..., context_features={got}) or pass the columns you trained on."
            f"{_what_it_may_be(module, context)}"
        )
    return context


def _what_it_may_be(module: Any, context: Tensor) -> str:
    """What a context that does not fit seems to be, by its shape."""
    event = module.event_shape
    if not event or context.shape[-len(event) :] != event:
        return ""
    if context.dtype is torch.bool:
        return " A mask is no context: of rows with missing entries train a VAE."
    return " It has the shape of an event: are x and context swapped?" if module.context_features else ""


def in_context_units(name: str, module: Any, context: Tensor) -> Tensor:
    """A context of the right length as a module's networks read it: in its units, once it has some, and of its kind."""
    raw = module.context_units.is_identity()
    if Distribution._validate_args:
        refuse = refuse_immoderate if raw else refuse_non_finite
        refuse(name, context.reshape(-1, module.context_features), "contexts")
    return as_tensor_like(name, "context", context if raw else module.context_units(context), reference(module))


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


def spreads(shape: Sequence[int], over: Sequence[int]) -> bool:
    """Whether a tensor of one shape can be expanded to another, as ``(1, 3)`` to ``(5, 2, 3)``."""
    return len(shape) <= len(over) and all(m in (1, n) for m, n in zip(shape[::-1], over[::-1], strict=False))


def is_moderate(value: Tensor) -> bool:
    """Whether all is well with a value: no entry is NaN, infinite, or so large that its square is. One pass; in vmap unasked."""
    return unseen(value) or bool((value * value).sum().isfinite())


def check_support(name: str, value: Tensor, support: constraints.Constraint, moderate: bool) -> None:
    """Refuse NaN and values outside the support (only asked while Pyro validates)."""
    if moderate and is_real(support):
        return
    inside = support.check(value)
    if not unseen(inside) and not inside.all():
        bad = int((~inside).sum())
        raise ValueError(
            f"{name}: {bad} of {inside.numel()} values lie outside the support {in_short(support)} or are NaN "
            f"(NaN entries: {int(value.isnan().sum())}). Clean the data, or build the family with support=..."
        )


def check_batch(
    name: str, family: DistributionModule, x: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A family's events and contexts, as tensors of its kind; those that do not fit it, or hold NaN, are refused."""
    context = fitting_context(name, family, context)  # its kind follows when it is put in units
    x = as_tensor_like(name, "data", x, reference(family))
    shape, event = tuple(x.shape), tuple(family.event_shape)
    if x.dim() != 1 + len(event) or shape[1:] != event:
        raise ValueError(
            f"{name}: data have shape {shape}, expected (N, {', '.join(map(str, event))}): rows of events. "
            "One row is x[None], one column x[:, None]."
        )
    refuse_non_finite(name, x)
    if context is not None and context.shape != (len(x), family.context_features):
        raise ValueError(
            f"{name}: the context has shape {tuple(context.shape)}, expected ({len(x)}, {family.context_features}): one row "
            "for each event."
        )
    if context is not None:
        refuse_non_finite(name, context, "contexts")
    return x, context


def refuse_non_finite(who: str, rows: Tensor, what: str = "rows") -> None:
    """Refuse ``(N, ...)`` of which some rows hold NaN or infinity, and say how many."""
    if _all_finite(rows):
        return
    bad = int((~rows.isfinite()).reshape(len(rows), -1).any(-1).sum())
    raise ValueError(f"{who}: {bad} of {len(rows)} {what} hold NaN or infinity. Clean the data.")


def refuse_immoderate(who: str, rows: Tensor, what: str = "rows") -> None:
    """Refuse ``(N, ...)`` that hold NaN, infinity, or numbers whose squares overflow."""
    if is_moderate(rows):
        return
    refuse_non_finite(who, rows, what)
    raise ValueError(
        f"{who}: {what} hold numbers up to {float(rows.abs().max()):.3g}, whose squares overflow in {rows.dtype}. Bring them to "
        "the unit scale (Standardize)."
    )


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
    message = f"{owner}: {name}={' '.join(repr(value).split())[:200]}, expected {expected}. {advice}".strip()
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise TypeError(message)
    too_small = (least is not None and value < least) or (above is not None and value <= above)
    if too_small or not abs(value) <= _LARGEST[whole]:
        raise ValueError(message)


def _all_finite(x: Tensor) -> bool:
    """One pass where all is well; inside of vmap no number may be looked at."""
    return unseen(x) or bool(x.sum().isfinite() or x.isfinite().all())


def is_real(support: constraints.Constraint | None) -> bool:
    """Whether every entry may be any real number."""
    return of_entries(support) is constraints.real


def of_entries(support: Any) -> Any:
    """The constraint on single entries, of one on whole events.

    >>> of_entries(constraints.real_vector)
    Real()
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support
