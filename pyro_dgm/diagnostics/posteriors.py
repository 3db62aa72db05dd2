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

from pyro_dgm.diagnostics.draws import Model, Program
from pyro_dgm.diagnostics.runs import Draws

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
        """The posterior given ``{observed site: value}``."""


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
            program = Program(self.model, self.guide, self.args, {}, "auto")
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


def experiment(model: Model, posterior: Any, args: Any, kwargs: Any, observed: Sequence[str] | None, simulations: int,
               draws: int, seed: int | None, density: bool = False) -> Experiment:  # fmt: skip
    """Simulate M times from the model, and draw S times from the posterior of each.

    Raises:
        ValueError: if the model has no such observed site, or the posterior returns no latent of the model.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None), torch.no_grad():
        if seed is not None:
            torch.manual_seed(seed)
        program = Program(model, None, args, kwargs, draws={}, new=True)
        names = list(observed or program.sites("observed"))
        _refuse_unknown(program, names)
        table = program.forward(simulations)
        data = {k: table.values[k] for k in names}
        made = [_posterior(posterior, {k: v[i] for k, v in data.items()}, draws) for i in range(simulations)]
        sites = [k for k in program.sites("latent") + program.enumerable if k in made[0][0] and k not in names]
        if not sites:
            raise ValueError(
                f"The posterior returned {sorted(made[0][0])}, none of which is a latent site of the model."
            )
        truth = {k: table.values[k] for k in sites}
        drawn = {k: torch.stack([m[0][k].reshape(draws, *truth[k].shape[1:]) for m in made]) for k in sites}
        rank = None
        if density:
            pairs = [
                _densities(program, m, {k: v[i] for k, v in (truth | data).items()}, names) for i, m in enumerate(made)
            ]
            rank = np.array([_rank(below, at) for below, at in pairs])
    return Experiment(_arrays(truth), _arrays(drawn), rank)


def _arrays(values: Draws) -> dict[str, np.ndarray]:
    return {k: v.detach().cpu().double().numpy() for k, v in values.items()}


def _refuse_unknown(program: Program, names: list[str]) -> None:
    unknown = [k for k in names if k not in program.runs.layouts]
    if unknown or not names:
        known = list(program.runs.layouts)
        raise ValueError(f"observed={names}: expected names of the model's data sites, which are among {known}.")


def _posterior(posterior: Any, data: Draws, draws: int) -> tuple[Draws, Any]:
    if isinstance(posterior, type) or not (callable(getattr(posterior, "condition", None)) or callable(posterior)):
        raise TypeError(
            f"posterior={posterior!r}: expected an object with .condition(**data), or a function of {{site: value}} that "
            "returns draws {site: (S, *site)}."
        )
    if callable(getattr(posterior, "condition", None)):
        with torch.enable_grad():
            q = posterior.condition(**data)
        return q.sample((draws,)), q
    return posterior(data), None


def _densities(program: Program, made: tuple[Draws, Any], known: Draws, names: list[str]) -> tuple[np.ndarray, float]:
    """Log density of the draws and of the truth: the posterior's own, or the model's joint density."""
    drawn, q = made
    truth = {k: v[None] for k, v in known.items() if k not in names}
    if callable(getattr(q, "log_prob", None)):
        return q.log_prob(drawn).detach().cpu().double().numpy(), float(q.log_prob({k: truth[k] for k in drawn}))
    rows = {k: torch.cat([v, truth[k]]) for k, v in drawn.items()}
    conditioned = poutine.condition(program.model, data={k: known[k] for k in names})
    how: Any = {"plate": True, "loop": False, "vmap": "auto"}[program.runs.how]
    n = len(next(iter(rows.values())))
    total = Program(conditioned, None, program.args, program.kwargs, how, draws=rows).scored(rows, n).total(n)
    return total[:-1].cpu().numpy(), float(total[-1])


def _rank(draws: np.ndarray, truth: float) -> float:
    """Where the truth stands among the draws, in (0, 1), uniform if it is one of them; ties are broken at random."""
    below, ties = (draws < truth).sum(), (draws == truth).sum()
    place = below + float(torch.rand(())) * (ties + 1)
    return float(place / (len(draws) + 1))
