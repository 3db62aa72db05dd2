r"""The family behind :class:`AutoFlow`: flows in whitened coordinates, one for each mode of the posterior.

.. math:: q(\theta) = \sum_c w_c\, q_c(\theta), \qquad
          \theta = \mu_c + L_c\,(a_c + e^{s_c} \odot f_c(z)), \qquad z \sim p(z),

with :math:`\mu, L` fixed (the start) and :math:`a, s` and the flow :math:`f` trained. At the start :math:`a = s = 0` and
:math:`f` is the identity, so each :math:`q_c = N(\mu_c, L_c L_c^\top)`.

The flows follow path gradients: given its component, a draw is reparameterised. The weights :math:`w` are no parameters:
they are fitted by EM to importance-weighted draws of all components, once the components are known and again once they are
trained. With one component the mixture is that component, at no cost.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, Transform, constraints

from pyro_dgm.core import DistributionModule, LearnedDistribution, zuko
from pyro_dgm.core.module import OnePass, composed
from pyro_dgm.core.weights import stratified
from pyro_dgm.flows.base import StandardNormalBase
from pyro_dgm.flows.coupling import StableStudentT, StudentTBase

__all__ = [
    "GivenGlobals",
    "Modes",
    "WhitenedPosterior",
    "WithNormals",
    "as_pyro",
    "fitted_log_weights",
    "log_normal",
    "transport",
    "whitened",
]

_NORMAL = 1e6  # degrees of freedom of what is normal


def whitened(y: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    """Vectors ``(*batch, D)`` in units of a normal law."""
    rows = (y - loc).reshape(-1, y.shape[-1])
    return torch.linalg.solve_triangular(scale_tril.mT, rows, upper=True, left=False).reshape(y.shape)


class Whitening(Transform):
    r"""The map :math:`u \mapsto \mu + L (a + e^{s} \odot u)` with lower-triangular L."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, scale_tril: Tensor, shift: Tensor, log_scale: Tensor) -> None:
        super().__init__()
        self.loc = loc
        self.scale_tril = scale_tril
        self.shift = shift
        self.log_scale = log_scale

    def _call(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.addcmul(self.shift, self.log_scale.exp(), x), self.scale_tril, self.loc)

    def _inverse(self, y: Tensor) -> Tensor:
        return (whitened(y, self.loc, self.scale_tril) - self.shift) * torch.exp(-self.log_scale)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.scale_tril.diagonal().log() + self.log_scale).sum().expand(x.shape[:-1])


class WhitenedPosterior(DistributionModule):
    """A family over :math:`R^D` seen through a fixed whitening and a trained elementwise affine map.

    Args:
        family: any family over vectors of length D.
        loc: the centre, shape ``(D,)``.
        scale: the standard deviation at the start, in each dimension.
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, family: DistributionModule, loc: Tensor, scale: float) -> None:
        super().__init__(len(loc), support=constraints.real_vector)
        self.rate = family.soften()
        self.family = family.to(loc)
        self.affine = nn.Parameter(loc.new_zeros(2, len(loc)))  # rows: shift, log scale
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale_tril", scale * torch.eye(len(loc)).to(loc))

    @torch.no_grad()
    def whiten(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set the whitening: q becomes :math:`N(loc, LL^T)` as long as the flow is the identity."""
        self.loc.copy_(loc)
        self.scale_tril.copy_(scale_tril)

    def peak_rate(self) -> float | None:
        """The learning rate of all its parameters, from a start that whitens well."""
        return self.rate

    def buffer_version(self) -> int:
        """A number that grows when the whitening is set."""
        return self.loc._version + self.scale_tril._version

    def build(self, context: Tensor | None) -> Distribution:
        return self.family.checked_build(context)

    def bijection(self, built: Distribution) -> Transform:
        inner = self.family.bijection(built)
        whitening = Whitening(self.loc, self.scale_tril, *self.affine.unbind())
        return whitening if inner is None else composed([inner, whitening])


class GivenGlobals(DistributionModule):
    """Abstract: a family over :math:`R^D` of which some entries have a law given the others, the globals.

    Args:
        family: of the globals, over vectors of length G.
        loc: the centre, shape ``(D,)``.
        scale: the standard deviation at the start, in each dimension.
        free: where the globals stand in the vector, ``(G,)``.
    """

    def __init__(self, family: DistributionModule, loc: Tensor, scale: float, free: Tensor) -> None:
        super().__init__(len(loc), support=constraints.real_vector)
        self.size = len(free)
        self.outer = WhitenedPosterior(family, loc[free.to(loc.device)], scale)

    @property
    def affine(self) -> nn.Parameter:
        """Shift and log scale of the globals."""
        return self.outer.affine

    @property
    def family(self) -> DistributionModule:
        """That of the globals."""
        return self.outer.family

    def buffer_version(self) -> int:
        """A number that grows when the whitening is set."""
        return self.outer.buffer_version()

    def whiten(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set the whitening of the globals."""
        self.outer.whiten(loc, scale_tril)

    def build(self, context: Tensor | None) -> Distribution:
        inner = self.outer.family.checked_build(context)
        if not isinstance(inner, zuko.distributions.NormalizingFlow):
            raise NotImplementedError(
                f"AutoFlow: {type(self.outer.family).__name__} is no transform of a base distribution."
            )
        base = WithNormals(inner.base, self.event_shape[0] - self.size)
        return zuko.distributions.NormalizingFlow(Head(inner.transform, self.size), base)

    def bijection(self, built: Any) -> Transform:
        inner = zuko.distributions.NormalizingFlow(built.transform.inner, built.base.base)
        return self.placed(self.outer.bijection(inner))

    @abstractmethod
    def placed(self, outer: Transform) -> Transform:
        """From a flow's globals, by ``outer``, and standard normals to the vector of all latents."""

    @abstractmethod
    def factors_of(self, log_joint: Any) -> Any:
        """The parts of a log joint that belong to what is given the globals."""

    def use(self, factors: Any) -> None:
        """Have draws of these from now on, where they are the model's."""


class Modes(DistributionModule):
    """A mixture of posteriors over the same vector.

    Args:
        component: the first; others are made as copies of it by :meth:`grow`.
    """

    log_weight: Tensor
    components: Any

    def __init__(self, component: DistributionModule) -> None:
        super().__init__(component.event_shape, support=constraints.real_vector)
        self.components = nn.ModuleList([component])
        self.register_buffer("log_weight", self.affine.detach().new_zeros(1))

    def build(self, context: Tensor | None) -> Distribution:
        if len(self.components) == 1:
            return self.components[0].checked_build(None)
        return ModeMixture([component() for component in self.components], self.log_weight)

    def bijection(self, built: Distribution) -> Transform | None:
        return None if isinstance(built, ModeMixture) else self.components[0].bijection(built)

    @property
    def affine(self) -> Tensor:
        """Shift and log scale of the first component: the first parameter of any guide."""
        return self.components[0].affine

    @property
    def affine_name(self) -> str:
        """The name of that parameter."""
        return next(name for name, p in self.named_parameters() if p is self.affine)

    @torch.no_grad()
    def grow(self, count: int) -> None:
        """Have at least this many components, equally weighted where there are new ones."""
        if count > len(self.components):
            self.components.extend(deepcopy(self.components[0]) for _ in range(count - len(self.components)))
            self.log_weight = self.log_weight.new_zeros(count).log_softmax(0)

    @torch.no_grad()
    def weigh(self, log_joint: Callable[[Tensor], Tensor], draws: int = 1024) -> Tensor:
        """Set the weights by 100 steps of EM on importance-weighted draws of all components; returns them."""
        log_weight = fitted_log_weights([component() for component in self.components], log_joint, draws)
        self.log_weight.copy_(log_weight)
        return log_weight.exp()

    def buffer_version(self) -> int:
        """A number that grows when a whitening, the weights or the number of components are set."""
        whitenings = sum(component.buffer_version() for component in self.components)
        return int(whitenings + self.log_weight._version + 1000 * len(self.components))

    def keep(self, index: Sequence[int]) -> None:
        """Drop all other components."""
        self.components = nn.ModuleList([self.components[i] for i in index])
        self.log_weight = self.log_weight[list(index)].log_softmax(0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.grow(state_dict.get(f"{prefix}log_weight", self.log_weight).numel())
        super()._load_from_state_dict(state_dict, prefix, *rest)


@torch.no_grad()
def fitted_log_weights(q: Sequence[Any], log_joint: Callable[[Tensor], Tensor], draws: int = 1024) -> Tensor:
    """Weights with which the distributions in ``q`` mix to the density, by 100 steps of EM on weighted draws of all."""
    x = torch.cat([c.sample((draws,)) for c in q])
    each = torch.stack([c.log_prob(x) for c in q])
    target = (log_joint(x) - each.logsumexp(0)).log_softmax(0)
    log_weight = each.new_zeros(len(q)).log_softmax(0)
    for _ in range(100):
        share = (each + log_weight[:, None]).log_softmax(0)
        log_weight = (share + target).logsumexp(1).clamp_min(-30.0).log_softmax(0)
    return log_weight


class ModeMixture(Distribution):
    """Draws fall to the components in the proportion of the weights (systematically, in random order)."""

    arg_constraints: dict[str, Any] = {}
    has_rsample = True
    support = constraints.real_vector

    def __init__(
        self, components: Sequence[LearnedDistribution], log_weight: Tensor, batch_shape: Size | None = None
    ) -> None:
        self.components = components
        self.log_weight = log_weight
        shape = components[0].batch_shape if batch_shape is None else batch_shape
        super().__init__(shape, components[0].event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ModeMixture:
        return ModeMixture(self.components, self.log_weight, Size(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        counts = self._counts(shape.numel())
        draws = [c.rsample((n,)) for c, n in zip(self.components, counts, strict=True) if n]
        return torch.cat(draws)[torch.randperm(shape.numel())].reshape(shape + self.event_shape)

    def _counts(self, n: int) -> list[int]:
        """How many of ``n`` draws each component makes: systematic sampling of the weights."""
        component = stratified(self.log_weight.exp().cpu().numpy(), n, float(torch.rand(())))
        return np.bincount(component, minlength=len(self.components)).tolist()

    def log_prob(self, value: Tensor) -> Tensor:
        each = [w + c.log_prob(value) for w, c in zip(self.log_weight, self.components, strict=True)]
        return torch.stack(each).logsumexp(0)


# --- Base distributions ---


def log_normal(z: Tensor) -> Tensor:
    """The log density of standard normal vectors ``(*batch, F)``, in nats."""
    return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2.0 * math.pi)


class WithNormals(Distribution):
    """A base distribution with independent standard normals behind it."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, base: Any, more: int, batch_shape: Any = ()) -> None:
        self.base = base
        self.more = more
        super().__init__(Size(batch_shape), Size((base.event_shape[0] + more,)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> WithNormals:
        return WithNormals(self.base.expand(batch_shape), self.more, batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        x = self.base.rsample(sample_shape)
        return torch.cat([x, torch.randn(*x.shape[:-1], self.more).to(x)], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        x, z = value.split([value.shape[-1] - self.more, self.more], -1)
        return self.base.log_prob(x) + log_normal(z)


class Head(OnePass):
    """A transform of the first entries of vectors."""

    def __init__(self, inner: Any, size: int) -> None:
        super().__init__()
        self.inner = inner
        self.size = size

    @property
    def inv(self) -> Head:
        return Head(self.inner.inv, self.size)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self.inner.call_and_ladj(x[..., : self.size])
        more = ladj.dim() - x.dim() + 1
        return torch.cat([y, x[..., self.size :]], -1), ladj.flatten(-more).sum(-1) if more else ladj


def transport(posterior: DistributionModule, built: Any) -> Any:
    """The map of a posterior from the base of the flow that it built."""
    parts: list[Any] = [built.transform.inv, posterior.bijection(built)]
    return composed(parts)


def as_pyro(base: Any) -> Any:
    """A base distribution of torch or zuko as Pyro's own, which NeuTra needs for ``mask``."""
    if isinstance(base, Independent):
        return as_pyro(base.base_dist).to_event(base.reinterpreted_batch_ndims)
    if isinstance(base, StandardNormalBase):
        return dist.Normal(base.zero, 1.0).to_event(1)
    if isinstance(base, WithNormals):
        df = base.base.df if isinstance(base.base, StudentTBase) else torch.full(base.base.event_shape, _NORMAL)
        return StableStudentT(torch.cat([df, df.new_full((base.more,), _NORMAL)])).to_event(1)
    if isinstance(base, StudentTBase):  # not as Pyro's own StudentT, which loses .02 nat per dimension near df = 1e6
        return base.as_pyro()
    if isinstance(base, TorchDistributionMixin):
        return base
    if isinstance(base, torch.distributions.Normal):
        return dist.Normal(base.loc, base.scale)
    raise NotImplementedError(f"AutoFlow: NeuTra needs a Normal or StudentT base, got {type(base).__name__}.")
