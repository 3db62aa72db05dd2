r"""An amortised guide on many data sets: each posterior is judged by the model's density, and repaired where it has to be.

For each data set the first of these that is enough is taken:

1. *accepted*: the guide's own draws, where importance weights say that they are the posterior's (as :func:`~pyro_dgm.khat`
   does), and that no mean and no sd would change;
2. *reweighted*: draws picked by weight, where k-hat is fine and enough distinct ones are left;
3. *moved*: those moved by short Markov chains, which propose fresh draws of the guide and differences of each other. Eight
   populations of chains know nothing of each other. They are run until another hundred steps change no mean and no width, and
   the populations differ by no more than independent draws do: few draws that carry all the weight put them in different
   places, and that they agree says that it is forgotten;
4. *refused*: none of these. MCMC from scratch is what is left.

Where the model's data have no density (a simulator whose data are a ``Delta``) data are *refused* that ``condition`` warns of:
those outside of the range of the simulations. The others are *accepted* or *refused* by local calibration, the ranks of the
truths of the simulations nearest to them, where simulations are given; otherwise the guide's draws stay *unchecked*.

References:
    | Li, Vehtari, Bürkner, Radev, Acerbi & Schmitt (2024), "Amortized Bayesian workflow", arXiv 2409.04332.
    | Zhao, Dalmasso, Izbicki & Lee (2021), "Diagnostics for conditional density models and Bayesian inference algorithms",
      arXiv 2102.10473: local calibration.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from pyro_dgm.amortized.guide import AmortizedGuide
from pyro_dgm.amortized.posterior import ConditionedGuide
from pyro_dgm.amortized.refine import Joint, picked, smoothed
from pyro_dgm.core.devices import one_at_a_time, seeded
from pyro_dgm.core.distribution import NoDensityError
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.pace import few_threads, on_bar, show
from pyro_dgm.core.shapes import as_tensor_like
from pyro_dgm.core.weights import correction
from pyro_dgm.diagnostics.containers import ContainerOptions
from pyro_dgm.diagnostics.converters import from_posterior_samples
from pyro_dgm.diagnostics.exploration import Exploration, percent
from pyro_dgm.diagnostics.khat import KHat, judge
from pyro_dgm.diagnostics.local_calibration import local_p_values
from pyro_dgm.diagnostics.populations import POPULATIONS, settled
from pyro_dgm.model.hmc import Chains

__all__ = ["Workflow", "workflow"]

Status = Literal["accepted", "reweighted", "moved", "refused", "unchecked"]
_STATUSES: tuple[Status, ...] = get_args(Status)

# Set by ``python -m tests.benchmarks workflows``, docs/benchmarks/workflows.md, unless said otherwise.
_PROPOSALS = 4  # draws of the guide for each that is returned. Not measured; chosen by hand
_LEAST = 1_000  # draws that are judged, however few are asked for; a good guide is known by as many. Chosen by hand
_CHANGE = 0.1  # sd, and log sd. By means alone and a gap of .05 nats a log sd that was .40 off was accepted
_DISTINCT = 0.6  # effective draws for each returned, from which weights are enough; at .4 the largest error was .16 sd
_LEVEL = 0.01  # share of false alarms among the data sets that local calibration refuses; a convention


@dataclass(frozen=True)
class Workflow:
    """The posteriors of M data sets, and what was done for each.

    Attributes:
        draws: ``{site: (M, n, *site)}``; of a refused data set where its chains ended, or NaN where it could not be read.
        status: "accepted", "reweighted", "moved", "refused" or "unchecked", of each.
        khat, gap, ess: of the guide's importance weights: Pareto k, nats, effective number of 4 n; NaN where there are none.
        seconds: of each.
        notes: what ``condition`` warned of, for each, and why data could not be read; empty where there was nothing.
    """

    draws: dict[str, Tensor]
    status: tuple[Status, ...]
    khat: tuple[float, ...]
    gap: tuple[float, ...]
    ess: tuple[float, ...]
    seconds: tuple[float, ...]
    notes: tuple[str, ...]
    _posteriors: tuple[ConditionedGuide | None, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.status)

    def share(self, status: Status) -> float:
        """Share of the data sets with this status."""
        _refuse_other(status)
        return self.status.count(status) / len(self)

    def where(self, status: Status) -> list[int]:
        """The data sets with this status, by their place."""
        _refuse_other(status)
        return [i for i, each in enumerate(self.status) if each == status]

    def container(self, index: int, **options: Unpack[ContainerOptions]) -> Any:
        """One data set's draws for ArviZ, as :func:`~pyro_dgm.from_posterior_samples` makes it with these options."""
        posterior = self._posteriors[index]
        if posterior is None:
            raise ValueError(
                f"workflow: data set {index} could not be read, so it has no posterior. {self.notes[index]}"
            )
        samples = {k: v[index] for k, v in self.draws.items()}
        chains = 4 if len(next(iter(samples.values()))) % 4 == 0 else 1  # R-hat compares chains
        return from_posterior_samples(posterior.model, samples, num_chains=chains, **options)

    def table(self) -> str:
        """A line for each data set."""
        head = f"{'data set':>8s}  {'status':11s}{'k-hat':>7s}{'gap':>10s}{'ESS':>8s}{'seconds':>9s}"
        rows = zip(self.status, self.khat, self.gap, self.ess, self.seconds, self.notes, strict=True)
        lines = [
            f"{i:8d}  {status:11s}{k:7.2f}{gap:>10.3g}{ess:8.0f}{s:9.2f}  {note}".rstrip()
            for i, (status, k, gap, ess, s, note) in enumerate(rows)
        ]
        return "\n".join([head, *lines])

    def __str__(self) -> str:
        counts = Counter(self.status)
        shares = ", ".join(f"{percent(counts[s] / len(self))} {s}" for s in _STATUSES if counts[s])
        refused = self.where("refused")
        some = ", ".join(map(str, refused[:10])) + (", ..." if len(refused) > 10 else "")
        advice = (
            f" Refused: {some}; train the guide on more simulations, or run MCMC there if the model has a density."
            if refused
            else ""
        )
        if counts["unchecked"]:
            advice += " The model's data have no density to check with: pass simulations=, and look at sbc."
        return f"{len(self)} data sets in {sum(self.seconds):.1f} s: {shares}.{advice}"


@dataclass
class _Found:
    """The outcome of one data set."""

    draws: dict[str, Tensor]
    status: Status
    verdict: KHat | None = None
    note: str = ""
    posterior: Any = None
    seconds: float = 0.0

    def number(self, name: str) -> float:
        """Of the verdict."""
        return math.nan if self.verdict is None else float(getattr(self.verdict, name))


@checked(num_samples=10)
@one_at_a_time
def workflow(
    guide: AmortizedGuide,
    data: Mapping[str, Any],
    *,
    num_samples: int = 1000,
    simulations: Mapping[str, Tensor] | None = None,
    progress: bool = True,
    seed: int | None = None,
) -> Workflow:
    """Posterior draws for each of many data sets, accepted, reweighted or moved as the model's density asks.

    Args:
        guide: a trained :class:`~pyro_dgm.AmortizedGuide`.
        data: ``{observed site or covariate: (M, *shape)}``; masks under ``"mask"``, with the same first dimension.
        num_samples: draws of each posterior.
        simulations: of the model, 1,000 or more that the guide was not trained on: they judge data that have no density, and
            are not looked at elsewhere. A guide that is shifted by .3 sd near a data set is seen, a smaller fault may not be.
        progress: show a bar over the data sets, and over the chains of one that is moved.
        seed: makes it reproducible.

    Raises:
        ValueError: as :meth:`~pyro_dgm.AmortizedGuide.condition`; for numbers of data sets that differ from site to site; for too
            few simulations, or padded ones.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model(x=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     return pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> guide = dgm.AmortizedGuide(model, observed=["x"])
        >>> sims = dgm.simulate(model, 1000, observed=["x"], seed=0, progress=False)
        >>> history = dgm.fit(dgm.ForwardKL(guide), sims, max_steps=200, progress=False, seed=0)
        >>> found = dgm.workflow(guide, {"x": torch.tensor([-1.0, 0.0, 2.0])}, num_samples=200, seed=0, progress=False)
        >>> found.draws["mu"].shape, found.where("refused")
        (torch.Size([3, 200]), [])
    """
    rows = _rows(data)
    found: list[_Found] = []
    with seeded(seed), on_bar("posteriors", progress) as bar:
        show(bar, "posteriors", len(rows))
        for i, row in enumerate(rows):
            began = time.perf_counter()
            posterior, note = _conditioned(guide, row)
            each = _one_or_none(posterior, num_samples, note)
            found.append(replace(each, posterior=posterior, seconds=time.perf_counter() - began))
            if each.status in ("moved", "refused"):  # chains had the bar
                show(bar, "posteriors", len(rows), done=i)
            bar.update()
            bar.set_postfix(Counter(each.status for each in found))
        if simulations is not None:
            found = _by_simulations(guide, simulations, data, found)
    return Workflow(
        draws=_stacked(found),
        status=tuple(each.status for each in found),
        khat=tuple(each.number("k") for each in found),
        gap=tuple(each.number("gap") for each in found),
        ess=tuple(each.number("ess") for each in found),
        seconds=tuple(each.seconds for each in found),
        notes=tuple(each.note for each in found),
        _posteriors=tuple(each.posterior for each in found),
    )


def _refuse_other(status: str) -> None:
    if status not in _STATUSES:
        raise ValueError(f"workflow: status={status!r}, expected one of {list(_STATUSES)}.")


def _rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of ``condition``, data set by data set."""
    masks = {k: as_tensor_like("workflow", f"the mask of '{k}'", v, None) for k, v in (data.get("mask") or {}).items()}
    values = {k: as_tensor_like("workflow", f"'{k}'", v, None) for k, v in data.items() if k != "mask"}
    lengths = {k: len(v) if v.dim() else 0 for k, v in (*values.items(), *masks.items())}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"workflow: the data have {lengths} data sets in their first dimension, expected one number.")
    count = next(iter(lengths.values()))
    return [
        {k: v[i] for k, v in values.items()} | ({"mask": {k: m[i] for k, m in masks.items()}} if masks else {})
        for i in range(count)
    ]


def _conditioned(guide: AmortizedGuide, row: dict[str, Any]) -> tuple[ConditionedGuide | None, str]:
    """The posterior, and what was warned of; none of data that the guide refuses, with its words."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            posterior = guide.condition(**row)
        except ValueError as error:
            return None, str(error).removeprefix("condition: ")
    return posterior, " ".join(str(w.message).removeprefix("condition: ") for w in said)


def _one_or_none(posterior: ConditionedGuide | None, n: int, note: str) -> _Found:
    """The outcome; data that the guide cannot read are refused by themselves, and the other data sets go on.

    Without a density the range of the simulations decides: the guide was not trained for what is warned of.
    """
    if posterior is None:
        return _Found({}, "refused", note=note)
    try:
        found = _one(posterior, n)
    except ValueError as error:
        return _Found({}, "refused", note=f"{note} {error}".strip())
    refused = note and found.status == "unchecked"
    return replace(found, note=note, status="refused" if refused else found.status)


def _by_simulations(
    guide: AmortizedGuide, simulations: Mapping[str, Tensor], data: Mapping[str, Any], found: list[_Found]
) -> list[_Found]:
    """Data sets that are unchecked, accepted or refused by local calibration."""
    names = [s.name for s in (*guide.structure.observed, *guide.covariates)]
    places = [i for i, each in enumerate(found) if each.status == "unchecked"]
    if not places:
        return found
    rows = {k: torch.stack([found[i].posterior.data[k] for i in places]) for k in names}
    p_values = dict(zip(places, local_p_values(guide, simulations, rows, names), strict=True))
    return [_calibrated(each, p_values.get(i)) for i, each in enumerate(found)]


def _calibrated(each: _Found, p: float | None) -> _Found:
    """The outcome by its p-value, if it has one."""
    if p is None:
        return each
    fine = p > _LEVEL
    what = "as often as they should" if fine else "more or less often than they should"
    note = f"The nearest simulations' truths lie below draws {what}: p = {p:.2g}."
    return replace(each, status="accepted" if fine else "refused", note=note)


def _stacked(found: list[_Found]) -> dict[str, Tensor]:
    """Draws of all data sets; NaN where there are none."""
    some = next((each.draws for each in found if each.draws), None)
    if some is None:
        raise ValueError(f"workflow: no data set has a posterior. {found[0].note}")
    return {
        k: torch.stack([each.draws.get(k, torch.full_like(v, torch.nan)) for each in found]) for k, v in some.items()
    }


@torch.no_grad()
def _one(posterior: ConditionedGuide, n: int) -> _Found:
    """The first of accepted, reweighted, moved that is enough."""
    with few_threads(n * sum(v.numel() for v in posterior.data.values() if isinstance(v, Tensor))):
        try:
            joint = Joint(posterior)
        except NoDensityError:
            return _Found(posterior.sample((n,)), "unchecked")
        least = max(n, _LEAST)
        weighed = _Weighed.of(joint, least)
        if not weighed.right(joint):
            weighed = weighed.joined(_Weighed.of(joint, (_PROPOSALS - 1) * least))
        return _judged(weighed, joint, n)


def _judged(weighed: _Weighed, joint: Joint, n: int) -> _Found:
    """The outcome by weighed draws."""
    verdict = weighed.verdict
    if weighed.right(joint):
        return _Found(joint.unpack(weighed.u[:n]), "accepted", verdict)
    if not weighed.log_p.isfinite().any():
        return _Found(joint.unpack(weighed.u[:n]), "refused", verdict)
    if verdict.k < verdict.threshold and verdict.ess > _DISTINCT * max(n, _LEAST):
        return _Found(joint.unpack(weighed.u[weighed.picked(n)]), "reweighted", verdict)
    chains = weighed.chains(n)
    still = not joint.discrete and settled(chains, joint)
    some = torch.randperm(len(chains.u), device="cpu")[:n]
    return _Found(joint.unpack(chains.u[some]), "moved" if still else "refused", verdict)


@dataclass(frozen=True)
class _Weighed:
    """Draws of the guide as vectors, the model's density there, and their log weights."""

    u: Tensor
    log_p: Tensor
    log_weight: Tensor

    @classmethod
    def of(cls, joint: Joint, count: int) -> _Weighed:
        """Fresh ones."""
        u = joint.sample(count)
        log_p = joint.log_p(u).double()
        return cls(u, log_p, (log_p - joint.log_q(u)).nan_to_num(-torch.inf))

    def joined(self, more: _Weighed) -> _Weighed:
        """Both together."""
        pairs = ((self.u, more.u), (self.log_p, more.log_p), (self.log_weight, more.log_weight))
        return _Weighed(*(torch.cat(pair) for pair in pairs))

    @cached_property
    def _array(self) -> np.ndarray:
        return self.log_weight.cpu().numpy()

    @cached_property
    def verdict(self) -> KHat:
        """What the weights say."""
        return judge(self._array, Exploration(correction=correction(self.u.double().cpu().numpy(), self._array)))

    def right(self, joint: Joint) -> bool:
        """Whether the draws can be used as they are: the weights change no mean and no sd, in the sites' own units."""
        if self.verdict.status not in ("exact", "good"):
            return False
        values = [v.reshape(len(v), -1).double() for v in joint.unpack(self.u).values()]
        return _changed(torch.cat(values, 1), torch.as_tensor(smoothed(self.log_weight.cpu())[0])) < _CHANGE

    def picked(self, n: int) -> Tensor:
        """Places of n draws by weight."""
        return picked(smoothed(self.log_weight.cpu())[0], n)

    def chains(self, n: int) -> Chains:
        """At least n chains in equal populations; each starts at draws of its own, picked by weight."""
        size = -(-max(n, _LEAST) // POPULATIONS)
        parts = self.log_weight.cpu().isfinite().nonzero()[:, 0].chunk(POPULATIONS)
        index = torch.cat([part[picked(smoothed(self.log_weight.cpu()[part])[0], size)] for part in parts])
        return Chains(self.u[index], self.log_p[index])


def _changed(draws: Tensor, weight: Tensor) -> float:
    """Largest change of a mean, in sds, or of a log sd of draws ``(n, F)`` by weights that sum to one."""
    weight = weight.to(draws)
    mean, sd = draws.mean(0), draws.std(0)
    there = weight @ draws
    log_sd = 0.5 * (weight @ (draws - there).square() / sd.square()).log()
    change = torch.maximum((there - mean).abs() / sd, log_sd.abs())
    return float(change[sd > 0].max()) if bool((sd > 0).any()) else 0.0
