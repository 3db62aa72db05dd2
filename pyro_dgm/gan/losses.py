r"""The losses of a critic's logits T and of the generator that it judges, in the notation of the papers.

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

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from pyro_dgm.gan.critic import Critic

__all__ = ["LOSSES", "Loss", "gradient_norms"]


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
