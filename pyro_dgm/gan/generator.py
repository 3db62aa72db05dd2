r"""A generator: noise pushed through a network, :math:`x = G_\theta(z; c) + \sigma \epsilon`.

.. math:: z \sim p(z), \qquad \epsilon \sim N(0, I), \qquad p(x) = \int p(z)\, N(x \mid G_\theta(z), \sigma^2)\, dz

(Goodfellow et al. 2014, arXiv 1406.2661; the output noise is that of Dieng et al. 2019, arXiv 1910.04302.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Size, Tensor, nn
from torch.distributions import Distribution, biject_to, constraints
from torch.distributions.transforms import ReshapeTransform

from pyro_dgm.core import MLP, DistributionModule, ImplicitDistribution, Standardize, broadcast_cat
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.module import composed, looks_at_numbers, whole_event
from pyro_dgm.core.saved import LateBuffers
from pyro_dgm.core.shapes import as_tensor_like, check_context, check_value_shape, refuse_non_finite
from pyro_dgm.flows.few_rows import Decorrelate
from pyro_dgm.vae.latents import StandardNormal
from pyro_dgm.vae.model import prior_given

__all__ = ["Generator"]

_WIDTHS = (128, 256)
_MOST_LATENTS = 64
_FIRST_NOISE = 0.1  # of a learned noise, in standard deviations of the data
_ROUNDS = 50  # of principal factors; with a latent as long as the event the first is the last
_RANGES = {nn.Tanh: (-1.0, 1.0), nn.Sigmoid: (0.0, 1.0)}


class Generator(DistributionModule):
    r"""Implicit family :math:`x = T(\mu + s\,(G_\theta(z; c) + \sigma \epsilon))`: draws in one pass, no density of x.

    :math:`\mu, s` are the data's units (set by :meth:`standardize`, which training calls) and T the bijection onto the
    support. With :math:`\sigma > 0` the density :math:`p(x \mid z)` is known (:meth:`likelihood`), so that bounds of
    :math:`\log p(x)` by importance weights and annealing are defined: ``evaluate.ais(generator, x)``. Without it draws
    lie on a surface of the latent's dimension, and a critic tells them from data with certainty.

    Args:
        event_shape: an int or a shape.
        network: a module ``(*batch, latent + context_features) -> (*batch, D)``, or ``(*batch, *event_shape)``. It must
            take any number of batch dimensions. An int is the width of three hidden layers with ReLU, whose kinks separate
            modes better than smooth activations; None is 4 D, between 128 and 256. Beside these two there is a straight map
            ``W z + b``, which a distillation sets where data are of one normal law. Where a module ends
            in ``Tanh`` or ``Sigmoid``, data are not standardised and must lie in that range.
        base: of z: a family, a distribution (its tensors do not move with ``.to``), or the dimension of a
            standard normal. None for dimension D, between 2 and 64. A distillation makes use of D entries at most: others
            only blur, so that the network sees zeros in their place from then on.
        context_features: length of the context c.
        noise: :math:`\sigma` in standard deviations of the data; 0 for none. None learns one for each entry.
        support: constraint of the event.

    Raises:
        ValueError: for negative noise, a network whose output is no event, data outside its range, a wrong context;
            :meth:`likelihood` without noise.
        NoDensityError: by ``log_prob`` of the distribution.

    Note:
        In a model, write ``x = generator.sample_site("x")``, not ``pyro.sample("x", generator())``: the first is exact
        and works with every inference method, the second can only be simulated.

    References:
        | Goodfellow et al. (2014), arXiv 1406.2661. Dieng et al. (2019), "Prescribed GANs", arXiv 1910.04302.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> generator = dgm.Generator((8, 8), 64, base=5)
        >>> generator().sample((3,)).shape, generator.likelihood(torch.zeros(7, 5)).batch_shape
        (torch.Size([3, 8, 8]), torch.Size([7]))
    """

    __call__: Callable[..., ImplicitDistribution]  # type: ignore[assignment]

    @checked()
    def __init__(
        self,
        event_shape: int | Iterable[int],
        network: nn.Module | int | None = None,
        base: DistributionModule | Distribution | int | None = None,
        context_features: int = 0,
        *,
        noise: float | None = None,
        support: constraints.Constraint | None = None,
    ) -> None:
        super().__init__(event_shape, context_features, support=support)
        if noise is not None and not 0.0 <= noise < float("inf"):
            raise ValueError(f"Generator: noise is {noise}, expected a number >= 0, or None for a learned one.")
        self.base = _as_family(max(2, min(self.features, _MOST_LATENTS)) if base is None else base)
        self.network = _as_network(network, self.base.event_shape.numel() + context_features, self.features)
        self.straight = _Straight()
        self.standard = Standardize(self.features)
        latent = self.base.event_shape.numel()
        self.heard: Tensor | None
        self.register_buffer("heard", torch.ones(latent) if latent > self.features else None)
        self.noiseless = noise == 0.0
        log_noise = torch.full((self.features,), _FIRST_NOISE if noise is None else noise or 1.0).log()
        self.log_noise: Tensor
        if noise is None:
            self.log_noise = nn.Parameter(log_noise)
        else:
            self.register_buffer("log_noise", log_noise)

    def build(self, context: Tensor | None) -> ImplicitDistribution:
        base = self._latent(context, context)
        support = self._support or constraints.independent(constraints.real, len(self.event_shape))
        return ImplicitDistribution(
            lambda z: self._draw(z, context), base, tuple(self.event_shape), support=support, name="Generator"
        )

    def forward(self, context: Tensor | None = None) -> ImplicitDistribution:  # type: ignore[override]
        return self.build(check_context(self, context))

    def draw(self, rows: int, context: Tensor | None = None) -> Tensor:
        """Draws ``(rows, *event_shape)``, one for each row of a context, without the cost of building a distribution."""
        context = check_context(self, context)
        return self._draw(self.latents(rows, context), context)

    def push(self, z: Tensor, noise: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """The event made from latents ``(*batch, *latent)`` and standard normal noise ``(*batch, D)``; None for none."""
        return self._pushed(z, noise, check_context(self, context))

    def _pushed(self, z: Tensor, noise: Tensor | None, context: Tensor | None) -> Tensor:
        u = self.location(z, context)
        if noise is not None and not self.noiseless:
            u = torch.addcmul(u, self.sigma, noise)
        return self._event(u)

    def location(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """What the network makes of latents and contexts in their units, flat and in standard units: shape ``(*batch, D)``."""
        z = as_tensor_like("Generator", "latent", z, self.standard.loc)
        check_value_shape("Generator, latent", z, self.base.event_shape)
        flat = z.reshape(*z.shape[: z.dim() - len(self.base.event_shape)], self.base.event_shape.numel())
        flat = flat if self.heard is None else flat * self.heard
        inputs = flat if context is None else broadcast_cat(flat, context)
        u = self.network(inputs)
        u = u if u.shape == (*inputs.shape[:-1], self.features) else self._flat(u, inputs)
        return u if self.straight.is_identity() else u + self.straight(flat)

    @property
    def may_be_straight(self) -> bool:
        """Whether it can become a normal law: by a standard normal latent, no context, and a default network."""
        return (
            isinstance(self.base, StandardNormal) and not self.context_features and isinstance(self.network, _Default)
        )

    @torch.no_grad()
    def become_normal(self, u: Tensor, least_noise: float) -> None:
        r"""Become the normal law of rows in standard units, :math:`u = W z + b + \sigma \epsilon`; the network is zero beside it.

        A learned noise is what a short latent leaves of each entry, and the least at least.
        """
        latent = self.base.event_shape.numel()
        learned = isinstance(self.log_noise, nn.Parameter)
        weight, noise = _factors(u, min(latent, self.features), least_noise if learned else self.sigma)
        if learned:
            self.log_noise.copy_(noise.log())
        self.straight.take(nn.functional.pad(weight, (0, latent - weight.shape[1])), u.mean(0))
        for parameter in list(self.network.modules())[-1].parameters():
            parameter.zero_()

    def hear(self, entries: int) -> None:
        """Let the network see so many entries of a latent that is longer than the event, and zeros in the place of the others."""
        if self.heard is not None:
            self.heard[entries:] = 0.0

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        """A state of before entries could be left out hears all of them."""
        if self.heard is not None:
            state.setdefault(prefix + "heard", torch.ones_like(self.heard))
        super()._load_from_state_dict(state, prefix, *rest)

    def noisy(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The location with output noise: draws in standard units, flat."""
        u = self.location(z, context)
        return u if self.noiseless else torch.addcmul(u, self.sigma, torch.randn_like(u))

    def units(self, x: Tensor) -> Tensor:
        """Events ``(*batch, *event)`` as the network should make them: flat and in standard units, shape ``(*batch, D)``."""
        return (self._flattened(self._data("data", x)) - self.standard.loc) / self.standard.scale

    def latents(self, rows: int, context: Tensor | None = None) -> Tensor:
        """Draws of z, shape ``(rows, *latent)``; with a context, in its units, one for each of its rows."""
        if isinstance(self.base, StandardNormal):
            return self.base.draw(rows)
        base = self._latent(context, context)
        return base.rsample(() if base.batch_shape else (rows,))

    @property
    def sigma(self) -> Tensor:
        """The output noise of each entry in standard units, shape ``(D,)``; zeros without noise."""
        return torch.zeros_like(self.log_noise) if self.noiseless else self.log_noise.exp()

    def likelihood(self, z: Tensor, context: Tensor | None = None) -> Any:
        r"""The distribution :math:`p(x \mid z, c)` for latents ``(*batch, *latent)``: a normal around G(z), on the support."""
        if self.noiseless:
            raise ValueError("Generator: noise=0, so p(x | z) is a point and has no density. Build it with noise=None.")
        loc = self.location(z, check_context(self, context))
        if looks_at_numbers():
            refuse_non_finite("Generator", loc.reshape(-1, self.features), "means given their latents")
        scale = self.standard.scale * self.sigma
        normal = dist.Normal(self.standard.loc + self.standard.scale * loc, scale).to_event(1)
        bijection = self._bijection()
        return normal if bijection is None else dist.TransformedDistribution(normal, bijection)

    def sample_site(self, name: str, context: Tensor | None = None, obs: Tensor | None = None) -> Tensor:
        """Sample x inside a model: its noise is latent, x is computed; returns x of shape ``(*plates, *event)``.

        The sites are ``name_latent`` (z), ``name_noise`` (epsilon, if there is output noise) and the deterministic site
        ``name``. This is exact, and any inference method sees a standard normal latent. With ``obs`` the output noise is
        the likelihood: ``name_latent`` and the observed site ``name`` with the density p(x | z).

        The generator's weights stay as they are, which is what a trained one is for; to train them with the model, make
        it an attribute of a module or state ``pyro.module``. Rows of a context belong in a plate.
        """
        context = check_context(self, context)
        rows = None if _enumerating() else context  # all values of an enumerated class share one draw of the noise
        z = pyro.sample(f"{name}_latent", self._latent(context, rows))
        if obs is not None:
            return pyro.sample(name, self.likelihood(z, context), obs=self._data(f"site '{name}'", obs))
        noise = None if self.noiseless else pyro.sample(f"{name}_noise", self._noise(rows))
        return pyro.deterministic(name, self._pushed(z, noise, context), event_dim=len(self.event_shape))

    def event_units(self) -> Standardize:
        return self.standard

    @torch.no_grad()
    def fit_events(self, x: Tensor) -> None:
        """Take each entry's own units; of an image none far below the others.

        Where the network ends in a bounded layer nothing is fixed, and data outside its range are refused.
        """
        self.standard.forget()
        flat = self._flattened(self._data("data", x)).reshape(-1, self.features)
        low, high = _RANGES.get(type(list(self.network.modules())[-1]), (-torch.inf, torch.inf))
        if low > -torch.inf:
            self._refuse_outside(flat, low, high)
            return
        self.standard.fit(flat, floor=0.1 if len(self.event_shape) > 1 else 0.0, who="Generator")

    def observation(self, x: Tensor, z: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Any:
        """The distribution of rows given their latents, and the rows to score."""
        if mask is not None:
            raise ValueError("Generator: masks are not supported; score whole rows, or train a VAE.")
        return self.likelihood(z, context), self._data("data", x)

    def _data(self, what: str, x: Tensor) -> Tensor:
        """Given events as tensors of the generator's kind."""
        x = as_tensor_like("Generator", what, x, self.standard.loc)
        check_value_shape(f"Generator, {what}", x, self.event_shape)
        return x

    def _latent(self, context: Tensor | None, rows: Tensor | None) -> Any:
        base: Any
        if isinstance(self.base, StandardNormal):  # Pyro's own: nothing is learned, so nothing needs to be remembered
            base = self.base.build(None)
        else:
            base = prior_given(self.base, context)
        return base if rows is None or base.batch_shape else base.expand(rows.shape[:-1])

    def _noise(self, context: Tensor | None) -> Any:
        normal = dist.Normal(torch.zeros_like(self.log_noise), 1.0).to_event(1)
        return normal if context is None else normal.expand(context.shape[:-1])

    def _draw(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._event(self.noisy(z, context))

    def _event(self, u: Tensor) -> Tensor:
        flat = torch.addcmul(self.standard.loc, self.standard.scale, u)
        bijection = self._bijection()
        return flat if bijection is None else bijection(flat)

    def _flattened(self, x: Tensor) -> Tensor:
        """Events as flat vectors in the data's units, long tails compressed."""
        bijection = self._bijection()
        return x if bijection is None else bijection.inv(x)

    def _bijection(self) -> Any:
        """From the flat vector in the data's units, long tails compressed, to the event; None where they are the same."""
        parts: list[Any] = [] if self.standard.is_straight() else [self.standard.bend()]
        if self.unconstrained_shape != Size((self.features,)):
            parts.append(ReshapeTransform(Size((self.features,)), self.unconstrained_shape))
        if self._support is not None:
            parts.append(whole_event(biject_to(self._support), len(self.unconstrained_shape)))
        return composed(parts)

    def _flat(self, u: Tensor, inputs: Tensor) -> Tensor:
        """A network's output as vectors, or an error where it is no event."""
        batch = inputs.shape[:-1]
        event = self.unconstrained_shape
        if u.shape == batch + event:
            return u.reshape(*batch, self.features)
        raise ValueError(
            f"Generator: the network returned shape {tuple(u.shape)} for inputs of shape {tuple(inputs.shape)}, expected "
            f"{tuple(batch + Size((self.features,)))} or {tuple(batch + event)} (event_shape "
            f"{tuple(self.event_shape)}). A network of images must take any number of batch dimensions (core.ConvDecoder)."
        )

    def _refuse_outside(self, x: Tensor, low: float, high: float) -> None:
        if x.min() < low or x.max() > high:
            raise ValueError(
                f"Generator: the data lie between {float(x.min()):.4g} and {float(x.max()):.4g}, but the network ends in "
                f"{type(list(self.network.modules())[-1]).__name__}, whose range is {low:g} to {high:g}. Rescale the "
                "data, or leave the last activation out (data are then standardised)."
            )


class _Default(MLP):
    """The network of a generator that was given none of its own."""


class _Straight(LateBuffers):
    """The straight part of a generator's map; none, until a distillation has found a normal law."""

    NAMES = ("weight", "bias")
    weight: Tensor
    bias: Tensor

    def take(self, weight: Tensor, bias: Tensor) -> None:
        self._put(weight, bias)

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.weight.mT + self.bias


def _factors(u: Tensor, size: int, noise: Tensor | float) -> tuple[Tensor, Tensor]:
    r"""Loadings W ``(D, size)`` and noise of each entry, with :math:`W W^\top + \mathrm{diag}(\sigma^2)` the rows' covariance.

    Given a number, the noise is what W leaves of each entry's variance, and that at least: principal factors (Harman 1976,
    "Modern factor analysis", chapter 9).
    """
    root = Decorrelate().fit(u).tril.double()
    varies = (u.var(0) > 0.0).to(root)
    covariance = root @ root.mT * varies * varies[:, None]
    square = torch.zeros_like(covariance[0]) + torch.as_tensor(noise, dtype=torch.double).cpu() ** 2
    for _ in range(_ROUNDS if isinstance(noise, float) else 1):
        values, vectors = torch.linalg.eigh(covariance - square.diag())
        weight = vectors[:, -size:] * values[-size:].clamp_min(0.0).sqrt()
        if isinstance(noise, float):
            square = (covariance.diagonal() - weight.square().sum(1)).clamp_min(noise**2)
    return weight.to(u), square.sqrt().to(u)


class _Fixed(DistributionModule):
    """A distribution as a family without a context."""

    def __init__(self, distribution: Distribution) -> None:
        super().__init__(distribution.event_shape)
        self.distribution = (distribution,)

    def build(self, context: Tensor | None) -> Distribution:
        return self.distribution[0]


def _enumerating() -> bool:
    """Whether discrete sites are being summed out: dimensions left of the plates are then no rows."""
    return any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK)


def _as_family(base: Any) -> DistributionModule:
    if isinstance(base, DistributionModule):
        return base
    if isinstance(base, Distribution):
        if base.batch_shape:
            raise ValueError(
                f"Generator: base has batch_shape {tuple(base.batch_shape)}, expected (). Use base.to_event("
                f"{len(base.batch_shape)})."
            )
        return _Fixed(base)
    if isinstance(base, int) and base >= 1:
        return StandardNormal(base)
    raise TypeError(f"Generator: base is {base!r}, expected a family, a distribution, or a positive dimension.")


def _as_network(network: nn.Module | int | None, inputs: int, outputs: int) -> nn.Module:
    if isinstance(network, nn.Module):
        return network
    if network is None:
        network = max(_WIDTHS[0], min(4 * outputs, _WIDTHS[1]))
    if isinstance(network, int) and network >= 1:
        return _Default(inputs, outputs, (network,) * 3, nn.ReLU)
    raise TypeError(f"Generator: network is {network!r}, expected a module, a positive width, or None.")
