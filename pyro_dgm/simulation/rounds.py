r"""Simulations for one observation, in rounds: each from the part of the prior that the posterior so far leaves.

A guide that is trained on the prior's simulations leaves the part :math:`\{q(\theta \mid x_o) \ge \kappa\}`, from which the next
simulations come. Regions are nested, and inside a region all simulations so far are of the prior, so the next guide is trained
on all that lie there. Rounds end where regions hardly get smaller.

Source: Deistler, Goncalves & Macke (2022), "Truncated proposals for scalable and hassle-free simulation-based inference",
arXiv 2210.04815, algorithm 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from concurrent.futures import Executor
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_dgm.amortized.forward_kl import ForwardKL
from pyro_dgm.amortized.guide import AmortizedGuide
from pyro_dgm.amortized.posterior import ConditionedGuide
from pyro_dgm.core.devices import one_at_a_time, seeded
from pyro_dgm.core.kinds import checked
from pyro_dgm.simulation.design import truncated
from pyro_dgm.simulation.simulate import simulate
from pyro_dgm.simulation.store import Simulations
from pyro_dgm.train import fit

__all__ = ["Rounds", "rounds"]

# Not measured; chosen by hand.
_SAME = 0.7  # share of a region that the next one keeps, from which it counts as the same
_ROUND = 1_000  # simulations of a round, at least: fewer are learned by heart, and what is left out is lost
_LEAST = 100  # simulations
_STAYS = 2  # rounds in a row after which the rest is simulated at once: a guide of few simulations leaves much, the next one less


@dataclass(frozen=True)
class Rounds:
    """The posterior of one data set, and how the rounds went.

    Attributes:
        posterior: of the last guide. It is good for these data only.
        simulations: on which that guide was trained, all from the last region.
        shares: of the prior, from which each round simulated; the first is 1.
        trained_on: number of simulations on which each round's guide was trained.
    """

    posterior: ConditionedGuide
    simulations: Simulations
    shares: tuple[float, ...]
    trained_on: tuple[int, ...]

    def __str__(self) -> str:
        each = ", ".join(f"{n:,} in {share:.2g}" for n, share in zip(self.trained_on, self.shares, strict=True))
        return f"{len(self.shares)} rounds; trained on simulations, old and new, in a share of the prior: {each}"


@checked(num_simulations=_LEAST, most=1)
@one_at_a_time
def rounds(
    guide: AmortizedGuide,
    data: Mapping[str, Any],
    num_simulations: int = 10_000,
    *,
    most: int = 5,
    executor: Executor | None = None,
    progress: bool = True,
    seed: int | None = None,
) -> Rounds:
    """The posterior of one data set from few simulations, which come from ever smaller parts of the prior.

    Args:
        guide: an :class:`~pyro_dgm.AmortizedGuide` that was not trained. It stays as it is: each round trains a copy.
        data: ``{observed site: value}``, as for :meth:`~pyro_dgm.AmortizedGuide.condition`.
        num_simulations: of all rounds together, 100 at least.
        most: rounds, each of 1,000 simulations at least. Where two regions in a row keep most of the last one, what is left of
            the simulations is drawn at once.
        executor: as in :func:`~pyro_dgm.simulate`.
        progress: show a bar over the simulations, and those of the fits.
        seed: makes it reproducible.

    Raises:
        ValueError: for many data sets, a guide with covariates, one that was trained, and simulations of sizes of their own.

    Note:
        A first guide that is too sure of itself leaves a part of the posterior out, and no later round brings it back. Rounds of
        less than 2,000 simulations are learned by five flows, which are less often so. A series wants an encoder
        (``encoder="auto"``): without one few simulations are learned by heart. Check the posterior on
        ``simulate(model, 200, observed=..., proposal=found.posterior)`` by ``sbc(None, found.posterior.guide, simulations=...)``.
        Where the model has a density, ``posterior.refine()`` is cheaper and exact.

    References:
        Deistler, Goncalves & Macke (2022), arXiv 2210.04815.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model(x=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     return pyro.sample("x", dist.Normal(mu, 0.1), obs=x)
        >>> guide = dgm.AmortizedGuide(model, observed=["x"], ensemble=1)
        >>> found = dgm.rounds(guide, {"x": torch.tensor(2.0)}, 2_000, most=2, progress=False, seed=0)
        >>> draws = found.posterior.sample((2000,))["mu"]   # exact: mean 2.0, sd 0.1
        >>> bool(abs(draws.mean() - 2.0) < 0.05), found.shares[1] < 0.2
        (True, True)
    """
    _refuse(guide, data)
    number = max(1, min(most, num_simulations // _ROUND))
    each, left = math.ceil(num_simulations / number), num_simulations
    done: list[_Round] = []
    stays = 0
    with seeded(seed), tqdm(total=num_simulations, desc="rounds", disable=not progress) as bar:
        while left:
            kept, share = _inside(done[-1]) if done else (None, 0.0)
            stays = stays + 1 if share > _SAME else 0
            count = left if stays == _STAYS else min(each, left)
            simulations = _simulated(guide, count, done[-1].posterior if done else None, executor)
            left -= count
            bar.update(count)
            done.append(_trained(guide, data, simulations, kept, progress))
    last = done[-1]
    posterior = last.posterior.guide.condition(**data)  # now it may warn
    return Rounds(posterior, last.simulations, tuple(r.share for r in done), tuple(len(r.simulations) for r in done))


@dataclass(frozen=True)
class _Round:
    posterior: ConditionedGuide
    simulations: Simulations
    share: float


def _inside(last: _Round) -> tuple[Simulations, float]:
    """The simulations that lie in the region of the last posterior, and how many of all that is."""
    inside = truncated(last.posterior).contains({k: last.simulations[k] for k in last.simulations.latents})
    return last.simulations[inside], float(inside.double().mean())


def _simulated(
    guide: AmortizedGuide, n: int, posterior: ConditionedGuide | None, executor: Executor | None
) -> Simulations:
    asked = guide.arguments
    observed = [s.name for s in guide.structure.observed]
    made = simulate(
        guide.model, n, *asked.args, observed=observed, executor=executor, progress=False, proposal=posterior,
        model_kwargs=asked.kwargs,
    )  # fmt: skip
    if made.mask:
        raise ValueError(
            f"rounds: the sizes of {sorted(made.mask)} differ between simulations, expected those of the data."
        )
    return made


def _trained(
    guide: AmortizedGuide, data: Mapping[str, Any], fresh: Simulations, kept: Simulations | None, progress: bool
) -> _Round:
    """A copy of the guide, trained on these simulations and those that were kept."""
    both = fresh if kept is None else _joined(kept, fresh)
    copy = deepcopy(guide)
    fit(ForwardKL(copy), both, progress=progress)
    return _Round(_conditioned(copy, data), both, 1.0 if fresh.acceptance is None else fresh.acceptance)


def _conditioned(guide: AmortizedGuide, data: Mapping[str, Any]) -> ConditionedGuide:
    """The posterior, without warnings: what is wrong with it may be mended in the next round."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return guide.condition(**data)


def _joined(a: Simulations, b: Simulations) -> Simulations:
    return Simulations({k: torch.cat([a[k], b[k]]) for k in b}, b.observed)


def _refuse(guide: AmortizedGuide, data: Mapping[str, Any]) -> None:
    if bool(guide.standardized):
        raise ValueError("rounds: the guide was trained before, and each round starts anew: give one that was not.")
    if guide.covariates:
        names = [c.name for c in guide.covariates]
        raise ValueError(f"rounds: covariates {names} differ between data sets, and this is one: give them by args=.")
    if _conditioned(guide, data).lead:
        raise ValueError("rounds: the data are many data sets. Rounds are for one; train on all of the prior for many.")
