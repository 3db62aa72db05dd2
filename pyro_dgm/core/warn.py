"""Warnings that point at the user's line, however deep they arise, of data too; errors without Pyro's page of shapes."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import pyro
import torch
from pyro.poutine import indep_messenger, trace_struct
from torch import Tensor
from torch.distributions import constraints

from pyro_dgm.core.pace import in_fit
from pyro_dgm.core.upstream import unseen

__all__ = ["in_short", "plain", "plain_errors", "listed", "told_unless_finite", "warn_of_columns", "warn_user"]

_HERE = pathlib.Path(__file__).parents[1]
_INSIDE = (
    *(f"{p}{os.sep}" for p in (_HERE, pathlib.Path(pyro.__file__).parent, pathlib.Path(torch.__file__).parent)),
    contextlib.__file__,
)
# Of columns whose values come again. Not measured; chosen by hand.
_TIED = 0.5  # of the rows, that have fewer values
_COARSE = 0.05  # sd between values, from which on it matters
_DEPENDENT = 1e-10  # least eigenvalue of correlations of dependent columns: float32 rounds to some 1e-14
_LISTED = 5  # values of many that a message shows
_MOST = 500  # columns that are looked at together


def warn_user(message: str) -> None:
    """Warn with the line of the nearest caller outside this package, Pyro and torch."""
    for level in count(1):
        frame = sys._getframe(level)
        if frame.f_back is None or not frame.f_code.co_filename.startswith(_INSIDE):
            break
    warnings.warn(message, stacklevel=level + 1)


def told_unless_finite(who: str, loss: Tensor) -> Tensor:
    """The loss, of which a warning tells where it is NaN or infinite. In a fit, which looks by itself, nothing is said."""
    if not (in_fit() or unseen(loss) or bool(loss.detach().isfinite().all())):
        warn_user(
            f"{who}: the loss is {float(loss.detach().sum()):g}, expected a finite number. Look for NaN, infinity and numbers of "
            "another scale in the data and in the parameters; fit names them, and leaves such steps out."
        )
    return loss


_AT_SITE = re.compile(r"""(?:Error while .*? at site '(.+?)':\s*|at site "(.+?)", )""")
_NO_KERNEL = re.compile(r"Could not run 'aten::(\w+)[^']*' with arguments from the '(\w+)' backend")
_NO_ROOM = re.compile(
    r"can't allocate memory|Storage size calculation overflowed|numel: integer multiplication overflow"
)
_LONGEST = 500  # characters of what Pyro says of a site


def plain(error: Exception) -> Exception:
    """An error in one line that came through Pyro, which adds a page of shapes to it; others as they are.

    Raise it ``from error``: Pyro's page is then shown above it.
    """
    unfit = _of_statement(error)
    if unfit is not None:
        return unfit
    lacking = _NO_KERNEL.match(str(error))
    if lacking:
        return TypeError(
            f"torch has no {lacking[1]} of tensors of the kind {lacking[2]}, expected dense numbers. Convert the data: "
            "x.to_dense(), x.dequantize(), x.float()."
        )
    if _NO_ROOM.search(str(error)):
        return MemoryError(
            "The numbers that were asked for have no room in this machine's memory. Ask for fewer rows or draws at once, or put "
            "simulations into a folder: simulate(..., path=...)."
        )
    scored = _scored(error)
    if scored is not None:
        return _misfit(*scored)
    first = error
    while isinstance(first.__cause__, Exception) and str(first.__cause__) in str(first) and _is_pyros(first):
        first = first.__cause__
    found = _AT_SITE.match(str(error))
    if first is error and _is_ours(error):
        return error
    if _is_ours(first):
        return _again(first, f"Site '{found[1] or found[2]}': {first}" if found else str(first))
    if not found:
        shapes = "Trace Shapes:" in str(error) and not _is_ours(error)
        return _again(error, " ".join(str(error).split("Trace Shapes:")[0].split())[:_LONGEST]) if shapes else error
    line = " ".join(str(error)[found.end() :].split("Trace Shapes:")[0].split())[:_LONGEST]
    return ValueError(f"Site '{found[1] or found[2]}' does not fit its value or its plates: {line}")


def _of_statement(error: Exception) -> Exception | None:
    """What is wrong with a statement of the model: ``pyro.sample`` of what is no distribution, or a plate without rows."""
    if not isinstance(error, (TypeError, AttributeError, ZeroDivisionError)):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, ZeroDivisionError):
        if frames[-1].f_code.co_filename != indep_messenger.__file__:
            return None
        name = frames[-1].f_locals["name"]
        return ValueError(
            f"Plate '{name}' has size 0, expected one row at least. Leave it out where there are no data."
        )
    seen = [f.f_locals for f in frames if f.f_code is pyro.sample.__code__]
    if not seen or callable(seen[-1].get("fn")):
        return None
    name, value = seen[-1]["name"], seen[-1]["fn"]
    return TypeError(
        f"Site '{name}': pyro.sample got {value if isinstance(value, (int, float, str)) else type(value).__name__}, expected a "
        f"distribution, such as pyro.sample('{name}', dist.Normal(0.0, 1.0)). What is computed is "
        f"pyro.deterministic('{name}', value)."
    )


def _scored(error: Exception) -> tuple[str, Any] | None:
    """Name and site of which a density was being computed, where torch found that it cannot; not where a user's code did."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    places = [i for i, frame in enumerate(frames) if frame.f_code.co_filename == trace_struct.__file__]
    if isinstance(error, ValueError) or not places or _is_ours(error):
        return None
    if not all(frame.f_code.co_filename.startswith(_INSIDE) for frame in frames[places[-1] :]):
        return None
    seen = frames[places[-1]].f_locals
    return (seen["name"], seen["site"]) if "name" in seen and "site" in seen else None


def _misfit(name: str, site: Any) -> ValueError:
    """What a site is made of, whose density torch cannot compute."""
    fn, value = site["fn"], site["value"]
    kind = f"of {value.dtype} and shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    return ValueError(
        f"Site '{name}' does not fit its value or its plates: the value is {kind}, {type(fn).__name__} has batch shape "
        f"{tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)}. Look at the sizes and dtypes of the data, and of "
        "masks and scales around the site."
    )


def _is_pyros(error: Exception) -> bool:
    """Whether Pyro added to it; its traceback is then still that of the error before."""
    return "Trace Shapes:" in str(error) or bool(_AT_SITE.match(str(error)))


def _again(error: Exception, message: str) -> Exception:
    try:
        return type(error)(message)
    except TypeError:  # one that is made of more than a message
        return ValueError(message)


def _is_ours(error: Exception) -> bool:
    """Whether it was raised in this package."""
    end = error.__traceback__
    while end is not None and end.tb_next is not None:
        end = end.tb_next
    return end is not None and end.tb_frame.f_code.co_filename.startswith(_INSIDE[0])


@contextmanager
def plain_errors() -> Iterator[None]:
    """Within the context errors that came through Pyro are raised in one line."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError, AttributeError, ZeroDivisionError) as error:
        said = plain(error)
        if said is error:
            raise
        raise said from error


def warn_of_columns(name: str, x: Any, discrete: Collection[int] = (), *, dependent: bool = True) -> None:
    """Tell of columns of real events that have no density; ``dependent`` ones where they may not hang together."""
    _warn_of_ties(name, x, discrete)
    if dependent and not discrete:
        _warn_of_dependent(name, x)


def _warn_of_ties(name: str, x: Any, discrete: Collection[int]) -> None:
    """Tell of columns of events ``(N, *event)``, discrete ones left out, whose values come again.

    A density can grow there without limit.
    """
    rows = torch.as_tensor(x).detach().reshape(len(x), -1)
    tied = [j for j, column in enumerate(rows.T) if j not in discrete and _is_tied(column)]
    if not tied:
        return
    named = listed(tied)
    values = rows[:, tied[0]].unique()
    step = float(values.diff().min())
    warn_user(
        f"{name}: values come again in column {named} (column {tied[0]}: {len(values)} values in {len(rows)} rows, {step:.2g} "
        "apart). A density of real numbers can grow there without limit, and held-out rows do not show it. Add noise as wide as "
        f"the rounding, x + {step:.2g} * (torch.rand_like(x) - 0.5) in that column; for integers, Dequantize, or a "
        "flows.MixtureChain with discrete columns."
    )


def _warn_of_dependent(name: str, x: Any) -> None:
    """Tell of columns of real events ``(N, *event)`` that have one value, or else are linear functions of each other."""
    rows = torch.as_tensor(x).detach().double().reshape(len(x), -1)
    constant = (rows == rows[:1]).all(0).nonzero().flatten().tolist()
    if constant:
        said = f"column {listed(constant)} has one value in {len(rows)} rows. A constant"
    elif rows.shape[1] <= min(_MOST, len(rows) - 1) and (dependent := _dependent(rows)):
        said = f"column {listed(dependent)} are linear functions of each other. What follows from other columns"
    else:
        return
    warn_user(
        f"{name}: {said} has no density: the likelihood grows there without limit, and log_prob is not to be compared. Leave "
        "such a column out, or bring more rows."
    )


def _dependent(rows: Tensor) -> list[int]:
    values, vectors = torch.linalg.eigh(torch.corrcoef(rows.T).reshape(rows.shape[1], -1))
    return (vectors[:, 0].abs() > 0.05).nonzero().flatten().tolist() if values[0] < _DEPENDENT else []


def listed(values: Sequence[object]) -> str:
    """Numbers of columns, or other values, of many the first."""
    return ", ".join(map(str, values[:_LISTED])) + (", ..." if len(values) > _LISTED else "")


def in_short(support: Any) -> str:
    """A support in few words: of many bounds or parts the first, and how many there are.

    >>> in_short(constraints.independent(constraints.greater_than(torch.arange(300.0)), 1))
    'IndependentConstraint(GreaterThan(lower_bound=[0, 1, 2, 3, 4, ...] (300 numbers)), 1)'
    """
    name = type(support).__name__.removeprefix("_").strip()
    if isinstance(support, constraints.independent):
        return f"{name}({in_short(support.base_constraint)}, {support.reinterpreted_batch_ndims})"
    parts = getattr(support, "cseq", None) or getattr(support, "supports", None)
    if parts:
        return f"{name}({listed([in_short(c) for c in parts])}{_how_many(len(parts), 'parts')})"
    bounds = {k: v for k, v in getattr(support, "__dict__", {}).items() if k in ("lower_bound", "upper_bound")}
    if any(isinstance(v, Tensor) for v in bounds.values()):
        return f"{name}({', '.join(f'{k}={_numbers(v)}' for k, v in bounds.items())})"
    return str(support)


def _numbers(bound: Any) -> str:
    """A bound; of a tensor the first numbers, once if they are equal."""
    if not isinstance(bound, Tensor) or unseen(bound) or not bound.numel():
        return str(bound)
    values = bound.detach().reshape(-1)
    alike = bool((values == values[0]).all())
    first = [f"{float(v):.4g}" for v in (values[:1] if alike else values[: _LISTED + 1])]
    return (first[0] if alike else f"[{listed(first)}]") + _how_many(len(values), "numbers")


def _how_many(count: int, what: str) -> str:
    return f" ({count} {what})" if count > _LISTED else ""


def _is_tied(column: Tensor) -> bool:
    values = column.unique()
    if not 1 < len(values) < _TIED * len(column):
        return False
    return bool(values.double().diff().median() > _COARSE * column.double().std())
