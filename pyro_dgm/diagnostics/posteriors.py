"""Simulated data with known truth, and a posterior for each: what every check of calibration starts from."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_dgm.core.devices import seeded
from pyro_dgm.core.kinds import checked, shown
from pyro_dgm.core.pace import on_bar, show
from pyro_dgm.core.shapes import as_tensor_like, refuse_non_finite
from pyro_dgm.diagnostics.sharpness import Sharpness, sharpness_of
from pyro_dgm.model.program import Model, Program
from pyro_dgm.model.runs import Draws
from pyro_dgm.simulation.store import Simulations

__all__ = ["EXPERIMENT", "Experiment", "ExperimentOptions", "Refit", "experiment", "observed_names"]


class ExperimentOptions(TypedDict, total=False):
    """Simulations and draws of a calibration; :func:`~pyro_dgm.sbc` says what each option does."""

    observed: Sequence[str] | None
    num_simulations: int
    num_draws: int
    simulations: Mapping[str, Tensor] | None
    model_kwargs: dict[str, Any] | None
    seed: int | None
    progress: bool


EXPERIMENT: dict[str, Any] = dict.fromkeys(ExperimentOptions.__annotations__) | {
    "num_simulations": 300,
    "num_draws": 199,
    "progress": True,
}


class Refit:
    """A guide that is fitted anew to every data set, as an amortised posterior.

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

    @checked()
    def __init__(self, model: Model, train: Callable[..., Model], *args: Any) -> None:
        self.model = model
        self.train = train
        self.args = args

    def condition(self, **data: Tensor) -> _Fitted:
        """Fit to the data; parameters in Pyro's store are the fit's own."""
        conditioned = poutine.condition(self.model, data=data)
        with pyro.get_param_store().scope({"params": {}, "constraints": {}}) as state:
            guide = self.train(conditioned, *self.args)
        return _Fitted(conditioned, guide, self.args, state)


@dataclass
class _Fitted:
    model: Model
    guide: Model
    args: tuple[Any, ...]
    param_store: Any

    def sample(self, sample_shape: tuple[int, ...]) -> Draws:
        with pyro.get_param_store().scope(self.param_store):
            program = Program(self.model, self.guide, self.args, {}, who="Refit")
            values = program.guided(sample_shape[0]).values
        return {k: values[k] for k in program.sites("latent")}


_HOW: dict[str, bool | str] = {"plate": True, "loop": False, "vmap": "auto"}
_JUDGED = 100  # simulations whose joint density is asked, 10 ms each. Not measured further

Densities = tuple[np.ndarray, ...]  # of the draws, (M, S), and of the truths, (M,), in nats; empty where not known


@dataclass(frozen=True)
class Experiment:
    """M simulations and the posterior draws for each.

    Attributes:
        truth: ``{site: (M, *site)}``, drawn from the prior.
        draws: ``{site: (M, S, *site)}``, drawn from the posterior of the data that each truth gave.
        densities: log densities of the draws ``(M, S)`` and of the truths ``(M,)``; empty where not asked for.
        sharpness: how near to the truths the draws are.
    """

    truth: dict[str, np.ndarray]
    draws: dict[str, np.ndarray]
    densities: Densities
    sharpness: Sharpness


def experiment(
    model: Model | None,
    posterior: Any,
    args: tuple[Any, ...],
    options: ExperimentOptions,
    density: bool = False,
) -> Experiment:
    """Simulate M times from the model, or take M given simulations, and draw S times from the posterior of each.

    Raises:
        TypeError: if ``posterior`` is no posterior.
        ValueError: if the model has no such observed site, or the posterior returns no latent of the model.
    """
    if isinstance(posterior, type) or not (_is_amortised(posterior) or callable(posterior)):
        raise TypeError(
            f"posterior={shown(posterior)}: expected an object with .condition(**data), or a function of {{site: value}} that "
            "returns draws {site: (S, *site)}."
        )
    stage = "simulate" if options["simulations"] is None else "posteriors"
    with on_bar(stage, options["progress"]) as bar, seeded(options["seed"]), torch.no_grad():
        program = None
        if model is not None:
            program = Program(model, None, args, options["model_kwargs"] or {}, draws={}, new=True)
        rows, names = _simulations(program, options)
        data = {k: rows[k] for k in names} | _masks(
            program, posterior, options["simulations"], names, len(rows[names[0]])
        )
        drawn = _drawn(posterior, data, options["num_draws"], bar)
        latents = set(rows) if program is None else {*program.sites("latent"), *program.enumerable}
        sites = [k for k in rows if k in drawn.draws and k in latents and k not in names]
        if not sites:
            raise ValueError(
                f"The posterior returned {sorted(drawn.draws)}, none of which is a latent site of the model."
            )
        truth = {k: rows[k] for k in sites}
        for k, values in truth.items():
            refuse_non_finite("simulations", values, f"truths of '{k}'")
            if drawn.draws[k].shape[2:].numel() != values.shape[1:].numel():
                raise ValueError(
                    f"simulations: '{k}' has shape {tuple(values.shape[1:])} in each, and {tuple(drawn.draws[k].shape[2:])} in "
                    "the posterior's draws, expected the same."
                )
        draws = {k: drawn.draws[k].reshape(*drawn.draws[k].shape[:2], *truth[k].shape[1:]) for k in sites}
        judged = program is not None or drawn.has_model  # by the joint density
        densities = drawn.densities(truth) if density else _densities_if_known(drawn, truth, judged)
        joint: Densities = ()
        of_others = None
        if densities and len(densities[1]) > 1:
            of_others = drawn.at_truth({k: v.roll(1, 0) for k, v in truth.items()})
            if judged:
                joint = _joint_if_known(program, posterior, draws, truth, data, bar)
        arrays = (_arrays(truth), _arrays(draws))
        sharpness = sharpness_of(arrays[1], arrays[0], densities, of_others, joint)
        if density and not densities:
            densities = _joint_densities(program, drawn.draws, truth, data, bar)
    return Experiment(*arrays, densities, sharpness)


def _is_amortised(posterior: Any) -> bool:
    return callable(getattr(posterior, "condition", None))


def _arrays(values: Draws) -> dict[str, np.ndarray]:
    return {k: _array(v) for k, v in values.items()}


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()


# --- Truths and data ---


def _simulations(program: Program | None, options: ExperimentOptions) -> tuple[Draws, list[str]]:
    """M simulations, made or given, and the names of their data."""
    given = options["simulations"]
    m = options["num_simulations"]
    if given is not None:
        names = observed_names(given, options["observed"])
        _refuse_unknown(names, list(given))
        rows = {k: as_tensor_like("simulations", f"'{k}'", given[k], None) for k in given}
        sizes = {k: tuple(v.shape[:1]) for k, v in rows.items()}
        if len(set(sizes.values())) > 1 or () in sizes.values():
            raise ValueError(f"simulations: sites have first dimensions {sizes}, expected one number n of simulations.")
        return {k: v[:m] for k, v in rows.items()}, names
    if program is None:
        raise ValueError("model is None: expected a model that simulates, or simulations=dgm.simulate(...).")
    names = list(options["observed"] or program.sites("observed"))
    _refuse_unknown(names, list(program.runs.layouts))
    table = program.forward(m)
    if table.lost:
        raise ValueError(f"The model cannot simulate its data: {'; '.join(table.lost.values())}.")
    wanted = dict.fromkeys([*program.sites("latent"), *program.enumerable, *names])
    return {k: table.values[k] for k in wanted}, names


def _masks(program: Program | None, posterior: Any, given: Any, names: list[str], m: int) -> dict[str, Any]:
    """What of the data is there, ``{"mask": {site: (m, ...)}}``, for a guide that takes masks; nothing where all is.

    Raises:
        ValueError: where latents are padded, or a posterior, or a model, would take the padding for data.
    """
    if not isinstance(given, Simulations) or not given.mask:
        return {}
    takes = _is_amortised(posterior) and "mask" in inspect.signature(posterior.condition).parameters
    if set(given.mask) - set(names) or not takes or program is not None:
        raise ValueError(
            f"simulations: sites {sorted(given.mask)} are padded; expected masks of data sites alone, an AmortizedGuide, which "
            "takes them, and None in the place of the model. Otherwise calibrate on simulations of one size."
        )
    return {"mask": {k: v[:m] for k, v in given.mask.items()}}


def _rows(data: dict[str, Any], index: Any) -> dict[str, Any]:
    """One data set, or some, with what is there of them."""
    return {k: _rows(v, index) if k == "mask" else v[index] for k, v in data.items()}


def observed_names(simulations: Mapping[str, Tensor], observed: Sequence[str] | None) -> list[str]:
    """Names of the data sites: as given, or as the simulations know them."""
    if not observed and isinstance(simulations, Simulations):
        return list(simulations.observed)
    return list(observed or ())


def _refuse_unknown(names: list[str], known: list[str]) -> None:
    if set(names) - set(known) or not names:
        raise ValueError(f"observed={names}: expected names of the model's data sites, which are among {known}.")


# --- Posterior draws ---


@dataclass
class _Drawn:
    """Posterior draws for M data sets ``{site: (M, S, *site)}``, and their posteriors: one for all, or one for each."""

    draws: Draws
    together: Any = None
    each: Sequence[Any] = ()

    def densities(self, truth: Draws) -> Densities:
        """Log densities of the draws and of the truth by the posteriors, if they have any."""
        if self.together is not None:
            if not callable(getattr(self.together, "log_prob", None)):
                return ()
            draws = self.together.log_prob({k: v.transpose(0, 1) for k, v in self.draws.items()})
            return _array(draws.T), self.at_truth(truth)
        if not callable(getattr(self.each[0], "log_prob", None)):
            return ()
        of_draws = [q.log_prob({k: v[i] for k, v in self.draws.items()}) for i, q in enumerate(self.each)]
        return _array(torch.stack(of_draws)), self.at_truth(truth)

    @property
    def has_model(self) -> bool:
        """Whether the posteriors know their model, as amortised guides do."""
        q = self.together if self.together is not None else self.each[0]
        return hasattr(type(q), "model") or "model" in getattr(q, "__dict__", {})

    def at_truth(self, truth: Draws) -> np.ndarray:
        """Log densities of one value for each data set, ``(M,)``."""
        lacking = [k for k in self.draws if k not in truth]
        if lacking:
            raise ValueError(
                f"The simulations lack {lacking}, which the posterior draws: expected all of its sites there."
            )
        truth = {k: truth[k] for k in self.draws}
        if self.together is not None:
            return _array(self.together.log_prob({k: v[None] for k, v in truth.items()})[0])
        rows = [q.log_prob({k: v[None, i] for k, v in truth.items()})[0] for i, q in enumerate(self.each)]
        return _array(torch.stack(rows))


def _drawn(posterior: Any, data: Draws, n: int, bar: Any) -> _Drawn:
    """From all posteriors together where they are for many data sets, otherwise from one after the other."""
    m = len(next(iter(data.values())))
    show(bar, "posteriors", m)
    drawn = _draw_at_once(posterior, data, n, m)
    if drawn is None:
        return _draw_each(posterior, data, n, bar)
    bar.update(bar.total - bar.n)
    return drawn


def _draw_at_once(posterior: Any, data: Draws, n: int, m: int) -> _Drawn | None:
    """None where the posterior is not for many data sets."""
    if not _is_amortised(posterior) or isinstance(posterior, Refit):
        return None
    try:
        q = posterior.condition(**data)
    except Exception:  # whatever a posterior for one data set says of many
        return None
    if getattr(q, "lead", 0) != 1:
        return None
    draws = q.sample((n,))
    wrong = {k: tuple(v.shape) for k, v in draws.items() if v.shape[:2] != (n, m)}
    if wrong:
        raise ValueError(f"The posterior of {m} data sets gave draws of shapes {wrong}, expected ({n}, {m}, ...).")
    return _Drawn({k: v.transpose(0, 1) for k, v in draws.items()}, together=q)


def _draw_each(posterior: Any, data: Draws, n: int, bar: Any) -> _Drawn:
    """From one posterior after the other; a function has draws and no density."""
    draws = []
    posteriors = []
    for i in range(len(next(iter(data.values())))):
        row = _rows(data, i)
        q = None
        if _is_amortised(posterior):
            with torch.enable_grad():
                q = posterior.condition(**row)
        draws.append(posterior(row) if q is None else q.sample((n,)))
        posteriors.append(q)
        bar.update()
    stacked = {k: torch.stack([d[k].reshape(n, *d[k].shape[1:]) for d in draws]) for k in draws[0]}
    return _Drawn(stacked, each=posteriors)


def _joint_densities(
    program: Program | None, draws: Draws, truth: Draws, data: Draws, bar: Any, posterior: Any = None
) -> Densities:
    """Log joint densities of the draws and of the truth by the model; by the posterior's own where none was given."""
    if program is None and not _is_amortised(posterior):
        raise ValueError("coverage: the posterior has no log_prob, so it needs the model's density: pass the model.")
    totals = []
    m = len(next(iter(data.values())))
    show(bar, "joint densities", m)
    for i in range(m):
        rows = {k: torch.cat([draws[k][i].reshape(-1, *v.shape[1:]), v[None, i]]) for k, v in truth.items()}
        n = len(next(iter(rows.values())))
        row = _rows(data, i)
        if program is not None:
            conditioned = poutine.condition(program.model, data=row)
            how = _HOW[program.runs.how]
            one = Program(conditioned, None, program.args, program.kwargs, how, draws=rows)
        else:
            one = Program(posterior.condition(**row).model, None, (), {}, draws=rows)
            if one.runs.how == "loop":
                raise ValueError("The model runs one draw at a time.")
        if not one.has_density:
            raise ValueError("The model has no density.")
        totals.append(one.scored(rows, n).total(n))
        bar.update()
    joint = _array(torch.stack(totals))
    return joint[:, :-1], joint[:, -1]


def _densities_if_known(drawn: Any, truth: Draws, of_draws: bool) -> Densities:
    """Of truths, and of draws where asked; empty where the posterior has none: sharpness is told without, then."""
    try:
        if not set(drawn.draws) <= set(truth):
            return ()
        return drawn.densities(truth) if of_draws else (np.empty(0), drawn.at_truth(truth))
    except Exception:  # a log_prob of a user's own, which takes another kind of values
        return ()


def _joint_if_known(
    program: Program | None, posterior: Any, draws: Draws, truth: Draws, data: Draws, bar: Any
) -> Densities:
    """Of the first simulations; empty where the joint density is not known, or the model runs one draw at a time."""
    if program is not None and program.runs.how == "loop":
        return ()
    drawn, true, given = (_rows(each, slice(_JUDGED)) for each in (draws, truth, data))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _joint_densities(program, drawn, true, given, bar, posterior)
    except Exception:  # a model without a density, a posterior of some of its latents: whatever they say
        return ()
