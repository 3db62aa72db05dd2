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
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.infer.elbo import ELBOModule
from torch import Tensor

from pyro_dgm.core import LearnedDistribution
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.warn import plain_errors, told_unless_finite
from pyro_dgm.core.weights import psis
from pyro_dgm.model.log_joint import LogJoint
from pyro_dgm.objectives.agreement import Pair
from pyro_dgm.objectives.particles import ParticleELBO

__all__ = ["STL_ELBO"]


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
        if self._joint is None:
            self._joint = LogJoint(pair.guide, pair.model, pair.args, pair.kwargs)
        joint = self._joint
        latent = q.rsample((self.num_particles if joint.vectorized else min(self.num_particles, self.fewest_alone),))
        return joint.at(*pair.args, **pair.kwargs)(latent) - q.detach().log_prob(latent)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        return told_unless_finite("STL_ELBO", -self.log_weights(model, guide, *args, **kwargs).mean())


def _learned_posterior(pair: Pair) -> LearnedDistribution | None:
    """The distribution over all latents, of a guide that is one learned distribution."""
    q = pair.guide.get_posterior(*pair.args, **pair.kwargs) if isinstance(pair.guide, AutoContinuous) else None
    return q if isinstance(q, LearnedDistribution) else None


class _STLModule(ELBOModule):
    """The bound as a module that remembers how far its last particles lay apart."""

    def __init__(self, model: Any, guide: Any, elbo: STL_ELBO) -> None:
        super().__init__(model, guide, elbo)
        self._recent: deque[Tensor] = deque(maxlen=50)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        log_weights = self.elbo.log_weights(self.model, self.guide, *args, **kwargs)
        self._recent.append(log_weights.detach())
        return told_unless_finite("STL_ELBO", -log_weights.mean())

    def converged(self) -> bool:
        r"""Whether :math:`\mathrm{KL}(q\|p) \approx \frac12 \mathrm{Var}\log w` is below 0.01 nat and Pareto k below 0.6.

        Both are taken over the last 50 steps, in which a schedule's end hardly moves the parameters.
        """
        if len(self._recent) < 50:
            return False
        log_weights = torch.cat(list(self._recent)).double().cpu().numpy()
        return 0.5 * log_weights.var() < 0.01 and psis(log_weights)[1] < 0.6
