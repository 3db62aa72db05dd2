r"""A posterior that is the distribution of a network's output: it can be sampled, its density only estimated.

.. math:: \theta = \theta_0 + L_k\, g \odot f_\phi(\theta_0, \epsilon), \qquad
          k \sim w, \quad \theta_0 \sim N(\mu_k, L_k L_k^\top), \quad \epsilon \sim N(0, I)

At the start the gain :math:`g` is zero, and q is a mixture of the Gaussians that the warm start found, one for each mode:
a network is continuous and cannot tear one blob of noise into two, so the modes come from the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pyro
import torch
from pyro.distributions import MultivariateNormal, Normal
from pyro.infer.autoguide import init_to_median
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_dgm.core import MLP, ImplicitDistribution
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.module import values_of
from pyro_dgm.core.saved import resize_to_saved
from pyro_dgm.core.shapes import as_shape, check_number
from pyro_dgm.guides.modes import fitted_log_weights
from pyro_dgm.guides.start import find_start
from pyro_dgm.guides.vector import VectorGuide
from pyro_dgm.model.log_joint import LogJoint

__all__ = ["EstimatedDensity", "ImplicitGuide"]

_LEAST_WEIGHT = 1e-3  # of a mode, by the Gaussians of the start


class ImplicitGuide(VectorGuide):
    r"""Posterior :math:`q(\theta)` of all continuous latents: a network's output, without a density.

    Any network will do, since nothing has to be inverted. It needs :class:`~pyro_dgm.Adversarial_ELBO`, whose learned ratio
    stands in for the density; a flow (:class:`~pyro_dgm.AutoFlow`) is cheaper, has a density, and can be judged by
    ``khat``: take it unless the posterior defeats it. After training ``sample``, ``Predictive``, ``from_svi`` (draws, no
    weights) work.

    Args:
        model: a Pyro model with continuous latents; marked discrete ones are summed out.
        network: a module from ``(*batch, D + noise_features)`` to ``(*batch, D)``, or a function
            ``network(in_features, out_features)`` that makes one. Its input is a whitened draw of the start beside noise.
        noise_features: length of the additional noise; with none, the network moves every point of the start one way.
        init_loc_fn: where the posterior starts, as in Pyro's autoguides.
        init_scale: standard deviation of the start, in unconstrained units.

    Raises:
        ValueError: as :class:`~pyro_dgm.AutoFlow` for sites that do not fit; for a network of another output length.

    References:
        | Mescheder, Nowozin & Geiger (2017), "Adversarial variational Bayes", arXiv 1701.04722.
        | Huszar (2017), "Variational inference using implicit distributions", arXiv 1702.08235.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        >>> guide = dgm.ImplicitGuide(model).setup()
        >>> guide.draws(5)["z"].shape
        torch.Size([5, 3])
    """

    lost_by_pickle = (*VectorGuide.lost_by_pickle, "_make_network", "_scored_by")

    @checked()
    def __init__(
        self,
        model: Callable[..., Any],
        network: Callable[[int, int], nn.Module] | nn.Module = MLP,
        *,
        noise_features: int = 4,
        init_loc_fn: Callable[..., Tensor] = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn)
        check_number("ImplicitGuide", "noise_features", noise_features, least=0, whole=True)
        check_number("ImplicitGuide", "init_scale", init_scale, above=0)
        self._make_network = (network,)
        self.noise_features = noise_features
        self.init_scale = init_scale
        self._scored_by: tuple[Callable[[Tensor], Tensor]] | None = None

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        size = self.latent_dim
        loc = self._init_loc().detach()
        made = self._make_network[0]
        network = made if isinstance(made, nn.Module) else made(size + self.noise_features, size)
        _check_network(network.to(loc), size + self.noise_features, size)
        self.push = Push(network, loc, self.init_scale, self.noise_features)
        self._untouched = values_of(self._push, buffers=True)

    @property
    def _push(self) -> Push:
        """The network without the ``pyro.module`` statement that reading the attribute makes."""
        return cast(Push, self._modules["push"])

    @property
    def modes(self) -> int:
        """The number of separated modes among which the noise chooses."""
        return len(self._push.loc)

    def warm_start(self, *args: Any, **kwargs: Any) -> None:
        """Start at the Gaussians of :func:`~pyro_dgm.guides.start.find_start`; a trained guide stays as it is."""
        self.setup(*args, **kwargs)
        if not self._is_untouched(self._push):
            return
        log_joint = LogJoint(self, self.target, args, kwargs)
        if log_joint.missing:
            return
        self.centre_circles(log_joint)
        start = find_start(log_joint)
        gaussians = [MultivariateNormal(m, scale_tril=s) for m, s in zip(start.loc, start.scale_tril, strict=True)]
        log_weight = fitted_log_weights(gaussians, log_joint)
        kept = [i for i, w in enumerate(log_weight.exp().tolist()) if w >= _LEAST_WEIGHT]
        self._push.start_at(start.loc[kept], start.scale_tril[kept], log_weight[kept].log_softmax(0))

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Latent vectors ``(n, D)``, with gradients to the network, and the modes that they belong to, ``(n,)``."""
        push = self._push
        noise = torch.randn(n, push.noise_features).to(push.loc)
        return push(noise), push.mode(noise)

    def log_weight(self) -> Tensor:
        """Log probabilities of the modes, shape ``(modes,)``."""
        return self._push.log_weight

    def weigh(self, log_weight: Tensor) -> None:
        """Set the probabilities of the modes."""
        self._push.log_weight.copy_(log_weight)

    def score_by(self, log_density: Callable[[Tensor], Tensor] | None) -> None:
        """Let ``log_prob`` of the posterior be this estimate, for ``SVI`` with ``Trace_ELBO``; None takes it back."""
        self._scored_by = None if log_density is None else (log_density,)

    def get_posterior(self, *args: Any, **kwargs: Any) -> ImplicitDistribution:
        self.setup(*args, **kwargs)
        self._drop_strangers()
        push = self.push  # a pyro.module statement, where the guide is being traced
        base = Normal(self._push.loc.new_zeros(()), 1.0).expand([push.noise_features]).to_event(1)
        if self._scored_by is None:
            return ImplicitDistribution(push, base, self.latent_dim, name="ImplicitGuide")
        return EstimatedDensity(push, base, self.latent_dim, self._scored_by[0])

    def get_base_dist(self) -> Any:
        raise NotImplementedError(
            "ImplicitGuide: its network is no invertible transform, so there is no base distribution, and no NeuTra: use "
            "AutoFlow."
        )

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_dist()

    def _drop_strangers(self) -> None:
        """Remove from the param store what another guide of this name left: it would replace the parameters (pyro#1204)."""
        store = pyro.get_param_store()
        for name, parameter in self._push.named_parameters():
            full = param_with_module_name(f"{self._pyro_name}.push", name)
            if full in store and store._params[full] is not parameter:
                del store[full]


class EstimatedDensity(ImplicitDistribution):
    """An implicit distribution whose ``log_prob`` is an **estimate**, by a learned ratio without gradients to its weights.

    It is no density: it need not integrate to one. Diagnostics take no weights from it.
    """

    def __init__(
        self,
        push: Callable[[Tensor], Tensor],
        base: Distribution,
        features: int,
        log_density: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(push, base, features, name="ImplicitGuide")
        self._log_density = log_density

    def expand(self, batch_shape: Any, _instance: Any = None) -> EstimatedDensity:
        base = self._base.expand(as_shape(batch_shape, "batch_shape", least=0))
        return EstimatedDensity(self._push, base, self.event_shape.numel(), self._log_density)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._log_density(value)


class Push(nn.Module):
    """Noise ``(*batch, D + noise + 1)`` to latent vectors ``(*batch, D)``; the last noise chooses the mode.

    Args:
        network: the map f.
        loc: the centre, shape ``(D,)``.
        scale: the standard deviation at the start.
        extra: length of the additional noise.
    """

    loc: Tensor
    scale_tril: Tensor
    log_weight: Tensor

    def __init__(self, network: nn.Module, loc: Tensor, scale: float, extra: int) -> None:
        super().__init__()
        self.network = network
        self.extra = extra
        self.noise_features = len(loc) + extra + 1
        self.gain = nn.Parameter(loc.new_zeros(len(loc)))
        self.register_buffer("loc", loc.clone()[None])
        self.register_buffer("scale_tril", scale * torch.eye(len(loc)).to(loc)[None])
        self.register_buffer("log_weight", loc.new_zeros(1))

    def forward(self, noise: Tensor) -> Tensor:
        e, extra, _ = noise.split([self.loc.shape[-1], self.extra, 1], -1)
        k = self.mode(noise)
        start = self.loc[k] + self._scaled(k, e)
        centre, spread = self._moments()
        inputs = torch.cat([(start - centre) / spread, extra], -1)
        return start + self._scaled(k, self.gain * self.network(inputs))

    def mode(self, noise: Tensor) -> Tensor:
        """The mode that the noise chooses, shape ``(*batch,)``."""
        share = 0.5 * (1.0 + torch.erf(noise[..., -1] / math.sqrt(2.0)))
        return torch.bucketize(share, self.log_weight.exp().cumsum(0)[:-1])

    def _scaled(self, k: Tensor, e: Tensor) -> Tensor:
        if len(self.loc) == 1:
            return e @ self.scale_tril[0].mT
        return (self.scale_tril[k] @ e[..., None])[..., 0]

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the start."""
        weight = self.log_weight.exp()[:, None]
        centre = (weight * self.loc).sum(0)
        variance = self.scale_tril.square().sum(-1) + (self.loc - centre).square()
        spread = (weight * variance).sum(0).sqrt()
        return centre, spread.clamp_min(torch.finfo(spread.dtype).tiny)  # squares of a tiny scale vanish

    @torch.no_grad()
    def start_at(self, loc: Tensor, scale_tril: Tensor, log_weight: Tensor) -> None:
        """Make the start a mixture of these Gaussians."""
        self.loc = loc.clone()
        self.scale_tril = scale_tril.clone()
        self.log_weight = log_weight.clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        resize_to_saved(self, ("loc", "scale_tril", "log_weight"), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _check_network(network: nn.Module, in_features: int, out_features: int) -> None:
    parameter = next(network.parameters(), torch.zeros(()))
    try:
        shape = tuple(network(torch.zeros(3, in_features).to(parameter)).shape)
    except RuntimeError as error:
        raise ValueError(
            f"ImplicitGuide: the network does not take rows of {in_features} numbers (the latents' dimension plus "
            f"noise_features). Pass a function of (in_features, out_features). torch says: {error}"
        ) from error
    if shape != (3, out_features):
        raise ValueError(
            f"ImplicitGuide: the network turned (3, {in_features}) into {shape}, expected (3, {out_features}): the model has "
            f"{out_features} unconstrained latents. Pass a function of (in_features, out_features), such as MLP."
        )
