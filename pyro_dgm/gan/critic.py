r"""A critic: a network that gives one number for an event, the logit :math:`T(x; c)` of "it is data"; and what it minimises.

The best critic of the classification losses is :math:`T = \log p(x) - \log q(x)` (Goodfellow et al. 2014, proposition 1). The
losses of logits T, in the notation of the papers:

========================= ============================================ =====================================
loss                      critic minimises                             generator minimises
========================= ============================================ =====================================
``"saturating"``          :math:`E\,s(-T(x)) + E\,s(T(y))`             :math:`-E\,s(T(y))`
``"non-saturating"``      the same                                     :math:`E\,s(-T(y))`
``"relativistic"``        :math:`E\,s(T(y) - T(x))`                    :math:`E\,s(T(x) - T(y))`
``"least-squares"``       :math:`\frac12 E(T(x)-1)^2+\frac12 E\,T(y)^2` :math:`\frac12 E(T(y)-1)^2`
``"hinge"``               :math:`E(1-T(x))_+ + E(1+T(y))_+`            :math:`-E\,T(y)`
``"wgan-gp"``             :math:`E\,T(y) - E\,T(x)`                    :math:`-E\,T(y)`
========================= ============================================ =====================================

with x data, y draws and :math:`s(t) = \log(1 + e^t)`, so that :math:`s(-T) = -\log \mathrm{sigmoid}(T)`: no logarithm of a
probability is ever taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import relu, softplus

from pyro_dgm.core import MLP, InputUnits, Standardize, broadcast_cat
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.networks import refuse_batch_norm
from pyro_dgm.core.shapes import (
    as_count,
    as_shape,
    as_tensor_like,
    check_value_shape,
    fitting_context,
    in_context_units,
    refuse_immoderate,
)

__all__ = ["LOSSES", "Critic", "Loss", "gradient_norms"]

_HIDDEN = (128, 128, 128)


class _Leaky(nn.LeakyReLU):
    """With the slope that critics usually have."""

    def __init__(self) -> None:
        super().__init__(0.2)


class Critic(nn.Module):
    r"""Logits :math:`T(x; c)` of events, shape ``(*batch, *event_shape) -> (*batch,)``: no sigmoid at the end.

    Args:
        event_shape: an int or a shape; events are flattened before the network.
        network: a module ``(*batch, D + context_features) -> (*batch, 1)`` or ``(*batch,)``. An int is the width of three
            hidden layers; None is 128.
        context_features: length of the context c.
        spectral_norm: divide every linear and convolutional weight by its largest singular value (Miyato et al. 2018),
            with torch's parametrisation.

    Raises:
        ValueError: for a value or context of another shape, or a network that returns anything but one number a row.

    Note:
        :meth:`standardize` (training calls it) brings its inputs to mean 0 and sd 1. No batch normalisation: it makes one
        row's logit depend on the others, and a gradient penalty is then no longer one of single rows.

    References:
        | Goodfellow et al. (2014), arXiv 1406.2661. Miyato et al. (2018), arXiv 1802.05957.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> dgm.Critic((8, 8), 32, context_features=3)(torch.zeros(5, 8, 8), torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    @checked()
    def __init__(
        self,
        event_shape: int | Iterable[int],
        network: nn.Module | int | None = None,
        context_features: int = 0,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.event_shape = as_shape(event_shape)
        self.context_features = as_count("Critic", "context_features", context_features)
        self.standard = Standardize(self.event_shape.numel())
        if self.context_features:
            self.context_units = InputUnits(self.context_features)
        self.network = _as_network(network, self.event_shape.numel() + self.context_features)
        refuse_batch_norm("Critic", self.network)
        if spectral_norm:
            for layer in list(self.network.modules()):
                if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d):
                    nn.utils.parametrizations.spectral_norm(layer)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = fitting_context("Critic", self, context)
        return self.score(self.units(x), context)

    def units(self, x: Tensor) -> Tensor:
        """Events as vectors in the critic's units: shape ``(*batch, D)``."""
        x = as_tensor_like("Critic", "value", x, self.standard.loc)
        check_value_shape("Critic", x, self.event_shape)
        if Distribution._validate_args:
            refuse_immoderate("Critic", x.reshape(-1, self.event_shape.numel()), "values")
        flat = x if len(self.event_shape) == 1 else x.reshape(*x.shape[: x.dim() - len(self.event_shape)], -1)
        return flat if self.standard.is_identity() else self.standard(flat)

    def score(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        """Logits of vectors in the critic's units."""
        context = fitting_context("Critic", self, context)
        if context is not None:
            context = in_context_units("Critic", self, context)
        inputs = u if context is None else broadcast_cat(u, context)
        logits = self.network(inputs)
        if logits.shape == inputs.shape[:-1] + (1,):
            return logits.squeeze(-1)
        if logits.shape != inputs.shape[:-1]:
            raise ValueError(
                f"Critic: the network returned shape {tuple(logits.shape)} for inputs of shape {tuple(inputs.shape)}, "
                f"expected {(*inputs.shape[:-1], 1)}: one logit for each row."
            )
        return logits

    @torch.no_grad()
    def standardize(self, x: Tensor, context: Tensor | None = None) -> Critic:
        """Fix the units to data ``(N, *event_shape)``: each entry's own; of an image none far below the others.

        A context ``(N, context_features)`` fixes its units too.
        """
        context = fitting_context("Critic.standardize", self, context) if context is not None else None
        x = as_tensor_like("Critic.standardize", "data", x, self.standard.loc)
        check_value_shape("Critic.standardize", x, self.event_shape)
        flat = x.reshape(-1, self.event_shape.numel())
        self.standard.fit(flat, floor=0.1 if len(self.event_shape) > 1 else 0.0, who="Critic.standardize")
        if context is not None:
            self.context_units.fit(context, who="Critic.standardize, context")
        return self


def _as_network(network: nn.Module | int | None, inputs: int) -> nn.Module:
    if isinstance(network, nn.Module):
        return network
    if network is None:
        return MLP(inputs, 1, _HIDDEN, _Leaky)
    if isinstance(network, int) and network >= 1:
        return MLP(inputs, 1, (network,) * 3, _Leaky)
    raise TypeError(f"Critic: network is {network!r}, expected a module, a positive width, or None.")


class Loss(NamedTuple):
    """Both players' losses of logits of data and of draws, shape ``(N,)`` each, and the settings that go with them.

    The weights ``r1`` and ``r2`` are for one dimension; they grow with the square of the number of dimensions: few numbers
    have sharp edges that a strong penalty would blur, many are memorised without one.
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]
    r1: float = 2.5e-4
    r2: float = 2.5e-4
    gradient_penalty: float = 0.0
    critic_steps: int = 1


def _cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    return softplus(-real).mean() + softplus(fake).mean()


LOSSES = {
    "saturating": Loss(_cross_entropy, lambda real, fake: -softplus(fake).mean()),
    "non-saturating": Loss(_cross_entropy, lambda real, fake: softplus(-fake).mean()),
    "relativistic": Loss(
        lambda real, fake: softplus(fake - real).mean(), lambda real, fake: softplus(real - fake).mean()
    ),
    "least-squares": Loss(
        lambda real, fake: 0.5 * ((real - 1.0).square().mean() + fake.square().mean()),
        lambda real, fake: 0.5 * (fake - 1.0).square().mean(),
    ),
    "hinge": Loss(
        lambda real, fake: relu(1.0 - real).mean() + relu(1.0 + fake).mean(), lambda real, fake: -fake.mean()
    ),
    "wgan-gp": Loss(lambda real, fake: fake.mean() - real.mean(), lambda real, fake: -fake.mean(), 0.0, 0.0, 10.0, 5),
}


def gradient_norms(critic: Critic, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""Logits of events and the squared norm of **each row's own** gradient :math:`\nabla_u T(x)`, shape ``(N,)`` both.

    The gradient is by u, the event in the critic's units. One norm of a whole batch's gradient, which some
    libraries take, would grow with the batch (Gulrajani et al. 2017, eq. 3, has a norm for each row).
    """
    u = critic.units(x).detach().requires_grad_()
    logits = critic.score(u, context)
    (gradient,) = torch.autograd.grad(logits.sum(), u, create_graph=True)
    return logits, gradient.square().sum(-1)
