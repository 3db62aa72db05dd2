"""``from_svi`` and ``from_fits``: variational posteriors as an ArviZ container, with what is needed to judge them.

Guides that put a latent on a point are refused: they have no density there, and their weights mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoDelta, AutoGuide
from torch import Tensor
from torch.distributions import biject_to
from typing_extensions import Unpack

from pyro_dgm.core.devices import one_at_a_time, seed_everywhere, seeded
from pyro_dgm.core.kinds import checked, shown
from pyro_dgm.diagnostics.containers import CONTAINER, ContainerOptions, with_defaults
from pyro_dgm.diagnostics.elements import groups_by_elements
from pyro_dgm.diagnostics.exploration import Exploration
from pyro_dgm.diagnostics.groups import Groups, all_groups, container_of
from pyro_dgm.diagnostics.khat import Rows, judge, judge_rows, with_rows
from pyro_dgm.diagnostics.short_chains import look_around, never_fitted
from pyro_dgm.guides.autoflow import AutoFlow
from pyro_dgm.model.program import Model, Program, refuse_guides_as_models
from pyro_dgm.model.runs import Table
from pyro_dgm.model.sites import (
    Site,
    innermost_distribution,
    is_computed,
    is_data,
    is_implicit,
    latent_sites,
    sample_sites,
)

__all__ = ["from_fits", "from_svi"]

_DRAWS = 1000  # the error of k-hat is then 0.2; a convention
_CHAINS = 4  # ArviZ compares chains, and says NaN of one; a convention
_SAME = 1e-4  # nats by which a term differs between draws that share all it depends on: of float32; chosen by hand


@checked(num_samples=1, num_chains=1, batch_size=1)
@one_at_a_time
def from_svi(
    model: Model,
    guide: Model,
    *args: Any,
    num_samples: int | None = None,
    num_chains: int | None = None,
    check: bool = True,
    **options: Unpack[ContainerOptions],
) -> Any:
    r"""Draw from a guide and collect everything ArviZ reads, draw by draw in pairs.

    Groups: ``posterior`` (latents and deterministic sites), ``sample_stats`` (``lp`` = :math:`\log p(x, \theta)`,
    ``log_q``, ``log_weight`` = lp - log_q, in nats, summed in float64), ``log_likelihood`` (per datum),
    ``log_prior`` (per latent), ``posterior_predictive``, ``prior``, ``prior_predictive``, ``observed_data``, and on demand
    ``predictions``, ``constant_data``. Dimensions take the names of the plates; ``infer={"event_dims": [...]}`` names a
    site's event dimensions. The attributes of ``sample_stats`` hold k-hat, ELBO, evidence and their errors.

    A subsampled plate is visited row by row, a subsample at a time: all densities are those of the full data. Discrete
    sites marked for enumeration are summed out of ``lp`` and ``log_likelihood``, and drawn from their exact posterior.
    A guide with an implicit distribution has no ``log_q`` and no weights.

    Args:
        model, guide: Pyro programs.
        args: their arguments, data included.
        num_samples: posterior draws, in each chain; None for 1,000 in all.
        num_chains: into how many chains the draws are split; None for one where ``num_samples`` is given and for four
            where it is not. They are independent anyway, so R-hat is one; of a single chain ArviZ has no R-hat.
        check: look around the draws by short Hamiltonian chains and for modes that they miss (autoguides over one vector;
            some 160 batched gradients of the model). :func:`~pyro_dgm.khat` uses what is found.
        model_kwargs: further arguments of the programs, by name.
        log_likelihood (True): whether to store it; it is ``num_samples`` times the number of data.
        log_prior (True): whether to store the log density of every latent of ``sites``, given those before it.
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
    chains = num_chains or (_CHAINS if num_samples is None else 1)
    n = chains * (num_samples or _DRAWS // chains)
    return _from_guides("from_svi", model, [guide], args, n, complete, chains=chains, check=check)


@checked(only=("num_samples", "options"), num_samples=1, batch_size=1)
@one_at_a_time
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
    if isinstance(guides, AutoGuide | Tensor) or not isinstance(guides, Iterable):
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
        unfitted = never_fitted(guides[0])
        with torch.no_grad():  # under gradients a guide is being trained, and forgets its range
            for guide in guides:
                guide(*args, **kwargs)  # lazy guides find their structure, by draws of their own
        unfitted = unfitted or never_fitted(guides[0])
        if seed is not None:
            seed_everywhere(seed)
        plated = [guide for guide in guides if isinstance(guide, AutoFlow) and guide.follows_structure]
        if len(plated) == len(guides):
            found = groups_by_elements(who, model, plated, args, n, options, check=check, unfitted=unfitted)
            return container_of(found.program, found.groups, options, found.attrs, chains, "svi")
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
        by_rows = None
        if log_weight is not None:
            if check:
                explored = look_around(model, guides[0], args, kwargs, programs[0].density_how, drawn[0].values)
            explored = replace(explored, unfitted=unfitted)
            if len(guides) == 1:
                by_rows = _by_rows(programs[0], drawn[0], scored, log_weight, check)
    attrs: dict[str, Any] = {"guide": type(guides[0]).__name__}
    if log_weight is not None:
        attrs |= _verdict(groups, log_weight, explored, len(guides), by_rows)
    return container_of(programs[0], groups, options, attrs, chains, "svi")


def _log_q(programs: list[Program], drawn: list[Table], scored: Table, n: int) -> np.ndarray | None:
    """Log density of every draw under the guide that made it; None if a guide is implicit."""
    rows = [program.log_q(table, scored, n) for program, table in zip(programs, drawn, strict=True)]
    known = [r for r in rows if r is not None]
    return np.concatenate(known) if len(known) == len(rows) else None


def _verdict(
    groups: Groups, log_weight: np.ndarray, explored: Exploration, fits: int, by_rows: _ByRows | None
) -> dict[str, Any]:
    rows: Rows | None = None
    if by_rows is not None:
        of_rows = judge_rows(by_rows.log_weight, by_rows.draws, explored, by_rows.plate, by_rows.given)
        if of_rows.independent:
            return of_rows.attrs()
        rows = of_rows.rows
    posterior = [v.reshape(len(v), -1).astype(np.float64) for v in groups.arrays["posterior"].values()]
    draws = np.concatenate(posterior, -1) if posterior else np.zeros((len(log_weight), 0))
    verdict = judge(log_weight, explored.weighed(draws, log_weight))
    attrs = with_rows(verdict, rows).attrs()
    if fits > 1:
        attrs["khat_by_chain"] = [judge(w).k for w in np.split(log_weight, fits)]
    return attrs


# --- Rows of a plate, each with weights of its own ---


@dataclass(frozen=True)
class _ByRows:
    """Log weights ``(n, N)`` and latents ``(n, N, F)`` of the N rows of a plate, the latents outside of it held fixed."""

    plate: str
    given: list[str]
    log_weight: np.ndarray
    draws: np.ndarray


def _by_rows(program: Program, guided: Table, scored: Table, log_weight: np.ndarray, check: bool) -> _ByRows | None:
    """Weights row by row where model and guide are products over a plate; None where they are not.

    Latents outside of the plate are held at the draw of the median weight, and the others drawn anew: one more run of both.
    """
    latents = {k: program.runs.layouts[k].axes for k in program.sites("latent")}
    if not latents or any(not bool(m.all()) for k, m in scored.masks.items() if k in latents):
        return None
    plates = [p for p in next(iter(latents.values())) if all(p in axes for axes in latents.values())]
    if plates:
        return _split(program, guided, scored, plates, [])
    plate = _plate_of_most(program, latents)
    if plate is None or not check or program.runs.how == "loop" or not _draws_in(program, plate):
        return None
    n = len(log_weight)
    held = int(np.argsort(log_weight)[n // 2])
    layouts = program.guide_runs.layouts  # type: ignore[union-attr]
    fixed = {k: v[held].expand(n, *v.shape[1:]) for k, v in guided.values.items() if plate not in layouts[k].axes}
    again = program.guide_runs.run(n, fixed, score=True)  # type: ignore[union-attr]
    anew = {k: again.values[k] for k in latents}
    given = [k for k, axes in latents.items() if plate not in axes]
    if any(bool((anew[k] == anew[k][:1]).all()) for k in latents if k not in given):
        return None
    return _split(program, again, program.scored(anew, n), [plate], given)


def _plate_of_most(program: Program, latents: dict[str, dict[str, int]]) -> str | None:
    """The plate that holds most entries of latents."""
    held = {
        p: sum(program.prototype.nodes[k]["value"].numel() for k, axes in latents.items() if p in axes)
        for axes in latents.values()
        for p in axes
    }
    return max(held, key=held.__getitem__, default=None)


def _draws_in(program: Program, plate: str) -> bool:
    """Whether the guide has a draw of its own in the plate, and no joint one for all rows."""
    runs = program.guide_runs
    nodes = runs.prototype.nodes  # type: ignore[union-attr]
    return any(
        plate in layout.axes and not is_computed(nodes[k]) and not isinstance(innermost_distribution(nodes[k]), Delta)
        for k, layout in runs.layouts.items()  # type: ignore[union-attr]
    )


def _split(program: Program, guided: Table, scored: Table, plates: list[str], given: list[str]) -> _ByRows | None:
    """The terms of both densities by row; None where a term outside of the plates depends on what is drawn inside."""
    local = {k: v for k, v in program.runs.layouts.items() if k in program.sites("latent") and k not in given}
    sizes = [next(f.full_size or f.size for f in next(iter(local.values())).plates if f.name == p) for p in plates]
    total = math.prod(sizes)
    n = len(next(iter(guided.values.values())))
    rows = torch.zeros(n, total, dtype=torch.float64)
    for sign, terms in ((1.0, scored.terms), (-1.0, guided.terms)):
        for term in terms.values():
            joint = term.joint.double().cpu()
            if all(p in term.axes for p in plates):
                rows += sign * _in_rows(joint, term.axes, plates, total).sum(-1)
                continue
            outside = joint.reshape(n, -1).sum(-1)
            if outside.numel() and float(outside.max() - outside.min()) > _SAME * max(1.0, float(outside.abs().max())):
                return None
            if not given:
                rows += sign * outside.mean() / total
    values = [_in_rows(guided.values[k].double().cpu(), layout.axes, plates, total) for k, layout in local.items()]
    return _ByRows(", ".join(plates), given, rows.numpy(), torch.cat(values, -1).numpy())


def _in_rows(values: Tensor, axes: dict[str, int], plates: list[str], total: int) -> Tensor:
    """``(n, N, rest)`` of ``(n, *plates, *others)``."""
    return values.movedim([axes[p] for p in plates], list(range(1, 1 + len(plates)))).reshape(len(values), total, -1)


# --- Guides that are point estimates ---


_POINT = """is a Delta without a density: a point estimate, not a posterior, with no weights. Give it a distribution, \
AutoNormal for one; AutoLaplaceApproximation has one after laplace_approximation(*args)."""
_SPIKE = """has one number in all draws: its posterior is narrower than rounding. Data that the model can meet without noise do \
that: keep the noise from 0 by its prior, or use float64."""


def _refuse_points(program: Program, guided: Table) -> None:
    """Refuse a guide of which a continuous latent is a ``Delta`` without a density.

    That is one of log density zero that is the same in all draws, or that no auxiliary draw spreads: the ``Delta`` latents
    have more free coordinates than auxiliary sites have entries. One that repeats a draw, with entries to spare, is not found.
    """
    guide = dict(sample_sites(program.guide_runs.prototype))  # type: ignore[union-attr]
    if any(is_implicit(s) for s in guide.values()):
        return
    latents = {k: s for k, s in latent_sites(program.prototype) if k in guide and _is_continuous(s)}
    pointed = {k: s for k, s in latents.items() if isinstance(innermost_distribution(guide[k]), Delta)}
    deltas = {k: _coordinates(s, guide[k]) for k, s in pointed.items()}
    without_density = [k for k, free in deltas.items() if free and not guided.terms[k].joint.any()]
    points = [k for k in without_density if _is_constant(program, guided, k)]
    entries = sum(s["value"].numel() for k, s in guide.items() if _is_auxiliary(k, s, program))
    if not points and sum(deltas.values()) > entries:
        points = without_density
    if points:
        said = _SPIKE if entries >= sum(deltas.values()) else _POINT
        raise ValueError(
            f"{program.who}: latent site '{points[0]}' of the guide ({type(program.guide).__name__}) {said}"
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
