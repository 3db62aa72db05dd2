"""Handlers that change what a run of a model draws: given latents, data drawn anew, discrete sites from their posterior.

Discrete sites are summed out as in ``TraceEnum_ELBO``: a mask hides what depends on an enumerated site, never the
distribution that is summed (a masked step of a chain sums to one), and a scale stands outside of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.infer.discrete import _sample_posterior_from_trace
from pyro.ops import packed
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_dgm.core.warn import warn_user
from pyro_dgm.model.sites import Site, is_data, write_log_probs

__all__ = [
    "EndOfRun",
    "Given",
    "Redraw",
    "Undrawn",
    "apart",
    "factor_of",
    "is_enumerated",
    "posterior_draws_of",
    "run_to_end",
    "warn_of_masked_sums",
]


@contextmanager
def apart() -> Iterator[None]:
    """Within the context a program runs as if no handler and no plate were around it."""
    handlers, plates = list(_PYRO_STACK), _DIM_ALLOCATOR._stack
    _PYRO_STACK.clear()
    _DIM_ALLOCATOR._stack = []
    try:
        yield
    finally:
        _PYRO_STACK[:], _DIM_ALLOCATOR._stack = handlers, plates


class EndOfRun(Exception):
    """Raised by a handler that has seen all it wants of a run of a model."""


def run_to_end(model: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Run a model until a handler has seen all it wants; nothing of it is seen further out."""
    with poutine.block():
        try:
            model(*args, **kwargs)
        except EndOfRun:
            pass


class Undrawn(ValueError):
    """A run of a model that draws its data anew failed; its cause says how.

    Attributes:
        site: the site that could not be drawn; None where the model failed between two sites.
        anew: whether data had been drawn anew before.
    """

    def __init__(self, redraw: Redraw, error: Exception) -> None:
        self.site = redraw.at
        self.anew = redraw.anew
        what = f"site '{self.site}' could not be drawn" if self.site else f"the model failed after {redraw.last}"
        self.reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
        super().__init__(f"{what} ({self.reason.rstrip('.')})")


class Redraw(poutine.messenger.Messenger):
    """Draws observed data anew, in the shape of the data; deterministic and factor sites stay what they are.

    Args:
        leave: data that stay what they are too.

    Attributes:
        at: the site that is being drawn.
        last: the last one that was drawn, in words.
        anew: whether any data were drawn in this run.
    """

    def __init__(self, leave: Collection[str] = ()) -> None:
        super().__init__()
        self.leave = leave
        self._start()

    def _start(self) -> None:
        self.at: str | None = None
        self.last = "its start"
        self.anew = False

    def __enter__(self) -> Redraw:
        self._start()
        return super().__enter__()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        self.at = msg["name"]
        if is_data(msg) and msg["name"] not in self.leave:
            msg["fn"] = _as_wide_as(msg["value"], msg["fn"])
            msg["is_observed"] = False
            msg["value"] = None
            self.anew = True

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        self.at = None
        self.last = f"site '{msg['name']}'"


def _as_wide_as(value: Any, fn: Any) -> Any:
    """The distribution of independent data in the shape of the value, as its density counts them."""
    if not isinstance(value, Tensor):
        return fn
    try:
        batch = torch.broadcast_shapes(value.shape[: value.dim() - fn.event_dim], fn.batch_shape)
        return fn if batch == fn.batch_shape else fn.expand(batch)
    except (RuntimeError, NotImplementedError):
        return fn


class Given(poutine.messenger.Messenger):
    """Gives latent sites (and the index of plates) their values; they are then not enumerated."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["infer"] = {k: v for k, v in msg["infer"].items() if k != "enumerate"}


def is_enumerated(site: Site) -> bool:
    """Whether this run gave the site all of its values, in a dimension of their own."""
    return site["infer"].get("_enumerate_dim") is not None


def factor_of(site: Site) -> Tensor:
    """A packed site's log density as it enters the sum over enumerated sites: masked unless it is summed over itself."""
    p = site["packed"]
    if is_enumerated(site):
        return p["unscaled_log_prob"]
    return packed.scale_and_mask(p["unscaled_log_prob"], mask=p["mask"])


def posterior_draws_of(model: Callable[..., Any], first_available_dim: int) -> Callable[..., Any]:
    """The model with its enumerable sites drawn from their exact posterior given everything else.

    ``infer_discrete`` masks the enumerated sites themselves: hidden steps would be uniform, not drawn from the model.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with poutine.block():
            trace = poutine.trace(poutine.enum(model, first_available_dim)).get_trace(*args, **kwargs)
        trace = prune_subsample_sites(trace)
        write_log_probs(trace)
        trace.pack_tensors()
        for site in trace.nodes.values():
            if site["type"] == "sample":
                site["packed"]["masked_log_prob"] = factor_of(site)
        return _sample_posterior_from_trace(model, trace, 1, True, *args, **kwargs)

    return run


def warn_of_masked_sums(sites: dict[str, Site]) -> None:
    """Say that ``.mask()`` of a distribution that is summed over leaves ones, of which there are as many as values."""
    for name, site in sites.items():
        own = site["fn"]._mask if isinstance(site["fn"], MaskedDistribution) else True
        if not bool(torch.as_tensor(own).all()):
            warn_user(
                f"Site '{name}' is summed out and its distribution is masked by .mask(): every hidden row of K values adds "
                "log K to the density, as in TraceEnum_ELBO. Write `with poutine.mask(mask=...)` around the site instead: a "
                "hidden row then adds nothing."
            )
