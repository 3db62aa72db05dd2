"""``from_svi``: a variational posterior as an ArviZ container, with what is needed to judge and correct it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoDelta

from pyro_dgm.core.psis import psis
from pyro_dgm.core.sites import plate_frames
from pyro_dgm.diagnostics.containers import build
from pyro_dgm.diagnostics.draws import Model, Program
from pyro_dgm.diagnostics.explore import explore
from pyro_dgm.diagnostics.khat import Exploration, judge

__all__ = ["contained", "from_svi"]

_RESERVED = ("chain", "draw")


def from_svi(
    model: Model,
    guide: Model,
    *args: Any,
    num_samples: int = 1000,
    model_kwargs: dict[str, Any] | None = None,
    log_likelihood: bool = True,
    posterior_predictive: bool = True,
    prior: int = 500,
    coords: dict[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
    parallel: bool | str = "auto",
    check: bool = True,
    seed: int | None = None,
    container: str = "auto",
) -> Any:
    r"""Draw from a guide and collect everything ArviZ reads, draw by draw in pairs.

    Groups: ``posterior`` (latents and deterministic sites), ``sample_stats`` (``lp`` = :math:`\log p(x, \theta)`,
    ``log_q``, ``log_weight`` = lp - log_q, in nats, summed in float64), ``log_likelihood`` (per datum),
    ``posterior_predictive``, ``prior``, ``prior_predictive``, ``observed_data``. Dimensions take the names of the
    plates; ``infer={"event_dims": [...]}`` names a site's event dimensions. One chain of ``num_samples`` draws (R-hat
    needs two: it is NaN). The attributes of ``sample_stats`` hold k-hat, ELBO, evidence and their errors.

    Args:
        model, guide: Pyro programs.
        args, model_kwargs: their arguments, data included.
        num_samples: posterior draws.
        log_likelihood: whether to store it; it is ``num_samples`` times the number of data.
        posterior_predictive: whether to draw new data for every posterior draw.
        prior: number of prior and prior-predictive draws; 0 for none.
        coords: labels of dimensions (``{"school": names}``).
        dims: dimension names by variable, instead of the plates'.
        parallel: run all draws at once (True), one by one (False), or as a check allows ("auto").
        check: look around the draws by short Hamiltonian chains and for modes that they miss (autoguides over one vector;
            some 160 batched gradients of the model). :func:`~pyro_dgm.khat` uses what is found.
        seed: makes the draws reproducible, and leaves the global random state as it was.
        container: "auto" (what the installed ArviZ uses), "inferencedata", "datatree" or "dict" (needs no ArviZ).

    Raises:
        ValueError: for subsampled plates, point-estimate guides, and latents of the model that the guide lacks.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model(x=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("item", 8):
        ...         pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> guide = dgm.AutoFlow(model)
        >>> idata = dgm.from_svi(model, guide, torch.zeros(8), num_samples=50, prior=20, seed=0)
        >>> idata["log_likelihood"]["x"].dims
        ('chain', 'draw', 'item')
    """
    _refuse_point_estimates(guide)
    with torch.random.fork_rng(devices=[], enabled=seed is not None), pyro.get_param_store().scope(_store_state()):
        if seed is not None:
            torch.manual_seed(seed)
        guide(*args, **(model_kwargs or {}))  # lazy guides find their structure
        program = Program(model, guide, args, model_kwargs or {}, parallel)
        groups = _posterior_groups(program, num_samples, log_likelihood, posterior_predictive)
        groups |= _prior_groups(program, prior)
        explored = explore(model, guide, args, model_kwargs or {}) if check else Exploration()
    explored = replace(explored, correction=_correction(groups["posterior"], groups["sample_stats"]["log_weight"]))
    groups["observed_data"] = program.observed()
    attrs = {"guide": type(guide).__name__, **judge(groups["sample_stats"]["log_weight"], explored).attrs()}
    return contained(program, groups, dims, coords, attrs, container)


def _correction(posterior: dict[str, np.ndarray], log_weight: np.ndarray) -> float:
    """Largest change of a mean when the draws are importance-weighted, in standard deviations of the draws."""
    if len(log_weight) < 25:
        return 0.0
    draws = np.concatenate([v.reshape(len(v), -1) for v in posterior.values()], -1).astype(np.float64)
    sd = draws.std(0)
    change = np.abs(np.exp(psis(log_weight)[0]) @ draws - draws.mean(0))
    return float((change[sd > 0] / sd[sd > 0]).max(initial=0.0))


def _store_state() -> Any:
    """A copy of the param store, so that reading a guide leaves the user's store as it was."""
    state = pyro.get_param_store().get_state()
    return {k: dict(v) for k, v in state.items()}


def _posterior_groups(program: Program, n: int, log_likelihood: bool, predictive: bool) -> dict[str, Any]:
    guide_traces = program.guide_traces(n)
    traces = program.replayed(guide_traces, n)
    lp = program.joint(guide_traces, n) if program.enumerable else program.log_prob(traces, n)
    log_q = program.log_prob(guide_traces, n)
    names = program.sites("latent") + program.sites("deterministic")
    groups = {
        "posterior": {k: program.stack(traces, k, n) for k in names},
        "sample_stats": {"lp": lp, "log_q": log_q, "log_weight": lp - log_q},
    }
    if log_likelihood and program.enumerable:
        warnings.warn(
            f"from_svi: no log_likelihood, since {program.enumerable} are summed out over the whole data.", stacklevel=3
        )
    elif log_likelihood:
        groups["log_likelihood"] = {k: program.pointwise(traces, k, n) for k in program.sites("observed")}
    if predictive:
        redrawn = program.replayed(guide_traces, n, redraw=True)
        groups["posterior_predictive"] = {k: program.stack(redrawn, k, n) for k in program.sites("observed")}
    return groups


def _prior_groups(program: Program, n: int) -> dict[str, Any]:
    if not n:
        return {}
    try:
        traces = program.forward(n)
    except NotImplementedError as error:
        warnings.warn(f"from_svi: no prior draws, since a site cannot be sampled ({error}).", stacklevel=3)
        return {}
    names = program.sites("latent") + program.sites("deterministic")
    return {
        "prior": {k: program.stack(traces, k, n) for k in names},
        "prior_predictive": {k: program.stack(traces, k, n) for k in program.sites("observed")},
    }


def contained(
    program: Program, groups: dict[str, Any], dims: Any, coords: Any, attrs: dict[str, Any], container: str,
    chains: int = 1, method: str = "svi",
) -> Any:  # fmt: skip
    """The groups as a container: names made safe, draws split into chains, plates as dimensions."""
    named = _dims(program, groups) | (dims or {})
    root = {"inference_library": "pyro", "inference_library_version": pyro.__version__, "inference_method": method}
    renamed = {g: {_safe(k): v for k, v in group.items()} for g, group in groups.items()}
    split = {
        g: v if g == "observed_data" else {k: _by_chain(a, g, chains) for k, a in v.items()} for g, v in renamed.items()
    }
    all_attrs = {"/": root | {"creation_library": "pyro_dgm"}, "sample_stats": attrs}
    return build(split, {_safe(k): v for k, v in named.items()}, coords or {}, all_attrs, container)


def _by_chain(values: np.ndarray, group: str, chains: int) -> np.ndarray:
    rows = 1 if group.startswith("prior") else chains
    return values.reshape(rows, -1, *values.shape[1:])


def _dims(program: Program, groups: dict[str, Any]) -> dict[str, list[str]]:
    """Dimension names of all sites: plates, then ``event_dims``, then ArviZ's own numbering."""
    named = {}
    for name in {k for g in groups.values() for k in g} & set(program.prototype.nodes):
        site = program.prototype.nodes[name]
        plates = [] if site["fn"] is None else [_safe(f.name) for f in plate_frames(site)]
        batch = len(program.site_shape(name, "log_prob"))
        event = list(site["infer"].get("event_dims", []))
        if len(plates) == batch and not site["infer"].get("_deterministic"):
            named[name] = plates + (event or [f"{name}_dim_{i}" for i in range(site["fn"].event_dim)])
        elif site["infer"].get("_deterministic"):
            named[name] = _deterministic_dims(name, site, plates, event)
    return named


def _deterministic_dims(name: str, site: Any, plates: list[str], event: list[str]) -> list[str]:
    sizes = [f.size for f in plate_frames(site)]
    if list(site["value"].shape[: len(sizes)]) != sizes:
        plates = []
    rest = site["value"].dim() - len(plates)
    return plates + (event if len(event) == rest else [f"{name}_dim_{i}" for i in range(rest)])


def _safe(name: str) -> str:
    """ArviZ loses a variable or dimension named ``chain`` or ``draw``."""
    if name not in _RESERVED:
        return name
    warnings.warn(f"from_svi: '{name}' is a dimension of ArviZ; it is stored as '{name}_'.", stacklevel=5)
    return f"{name}_"


def _refuse_point_estimates(guide: Any) -> None:
    if isinstance(guide, AutoDelta):
        raise ValueError("from_svi: AutoDelta is a point estimate, not a posterior: it has no density and no weights.")
