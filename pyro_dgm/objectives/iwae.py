r"""The importance-weighted bound, per datum and under subsampling.

.. math:: \sum_i \log \frac1K \sum_k w_{ik}, \qquad w_{ik} = \frac{p(x_i, z_{ik})}{q(z_{ik} \mid x_i)}

(Burda, Grosse & Salakhutdinov 2016, arXiv 1509.00519). The average over draws stands inside the logarithm of each datum,
the scale of a subsampled plate outside of it, :math:`\frac N B \sum_{i \in B}`: inside, it would be an exponent, and the
result no bound. Latents outside the data's plate are drawn once and counted as in an ELBO.

The doubly reparameterised gradient (Tucker et al. 2019, arXiv 1810.04152, eq. 8) of the guide's parameters is
:math:`\sum_k \tilde w_k^2\, \partial_z \log w_k\, \partial_\phi z_k`, with the normalised weights :math:`\tilde w`: its
signal-to-noise ratio does not fall with K as that of the plain gradient does. The model's parameters get the plain one,
:math:`\sum_k \tilde w_k\, \partial_\theta \log w_k`. It rests on

.. math:: E\Big[\sum_k \tilde w_k\, \partial_\phi \log q_\phi(z_k)\Big]
          = E\Big[\sum_k \tilde w_k (1 - \tilde w_k)\, \partial_z \log w_k\, \partial_\phi z_k\Big],

which takes what a score of mean zero takes (:mod:`pyro_dgm.objectives.path_gradient`), and that parameters reach the
draws only through their own reparameterisation. A draw :math:`z_0` that all share is a parameter to the densities
:math:`q(z_k \mid z_0)`. Where a site keeps its score, or a local ``Delta`` is placed by a parameter, the whole bound has
the plain gradient.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import TransformedDistribution

from pyro_dgm.core.kinds import checked
from pyro_dgm.core.warn import plain_errors, told_unless_finite, warn_user
from pyro_dgm.model.sites import Site, latent_sites, sample_sites, subsampled
from pyro_dgm.model.terms import parameters_of
from pyro_dgm.objectives.agreement import Pair
from pyro_dgm.objectives.particles import Frames, ParticleELBO, Terms, is_local, scale_of, stray_plates, units_of
from pyro_dgm.objectives.path_gradient import rescored, with_densities, with_values

__all__ = ["IWAE_ELBO"]


class IWAE_ELBO(ParticleELBO):
    """Importance-weighted bound, as a loss in nats (minus the bound), for model/guide pairs with a plate over data.

    Its expectation lies between the ELBO and the log evidence, and rises with ``num_particles``. It is a bound for each
    datum, in minibatches too; with one particle it is the ELBO. Latents outside the plates of the local ones are drawn
    once per step. Sites of the model marked ``infer={"enumerate": "parallel"}`` are summed out. A subsampled plate that
    does not hold all local latents (a sequential one, or one of observations only) would put its scale into the
    logarithm: the log weights are then averaged, which is the ELBO, and a warning names the plate.

    As with :class:`~pyro_dgm.STL_ELBO` the first call checks that many draws at once give what single runs give; where
    they do not, ``torch.vmap`` is tried, then K single runs, and a warning says why.

    Args:
        num_particles: draws K of the local latents.
        gradient: ``"dreg"`` (doubly reparameterised: less variance for the encoder), or ``"standard"``, which needs no
            second pass through the guide and is the choice for posteriors that score slowly (inverse autoregressive).
            Guides with a density in a ``Delta`` or a ``pyro.factor``, with a support that moves, or with local sites that
            are scaled or masked get the standard one, and a warning names the site.
        vectorize_particles: run all draws at once, in an outer plate; False runs them one by one, unchecked.
        max_plate_nesting: plate depth of the model; found by one run where it is not given.
        retain_graph: whether ``loss_and_grads`` keeps the graph for another backward pass.
        max_iarange_nesting, strict_enumeration_warning, ignore_jit_warnings, jit_options, tail_adaptive_beta: as in
            ``Trace_ELBO``, which stores them for its subclasses and for compilation.

    Raises:
        ValueError: for a guide site without reparameterised draws, a latent of the model that the guide lacks, and a site
            outside of a subsampled plate that depends on latents inside; without a subsample all is then one unit.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> vae = dgm.VAE(
        ...     dgm.vae.StandardNormal(1),
        ...     dgm.vae.Conditional(3, 1, dgm.vae.normal),
        ...     dgm.vae.Conditional(1, 3, dgm.vae.normal),
        ... )
        >>> dgm.IWAE_ELBO(20)(vae.model, vae.guide)(torch.randn(10, 3)).shape
        torch.Size([])
    """

    fewest_alone = None
    without_path = "Enumerate it in the model, or use pyro.infer.ReweightedWakeSleep."
    plain_instead = "The whole bound gets the plain gradient, as with gradient='standard'."

    @checked()
    def __init__(
        self,
        num_particles: int = 16,
        *,
        gradient: Literal["dreg", "standard"] = "dreg",
        vectorize_particles: bool = True,
        max_plate_nesting: float = float("inf"),
        max_iarange_nesting: float | None = None,
        retain_graph: bool | None = None,
        strict_enumeration_warning: bool = True,
        ignore_jit_warnings: bool = False,
        jit_options: dict[str, Any] | None = None,
        tail_adaptive_beta: float = -1.0,
    ) -> None:
        if gradient not in ("dreg", "standard"):
            raise ValueError(f"IWAE_ELBO: gradient={gradient!r}, expected 'dreg' or 'standard'.")
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
            max_iarange_nesting=max_iarange_nesting,
            retain_graph=retain_graph,
            strict_enumeration_warning=strict_enumeration_warning,
            ignore_jit_warnings=ignore_jit_warnings,
            jit_options=jit_options,
            tail_adaptive_beta=tail_adaptive_beta,
        )
        self.gradient = gradient
        self._shared: set[str] | None = None  # latents that are drawn once for all draws of the others
        self._averaged: set[str] = set()

    def _forget(self) -> None:
        super()._forget()
        self._shared = None

    @plain_errors()
    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        return told_unless_finite("IWAE_ELBO", self._loss(Pair.of(model, guide, args, kwargs)))

    def _loss(self, pair: Pair) -> Tensor:
        weights = self._weights(pair)
        if weights.strays:
            return -(weights.shared + weights.scale * weights.local.mean(0).sum())
        log_mean = weights.local.logsumexp(0) - math.log(len(weights.local))
        bound = weights.shared + weights.scale * log_mean.sum()
        if not weights.proxies.watched:
            return -bound
        normalised = weights.local.detach().softmax(0)
        weights.proxies.weigh(normalised)
        surrogate = weights.shared + weights.scale * (normalised * weights.local).sum()
        return -(surrogate + (bound - surrogate).detach())

    def log_weights(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        r""":math:`\log w_{ik}`, in nats: shape ``(num_particles, *units)`` with one entry for each unit of the plates."""
        weights = self._weights(Pair.of(model, guide, args, kwargs))
        return weights.local.expand(self.num_particles, *weights.local.shape[1:])

    def _weights(self, pair: Pair) -> _Weights:
        self._meet(pair)
        drawn = self._drawn(pair)
        units = units_of(drawn[0])
        proxies = _Proxies(self._nesting, units, watched=self._squares_weights(pair, drawn, units))
        if proxies.watched:
            watched = [proxies.watch(trace) for trace in drawn]
            scored = [self._rescored(pair, trace, units) for trace in watched]
            proxies.watched = not any(map(self._is_unlike, drawn, scored))
        if proxies.watched:
            drawn = watched
        else:
            scored = [prune_subsample_sites(trace) for trace in drawn]
        p, models = self._joint_terms(pair, drawn, units)
        q = self._terms(scored, units)
        scale = scale_of(units)
        strays = self._strays([*scored, *models], units)
        local = (p[0] - q[0].to(p[0].device)) / scale
        rest = p[1] - q[1].to(p[1].device)
        if strays or _same_for_all_draws(p[1], q[1]):
            return _Weights(local, rest.mean(), scale, strays, proxies)
        self._refuse_subsampled(units)
        proxies.units = ()  # data outside the plates depend on local draws: all is one unit
        return _Weights(local.flatten(1).sum(1) + rest, rest.new_zeros(()), 1.0, strays, proxies)

    def _drawn(self, pair: Pair) -> list[poutine.Trace]:
        """The guide's draws, with one draw of those latents that stand outside the plates of the others."""
        if self._shared is None:
            self._shared = _shared_latents(self._once)
        drawn = list(self._draw(pair, self._shared, same_rows=True))
        shared = _shared_latents(drawn[0])
        if shared != self._shared:  # another plate is subsampled than before
            self._shared = shared
            drawn = list(self._draw(pair, shared, same_rows=True))
        return drawn

    def _squares_weights(self, pair: Pair, drawn: list[poutine.Trace], units: Frames) -> bool:
        """Whether the gradient is the doubly reparameterised one: it needs paths from parameters to draws only."""
        if self.gradient == "standard" or not torch.is_grad_enabled():
            return False
        shared = [k for k, s in latent_sites(drawn[0]) if not is_local(s, units)]
        for trace in drawn:
            self._path.learn(pair.guide, self._run(pair.guide), trace, pair.args, pair.kwargs, shared)
        placed = [k for k in self._path.now.placed if k in drawn[0].nodes and is_local(drawn[0].nodes[k], units)]
        weighed = [k for k, s in latent_sites(drawn[0]) if is_local(s, units) and _is_weighed(s, units)]
        self._path.say(
            dict.fromkeys(weighed, "it is scaled or masked, so its weight and its score do not belong together")
        )
        return not (placed or weighed or self._path.now.plain.keys() & drawn[0].nodes.keys())

    def _is_unlike(self, drawn: poutine.Trace, again: poutine.Trace) -> bool:
        """Whether a second run of the guide is not like the one that made the draws."""
        return bool(self._path.unlike(drawn, again, {k for k, _ in sample_sites(again) if k in drawn.nodes}))

    def _rescored(self, pair: Pair, drawn: poutine.Trace, units: Frames) -> poutine.Trace:
        """The guide's densities without scores: parameters are constant and, for local draws, shared draws are too."""
        run, constant = self._run(pair.guide), parameters_of(pair.guide, drawn)
        sites = dict(sample_sites(drawn))
        local = {k for k, s in sites.items() if is_local(s, units)}
        shared = set(sites) - local
        held = {k: s["value"].detach() for k, s in latent_sites(drawn) if k in shared}
        found = rescored(run, with_values(drawn, held), constant, local, *pair[2:])
        scored = {k: found.nodes[k] for k in local}
        if shared:
            found = rescored(run, drawn, constant, shared, *pair[2:])
            scored |= {k: found.nodes[k] for k in shared}
        return prune_subsample_sites(with_densities(drawn, scored))

    def _joint_terms(self, pair: Pair, drawn: list[poutine.Trace], units: Frames) -> tuple[Terms, list[poutine.Trace]]:
        if self._how == "vmap":
            terms, trace = self._mapped_terms(pair, drawn[0], units, self._shared or ())
            return terms, [trace]
        traces = self._model_traces(pair, drawn, same_rows=True)
        return self._terms(traces, units), traces

    def _refuse_subsampled(self, units: Frames) -> None:
        names = [f.name for f in units if subsampled(f)]
        if names:
            raise ValueError(
                f"IWAE_ELBO: a site outside of the subsampled plate '{names[0]}' depends on latents inside, so the evidence does "
                "not factorise over that plate. Put the site into the plate, run through all of the plate, or use STL_ELBO."
            )

    def _strays(self, traces: list[poutine.Trace], units: Frames) -> list[str]:
        """Subsampled plates inside a logarithm, of which it warns once; one draw, or equal ones, need no logarithm."""
        if self.num_particles == 1 or self._how == "once":
            return []
        strays = stray_plates(traces, units)
        if not self._averaged.issuperset(strays):
            self._averaged |= set(strays)
            warn_user(
                f"IWAE_ELBO: plate '{strays[0]}' is subsampled and not a vectorised plate around all local latents of the "
                "guide. Inside the logarithm its scale would be an exponent and the result no bound, so the log weights are "
                f"averaged: this is the ELBO with {self.num_particles} draws. Put the local latents into one vectorised "
                "plate, run through all of the plate, or use STL_ELBO."
            )
        return strays


def _is_weighed(site: Site, units: Frames) -> bool:
    """Whether a site's density counts otherwise than once for each row: by ``poutine.scale`` or a mask."""
    scale = torch.as_tensor(site["scale"]) / scale_of(units)
    fn = site["fn"]
    masks = [site["mask"]]
    while hasattr(fn, "base_dist") and not isinstance(fn, TransformedDistribution):
        masks.append(getattr(fn, "_mask", None))
        fn = fn.base_dist
    masked = any(m is not None and not bool(torch.as_tensor(m).all()) for m in masks)
    return masked or not bool((scale - 1.0).abs().max() < 1e-5)


class _Proxies:
    """The local draws as the densities see them: views, so that gradients towards them can be weighted."""

    def __init__(self, nesting: int, units: Frames, *, watched: bool) -> None:
        self.watched = watched
        self.units = units
        self._nesting = nesting
        self._views: list[list[tuple[Tensor, int]]] = []  # of each trace

    def watch(self, drawn: poutine.Trace) -> poutine.Trace:
        """The trace with each local draw replaced by a view of it."""
        sites = {k: s for k, s in latent_sites(drawn) if is_local(s, self.units) and s["value"].requires_grad}
        views = {k: s["value"].view_as(s["value"]) for k, s in sites.items()}
        self._views.append([(views[k], s["fn"].event_dim) for k, s in sites.items()])
        return with_values(drawn, views)

    def weigh(self, weights: Tensor) -> None:
        """Multiply gradients towards each draw by its weight, shape ``(K, *units)``."""
        sizes = {f.dim: f.size for f in self.units}
        plates = [sizes.get(d, 1) for d in range(-self._nesting, 0)]
        rows = weights.reshape(len(weights), *plates)
        for views, row in zip(self._views, [rows] if len(self._views) == 1 else rows, strict=True):
            for view, event_dim in views:
                _scale_gradient(view, row, event_dim)


def _scale_gradient(view: Tensor, weights: Tensor, event_dim: int) -> None:
    """Multiply the gradient towards a draw, whose leading plates may be absent, by weights that have them all."""
    batch = view.dim() - event_dim
    w = weights.reshape([*weights.shape[max(weights.dim() - batch, 0) :], *[1] * event_dim])
    view.register_hook(lambda grad: w * grad)


class _Weights(NamedTuple):
    """Log weights ``(K, *units)``, the terms outside the units, the scale of subsampling, and the draws."""

    local: Tensor
    shared: Tensor
    scale: float
    strays: list[str]
    proxies: _Proxies


def _shared_latents(trace: poutine.Trace) -> set[str]:
    units = units_of(trace)
    return {name for name, site in latent_sites(trace) if not is_local(site, units)}


def _same_for_all_draws(*terms: Tensor) -> bool:
    """Whether the terms outside the units do not differ between the draws."""
    return all(torch.allclose(rows, rows[:1], rtol=1e-4, atol=1e-3, equal_nan=True) for rows in terms)
