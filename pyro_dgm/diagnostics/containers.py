"""ArviZ 0.x and 1.x behind one door: containers, the options that make them, their groups and their draws.

Groups are nested dictionaries ``{group: {variable: array (chain, draw, ...)}}``. ArviZ is imported only where a container of
its own is asked for; its two lines are told apart by version, since each accepts the other's calls in silence. Nothing here
needs torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from pyro_dgm.core.kinds import checked, shown
from pyro_dgm.core.warn import warn_user
from pyro_dgm.core.weights import K_LIMIT, arviz_major, psis, stratified

__all__ = [
    "Arrays",
    "CONTAINER",
    "ContainerOptions",
    "DATA_GROUPS",
    "Names",
    "RESERVED",
    "RUN",
    "RunOptions",
    "add_groups",
    "build",
    "coords_of",
    "dims_of",
    "fault_of",
    "group",
    "group_attrs",
    "has_group",
    "log_weights_of",
    "resample",
    "uniform_by_ks",
    "uniform_p",
    "with_defaults",
]

Arrays = dict[str, dict[str, np.ndarray]]
Names = dict[str, list[str]]  # dimensions of "variable" in every group, or of "group/variable" in one
DATA_GROUPS = ("observed_data", "constant_data", "predictions_constant_data")  # they have no draws
RESERVED = ("chain", "draw")  # ArviZ loses variables and dimensions of these names
_PARTS = ("groups", "dims", "coords", "attrs")  # of a container of dictionaries
_PAIRED = ("posterior", "sample_stats", "log_likelihood", "log_prior", "posterior_predictive", "predictions")


def build(
    groups: Arrays, dims: Names, coords: dict[str, Any], attrs: dict[str, dict[str, Any]], container: str = "auto"
) -> Any:
    """An ``InferenceData`` (0.x), a ``DataTree`` (1.x) or, with ``container="dict"``, plain dictionaries.

    Raises:
        ValueError: for an unknown container, or one that the installed ArviZ does not have.
    """
    major = arviz_major()
    offered = ["dict", "auto"] + {0: ["inferencedata"], 1: ["datatree"], None: []}[major]
    if container not in offered:
        raise ValueError(f"container={shown(container)}: expected one of {offered}.")
    if container == "dict" or major is None:
        return {"groups": groups, "dims": dims, "coords": coords, "attrs": attrs}
    try:
        datasets = {g: _dataset_of(g, v, dims, coords, attrs.get(g)) for g, v in groups.items() if v}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"The container's dimensions and coordinates do not fit its arrays: {error}") from error
    root = attrs.get("/", {})
    if major == 0:
        import arviz as az

        return az.InferenceData(attrs=root, **datasets)
    from xarray import DataTree

    tree = DataTree.from_dict(datasets)
    tree.attrs.update(root)
    return tree


def _dataset_of(
    group: str, values: dict[str, np.ndarray], dims: Names, coords: dict[str, Any], attrs: dict[str, Any] | None
) -> Any:
    """A group as an xarray dataset."""
    own = {k: dims.get(f"{group}/{k}", dims.get(k)) for k in values}
    options = {"dims": {k: v for k, v in own.items() if v is not None}, "coords": coords, "attrs": attrs}
    without_draws = group in DATA_GROUPS
    if arviz_major() == 0:
        import arviz as az

        return az.dict_to_dataset(values, default_dims=[] if without_draws else None, **options)
    import arviz_base

    return arviz_base.dict_to_dataset(values, sample_dims=[] if without_draws else list(RESERVED), **options)


def _is_tree(container: Any) -> bool:
    return type(container).__name__ == "DataTree"


def add_groups(container: Any, groups: Arrays, dims: Names, coords: dict[str, Any]) -> Any:
    """The container with more groups, changed in place; a group of the same name is replaced."""
    if isinstance(container, dict):
        container["groups"] |= groups
        container["dims"] = container.get("dims", {}) | dims
        container["coords"] = container.get("coords", {}) | coords
        return container
    for name, values in groups.items():
        data = _dataset_of(name, values, dims, coords_of(container) | coords, None)
        if _is_tree(container):
            container[name] = type(container)(data)
        else:
            if name in container.groups():
                del container[name]
            container.add_groups({name: data})
    return container


def _resampled(container: Any, index: np.ndarray) -> Any:
    """A copy with the given draws (of all chains, one after another) in one chain; weights are left out as spent."""
    if isinstance(container, dict):
        groups = {g: _take_rows(v, index) if g in _PAIRED else v for g, v in container["groups"].items()}
        groups["sample_stats"].pop("log_weight")
        attrs = {g: dict(v) for g, v in container.get("attrs", {}).items()}
        attrs.setdefault("sample_stats", {})["resampled"] = True
        return {**container, "groups": groups, "attrs": attrs}
    data = {g: _dataset(container, g) for g in _group_names(container)}
    data = {g: _take_draws(v, index) if g in _PAIRED else v for g, v in data.items()}
    data["sample_stats"] = data["sample_stats"].drop_vars("log_weight").assign_attrs(resampled=1)
    if _is_tree(container):
        return type(container).from_dict({"/": container.to_dataset(), **data})
    return type(container)(attrs=dict(container.attrs), **data)


def _take_rows(values: dict[str, np.ndarray], index: np.ndarray) -> dict[str, np.ndarray]:
    return {k: v.reshape(1, -1, *v.shape[2:])[:, index] for k, v in values.items()}


def _take_draws(data: Any, index: np.ndarray) -> Any:
    rows = data.stack(_row=RESERVED).isel(_row=index).drop_vars(["_row", *RESERVED])
    rows = rows.rename(_row="draw").expand_dims(chain=[0]).assign_coords(draw=np.arange(len(index)))
    return rows.transpose(*RESERVED, ...)


def _group_names(container: Any) -> list[str]:
    refuse_no_container(container)
    if isinstance(container, dict):
        return list(container["groups"])
    return list(container.children) if _is_tree(container) else list(container.groups())


def refuse_no_container(container: Any) -> None:
    """Refuse what is neither a container of ArviZ nor one of dictionaries with all its parts."""
    if isinstance(container, dict):
        wrong = [k for k in _PARTS if not isinstance(container.get(k, None if k == "groups" else {}), dict)]
        wrong += [k for k in container if k not in _PARTS]
        dims = {} if wrong else container.get("dims", {})
        wrong += [
            f"dims/{k}" for k, v in dims.items() if not (isinstance(v, list) and all(isinstance(d, str) for d in v))
        ]
        attrs = {} if wrong else container.get("attrs", {})
        wrong += [f"attrs/{k}" for k, v in attrs.items() if not isinstance(v, dict)]
        groups = {} if wrong else container["groups"]
        wrong += [f"groups/{k}" for k, v in groups.items() if not isinstance(v, dict)]
        wrong += [
            f"groups/{k}/{n}"
            for k, v in groups.items()
            if isinstance(v, dict)
            for n, x in v.items()
            if not _is_array(x)
        ]
        if wrong:
            raise ValueError(
                f"The container has missing or unknown parts: {wrong}; expected the dictionaries {list(_PARTS)}, of arrays in "
                "groups. Make it with pyro_dgm.from_svi(model, guide, ..., container='dict')."
            )
    elif isinstance(container, type) or not (_is_tree(container) or hasattr(container, "groups")):
        raise TypeError(
            f"Expected a container, got a {type(container).__name__}. Make it with pyro_dgm.from_svi(model, guide, ...)."
        )


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind in "biuf"


def _dataset(container: Any, name: str) -> Any:
    return container[name].to_dataset() if _is_tree(container) else container[name]


def has_group(container: Any, name: str) -> bool:
    """Whether the container holds the group."""
    return name in _group_names(container)


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
    """The attributes of a group, or of the whole container, which is "/"."""
    if isinstance(container, dict):
        return container.get("attrs", {}).get(name, {})
    return dict(container.attrs if name == "/" else container[name].attrs)


def dims_of(container: Any, group: str, name: str) -> list[str]:
    """Names of a variable's dimensions but chains and draws; those without a name in dictionaries are left out."""
    if isinstance(container, dict):
        dims = container.get("dims", {})
        return list(dims.get(f"{group}/{name}", dims.get(name, [])))
    return [str(k) for k in container[group][name].dims if k not in RESERVED]


def coords_of(container: Any) -> dict[str, Any]:
    """Labels of all dimensions but chains and draws."""
    if isinstance(container, dict):
        return container.get("coords", {})
    data = [_dataset(container, g) for g in _group_names(container)]
    return {str(k): np.asarray(v) for d in data for k, v in d.coords.items() if k not in RESERVED}


def log_weights_of(who: str, idata: Any) -> np.ndarray:
    """All log weights of a container, chains one after another."""
    stats = group(idata, "sample_stats")
    if "log_weight" not in stats:
        raise ValueError(
            f"{who}: sample_stats has no log_weight (log p - log q). Make the container with from_svi, of a guide with a "
            "density, and resample it once at most; an implicit one is judged by Adversarial_ELBO(...).diagnose()."
        )
    return np.asarray(stats["log_weight"], dtype=np.float64).ravel()


@checked(seed=0, num_samples=1)
def resample(idata: Any, num_samples: int | None = None, *, seed: int | None = None) -> Any:
    r"""A container whose draws are picked in proportion to :math:`w = p(x, \theta) / q(\theta)`, Pareto-smoothed.

    Stratified resampling, in random order. All groups of the posterior are picked together; ``log_weight`` is dropped,
    since it is spent, and the attribute ``resampled`` is set. What is repeated counts once: about ``ess`` draws of
    :func:`~pyro_dgm.khat` are distinct information, so ask for no more than you need.

    Args:
        idata: a container of :func:`~pyro_dgm.from_svi`.
        num_samples: number of draws; None for as many as there are.
        seed: makes the choice reproducible.

    Raises:
        ValueError: if the container has no importance weights.

    Warns:
        UserWarning: if Pareto k is 0.7 or more, or each row of a plate has a posterior of its own: the weights then cannot
            repair the draws.

    References:
        | Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72).

    Example:
        >>> import numpy as np
        >>> x = np.linspace(-2.0, 2.0, 400)[None]
        >>> draws = {"posterior": {"x": x}, "sample_stats": {"log_weight": x}}  # q is uniform, p grows with x
        >>> bool(resample({"groups": draws}, seed=0)["groups"]["posterior"]["x"].mean() > 0.8)
        True
    """
    log_weight, k = psis(log_weights_of("resample", idata))
    attrs = group_attrs(idata, "sample_stats")
    fault = f"k-hat is {k:.2f}; above {K_LIMIT} importance weights do not repair the draws"
    if attrs.get("rows_plate") and not attrs.get("rows_given"):
        fault = f"rows of plate '{attrs['rows_plate']}' are independent, and weights of all rows together do not repair each"
    elif k < K_LIMIT:
        fault = ""
    if fault:
        warn_user(f"resample: {fault}. See khat(idata).")
    n = num_samples or len(log_weight)
    rng = np.random.default_rng(seed)
    return _resampled(idata, rng.permutation(stratified(np.exp(log_weight), n, rng.random(n))))


# --- Ranks, and other numbers of (0, 1) that are uniform where all is right ---


def uniform_p(pit: np.ndarray, otherwise: Callable[[np.ndarray], float]) -> float:
    """p-value of uniformity: of ArviZ's ``pot_c``, as its pictures say it, or ``otherwise(pit)`` of lines that have no test.

    It holds for dependent numbers, too. Of 6,000 sets of 300 uniform numbers 1.2 % are rejected at 1 %.

    References:
        | Tesso & Vehtari (2026), arXiv 2603.02928.
    """
    if arviz_major() == 1:
        from arviz_stats.base import array_stats

        if hasattr(array_stats, "uniformity_test"):
            return float(array_stats.uniformity_test(pit)[0])
    return otherwise(pit)


def uniform_by_ks(pit: np.ndarray) -> float:
    """p-value of uniformity by Kolmogorov and Smirnov."""
    from scipy.stats import kstest

    return float(kstest(pit, "uniform").pvalue)


def fault_of(pit: np.ndarray) -> str:
    """What is wrong with the draws among which data or truths have these ranks: the larger of shift and spread."""
    m = len(pit)
    # both in their own standard deviations under uniformity
    shift = (pit.mean() - 0.5) * np.sqrt(12 * m)
    spread = (pit.var() - 1 / 12) / np.sqrt(1 / 180 / m)
    if abs(shift) > abs(spread):
        return "too low" if shift > 0 else "too high"
    return "too narrow" if spread > 0 else "too wide"


# --- Options that several functions share: names and defaults once, a wrong name refused with the known ones ---


class RunOptions(TypedDict, total=False):
    """How a model is run for many draws; :func:`~pyro_dgm.from_svi` says what each option does."""

    model_kwargs: dict[str, Any] | None
    parallel: bool | str
    batch_size: int | None
    seed: int | None


class ContainerOptions(RunOptions, total=False):
    """What a container holds besides; :func:`~pyro_dgm.from_svi` says what each option does."""

    log_likelihood: bool
    log_prior: bool
    posterior_predictive: bool
    prior: int
    predictions: tuple[Any, ...] | None
    constant_data: dict[str, Any] | None
    sites: Sequence[str] | None
    coords: dict[str, Any] | None
    dims: dict[str, list[str]] | None
    extra_event_dims: dict[str, list[str]] | None
    container: str


# None is the default where nothing else is said.
RUN: dict[str, Any] = dict.fromkeys(RunOptions.__annotations__) | {"parallel": "auto"}
CONTAINER: dict[str, Any] = (
    dict.fromkeys(ContainerOptions.__annotations__)
    | RUN
    | {
        "log_likelihood": True,
        "log_prior": True,
        "posterior_predictive": True,
        "prior": 500,
        "container": "auto",
    }
)


def with_defaults(function: Callable[..., Any], options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """All options, those that were not given at their defaults.

    Raises:
        TypeError: for a name that the function does not take.
    """
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        own = [k for k, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
        raise TypeError(
            f"{function.__name__}: got the unknown options {unknown}, expected some of {own + list(defaults)}."
        )
    return {**defaults, **options}
