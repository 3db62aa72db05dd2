"""Draws of MCMC, and any draws, as a container; groups added to a container afterwards."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer.mcmc import MCMC, StreamingMCMC
from torch import Tensor
from typing_extensions import Unpack

from pyro_dgm.core.devices import one_at_a_time, seeded
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import as_tensor_like
from pyro_dgm.diagnostics.containers import (
    CONTAINER,
    RESERVED,
    RUN,
    ContainerOptions,
    RunOptions,
    add_groups,
    coords_of,
    group,
    with_defaults,
)
from pyro_dgm.diagnostics.groups import (
    Groups,
    all_groups,
    at_new_arguments,
    container_of,
    laid_out,
    log_likelihoods,
    log_priors,
    predictions_of,
    predictive,
    renamed,
)
from pyro_dgm.diagnostics.khat import judge
from pyro_dgm.model.program import Model, Program
from pyro_dgm.model.runs import Draws
from pyro_dgm.model.sites import Site, is_subsample

__all__ = [
    "compute_log_likelihood",
    "compute_log_prior",
    "from_posterior_samples",
    "from_pyro_mcmc",
    "groups_of_samples",
    "sample_posterior_predictive",
]


@checked(only=("options",), batch_size=1)
@one_at_a_time
def from_pyro_mcmc(mcmc: MCMC, *args: Any, **options: Unpack[ContainerOptions]) -> Any:
    """The chains of ``pyro.infer.MCMC`` as a container, with the groups of :func:`~pyro_dgm.from_svi`.

    ArviZ 1.x has no converter for Pyro; that of 0.x takes deterministic sites for data. Dimensions come from plates,
    ``sample_stats`` has ``lp`` and ``diverging``; discrete sites that NUTS summed out are drawn from their posterior.

    Args:
        mcmc: after ``run``.
        args: of the model; without any, and without ``model_kwargs``, those of ``mcmc.run``.
        options: as in :func:`~pyro_dgm.from_svi`, from ``model_kwargs`` on.

    Raises:
        ValueError: if ``mcmc`` did not run, is a ``StreamingMCMC`` (it keeps no draws), or its kernel has no model
            (``potential_fn``).

    Warns:
        UserWarning: as :func:`~pyro_dgm.from_svi`.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer import MCMC, NUTS
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("item", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> mcmc = MCMC(NUTS(model), num_samples=20, warmup_steps=20, disable_progbar=True)
        >>> mcmc.run(torch.ones(3))
        >>> from_pyro_mcmc(mcmc, torch.ones(3), prior=0)["log_likelihood"]["x"].shape
        (1, 20, 3)
    """
    if isinstance(mcmc, StreamingMCMC):
        raise ValueError(
            "from_pyro_mcmc: StreamingMCMC keeps no draws, only their statistics. Run pyro.infer.MCMC with the same kernel."
        )
    if getattr(mcmc, "_samples", None) is None:
        raise ValueError("from_pyro_mcmc: this MCMC has no draws; call mcmc.run(*args) first.")
    if mcmc.kernel.model is None:
        raise ValueError(
            "from_pyro_mcmc: the kernel was made from potential_fn and has no model. Use "
            "from_posterior_samples(model, mcmc.get_samples(), *args)."
        )
    complete: ContainerOptions = with_defaults(from_pyro_mcmc, options, CONTAINER)
    if not args and complete["model_kwargs"] is None:
        args = tuple(mcmc._args or ())
        complete["model_kwargs"] = dict(mcmc._kwargs or {})
    samples = mcmc.get_samples(group_by_chain=True)
    model = poutine.infer_config(mcmc.kernel.model, partial(_sum_out, samples))
    chains, draws = next(iter(samples.values())).shape[:2]
    flat = {k: v.reshape(chains * draws, *v.shape[2:]) for k, v in samples.items()}
    with seeded(complete["seed"]):
        program, groups = groups_of_samples("from_pyro_mcmc", model, flat, args, complete)
    groups.arrays["sample_stats"]["diverging"] = _diverging(mcmc, chains, draws)
    return container_of(program, groups, complete, {"kernel": type(mcmc.kernel).__name__}, chains, "mcmc")


def _sum_out(samples: Draws, site: Site) -> dict[str, Any]:
    """Marks discrete latents that have no draws for enumeration: NUTS sums them out, marked or not."""
    if site["type"] != "sample" or site["is_observed"] or is_subsample(site) or site["name"] in samples:
        return {}
    if not getattr(site["fn"], "has_enumerate_support", False):
        return {}
    return {"enumerate": site["infer"].get("enumerate", "parallel")}


def _diverging(mcmc: MCMC, chains: int, draws: int) -> np.ndarray:
    diverging = np.zeros((chains, draws), dtype=bool)
    known = mcmc.diagnostics().get("divergences", {})
    for i in range(chains):
        diverging[i, known.get(f"chain {i}", [])] = True
    return diverging.reshape(-1)


@checked(batch_size=1, num_chains=1)
@one_at_a_time
def from_posterior_samples(
    model: Model,
    samples: dict[str, Any],
    *args: Any,
    log_q: np.ndarray | Tensor | None = None,
    num_chains: int = 1,
    **options: Unpack[ContainerOptions],
) -> Any:
    """Any posterior draws of a model as a container, with the groups of :func:`~pyro_dgm.from_svi`.

    Args:
        model: a Pyro model.
        samples: draws of every latent, ``{site: (S, *site)}``, tensors or arrays. Enumerable sites are left out.
        args: the model's arguments, data included.
        log_q: log density of the draws under whatever made them, shape ``(S,)``, in nats and in the sites' own
            (constrained) coordinates; with it there are weights, k-hat and a corrected loo.
        num_chains: into how many chains the S draws are split, in order.
        options: as in :func:`~pyro_dgm.from_svi`, from ``model_kwargs`` on.

    Raises:
        ValueError: for draws of unequal number, a number that the chains do not divide, or missing latents.

    Warns:
        UserWarning: as :func:`~pyro_dgm.from_svi`.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> draws = {"mu": 0.5 + 0.5**0.5 * torch.randn(40)}
        >>> from_posterior_samples(model, draws, torch.tensor(1.0), prior=0, num_chains=2)["posterior"]["mu"].shape
        (2, 20)
    """
    complete: ContainerOptions = with_defaults(from_posterior_samples, options, CONTAINER)
    flat = {
        k: as_tensor_like("from_posterior_samples", f"the draws of '{k}'", v, None).detach() for k, v in samples.items()
    }
    n = _number(flat, num_chains)
    of_draws = (
        None
        if log_q is None
        else as_tensor_like("from_posterior_samples", "log_q", log_q, None).detach().double().cpu().numpy()
    )
    if of_draws is not None and of_draws.shape != (n,):
        raise ValueError(f"from_posterior_samples: log_q has shape {of_draws.shape}, expected ({n},), one per draw.")
    with seeded(complete["seed"]):
        program, groups = groups_of_samples("from_posterior_samples", model, flat, args, complete)
    log_weight = groups.weigh(of_draws)
    attrs = {} if log_weight is None else judge(log_weight).attrs()
    method = "samples" if log_q is None else "importance"
    return container_of(program, groups, complete, attrs, num_chains, method)


def _number(samples: Draws, chains: int) -> int:
    sizes = {k: len(v) if v.dim() else 0 for k, v in samples.items()}
    n = next(iter(sizes.values()), 0)
    if not n or len(set(sizes.values())) > 1 or n % chains:
        raise ValueError(
            f"from_posterior_samples: expected the same number of draws for every site, a multiple of num_chains={chains}; "
            f"got {sizes}."
        )
    return n


def groups_of_samples(
    who: str, model: Model, samples: Draws, args: tuple[Any, ...], options: ContainerOptions
) -> tuple[Program, Groups]:
    """The model with its draws, and all groups but what only the maker of the draws knows."""
    n = len(next(iter(samples.values())))
    program = Program(model, None, args, options["model_kwargs"] or {}, options["parallel"], draws=samples, who=who)
    draws = {k: samples[k] for k in program.sites("latent")}
    scored = program.scored(draws, n, options["batch_size"])
    return program, all_groups(program, draws, n, scored, options)


# --- Groups added afterwards ---


@checked(batch_size=1, num_chains=1)
@one_at_a_time
def compute_log_likelihood(
    idata: Any, model: Model, *args: Any, extend: bool = True, **options: Unpack[RunOptions]
) -> Any:
    """Pointwise log-likelihood of the posterior draws in a container, in nats.

    Args:
        idata: a container with ``posterior``.
        model, args: the model and its arguments, data included.
        extend: add the group ``log_likelihood`` to ``idata`` and return it; else return ``{site: (chain, draw, ...)}``.
        options: ``model_kwargs``, ``parallel``, ``batch_size``, ``seed``, as in :func:`~pyro_dgm.from_svi`.

    Raises:
        ValueError: if the posterior lacks latents of the model.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     pyro.sample("x", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=x)
        >>> idata = from_posterior_samples(model, {"mu": torch.zeros(4)}, torch.tensor(0.0), prior=0, log_likelihood=False)
        >>> compute_log_likelihood(idata, model, torch.tensor(1.0), extend=False)["x"].round(2)
        array([[-1.42, -1.42, -1.42, -1.42]])
    """
    complete: RunOptions = with_defaults(compute_log_likelihood, options, RUN)
    with seeded(complete["seed"]):
        stored = _Stored(idata)
        program, draws = stored.program_and_draws("compute_log_likelihood", model, args, complete)
        scored = program.scored(draws, stored.n, complete["batch_size"])
        groups = log_likelihoods(program, scored, program.observed(draws), coords_of(idata))
    return stored.extended(program, groups, extend)


@checked(batch_size=1, num_chains=1)
@one_at_a_time
def compute_log_prior(idata: Any, model: Model, *args: Any, extend: bool = True, **options: Unpack[RunOptions]) -> Any:
    """Log prior density of every latent in a container, given the sites before it, in nats; ``az.psens`` reads it.

    Args:
        idata, model, args, options: as in :func:`compute_log_likelihood`.
        extend: add the group ``log_prior`` to ``idata`` and return it; else return ``{site: (chain, draw, ...)}``.

    Raises:
        ValueError: if the posterior lacks latents of the model.
    """
    complete: RunOptions = with_defaults(compute_log_prior, options, RUN)
    with seeded(complete["seed"]):
        stored = _Stored(idata)
        program, draws = stored.program_and_draws("compute_log_prior", model, args, complete)
        groups = log_priors(program, program.scored(draws, stored.n, complete["batch_size"]), program.sites("latent"))
    return stored.extended(program, groups, extend)


@checked(batch_size=1, num_chains=1)
@one_at_a_time
def sample_posterior_predictive(
    idata: Any,
    model: Model,
    *args: Any,
    predictions: bool = False,
    extend: bool = True,
    **options: Unpack[RunOptions],
) -> Any:
    """New data for the posterior draws in a container, for its own or for other inputs.

    Args:
        idata, model, options: as in :func:`compute_log_likelihood`.
        args: the model's arguments; with ``predictions`` new ones, whose data may be None.
        predictions: write ``predictions`` and ``predictions_constant_data``, deterministic sites included, instead of
            ``posterior_predictive``. Latents that belong to new rows are drawn anew, with a warning.
        extend: add to ``idata`` and return it; else return ``{site: (chain, draw, ...)}``.

    Raises:
        ValueError: if the posterior lacks latents of the model, unless ``predictions``.
    """
    complete: RunOptions = with_defaults(sample_posterior_predictive, options, RUN)
    with seeded(complete["seed"]):
        stored = _Stored(idata)
        if predictions:
            program = at_new_arguments(model, stored.draws, args, complete["model_kwargs"] or {})
            sizes = {k: len(v) for k, v in coords_of(idata).items()}
            groups = predictions_of(program, stored.draws, sizes, complete["batch_size"])
        else:
            program, draws = stored.program_and_draws("sample_posterior_predictive", model, args, complete)
            draws |= {k: stored.draws[k] for k in program.enumerable if k in stored.draws}
            groups = predictive(program, draws, stored.n, complete["batch_size"])
    return stored.extended(program, groups, extend)


class _Stored:
    """The posterior draws of a container: chains one after another, by the names that the model has for them."""

    def __init__(self, idata: Any) -> None:
        self.idata = idata
        values = group(idata, "posterior")
        if not values:
            raise ValueError(
                "The container has no posterior draws, expected at least one variable in its group 'posterior'."
            )
        self.chains, draws = next(iter(values.values())).shape[:2]
        self.n = self.chains * draws
        names = {renamed(k): k for k in RESERVED}
        flat = {names.get(k, k): np.ascontiguousarray(v.reshape(-1, *v.shape[2:])) for k, v in values.items()}
        self.draws: Draws = {k: torch.as_tensor(v) for k, v in flat.items()}

    def program_and_draws(
        self, who: str, model: Model, args: tuple[Any, ...], options: RunOptions
    ) -> tuple[Program, Draws]:
        """The model, and the draws of its latents."""
        kwargs = options["model_kwargs"] or {}
        program = Program(model, None, args, kwargs, options["parallel"], draws=self.draws, who=who)
        return program, {k: self.draws[k] for k in program.sites("latent")}

    def extended(self, program: Program, groups: Groups, extend: bool) -> Any:
        """The container with the groups, or the arrays of the first of them."""
        arrays, dims = laid_out(program, groups, self.chains, {})
        if extend:
            return add_groups(self.idata, {g: v for g, v in arrays.items() if v}, dims, groups.coords)
        return next(iter(arrays.values()), {})
