"""The groups of a container, from a model and posterior draws, whoever made them.

Log likelihood, predictions and prior are made here; what only the maker of the draws knows (log q, divergences) it adds to
``sample_stats`` itself. A group that the model cannot give is left out, with a warning.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyro
from torch import Tensor

from pyro_dgm.core.devices import as_array
from pyro_dgm.core.warn import warn_user
from pyro_dgm.diagnostics.containers import DATA_GROUPS, RESERVED, Arrays, ContainerOptions, Names, build
from pyro_dgm.model.handlers import Undrawn
from pyro_dgm.model.program import Model, Program
from pyro_dgm.model.runs import Draws, Table
from pyro_dgm.model.terms import Term

__all__ = [
    "Groups",
    "all_groups",
    "at_new_arguments",
    "container_of",
    "laid_out",
    "log_likelihoods",
    "log_priors",
    "predictions_of",
    "predictive",
    "renamed",
]


@dataclass
class Groups:
    """Groups of arrays ``(n, ...)``, with the dimension names and labels that the model's plates do not give."""

    arrays: Arrays = field(default_factory=dict)
    dims: Names = field(default_factory=dict)
    coords: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Groups) -> None:
        """Take the other's groups, but for empty ones."""
        self.arrays |= {g: v for g, v in other.arrays.items() if v}
        self.dims |= other.dims
        self.coords |= other.coords

    def weigh(self, log_q: np.ndarray | None) -> np.ndarray | None:
        """Store log q and the log weights, lp - log q; None where one of the two densities is not known."""
        stats = self.arrays["sample_stats"]
        if log_q is None:
            return None
        stats["log_q"] = log_q
        if "lp" not in stats:
            return None
        stats["log_weight"] = stats["lp"] - log_q
        return stats["log_weight"]


# --- From the model to groups ---


def all_groups(program: Program, draws: Draws, n: int, scored: Table, options: ContainerOptions) -> Groups:
    """Every group that was asked for, from n posterior draws and the terms of their log joint."""
    names = _stored_sites(program, options["sites"])
    completed = program.completed(draws, n, names, options["batch_size"])
    observed = program.observed(draws)
    groups = Groups({"posterior": {k: program.array(completed, k) for k in names}, "sample_stats": {}})
    if program.has_density:
        groups.arrays["sample_stats"]["lp"] = scored.total(n).cpu().numpy()
    if options["log_likelihood"]:
        groups.add(log_likelihoods(program, scored, observed, options["coords"] or {}))
    if options["log_prior"]:
        groups.add(log_priors(program, scored, names))
    if options["posterior_predictive"]:
        complete = draws | {k: completed.values[k] for k in program.enumerable if k in completed.values}
        groups.add(_attempt("posterior_predictive", partial(predictive, program, complete, n, options["batch_size"])))
    if options["predictions"] is not None:
        groups.add(_predictions(program, draws, options))
    groups.add(_prior_groups(program, options["prior"], names))
    groups.add(Groups({"observed_data": observed, "constant_data": _as_arrays(options["constant_data"] or {})}))
    return groups


def _stored_sites(program: Program, sites: Sequence[str] | None) -> list[str]:
    names = program.sites("latent") + program.enumerable + program.sites("deterministic")
    unknown = [k for k in sites or () if k not in names]
    if unknown:
        raise ValueError(
            f"sites={list(sites or ())}: {unknown} are no latent or deterministic sites of the model; it has {names}."
        )
    return names if sites is None else [k for k in names if k in sites]


def log_likelihoods(
    program: Program, scored: Table, observed: Mapping[str, np.ndarray], coords: Mapping[str, Any]
) -> Groups:
    """Pointwise log-likelihoods in nats of what was seen; a warning names data that have none.

    Not seen is what a mask hides and what is NaN. The rest keeps its labels under the dimension ``<site>_seen``.
    """
    arrays: dict[str, np.ndarray] = {}
    groups = Groups({"log_likelihood": arrays})
    for name, term in scored.terms.items():
        if term.likelihood is None:
            continue
        values = term.likelihood.double().cpu().numpy()
        plates = [plate for plate, _ in sorted(term.axes.items(), key=lambda item: item[1])]
        seen = _seen(program, scored, observed, term, plates)
        if seen.all():
            arrays[name] = values
            if len(plates) == values.ndim - 1:
                groups.dims[f"log_likelihood/{name}"] = plates
        elif seen.any():
            row = f"{name}_seen"
            arrays[name] = values[:, seen]
            groups.dims[f"log_likelihood/{name}"] = [row]
            groups.coords[row] = _labels(seen, plates, coords)
    _say_what_has_no_likelihood(program, scored)
    return groups


def _seen(
    program: Program, scored: Table, observed: Mapping[str, np.ndarray], term: Term, plates: list[str]
) -> np.ndarray:
    """Rows of a term in which any of its observed sites has a datum."""
    shape = tuple(term.joint.shape[1:])
    rows = np.zeros(shape, dtype=bool)
    for name in term.observed:
        data = observed[name]
        there = ~np.isnan(data) if data.dtype.kind == "f" else np.ones(data.shape, dtype=bool)
        if name in scored.masks:
            mask = scored.masks[name].cpu().numpy()
            there = there & mask.reshape(mask.shape + (1,) * (there.ndim - mask.ndim))
        if len(plates) == len(shape):
            axes = program.runs.layouts[name].axes
            there = np.moveaxis(there, [axes[p] - 1 for p in plates], range(len(plates)))
        rows |= there.reshape(*shape, -1).any(-1)
    return rows


def _labels(seen: np.ndarray, plates: list[str], coords: Mapping[str, Any]) -> np.ndarray:
    if len(plates) == 1 and plates[0] in coords:
        return np.asarray(coords[plates[0]])[seen]
    return np.flatnonzero(seen)


def _say_what_has_no_likelihood(program: Program, scored: Table) -> None:
    known = {k for term in scored.terms.values() if term.likelihood is not None for k in term.observed}
    missing = [k for k in program.sites("observed") if k not in known]
    if not missing:
        return
    why = "they have no density"
    if program.enumerable:
        why = "a discrete site is summed out over all of their rows together"
    warn_user(f"{program.who}: no log_likelihood of {missing}, since {why}.")


def log_priors(program: Program, scored: Table, names: Collection[str]) -> Groups:
    """Log density of the named latents given the sites before them, in nats."""
    known = {k: scored.terms[k] for k in program.sites("latent") if k in scored.terms and k in names}
    return Groups({"log_prior": {k: term.joint.double().cpu().numpy() for k, term in known.items()}})


def predictive(program: Program, draws: Draws, n: int, batch_size: int | None) -> Groups:
    """New data for posterior draws, of all sites that can be drawn."""
    data = program.sites("observed")
    return _from_table(program, program.redrawn(draws, n, data, batch_size), {"posterior_predictive": data})


def _from_table(program: Program, table: Table, sites: Mapping[str, Collection[str]]) -> Groups:
    """Sites of a run by group; a warning for each that could not be drawn."""
    for group, names in sites.items():
        for name in [k for k in table.lost if k in names]:
            warn_user(
                f"{group} lacks site '{name}': {table.lost[name].strip().rstrip('.')}. Other sites are there; what depends "
                f"on '{name}' was drawn given its data. Give its distribution a sampler whose draws have the shape of the "
                "data (a plate, or .expand)."
            )
    return Groups({g: {k: program.array(table, k) for k in names if k in table.values} for g, names in sites.items()})


def _prior_groups(program: Program, n: int, names: list[str]) -> Groups:
    if not n:
        return Groups()
    try:
        table = program.forward(n)
    except Undrawn as error:
        if not error.anew:
            _say_missing("prior and no prior_predictive", error)
            return Groups()
        _say_missing("prior_predictive", error)
        return _attempt("prior", lambda: _from_table(program, program.prior(n), {"prior": names}))
    return _from_table(program, table, {"prior": names, "prior_predictive": program.sites("observed")})


def _predictions(program: Program, draws: Draws, options: ContainerOptions) -> Groups:
    args, kwargs = _arguments(options["predictions"])
    sizes = _plate_sizes(program)

    def make() -> Groups:
        new = at_new_arguments(program.model, draws, args, kwargs)
        return predictions_of(new, draws, sizes, options["batch_size"])

    return _attempt("predictions", make)


def _plate_sizes(program: Program) -> dict[str, int]:
    return {f.name: f.size for layout in program.runs.layouts.values() for f in layout.plates}


def at_new_arguments(model: Model, draws: Draws, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """The model at other arguments than those that the draws belong to."""
    return Program(model, None, args, kwargs, draws=draws, new=True, who="predictions")


def predictions_of(program: Program, draws: Draws, sizes: Mapping[str, int], batch_size: int | None) -> Groups:
    """What the model says at new arguments, given posterior draws, and those arguments.

    Latents whose shape the new arguments change (local to new rows) are drawn anew, given the others. Plates of another
    size than in ``sizes`` are new dimensions.
    """
    given = {k: v for k, v in draws.items() if program.fits(k, v)}
    anew = [k for k in program.sites("latent") if k in draws and k not in given]
    if anew:
        warn_user(
            f"predictions: latent sites {anew} have another shape for the new arguments, so they belong to new rows and are "
            "drawn from the model given the other sites."
        )
    free = [k for k in program.sites("latent") + program.enumerable if k not in given]
    names = free + program.sites("observed") + program.sites("deterministic")
    table = program.redrawn(given, len(next(iter(draws.values()))), names, batch_size)
    groups = _from_table(program, table, {"predictions": names})
    groups.arrays["predictions_constant_data"] = _tensors_by_name(program)
    for k in groups.arrays["predictions"]:
        layout = program.runs.layouts[k]
        plates = [f.name if sizes.get(f.name, f.size) == f.size else f"{f.name}_new" for f in layout.plates]
        if len(plates) == len(layout.batch):
            groups.dims[f"predictions/{k}"] = plates + _numbered(k, len(layout.event))
    return groups


def _arguments(predictions: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(predictions, tuple) and len(predictions) == 2:
        args, kwargs = predictions
        if isinstance(args, (tuple, list)) and isinstance(kwargs, dict):
            return tuple(args), kwargs
    raise ValueError(
        f"predictions={type(predictions).__name__}: expected (args, kwargs), the model's new arguments as a tuple and a "
        "dictionary: predictions=((x_new,), {})."
    )


def _tensors_by_name(program: Program) -> dict[str, np.ndarray]:
    """The tensors among the arguments, by the names of the model's parameters."""
    try:
        bound = inspect.signature(program.model).bind(*program.args, **program.kwargs).arguments
    except (TypeError, ValueError):
        bound = dict(program.kwargs)
    return _as_arrays({k: v for k, v in bound.items() if isinstance(v, (Tensor, np.ndarray))})


def _as_arrays(data: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {k: as_array(v) if isinstance(v, Tensor) else np.asarray(v) for k, v in data.items()}


_REMEDIES = {
    "posterior_predictive": "The model must run on data that it draws itself; posterior_predictive=False asks for none",
    "predictions": "The model must run with these arguments, on data that it draws itself; predictions=None asks for none",
    "prior": "The model must run on all that its prior draws, and on such data; prior=0 asks for none",
}


def _attempt(group: str, make: Callable[[], Groups]) -> Groups:
    """The group, or none and a warning that says why; the rest of the container does not need it."""
    try:
        return make()
    except Exception as error:  # whatever the user's model raises
        _say_missing(group, error)
        return Groups()


def _say_missing(group: str, error: Exception) -> None:
    why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    remedy = _REMEDIES.get(group, _REMEDIES["prior"])
    warn_user(f"The container has no {group}: {why.strip().rstrip('.')}. All other groups are there. {remedy}.")


# --- From groups to a container ---


def container_of(
    program: Program, groups: Groups, options: ContainerOptions, attrs: dict[str, Any], chains: int, method: str
) -> Any:
    """The container that was asked for, with ``attrs`` on ``sample_stats``."""
    names = set(_plate_sizes(program)).union(*groups.arrays.values())
    for name in sorted(names & set(RESERVED)):
        warn_user(f"{program.who}: '{name}' is a dimension of ArviZ; it is stored as '{renamed(name)}'.")
    groups.dims |= options["dims"] or {}
    arrays, dims = laid_out(program, groups, chains, options["extra_event_dims"] or {})
    root = {"inference_library": "pyro", "inference_library_version": pyro.__version__, "inference_method": method}
    all_attrs = {"/": root | {"creation_library": "pyro_dgm"}, "sample_stats": attrs}
    return build(arrays, dims, groups.coords | (options["coords"] or {}), all_attrs, options["container"])


def laid_out(program: Program, groups: Groups, chains: int, event_dims: Names) -> tuple[Arrays, Names]:
    """Arrays and their dimensions as ArviZ takes them: draws split into chains, plates by name, no reserved names."""
    arrays = {g: {renamed(k): _in_chains(a, g, chains) for k, a in v.items()} for g, v in groups.arrays.items()}
    dims = _dims_of_sites(program, groups.arrays, event_dims) | groups.dims
    return arrays, {"/".join(map(renamed, k.split("/"))): list(map(renamed, v)) for k, v in dims.items()}


def renamed(name: str) -> str:
    """The name under which ArviZ can store a variable or a dimension."""
    return f"{name}_" if name in RESERVED else name


def _in_chains(values: np.ndarray, group: str, chains: int) -> np.ndarray:
    """Draws as ``(chain, draw, ...)``; prior draws are one chain, data have none."""
    if group in DATA_GROUPS:
        return values
    return values.reshape(1 if group.startswith("prior") else chains, -1, *values.shape[1:])


def _dims_of_sites(program: Program, arrays: Arrays, event_dims: Names) -> Names:
    """Dimension names of all sites: plates, then ``event_dims``, then ArviZ's own numbering."""
    dims: Names = {}
    for name in {k for v in arrays.values() for k in v} & set(program.runs.layouts):
        layout = program.runs.layouts[name]
        plates = [f.name for f in layout.plates]
        event = list(event_dims.get(name, program.prototype.nodes[name]["infer"].get("event_dims", [])))
        if len(plates) == len(layout.batch):
            dims[name] = plates + (event if len(event) == len(layout.event) else _numbered(name, len(layout.event)))
            dims[f"log_likelihood/{name}"] = plates
            dims[f"log_prior/{name}"] = plates
    return dims


def _numbered(name: str, n: int) -> list[str]:
    return [f"{name}_dim_{i}" for i in range(n)]
