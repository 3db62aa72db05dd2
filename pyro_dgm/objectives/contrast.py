r"""Against what an implicit posterior is held to learn its density: :math:`\log q(\theta) \approx \log r(\theta) + T(\theta)`.

The ratio T is a classifier of draws of q against draws of a reference r, whose density is known. The nearer r is to q, the
less is left to learn: with the prior as r it fails between 2 and 10 dimensions, with q's own moments it does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from pyro_dgm.core import frozen
from pyro_dgm.core.log_joint import LogJoint, prior_draws
from pyro_dgm.core.ratio import DensityRatio, logistic_loss

__all__ = ["AdaptiveContrast", "Contrast", "PriorContrast"]


class Contrast(nn.Module):
    """Abstract: an estimate of log q over latent vectors, ``(*batch, D) -> (*batch,)``, in nats."""

    ratio: DensityRatio

    def reference(self) -> Any:
        """The reference r: it has ``sample((n,))`` and ``log_prob``."""
        raise NotImplementedError

    def whiten(self, theta: Tensor) -> Tensor:
        """Latent vectors in the units of the reference, which the critic reads."""
        raise NotImplementedError

    def follow(self, theta: Tensor, mode: Tensor, log_weight: Tensor, share: float) -> None:
        """Let the reference follow draws of q."""

    def forward(self, theta: Tensor) -> Tensor:
        """The estimate, with gradients to theta alone."""
        with frozen(*self.parameters()):
            return self.reference().log_prob(theta) + self.log_ratio(theta)

    def log_ratio(self, theta):
        if getattr(self, "joint", None) is None:
            return self.ratio(self.whiten(theta))
        f = self.joint(theta) - self.reference().log_prob(theta)
        f = f - self.mid
        f = 30.0 * torch.tanh(f / 30.0)
        return self.slope * f + self.ratio(self.whiten(theta))

    def loss(self, theta: Tensor) -> Tensor:
        """The classifier's loss on draws of q and as many of r."""
        other = self.reference().sample((len(theta),))
        if getattr(self, "joint", None) is not None:
            with torch.no_grad():
                f = (self.joint(theta) - self.reference().log_prob(theta)).median()
                self.mid = f if self.mid is None else self.mid.lerp(f, 0.02)
        return logistic_loss(self.log_ratio(theta), self.log_ratio(other))


class AdaptiveContrast(Contrast):
    r"""r is normal with q's running mean and covariance (a mixture of such, one for each of q's modes)."""

    loc: Tensor
    scale_tril: Tensor
    log_weight: Tensor

    def __init__(self, ratio: DensityRatio, loc: Tensor, scale_tril: Tensor, log_weight: Tensor) -> None:
        super().__init__()
        self.ratio = ratio
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale_tril", scale_tril.clone())
        self.register_buffer("log_weight", log_weight.clone())

    def reference(self) -> Any:
        normal = MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)
        if len(self.loc) == 1:
            return MultivariateNormal(self.loc[0], scale_tril=self.scale_tril[0], validate_args=False)
        return MixtureSameFamily(Categorical(logits=self.log_weight), normal, validate_args=False)

    def whiten(self, theta: Tensor) -> Tensor:
        loc, scale_tril = self._overall()
        rows = (theta - loc).reshape(-1, len(loc))
        return torch.linalg.solve_triangular(scale_tril, rows.mT, upper=False).mT.reshape(theta.shape)

    def _overall(self) -> tuple[Tensor, Tensor]:
        if len(self.loc) == 1:
            return self.loc[0], self.scale_tril[0]
        weight = self.log_weight.exp()[:, None]
        loc = (weight * self.loc).sum(0)
        off = self.loc - loc
        covariance = (weight[..., None] * (self.scale_tril @ self.scale_tril.mT + off[:, :, None] * off[:, None])).sum(0)
        return loc, torch.linalg.cholesky(covariance)

    @torch.no_grad()
    def follow(self, theta: Tensor, mode: Tensor, log_weight: Tensor, share: float) -> None:
        """Move the moments of every mode by ``share`` towards those of its draws."""
        self.log_weight.copy_(log_weight)
        for k in range(len(self.loc)):
            rows = theta[mode == k] if len(self.loc) > 1 else theta
            if len(rows) < 2 * theta.shape[-1] + 2:
                continue
            old, centre = self.loc[k].clone(), rows.mean(0)
            covariance = self.scale_tril[k] @ self.scale_tril[k].mT
            self.loc[k] += share * (centre - old)
            off = (centre - old)[:, None]
            covariance = (1 - share) * covariance + share * rows.T.cov(correction=0) + share * (1 - share) * off @ off.T
            root, fault = torch.linalg.cholesky_ex(covariance)
            if not fault:
                self.scale_tril[k] = root


class PriorContrast(Contrast):
    """r is the model's prior: the classifier of the first papers, which few dimensions defeat."""

    loc: Tensor
    scale: Tensor

    def __init__(self, ratio: DensityRatio, prior: LogJoint) -> None:
        super().__init__()
        self.ratio, self._prior = ratio, (prior,)
        draws = prior_draws(prior, 1000)
        self.register_buffer("loc", draws.median(0).values)
        self.register_buffer("scale", (draws.quantile(0.84, 0) - draws.quantile(0.16, 0)).div(2).clamp_min(1e-6))

    def reference(self) -> Any:
        return _Prior(self._prior[0])

    def whiten(self, theta: Tensor) -> Tensor:
        return (theta - self.loc) / self.scale


class _Prior:
    """A model's prior over the latent vector."""

    def __init__(self, log_joint: LogJoint) -> None:
        self.log_joint = log_joint

    def sample(self, shape: tuple[int]) -> Tensor:
        return prior_draws(self.log_joint, shape[0])

    def log_prob(self, theta: Tensor) -> Tensor:
        return self.log_joint(theta.reshape(-1, theta.shape[-1])).reshape(theta.shape[:-1])
