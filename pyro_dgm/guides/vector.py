"""What guides over one vector of all continuous latents share: how they read a model, and how they hand out draws."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.guides import AutoContinuous, prototype_hide_fn
from torch import Tensor, nn

from pyro_dgm.core.devices import fork_rng, same_bits
from pyro_dgm.core.kinds import shown
from pyro_dgm.core.module import values_of
from pyro_dgm.core.shapes import as_tensor_like, from_arrays
from pyro_dgm.core.upstream import drop_weak_references, whole_plates
from pyro_dgm.core.warn import plain_errors
from pyro_dgm.model.coordinates import Constrain, Coordinates, as_run
from pyro_dgm.model.log_joint import LogJoint, ascend, prior_draws, spread
from pyro_dgm.model.sites import Frame, is_enumerable, latent_sites, refuse_implicit
from pyro_dgm.model.stability import (
    changing_supports,
    circular_sites,
    refuse_rows_that_hang_together,
    refuse_without_bijection,
    runs_from_the_prior,
    subsampled_latents,
)
from pyro_dgm.model.supports import wrap

__all__ = ["VectorGuide"]


def _hidden(site: dict[str, Any]) -> bool:
    """What the guide leaves to the model: data, subsamples and sites that are summed out."""
    return prototype_hide_fn(site) or is_enumerable(site)


_MAKERS = ("_make_family", "_make_network")  # what makes the parameters at a guide's first call


class VectorGuide(AutoContinuous):
    """Abstract: an :class:`~pyro.infer.autoguide.AutoContinuous` with one distribution over the latent vector.

    A support that follows other latents, as that of ``Uniform(0, top)``, is the one of each draw; an angle stays on its circle.
    """

    _prototype_hide_fn = staticmethod(_hidden)
    # functions, a weak reference, and whether the guide was trained
    lost_by_pickle: tuple[str, ...] = ("_model", "_plain_model", "master", "_untouched")
    holds_all_rows = False  # of subsampled plates
    _prototype_frames: dict[str, Frame]

    def __init__(self, model: Callable[..., Any], *, init_loc_fn: Callable[..., Tensor]) -> None:
        super().__init__(model, init_loc_fn=_or_zero(init_loc_fn))
        self._plain_model: Any = (model,)
        self._untouched: Tensor | None = None

    def _is_untouched(self, learned: nn.Module) -> bool:
        """Whether what is learned still has the values of the set-up; a copy does not know."""
        if self._untouched is None:
            return False
        values = values_of(learned, buffers=True)
        return same_bits(values, self._untouched.to(values))

    @property
    def untouched(self) -> bool:
        """Whether nothing has changed the parameters since they were made; a copy of a guide does not know and says no."""
        learned = [m for m in self.children() if self._is_untouched(m)]
        return bool(learned)

    def __getstate__(self) -> dict[str, Any]:
        drop_weak_references(self)
        return {**self.__dict__, **dict.fromkeys(self.lost_by_pickle)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with the same model; a pickle has none."""
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        kept = {k: self.__dict__[k] for k in ("_model", "_plain_model", *_MAKERS) if k in self.__dict__}
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new.__dict__.update(kept)
        return new

    @property
    def target(self) -> Callable[..., Any]:
        """The model whose posterior this is."""
        return self._plain_model[0]

    @plain_errors()
    def setup(self, *args: Any, **kwargs: Any) -> Any:
        """Read the model's structure and create all parameters, without a training step; returns the guide."""
        if self.prototype_trace is None:
            who = type(self).__name__
            self._setup_prototype(*from_arrays(who, args), **from_arrays(who, kwargs))
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        who = type(self).__name__
        with fork_rng():
            trace = poutine.block(poutine.trace(self.model).get_trace)(*args, **kwargs)
            _refuse_unfit_sites(who, trace)
            parts = subsampled_latents(trace)
            if parts and (self.master is not None or not self.holds_all_rows):
                _refuse_subsamples(who, parts)
            if parts:
                refuse_rows_that_hang_together(who, self.target, args, kwargs, trace)
            with whole_plates(bool(parts)):
                super()._setup_prototype(*args, **kwargs)
                traces = runs_from_the_prior(who, self.target, self.prototype_trace, args, kwargs)
                moving = changing_supports(who, self.target, traces, args, kwargs)
            self._read_supports(traces, moving, bool(parts))
            frames = {f.name: f for _, s in latent_sites(trace) for f in s["cond_indep_stack"]}
            self._prototype_frames = {k: f._replace(size=frames[k].size) for k, f in self._prototype_frames.items()}
            with poutine.block():  # a plate's index is a sample site of its own
                self._create_plates(*args, **kwargs)

    def _read_supports(self, traces: list[poutine.Trace], moving: frozenset[str], whole: bool) -> None:
        circular = circular_sites(type(self).__name__, traces)
        fixed = Coordinates.of(self)
        self._unconstrained_shapes = {k: latent.inner for k, latent in fixed.latents.items()}
        self.latent_dim = fixed.dim
        self._coordinates = replace(fixed, moving=moving, circular=circular, whole=whole)
        if circular:
            self.register_buffer("centre", torch.zeros(fixed.dim).to(fixed.vector(self._prototype_values())))
            self._centre_at({k: v for k, _, v in self._prototype_values()})

    def _prototype_values(self) -> list[tuple[str, Any, Tensor]]:
        return [(k, s["fn"], s["value"].detach()) for k, s in latent_sites(self.prototype_trace)]

    @torch.no_grad()
    def _centre_at(self, values: dict[str, Tensor]) -> None:
        """Cut each circle open opposite to these values of its sites."""
        for name in self._coordinates.circular:
            self._coordinates.parts(self.centre)[name].copy_(values[name])

    @property
    def coordinates(self) -> Coordinates:
        """How site values and the latent vector belong together."""
        if not self._coordinates.circular:
            return self._coordinates
        return replace(self._coordinates, centre=self.centre)

    def _init_loc(self) -> Tensor:
        return self.coordinates.vector(self._prototype_values())

    def _unpack_latent(self, latent: Tensor) -> Any:
        """What NeuTraReparam asks; it maps sites by the supports of the prototype, or of the real line for an angle."""
        odd = sorted(self.coordinates.moving | self.coordinates.circular)
        if odd:
            raise ValueError(
                f"{type(self).__name__}: NeuTraReparam maps latent site '{odd[0]}' by a fixed support, and its support follows "
                "other latents or is a circle. Use pyro_dgm.neutra(model, guide, ...), which maps it right."
            )
        return super()._unpack_latent(latent)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample statements of the guide: the latent vector, and a Delta for every site."""
        self.setup(*args, **kwargs)
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        values, log_dets = self._placed(latent, args, kwargs)
        return {k: self._emitted(k, values[k], log_dets[k], plates) for k in values}

    def _placed(self, latent: Tensor, args: Any, kwargs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values and log-determinants by site."""
        coordinates = self.coordinates
        if not coordinates.moving:
            return coordinates.constrain(latent)
        made = Constrain(coordinates, latent, stop=True).run(self._known_model(), args, kwargs)
        return {k: made.values[k] for k in coordinates.latents}, made.log_dets

    def _known_model(self) -> Callable[..., Any]:
        if self._plain_model is None:
            raise ValueError(
                f"{type(self).__name__}: the supports of {sorted(self.coordinates.moving)} follow other latents, so draws need "
                "the model, which a pickled guide has lost. Build the guide of the model anew and load its state_dict."
            )
        return as_run(self, self.target)

    def _emitted(self, name: str, value: Tensor, log_det: Tensor, plates: dict[str, Any]) -> Tensor:
        event_dim = self.coordinates.latents[name].fn.event_dim
        log_density: Any = 0.0
        if poutine.get_mask() is not False:
            log_density = -sum_rightmost(log_det, log_det.dim() - value.dim() + event_dim)
        with ExitStack() as stack:
            for frame in self._cond_indep_stacks[name]:
                plate = plates[frame.name]
                stack.enter_context(plate)
                if plate.subsample_size < plate.size:
                    value = _taken(value, plate.dim - event_dim, plate)
                    log_density = _taken(log_density, plate.dim, plate)
            return pyro.sample(name, dist.Delta(value, log_density=log_density, event_dim=event_dim))

    @torch.no_grad()
    def draws(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Independent posterior draws of every latent, shape ``(num_samples, *site)``, in one pass."""
        self.setup(*args, **kwargs)
        return self.constrained(self.get_posterior(*args, **kwargs).sample((num_samples,)), *args, **kwargs)

    def constrained(self, latent: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Site values ``(S, *site)`` of unconstrained latent vectors ``(S, D)``.

        The model's arguments are needed where the support of a site follows other latents.
        """
        if self.coordinates.moving:
            return LogJoint(self, self._known_model(), args, kwargs).constrain(latent)[0]
        num_samples = len(latent)
        nesting = max((-f.dim for f in self._prototype_frames.values()), default=0)
        values, _ = self.coordinates.constrain(latent.reshape(num_samples, *(1,) * nesting, -1))
        return {k: v.reshape(num_samples, *self.coordinates.latents[k].shape) for k, v in values.items()}

    @torch.no_grad()
    def centre_circles(self, log_joint: LogJoint) -> None:
        """Cut each circle open opposite to the best point that climbing from prior draws finds."""
        if not self.coordinates.circular:
            return
        u = prior_draws(log_joint, 256 if log_joint.vectorized else 32)
        ends = ascend(log_joint, u[log_joint(u).argsort(descending=True)[:32]], spread(u), "circles")
        best = ends[log_joint(ends).argmax()]
        values, _ = log_joint.constrain(best[None])
        self._centre_at({k: v[0] for k, v in values.items()})

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Elementwise posterior medians, from 10,000 draws with a fixed seed, in the constrained space."""
        return {k: v[0] for k, v in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Elementwise posterior quantiles, shape ``(len(quantiles), *site)``, from 10,000 draws with a fixed seed.

        The Monte-Carlo error of a median is about 0.0125 posterior standard deviations. Elementwise medians of a
        simplex need not sum to one.
        """
        levels = as_tensor_like("quantiles", "quantiles", quantiles, torch.zeros(()))
        if levels.dim() > 1 or not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"quantiles: expected a list of numbers between 0 and 1, got {shown(quantiles)}.")
        with fork_rng(0):
            draws = self.draws(10_000, *args, **kwargs)
        return {k: self._quantiles_of(k, v, levels.to(v)) for k, v in draws.items()}

    def _quantiles_of(self, name: str, draws: Tensor, levels: Tensor) -> Tensor:
        """Of an angle along its circle, which is cut open opposite to the centre."""
        if name not in self.coordinates.circular:
            return torch.quantile(draws, levels, dim=0)
        centre = self.coordinates.parts(self.centre)[name]
        return wrap(centre + torch.quantile(wrap(draws - centre), levels, dim=0))


def _taken(full: Any, dim: int, plate: pyro.plate) -> Any:
    """The subsample of a plate, of a tensor with all rows in this dimension; others are as they were."""
    has_rows = isinstance(full, Tensor) and full.dim() >= -dim and full.shape[dim] == plate.size
    return full.index_select(dim, plate.indices.to(full.device)) if has_rows else full


def _refuse_unfit_sites(who: str, trace: poutine.Trace) -> None:
    refuse_implicit(who, trace)
    for name, site in latent_sites(trace):
        if is_enumerable(site):
            continue
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"{who}: site '{name}' is discrete ({type(site['fn']).__name__}); its posterior is continuous. "
                "Have it summed out: infer={'enumerate': 'parallel'}, or pyro.infer.config_enumerate(model). "
                "Where it is data, pass it."
            )
        refuse_without_bijection(who, name, site["fn"])


def _refuse_subsamples(who: str, parts: dict[str, Frame]) -> None:
    name, frame = next(iter(parts.items()))
    raise ValueError(
        f"{who}: latent site '{name}' lies in plate '{frame.name}', which is subsampled ({frame.size} of {frame.full_size}). One "
        "density over all latents cannot follow a subsample: use the full plate, an AutoFlow that is no part of a list, or an "
        "amortised guide for them."
    )


def _or_zero(init_loc_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same initialisation; sites that cannot be sampled (ImproperUniform) start at 0 of the unconstrained space."""

    def init(site: dict[str, Any]) -> Tensor:
        try:
            return init_loc_fn(site)
        except NotImplementedError:
            fn, to_support = site["fn"], refuse_without_bijection("Guide", site["name"], site["fn"])
            return to_support(torch.zeros(to_support.inverse_shape(fn.shape())))

    return init
