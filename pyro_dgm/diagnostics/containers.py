"""ArviZ 0.x and 1.x behind one door: the container and its groups.

The product is a nested dictionary ``{group: {variable: array (chain, draw, ...)}}`` with dims and coords; ArviZ is
imported only where a container of its own is asked for. The two lines are told apart by version: each accepts the
other's calls in silence.

From arrays by site to a container: safe names, dimensions from plates, draws split into chains.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyro

from pyro_dgm.core.weights import arviz_major
from pyro_dgm.model.program import Program
from pyro_dgm.model.runs import Table
from pyro_dgm.model.terms import Term

__all__ = [
    "Arrays",
    "DATA_GROUPS",
    "build",
    "contained",
    "coords_of",
    "extended",
    "group",
    "group_attrs",
    "has_group",
    "likelihoods",
    "picked",
    "safe",
    "site_dims",
]

Arrays = dict[str, dict[str, np.ndarray]]
DATA_GROUPS = ("observed_data", "constant_data", "predictions_constant_data")


def build(groups: Arrays, dims: dict[str, list[str]], coords: dict[str, Any], attrs: dict[str, dict[str, Any]],
          container: str = "auto") -> Any:  # fmt: skip
    """An ``InferenceData`` (0.x), a ``DataTree`` (1.x) or, with ``container="dict"``, plain dictionaries.

    Raises:
        ValueError: for an unknown container, or one that the installed ArviZ does not have.
    """
    major = arviz_major()
    offered = {"dict": True, "auto": True, "inferencedata": major == 0, "datatree": major == 1}
    if container not in offered or not offered[container]:
        raise ValueError(f"container={container!r}: expected one of {[k for k, ok in offered.items() if ok]}.")
    if container == "dict" or major is None:
        return {"groups": groups, "dims": dims, "coords": coords, "attrs": attrs}
    return _tree(groups, dims, coords, attrs) if major else _inference_data(groups, dims, coords, attrs)


def _inference_data(groups: Arrays, dims: Any, coords: Any, attrs: dict[str, dict[str, Any]]) -> Any:
    import arviz as az

    data = {g: _dataset_of(g, v, dims, coords, attrs.get(g)) for g, v in groups.items() if v}
    return az.InferenceData(attrs=attrs.get("/", {}), **data)


def _tree(groups: Arrays, dims: Any, coords: Any, attrs: dict[str, dict[str, Any]]) -> Any:
    from xarray import DataTree

    tree = DataTree.from_dict({g: _dataset_of(g, v, dims, coords, attrs.get(g)) for g, v in groups.items() if v})
    tree.attrs.update(attrs.get("/", {}))
    return tree


def _dataset_of(name: str, values: dict[str, np.ndarray], dims: dict[str, list[str]], coords: Any, attrs: Any) -> Any:
    """A group as an xarray dataset. ``dims["group/variable"]`` holds for one group, ``dims["variable"]`` for all."""
    own = {k: dims.get(f"{name}/{k}", dims.get(k)) for k in values}
    known = {k: v for k, v in own.items() if v is not None}
    if arviz_major() == 0:
        import arviz as az

        return az.dict_to_dataset(
            values, dims=known, coords=coords, attrs=attrs, default_dims=[] if name in DATA_GROUPS else None
        )
    import arviz_base

    sample_dims = [] if name in DATA_GROUPS else ["chain", "draw"]
    return arviz_base.dict_to_dataset(values, dims=known, coords=coords, attrs=attrs, sample_dims=sample_dims)


def extended(container: Any, groups: Arrays, dims: dict[str, list[str]], coords: dict[str, Any]) -> Any:
    """The container with more groups, changed in place; a group of the same name is replaced."""
    if isinstance(container, dict):
        container["groups"] |= groups
        container["dims"] |= dims
        return container
    for name, values in groups.items():
        data = _dataset_of(name, values, dims, coords_of(container) | coords, None)
        if hasattr(type(container), "from_dict") and not hasattr(container, "add_groups"):
            container[name] = type(container)(data)
        else:
            if name in container.groups():
                del container[name]
            container.add_groups({name: data})
    return container


def coords_of(container: Any) -> dict[str, Any]:
    """Labels of all dimensions but chains and draws."""
    if isinstance(container, dict):
        return container["coords"]
    data = [_dataset(container[g]) for g in _names(container)]
    return {str(k): np.asarray(v) for d in data for k, v in d.coords.items() if k not in ("chain", "draw")}


def has_group(container: Any, name: str) -> bool:
    """Whether the container holds the group."""
    if isinstance(container, dict):
        return name in container["groups"]
    return name in _names(container)


def group(container: Any, name: str) -> dict[str, np.ndarray]:
    """The group's variables as arrays, draws in front.

    Raises:
        ValueError: if the group is missing.
    """
    if not has_group(container, name):
        raise ValueError(f"The container has no group '{name}'. Make it with pyro_dgm.from_svi(model, guide, ...).")
    if isinstance(container, dict):
        return container["groups"][name]
    data = container[name]
    return {str(k): np.asarray(data[k].values) for k in data.data_vars}


def group_attrs(container: Any, name: str) -> dict[str, Any]:
    """The attributes of a group."""
    if isinstance(container, dict):
        return container.get("attrs", {}).get(name, {})
    return dict(container.attrs if name == "/" else container[name].attrs)


def picked(container: Any, groups: list[str], index: np.ndarray) -> Any:
    """A copy with the given draws (of all chains, one after another) in one chain; weights are left out as spent."""
    if isinstance(container, dict):
        kept = {g: _pick_arrays(v, index) if g in groups else v for g, v in container["groups"].items()}
        kept["sample_stats"].pop("log_weight")
        attrs = {g: dict(v) for g, v in container.get("attrs", {}).items()}
        attrs.setdefault("sample_stats", {})["resampled"] = True
        return {**container, "groups": kept, "attrs": attrs}
    data = {g: _dataset(container[g]) for g in _names(container)}
    data |= {g: _pick_draws(data[g], index) for g in groups}
    data["sample_stats"] = data["sample_stats"].drop_vars("log_weight").assign_attrs(resampled=1)
    if hasattr(type(container), "from_dict"):  # DataTree
        return type(container).from_dict({"/": _dataset(container), **data})
    return type(container)(attrs=dict(container.attrs), **data)


def _names(container: Any) -> list[str]:
    return list(container.groups()) if callable(container.groups) else list(container.children)


def _dataset(data: Any) -> Any:
    return data.to_dataset() if hasattr(data, "to_dataset") else data


def _pick_arrays(values: dict[str, np.ndarray], index: np.ndarray) -> dict[str, np.ndarray]:
    return {k: v.reshape(1, -1, *v.shape[2:])[:, index] for k, v in values.items()}


def _pick_draws(data: Any, index: np.ndarray) -> Any:
    rows = data.stack(_row=("chain", "draw")).isel(_row=index).drop_vars(["_row", "chain", "draw"])
    rows = rows.rename(_row="draw").expand_dims(chain=[0]).assign_coords(draw=np.arange(len(index)))
    return rows.transpose("chain", "draw", ...)


_RESERVED = ("chain", "draw")


def contained(
    program: Program, groups: Arrays, dims: dict[str, list[str]] | None, coords: dict[str, Any] | None,
    attrs: dict[str, Any], container: str, chains: int = 1, method: str = "svi",
    event_dims: dict[str, list[str]] | None = None,
) -> Any:  # fmt: skip
    """The groups as a container: names made safe, draws split into chains, plates as dimensions."""
    names = {k: safe(k, program.who) for k in sorted({k for g in groups.values() for k in g} | _plates(program))}
    named = {
        k: [names.get(d, d) for d in v]
        for k, v in (site_dims(program, groups, event_dims or {}) | (dims or {})).items()
    }
    root = {"inference_library": "pyro", "inference_library_version": pyro.__version__, "inference_method": method}
    split = {g: {names[k]: split_chains(a, g, chains) for k, a in v.items()} for g, v in groups.items()}
    all_attrs = {"/": root | {"creation_library": "pyro_dgm"}, "sample_stats": attrs}
    safe_dims = {"/".join(names.get(part, part) for part in k.split("/")): v for k, v in named.items()}
    return build(split, safe_dims, coords or {}, all_attrs, container)


def split_chains(values: np.ndarray, group: str, chains: int) -> np.ndarray:
    """Draws as ``(chain, draw, ...)``; prior draws are one chain, data have none."""
    if group in DATA_GROUPS:
        return values
    rows = 1 if group.startswith("prior") or group == "predictions_prior" else chains
    return values.reshape(rows, -1, *values.shape[1:])


def safe(name: str, who: str = "") -> str:
    """ArviZ loses a variable or dimension named ``chain`` or ``draw``; warned of where a function is named."""
    if name not in _RESERVED:
        return name
    if who:
        warnings.warn(f"{who}: '{name}' is a dimension of ArviZ; it is stored as '{name}_'.", stacklevel=5)
    return f"{name}_"


def _plates(program: Program) -> set[str]:
    return {f.name for layout in program.runs.layouts.values() for f in layout.plates}


def site_dims(program: Program, groups: Arrays, event_dims: dict[str, list[str]]) -> dict[str, list[str]]:
    """Dimension names of all sites: plates, then ``event_dims``, then ArviZ's own numbering."""
    named = {}
    for name in {k for g in groups.values() for k in g} & set(program.runs.layouts):
        layout, infer = program.runs.layouts[name], program.prototype.nodes[name]["infer"]
        plates, event = [f.name for f in layout.plates], list(event_dims.get(name, infer.get("event_dims", [])))
        if len(plates) == len(layout.batch):
            fits = len(event) == len(layout.event)
            named[name] = plates + (event if fits else [f"{name}_dim_{i}" for i in range(len(layout.event))])
            named[f"log_likelihood/{name}"] = named[f"log_prior/{name}"] = plates
    return named


def likelihoods(
    program: Program, table: Table, observed: dict[str, np.ndarray], coords: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """Pointwise log-likelihoods in nats, their dimensions and labels; what was not seen is left out.

    Not seen is what a mask hides and what is NaN. The rest keeps its labels under the dimension ``<site>_seen``.
    """
    arrays: dict[str, np.ndarray] = {}
    dims: dict[str, list[str]] = {}
    labels: dict[str, np.ndarray] = {}
    for name, term in table.terms.items():
        if term.likelihood is None:
            continue
        values = term.likelihood.double().cpu().numpy()
        plates = [plate for plate, _ in sorted(term.axes.items(), key=lambda item: item[1])]
        seen = _seen(program, table, observed, term, plates)
        if seen.all():
            arrays[name] = values
            dims |= {f"log_likelihood/{name}": plates} if len(plates) == values.ndim - 1 else {}
        elif seen.any():
            arrays[name], row = values[:, seen], f"{name}_seen"
            dims[f"log_likelihood/{name}"] = [row]
            labels[row] = _labels(seen, plates, coords)
    return arrays, dims, labels


def _seen(program: Program, table: Table, observed: dict[str, np.ndarray], term: Term, plates: list[str]) -> np.ndarray:
    """Rows of a term in which any of its observed sites has a datum."""
    shape = tuple(term.joint.shape[1:])
    rows = np.zeros(shape, dtype=bool)
    for name in term.observed:
        data, axes = observed[name], program.runs.layouts[name].axes
        there = ~np.isnan(data) if data.dtype.kind == "f" else np.ones(data.shape, dtype=bool)
        if name in table.masks:
            mask = table.masks[name].cpu().numpy()
            there = there & mask.reshape(mask.shape + (1,) * (there.ndim - mask.ndim))
        if len(plates) == len(shape):
            there = np.moveaxis(there, [axes[p] - 1 for p in plates], range(len(plates)))
        rows |= there.reshape(*shape, -1).any(-1)
    return rows


def _labels(seen: np.ndarray, plates: list[str], coords: dict[str, Any]) -> np.ndarray:
    if len(plates) == 1 and plates[0] in coords:
        return np.asarray(coords[plates[0]])[seen]
    return np.flatnonzero(seen)
