r"""Adversarial variational Bayes: a bound's estimate for a posterior without a density.

.. math:: \widehat{\mathrm{ELBO}} = E_{\theta \sim q}\big[\log p(x, \theta) - \log r(\theta) - T(\theta)\big], \qquad
          T \approx \log q - \log r

T is a classifier, trained between the guide's steps. Its parameters are held constant in the guide's gradient: at the best
T, :math:`E_q \nabla_\phi T_\phi = 0` (Mescheder et al. 2017, proposition 2), which is the path derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_dgm.core.log_joint import LogJoint
from pyro_dgm.core.ratio import DensityRatio
from pyro_dgm.objectives.contrast import AdaptiveContrast, Contrast, PriorContrast

__all__ = ["Adversarial_ELBO"]


class Adversarial_ELBO(nn.Module):
    def __init__(
        self,
        model: Any,
        guide: Any,
        critic: nn.Module | None = None,
        *,
        contrast: str = "adaptive",
        num_particles: int = 256,
        critic_steps: int = 4,
        critic_batch: int = 512,
        critic_lr: float = 2e-3,
        informed: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.guide = model, guide
        self.kind, self.num_particles = contrast, num_particles
        self.critic_steps, self.critic_batch, self.critic_lr = critic_steps, critic_batch, critic_lr
        self._critic = (critic,)
        self._joint = None
        self.informed = informed

    def setup(self, *args: Any, **kwargs: Any):
        guide = self.guide.setup(*args, **kwargs)
        self._joint = LogJoint(guide, self.model, args, kwargs)
        ratio = DensityRatio(guide.latent_dim, 0, self._critic[0])
        push = guide._push
        if self.kind == "adaptive":
            self.contrast = AdaptiveContrast(ratio, push.loc, push.scale_tril, push.log_weight)
        else:
            prior = poutine.block(self.model, hide_fn=lambda msg: msg["type"] == "sample" and msg["is_observed"])
            self.contrast = PriorContrast(ratio, LogJoint(guide, prior, args, kwargs))
        self.contrast.joint, self.contrast.mid = (self._joint, None) if self.informed else (None, None)
        self.contrast.slope = nn.Parameter(torch.zeros(()))
        self.optimizer = torch.optim.Adam(self.contrast.parameters(), self.critic_lr, betas=(0.5, 0.99))
        return self

    def warm_start(self, *args, **kwargs):
        self.guide.warm_start(*args, **kwargs)
        self.setup(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._joint is None:
            self.setup(*args, **kwargs)
        if torch.is_grad_enabled():
            self.average()
            for _ in range(self.critic_steps):
                self.critic_step()
        if self.informed and self.contrast.mid is None:
            self.contrast.mid = torch.zeros(())
        theta = self.guide.get_posterior(*args, **kwargs).rsample((self.num_particles,))
        return (self.contrast(theta) - self._joint.at(*args, **kwargs)(theta)).mean()

    def critic_step(self):
        push = self.guide._push
        with torch.no_grad():
            noise = torch.randn(self.critic_batch, push.noise_features)
            theta = push(noise)
        self.contrast.follow(theta, push.mode(noise), push.log_weight, 0.05)
        loss = self.contrast.loss(theta)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def average(self):
        ps = list(self.guide._push.parameters())
        if not hasattr(self, "ema"):
            self.ema = [p.detach().clone() for p in ps]
        for e, p in zip(self.ema, ps):
            e.lerp_(p, 0.01)

    @torch.no_grad()
    def settle(self, *args):
        for e, p in zip(self.ema, self.guide._push.parameters()):
            p.copy_(e)
