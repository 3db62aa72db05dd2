r"""The distributions that learned families return.

A :class:`LearnedDistribution` is :math:`q_\theta(x \mid c)`: it samples, scores, expands, broadcasts and says its
support like any distribution of Pyro. An :class:`ImplicitDistribution` :math:`x = G(z),\ z \sim p(z)` samples only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from pyro_dgm.core.devices import frozen, same_bits
from pyro_dgm.core.shapes import (
    as_shape,
    as_tensor_like,
    broadcast_batch,
    check_context,
    check_support,
    check_value_shape,
    is_moderate,
    is_real,
    reference,
    spreads,
)
from pyro_dgm.core.upstream import unseen, unvalidated_in_vmap, zuko
from pyro_dgm.core.warn import in_short

if TYPE_CHECKING:
    from pyro_dgm.core.module import DistributionModule

__all__ = ["ImplicitDistribution", "LearnedDistribution", "NoDensityError"]


class _Remembered(NamedTuple):
    """The last draw: where it came from or how dense it is there, and under which circumstances that was found."""

    draw: Tensor
    version: int
    built_at: tuple[int, bool] | None
    point: Tensor | None = None  # the draw of the base that it was made from
    log_prob: Tensor | None = None
    values: Tensor | None = None  # of the parameters that gave log_prob


class LearnedDistribution(TorchDistribution):
    r"""The distribution :math:`q_\theta(x \mid c)` that a family returns for a context.

    The family builds a distribution of an unconstrained :math:`u`; the support's bijection :math:`T` maps it, so
    :math:`\log q(x) = \log q_u(T^{-1}x) - \log|\det J_T(T^{-1}x)|`.

    Shapes: draws have ``sample_shape + batch_shape + event_shape`` and ``batch_shape = context.shape[:-1]`` (``()``
    without a context). ``log_prob`` broadcasts the value's batch against ``batch_shape``, in nats per event.

    A flow's draw made by calling the distribution (what ``pyro.sample`` does) comes with its density, which is remembered
    once: it is used for the same tensor object, unedited, in the same grad mode, and only where all parameters have the
    values that they had. What a network of ``build`` computed (a mean, say) is kept until torch counts a change of a
    parameter. Fused optimisers and those that write to ``.data`` change them uncounted: after their step ask the family
    for a new distribution, as with any distribution of torch.

    Args:
        family: the module whose ``build`` gives the distribution for a context.
        context: shape ``(*batch, context_features)``, or None.
        weights: sampled values of Bayesian weights, by full name (filled by the family).

    Raises:
        ValueError: ``log_prob`` of a value with a wrong event shape, a batch that does not broadcast, or (while
            Pyro validates) NaN or a value outside the support. At infinity, and at numbers so large that their squares
            overflow, the log density is then minus infinity. In ``torch.vmap`` no value can be refused: NaN is returned.
        TypeError: for a value that is no array of real numbers; other dtypes, numpy and lists are converted.

    Example:
        >>> import pyro_dgm as dgm
        >>> flow = dgm.MAF(2, context_features=3)
        >>> q = flow(torch.zeros(5, 3))
        >>> q.rsample((7,)).shape, q.log_prob(torch.zeros(4, 1, 2)).shape
        (torch.Size([7, 5, 2]), torch.Size([4, 5]))
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(
        self, family: DistributionModule, context: Tensor | None = None, weights: dict[str, Tensor] | None = None
    ) -> None:
        if not hasattr(family, "checked_build"):
            raise TypeError(f"LearnedDistribution: family is a {type(family).__name__}, expected a DistributionModule.")
        self._family = family
        self._context = check_context(family, context)
        self._weights = weights or {}
        self._last: _Remembered | None = None
        self._frozen = False
        self._built_at: tuple[int, bool] | None = None
        self._built: Any = None
        built = self._base()
        self.has_rsample = bool(built.has_rsample)
        super().__init__(built.batch_shape, family.event_shape, validate_args=None)

    @property
    def _name(self) -> str:
        return type(self._family).__name__.removeprefix("Pyro")

    def __repr__(self) -> str:
        shapes = f"batch_shape: {tuple(self.batch_shape)}, event_shape: {tuple(self.event_shape)}"
        return f"{type(self).__name__}({self._name}, {shapes}, support: {in_short(self.support)})"

    def _base(self) -> Any:
        """The unconstrained distribution; built anew after a counted change of a parameter or of the grad mode."""
        now = (self._family.version(), torch.is_grad_enabled())
        if self._built is None or now != self._built_at:
            with self._family.holding(self._weights):
                self._built = self._family.checked_build(self._context)
            self._built_at = now
        return self._built

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return self._family.support_of(self._base())

    @property
    def mean(self) -> Tensor:
        return self._moment("mean")

    @property
    def variance(self) -> Tensor:
        return self._moment("variance")

    def _moment(self, which: str) -> Tensor:
        """A moment of the built distribution, where it is known and no bijection follows."""
        base = self._expanded_base()
        try:
            if self._family.bijection(base) is None:
                return getattr(base, which)
        except (AttributeError, NotImplementedError):
            pass
        raise NotImplementedError(f"{self._name}: a learned distribution has no closed-form {which}; average draws.")

    def detach(self) -> LearnedDistribution:
        r"""The same distribution with parameters and context frozen: ``log_prob`` passes gradients to the value only.

        This is the :math:`q` inside the path gradient of sticking-the-landing and of DReG estimators.
        """
        new = self._copy(self.batch_shape)
        new._frozen = True
        new._built = None
        new._context = None if self._context is None else self._context.detach()
        return new

    def expand(self, batch_shape: Size, _instance: Any = None) -> LearnedDistribution:
        """A new distribution with independent draws over ``batch_shape``; networks still run once per context."""
        return self._copy(_expanded(self._name, self.batch_shape, batch_shape))

    def _copy(self, batch_shape: Size) -> LearnedDistribution:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._last = None
        new._batch_shape = batch_shape
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_last": None, "_built": None}
        state["_context"] = None if self._context is None else self._context.detach()
        state["_weights"] = {k: v.detach() for k, v in self._weights.items()}
        return state

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self._draw(sample_shape)[0].detach()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        if not self.has_rsample:
            raise NotImplementedError(f"{self._name} has no reparameterised draws; use .sample, or a flow.")
        x, point = self._draw(sample_shape)
        self._last = _Remembered(x, x._version, self._built_at, point=point)
        return x

    def __call__(self, sample_shape: Any = ()) -> Tensor:
        if not self.has_rsample:
            return self.sample(sample_shape)
        base = self._expanded_base()
        if not isinstance(base, zuko.distributions.NormalizingFlow):
            return self.rsample(sample_shape)
        x, log_prob = self._joint_draw(base, sample_shape)
        values = self._family.values()
        self._last = _Remembered(x, x._version, self._built_at, log_prob=log_prob, values=values)
        return x

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """A draw and its density from one pass: shapes ``sample + batch + event`` and ``sample + batch``."""
        return self._joint_draw(self._expanded_base(), sample_shape)

    def _joint_draw(self, base: Any, sample_shape: Any) -> tuple[Tensor, Tensor]:
        shape = as_shape(sample_shape, "sample_shape", least=0)
        if 0 in shape + self.batch_shape:
            batch = shape + self.batch_shape
            return self._empty(batch + self.event_shape), self._empty(batch)
        with self._family.holding(self._weights):
            return self._place(base, _draw_of(base, shape))

    def _empty(self, shape: Size, *more: Tensor) -> Tensor:
        """Draws or scores of no rows; gradients exist, and are zero."""
        tensors = [*self._family.tensors(), *more] + ([] if self._context is None else [self._context])
        like = reference(self._family)
        nothing = torch.zeros(shape) if like is None else like.new_zeros(shape)
        return sum((t.flatten()[:0].sum() for t in tensors if t.requires_grad), nothing)

    def _expanded_base(self) -> Any:
        base = self._base()
        return base if base.batch_shape == self.batch_shape else base.expand(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        last, self._last = self._last, None
        if self._frozen:
            with frozen(*self._family.tensors()):
                return self._score(value)
        known = None if last is None or last.draw is not value else self._recall(last)
        return self._score(value) if known is None else known

    def _recall(self, last: _Remembered) -> Tensor | None:
        """The density of the last draw, without the way back from it; None where something has changed since."""
        base = self._expanded_base()
        if not last.draw.numel() or last.draw._version != last.version or last.built_at != self._built_at:
            return None
        if last.values is not None and same_bits(self._family.values(), last.values):
            return last.log_prob
        if last.point is None:
            self._built = None
            return None
        with self._family.holding(self._weights):
            x, log_prob = self._place(base, last.point)
        return log_prob if same_bits(x, last.draw) else None

    def _draw(self, sample_shape: Any) -> tuple[Tensor, Tensor]:
        """A draw of the event, and the draw of the base (of a flow, that of its own base) that it was made from."""
        base = self._expanded_base()
        shape = as_shape(sample_shape, "sample_shape", least=0)
        if 0 in shape + self.batch_shape:
            nothing = self._empty(shape + self.batch_shape + self.event_shape)
            return nothing, nothing
        with self._family.holding(self._weights):
            point = _draw_of(base, shape)
            u = base.transform.inv(point) if isinstance(base, zuko.distributions.NormalizingFlow) else point
        bijection = self._family.bijection(base)
        return (u if bijection is None else bijection(u)), point

    def _place(self, base: Any, point: Tensor) -> tuple[Tensor, Tensor]:
        """The event that a draw of the base becomes, and its density, by the sampling direction."""
        if isinstance(base, zuko.distributions.NormalizingFlow):
            u, ladj = base.transform.inv.call_and_ladj(point)
            log_prob = base.base.log_prob(point) - sum_rightmost(ladj, base.reinterpreted)
        else:
            u, log_prob = point, base.log_prob(point)
        bijection: Any = self._family.bijection(base)  # zuko gives every transform of torch a call_and_ladj
        if bijection is None:
            return u, log_prob
        x, ladj = bijection.call_and_ladj(u)
        return x, log_prob - ladj

    def _score(self, value: Tensor) -> Tensor:
        value = as_tensor_like(self._name, "value", value, reference(self._family))
        check_value_shape(self._name, value, self.event_shape)
        base, rows = self._base(), value.shape[: value.dim() - len(self.event_shape)]
        batch = broadcast_batch(self._name, rows, self.batch_shape)
        if 0 in batch:
            return self._empty(batch, value)
        moderate = not self._validate_args or (is_moderate(value) and not unseen(value))
        if self._validate_args:
            check_support(self._name, value, self._family.support_of(base), moderate)
        if base.batch_shape:
            value = value.expand(broadcast_batch(self._name, rows, base.batch_shape) + self.event_shape)
        with self._family.holding(self._weights), unvalidated_in_vmap():
            score = self._score_unconstrained(base, value) if moderate else self._score_far(base, value)
        return score.expand(batch)

    def _score_far(self, base: Distribution, value: Tensor) -> Tensor:
        """Scores where some events may be infinite, or so large that numbers overflow; in vmap NaN outside the support."""
        n = len(self.event_shape)
        infinite = _any_entry(value.isinf(), n)
        if is_real(self._family.support_of(base)):
            value = value.masked_fill(infinite[(...,) + (None,) * n], 0.0)  # a network would make NaN of them
        try:
            score = self._score_unconstrained(base, value)
        except ValueError as error:
            raise ValueError(
                f"{self._name}: values up to {float(value.abs().max()):.4g} are too large: numbers overflow on the way. "
                "Standardise or clean the data."
            ) from error
        overflown = _any_entry(~(value * value).isfinite(), n) & score.isnan()
        score = torch.where(infinite | overflown, -torch.inf, score)
        return torch.where(self._family.support_of(base).check(value), score, torch.nan) if unseen(value) else score

    def _score_unconstrained(self, base: Distribution, value: Tensor) -> Tensor:
        bijection = self._family.bijection(base)
        if bijection is None:
            return base.log_prob(value)
        u = bijection.inv(value)
        return base.log_prob(u) - bijection.log_abs_det_jacobian(u, value)


def _expanded(name: str, old: Size, batch_shape: Any) -> Size:
    """The batch shape that was asked for, if the old one broadcasts to it."""
    new = as_shape(batch_shape, "batch_shape", least=0)
    if not spreads(old, new):
        raise ValueError(f"{name}: cannot expand {tuple(old)} to {tuple(new)}.")
    return new


def _draw_of(base: Any, shape: Size) -> Tensor:
    """A draw of what a family built; of a flow, one of its base."""
    source = base.base if isinstance(base, zuko.distributions.NormalizingFlow) else base
    return source.rsample(shape) if source.has_rsample else source.sample(shape)


class NoDensityError(ValueError, NotImplementedError):
    """Raised where a density is asked of a distribution that has none (a ValueError, so Pyro adds the site's name)."""


class ImplicitDistribution(TorchDistribution):
    r"""The distribution of :math:`x = G(z),\ z \sim p(z)`: it can be sampled, and has no density.

    Args:
        push: the map :math:`G` from a base draw, shape ``(*sample, *batch, *base_event)``, to ``(..., *event_shape)``.
        base: the distribution of :math:`z`; its batch shape is the batch shape of the result.
        event_shape: an int or a shape.
        support: where draws lie.
        name: who is speaking in messages.

    Raises:
        NoDensityError: by ``log_prob``; it names what works without a density.

    Example:
        >>> from torch.distributions import Normal
        >>> d = ImplicitDistribution(lambda z: z.square(), Normal(torch.zeros(3), 1.0).expand([3]), ())
        >>> d.expand([4, 3]).rsample((2,)).shape
        torch.Size([2, 4, 3])
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(
        self,
        push: Callable[[Tensor], Tensor],
        base: Distribution,
        event_shape: int | tuple[int, ...],
        *,
        support: constraints.Constraint | None = None,
        name: str = "ImplicitDistribution",
    ) -> None:
        fit = callable(push), isinstance(base, Distribution), isinstance(support, constraints.Constraint | None)
        if not all(fit):
            got = ", ".join(type(x).__name__ for x in (push, base, support))
            raise TypeError(f"{name}: push, base and support are {got}; expected a function, a distribution, a set.")
        self._push = push
        self._base = base
        self._name = name
        event = as_shape(event_shape)
        self._support = support or constraints.independent(constraints.real, len(event))
        super().__init__(base.batch_shape, event, validate_args=False)

    def __repr__(self) -> str:
        return f"{self._name}(batch_shape: {tuple(self.batch_shape)}, event_shape: {tuple(self.event_shape)})"

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return self._support

    def expand(self, batch_shape: Size, _instance: Any = None) -> ImplicitDistribution:
        base = self._base.expand(_expanded(self._name, self.batch_shape, batch_shape))
        new = ImplicitDistribution(self._push, base, tuple(self.event_shape), support=self._support, name=self._name)
        new.has_rsample = self.has_rsample
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        x = self._push(self._base.rsample(as_shape(sample_shape, "sample_shape", least=0)))
        check_value_shape(self._name, x, self.event_shape)
        return x

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        raise NoDensityError(
            f"{self._name} has no density, so log_prob is undefined. Make its noise the latent site and x "
            "deterministic (Generator.sample_site), train with Adversarial or Adversarial_ELBO, or compare draws; "
            "for a likelihood train a flow or a VAE."
        )


def _any_entry(entries: Tensor, event_dim: int) -> Tensor:
    """Whether any entry of each event is true: shape ``(*batch,)``."""
    return entries.flatten(-event_dim).any(-1) if event_dim else entries
