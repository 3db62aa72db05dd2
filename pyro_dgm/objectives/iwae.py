r"""The importance-weighted bound, per datum and under subsampling.

.. math:: \sum_i \log \frac1K \sum_k w_{ik}, \qquad w_{ik} = \frac{p(x_i, z_{ik})}{q(z_{ik} \mid x_i)}

(Burda, Grosse & Salakhutdinov 2016, arXiv 1509.00519). The average over draws stands inside the logarithm of each datum,
the scale of a subsampled plate outside of it, :math:`\frac N B \sum_{i \in B}`: inside, it would be an exponent, and the
result no bound. Latents outside the data's plate are drawn once and counted as in an ELBO.

The doubly reparameterised gradient (Tucker et al. 2019, arXiv 1810.04152, eq. 8) of the guide's parameters is
:math:`\sum_k \tilde w_k^2\, \partial_z \log w_k\, \partial_\phi z_k`, with the normalised weights :math:`\tilde w`: its
signal-to-noise ratio does not fall with K as that of the plain gradient does. The model's parameters get the plain one,
:math:`\sum_k \tilde w_k\, \partial_\theta \log w_k`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import Tensor

from pyro_dgm.model.sites import is_enumerable, latent_sites, plate_frames
from pyro_dgm.model.vectorize import enumerated, packed_log_probs, together
from pyro_dgm.objectives.stl import parameters_of, rescored

__all__ = ["IWAE_ELBO"]

Frames = tuple[Any, ...]


class IWAE_ELBO(Trace_ELBO):
    """Importance-weighted bound, as a loss in nats (minus the bound), for model/guide pairs with a plate over data.

    Its expectation lies between the ELBO and the log evidence, and rises with ``num_particles``. It is a bound for each
    datum, in minibatches too; with one particle it is the ELBO. Latents outside the plates of the local ones are drawn
    once per step. Sites of the model marked ``infer={"enumerate": "parallel"}`` are summed out.

    Args:
        num_particles: draws K of the local latents.
        gradient: ``"dreg"`` (doubly reparameterised: less variance for the encoder), or ``"standard"``, which needs no
            second pass through the guide and is the choice for posteriors that score slowly (inverse autoregressive).
        max_plate_nesting: plate depth of the model; found by one run where it is not given.

    Raises:
        ValueError: for a guide site without reparameterised draws, a latent of the model that the guide lacks, and an
            observation outside the data's plates that depends on local latents.

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

    def __init__(
        self,
        num_particles: int = 16,
        *,
        gradient: Literal["dreg", "standard"] = "dreg",
        max_plate_nesting: float = float("inf"),
    ) -> None:
        if gradient not in ("dreg", "standard"):
            raise ValueError(f"IWAE_ELBO: gradient={gradient!r}, expected 'dreg' or 'standard'.")
        super().__init__(num_particles=num_particles, max_plate_nesting=max_plate_nesting, vectorize_particles=False)
        self.num_particles: int
        self.gradient = gradient
        self._seen: tuple[Any, list[str]] = (None, [])

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        weights = self._weights(model, guide, args, kwargs)
        log_mean = weights.local.logsumexp(0) - math.log(self.num_particles)
        bound = weights.shared + weights.scale * log_mean.sum()
        if self.gradient == "standard" or not torch.is_grad_enabled():
            return -bound
        normalised = weights.local.detach().softmax(0)
        weights.proxies.weigh(normalised)
        surrogate = weights.shared + weights.scale * (normalised * weights.local).sum()
        return -(surrogate + (bound - surrogate).detach())

    def log_weights(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        r""":math:`\log w_{ik}`, in nats: shape ``(num_particles, *units)`` with one entry for each unit of the plates."""
        return self._weights(model, guide, args, kwargs).local

    def _weights(self, model: Any, guide: Any, args: Any, kwargs: Any) -> _Weights:
        if self.max_plate_nesting == float("inf"):
            self._guess_max_plate_nesting(model, guide, args, kwargs)
        nesting, n = int(self.max_plate_nesting), self.num_particles
        run = self._sharing(guide, together(guide, n, nesting), args, kwargs)
        drawn = self._drawn(run, args, kwargs)
        units, proxies = _units(drawn), _Proxies(nesting)
        if self.gradient == "dreg" and torch.is_grad_enabled():
            constant = parameters_of(guide, drawn)
            drawn = proxies.watch(drawn, units)
            q = rescored(together(guide, n, nesting), drawn, constant, args, kwargs)
        else:
            q = prune_subsample_sites(drawn)
        p = self._model_trace(model, drawn, args, kwargs)
        (p_local, p_shared), (q_local, q_shared) = _terms(p, units, n), _terms(q, units, n)
        return _Weights((p_local - q_local) / _scale(units), p_shared - q_shared, _scale(units), proxies)

    def _sharing(self, guide: Any, run: Any, args: Any, kwargs: Any) -> Any:
        """The guide in a plate of draws, with one draw of those latents that stand outside the plates of the others."""
        if self._seen[0] is guide and not self._seen[1]:
            return run
        once = poutine.trace(guide).get_trace(*args, **kwargs)
        units, shared = set(_units(once)), []
        for name, site in list(latent_sites(once)):
            if units and not units <= set(plate_frames(site)):
                shared.append(name)
            else:
                once.remove_node(name)
        self._seen = (guide, shared)
        return poutine.replay(run, trace=once) if shared else run

    def _drawn(self, run: Any, args: Any, kwargs: Any) -> poutine.Trace:
        drawn = poutine.trace(run).get_trace(*args, **kwargs)
        for name, site in latent_sites(drawn):
            if not site["fn"].has_rsample:
                instead = "Enumerate it in the model, or use pyro.infer.ReweightedWakeSleep."
                raise ValueError(
                    f"IWAE_ELBO: guide site '{name}' ({type(site['fn']).__name__}) has no reparameterised draws. "
                    f"{site['infer'].get('instead', instead)}"
                )
        return drawn

    def _model_trace(self, model: Any, drawn: poutine.Trace, args: Any, kwargs: Any) -> poutine.Trace:
        nesting = int(self.max_plate_nesting)
        run = poutine.replay(enumerated(together(model, self.num_particles, nesting), nesting + 1), trace=drawn)
        trace = poutine.trace(run).get_trace(*args, **kwargs)
        for name, site in latent_sites(trace):
            if name not in drawn.nodes and not is_enumerable(site):
                raise ValueError(
                    f"IWAE_ELBO: latent site '{name}' of the model is missing from the guide, so the result would be no "
                    "bound. Add it to the guide; a discrete site can be summed out: infer={'enumerate': 'parallel'}."
                )
        if is_validation_enabled():
            check_model_guide_match(trace, drawn, nesting + 1)
        return prune_subsample_sites(trace)


class _Proxies:
    """The local draws as the densities see them: views, so that gradients towards them can be weighted."""

    def __init__(self, nesting: int) -> None:
        self.nesting = nesting
        self.views: list[tuple[Tensor, int]] = []
        self.units: Frames = ()

    def watch(self, drawn: poutine.Trace, units: Frames) -> poutine.Trace:
        """The trace with each local draw replaced by a view of it."""
        self.units, copy = units, drawn.copy()
        for name, site in latent_sites(drawn):
            if set(units) <= set(plate_frames(site)) and site["value"].requires_grad:
                view = site["value"].view_as(site["value"])
                copy.nodes[name] = {**site, "value": view}
                self.views.append((view, site["fn"].event_dim))
        return copy

    def weigh(self, weights: Tensor) -> None:
        """Multiply gradients towards each draw by its weight, shape ``(K, *units)``."""
        sizes = {f.dim: f.size for f in self.units}
        shape = [len(weights)] + [sizes.get(d, 1) for d in range(-self.nesting, 0)]
        for view, event_dim in self.views:
            w = weights.reshape(*shape, *[1] * event_dim)
            view.register_hook(lambda grad, w=w: w * grad)


class _Weights(NamedTuple):
    """Log weights ``(K, *units)``, the terms outside the units, the scale of subsampling, and the draws."""

    local: Tensor
    shared: Tensor
    scale: float
    proxies: _Proxies


def _units(trace: poutine.Trace) -> Frames:
    """The plates that all local latents share, outermost first; their slices are independent.

    Local are the latents in subsampled plates, or, where nothing is subsampled, in any plate.
    """
    stacks = [[f for f in plate_frames(s) if f.name != "_draws"] for _, s in latent_sites(trace)]
    subsampled = sorted({f.name for stack in stacks for f in stack if f.full_size not in (None, f.size)})
    local = [stack for stack in stacks if any(f.name in subsampled or not subsampled for f in stack)]
    units = tuple(f for f in local[0] if all(f in stack for stack in local)) if local else ()
    if not units and subsampled:
        raise ValueError(
            f"IWAE_ELBO: latents lie in different subsampled plates, {subsampled}, so no bound per datum exists. Use "
            "STL_ELBO, or one plate around all local latents."
        )
    return units


def _scale(units: Frames) -> float:
    """By how much subsampling multiplies a unit's terms."""
    return math.prod((f.full_size or f.size) / f.size for f in units)


def _terms(trace: poutine.Trace, units: Frames, n: int) -> tuple[Tensor, Tensor]:
    """Log density of each unit under each draw, ``(n, *units)``, and what is left, a scalar.

    Dimensions of size one have no name in a packed term; a term that is the same for all draws counts equally as local.
    """
    packed = list(packed_log_probs(trace))
    sizes = [n, *(f.size for f in units)]
    symbols = [trace.plate_to_symbol.get(name, "") for name in ("_draws", *(f.name for f in units))]
    needed = [s for s, size in zip(symbols[1:], sizes[1:], strict=True) if size > 1]
    local, shared = torch.zeros(()), torch.zeros(())
    for term in packed:
        if all(s in term._pyro_dims for s in needed):  # type: ignore[attr-defined]
            local = local + _arranged(term, symbols)
        else:
            shared = shared + _same_for_all_draws(term, symbols[0])
    return local.expand(sizes), shared


def _arranged(term: Tensor, symbols: list[str]) -> Tensor:
    """The term with one dimension for each symbol, in their order, and the rest summed."""
    dims: str = term._pyro_dims  # type: ignore[attr-defined]
    rest = [i for i, s in enumerate(dims) if s not in symbols]
    summed = term.sum(rest) if rest else term
    left = [s for s in dims if s in symbols]
    order = [left.index(s) for s in symbols if s in left]
    return summed.permute(order).reshape([summed.shape[left.index(s)] if s in left else 1 for s in symbols])


def _same_for_all_draws(term: Tensor, draws: str) -> Tensor:
    """The sum of a term outside the units, which may not differ between the draws."""
    dims: str = term._pyro_dims  # type: ignore[attr-defined]
    if not draws or draws not in dims:
        return term.sum()
    rows = term.movedim(dims.index(draws), 0).flatten(1).sum(-1) if term.dim() > 1 else term
    if is_validation_enabled() and not torch.allclose(rows, rows[:1], rtol=1e-4, atol=1e-3):
        raise ValueError(
            "IWAE_ELBO: a site outside the plate of the local latents depends on them, so the evidence does not "
            "factorise over that plate. Put the site into the plate, or use STL_ELBO."
        )
    return rows.mean(0)
