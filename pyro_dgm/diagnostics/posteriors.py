"""Simulated data with known truth, and a posterior for each: what every check of calibration starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_dgm.core.devices import seeded
from pyro_dgm.model.program import Model, Program
from pyro_dgm.model.runs import Draws

__all__ = ["Amortised", "Experiment", "Posterior", "Refit", "experiment"]


class Posterior(Protocol):
    """The posterior for one data set."""

    def sample(self, sample_shape: tuple[int, ...]) -> Draws:
        """Draws ``{site: (*sample_shape, *site)}``."""

    def log_prob(self, values: Draws) -> Tensor:
        """Log density of such draws, shape ``sample_shape``. May be missing."""


class Amortised(Protocol):
    """Posteriors for any data set."""

    def condition(self, **data: Tensor) -> Posterior:
        """The posterior given ``{observed site: value}``.

        Data may have a leading dimension M, for M data sets at once. A posterior that serves them says so by ``lead = 1``;
        its draws are ``{site: (*sample_shape, M, *site)}`` and its log densities ``(*sample_shape, M)``.
        """


class Refit:
    """A guide that is fitted anew to every data set, as an :class:`Amortised` posterior.

    Args:
        model: the model whose data are simulated.
        train: ``train(conditioned_model, *args) -> guide``, the fit as a function.
        args: arguments of the model, without data.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model():
        ...     pyro.sample("x", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0))
        >>> def train(conditioned):
        ...     guide = dgm.AutoFlow(conditioned)
        ...     dgm.fit(dgm.STL_ELBO()(conditioned, guide), max_steps=5, progress=False)
        ...     return guide
        >>> Refit(model, train).condition(x=torch.tensor(1.0)).sample((3,))["mu"].shape
        torch.Size([3])
    """

    def __init__(self, model: Model, train: Callable[..., Any], *args: Any) -> None:
        self.model, self.train, self.args = model, train, args

    def condition(self, **data: Tensor) -> Any:
        """Fit to the data; parameters in Pyro's store are the fit's own."""
        conditioned = poutine.condition(self.model, data=data)
        with pyro.get_param_store().scope({"params": {}, "constraints": {}}) as state:
            guide = self.train(conditioned, *self.args)
        return _Fitted(conditioned, guide, self.args, state)


class _Fitted:
    def __init__(self, model: Model, guide: Any, args: Any, state: Any) -> None:
        self.model, self.guide, self.args, self.state = model, guide, args, state

    def sample(self, sample_shape: tuple[int, ...]) -> Draws:
        with pyro.get_param_store().scope(self.state):
            program = Program(self.model, self.guide, self.args, {}, "auto", who="Refit")
            values = program.guided(sample_shape[0]).values
        return {k: values[k] for k in program.sites("latent")}


@dataclass(frozen=True)
class Experiment:
    """M simulations and the posterior draws for each.

    Attributes:
        truth: ``{site: (M, *site)}``, drawn from the prior.
        draws: ``{site: (M, S, *site)}``, drawn from the posterior of the data that each truth gave.
        rank: share of draws whose density is below the truth's, ``(M,)``, with ties broken at random.
    """

    truth: dict[str, np.ndarray]
    draws: dict[str, np.ndarray]
    rank: np.ndarray | None = None


def experiment(model: Model | None, posterior: Any, args: Any, kwargs: Any, observed: Sequence[str] | None,
               simulations: int, draws: int, seed: int | None, density: bool = False,
               given: Any = None) -> Experiment:  # fmt: skip
    """Simulate M times from the model, or take M given simulations, and draw S times from the posterior of each.

    Raises:
        ValueError: if the model has no such observed site, or the posterior returns no latent of the model.
    """
    _refuse_no_posterior(posterior)
    with seeded(seed), torch.no_grad():
        program = None if model is None else Program(model, None, args, kwargs, draws={}, new=True)
        names, rows = (
            _simulated(program, observed, simulations) if given is None else _taken(given, observed, simulations)
        )
        data, m = {k: rows[k] for k in names}, len(next(iter(rows.values())))
        known = set(rows) if program is None else set(program.sites("latent")) | set(program.enumerable)
        made = _at_once(posterior, data, draws) or _each(posterior, data, draws)
        sites = [k for k in rows if k in made.draws and k in known and k not in names]
        if not sites:
            raise ValueError(
                f"The posterior returned {sorted(made.draws)}, none of which is a latent site of the model."
            )
        truth = {k: rows[k] for k in sites}
        drawn = {k: made.draws[k].reshape(m, draws, *truth[k].shape[1:]) for k in sites}
        rank = None
        if density:
            pairs = made.densities(truth) or [_joint(program, made, truth, data, i) for i in range(m)]
            rank = np.array([_rank(below, at) for below, at in pairs])
    return Experiment(_arrays(truth), _arrays(drawn), rank)


def _simulated(program: Program | None, observed: Sequence[str] | None, m: int) -> tuple[list[str], Draws]:
    if program is None:
        raise ValueError("model is None: expected a model that simulates, or simulations=dgm.simulate(...).")
    names: list[str] = list(observed or program.sites("observed"))
    _refuse_unknown(names, list(program.runs.layouts))
    table = program.forward(m)
    if table.lost:
        raise ValueError(f"The model cannot simulate its data: {'; '.join(table.lost.values())}.")
    values = table.values
    wanted = [*program.sites("latent"), *program.enumerable, *names]
    return names, {k: values[k] for k in dict.fromkeys(wanted)}


def _taken(given: Any, observed: Sequence[str] | None, m: int) -> tuple[list[str], Draws]:
    """The first M simulations that were given."""
    known: Any = getattr(given, "observed", ())
    names: list[str] = list(observed or known)
    _refuse_unknown(names, list(given))
    if getattr(given, "mask", None):
        raise ValueError(f"simulations: sites {sorted(given.mask)} are padded; calibrate on simulations of one size.")
    return names, {k: given[k][:m] for k in given}


def _arrays(values: Draws) -> dict[str, np.ndarray]:
    return {k: v.detach().cpu().double().numpy() for k, v in values.items()}


def _refuse_unknown(names: list[str], known: list[str]) -> None:
    if set(names) - set(known) or not names:
        raise ValueError(f"observed={names}: expected names of the model's data sites, which are among {known}.")


def _refuse_no_posterior(posterior: Any) -> None:
    if isinstance(posterior, type) or not (callable(getattr(posterior, "condition", None)) or callable(posterior)):
        raise TypeError(
            f"posterior={posterior!r}: expected an object with .condition(**data), or a function of {{site: value}} that "
            "returns draws {site: (S, *site)}."
        )


@dataclass
class _Made:
    """Posterior draws for M data sets ``{site: (M, S, *site)}``, and the posteriors: one for all, or one each."""

    draws: Draws
    together: Any = None
    each: Sequence[Any] = ()

    def densities(self, truth: Draws) -> list[tuple[np.ndarray, float]] | None:
        """Log densities of the draws and of the truth by the posteriors, if they have any."""
        if self.together is not None:
            draws = self.together.log_prob({k: v.transpose(0, 1) for k, v in self.draws.items()})
            at = self.together.log_prob({k: truth[k][None] for k in self.draws})
            return list(zip(draws.T.cpu().double().numpy(), at[0].tolist(), strict=True))
        if not callable(getattr(self.each[0], "log_prob", None)):
            return None
        one = lambda q, values: q.log_prob(values).detach().cpu().double().numpy()  # noqa: E731
        rows = [{k: v[i] for k, v in self.draws.items()} for i in range(len(self.each))]
        ats = [{k: truth[k][None, i] for k in self.draws} for i in range(len(self.each))]
        return [(one(q, r), float(one(q, t)[0])) for q, r, t in zip(self.each, rows, ats, strict=True)]


def _at_once(posterior: Any, data: Draws, draws: int) -> _Made | None:
    """All posteriors together; None where they are not for many data sets."""
    if not callable(getattr(posterior, "condition", None)) or isinstance(posterior, Refit):
        return None
    m = len(next(iter(data.values())))
    try:
        q = posterior.condition(**data)
    except Exception:  # whatever a posterior for one data set says of many
        return None
    if getattr(q, "lead", 0) != 1:
        return None
    made = q.sample((draws,))
    wrong = {k: tuple(v.shape) for k, v in made.items() if v.shape[:2] != (draws, m)}
    if wrong:
        raise ValueError(f"The posterior of {m} data sets gave draws of shapes {wrong}, expected ({draws}, {m}, ...).")
    return _Made({k: v.transpose(0, 1) for k, v in made.items()}, together=q)


def _each(posterior: Any, data: Draws, draws: int) -> _Made:
    m = len(next(iter(data.values())))
    made = [_posterior(posterior, {k: v[i] for k, v in data.items()}, draws) for i in range(m)]
    stacked = {k: torch.stack([drawn[k].reshape(draws, *drawn[k].shape[1:]) for drawn, _ in made]) for k in made[0][0]}
    return _Made(stacked, each=[q for _, q in made])


def _posterior(posterior: Any, data: Draws, draws: int) -> tuple[Draws, Any]:
    if callable(getattr(posterior, "condition", None)):
        with torch.enable_grad():
            q = posterior.condition(**data)
        return q.sample((draws,)), q
    return posterior(data), None


def _joint(program: Program | None, made: _Made, truth: Draws, data: Draws, i: int) -> tuple[np.ndarray, float]:
    """Log density of the draws and of the truth by the model, for posteriors without a density."""
    if program is None:
        raise ValueError("coverage: the posterior has no log_prob, so it needs the model's density: pass the model.")
    rows = {k: torch.cat([made.draws[k][i].reshape(-1, *v.shape[1:]), v[None, i]]) for k, v in truth.items()}
    conditioned = poutine.condition(program.model, data={k: v[i] for k, v in data.items()})
    how: Any = {"plate": True, "loop": False, "vmap": "auto"}[program.runs.how]
    n = len(next(iter(rows.values())))
    total = Program(conditioned, None, program.args, program.kwargs, how, draws=rows).scored(rows, n).total(n)
    return total[:-1].cpu().numpy(), float(total[-1])


def _rank(draws: np.ndarray, truth: float) -> float:
    """Where the truth stands among the draws, in (0, 1), uniform if it is one of them; ties are broken at random."""
    below, ties = (draws < truth).sum(), (draws == truth).sum()
    place = below + float(torch.rand(())) * (ties + 1)
    return float(place / (len(draws) + 1))
