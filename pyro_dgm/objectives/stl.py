r"""The sticking-the-landing bound.

.. math:: \nabla_\phi \mathrm{ELBO} = E_{z}\big[\nabla_\theta(\log p(x, \theta) - \log q_{\bar\phi}(\theta))\,
          \partial_\phi \theta_\phi(z)\big]

with :math:`\bar\phi` held constant: the score term, of mean zero, is left out, so the gradient's variance vanishes where
:math:`q` is the posterior (Roeder, Wu & Duvenaud 2017, arXiv 1703.09194). Where a site's score has another mean it stays:
the rule, and its derivation, are in :mod:`pyro_dgm.objectives.path_gradient`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.infer.elbo import ELBOModule
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor

from pyro_dgm.core import LearnedDistribution, frozen
from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.module import tensors_of, whole_event
from pyro_dgm.core.record import Recordable, Records, with_gradients
from pyro_dgm.core.warn import plain_errors, told_unless_finite
from pyro_dgm.core.weights import psis
from pyro_dgm.model.hmc import deviation, near_in_each
from pyro_dgm.model.log_joint import LogJoint, PulledBack
from pyro_dgm.objectives.agreement import Pair
from pyro_dgm.objectives.particles import ParticleELBO
from pyro_dgm.train.hooks import Recipe

__all__ = ["STL_ELBO"]

_AVERAGING = 0.98

# When a guide is right, by weights. Ten of 17 reference posteriors then take no step: a Gaussian that is best by the reverse KL
# has the right means and standard deviations to the first order of a skewness.
_DRAWS = 1024
_AT_ONCE = 512
_KL = 0.04  # nats, of a start: the flow's first step would cost more than it brings
_KL_TRAINED = 0.01  # nats; of steps that are taken anyway. With .015 one seed of three of garch11 has a k-hat of .8
_KL_ALONE = 0.01  # nats, where means and standard deviations are not looked at
_K = 0.5  # its error is .1 to .2 at 1,024 draws, and .7 is the limit
_MEAN = 0.03  # sd
_SD = 0.04  # log sd

# When chains are asked, which cost some hundred steps: of so many latents, at first and at doubling numbers of steps.
_MANY = 50
_FIRST_ASKED = 256  # steps. Not measured; chosen by hand
_STAYS = 0.08  # sd and log sd: four fifths of what the verdict asks of other chains


@runtime_checkable
class Integrating(Protocol):
    """A guide that can integrate some latents out."""

    def integrated(self, log_joint: LogJoint, num_particles: int) -> tuple[Tensor, Tensor] | None:
        """Log weights of at most so many draws of the others, with path gradients, and the draws; None where none is."""


class STL_ELBO(ParticleELBO):
    """Evidence lower bound with path gradients and vectorised particles, as a loss in nats (minus the bound).

    ``SVI(model, guide, optim, loss=STL_ELBO())`` and ``STL_ELBO()(model, guide)`` both work, and it takes the place of
    ``pyro.infer.Trace_ELBO`` for guides with reparameterised draws. The value is an unbiased estimate of minus the ELBO;
    its gradient is unbiased. Discrete sites of the model that are marked ``infer={"enumerate": "parallel"}`` are summed
    out. Its first call checks that many draws at once give what single runs give; where they do not, ``torch.vmap`` is
    tried, and where that fails too, 16 particles run one by one, and a warning says why.

    The score is left out of the gradient where its mean is zero. A guide site whose density is a ``Delta``'s
    ``log_density`` or a ``pyro.factor``, whose support moves with parameters, or whose transform inverts its own draws
    only, keeps the plain gradient of ``Trace_ELBO``; where parameters enter such a density, a warning names the site.

    Args:
        num_particles: draws of the guide per step.
        vectorize_particles: run all particles at once, in an outer plate; False runs them one by one, unchecked.
        max_plate_nesting: plate depth of the model; found by one run where it is not given.
        retain_graph: whether ``loss_and_grads`` keeps the graph for another backward pass.
        max_iarange_nesting, strict_enumeration_warning, ignore_jit_warnings, jit_options, tail_adaptive_beta: as in
            ``Trace_ELBO``, which stores them for its subclasses and for compilation.

    Raises:
        ValueError: for a guide site that is not reparameterised (a discrete one, say), and for a latent of the model
            that the guide lacks.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> guide = dgm.AutoFlow(model, init_loc_fn=pyro.infer.autoguide.init_to_mean, init_scale=1.0)
        >>> bool(dgm.STL_ELBO()(model, guide)().abs() < 1e-5)   # q = p: the bound is 0, without noise
        True
    """

    fewest_alone = 16
    unpathed = "is not reparameterised, so it has no path gradient."
    without_path = "Enumerate it in the model, or use pyro.infer.Trace_ELBO or TraceEnum_ELBO."
    plain_instead = "Such a site keeps the plain gradient, as in Trace_ELBO."

    _joint: LogJoint | None = None

    def _forget(self) -> None:
        super()._forget()
        self._joint = None

    @checked()
    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> ELBOModule:
        return _STLModule(model, guide, self)

    @plain_errors()
    def log_weights(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        r""":math:`\log p(x, \theta) - \log q(\theta)` of every particle, shape ``(num_particles,)``, with path gradients."""
        pair = Pair.of(model, guide, args, kwargs)
        self._meet(pair)
        q = _learned_posterior(pair) if self.vectorize_particles else None
        if q is not None:
            return self._vector_log_weights(q, pair)
        rows = [self._log_weights_of(pair, drawn) for drawn in self._draw(pair)]
        return torch.cat(rows).expand(self.num_particles)

    def _choose(self, pair: Pair, once: poutine.Trace, model_once: poutine.Trace) -> None:
        if _learned_posterior(pair) is not None:  # the log joint finds out by itself how it runs
            self._how = "plate"
        else:
            super()._choose(pair, once, model_once)

    def _log_weights_of(self, pair: Pair, drawn: poutine.Trace) -> Tensor:
        """Of the draws of one trace of the guide."""
        guide_trace = self._path.scored(pair.guide, self._run(pair.guide), drawn, pair.args, pair.kwargs)
        if self._how == "vmap":
            p = self._mapped_terms(pair, drawn, ())[0][0]
        else:
            p = self._terms(self._model_traces(pair, [drawn]), ())[0]
        return p - self._terms([guide_trace], ())[0].to(p.device)

    def _vector_log_weights(self, q: LearnedDistribution, pair: Pair) -> Tensor:
        """The shortest way, for a guide that is one learned distribution over all latents: no trace of the guide."""
        joint = self._joint_at(pair)
        integrated = pair.guide.integrated(joint, self.num_particles) if isinstance(pair.guide, Integrating) else None
        if integrated is not None:
            return integrated[0].to(integrated[1].dtype)  # it was summed in float64
        latent = q.rsample((self.num_particles if joint.vectorized else min(self.num_particles, self.fewest_alone),))
        return joint(latent) - q.detach().log_prob(latent)

    def _joint_at(self, pair: Pair) -> LogJoint:
        """The log joint of the pair, of its data."""
        if self._joint is None:
            self._joint = LogJoint(pair.guide, pair.model, pair.args, pair.kwargs)
        return self._joint.at(*pair.args, **pair.kwargs)

    def looked_at(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor] | None:
        """Log weights of fresh draws, and the draws; None where the guide has no vector of all latents, or draws run alone."""
        pair = Pair.of(model, guide, args, kwargs)
        self._meet(pair)
        q = _learned_posterior(pair) if self.vectorize_particles else None
        if q is None:
            return None
        joint = self._joint_at(pair)
        if not joint.vectorized:
            return None
        integrated = pair.guide.integrated(joint, _DRAWS) if isinstance(pair.guide, Integrating) else None
        if integrated is not None:
            return integrated
        latent = q.sample((_DRAWS,))
        log_p = torch.cat([joint(some) for some in latent.split(_AT_ONCE)])
        return log_p - q.log_prob(latent), latent

    def stays(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> bool:
        """Whether chains stay where the guide is."""
        pair = Pair.of(model, guide, args, kwargs)
        with frozen(*guide.parameters()):
            try:
                transform = whole_event(guide.get_transform(*pair.args, **pair.kwargs), 1)
            except NotImplementedError:  # a mixture
                return False
            posterior = guide.get_posterior(*pair.args, **pair.kwargs)
            return deviation(PulledBack(self._joint_at(pair), transform), posterior) < _STAYS

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        return told_unless_finite("STL_ELBO", -self.log_weights(model, guide, *args, **kwargs).mean())


def _learned_posterior(pair: Pair) -> LearnedDistribution | None:
    """The distribution over all latents, of a guide that is one learned distribution."""
    q = pair.guide.get_posterior(*pair.args, **pair.kwargs) if isinstance(pair.guide, AutoContinuous) else None
    return q if isinstance(q, LearnedDistribution) else None


class _STLModule(ELBOModule):
    """The bound as a module that can tell when its guide is right, and that replays its steps where it can."""

    def __init__(self, model: Any, guide: Any, elbo: STL_ELBO) -> None:
        super().__init__(model, guide, elbo)
        self._recent: deque[Tensor] = deque(maxlen=50)
        self._records = Records()
        self._steps = self._due = 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        found = self._replayed(args, kwargs) if torch.is_grad_enabled() and not am_i_wrapped() else None
        loss, log_weights = self._loss(args, kwargs) if found is None else found
        if loss.requires_grad:  # a step
            self._recent.append(log_weights)
            self._steps += 1
        return told_unless_finite("STL_ELBO", loss)

    def _loss(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        log_weights = self.elbo.log_weights(self.model, self.guide, *args, **kwargs)
        return -log_weights.mean(), log_weights.detach()

    def _replayed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """The same, with gradients that were found on the way: of a guide that is one distribution, and a recorded model."""
        joint = self.elbo._joint
        reads = joint.at(*args, **kwargs).reads() if joint is not None and joint.recorded else None
        if joint is None or reads is None:
            return None
        learned = tuple(p for p in dict.fromkeys(tensors_of(self, buffers=False)) if p.requires_grad)

        def derived() -> tuple[Tensor | None, ...]:
            loss, log_weights = self._loss(args, kwargs)
            return loss.detach(), log_weights, *torch.autograd.grad(loss, learned, allow_unused=True)

        same = (joint, self.elbo.num_particles, *vars(self.guide).values(), *pyro.get_param_store()._params.values())
        reads = (*reads, *self.guide.children())
        found: Any = self._records.replay(Recordable(derived, reads, same, learned, draws=True))
        return found and (with_gradients(found[0], found[2:], list(learned)), found[1])

    def recipe(self, rows: int | None) -> Recipe:
        """The running average of the weights is what counts: it is right in half of the steps. Called when a fit begins."""
        self._recent.clear()
        self._steps = self._due = 0
        return Recipe(averaging=_AVERAGING)

    def converged(self, *args: Any, **kwargs: Any) -> bool:
        r"""Whether nothing that a user sees would change, by the weights of fresh draws, or of those of the last 50 steps.

        :math:`\mathrm{KL}(q\|p) \approx \frac12 \mathrm{Var}\log w` and Pareto k are small, and so is what the weights
        change of a mean or a standard deviation: a KL of .01 alone allows a mean that is .14 sd off.
        """
        if self._model_learns():  # a guide that is right for the model's first parameters says nothing of them
            return False
        with torch.no_grad(), fork_rng(), pyro.validation_enabled(False):
            seen = self.elbo.looked_at(self.model, self.guide, *args, **kwargs)
        if seen is not None:
            log_weights, draws = (x.double().cpu().numpy() for x in seen)
            near = _near(log_weights, _KL_TRAINED if self._recent else _KL)
            if near and _agree(np.exp(psis(log_weights)[0]), draws):
                return True
            whole = draws.shape[-1] == self.guide.latent_dim  # otherwise some latents were integrated out
            return whole and self._stays(seen[0], args, kwargs)
        return len(self._recent) == 50 and _near(torch.cat(list(self._recent)).double().cpu().numpy(), _KL_ALONE)

    def _stays(self, log_weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether many latents are right by chains, where the weights of all together are of no use."""
        size = self.guide.latent_dim
        if size <= _MANY or self._steps < self._due or not near_in_each(log_weights, size):
            return False
        self._due = max(_FIRST_ASKED, 2 * self._steps)
        with torch.no_grad(), fork_rng(), pyro.validation_enabled(False):
            return self.elbo.stays(self.model, self.guide, *args, **kwargs)

    def _model_learns(self) -> bool:
        """Whether anything but one autoguide is trained."""
        if not isinstance(self.guide, AutoContinuous):
            return False
        own, prefix = {id(p) for p in self.guide.parameters()}, f"{self.guide._pyro_name}."
        named = {f"{prefix}{i}" if id(p) in own else "": p for i, p in enumerate(self.parameters()) if p.requires_grad}
        return not all(name.startswith(prefix) for name in (*named, *pyro.get_param_store().keys()))


def _near(log_weights: np.ndarray, kl: float) -> bool:
    return bool(np.isfinite(log_weights).all() and 0.5 * log_weights.var() < kl and psis(log_weights)[1] < _K)


def _agree(weights: np.ndarray, draws: np.ndarray) -> bool:
    """Whether weighted draws have nearly the means and standard deviations that draws have."""
    sd = draws.std(0)
    mean = weights @ draws
    change = np.log(np.sqrt(weights @ (draws - mean) ** 2) / sd)
    return bool((np.abs(mean - draws.mean(0)) < _MEAN * sd).all() and (np.abs(change) < _SD).all())
