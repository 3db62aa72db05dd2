"""``from_svi`` and ``from_fits``: variational posteriors as an ArviZ container, with what is needed to judge them.

Guides that put a latent on a point are refused: they have no density there, and their weights mean nothing.
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
from typing_extensions import Unpack

from pyro_dgm.core.devices import seed_everywhere, seeded
from pyro_dgm.core.kinds import checked, shown
from pyro_dgm.core.weights import psis
from pyro_dgm.diagnostics.explore import explore
from pyro_dgm.diagnostics.groups import Groups, all_groups, container_of
from pyro_dgm.diagnostics.khat import Exploration, judge
from pyro_dgm.diagnostics.options import CONTAINER, ContainerOptions, with_defaults
from pyro_dgm.model.program import Model, Program, refuse_guides_as_models
from pyro_dgm.model.runs import Table
from pyro_dgm.model.sites import Site, innermost_distribution, is_data, is_implicit, latent_sites, sample_sites

__all__ = ["from_fits", "from_svi"]


@checked(num_samples=1, num_chains=1, batch_size=1)
def from_svi(
    model: Model,
    guide: Model,
    *args: Any,
    num_samples: int = 1000,
    num_chains: int = 1,
    check: bool = True,
    **options: Unpack[ContainerOptions],
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
        args: their arguments, data included.
        num_samples: posterior draws, in each chain.
        num_chains: into how many chains the draws are split. They are independent anyway: R-hat is one.
        check: look around the draws by short Hamiltonian chains and for modes that they miss (autoguides over one vector;
            some 160 batched gradients of the model). :func:`~pyro_dgm.khat` uses what is found.
        model_kwargs: further arguments of the programs, by name.
        log_likelihood (True): whether to store it; it is ``num_samples`` times the number of data.
        log_prior (False): whether to store the log density of every latent (``az.psens`` reads it).
        posterior_predictive (True): whether to draw new data for every posterior draw.
        prior (500): number of prior and prior-predictive draws; 0 for none.
        predictions: ``(args, kwargs)``, new arguments of the model, for which to predict.
        constant_data: inputs to keep beside the data, ``{name: array}``.
        sites: which latents and deterministic sites to store; None for all. A VAE's local latents may be too many.
        coords: labels of dimensions (``{"school": names}``).
        dims: dimension names by variable, instead of the plates'.
        extra_event_dims: event dimensions of sites that take no ``infer`` (deterministic ones).
        parallel ("auto"): run all draws at once (True), one by one (False), or as a check allows ("auto").
        batch_size: draws that the model runs at once, for less memory; None for all. Predictive draws depend on it.
        seed: makes the draws reproducible, and leaves the global random state as it was.
        container ("auto"): what the installed ArviZ uses ("auto"), "inferencedata", "datatree" or "dict" (needs no ArviZ).

    Raises:
        TypeError: for an option of another name.
        ValueError: for guides that put a latent on a point (a ``Delta`` without a density), latents that the guide lacks,
            subsampled plates whose data do not follow the index, masked latents under a guide with one joint density, and
            a guide in the place of the model.

    Warns:
        UserWarning: for each group that the model cannot give, and each site that it cannot draw; the others are there.

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
    complete: ContainerOptions = with_defaults(from_svi, options, CONTAINER)
    n = num_samples * num_chains
    return _from_guides("from_svi", model, [guide], args, n, complete, chains=num_chains, check=check)


@checked(only=("num_samples", "options"), num_samples=1, batch_size=1)
def from_fits(
    guides: Sequence[Model],
    model: Model,
    *args: Any,
    num_samples: int = 1000,
    **options: Unpack[ContainerOptions],
) -> Any:
    """Independent fits of one model as the chains of one container: R-hat then compares the fits.

    The groups are those of :func:`from_svi`; every draw is weighted by the guide that made it, so the weights of all
    chains together are those of one posterior. ``sample_stats`` has the attribute ``khat_by_chain``.

    Args:
        guides: fitted guides, each from its own start and seed.
        model, args: the model and its arguments.
        num_samples: draws of each guide.
        options: as in :func:`from_svi`, from ``model_kwargs`` on.

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
    complete: ContainerOptions = with_defaults(from_fits, options, CONTAINER)
    return _from_guides("from_fits", model, guides, args, num_samples, complete, chains=len(guides), check=False)


def _from_guides(
    who: str,
    model: Model,
    guides: Sequence[Model],
    args: tuple[Any, ...],
    n: int,
    options: ContainerOptions,
    *,
    chains: int,
    check: bool,
) -> Any:
    """The container of n draws of each guide."""
    refuse_guides_as_models(who, model)
    for each in (model, *guides):
        if not callable(each):
            raise TypeError(f"{who}: {shown(each)} is no Pyro program, expected functions or modules.")
    if any(isinstance(guide, AutoDelta) for guide in guides):  # known by its name, before it is run
        raise ValueError(f"{who}: AutoDelta is a point estimate, not a posterior: it has no density and no weights.")
    kwargs = options["model_kwargs"] or {}
    seed = options["seed"]
    store = pyro.get_param_store()
    with seeded(seed), store.scope(store.get_state()):  # reading a guide leaves the user's store as it was
        for guide in guides:
            guide(*args, **kwargs)  # lazy guides find their structure, by draws of their own
        if seed is not None:
            seed_everywhere(seed)
        programs = [Program(model, guide, args, kwargs, options["parallel"], who=who) for guide in guides]
        drawn = [program.guided(n) for program in programs]
        for program, table in zip(programs, drawn, strict=True):
            _refuse_points(program, table)
        total = n * len(guides)
        draws = {k: torch.cat([table.values[k] for table in drawn]) for k in programs[0].sites("latent")}
        scored = programs[0].scored(draws, total, options["batch_size"])
        groups = all_groups(programs[0], draws, total, scored, options)
        log_weight = groups.weigh(_log_q(programs, drawn, scored, n))
        explored = Exploration(unseen="it was not asked for")
        if check and log_weight is not None:
            explored = explore(model, guides[0], args, kwargs, how=programs[0].density_how)
    attrs: dict[str, Any] = {"guide": type(guides[0]).__name__}
    if log_weight is not None:
        attrs |= _verdict(groups, log_weight, explored, len(guides))
    return container_of(programs[0], groups, options, attrs, chains, "svi")


def _log_q(programs: list[Program], drawn: list[Table], scored: Table, n: int) -> np.ndarray | None:
    """Log density of every draw under the guide that made it; None if a guide is implicit."""
    rows = [program.log_q(table, scored, n) for program, table in zip(programs, drawn, strict=True)]
    known = [r for r in rows if r is not None]
    return np.concatenate(known) if len(known) == len(rows) else None


def _verdict(groups: Groups, log_weight: np.ndarray, explored: Exploration, fits: int) -> dict[str, Any]:
    explored = replace(explored, correction=_correction(groups.arrays["posterior"], log_weight))
    attrs = judge(log_weight, explored).attrs()
    if fits > 1:
        attrs["khat_by_chain"] = [judge(w).k for w in np.split(log_weight, fits)]
    return attrs


def _correction(posterior: dict[str, np.ndarray], log_weight: np.ndarray) -> float:
    """Largest change of a mean when the draws are importance-weighted, in standard deviations of the draws."""
    if len(log_weight) < 25 or not posterior:
        return 0.0
    draws = np.concatenate([v.reshape(len(v), -1) for v in posterior.values()], -1).astype(np.float64)
    sd = draws.std(0)
    change = np.abs(np.exp(psis(log_weight)[0]) @ draws - draws.mean(0))
    return float((change[sd > 0] / sd[sd > 0]).max(initial=0.0))


# --- Guides that are point estimates ---


def _refuse_points(program: Program, guided: Table) -> None:
    """Refuse a guide of which a continuous latent is a ``Delta`` without a density.

    That is a ``Delta`` of log density zero that is the same in all draws, or that no auxiliary draw spreads: the guide's
    ``Delta`` latents have more free coordinates than its auxiliary sites have entries. A ``Delta`` that repeats another
    draw, in a guide that has auxiliary entries to spare, is not found.
    """
    guide = dict(sample_sites(program.guide_runs.prototype))  # type: ignore[union-attr]
    if any(is_implicit(s) for s in guide.values()):
        return
    latents = {k: s for k, s in latent_sites(program.prototype) if k in guide and _is_continuous(s)}
    deltas = {
        k: _coordinates(s, guide[k]) for k, s in latents.items() if isinstance(innermost_distribution(guide[k]), Delta)
    }
    without_density = [k for k, free in deltas.items() if free and not guided.terms[k].joint.any()]
    points = [k for k in without_density if _is_constant(program, guided, k)]
    entries = sum(s["value"].numel() for k, s in guide.items() if _is_auxiliary(k, s, program))
    if not points and sum(deltas.values()) > entries:
        points = without_density
    if points:
        raise ValueError(
            f"{program.who}: latent site '{points[0]}' of the guide ({type(program.guide).__name__}) is a Delta without a "
            "density: a point estimate, not a posterior, with no weights. Give it a distribution, AutoNormal for one; "
            "AutoLaplaceApproximation has one after laplace_approximation(*args)."
        )


def _is_continuous(site: Site) -> bool:
    if isinstance(innermost_distribution(site), Delta) or not site["value"].is_floating_point():
        return False
    try:
        return not site["fn"].support.is_discrete
    except (AttributeError, NotImplementedError):
        return not getattr(site["fn"], "has_enumerate_support", False)


def _coordinates(latent: Site, guided: Site) -> int:
    """How many free coordinates a value has: a simplex of K parts K - 1."""
    shape = guided["value"].shape
    try:
        return biject_to(latent["fn"].support).inverse_shape(shape).numel()
    except (AttributeError, NotImplementedError):
        return shape.numel()


def _is_auxiliary(name: str, site: Site, program: Program) -> bool:
    """A draw of the guide's own that has a density."""
    return (
        name not in program.prototype.nodes
        and not is_data(site)
        and not isinstance(innermost_distribution(site), Delta)
    )


def _is_constant(program: Program, guided: Table, name: str) -> bool:
    values = guided.values[name]
    if len(values) < 2:
        values = torch.cat([values, program.guided(2).values[name]])
    return bool((values == values[:1]).all())
