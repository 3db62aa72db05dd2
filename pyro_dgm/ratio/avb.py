r"""Adversarial variational Bayes: a bound's estimate for a posterior without a density.

.. math:: \widehat{\mathrm{ELBO}} = E_{\theta \sim q}\big[\log p(x, \theta) - \log r(\theta) - T(\theta)\big], \qquad
          T \approx \log q - \log r

T is a classifier, trained between the guide's steps. Its parameters are held constant in the guide's gradient: at the best
T, :math:`E_q \nabla_\phi T_\phi = 0` (Mescheder et al. 2017, proposition 2), which leaves the path derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyro_dgm.core.devices import seeded
from pyro_dgm.core.kinds import checked, shown
from pyro_dgm.core.pace import seconds_left, steps, took
from pyro_dgm.core.shapes import check_number
from pyro_dgm.core.warn import told_unless_finite, warn_user
from pyro_dgm.core.weights import psis
from pyro_dgm.model.log_joint import LogJoint
from pyro_dgm.model.uncovered import uncovered
from pyro_dgm.ratio.contrast import Contrast, Diagnosis, diagnosed
from pyro_dgm.ratio.guide import ImplicitGuide
from pyro_dgm.ratio.ratio import DensityRatio
from pyro_dgm.train.descend import Stages, descend, mean_loss
from pyro_dgm.train.players import Average

__all__ = ["Adversarial_ELBO"]

# Not measured one by one, but chosen by hand; docs/benchmarks/avb.md measures them together.
_DECAY = 0.99  # of the guide's average: a loss of two players cannot tell which state is best
_FIRST = 100  # critic steps before the guide's first
_LAST = 300  # critic steps after the guide's last
_FIT_REFERENCE = 2000  # draws to which the reference is fitted at the start
_LOOK = 512  # draws that modes must lie apart from to count as missed
_WEIGH = 4096  # draws by which the modes are weighed


class Adversarial_ELBO(nn.Module):
    r"""**Estimate** of minus the ELBO of an implicit posterior, in nats: no bound, it was seen on either side of the evidence.

    ``fit(Adversarial_ELBO(model, guide), data)`` takes ``critic_steps`` steps of a classifier for each step of the guide.
    At the end the guide gets the average of its last parameters, its modes are weighed anew, and a warning names modes of
    the posterior that it misses. :meth:`diagnose` then says whether the classifier can be believed. ``khat``, ``loo`` and
    ``compare`` refuse such a guide: all need a density.

    Args:
        model: a Pyro model, whose log joint is evaluated for all draws at once.
        guide: an :class:`~pyro_dgm.ImplicitGuide` of it.
        critic: a module ``(*batch, D) -> (*batch,)`` or ``(*batch, 1)``, logits of whitened latent vectors, such as
            :class:`~pyro_dgm.Critic`; None for two hidden layers of 64. The log joint is added to what it reads.
        contrast: ``"adaptive"``, a normal with q's moments, one for each mode. There is no other: against the prior, as in
            the first papers, no ratio can be learned beyond a few dimensions (measured: right at 2, off at 10 and 30).
        num_particles: draws in each step of the guide.
        critic_steps, critic_batch, critic_lr: of the classifier, which has its own Adam.

    Raises:
        TypeError: for a guide with a density, or a critic that is no module.
        ValueError: for another contrast, counts below one, latents of the model that the guide lacks.

    Note:
        With stock Pyro: after ``objective.attach(*args)``, ``SVI(model, guide, optim, Trace_ELBO(num_particles=64,
        vectorize_particles=True))`` follows the same gradient; call ``objective.critic_step(*args)`` between its steps.

    References:
        | Mescheder, Nowozin & Geiger (2017), "Adversarial variational Bayes", arXiv 1701.04722, sections 3.1, 3.3.
        | Huszar (2017), arXiv 1702.08235.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> guide = dgm.ImplicitGuide(model)
        >>> objective = dgm.Adversarial_ELBO(model, guide)
        >>> history = dgm.fit(objective, max_steps=10, progress=False, seed=0)
        >>> bool(abs(guide.draws(5000)["z"].std() - 1.0) < 0.1)
        True
    """

    settling = (
        0.5  # of a fit's seconds, for ``finish``, which takes as many steps of the classifier as 75 steps of the guide
    )
    _joint: LogJoint

    @checked(only=("model",))
    def __init__(
        self,
        model: Callable[..., Any],
        guide: ImplicitGuide,
        critic: nn.Module | None = None,
        *,
        contrast: str = "adaptive",
        num_particles: int = 256,
        critic_steps: int = 4,
        critic_batch: int = 512,
        critic_lr: float = 2e-3,
    ) -> None:
        super().__init__()
        _check_arguments(guide, critic, contrast)
        counts = {"num_particles": num_particles, "critic_steps": critic_steps, "critic_batch": critic_batch}
        for name, count in counts.items():
            check_number("Adversarial_ELBO", name, count, least=1, whole=True)
        check_number("Adversarial_ELBO", "critic_lr", critic_lr, above=0)
        self.model = model
        self.guide = guide
        self.num_particles = num_particles
        self.critic_steps = critic_steps
        self.critic_batch = critic_batch
        self.critic_lr = critic_lr
        self._critic = (critic,)
        self._is_setup = False
        self._average: Average | None = None

    def setup(self, *args: Any, **kwargs: Any) -> Adversarial_ELBO:
        """Create the guide's and the classifier's parameters; returns the objective."""
        if not self._is_setup:
            self.guide.setup(*args, **kwargs)
            self._joint = LogJoint(self.guide, self.model, args, kwargs)
            _refuse_missing(self._joint.missing)
            self._begin()
            self._is_setup = True
        self._joint.at(*args, **kwargs)
        return self

    def _begin(self) -> None:
        """A new classifier, against a reference that fits the guide as it is."""
        with torch.no_grad():
            theta, mode = self.guide.draw(_FIT_REFERENCE)
        ratio = DensityRatio(theta.shape[-1], 0, self._critic[0]).to(theta)
        self.contrast = Contrast(ratio, theta, mode, self.guide.log_weight())
        self.critic_optimizer = torch.optim.Adam(self.contrast.parameters(), self.critic_lr, betas=(0.5, 0.99))
        self._average = None

    def warm_start(self, *args: Any, **kwargs: Any) -> None:
        """Start the guide at Gaussians, one for each mode that is found; a trained guide stays as it is."""
        self.setup(*args, **kwargs)
        before = _fingerprint(self.guide)
        self.guide.warm_start(*args, **kwargs)
        if _fingerprint(self.guide) != before:
            self._begin()

    def prepare(self, batches: Iterator[tuple[Any, ...]], stages: Stages | None = None) -> None:
        """Let the classifier catch up with the guide before the first step."""

        def loss() -> Tensor:
            return self._critic_loss(*next(batches))

        (stages or Stages()).descend("classifier", self.contrast, self.critic_optimizer, loss, _FIRST)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The estimate of minus the ELBO; while gradients are recorded the classifier is trained first."""
        self.setup(*args, **kwargs)
        if torch.is_grad_enabled():
            self._averaged().update()
            self._critic_steps(self.critic_steps, *args, **kwargs)
        return told_unless_finite("Adversarial_ELBO", -self._log_weights(self.guide.draw(self.num_particles)[0]).mean())

    def critic_step(self, *args: Any, **kwargs: Any) -> float:
        """One step of the classifier; returns its loss (nats per pair)."""
        self.setup(*args, **kwargs)
        return float(self._critic_steps(1, *args, **kwargs)[0])

    @torch.enable_grad()
    def _critic_steps(self, steps: int, *args: Any, **kwargs: Any) -> list[Tensor]:
        return descend(self.critic_optimizer, lambda: self._critic_loss(*args, **kwargs), steps)

    def _critic_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The classifier's loss on fresh draws, which the reference follows."""
        self.setup(*args, **kwargs)
        with torch.no_grad():
            theta, mode = self.guide.draw(self.critic_batch)
        self.contrast.follow(theta, mode, self.guide.log_weight())
        return self.contrast.loss(theta, self._joint)

    def attach(self, *args: Any, **kwargs: Any) -> Adversarial_ELBO:
        """Let the guide's ``log_prob`` be this estimate, for stock ``SVI`` with ``Trace_ELBO``; returns the objective."""
        self.setup(*args, **kwargs)
        self.guide.score_by(lambda theta: self._log_q(theta.reshape(-1, theta.shape[-1])).reshape(theta.shape[:-1]))
        return self

    def estimate(self, *args: Any, num_samples: int = 10_000, **kwargs: Any) -> tuple[float, float]:
        """The estimate of the ELBO with the present classifier, and the draws' standard error (not the classifier's)."""
        self.setup(*args, **kwargs)
        with torch.no_grad():
            log_w = self._log_weights(self.guide.draw(num_samples)[0]).double()
        return float(log_w.mean()), float(log_w.std()) / math.sqrt(num_samples)

    def diagnose(self, *args: Any, num_samples: int = 10_000, seed: int | None = None, **kwargs: Any) -> Diagnosis:
        """Fit a fresh classifier to the guide as it is, and say whether either can be believed."""
        self.setup(*args, **kwargs)
        with seeded(seed):
            with torch.no_grad():
                theta = self.guide.draw(num_samples)[0]
            return diagnosed(self.contrast, self._joint, theta, len(self.missed(*args, **kwargs)))

    def missed(self, *args: Any, **kwargs: Any) -> list[dict[str, Tensor]]:
        """Modes of the posterior that climbing from prior draws finds and the guide's draws do not reach, as site values."""
        self.setup(*args, **kwargs)
        joint = LogJoint(self.guide, self.model, args, kwargs, whole=True)
        if not joint.vectorized:
            return []
        with torch.no_grad():
            u = self.guide.draw(_LOOK)[0]
        return [joint.constrain(end[None])[0] for end in uncovered(joint, u, lambda x: x, joint)]

    def finish(self, *args: Any, **kwargs: Any) -> None:
        """Give the guide its averaged parameters, weigh its modes anew, and warn of modes that it misses."""
        self._averaged().give()
        self._last_steps(*args, **kwargs)
        if len(self.guide.log_weight()) > 1:
            self._weigh()
        if not seconds_left():
            warn_user(
                "Adversarial_ELBO: no seconds were left to look for missed modes: call missed(), or give the fit more."
            )
            return
        lost = self.missed(*args, **kwargs)
        if lost:
            warn_user(_lost(lost))

    @torch.enable_grad()
    def _last_steps(self, *args: Any, **kwargs: Any) -> None:
        """Steps of the classifier against the guide as it stays, in half of the seconds that are left."""
        losses: list[Tensor] = []
        for _ in steps("last classifier", _LAST, 0.5):
            losses += descend(self.critic_optimizer, lambda: self._critic_loss(*args, **kwargs), 1)
        took(("last classifier", len(losses), mean_loss(losses[:50]), mean_loss(losses[-50:])))

    def _log_q(self, theta: Tensor) -> Tensor:
        return self.contrast.log_q(theta, self._joint(theta))

    def _log_weights(self, theta: Tensor) -> Tensor:
        log_joint = self._joint(theta)
        return log_joint - self.contrast.log_q(theta, log_joint)

    @torch.no_grad()
    def _weigh(self) -> None:
        """Set the modes' probabilities to their shares of the smoothed importance weights, which are estimates."""
        theta, mode = self.guide.draw(_WEIGH)
        share = torch.as_tensor(psis(self._log_weights(theta).cpu().numpy())[0]).exp().to(theta)
        total = torch.stack([share[mode == k].sum() for k in range(len(self.guide.log_weight()))])
        if total.isfinite().all():
            self.guide.weigh(total.clamp_min(1e-6).log().log_softmax(0))

    def _averaged(self) -> Average:
        """The running average of the guide, which begins at the first step."""
        if self._average is None:
            self._average = Average(list(self.guide.parameters()), _DECAY, begins_well=True)
        return self._average

    def get_extra_state(self) -> dict[str, Any]:
        """What resuming needs besides tensors: the classifier's optimiser, and the averages."""
        if not self._is_setup:
            return {}
        return {
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "average": self._average and self._average.state(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it back, once :meth:`setup` has been called."""
        if state and self._is_setup:
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
            if state["average"]:
                self._averaged().restore(state["average"])


def _fingerprint(guide: ImplicitGuide) -> tuple[int, float]:
    """Changes when a warm start has changed the guide's buffers."""
    return len(guide.log_weight()), sum(float(b.double().sum()) for b in guide.buffers())


def _check_arguments(guide: object, critic: object, contrast: str) -> None:
    if not isinstance(guide, ImplicitGuide):
        raise TypeError(
            f"Adversarial_ELBO: the guide is {type(guide).__name__}, expected an ImplicitGuide. A guide with a density needs "
            "no classifier: train it with STL_ELBO or pyro.infer.Trace_ELBO."
        )
    if critic is not None and not isinstance(critic, nn.Module):
        raise TypeError(
            f"Adversarial_ELBO: critic is {critic!r}, expected a module from (*batch, D) to one logit, or None."
        )
    if not isinstance(contrast, str) or contrast != "adaptive":
        raise ValueError(
            f"Adversarial_ELBO: contrast={shown(contrast)}, expected 'adaptive'. Leave it out: against the prior no ratio can be "
            "learned beyond a few dimensions."
        )


def _refuse_missing(names: list[str]) -> None:
    if names:
        raise ValueError(
            f"Adversarial_ELBO: latent site '{names[0]}' of the model is missing from the guide. Build the guide of the same "
            "model; a discrete site can be summed out: infer={'enumerate': 'parallel'}."
        )


def _lost(modes: list[dict[str, Tensor]]) -> str:
    where = "; ".join(
        ", ".join(f"{k} = {[round(x, 3) for x in v.reshape(-1)[:3].tolist()]}" for k, v in list(mode.items())[:3])
        for mode in modes
    )
    return (
        f"Adversarial_ELBO: the ImplicitGuide misses {len(modes)} mode(s) of the posterior that climbing from prior draws "
        f"found, near {where}. Its draws and its estimate of the ELBO are of the other modes alone. Fit it anew from another "
        "seed, or use AutoFlow."
    )
