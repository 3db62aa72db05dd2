r"""Which simulations are drawn: of which sizes, and from which part of the prior.

A plate whose size is an argument of the model may have another one in each block. A second round of simulations draws the
prior inside the highest-density region of a posterior:

.. math:: \tilde p(\theta) \propto p(\theta) \, 1\{q(\theta \mid x_o) \ge \kappa\}, \qquad
          q\text{-mass of } \{q < \kappa\} = 10^{-4}

Inside the region it is the prior, so the same loss learns the same posterior, at ``x_o`` with more simulations that matter
(Deistler, Goncalves & Macke 2022, arXiv 2210.04815, section 3.2). Draws of the prior outside are thrown away. Where that leaves
too few, Markov chains that start at the posterior's draws find the prior inside the region.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_dgm.amortized.binding import Arguments, size_arguments
from pyro_dgm.amortized.posterior import ConditionedGuide
from pyro_dgm.amortized.refine import JUMP_EVERY, Vectors, by_difference
from pyro_dgm.core.kinds import LARGEST, shown
from pyro_dgm.model.handlers import EndOfRun, Redraw, run_to_end
from pyro_dgm.model.hmc import Chains
from pyro_dgm.model.sites import is_drawn, plate_frames
from pyro_dgm.model.vectorize import Engine, How
from pyro_dgm.simulation.blocks import Blocks, Drawn, Resizable, random_state

__all__ = ["TruncatedPrior", "checked_sizes", "narrowed", "resizable", "truncated", "whole"]

_OUTSIDE = 1e-4  # mass of the posterior outside the region: that of Deistler et al. 2022
# Not measured; chosen by hand.
_DRAWS = 10_000  # of the posterior, for the density at the region's edge, and of the prior, for the region's share
_AT_ONCE = 250  # candidates, at least, where they run together
_TRIES = 1_000  # candidates for each draw that is wanted
_FEW = 0.02  # share of the prior below which chains find the draws
_POOL = 4_000  # chains
_STEPS, _MORE_STEPS = 60, 5  # of all chains, and of those that are picked for a block
_LONGEST = 2.0  # times the usual length of a step, since the prior is flatter than the posterior


@dataclass(frozen=True)
class TruncatedPrior:
    """Prior draws inside the region.

    Attributes:
        posterior: for one data set, with ``log_prob({site: (n, *site)}) -> (n,)``.
        sites: the latents that it knows.
        threshold: log density on the edge of the region, in nats.
        moments: ``[mean, sd]`` of each coordinate of its draws, by which a folder knows it again.
        how: whether candidates from the prior run together.
        walkers: where draws come from if the prior gives too few.
    """

    posterior: Any
    sites: tuple[str, ...]
    threshold: float
    moments: list[list[float]]
    how: How = "loop"
    walkers: Walkers | None = None

    @torch.no_grad()
    def __call__(self, blocks: Blocks, n: int) -> tuple[dict[str, Tensor], int]:
        """``n`` accepted draws of all latents up to the last one that the posterior knows, and how many of the prior these are.

        Raises:
            ValueError: if fewer than one in 1,000 is accepted.
        """
        if self.walkers is not None:
            return self.walkers.draw(n), _whole_on_average(n / self.walkers.share)
        kept: list[dict[str, Tensor]] = []
        found = tried = 0
        at_once = max(n, _AT_ONCE) if self.how == "plate" else n
        while found < n and tried < _TRIES * max(n, 10):
            rows = self._candidates(blocks, at_once)
            inside = self.contains(rows)
            kept.append({k: v[inside] for k, v in rows.items()})
            found, tried = found + int(inside.sum()), tried + at_once
        if found < n:
            raise ValueError(
                f"simulate: of {tried:,} prior draws {found} lie where the proposal's density is high (acceptance "
                f"{found / tried:.1e}; 1e-03 is the least). The posterior is already far narrower than the prior: refine it by "
                "the model's density, or narrow the prior itself."
            )
        return {k: torch.cat([rows[k] for rows in kept])[:n] for k in kept[0]}, _whole_on_average(tried * n / found)

    def contains(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Which of draws ``{site: (n, *site)}`` lie in the region, shape ``(n,)``."""
        return self.posterior.log_prob({k: rows[k] for k in self.sites}) >= self.threshold

    def _candidates(self, blocks: Blocks, n: int) -> dict[str, Tensor]:
        """Latents of ``n`` runs that end before the simulator begins."""
        if self.how == "plate":
            values = _begun(blocks.wide(n), blocks, self.sites)
            return {k: v.reshape(n, *blocks.shapes[k]) for k, v in values.items()}
        runs = [_begun(blocks.model, blocks, self.sites) for _ in range(n)]
        return {k: torch.stack([run[k] for run in runs]) for k in runs[0]}


def _whole_on_average(x: float) -> int:
    """One of the two whole numbers around x, whose mean is x."""
    return math.floor(x + float(torch.rand((), dtype=torch.float64)))


class Walkers:
    """Draws of the prior in small regions: posterior draws that chains carry to where the prior inside has its mass.

    The chains start at posterior draws, picked in proportion to the prior's density over the posterior's, and move by
    differences of others, over the unconstrained values of the latents. The share of the prior in the region is the mean of that
    ratio.

    Args:
        vectors: draws and density of the posterior.
        prior: log density of draws of the latents, nats.
        threshold: the posterior's log density on the edge of the region, nats.

    Source: ter Braak & Vrugt (2008), "Differential evolution Markov chain with snooker updater and fewer chains", for differences
    of vectors that do not move.
    """

    def __init__(self, vectors: Vectors, prior: Callable[[dict[str, Tensor]], Tensor], threshold: float) -> None:
        self.vectors, self.prior, self.threshold = vectors, prior, threshold
        self.others = vectors.sample(_POOL)
        log_prior, log_q = self._scored(self.others)
        ratio = torch.where(log_q >= threshold, (log_prior - log_q).exp(), 0.0)
        self.share = float(ratio.mean())
        start = self.others[torch.multinomial(ratio, _POOL, replacement=True)]
        self.pool = self._moved(start, _STEPS)

    def draw(self, n: int) -> dict[str, Tensor]:
        """``n`` draws of the latents."""
        return self.vectors.unpack(self._moved(self.pool[torch.randint(_POOL, (n,))], _MORE_STEPS))

    def _moved(self, u: Tensor, steps: int) -> Tensor:
        chains = Chains(u, self._log_p(u))
        for i in range(steps):
            a, b = self.others[torch.randint(_POOL, (2, len(u)))]
            v = by_difference(chains.u, a - b, jump=i % JUMP_EVERY == 0, longest=_LONGEST)
            log_p = self._log_p(v)
            chains.accept(v, log_p, log_p - chains.log_p)
        return chains.u

    def _log_p(self, u: Tensor) -> Tensor:
        """Log density of the prior over vectors, nats; -inf outside of the region."""
        log_prior, log_q = self._scored(u)
        stretch = self.vectors.log_q(u) - log_q
        log_p = (log_prior + stretch).nan_to_num(-torch.inf, -torch.inf)
        return torch.where(log_q >= self.threshold, log_p, -torch.inf)

    def _scored(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities of the latents by the prior and by the posterior, nats."""
        rows = self.vectors.unpack(u)
        with pyro.validation_enabled(False):  # a positive draw may be rounded to 0
            return self.prior(rows).double(), self.vectors.posterior.log_prob(rows).double()


def truncated(posterior: Any) -> TruncatedPrior:
    """The proposal that a posterior for one data set makes.

    Raises:
        TypeError: if it has no draws or no density.
        ValueError: if it is for many data sets.
    """
    if not (callable(getattr(posterior, "sample", None)) and callable(getattr(posterior, "log_prob", None))):
        raise TypeError(
            f"simulate: proposal={type(posterior).__name__} has no sample and log_prob; expected a posterior for one data "
            "set, guide.condition(x=x_observed)."
        )
    with torch.no_grad(), random_state(0):  # the same region in every call
        draws = posterior.sample((_DRAWS,))
        density = posterior.log_prob(draws)
    if density.shape != (_DRAWS,):
        raise ValueError(
            f"simulate: proposal gives densities of shape {tuple(density.shape)} for {_DRAWS} draws; expected a posterior for "
            "one data set, guide.condition(x=x_observed), not for many."
        )
    rows = torch.cat([v.reshape(_DRAWS, -1).double() for v in draws.values()], 1)
    moments = torch.stack([rows.mean(0), rows.std(0)], 1).tolist()
    return TruncatedPrior(posterior, tuple(draws), float(density.quantile(_OUTSIDE)), moments)


@torch.no_grad()
def narrowed(found: TruncatedPrior, blocks: Blocks, latents: set[str]) -> TruncatedPrior:
    """For a model's simulations: with chains, where the region is a small part of the prior and the prior has a density."""
    if latents != set(found.sites):
        return replace(found, how=blocks.how)
    begun = partial(_up_to, blocks.model, found.sites)
    engine = Engine(begun, blocks.args, blocks.kwargs, blocks.nesting, blocks.event_dims)
    with random_state(0), pyro.validation_enabled(False):
        how = engine.find_how(found.posterior.sample((3,)))[0]
        found = replace(found, how="plate" if how == "plate" else blocks.how)
        if found.how != "plate" or not isinstance(found.posterior, ConditionedGuide):
            return found
        vectors = Vectors(found.posterior)
        if vectors.discrete or float(found.contains(found._candidates(blocks, _DRAWS)).double().mean()) > _FEW:
            return found
        prior = partial(engine.log_joint, how="plate")
        return replace(found, walkers=Walkers(vectors, prior, found.threshold))


def _up_to(model: Callable[..., Any], sites: tuple[str, ...], *args: Any, **kwargs: Any) -> None:
    """A run of the model until these sites are drawn; no other is seen further out."""
    with poutine.block(expose=list(sites)), contextlib.suppress(EndOfRun), _UntilDrawn(sites):
        model(*args, **kwargs)


class _UntilDrawn(Drawn):
    """Ends a run when the last of some sites is drawn, and keeps what was drawn so far."""

    def __init__(self, sites: tuple[str, ...]) -> None:
        super().__init__()
        self.sites = set(sites)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        super()._pyro_post_sample(msg)
        if self.sites <= self.values.keys():
            raise EndOfRun


def _begun(model: Callable[..., Any], blocks: Blocks, sites: tuple[str, ...]) -> dict[str, Tensor]:
    until = _UntilDrawn(sites)
    run_to_end(until(Redraw()(model)), *blocks.args, **blocks.kwargs)
    if until.sites <= until.values.keys():
        return until.values
    raise ValueError(f"simulate: the proposal knows {sorted(sites)}, the model draws {sorted(until.values)}.")


def whole(name: str, value: Any, least: int | None = None) -> int:
    """A whole number among the arguments, or an error that names it."""
    expected = "an int" if least is None else f"an int, at least {least}"
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # the second of a tensor on the meta device
        kind = ValueError if isinstance(value, float) else TypeError
        raise kind(f"simulate: {name}={shown(value)}, expected {expected}.") from None
    if isinstance(value, bool) or (least is not None and number < least):
        raise ValueError(f"simulate: {name}={value!r}, expected {expected}.")
    if abs(number) > LARGEST:
        raise ValueError(f"simulate: {name}={shown(number)}, expected {expected}, below 2**63.")
    return number


def checked_sizes(sizes: Any) -> dict[str, tuple[int, int]]:
    """Ranges of sizes, checked."""
    if sizes is None:
        return {}
    if not isinstance(sizes, Mapping):
        raise TypeError(f"simulate: sizes={sizes!r}, expected {{plate: (least, most)}}.")
    found: dict[str, tuple[int, int]] = {}
    for plate, pair in sizes.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"simulate: sizes={{{plate!r}: {pair!r}}}, expected two whole numbers, such as (2, 200).")
        least = whole(f"the least size of '{plate}'", pair[0], 1)
        found[plate] = (least, whole(f"the largest size of '{plate}'", pair[1], least))
    return found


def resizable(
    model: Any, args: Any, kwargs: Any, trace: Any, sizes: dict[str, tuple[int, int]]
) -> tuple[Resizable, ...]:
    """The plates whose sizes are wanted, each with the argument that sets it."""
    sites = [(k, s) for k, s in trace.nodes.items() if is_drawn(s)]
    frames = {f.name: f for _, s in sites for f in plate_frames(s)}
    with random_state(0):
        known = size_arguments(model, args, kwargs)
    for plate in [p for p in sizes if p not in known]:
        there = "has its size written in the model, or takes it from a tensor" if plate in frames else "does not exist"
        raise ValueError(
            f"simulate: sizes={{'{plate}': ...}}: plate '{plate}' {there}; plates are {list(frames)}, and those that can be "
            f"resized {sorted(known)}. Take the size from a whole number, def model(n=20, y=None) and pyro.plate('{plate}', n "
            "if y is None else y.shape[-1]), and draw inputs as sites. What has an order or a fixed design has no other size."
        )
    places = {name: i for i, name in enumerate(Arguments(model, args, kwargs).names[: len(args)])}
    found: list[Resizable] = []
    for plate, (least, most) in sizes.items():
        name, more = known[plate]
        axes = {
            k: s["value"].dim() - s["fn"].event_dim + frames[plate].dim
            for k, s in sites
            if frames[plate] in plate_frames(s)
        }
        found.append(Resizable(places.get(name, name), more, least, most, axes))
    return tuple(found)
