"""The groups of a container, from a program and posterior draws that someone made."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from pyro_dgm.core.warn import warn_user
from pyro_dgm.diagnostics.containers import Arrays, contained, likelihoods
from pyro_dgm.model.handlers import Undrawn
from pyro_dgm.model.program import Program
from pyro_dgm.model.runs import Draws, Table

__all__ = [
    "Groups",
    "Options",
    "attempted",
    "data_arrays",
    "log_likelihoods",
    "predictions_of",
    "predictive",
    "groups_of",
    "say_lost",
]


@dataclass(frozen=True)
class Options:
    """What a container holds; the arguments of :func:`~pyro_dgm.from_svi` of the same names."""

    log_likelihood: bool = True
    log_prior: bool = False
    posterior_predictive: bool = True
    prior: int = 0
    predictions: tuple[Any, ...] | None = None
    constant_data: dict[str, Any] | None = None
    sites: Sequence[str] | None = None
    coords: dict[str, Any] | None = None
    dims: dict[str, list[str]] | None = None
    extra_event_dims: dict[str, list[str]] | None = None
    batch_size: int | None = None
    container: str = "auto"


@dataclass
class Groups:
    """Groups ``{group: {variable: (n, ...)}}`` with the dimension names and labels that plates do not give."""

    groups: Arrays
    dims: dict[str, list[str]] = field(default_factory=dict)
    coords: dict[str, Any] = field(default_factory=dict)

    def container(self, program: Program, options: Options, attrs: dict[str, Any], chains: int, method: str) -> Any:
        """The container that was asked for."""
        dims, coords = self.dims | (options.dims or {}), self.coords | (options.coords or {})
        return contained(
            program, self.groups, dims, coords, attrs, options.container, chains, method, options.extra_event_dims
        )


def groups_of(program: Program, draws: Draws, n: int, options: Options, scored: Table) -> Groups:
    """All groups but what only the maker of the draws knows (log q, divergences)."""
    names = _kept(program, options.sites)
    replayed = program.completed(draws, n, names, options.batch_size)
    made = Groups({"posterior": {k: program.array(replayed, k) for k in names}, "sample_stats": {}})
    observed = program.observed(draws)
    if program.has_density:
        made.groups["sample_stats"]["lp"] = scored.total(n).cpu().numpy()
    if options.log_likelihood:
        log_likelihoods(program, made, scored, observed, options.coords or {})
    if options.log_prior:
        made.groups["log_prior"] = log_priors(program, scored)
    if options.posterior_predictive:
        complete = draws | {k: replayed.values[k] for k in program.enumerable if k in replayed.values}
        given = partial(predictive, program, complete, n, options.batch_size)
        made.groups |= attempted("posterior_predictive", given) or {}
    if options.predictions is not None:
        predicted = _predictions(program, draws, options)
        made.groups |= predicted.groups
        made.dims |= predicted.dims
    made.groups |= _prior_groups(program, options.prior, names) | {"observed_data": observed}
    if options.constant_data:
        made.groups["constant_data"] = data_arrays(options.constant_data)
    return made


def _kept(program: Program, sites: Sequence[str] | None) -> list[str]:
    names = program.sites("latent") + program.enumerable + program.sites("deterministic")
    unknown = [k for k in sites or () if k not in names]
    if unknown:
        raise ValueError(
            f"sites={list(sites or ())}: {unknown} are no latent or deterministic sites of the model; it has {names}."
        )
    return names if sites is None else [k for k in names if k in sites]


def log_likelihoods(program: Program, made: Groups, scored: Table, observed: Any, coords: dict[str, Any]) -> None:
    """Add the pointwise log-likelihood; say which data have none."""
    arrays, dims, labels = likelihoods(program, scored, observed, coords)
    known = {k for term in scored.terms.values() if term.likelihood is not None for k in term.observed}
    missing = [k for k in program.sites("observed") if k not in known]
    if missing:
        why = (
            "a discrete site is summed out over all of their rows together"
            if program.enumerable
            else "they have no density"
        )
        warnings.warn(f"{program.who}: no log_likelihood of {missing}, since {why}.", stacklevel=4)
    if arrays:
        made.groups["log_likelihood"] = arrays
        made.dims |= dims
        made.coords |= labels


def log_priors(program: Program, scored: Table) -> dict[str, np.ndarray]:
    """Log density of every latent given the sites before it, in nats."""
    known = {k: scored.terms[k] for k in program.sites("latent") if k in scored.terms}
    return {k: t.joint.double().cpu().numpy() for k, t in known.items()}


_REMEDIES = {
    "posterior_predictive": "The model must run on data that it draws itself; posterior_predictive=False asks for none",
    "predictions": "The model must run with these arguments, on data that it draws itself; predictions=None asks for none",
    "prior": "The model must run on all that its prior draws, and on such data; prior=0 asks for none",
}


def attempted(name: str, make: Callable[[], Any]) -> Any:
    """What can be made, or None and a warning that says why it cannot; the rest of the container does not need it."""
    try:
        return make()
    except Exception as error:  # whatever the user's model raises
        _say_missing(name, error)
        return None


def _say_missing(groups: str, error: Exception) -> None:
    why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    remedy = _REMEDIES.get(groups, _REMEDIES["prior"])
    warn_user(f"The container has no {groups}: {why.strip().rstrip('.')}. All other groups are there. {remedy}.")


def say_lost(groups: str, lost: dict[str, str]) -> None:
    """Warn of each site of a group that could not be drawn."""
    for name, why in lost.items():
        warn_user(
            f"{groups} lacks site '{name}': {why.strip().rstrip('.')}. Other sites are there; what depends on '{name}' was "
            "drawn given its data. Give its distribution a sampler whose draws have the shape of the data (a plate, or "
            ".expand)."
        )


def predictive(program: Program, draws: Draws, n: int, batch_size: int | None) -> Arrays:
    """New data for posterior draws, of all sites that can be drawn."""
    redrawn = program.redrawn(draws, n, program.sites("observed"), batch_size)
    say_lost("posterior_predictive", redrawn.lost)
    known = [k for k in program.sites("observed") if k in redrawn.values]
    return {"posterior_predictive": {k: program.array(redrawn, k) for k in known}} if known else {}


def _predictions(program: Program, draws: Draws, options: Options) -> Groups:
    args, kwargs = _arguments(options.predictions)
    sizes = {f.name: f.size for layout in program.runs.layouts.values() for f in layout.plates}
    make = partial(predictions_of, program.model, draws, args, kwargs, sizes, options.batch_size)
    made = attempted("predictions", make)
    return Groups({}) if made is None else made[1]


def _prior_groups(program: Program, n: int, names: list[str]) -> Arrays:
    if not n:
        return {}
    data = program.sites("observed")
    try:
        table = program.forward(n)
    except Undrawn as error:
        if not error.anew:
            _say_missing("prior and no prior_predictive", error)
            return {}
        _say_missing("prior_predictive", error)
        data, table = [], attempted("prior", partial(program.prior, n)) or Table()
    say_lost("prior_predictive", {k: why for k, why in table.lost.items() if k in data})
    say_lost("prior", {k: why for k, why in table.lost.items() if k not in data})
    kept = {"prior": names, "prior_predictive": data}
    groups = {g: {k: program.array(table, k) for k in sites if k in table.values} for g, sites in kept.items()}
    return {g: v for g, v in groups.items() if v}


def predictions_of(model: Any, draws: Draws, args: Any, kwargs: Any, sizes: dict[str, int],
                   batch_size: int | None) -> tuple[Program, Groups]:  # fmt: skip
    """What the model says for other arguments, given posterior draws, and those arguments.

    Latents whose shape the new arguments change (local to new rows) are drawn anew, given the others. Plates of another
    size than in ``sizes`` are new dimensions.
    """
    new = Program(model, None, args, kwargs, draws=draws, new=True, who="predictions")
    anew = [k for k in new.sites("latent") if k in draws and not new.fits(k, draws[k])]
    if anew:
        warnings.warn(
            f"predictions: latent sites {anew} have another shape for the new arguments, so they belong to new rows and are "
            "drawn from the model given the other sites.",
            stacklevel=4,
        )
    given = {k: v for k, v in draws.items() if new.fits(k, v)}
    free = [k for k in new.sites("latent") + new.enumerable if k not in given]
    names = free + new.sites("observed") + new.sites("deterministic")
    table = new.redrawn(given, len(next(iter(draws.values()))), names, batch_size)
    say_lost("predictions", table.lost)
    names = [k for k in names if k in table.values]
    made = Groups({"predictions": {k: new.array(table, k) for k in names}})
    made.groups["predictions_constant_data"] = _named_tensors(new, args, kwargs)
    for k in names:
        layout = new.runs.layouts[k]
        plates = [f.name if sizes.get(f.name, f.size) == f.size else f"{f.name}_new" for f in layout.plates]
        if len(plates) == len(layout.batch):
            made.dims[f"predictions/{k}"] = plates + [f"{k}_dim_{i}" for i in range(len(layout.event))]
    return new, made


def _arguments(predictions: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(predictions, tuple) and len(predictions) == 2 and isinstance(predictions[1], dict):
        args = predictions[0] if isinstance(predictions[0], (tuple, list)) else None
        if args is not None:
            return tuple(args), predictions[1]
    raise ValueError(
        f"predictions={type(predictions).__name__}: expected (args, kwargs), the model's new arguments as a tuple and a "
        "dictionary: predictions=((x_new,), {})."
    )


def _named_tensors(program: Program, args: Any, kwargs: Any) -> dict[str, np.ndarray]:
    """The tensors among the arguments, by the names of the model's parameters."""
    try:
        bound = inspect.signature(program.model).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        bound = dict(kwargs)
    return data_arrays({k: v for k, v in bound.items() if isinstance(v, (Tensor, np.ndarray))})


def data_arrays(data: dict[str, Any]) -> dict[str, np.ndarray]:
    """Tensors, arrays and numbers as arrays."""
    return {k: v.detach().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for k, v in data.items()}
