r"""The sticking-the-landing bound.

.. math:: \nabla_\phi \mathrm{ELBO} = E_{z}\big[\nabla_\theta(\log p(x, \theta) - \log q_{\bar\phi}(\theta))\,
          \partial_\phi \theta_\phi(z)\big]

with :math:`\bar\phi` held constant: the score term, of mean zero, is left out, so the gradient's variance vanishes where
:math:`q` is the posterior (Roeder, Wu & Duvenaud 2017, arXiv 1703.09194).
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.infer.elbo import ELBOModule
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import Tensor, nn

from pyro_dgm.core import LearnedDistribution, frozen
from pyro_dgm.core.psis import psis
from pyro_dgm.core.random import fork_rng
from pyro_dgm.model.log_joint import LogJoint
from pyro_dgm.model.sites import is_enumerable, latent_sites
from pyro_dgm.model.vectorize import NOT_VECTORIZED, enumerated, how_to_vectorize, joint_of_rows, log_probs, per_draw

__all__ = ["STL_ELBO", "parameters_of", "rescored"]

_LOOPED_PARTICLES = 16
_INSTEAD = "Enumerate it in the model, or use pyro.infer.Trace_ELBO or TraceEnum_ELBO."


class STL_ELBO(Trace_ELBO):
    """Evidence lower bound with path gradients and vectorised particles, as a loss in nats (minus the bound).

    ``SVI(model, guide, optim, loss=STL_ELBO())`` and ``STL_ELBO()(model, guide)`` both work. The value is an unbiased
    estimate of minus the ELBO; its gradient is unbiased. Discrete sites of the model that are marked
    ``infer={"enumerate": "parallel"}`` are summed out. Its first call checks that the vectorised model gives what
    single runs give; where it does not, ``torch.vmap`` is tried, and where that fails too, 16 particles run one by one,
    and a warning says why.

    Args:
        num_particles: draws of the guide per step.
        vectorize_particles: run all particles at once, in an outer plate.
        max_plate_nesting: plate depth of the model; found by one run where it is not given.

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

    def __init__(
        self, num_particles: int = 128, *, vectorize_particles: bool = True, max_plate_nesting: float = float("inf")
    ) -> None:
        self.num_particles: int
        super().__init__(
            num_particles=num_particles, vectorize_particles=vectorize_particles, max_plate_nesting=max_plate_nesting
        )
        self._checked = not vectorize_particles or num_particles == 1
        self._shapes: dict[str, torch.Size] = {}  # of single draws, where the model runs under vmap
        self._joint: LogJoint | None = None

    def __call__(self, model: nn.Module, guide: nn.Module) -> ELBOModule:
        return _STLModule(model, guide, self)

    def log_weights(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        r""":math:`\log p(x, \theta) - \log q(\theta)` of every particle, shape ``(num_particles,)``, with path gradients."""
        if self.max_plate_nesting == float("inf"):
            self._guess_max_plate_nesting(model, guide, args, kwargs)
        if not self._checked:
            self._check_vectorization(model, guide, args, kwargs)
        elif self.vectorize_particles and isinstance(guide, AutoContinuous):
            q = guide.get_posterior(*args, **kwargs)
            if isinstance(q, LearnedDistribution):
                return self._vector_log_weights(q, model, guide, args, kwargs)
        if self._shapes:
            return self._mapped_log_weights(model, guide, args, kwargs)
        terms = [self._particles(p, q) for p, q in self._get_traces(model, guide, args, kwargs)]
        return torch.cat(terms)

    def _vector_log_weights(self, q: LearnedDistribution, model: Any, guide: Any, args: Any, kwargs: Any) -> Tensor:
        """The shortest way, for a guide that is one learned distribution over all latents: no trace of the guide."""
        if self._joint is None or self._joint.model is not model or self._joint.guide is not guide:
            self._joint = LogJoint(guide, model, args, kwargs)
            _refuse_missing(self._joint.missing)
        latent = q.rsample((self.num_particles,))
        return self._joint.at(*args, **kwargs)(latent) - q.detach().log_prob(latent)

    def _mapped_log_weights(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Tensor:
        n, guides = self.num_particles, self._vectorized_num_particles(guide)
        drawn = poutine.trace(guides).get_trace(*args, **kwargs)
        rows = {k: drawn.nodes[k]["value"].reshape(n, *shape) for k, shape in self._shapes.items()}
        joint = joint_of_rows(model, rows, args, kwargs)
        return joint - per_draw(log_probs(_scored_with_frozen_parameters(guides, drawn, args, kwargs)), n)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        with torch.no_grad():
            return -self.log_weights(model, guide, *args, **kwargs).mean().item()

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        return -self.log_weights(model, guide, *args, **kwargs).mean()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def _particles(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
        n = self.num_particles if self.vectorize_particles else 1
        return per_draw(log_probs(model_trace), n) - per_draw(log_probs(guide_trace), n)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[poutine.Trace, poutine.Trace]:
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        run = poutine.replay(enumerated(model, int(self.max_plate_nesting)), trace=drawn)
        model_trace = poutine.trace(run).get_trace(*args, **kwargs)
        _refuse_unmatched(model_trace, drawn)
        if is_validation_enabled():
            check_model_guide_match(model_trace, drawn, self.max_plate_nesting)
        return prune_subsample_sites(model_trace), _scored_with_frozen_parameters(guide, drawn, args, kwargs)

    def _check_vectorization(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        self._checked = True
        with torch.no_grad(), poutine.block(), fork_rng():
            once = poutine.trace(guide).get_trace(*args, **kwargs)
            _refuse_unmatched(poutine.trace(poutine.replay(model, trace=once)).get_trace(*args, **kwargs), once)
            drawn = _latents(poutine.trace(self._vectorized_num_particles(guide)).get_trace(*args, **kwargs))
        values, shapes = {k: v[:3] for k, v in drawn.items()}, {k: v.shape for k, v in _latents(once).items()}
        how, fault = how_to_vectorize(model, values, shapes, self.max_plate_nesting - 1, args, kwargs)
        if how == "vmap":
            self._shapes = shapes
        elif how == "loop":
            warnings.warn(NOT_VECTORIZED.format(fault), stacklevel=4)
            self.max_plate_nesting -= 1
            self.vectorize_particles, self.num_particles = False, min(self.num_particles, _LOOPED_PARTICLES)


class _STLModule(ELBOModule):
    """The bound as a module that remembers how far its last particles lay apart."""

    def __init__(self, model: Any, guide: Any, elbo: STL_ELBO) -> None:
        super().__init__(model, guide, elbo)
        self._recent: deque[Tensor] = deque(maxlen=50)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        log_weights = self.elbo.log_weights(self.model, self.guide, *args, **kwargs)
        self._recent.append(log_weights.detach())
        return -log_weights.mean()

    def converged(self) -> bool:
        r"""Whether :math:`\mathrm{KL}(q\|p) \approx \frac12 \mathrm{Var}\log w` is below 0.01 nat and Pareto k below 0.6.

        Both are taken over the last 50 steps, in which a schedule's end hardly moves the parameters.
        """
        if len(self._recent) < 50:
            return False
        log_weights = torch.cat(list(self._recent)).double().cpu().numpy()
        return 0.5 * log_weights.var() < 0.01 and psis(log_weights)[1] < 0.6


def _scored_with_frozen_parameters(guide: Any, drawn: poutine.Trace, args: Any, kwargs: Any) -> poutine.Trace:
    """The guide run again through its own draws, with parameters held constant and draws live."""
    return rescored(guide, drawn, parameters_of(guide, drawn), args, kwargs)


def rescored(guide: Any, drawn: poutine.Trace, constant: list[Tensor], args: Any, kwargs: Any) -> poutine.Trace:
    """The guide run again through the draws of a trace, with no gradient towards ``constant``."""
    with frozen(*constant):
        with poutine.block(), _quiet(guide):
            trace = poutine.trace(poutine.replay(guide, trace=drawn)).get_trace(*args, **kwargs)
        trace = prune_subsample_sites(trace)
        trace.compute_log_prob()
    return trace


@contextmanager
def _quiet(guide: Any) -> Iterator[None]:
    """Silence ``pyro.module``, which warns of parameters that are frozen on purpose (autoguides do not call it)."""
    if isinstance(poutine.unwrap(guide), AutoGuide):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was not registered in the param store")
        yield


def _latents(guide_trace: poutine.Trace) -> dict[str, Tensor]:
    return {k: s["value"] for k, s in latent_sites(guide_trace) if not s["infer"].get("is_auxiliary")}


def parameters_of(guide: Any, trace: poutine.Trace) -> list[Tensor]:
    """The leaf tensors behind a guide's densities: of its ``pyro.param`` statements, or those of the module."""
    return _leaves(trace) or _parameters(guide)


def _leaves(trace: poutine.Trace) -> list[Tensor]:
    params = [n["value"] for n in trace.nodes.values() if n["type"] == "param"]
    return [p.unconstrained() if hasattr(p, "unconstrained") else p for p in params]


def _parameters(guide: Any) -> list[Tensor]:
    inner = poutine.unwrap(guide)
    return list(inner.parameters()) if isinstance(inner, nn.Module) else []


def _refuse_unmatched(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    for name, site in latent_sites(guide_trace):
        if not site["fn"].has_rsample:
            raise ValueError(
                f"STL_ELBO: guide site '{name}' ({type(site['fn']).__name__}) is not reparameterised, so it has no path "
                f"gradient. {site['infer'].get('instead', _INSTEAD)}"
            )
    _refuse_missing([n for n, s in latent_sites(model_trace) if n not in guide_trace.nodes and not is_enumerable(s)])


def _refuse_missing(names: list[str]) -> None:
    if names:
        raise ValueError(
            f"STL_ELBO: latent site '{names[0]}' of the model is missing from the guide, so the result would be no "
            "bound. Add it to the guide; a discrete site can be summed out: infer={'enumerate': 'parallel'}; for a "
            "guide that was built with reparam= pass guide.target."
        )
