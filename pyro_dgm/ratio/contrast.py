r"""An implicit posterior's density, learned against a reference, and whether what was learned can be believed.

.. math:: \log q(\theta) \approx \log r(\theta) + T(\theta), \qquad
          T(\theta) = s\, h\big(\log p(x, \theta) - \log r(\theta)\big) + t_\psi(\theta)

T is a classifier of draws of q against draws of a reference r, whose density is known. The nearer r is to q, the less is
left to learn. The classifier reads the model's density beside the network t: where q is the posterior, :math:`s = 1` and a
constant t are exact. (h is the identity up to some 30 nats, and bounded.)

For the diagnosis a fresh classifier is fitted, and both are checked against the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, MixtureSameFamily, MultivariateNormal

from pyro_dgm.core import frozen
from pyro_dgm.core.saved import resize_to_saved
from pyro_dgm.core.weights import log_mean_exp
from pyro_dgm.ratio.ratio import DensityRatio, RatioCheck, calibration, learn_ratio, logistic_loss

__all__ = ["Contrast", "Diagnosis", "diagnosed"]

# Not measured one by one, but chosen by hand; docs/benchmarks/avb.md measures them together.
_BOUND = 30.0  # nats, of what the classifier reads of the model's density
_FOLLOW = 0.05  # share by which the reference follows q at each critic step
_FOLLOW_MIDDLE = 0.02  # the same for the centre of what the classifier reads
# Of a diagnosis: what is too much. Not measured; chosen by hand.
_NATS_APART = 0.1  # beside four standard errors
_C2ST_TOO_HIGH = 0.95

Density = Callable[[Tensor], Tensor]


class Contrast(nn.Module):
    r"""An estimate of log q over latent vectors, in nats: the reference r, and the classifier of q against it.

    r is normal with q's running mean and covariance (a mixture of such, one for each of q's modes).

    Args:
        ratio: the network t, over latent vectors whitened by r.
        theta, mode: draws of q ``(N, D)``, and the modes that they belong to ``(N,)``: r fits them at the start.
        log_weight: log probabilities of the modes.
    """

    middle: Tensor
    loc: Tensor
    scale_tril: Tensor
    log_weight: Tensor

    def __init__(self, ratio: DensityRatio, theta: Tensor, mode: Tensor, log_weight: Tensor) -> None:
        super().__init__()
        count = len(log_weight)
        size = theta.shape[-1]
        self.ratio = ratio
        self.slope = nn.Parameter(torch.zeros_like(ratio.calibrated[0]))
        self.register_buffer("middle", torch.full_like(self.slope, torch.nan).detach())
        self.register_buffer("loc", theta.new_zeros(count, size))
        self.register_buffer("scale_tril", torch.eye(size).to(theta).repeat(count, 1, 1))
        self.register_buffer("log_weight", log_weight.clone())
        self.follow(theta, mode, log_weight, 1.0)

    def reference(self) -> Distribution:
        """The reference r."""
        if len(self.loc) == 1:
            return MultivariateNormal(self.loc[0], scale_tril=self.scale_tril[0], validate_args=False)
        normals = MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)
        choice = Categorical(logits=self.log_weight, validate_args=False)
        return MixtureSameFamily(choice, normals, validate_args=False)

    def whiten(self, theta: Tensor) -> Tensor:
        """Latent vectors in the units of the reference, which the network reads."""
        loc, scale_tril = self._overall()
        return torch.linalg.solve_triangular(scale_tril, (theta - loc).mT, upper=False).mT

    def _overall(self) -> tuple[Tensor, Tensor]:
        """Mean and root of the covariance of the whole mixture."""
        if len(self.loc) == 1:
            return self.loc[0], self.scale_tril[0]
        weight = self.log_weight.exp()[:, None]
        loc = (weight * self.loc).sum(0)
        off = self.loc - loc
        each = self.scale_tril @ self.scale_tril.mT + off[:, :, None] * off[:, None]
        return loc, torch.linalg.cholesky((weight[..., None] * each).sum(0))

    @torch.no_grad()
    def follow(self, theta: Tensor, mode: Tensor, log_weight: Tensor, share: float = _FOLLOW) -> None:
        """Move the moments of every mode by ``share`` towards those of its draws."""
        self.log_weight.copy_(log_weight)
        for k in range(len(self.loc)):
            rows = theta[mode == k]
            if len(rows) < 2 * theta.shape[-1] + 2 or not rows.isfinite().all():
                continue
            step = rows.mean(0) - self.loc[k]
            old = self.scale_tril[k] @ self.scale_tril[k].mT
            new = rows.T.cov().reshape(old.shape) + (1 - share) * step[:, None] * step
            root, fault = torch.linalg.cholesky_ex((1 - share) * old + share * new)
            self.loc[k] += share * step
            if not fault:
                self.scale_tril[k] = root

    def log_q(self, theta: Tensor, log_joint: Tensor) -> Tensor:
        """The estimate at ``(N, D)``, with gradients to theta alone."""
        with frozen(*self.parameters()):
            log_r = self.reference().log_prob(theta)
            return log_r + self.log_ratio(theta, log_joint - log_r)

    def log_ratio(self, theta: Tensor, excess: Tensor) -> Tensor:
        """T; ``excess`` is the log joint minus the reference's log density."""
        return self.slope * self.read(excess) + self.ratio(self.whiten(theta))

    def read(self, excess: Tensor) -> Tensor:
        """What the classifier reads of the model's density: centred, and bounded."""
        middle = self.middle.nan_to_num(0.0)
        return _BOUND * torch.tanh((excess - middle) / _BOUND)

    def loss(self, theta: Tensor, log_joint: Density) -> Tensor:
        """The classifier's loss on draws of q and as many of r."""
        excess, other, of_other = self.pairs(theta, log_joint)
        middle = excess[excess.isfinite()].median() if excess.isfinite().any() else self.middle
        self.middle.copy_(torch.where(self.middle.isnan(), middle, self.middle.lerp(middle, _FOLLOW_MIDDLE)))
        return logistic_loss(self.log_ratio(theta, excess), self.log_ratio(other, of_other))

    @torch.no_grad()
    def pairs(self, theta: Tensor, log_joint: Density) -> tuple[Tensor, Tensor, Tensor]:
        """The excess at draws of q; as many draws of r, and theirs."""
        r = self.reference()
        other = r.sample((len(theta),))
        both = torch.cat([theta, other])
        excess, of_other = (log_joint(both) - r.log_prob(both)).to(both).chunk(2)
        return excess, other, of_other

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        resize_to_saved(self, ("loc", "scale_tril", "log_weight"), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


@dataclass(frozen=True)
class Diagnosis:
    r"""What a fresh classifier says of an implicit posterior q against its reference r. All numbers are **estimates**.

    Attributes:
        elbo, elbo_error: the ELBO by the classifier of the training, and the draws' standard error, in nats.
        fresh_elbo, fresh_error: the same by a fresh one, on draws that it has not seen.
        gap, gap_error: :math:`\log \frac1S \sum w - \frac1S \sum \log w` by the fresh one: an estimate of KL(q || p).
        trained: calibration of the training's classifier on draws of r.
        fresh: that of the fresh one.
        c2st, c2st_error: accuracy of the fresh classifier in telling q from r: how far the reference is from q.
        other_modes: modes of the posterior that were found and that q does not reach.
    """

    elbo: float
    elbo_error: float
    fresh_elbo: float
    fresh_error: float
    gap: float
    gap_error: float
    trained: RatioCheck
    fresh: RatioCheck
    c2st: float
    c2st_error: float
    other_modes: int

    @property
    def faults(self) -> list[str]:
        """What speaks against believing it; empty where nothing does."""
        found = [f"training's classifier: {self.trained.fault}"] if self.trained.fault else []
        found += [f"fresh classifier: {self.fresh.fault}"] if self.fresh.fault else []
        apart = abs(self.elbo - self.fresh_elbo)
        if not apart < _NATS_APART + 4.0 * math.hypot(self.elbo_error, self.fresh_error):
            found.append(f"the two classifiers differ by {apart:.2g} nats in the ELBO")
        if self.other_modes:
            found.append(f"{self.other_modes} mode(s) of the posterior were found that it does not reach")
        if self.c2st > _C2ST_TOO_HIGH:
            found.append(f"q and its reference are told apart with accuracy {self.c2st:.2f}: no ratio can be learned")
        if self.gap > _NATS_APART + 4.0 * self.gap_error:
            found.append(f"q is some {self.gap:.2g} nats from the posterior")
        return found

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against it. That is no proof: a density would be."""
        return not self.faults

    def __str__(self) -> str:
        return "\n".join([
            "estimates by a learned ratio, no bounds (nats):",
            f"  ELBO, the training's classifier   {self.elbo:.3f} +- {self.elbo_error:.3f}",
            f"  ELBO, a fresh classifier          {self.fresh_elbo:.3f} +- {self.fresh_error:.3f}",
            f"  KL(q || p), a fresh classifier    {self.gap:.3f} +- {self.gap_error:.3f}",
            f"  training's classifier             {self.trained}",
            f"  fresh classifier                  {self.fresh}",
            f"  C2ST of q against the reference   {self.c2st:.3f} +- {self.c2st_error:.3f} (0.5: the same)",
            f"  modes found that q does not reach {self.other_modes}",
            "verdict: nothing speaks against it" if self.ok else "verdict: do not believe it. " + "; ".join(self.faults),
        ])  # fmt: skip

    __repr__ = __str__


def diagnosed(contrast: Contrast, log_joint: Density, theta: Tensor, other_modes: int) -> Diagnosis:
    """The diagnosis from fresh draws of q: half of them train the new classifier, the others are scored."""
    excess, other, of_other = contrast.pairs(theta, log_joint)
    q = torch.cat([contrast.whiten(theta), contrast.read(excess)[:, None]], -1)
    r = torch.cat([contrast.whiten(other), contrast.read(of_other)[:, None]], -1)
    half = len(theta) // 2
    ratio, _ = learn_ratio(q[:half], r[:half], max_steps=1000)
    with torch.no_grad():
        trained = calibration(contrast.log_ratio(other, of_other))
        of_q = ratio(q[half:])
        of_r = ratio(r[half:])
        old = (excess - contrast.log_ratio(theta, excess)).double()
        new = (excess[half:] - of_q).double()
    right = torch.cat([of_q > 0, of_r <= 0]).double()
    gap, gap_error = _gap(new)
    return Diagnosis(*_mean(old), *_mean(new), gap, gap_error, trained, calibration(of_r), *_mean(right), other_modes)


def _mean(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def _gap(log_w: Tensor) -> tuple[float, float]:
    """Log of the mean weight minus the mean log weight, and its standard error by the delta method."""
    log_of_mean = log_mean_exp(log_w)[0]
    terms = (log_w - log_of_mean).exp() - log_w
    return float(log_of_mean - log_w.mean()), float(terms.std()) / math.sqrt(len(log_w))
