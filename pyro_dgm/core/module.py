r"""The contract of a family: a module that turns a context into a distribution, ``module(context) -> distribution``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform, biject_to, constraints, kl_divergence, register_kl
from torch.distributions.transforms import IndependentTransform, ReshapeTransform

from pyro_dgm.core.data import reads_context, was_trained
from pyro_dgm.core.distribution import LearnedDistribution
from pyro_dgm.core.kinds import checked, event_support
from pyro_dgm.core.pace import in_fit
from pyro_dgm.core.shapes import ShapeAttribute, as_count, as_shape, as_tensor_like, fitting_context, of_entries
from pyro_dgm.core.units import InputUnits, Standardize
from pyro_dgm.core.upstream import PyroABCMeta, drop_weak_references, in_vmap, unseen, unvalidated_in_vmap, zuko

__all__ = [
    "DistributionModule",
    "OnePass",
    "compose",
    "composed",
    "has_finite_numbers",
    "looks_at_numbers",
    "tensors_of",
    "values_of",
    "whole_event",
]

_NOTHING = nullcontext()
_OF_DISTRIBUTIONS = {
    "log_prob",
    "sample",
    "rsample",
    "rsample_and_log_prob",
    "support",
    "batch_shape",
    "mean",
    "variance",
}
_version_of = attrgetter("_version")


class DistributionModule(nn.Module, metaclass=PyroABCMeta):
    r"""Abstract family :math:`c \mapsto q_\theta(x \mid c)`.

    A subclass writes ``build(context)``, which gets the context in its units (see :meth:`standardize`), and returns any torch
    or Pyro distribution over ``event_shape`` (or over the flat vector of its entries), with
    ``batch_shape = context.shape[:-1]``. Where ``support`` is given, ``build``
    returns a distribution over the *unconstrained* event and the base class maps it by ``biject_to(support)``.
    The base class does the rest of the contract: broadcasting, expanding, scoring of draws, checks, support.

    Args:
        event_shape: an int (a vector) or a shape; ``()`` for scalars.
        context_features: length of the context's last dimension; 0 for an unconditional family.
        support: a constraint for the event, such as ``constraints.positive`` or ``constraints.simplex``;
            None takes the support of what ``build`` returns.

    Raises:
        ValueError: for a support that does not fit the event shape, a context of the wrong length, or a ``build``
            that returns another event shape.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> class Gaussian(DistributionModule):
        ...     def __init__(self):
        ...         super().__init__(2, context_features=3)
        ...         self.net = torch.nn.Linear(3, 2)
        ...     def build(self, context):
        ...         return dist.Normal(self.net(context), 1.0).to_event(1)
        >>> Gaussian()(torch.zeros(5, 3)).sample((4,)).shape
        torch.Size([4, 5, 2])
    """

    event_shape = ShapeAttribute()
    __call__: Callable[..., LearnedDistribution]  # what a type checker knows of ``family(context)``; torch's says Any

    @checked()
    def __init__(
        self,
        event_shape: int | Iterable[int],
        context_features: int = 0,
        *,
        support: constraints.Constraint | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = as_shape(event_shape, f"{type(self).__name__}: event_shape")  # also where it is a module
        self.context_features = as_count(type(self).__name__, "context_features", context_features)
        self._support = event_support(type(self).__name__, support, self.event_shape)
        if self.context_features:
            self.context_units = InputUnits(self.context_features)

    @abstractmethod
    def build(self, context: Tensor | None) -> Distribution:
        """The distribution of the (unconstrained) event for a context of shape ``(*batch, context_features)``."""

    def forward(self, context: Tensor | None = None) -> LearnedDistribution:
        reads_context(self, context)
        return LearnedDistribution(self, context, self.sampled_weights())

    @torch.no_grad()
    def standardize(self, x: Tensor | None = None, context: Tensor | None = None) -> DistributionModule:
        """Fix the units to data: of events ``x``, where the family has some, and of contexts ``(..., context_features)``.

        :func:`~pyro_dgm.fit` does it where it can tell that a context is data. Before a training loop of your own do it
        once; it is part of the ``state_dict``. A context that is computed (a latent, a network's output) has no units.

        Returns the family itself. What is not given keeps the units that it has.

        Raises:
            ValueError: for a context that does not fit, or holds NaN.

        Example:
            >>> import pyro_dgm as dgm
            >>> year = 2007.0 + 10.0 * torch.randn(100, 1)
            >>> flow = dgm.NSF(2, context_features=1).standardize(torch.randn(100, 2), year)
            >>> bool(flow.context_units(year).abs().max() < 5)
            True
        """
        if context is not None:
            context = fitting_context(type(self).__name__, self, context)
        if x is not None or context is None:
            self.fit_events(as_tensor_like(type(self).__name__, "data", x, None))
        if context is not None:
            self.context_units.fit(context, who=f"{type(self).__name__}, context")
        return self

    def fit_events(self, x: Tensor) -> None:
        """Fix the units of events to data ``(..., *event_shape)``; a family without such units has nothing to do."""

    def event_units(self) -> Standardize | None:
        """The units of events, where the family has some."""
        return None

    def takes_units(self) -> bool:
        """Whether events have units, or a start, that are still to be taken from data."""
        units = self.event_units()
        return units is not None and units.is_identity()

    def forget_events(self) -> None:
        """Take back what :meth:`fit_events` did."""
        if (units := self.event_units()) is not None:
            units.forget()

    def has_units(self) -> bool:
        """Whether the units of contexts were taken before, or the family was trained without."""
        return self.context_units.known or was_trained(self)

    def take_units(self, context: Tensor) -> None:
        """Take the units of contexts."""
        self.context_units.fit(context, who=f"{type(self).__name__}, context")

    def start_at_identity(self) -> DistributionModule:
        """Become the base distribution, where the family can (flows do); returns the family itself."""
        return self

    def soften(self) -> float | None:
        """Become a guide that large steps of Adam do not throw off; a family that stands at its identity stays there.

        Returns the rate at which the family is trained best from a good start; None where it can only stay as it is.
        """
        return None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in _OF_DISTRIBUTIONS:
                raise
        raise AttributeError(
            f"{type(self).__name__} is a family, which turns a context into a distribution, and has no {name}. Ask its "
            f"distribution: family().{name}, or family(context).{name} with a context."
        )

    @property
    def unconstrained_shape(self) -> Size:
        """The event shape before the support's bijection: ``(K - 1,)`` for a simplex of ``K``."""
        if self._support is None:
            return self.event_shape
        return Size(biject_to(self._support).inverse_shape(self.event_shape))

    @property
    def features(self) -> int:
        """The number of unconstrained dimensions D."""
        return self.unconstrained_shape.numel()

    def tensors(self) -> list[Tensor]:
        """All parameters and buffers."""
        return tensors_of(self)

    def values(self) -> Tensor:
        """All parameters' values as one vector: what changes without being counted shows here."""
        return values_of(self)

    def version(self) -> int:
        """A number that grows with every in-place change of a parameter or buffer that torch counts."""
        return sum(map(_version_of, tensors_of(self)))

    def checked_build(self, context: Tensor | None) -> Distribution:
        try:
            with unvalidated_in_vmap():
                built = self.build(context)
        except ValueError as error:
            if not str(error).startswith("Expected parameter"):
                raise
            raise self._unbuilt(context, str(error).split()[2]) from error
        if looks_at_numbers() and not has_finite_numbers(built):
            raise self._unbuilt(context, "of some entry")
        if self._support is not None or built.event_shape != self.event_shape:
            _check_built(self, built.event_shape, self.unconstrained_shape)
        return built

    def _unbuilt(self, context: Tensor | None, name: str) -> ValueError:
        """Why the context makes no distribution: torch answers with all its numbers."""
        largest = 0.0 if context is None or not context.numel() else float(context.abs().max())
        return ValueError(
            f"{type(self).__name__}: the parameter {name} of its distribution is out of bounds or not finite, for contexts up to "
            f"{largest:.3g}. Bring what the network reads to the unit scale (Standardize), or look at its parameters."
        )

    def bijection(self, built: Distribution) -> Transform | None:
        """The map from what ``build`` returns to the event, or None where they are the same."""
        if self._support is None and built.event_shape == self.event_shape:
            return None
        parts: list[Transform] = []
        if built.event_shape != self.unconstrained_shape:
            parts.append(ReshapeTransform(built.event_shape, self.unconstrained_shape))
        if self._support is not None:
            parts.append(whole_event(biject_to(self._support), len(self.unconstrained_shape)))
        return composed(parts)

    def support_of(self, built: Distribution) -> constraints.Constraint:
        """The support of the event."""
        if self._support is not None:
            return self._support
        try:
            support = built.support
        except NotImplementedError:  # zuko's flows do not tell
            support = built.transform.domain if hasattr(built, "transform") else constraints.real_vector
        if support is None:
            support = constraints.real_vector
        return _flattened(support, len(built.event_shape), len(self.event_shape))

    def sampled_weights(self) -> dict[str, Tensor]:
        """Draw every PyroSample weight now, inside the trace; networks that run later reuse the values."""
        if not isinstance(self, PyroModule):
            return {}
        context: Any = self._pyro_context
        with context:
            return {
                m._pyro_get_fullname(name): getattr(m, name)
                for m in self.modules()
                if isinstance(m, PyroModule)
                for name in m._pyro_samples
            }

    def holding(self, weights: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Evaluate with these sampled values in the place of Bayesian weights (see ``sampled_weights``)."""
        return self._with_cached(weights) if weights else _NOTHING

    @contextmanager
    def _with_cached(self, weights: dict[str, Tensor]) -> Iterator[None]:
        context: Any = self._pyro_context
        with context:
            context.cache.update(weights)
            yield

    def __getstate__(self) -> dict[str, Any]:
        drop_weak_references(self)
        return dict(self.__dict__)


def _check_built(family: DistributionModule, event_shape: Size, expected: Size) -> None:
    """Refuse a ``build`` whose event shape is not the declared one (flat or in shape)."""
    if event_shape not in (expected, Size((expected.numel(),))):
        raise ValueError(
            f"{type(family).__name__}.build returned event shape {tuple(event_shape)}, expected {tuple(expected)} "
            f"(event_shape {tuple(family.event_shape)}). Use .to_event(n) to move batch dimensions into the event."
        )


def looks_at_numbers() -> bool:
    """Whether what a distribution is made of is looked at: where torch validates; a fit leaves such a step out itself."""
    return bool(Distribution._validate_args) and not in_fit()


def has_finite_numbers(made: Any) -> bool:
    """Whether the numbers that a distribution was made of are finite: an exponential that overflows is positive to torch."""
    numbers = [made.__dict__.get(k) for k in getattr(made, "arg_constraints", ())]
    inner = getattr(made, "base_dist", None)
    return all(unseen(v) or bool(v.isfinite().all()) for v in numbers if isinstance(v, Tensor)) and (
        inner is None or has_finite_numbers(inner)
    )


def tensors_of(module: nn.Module, *, buffers: bool = True) -> list[Tensor]:
    """All parameters and buffers, without the names whose making is most of the cost of torch's own walk."""
    found: list[Tensor | None] = []
    waiting: list[nn.Module | None] = [module]
    for each in waiting:  # it grows meanwhile
        if each is None:
            continue
        if each._parameters:
            found += each._parameters.values()
        if buffers and each._buffers:
            found += each._buffers.values()
        if each._modules:
            waiting += each._modules.values()
    return [t for t in found if t is not None]


@torch.no_grad()
def values_of(module: nn.Module, *, buffers: bool = False) -> Tensor:
    """The values of all parameters as one vector: a change that torch does not count shows in it, too."""
    tensors = tensors_of(module, buffers=buffers)
    if in_vmap():
        return torch.cat([t.flatten() for t in tensors] or [torch.zeros(0)])
    return torch._utils._flatten_dense_tensors(tensors) if tensors else torch.zeros(0)


@checked()
def compose(parts: list[Transform]) -> Any:
    """One transform out of many, with its log-determinant in the same pass (``call_and_ladj``); None out of none."""
    return composed(parts)


def composed(parts: list[Transform]) -> Any:
    """The same, of parts that are known to be transforms: each density and draw of a family asks for it."""
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else zuko.transforms.ComposedTransform(*parts)


class OnePass(Transform):
    """Abstract: a bijection of vectors, and its inverse, that give image and log-determinant in one pass."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    @abstractmethod
    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image of ``x``, shape ``(*batch, D)``, and the log-determinant there, shape ``(*batch,)``."""

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inv.call_and_ladj(y)[0]  # type: ignore[attr-defined]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]


def whole_event(transform: Transform, event_dim: int) -> Transform:
    """The transform with one log-determinant for the whole event, where it had one for each entry."""
    missing = event_dim - transform.domain.event_dim
    return IndependentTransform(transform, missing) if missing > 0 else transform


def _flattened(support: constraints.Constraint, built_dim: int, event_dim: int) -> constraints.Constraint:
    """The same constraint on an event of another number of dimensions (a flat vector seen as an image, say)."""
    if built_dim == event_dim:
        return support
    base = of_entries(support)
    return constraints.independent(base, event_dim) if event_dim else base


@register_kl(LearnedDistribution, LearnedDistribution)
def _kl(q: LearnedDistribution, p: LearnedDistribution) -> Tensor:
    """The closed form of what the families built, where torch has one and no bijection follows."""
    built_q, built_p = q._expanded_base(), p._expanded_base()
    if q._family.bijection(built_q) is not None or p._family.bijection(built_p) is not None:
        raise NotImplementedError(f"no closed-form KL of {q!r} to {p!r}")
    return kl_divergence(built_q, built_p)
