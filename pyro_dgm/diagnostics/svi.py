"""Guides that put a latent on a point: they have no density there, and their weights mean nothing.

``from_svi`` and ``from_fits``: variational posteriors as an ArviZ container, with what is needed to judge them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoDelta, AutoGuide
from torch.distributions import biject_to

from pyro_dgm.core.devices import seed_everywhere, seeded
from pyro_dgm.core.distribution import ImplicitDistribution
from pyro_dgm.core.weights import psis
from pyro_dgm.diagnostics.explore import explore
from pyro_dgm.diagnostics.groups import Options, groups_of
from pyro_dgm.diagnostics.khat import Exploration, judge
from pyro_dgm.model.program import Model, Program, refuse_guides_as_models
from pyro_dgm.model.runs import Table
from pyro_dgm.model.sites import is_data, latent_sites, sample_sites

__all__ = ["from_fits", "from_svi", "refuse_autodelta", "refuse_points"]

Site = dict[str, Any]


def refuse_autodelta(who: str, guide: Any) -> None:
    """Refuse the guide that is a point estimate by its name, before it is run."""
    if isinstance(guide, AutoDelta):
        raise ValueError(f"{who}: AutoDelta is a point estimate, not a posterior: it has no density and no weights.")


def refuse_points(program: Program, guided: Table) -> None:
    """Refuse a guide of which a continuous latent is a ``Delta`` without a density.

    That is a ``Delta`` of log density zero that is the same in all draws, or that no auxiliary draw spreads: the guide's
    ``Delta`` latents have more free coordinates than its auxiliary sites have entries. A ``Delta`` that repeats another
    draw, in a guide that has auxiliary entries to spare, is not found.
    """
    guide: Any = program.guide_runs
    nodes = dict(sample_sites(guide.prototype))
    if any(isinstance(_bare(s), ImplicitDistribution) for s in nodes.values()):
        return
    models = {k: s for k, s in latent_sites(program.prototype) if _is_continuous(s)}
    deltas = [k for k in models if k in nodes and isinstance(_bare(nodes[k]), Delta)]
    free = sum(_coordinates(models[k], nodes[k]) for k in deltas)
    entries = sum(s["value"].numel() for k, s in nodes.items() if _is_auxiliary(k, s, program))
    plain = [k for k in deltas if _coordinates(models[k], nodes[k]) and not bool(guided.terms[k].joint.any())]
    points = [k for k in plain if _constant(program, guided, k)] or (plain if free > entries else [])
    if points:
        raise ValueError(
            f"{program.who}: latent site '{points[0]}' of the guide ({type(program.guide).__name__}) is a Delta without a "
            "density: a point estimate, not a posterior, with no weights. Give it a distribution, AutoNormal for one; "
            "AutoLaplaceApproximation has one after laplace_approximation(*args)."
        )


def _bare(site: Site) -> Any:
    """The distribution without reshaping and masks around it."""
    fn = site["fn"]
    while not isinstance(fn, (ImplicitDistribution, Delta)) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _is_continuous(site: Site) -> bool:
    fn = _bare(site)
    return not isinstance(fn, Delta) and site["value"].is_floating_point() and not _is_discrete(site["fn"])


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):
        return bool(getattr(fn, "has_enumerate_support", False))


def _coordinates(model: Site, guide: Site) -> int:
    """How many free coordinates a value has: a simplex of K parts K - 1."""
    shape = guide["value"].shape
    try:
        return biject_to(model["fn"].support).inverse_shape(shape).numel()
    except (AttributeError, NotImplementedError):
        return shape.numel()


def _is_auxiliary(name: str, site: Site, program: Program) -> bool:
    """A draw of the guide's own that has a density."""
    return name not in program.prototype.nodes and not is_data(site) and not isinstance(_bare(site), Delta)


def _constant(program: Program, guided: Table, name: str) -> bool:
    values = guided.values[name]
    if len(values) < 2:
        values = torch.cat([values, program.guided(2).values[name]])
    return bool((values == values[:1]).all())


_UNASKED = "it was not asked for"


def from_svi(
    model: Model,
    guide: Model,
    *args: Any,
    num_samples: int = 1000,
    model_kwargs: dict[str, Any] | None = None,
    log_likelihood: bool = True,
    log_prior: bool = False,
    posterior_predictive: bool = True,
    prior: int = 500,
    predictions: tuple[Any, ...] | None = None,
    constant_data: dict[str, Any] | None = None,
    sites: Sequence[str] | None = None,
    coords: dict[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
    extra_event_dims: dict[str, list[str]] | None = None,
    parallel: bool | str = "auto",
    check: bool = True,
    batch_size: int | None = None,
    num_chains: int = 1,
    seed: int | None = None,
    container: str = "auto",
) -> Any:
    r"""Draw from a guide and collect everything ArviZ reads, draw by draw in pairs.

    Groups: ``posterior`` (latents and deterministic sites), ``sample_stats`` (``lp`` = :math:`\log p(x, \theta)`,
    ``log_q``, ``log_weight`` = lp - log_q, in nats, summed in float64), ``log_likelihood`` (per datum),
    ``posterior_predictive``, ``prior``, ``prior_predictive``, ``observed_data``, and on demand ``log_prior``,
    ``predictions``, ``constant_data``. Dimensions take the names of the plates; ``infer={"event_dims": [...]}`` names a
    site's event dimensions. The attributes of ``sample_stats`` hold k-hat, ELBO, evidence and their errors.

    A subsampled plate is visited row by row, a subsample at a time: all densities are those of the full data. Discrete
    sites marked for enumeration are summed out of ``lp`` and ``log_likelihood``, and drawn from their exact posterior.
    A guide with an implicit distribution has no ``log_q`` and no weights.

    Args:
        model, guide: Pyro programs.
        args, model_kwargs: their arguments, data included.
        num_samples: posterior draws, in each chain.
        log_likelihood: whether to store it; it is ``num_samples`` times the number of data.
        log_prior: whether to store the log density of every latent (``az.psens`` reads it).
        posterior_predictive: whether to draw new data for every posterior draw.
        prior: number of prior and prior-predictive draws; 0 for none.
        predictions: ``(args, kwargs)``, new arguments of the model, for which to predict.
        constant_data: inputs to keep beside the data, ``{name: array}``.
        sites: which latents and deterministic sites to store; None for all. A VAE's local latents may be too many.
        coords: labels of dimensions (``{"school": names}``).
        dims: dimension names by variable, instead of the plates'.
        extra_event_dims: event dimensions of sites that take no ``infer`` (deterministic ones).
        parallel: run all draws at once (True), one by one (False), or as a check allows ("auto").
        check: look around the draws by short Hamiltonian chains and for modes that they miss (autoguides over one vector;
            some 160 batched gradients of the model). :func:`~pyro_dgm.khat` uses what is found.
        batch_size: draws that the model runs at once, for less memory; None for all. Predictive draws depend on it.
        num_chains: into how many chains the draws are split. They are independent anyway: R-hat is one.
        seed: makes the draws reproducible, and leaves the global random state as it was.
        container: "auto" (what the installed ArviZ uses), "inferencedata", "datatree" or "dict" (needs no ArviZ).

    Raises:
        ValueError: for guides that put a latent on a point (a ``Delta`` without a density), latents that the guide lacks,
            subsampled plates whose data do not follow the index, masked latents under a guide with one joint density, and
            a guide in the place of the model.

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
    options = Options(log_likelihood, log_prior, posterior_predictive, prior, predictions, constant_data, sites, coords, dims,
                      extra_event_dims, batch_size, container)  # fmt: skip
    return _from_guides(
        model,
        [guide],
        args,
        model_kwargs,
        num_samples * num_chains,
        options,
        num_chains,
        parallel,
        check,
        seed,
        "from_svi",
    )


def from_fits(
    guides: Sequence[Model],
    model: Model,
    *args: Any,
    num_samples: int = 1000,
    model_kwargs: dict[str, Any] | None = None,
    log_likelihood: bool = True,
    posterior_predictive: bool = True,
    prior: int = 500,
    coords: dict[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
    parallel: bool | str = "auto",
    batch_size: int | None = None,
    seed: int | None = None,
    container: str = "auto",
) -> Any:
    """Independent fits of one model as the chains of one container: R-hat then compares the fits.

    The groups are those of :func:`from_svi`; every draw is weighted by the guide that made it, so the weights of all
    chains together are those of one posterior. ``sample_stats`` has the attribute ``khat_by_chain``.

    Args:
        guides: fitted guides, each from its own start and seed.
        model, args, model_kwargs: the model and its arguments.
        num_samples: draws of each guide.
        log_likelihood, posterior_predictive, prior, coords, dims, parallel, batch_size, seed, container: as in
            :func:`from_svi`.

    Raises:
        ValueError: for an empty list, and as :func:`from_svi`.

    Note:
        R-hat near one says that the fits agree, not that they are right: mean fields from many starts agree on the same
        too narrow posterior. Read it with :func:`~pyro_dgm.khat`.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model(x):
        ...     pyro.sample("x", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=x)
        >>> fits = [dgm.AutoFlow(model, init_scale=s).setup(torch.tensor(0.0)) for s in (0.5, 1.0)]
        >>> from_fits(fits, model, torch.tensor(0.0), num_samples=50, prior=0)["posterior"]["mu"].shape
        (2, 50)
    """
    if isinstance(guides, AutoGuide) or not isinstance(guides, Iterable):
        raise ValueError(
            f"from_fits: guides is one {type(guides).__name__}; expected a list of fitted guides, then the model."
        )
    if not guides:
        raise ValueError("from_fits: got an empty list of guides; expected one or more fitted guides.")
    options = Options(log_likelihood, False, posterior_predictive, prior, coords=coords, dims=dims, batch_size=batch_size,
                      container=container)  # fmt: skip
    return _from_guides(
        model, guides, args, model_kwargs, num_samples, options, len(guides), parallel, False, seed, "from_fits"
    )


def _from_guides(model: Model, guides: Sequence[Any], args: Any, model_kwargs: Any, n: int, options: Options, chains: int,
                 parallel: bool | str, check: bool, seed: int | None, who: str) -> Any:  # fmt: skip
    refuse_guides_as_models(who, model)
    kwargs = model_kwargs or {}
    for guide in guides:
        refuse_autodelta(who, guide)
    with seeded(seed), pyro.get_param_store().scope(_store_state()):
        _seed(seed)
        for guide in guides:
            guide(*args, **kwargs)  # lazy guides find their structure, by draws of their own
        _seed(seed)
        programs = [Program(model, guide, args, kwargs, parallel, who=who) for guide in guides]
        program, total = programs[0], n * len(guides)
        guided = [p.guided(n) for p in programs]
        for fit, made_by in zip(programs, guided, strict=True):
            refuse_points(fit, made_by)
        draws = {k: torch.cat([g.values[k] for g in guided]) for k in program.sites("latent")}
        scored = program.scored(draws, total, options.batch_size)
        made = groups_of(program, draws, total, options, scored)
        log_q = _log_q(programs, guided, scored, n)
        weighted = log_q is not None and program.has_density
        explored = Exploration(unseen=_UNASKED)
        if check and weighted:
            explored = explore(model, guides[0], args, kwargs, how=program.density_how)
    stats, attrs = made.groups["sample_stats"], {"guide": type(guides[0]).__name__}
    if log_q is not None:
        stats["log_q"] = log_q
    if weighted:
        stats["log_weight"] = stats["lp"] - stats["log_q"]
        attrs |= _verdict(made.groups["posterior"], stats["log_weight"], explored, len(guides))
    return made.container(program, options, attrs, chains, "svi")


def _seed(seed: int | None) -> None:
    if seed is not None:
        seed_everywhere(seed)


def _log_q(programs: list[Program], guided: list[Any], scored: Any, n: int) -> np.ndarray | None:
    rows = [p.log_q(g, scored, n) for p, g in zip(programs, guided, strict=True)]
    return None if any(r is None for r in rows) else np.concatenate([r for r in rows if r is not None])


def _verdict(
    posterior: dict[str, np.ndarray], log_weight: np.ndarray, explored: Exploration, fits: int
) -> dict[str, Any]:
    explored = replace(explored, correction=_correction(posterior, log_weight))
    each = {"khat_by_chain": [judge(w).k for w in np.split(log_weight, fits)]} if fits > 1 else {}
    return judge(log_weight, explored).attrs() | each


def _correction(posterior: dict[str, np.ndarray], log_weight: np.ndarray) -> float:
    """Largest change of a mean when the draws are importance-weighted, in standard deviations of the draws."""
    if len(log_weight) < 25 or not posterior:
        return 0.0
    draws = np.concatenate([v.reshape(len(v), -1) for v in posterior.values()], -1).astype(np.float64)
    sd = draws.std(0)
    change = np.abs(np.exp(psis(log_weight)[0]) @ draws - draws.mean(0))
    return float((change[sd > 0] / sd[sd > 0]).max(initial=0.0))


def _store_state() -> Any:
    """A copy of the param store, so that reading a guide leaves the user's store as it was."""
    state = pyro.get_param_store().get_state()
    return {k: dict(v) for k, v in state.items()}
