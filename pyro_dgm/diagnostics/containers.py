"""ArviZ 0.x and 1.x behind one door: the container and its groups.

The product is a nested dictionary ``{group: {variable: array (chain, draw, ...)}}`` with dims and coords; ArviZ is
imported only where a container of its own is asked for. The two lines are told apart by version: each accepts the
other's calls in silence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_dgm.core.psis import arviz_major

__all__ = ["build", "group", "group_attrs", "has_group", "picked"]

Groups = dict[str, dict[str, np.ndarray]]

_DATA_GROUPS = ("observed_data", "constant_data", "predictions_constant_data")
_CLASSIC = ("posterior", "sample_stats", "log_likelihood", "posterior_predictive", "prior", "prior_predictive",
            "predictions", *_DATA_GROUPS)  # fmt: skip


def build(groups: Groups, dims: dict[str, list[str]], coords: dict[str, Any], attrs: dict[str, dict[str, Any]],
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


def _inference_data(groups: Groups, dims: Any, coords: Any, attrs: dict[str, dict[str, Any]]) -> Any:
    import arviz as az

    known = {g: v for g, v in groups.items() if g in _CLASSIC and v}
    idata = az.from_dict(**known, dims=dims, coords=coords, save_warmup=True, attrs=attrs.get("/", {}))
    others = {g: az.dict_to_dataset(v, dims=dims, coords=coords) for g, v in groups.items() if g not in _CLASSIC and v}
    if others:
        idata.add_groups(others)
    for name, values in attrs.items():
        if name != "/" and name in idata.groups():
            idata[name].attrs.update(values)
    return idata


def _tree(groups: Groups, dims: Any, coords: Any, attrs: dict[str, dict[str, Any]]) -> Any:
    import arviz_base

    full = {g: v for g, v in groups.items() if v}
    kept = {g: v for g, v in attrs.items() if g == "/" or g in full}
    return arviz_base.from_dict(
        full, dims=dims, pred_dims=dims, coords=coords, sample_dims=["chain", "draw"], attrs=kept
    )


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
    return dict(container[name].attrs)


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
