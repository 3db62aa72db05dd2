"""From arrays by site to a container: safe names, dimensions from plates, draws split into chains."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyro

from pyro_dgm.diagnostics.containers import DATA_GROUPS, Arrays, build
from pyro_dgm.model.program import Program
from pyro_dgm.model.runs import Table
from pyro_dgm.model.terms import Term

__all__ = ["contained", "likelihoods", "safe", "site_dims"]

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
