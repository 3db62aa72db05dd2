"""Draws of a model and a guide, paired: one guide trace, replayed for everything.

Latents, deterministic sites, log joint, log q, pointwise log-likelihood and predictive draws all belong to the same
posterior draw. All draws run in one outer plate where the model allows it, otherwise one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_dgm.core.sites import is_computed, is_data, is_enumerable, latent_sites, observed_sites, plate_frames
from pyro_dgm.core.vectorize import (
    NOT_VECTORIZED,
    enumerated,
    how_to_vectorize,
    log_probs,
    per_draw,
    plate_nesting,
    together,
)

__all__ = ["Program"]

Model = Callable[..., Any]


class Redraw(poutine.messenger.Messenger):
    """Draws observed data anew; deterministic and factor sites stay what they are."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_data(msg):
            msg["is_observed"], msg["value"] = False, None


class Program:
    """A model and a guide with their arguments, run for many draws.

    Args:
        model, guide: Pyro programs.
        args, kwargs: their arguments.
        parallel: True, False, or "auto" (in one plate, if a check of three draws allows it).

    Raises:
        ValueError: for subsampled plates and for latents that the guide lacks.
    """

    def __init__(self, model: Model, guide: Model, args: Any, kwargs: Any, parallel: bool | str = "auto") -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self._guided = self._trace(guide)
        self.prototype = self._prototype()
        self.nesting = plate_nesting(self.prototype)
        self._refuse_subsamples()
        self._refuse_missing_latents()
        self.parallel = self._vectorizes() if parallel == "auto" else bool(parallel)

    def _trace(self, fn: Model) -> poutine.Trace:
        with torch.no_grad(), poutine.block(), torch.random.fork_rng(devices=[]):
            return poutine.trace(fn).get_trace(*self.args, **self.kwargs)

    def _prototype(self) -> poutine.Trace:
        """One run of the model, for shapes and plates; sites that cannot be sampled take the guide's draw."""
        try:
            return self._trace(self.model)
        except NotImplementedError:
            return self._trace(poutine.replay(self.model, trace=self._guided))

    def _refuse_subsamples(self) -> None:
        for site in self.prototype.nodes.values():
            if site["type"] != "sample":
                continue
            for f in site["cond_indep_stack"]:
                if f.full_size is not None and f.full_size != f.size:
                    raise ValueError(
                        f"Plate '{f.name}' is subsampled ({f.size} of {f.full_size}). Weights of a subsample belong to "
                        "another posterior: pass the full data, with subsample_size=None."
                    )

    def _refuse_missing_latents(self) -> None:
        self.enumerable = [n for n, s in latent_sites(self.prototype) if is_enumerable(s)]
        missing = [n for n in self.sites("latent") if n not in self._guided.nodes]
        if missing:
            raise ValueError(
                f"from_svi: latent sites {missing} of the model are not in the guide, so they would be drawn from the "
                "prior. Add them to the guide; discrete ones can be summed out: infer={'enumerate': 'parallel'}."
            )

    def _vectorizes(self) -> bool:
        drawn = self._trace(together(self.guide, 3, self.nesting))
        shapes = {k: s["value"].shape for k, s in latent_sites(self._guided) if not s["infer"].get("is_auxiliary")}
        values = {k: drawn.nodes[k]["value"] for k in shapes}
        how, fault = how_to_vectorize(self.model, values, shapes, self.nesting, self.args, self.kwargs)
        if how == "loop":
            warnings.warn(NOT_VECTORIZED.format(fault), stacklevel=4)
        return how == "plate"

    def guide_traces(self, n: int) -> list[poutine.Trace]:
        """Traces of the guide for ``n`` draws, with log probabilities: one trace in parallel, or ``n``."""
        traces = self._runs(self.guide, n)
        with torch.no_grad():
            for trace in traces:
                trace.compute_log_prob()
        return traces

    def joint(self, guide_traces: list[poutine.Trace], n: int) -> np.ndarray:
        """Log joint of every draw; enumerable sites are summed out."""
        model = enumerated(self.model, self.nesting + self.parallel)
        runs = [self._runs(poutine.replay(model, trace=t), n if self.parallel else 1) for t in guide_traces]
        return self.log_prob([trace for traces in runs for trace in traces], n)

    def replayed(self, guide_traces: list[poutine.Trace], n: int, *, redraw: bool = False) -> list[poutine.Trace]:
        """The model's traces for these guide draws; with ``redraw`` the data are drawn from the likelihood."""
        model = Redraw()(self.model) if redraw else self.model
        runs = [self._runs(poutine.replay(model, trace=t), n if self.parallel else 1) for t in guide_traces]
        return [trace for traces in runs for trace in traces]

    def forward(self, n: int) -> list[poutine.Trace]:
        """The model's traces from the prior, data included."""
        return self._runs(Redraw()(self.model), n)

    def _runs(self, fn: Any, n: int) -> list[poutine.Trace]:
        try:
            with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
                if self.parallel:
                    return [poutine.trace(together(fn, n, self.nesting)).get_trace(*self.args, **self.kwargs)]
                return [poutine.trace(fn).get_trace(*self.args, **self.kwargs) for _ in range(n)]
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"from_svi: a matrix of the model could not be factorised for one of {n} draws. Add jitter to its diagonal "
                f"(1e-6 of its scale), or work in float64. torch says: {str(error).splitlines()[0]}"
            ) from error

    def log_prob(self, traces: list[poutine.Trace], n: int) -> np.ndarray:
        """Total log probability of every draw, summed in float64, shape ``(n,)``."""
        size = n if self.parallel else 1
        with torch.no_grad():
            rows = [per_draw(log_probs(prune_subsample_sites(t)), size, dtype=torch.float64) for t in traces]
        return torch.cat(rows).cpu().numpy()

    def stack(self, traces: list[poutine.Trace], name: str, n: int, key: str = "value") -> np.ndarray:
        """Values (or log probabilities) of a site, ``(n, *plates, *event)``, without singleton dimensions of no plate."""
        shape = self.site_shape(name, key)
        rows = [_with_shape(t.nodes[name][key], n if self.parallel else 1, shape, name) for t in traces]
        return torch.cat(rows).detach().cpu().numpy()

    def site_shape(self, name: str, key: str) -> torch.Size:
        site = self.prototype.nodes[name]
        event_dim = 0 if site["infer"].get("_deterministic") else site["fn"].event_dim
        batch, event = _split(site["value"].shape, event_dim)
        owned = {f.dim for f in plate_frames(site)}
        keep = [
            n for i, n in enumerate(batch) if n != 1 or i - len(batch) in owned or site["infer"].get("_deterministic")
        ]
        return torch.Size([*keep, *(() if key == "log_prob" else event)])

    def pointwise(self, traces: list[poutine.Trace], name: str, n: int) -> np.ndarray:
        """Log-likelihood per datum, in nats; masked data are dropped, since they were not seen."""
        values = self.stack(traces, name, n, key="log_prob").astype(np.float64)
        mask = self.prototype.nodes[name]["mask"]
        if not isinstance(mask, torch.Tensor) or bool(mask.all()):
            return values
        return values[:, np.broadcast_to(mask.cpu().numpy(), values.shape[1:])]

    def observed(self) -> dict[str, np.ndarray]:
        """The data, by site."""
        nodes = self.prototype.nodes
        shapes = {k: self.site_shape(k, "value") for k in self.sites("observed")}
        return {k: nodes[k]["value"].detach().reshape(shape).cpu().numpy() for k, shape in shapes.items()}

    def as_traces(self, draws: dict[str, Tensor]) -> list[poutine.Trace]:
        """Given draws ``{site: (S, *site)}`` as the traces a guide would have left."""
        n = len(next(iter(draws.values())))
        if not self.parallel:
            return [_as_trace({k: v[i] for k, v in draws.items()}) for i in range(n)]
        return [_as_trace({k: self._in_plate(k, v) for k, v in draws.items()})]

    def _in_plate(self, name: str, value: Tensor) -> Tensor:
        batch = value.dim() - 1 - self.prototype.nodes[name]["fn"].event_dim
        return value.reshape(len(value), *(1,) * (self.nesting - batch), *value.shape[1:])

    def sites(self, kind: str) -> list[str]:
        """Names of latent, deterministic or observed sites of the model."""
        if kind == "latent":
            return [n for n, _ in latent_sites(self.prototype) if n not in self.enumerable]
        if kind == "observed":
            return [n for n, _ in observed_sites(self.prototype)]
        return [n for n, s in self.prototype.nodes.items() if is_computed(s)]


def _as_trace(values: dict[str, Tensor]) -> poutine.Trace:
    trace = poutine.Trace()
    for name, value in values.items():
        trace.add_node(
            name, name=name, type="sample", is_observed=False, value=value, infer={}, fn=None, cond_indep_stack=()
        )
    return trace


def _split(shape: torch.Size, event_dim: int) -> tuple[torch.Size, torch.Size]:
    return shape[: len(shape) - event_dim], shape[len(shape) - event_dim :]


def _with_shape(value: Tensor, n: int, shape: torch.Size, name: str) -> Tensor:
    """A site's value as ``(n, *shape)``; a value that does not depend on the draws is repeated."""
    if value.numel() == n * shape.numel():
        return value.reshape(n, *shape)
    if value.numel() == shape.numel():
        return value.reshape(1, *shape).expand(n, *shape)
    raise ValueError(
        f"Site '{name}' has shape {tuple(value.shape)} for {n} draws, expected {n} times {tuple(shape)}. Its shape must "
        "not depend on the draw, and its batch dimensions must belong to plates."
    )
