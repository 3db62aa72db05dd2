"""What a function takes: its arguments held against its own annotations before it runs, for the whole package in one place."""

from __future__ import annotations

import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from operator import index
from typing import Any, TypeVar

import numpy as np
from torch import Size, Tensor, nn
from torch.distributions import Distribution, biject_to, constraints

from pyro_dgm.core.shapes import as_tensor_like, of_entries, spreads
from pyro_dgm.core.upstream import elementwise
from pyro_dgm.core.warn import in_short, plain_errors

__all__ = ["LARGEST", "Above", "checked", "event_support", "shown"]

_SEEDS = (-(2**63), 2**64 - 1)  # that torch takes; numpy's begin at 0, which a function says by its bound
LARGEST = 2**63 - 1  # of whole numbers: torch takes no larger size or count
_LONGEST = 60  # characters of a value in a message
_WORDS = {
    int: "a whole number", float: "a finite number", bool: "True or False", str: "a text", type(None): "None", Tensor: "a tensor",
    nn.Module: "a torch module", os.PathLike: "a path", Callable: "a function",
}  # fmt: skip
_NAMES = {"DistributionModule": "a family", "LazyDistribution": "a lazy zuko flow"}

F = TypeVar("F", bound=Callable[..., Any])


class Above(float):
    """A bound that a number has to exceed."""


class _UnfitError(Exception):
    """A value that is not of a kind."""


def checked(
    advice: Mapping[str, str] | None = None, /, *, only: Sequence[str] = (), **bounds: float
) -> Callable[[F], F]:
    """Refuse arguments that are not what the annotations say, and numbers below their bound, in one line that names them.

    Whole numbers of numpy become Python's, sequences may be of any kind. What is annotated as a tensor
    is converted, as by :func:`~pyro_dgm.core.shapes.as_tensor_like`. It costs some microseconds a call: constructors and
    entries only, no densities.

    Args:
        advice: what to write instead, for arguments that are often another thing.
        only: names of the arguments to look at; none for all.
        bounds: the least value of a number, or of the entries of a sequence; ``Above(0)`` excludes the bound itself.

    Raises:
        TypeError: for another kind of value.
        ValueError: for a number out of bounds, or not finite.

    >>> @checked(steps=1)
    ... def walk(steps: int, names: Sequence[str] = ()) -> int:
    ...     return steps
    >>> walk(np.int64(2))
    2
    >>> walk(2.5)
    Traceback (most recent call last):
    TypeError: walk: steps=2.5, expected a whole number >= 1.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        method = next(iter(signature.parameters), "") in ("self", "cls")
        kinds: dict[str, Any] = {}

        @functools.wraps(function)
        def door(*args: Any, **kwargs: Any) -> Any:
            if not kinds:
                found = _kinds_of(function, signature)
                kinds.update({k: v for k, v in found.items() if not only or k in only})
            who = _owner(function, args[0]) if method and args else function.__name__
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(" ".join([f"{who}: {error}.", *(advice or {}).values()])) from None
            for name, value in bound.arguments.items():
                if name in kinds:
                    parameter = signature.parameters[name]
                    bound.arguments[name] = _checked_one(who, parameter, kinds[name], value, bounds, advice or {})
            with plain_errors():
                made = function(*bound.args, **bound.kwargs)
            if args and isinstance(args[0], nn.Module) and type(args[0]).__init__ is door:
                parts = {*args[0].modules()}
                vars(args[0])["_made_with"] = {k: _kept(v, parts) for k, v in [*bound.arguments.items()][1:]}
            return made

        return typing.cast(F, door)

    return decorate


def _kept(value: Any, parts: set[nn.Module]) -> Any:
    """What a constructor was given, for :func:`~pyro_dgm.save`. Programs and modules that are no part of it are not kept (...):
    a copy has to do without them."""
    if isinstance(value, dict):
        return {k: _kept(v, parts) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_kept(v, parts) for v in value)
    if isinstance(value, nn.Module):
        return value if value in parts else ...
    ours = str(getattr(value, "__module__", "")).startswith("pyro_dgm.")
    return ... if callable(value) and not isinstance(value, type) and not ours else value


def _owner(function: Callable[..., Any], self: Any) -> str:
    cls = self if isinstance(self, type) else type(self)
    return cls.__name__ if function.__name__ == "__init__" else f"{cls.__name__}.{function.__name__}"


def _kinds_of(function: Callable[..., Any], signature: inspect.Signature) -> dict[str, Any]:
    """The annotations, evaluated; those that stand for types only are left out."""
    found = {}
    for name, parameter in signature.parameters.items():
        kind = parameter.annotation
        if isinstance(kind, str):
            try:
                kind = eval(kind, inspect.unwrap(function).__globals__)
            except NameError:
                continue
        if kind not in (parameter.empty, Any, *_SHAPES) and name != "context_features":  # as_count has its own words
            found[name] = kind
    return found


def _checked_one(
    who: str,
    parameter: inspect.Parameter,
    kind: Any,
    value: Any,
    bounds: Mapping[str, float],
    advice: Mapping[str, str],
) -> Any:
    name = parameter.name
    if value is parameter.default:
        return value
    check = functools.partial(_checked_value, who, name, advice=advice.get(name, ""))
    if parameter.kind is parameter.VAR_POSITIONAL:
        return tuple(check(kind, v, None) for v in value)
    if parameter.kind is parameter.VAR_KEYWORD:
        return {k: _checked_option(who, k, kind, v, bounds) for k, v in value.items()}
    return check(kind, value, bounds.get(name))


def _checked_option(who: str, name: str, kind: Any, value: Any, bounds: Mapping[str, float]) -> Any:
    """One of the options that a ``TypedDict`` names."""
    kinds = typing.get_type_hints(typing.get_args(kind)[0]) if typing.get_args(kind) else {}
    return _checked_value(who, name, kinds[name], value, bounds.get(name)) if name in kinds else value


def _checked_value(who: str, name: str, kind: Any, value: Any, bound: float | None, advice: str = "") -> Any:
    try:
        fitted = _fitted(who, name, kind, value)
    except _UnfitError:
        raise TypeError(_message(who, name, kind, value, bound, advice)) from None
    if name == "seed" and isinstance(fitted, int):
        return _checked_seed(who, fitted, bound)
    for number in fitted if isinstance(fitted, tuple | list) else [fitted]:
        if isinstance(number, int | float) and not isinstance(number, bool) and not _within(number, bound):
            raise ValueError(_message(who, name, kind, value, bound, advice))
    return fitted


def _checked_seed(who: str, seed: int, bound: float | None) -> int:
    least = _SEEDS[0] if bound is None else int(bound)
    if not least <= seed <= _SEEDS[1]:
        raise ValueError(f"{who}: seed={shown(seed)}, expected a whole number from {least} to {_SEEDS[1]}.")
    return seed


def _message(who: str, name: str, kind: Any, value: Any, bound: float | None, advice: str) -> str:
    verb = "=" if _of_numbers(kind) else " is "
    most = ", below 2**63" if isinstance(value, int) and abs(value) > LARGEST else ""
    called = "A family is called for one: family(), or family(context)." if _is_uncalled(kind, value) else ""
    advice = " ".join(filter(None, (called, advice)))
    return f"{who}: {name}{verb}{shown(value)}, expected {_words(kind)}{_limit(bound)}{most}. {advice}".rstrip()


def _is_uncalled(kind: Any, value: Any) -> bool:
    """Whether a family stands where its distribution should."""
    return kind is Distribution and hasattr(value, "checked_build")


def _of_numbers(kind: Any) -> bool:
    """Whether it is a number, or None, or a sequence of numbers."""
    kinds = typing.get_args(kind) or (kind,)
    return all(k in (int, float, type(None)) for k in kinds) and any(k in (int, float) for k in kinds)


def _within(number: float, bound: float | None) -> bool:
    if isinstance(number, int) and abs(number) > LARGEST:
        return False
    if bound is None:
        return True
    return math.isfinite(number) and (number > bound if isinstance(bound, Above) else number >= bound)


def _limit(bound: float | None) -> str:
    if bound is None:
        return ""
    return f" {'>' if isinstance(bound, Above) else '>='} {float(bound):g}"


def _fitted(who: str, name: str, kind: Any, value: Any) -> Any:
    """The value as one of its kind, or :class:`_UnfitError`."""
    origin = typing.get_origin(kind)
    if kind is Any or isinstance(kind, TypeVar):
        return value
    if origin is typing.Union or origin is types.UnionType:
        return _fitted_union(who, name, typing.get_args(kind), value)
    if origin is typing.Literal:
        return _if(isinstance(value, str), value)  # the function itself knows what each means
    if origin in _SEQUENCES:
        return _fitted_sequence(who, name, origin, typing.get_args(kind), value)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return _fitted_mapping(who, name, typing.get_args(kind), value)
    if origin is type:
        other = (
            issubclass(value, typing.get_args(kind)) if isinstance(value, type) else not isinstance(value, nn.Module)
        )
        return _if(callable(value) and other, value)  # also what makes one, as functools.partial does
    if kind == Callable[..., Any]:
        return _if(callable(value) and not isinstance(value, type), value)  # a program: a class makes one
    if origin is not None:
        kind = origin
    return _fitted_single(who, name, kind, value)


_SHAPES = (int | Iterable[int], int | Sequence[int], int | tuple[int, ...])  # as_shape judges them
_SEQUENCES = (Sequence, Iterable, Iterator, list, tuple)


def _if(fits: bool, value: Any) -> Any:
    if not fits:
        raise _UnfitError
    return value


def _fitted_single(who: str, name: str, kind: Any, value: Any) -> Any:
    if kind is None or kind is type(None):
        return _if(value is None, value)
    if kind is int:
        return _fitted_int(value)
    if kind is float:
        return _fitted_float(value)
    if kind is bool:
        return bool(_if(isinstance(value, bool | np.bool_), value))
    if kind is Tensor:
        return as_tensor_like(who, name, value, None)
    if kind in (Callable, typing.Callable):
        return _if(callable(value), value)
    if isinstance(kind, type) and not getattr(kind, "_is_protocol", False):
        return _if(isinstance(value, kind), value)
    return value


def _fitted_int(value: Any) -> int:
    try:
        return index(_if(not isinstance(value, bool), value))
    except (TypeError, RuntimeError):  # of torch, for a tensor on the meta device
        raise _UnfitError from None


def _fitted_float(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        _if(not _has_no_numbers(value), value)
        value = value.item()
    _if(isinstance(value, Real) and not isinstance(value, bool), value)
    return float(value) if isinstance(value, np.floating) else value


def _has_no_numbers(value: Any) -> bool:
    """Whether it is a tensor on the meta device, which has a shape only."""
    return isinstance(value, Tensor) and value.is_meta


def _fitted_sequence(who: str, name: str, origin: Any, kinds: tuple[Any, ...], value: Any) -> Any:
    if isinstance(value, str) and kinds[:1] == (str,):
        return value  # one name stands for a list of it
    _if(isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | type), value)
    _if(not (isinstance(value, Tensor | np.ndarray) and value.ndim == 0), value)
    each = kinds[0] if kinds else Any
    if isinstance(value, Iterator) and origin is not Iterator:
        value = tuple(value)  # it can be gone through once
    if each is Any or origin is Iterator:
        return value
    if origin is tuple and len(kinds) > 1 and kinds[1] is not ...:
        values = list(value)
        _if(len(values) == len(kinds), value)
        return tuple(_fitted(who, name, k, v) for k, v in zip(kinds, values, strict=True))
    entries = [_fitted(who, name, each, v) for v in value]
    if type(value) in (list, tuple):
        return value if all(a is b for a, b in zip(value, entries, strict=True)) else type(value)(entries)
    return value if isinstance(value, list | tuple) else tuple(entries)


def _fitted_mapping(who: str, name: str, kinds: tuple[Any, ...], value: Any) -> Any:
    _if(isinstance(value, Mapping), value)
    if not kinds or kinds[1] is Any or not isinstance(value, dict):
        return value
    entries = {k: _fitted(who, f"{name}[{k!r}]", kinds[1], v) for k, v in value.items()}
    return value if all(entries[k] is v for k, v in value.items()) else entries


def _fitted_union(who: str, name: str, kinds: tuple[Any, ...], value: Any) -> Any:
    ordered = sorted(kinds, key=lambda k: k is Tensor)  # a conversion is the last thing tried
    for kind in ordered:
        try:
            return _fitted(who, name, kind, value)
        except _UnfitError:
            continue
    raise _UnfitError


def _words(kind: Any) -> str:
    """The kind in the words of a message."""
    origin = typing.get_origin(kind)
    kinds = typing.get_args(kind)
    if origin is typing.Union or origin is types.UnionType:
        return " or ".join(dict.fromkeys(map(_words, kinds)))
    if origin is typing.Literal:
        return " or ".join(map(repr, kinds))
    if origin in _SEQUENCES:
        return (
            f"a sequence of {_words(kinds[0]).removeprefix('a ')}s" if kinds and kinds[0] is not Any else "a sequence"
        )
    if origin is type:
        return f"a class of {_words(kinds[0]).removeprefix('a ')}s"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    single = origin or kind
    name = getattr(single, "__name__", str(single))
    article = "an" if name[:1] in "AEIOU" else "a"
    return _WORDS.get(single) or _NAMES.get(name) or f"{article} {name}"


def shown(value: Any) -> str:
    """A value in few letters.

    >>> shown(np.zeros((2, 3))), shown("abc"), shown(None)
    ('an array of shape (2, 3)', "'abc'", 'None')
    """
    if isinstance(value, Tensor | np.ndarray) and (value.ndim or _has_no_numbers(value)):
        return f"{'a tensor' if isinstance(value, Tensor) else 'an array'} of shape {tuple(value.shape)}"
    if isinstance(value, nn.Module) or getattr(type(value), "__repr__", None) is object.__repr__:
        return f"a {type(value).__name__}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # distributions of a user's own may have no text
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def event_support(name: str, support: constraints.Constraint | None, event_shape: Size) -> Any:
    """The support as a constraint on the whole event; elementwise constraints are made joint."""
    if support is None:
        return None
    try:
        support = elementwise(support, event_shape)
        biject_to(support)
    except NotImplementedError as error:
        raise ValueError(f"{name}: torch has no bijection onto {in_short(support)}: {error}.") from error
    _refuse_other_bounds(name, support, event_shape)
    missing = len(event_shape) - support.event_dim
    if missing < 0:
        raise ValueError(
            f"{name}: support {in_short(support)} is on events of {support.event_dim} dimension(s), but event_shape is "
            f"{tuple(event_shape)}. Give an event_shape such as {(3,) * support.event_dim}."
        )
    return constraints.independent(support, missing) if missing else support


def _refuse_other_bounds(name: str, support: constraints.Constraint, event_shape: Size) -> None:
    """Refuse bounds that are not those of one event."""
    for key, bound in vars(of_entries(support)).items():
        if isinstance(bound, Tensor) and not spreads(bound.shape, event_shape):
            raise ValueError(
                f"{name}: the {key} of its support has shape {tuple(bound.shape)}, expected a number, or that of an event, "
                f"{tuple(event_shape)}."
            )
