"""Repairs of upstream libraries, each made once, here, with its cause named.

* ``import zuko`` sets ``Distribution._validate_args = False`` and ``Distribution.arg_constraints = {}`` for every
  torch distribution of the process. zuko is imported here, both attributes are put back, and zuko's own classes
  keep for themselves what zuko wanted for all.
* zuko's lazy modules are abstract base classes, so ``PyroModule[...]`` cannot mix into them (metaclass conflict):
  their roots are given a mixin with a combined metaclass, which makes Bayesian flow weights possible.
* torch has no ``biject_to(lower_cholesky)``, and none for the support of its own ``MixtureSameFamily``.
* torch calls what ``stack`` puts along a negative dimension a vector, and gives a number for each entry where it maps and checks;
  dimensions are counted from the left by default, where a batch stands. :func:`elementwise` says what is meant.
* torch has no public question for whether a tensor's numbers may be looked at, as they may not inside of ``torch.vmap``, and none
  for what stands behind it: :func:`unseen` and :func:`plain_of`.
* A handler cannot run a subsampled plate of Pyro with all of its rows: ``pyro.plate`` refuses an index whose length is not
  ``subsample_size``. Within :func:`whole_plates` plates are made without a subsample size.
"""

from __future__ import annotations

import sys
import warnings
from abc import ABCMeta
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Size, Tensor
from torch.distributions import Distribution, Transform, biject_to, constraints

__all__ = [
    "Columns",
    "PyroABCMeta",
    "VectorToLowerCholesky",
    "drop_weak_references",
    "elementwise",
    "in_func",
    "in_vmap",
    "integer_ends",
    "listed_numbers",
    "passing",
    "plain_of",
    "shared_by_all",
    "unseen",
    "unvalidated_in_vmap",
    "whole_plates",
    "zuko",
]


@contextmanager
def _distribution_defaults_kept() -> Iterator[None]:
    kept = {k: Distribution.__dict__[k] for k in ("_validate_args", "arg_constraints")}
    try:
        yield
    finally:
        for key, value in kept.items():
            setattr(Distribution, key, value)


def _warn_if_zuko_came_first() -> None:
    """Say once that an earlier ``import zuko`` has left torch's validation off while Pyro's is on."""
    if "zuko" in sys.modules and pyro.settings.get("validate_infer") and not Distribution._validate_args:
        warnings.warn(
            "zuko was imported before pyro_dgm and switched the validation of all torch distributions off "
            "(dist.Normal(0., -1.) is accepted). pyro_dgm leaves it as it is; call pyro.enable_validation(True) "
            "to have it back, or import pyro_dgm before zuko.",
            stacklevel=2,
        )


_warn_if_zuko_came_first()
with _distribution_defaults_kept():
    import zuko


def _keep_zuko_defaults_local() -> None:
    for module in (zuko.distributions, zuko.mixtures):
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, Distribution) and cls.__module__.startswith("zuko"):
                cls.arg_constraints, cls._validate_args = {}, False  # type: ignore


_keep_zuko_defaults_local()


class PyroABCMeta(type(PyroModule), ABCMeta):  # type: ignore[misc]
    """The metaclass of a class that is abstract and can be mixed with :class:`pyro.nn.PyroModule`."""


def _register_pyro_mixin(cls: type[torch.nn.Module]) -> None:
    mixins = type(PyroModule)._pyro_mixin_cache
    if cls not in mixins:
        mixins[cls] = PyroABCMeta("Pyro" + cls.__name__, (cls, PyroModule), {"__module__": __name__})


for _root in ("LazyDistribution", "LazyTransform", "UnconditionalDistribution", "UnconditionalTransform"):
    _register_pyro_mixin(getattr(zuko.lazy, _root))


class VectorToLowerCholesky(Transform):
    r"""Maps a real vector of length :math:`n(n+1)/2` to a lower-triangular matrix with positive diagonal.

    The vector holds the rows of the lower triangle; the diagonal goes through ``exp``, so the log-determinant is
    the sum of the diagonal's entries before the map.
    """

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VectorToLowerCholesky)

    def _call(self, x: Tensor) -> Tensor:
        n = self.forward_shape(x.shape[-1:])[-1]
        rows, columns = torch.tril_indices(n, n, device=x.device)
        entries = torch.where(rows == columns, x.exp(), x)
        y = x.new_zeros((*x.shape[:-1], n, n))
        y[..., rows, columns] = entries
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(*y.shape[-2:], device=y.device)
        entries = y[..., rows, columns]
        diagonal = rows == columns
        return torch.where(diagonal, entries.where(diagonal, torch.ones_like(entries)).log(), entries)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: tuple[int, ...]) -> torch.Size:
        n = round((8 * shape[-1] + 1) ** 0.5 - 1) // 2
        return torch.Size((*shape[:-1], n, n))

    def inverse_shape(self, shape: tuple[int, ...]) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


try:
    biject_to(constraints.lower_cholesky)
except NotImplementedError:
    biject_to.register(constraints.lower_cholesky, lambda constraint: VectorToLowerCholesky())


def _mixture_bijection(constraint: Any) -> Transform:
    return biject_to(constraint.base_constraint)


_of_mixtures = getattr(constraints, "MixtureSameFamilyConstraint", None)  # torch >= 2.6
if _of_mixtures is not None:
    biject_to.register(_of_mixtures, _mixture_bijection)


_behind = torch._C._functorch


def unseen(*tensors: Tensor) -> bool:
    """Whether the numbers of some tensor may not be looked at: inside of ``torch.vmap`` each stands for many.

    >>> x = torch.zeros(3)
    >>> unseen(x), torch.vmap(lambda row: row + unseen(row))(x)
    (False, tensor([1., 1., 1.]))
    """
    for t in tensors:
        if _behind.is_functorch_wrapped_tensor(t) and _is_batched(t):
            return True
    return False


def passing(*tensors: Tensor) -> bool:
    """Whether some tensor is there within a transform of ``torch.func`` only, and ends with it."""
    return any(map(_behind.is_functorch_wrapped_tensor, tensors))


def in_func() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return _behind.peek_interpreter_stack() is not None


def listed_numbers(t: Tensor) -> list[Any]:
    """``t.tolist()`` of one dimension, which torch 2.6 cannot do within ``torch.func``."""
    return [number.item() for number in t] if in_func() else t.tolist()


def _is_batched(t: Tensor) -> bool:
    while _behind.is_gradtrackingtensor(t):
        t = _behind.get_unwrapped(t)
    return _behind.is_functorch_wrapped_tensor(t)


def in_vmap() -> bool:
    """Whether a ``torch.vmap`` is at work."""
    if torch.compiler.is_compiling() or not in_func():
        return False
    return any(level.key() == _behind.TransformType.Vmap for level in _behind.get_interpreter_stack() or ())


_NOTHING = nullcontext()


def unvalidated_in_vmap() -> AbstractContextManager[None]:
    """Inside of ``torch.vmap`` a context in which torch does not validate; elsewhere one that does nothing."""
    return pyro.validation_enabled(False) if in_vmap() else _NOTHING


def plain_of(t: Tensor) -> Tensor:
    """The tensor behind transforms of ``torch.func``, the dimensions of ``torch.vmap`` first.

    >>> t = torch.arange(6).reshape(2, 3)
    >>> shapes = []
    >>> _ = torch.vmap(lambda row: shapes.append(plain_of(row).shape) or row, in_dims=1)(t)
    >>> shapes
    [torch.Size([3, 2])]
    """
    dims = []
    while _behind.is_functorch_wrapped_tensor(t):
        if _behind.is_batchedtensor(t):
            dims.append(_behind.maybe_get_bdim(t))
        t = _behind.get_unwrapped(t)
    for place, dim in enumerate(reversed(dims)):
        t = t.movedim(dim + place, place)
    return t


def shared_by_all(who: str, what: str, t: Tensor) -> Tensor:
    """A buffer that says how a network is built (a mask, an order), the same in all modules stacked for ``torch.vmap``.

    Raises:
        ValueError: where they differ: no one program computes them all.
    """
    if not unseen(t):
        return t
    rows = plain_of(t).reshape(-1, *t.shape)
    if not (rows == rows[0]).all():
        raise ValueError(
            f"{who}: modules stacked for torch.vmap differ in their {what}, and no one program computes them all. Build them "
            "with the same one, or run them one by one."
        )
    return rows[0]


def drop_weak_references(module: torch.nn.Module) -> None:
    """Before pickling: ``pyro.module`` leaves a weak reference on each parameter that cannot be pickled (pyro#3201)."""
    for parameter in module.parameters():
        parameter.__dict__.pop("unconstrained", None)


_WHOLE = ContextVar("whole", default=False)
_index_of = SubsampleMessenger._subsample


def _index_or_all(
    name: str,
    size: int | None = None,
    subsample_size: int | None = None,
    subsample: Any = None,
    use_cuda: bool | None = None,
    device: str | None = None,
) -> Any:
    """The size of a plate, that of its subsample, and its index."""
    return _index_of(name, size, None if _WHOLE.get() else subsample_size, subsample, use_cuda, device)


SubsampleMessenger._subsample = staticmethod(_index_or_all)  # type: ignore[assignment]


@contextmanager
def whole_plates(wanted: bool = True) -> Iterator[None]:
    """Plates that are made in here have all of their rows, where that is wanted; those with a given ``subsample`` keep it."""
    before = _WHOLE.set(wanted)
    try:
        yield
    finally:
        _WHOLE.reset(before)


class Columns(constraints.Constraint):
    """A vector of parts, each on a support of its own; it is discrete where one of them is.

    ``constraints.cat`` checks entries, not vectors, and has no name of its own in messages.

    Args:
        supports: of the parts.
        shapes: of the parts' events; None for single numbers.

    >>> Columns([constraints.real, constraints.boolean]).check(torch.tensor([[0.5, 1.0], [0.5, 0.5]]))
    tensor([ True, False])
    """

    event_dim = 1

    def __init__(self, supports: Sequence[constraints.Constraint], shapes: Sequence[Size] | None = None) -> None:
        self.supports = supports
        self.shapes = shapes or [Size()] * len(supports)
        self.is_discrete = any(c.is_discrete for c in supports)
        super().__init__()

    def __repr__(self) -> str:
        return f"Columns({', '.join(map(str, self.supports))})"

    def check(self, value: Tensor) -> Tensor:
        pieces = value.split([shape.numel() for shape in self.shapes], -1)
        found = [
            c.check(p.reshape(p.shape[:-1] + s)) for p, s, c in zip(pieces, self.shapes, self.supports, strict=True)
        ]
        return torch.stack([f.flatten(value.dim() - 1).all(-1) if f.dim() >= value.dim() else f for f in found]).all(0)


def elementwise(support: Any, event_shape: Size) -> Any:
    """A support that ``constraints.stack`` or ``cat`` makes of single numbers, as one of all entries of an event.

    Dimensions counted from the left are the event's. Other supports are returned as they are.

    Raises:
        NotImplementedError: for parts that are no single numbers, or another number of them than the event has.

    >>> elementwise(constraints.stack([constraints.real, constraints.positive]), Size((2,))).check(torch.ones(5, 2)).shape
    torch.Size([5])
    """
    made: Any = support
    while isinstance(made, constraints.independent):
        made = made.base_constraint
    if not isinstance(made, constraints.stack | constraints.cat) or not event_shape:
        return support
    stacked = isinstance(made, constraints.stack)
    parts, n = [_of_one_number(c, stacked) for c in made.cseq], len(event_shape)
    lengths = [1] * len(parts) if isinstance(made, constraints.stack) else made.lengths
    dim = made.dim - n if made.dim >= 0 else made.dim
    if not -n <= dim < 0 or sum(lengths) != event_shape[dim]:
        raise NotImplementedError(
            f"its parts have {sum(lengths)} entries along dimension {made.dim}, and the event has shape {tuple(event_shape)}"
        )
    return constraints.independent(constraints.cat(parts, dim, lengths), n)


def _of_one_number(part: Any, stacked: bool) -> Any:
    """A part of ``stack`` or ``cat`` as a constraint on single entries."""
    while isinstance(part, constraints.independent):
        part = part.base_constraint
    bounds = [b for b in vars(part).values() if isinstance(b, Tensor)]
    if part.event_dim or isinstance(part, constraints.cat) or (stacked and any(b.numel() > 1 for b in bounds)):
        raise NotImplementedError(
            "parts of stack and cat have to be of single numbers: give others a site of their own"
        )
    return part


def integer_ends(support: Any) -> tuple[float, float] | None:
    """The least and the largest integer of a support, infinite where there is none; None of what is no range.

    >>> integer_ends(constraints.boolean), integer_ends(constraints.nonnegative_integer), integer_ends(constraints.real)
    ((0.0, 1.0), (0.0, inf), None)
    """
    if support is constraints.boolean:
        return (0.0, 1.0)
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if low is None and high is None:
        return None
    return (-torch.inf if low is None else float(low), torch.inf if high is None else float(high))
