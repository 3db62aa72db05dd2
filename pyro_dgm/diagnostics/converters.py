"""Draws of MCMC, and any draws, as a container; groups added to a container afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer.mcmc import StreamingMCMC
from torch import Tensor

from pyro_dgm.core.devices import seeded
from pyro_dgm.diagnostics.containers import coords_of, extended, group, safe, site_dims
from pyro_dgm.diagnostics.groups import (
    Groups,
    Options,
    groups_of,
    log_likelihoods,
    log_priors,
    predictions_of,
    predictive,
)
from pyro_dgm.diagnostics.khat import judge
from pyro_dgm.model.program import Model, Program
from pyro_dgm.model.runs import Draws
from pyro_dgm.model.sites import is_subsample

__all__ = [
    "compute_log_likelihood",
    "compute_log_prior",
    "from_posterior_samples",
    "from_pyro_mcmc",
    "sample_posterior_predictive",
]


def from_pyro_mcmc(
    mcmc: Any,
    *args: Any,
    model_kwargs: dict[str, Any] | None = None,
    log_likelihood: bool = True,
    log_prior: bool = False,
    posterior_predictive: bool = True,
    prior: int = 500,
    predictions: tuple[Any, ...] | None = None,
    constant_data: dict[str, Any] | None = None,
    coords: dict[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
    extra_event_dims: dict[str, list[str]] | None = None,
    parallel: bool | str = "auto",
    batch_size: int | None = None,
    seed: int | None = None,
    container: str = "auto",
) -> Any:
    """The chains of ``pyro.infer.MCMC`` as a container, with the groups of :func:`~pyro_dgm.from_svi`.

    ArviZ 1.x has no converter for Pyro; that of 0.x takes deterministic sites for data. Dimensions come from plates,
    ``sample_stats`` has ``lp`` and ``diverging``; discrete sites that NUTS summed out are drawn from their posterior.

    Args:
        mcmc: after ``run``.
        args, model_kwargs: of the model; without any, those of ``mcmc.run``.
        log_likelihood, log_prior, posterior_predictive, prior, predictions, constant_data, coords, dims, extra_event_dims,
            parallel, batch_size, seed, container: as in :func:`~pyro_dgm.from_svi`.

    Raises:
        ValueError: if ``mcmc`` did not run, is a ``StreamingMCMC`` (it keeps no draws), or its kernel has no model
            (``potential_fn``).

    Warns:
        UserWarning: for each group that the model cannot give, and each site that it cannot draw; the others are there.

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
    if not args and model_kwargs is None:
        args, model_kwargs = tuple(mcmc._args or ()), dict(mcmc._kwargs or {})
    samples = mcmc.get_samples(group_by_chain=True)
    model = poutine.infer_config(mcmc.kernel.model, partial(_summed_out, samples))
    chains, draws = next(iter(samples.values())).shape[:2]
    options = Options(log_likelihood, log_prior, posterior_predictive, prior, predictions, constant_data, None, coords, dims,
                      extra_event_dims, batch_size, container)  # fmt: skip
    flat = {k: v.reshape(chains * draws, *v.shape[2:]) for k, v in samples.items()}
    stats = {"diverging": _diverging(mcmc, chains, draws)}
    attrs = {"kernel": type(mcmc.kernel).__name__}
    return _converted(model, flat, args, model_kwargs or {}, options, stats, attrs, chains, "mcmc", parallel, seed,
                      "from_pyro_mcmc")  # fmt: skip


def _summed_out(samples: Draws, site: dict[str, Any]) -> dict[str, Any]:
    """Marks discrete latents that have no draws for enumeration: NUTS sums them out, marked or not."""
    if site["type"] != "sample" or site["is_observed"] or is_subsample(site) or site["name"] in samples:
        return {}
    discrete = getattr(site["fn"], "has_enumerate_support", False)
    return {"enumerate": site["infer"].get("enumerate", "parallel")} if discrete else {}


def _diverging(mcmc: Any, chains: int, draws: int) -> np.ndarray:
    diverging, known = np.zeros((chains, draws), dtype=bool), mcmc.diagnostics().get("divergences", {})
    for i in range(chains):
        diverging[i, known.get(f"chain {i}", [])] = True
    return diverging.reshape(-1)


def from_posterior_samples(
    model: Model,
    samples: dict[str, Any],
    *args: Any,
    model_kwargs: dict[str, Any] | None = None,
    log_q: Any = None,
    num_chains: int = 1,
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
    batch_size: int | None = None,
    seed: int | None = None,
    container: str = "auto",
) -> Any:
    """Any posterior draws of a model as a container, with the groups of :func:`~pyro_dgm.from_svi`.

    Args:
        model: a Pyro model.
        samples: draws of every latent, ``{site: (S, *site)}``, tensors or arrays. Enumerable sites are left out.
        args, model_kwargs: the model's arguments, data included.
        log_q: log density of the draws under whatever made them, shape ``(S,)``, in nats and in the sites' own
            (constrained) coordinates; with it there are weights, k-hat and a corrected loo.
        num_chains: into how many chains the S draws are split, in order.
        log_likelihood, log_prior, posterior_predictive, prior, predictions, constant_data, sites, coords, dims,
            extra_event_dims, parallel, batch_size, seed, container: as in :func:`~pyro_dgm.from_svi`.

    Raises:
        ValueError: for draws of unequal number, a number that the chains do not divide, or missing latents.

    Warns:
        UserWarning: for each group that the model cannot give, and each site that it cannot draw; the others are there.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> draws = {"mu": 0.5 + 0.5**0.5 * torch.randn(40)}
        >>> from_posterior_samples(model, draws, torch.tensor(1.0), prior=0, num_chains=2)["posterior"]["mu"].shape
        (2, 20)
    """
    flat = {k: torch.as_tensor(v) for k, v in samples.items()}
    n = _number(flat, num_chains)
    options = Options(log_likelihood, log_prior, posterior_predictive, prior, predictions, constant_data, sites, coords, dims,
                      extra_event_dims, batch_size, container)  # fmt: skip
    stats = {}
    if log_q is not None:
        stats["log_q"] = torch.as_tensor(log_q).double().cpu().numpy()
        if stats["log_q"].shape != (n,):
            raise ValueError(
                f"from_posterior_samples: log_q has shape {stats['log_q'].shape}, expected ({n},), one per draw."
            )
    method = "samples" if log_q is None else "importance"
    return _converted(model, flat, args, model_kwargs or {}, options, stats, {}, num_chains, method, parallel, seed,
                      "from_posterior_samples")  # fmt: skip


def _number(samples: Draws, chains: int) -> int:
    sizes = {k: len(v) if v.dim() else 0 for k, v in samples.items()}
    n = next(iter(sizes.values()), 0)
    if not n or len(set(sizes.values())) > 1 or n % chains:
        raise ValueError(
            f"from_posterior_samples: expected the same number of draws for every site, a multiple of num_chains={chains}; "
            f"got {sizes}."
        )
    return n


def _converted(model: Model, samples: Draws, args: Any, kwargs: Any, options: Options, stats: dict[str, np.ndarray],
               attrs: dict[str, Any], chains: int, method: str, parallel: bool | str, seed: int | None,
               who: str) -> Any:  # fmt: skip
    n = len(next(iter(samples.values())))
    with seeded(seed):
        program = Program(model, None, args, kwargs, parallel, draws=samples, who=who)
        draws = {k: samples[k] for k in program.sites("latent")}
        made = groups_of(program, draws, n, options, program.scored(draws, n, options.batch_size))
    made.groups["sample_stats"] |= stats
    if "log_q" in stats and "lp" in made.groups["sample_stats"]:
        made.groups["sample_stats"]["log_weight"] = made.groups["sample_stats"]["lp"] - stats["log_q"]
        attrs = attrs | judge(made.groups["sample_stats"]["log_weight"]).attrs()
    return made.container(program, options, attrs, chains, method)


def compute_log_likelihood(idata: Any, model: Model, *args: Any, model_kwargs: dict[str, Any] | None = None,
                           extend: bool = True, batch_size: int | None = None, parallel: bool | str = "auto") -> Any:  # fmt: skip
    """Pointwise log-likelihood of the posterior draws in a container, in nats.

    Args:
        idata: a container with ``posterior``.
        model, args, model_kwargs: the model and its arguments, data included.
        extend: add the group ``log_likelihood`` to ``idata`` and return it; else return ``{site: (chain, draw, ...)}``.
        batch_size, parallel: as in :func:`~pyro_dgm.from_svi`.

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
    program, draws, chains = _read(idata, model, args, model_kwargs or {}, parallel, "compute_log_likelihood")
    made = Groups({})
    log_likelihoods(
        program, made, program.scored(draws, _count(draws), batch_size), program.observed(draws), coords_of(idata)
    )
    return _added(idata, program, made, chains, extend)


def compute_log_prior(idata: Any, model: Model, *args: Any, model_kwargs: dict[str, Any] | None = None, extend: bool = True,
                      batch_size: int | None = None, parallel: bool | str = "auto") -> Any:  # fmt: skip
    """Log prior density of every latent in a container, given the sites before it, in nats; ``az.psens`` reads it.

    Args:
        idata, model, args, model_kwargs, batch_size, parallel: as in :func:`compute_log_likelihood`.
        extend: add the group ``log_prior`` to ``idata`` and return it; else return ``{site: (chain, draw, ...)}``.

    Raises:
        ValueError: if the posterior lacks latents of the model.
    """
    program, draws, chains = _read(idata, model, args, model_kwargs or {}, parallel, "compute_log_prior")
    made = Groups({"log_prior": log_priors(program, program.scored(draws, _count(draws), batch_size))})
    return _added(idata, program, made, chains, extend)


def sample_posterior_predictive(idata: Any, model: Model, *args: Any, model_kwargs: dict[str, Any] | None = None,
                                predictions: bool = False, extend: bool = True, batch_size: int | None = None,
                                parallel: bool | str = "auto", seed: int | None = None) -> Any:  # fmt: skip
    """New data for the posterior draws in a container, for its own or for other inputs.

    Args:
        idata, model, batch_size, parallel: as in :func:`compute_log_likelihood`.
        args, model_kwargs: the model's arguments; with ``predictions`` new ones, whose data may be None.
        predictions: write ``predictions`` and ``predictions_constant_data``, deterministic sites included, instead of
            ``posterior_predictive``. Latents that belong to new rows are drawn anew, with a warning.
        extend: add to ``idata`` and return it; else return ``{site: (chain, draw, ...)}``.
        seed: makes the draws reproducible.

    Raises:
        ValueError: if the posterior lacks latents of the model, unless ``predictions``.
    """
    kwargs = model_kwargs or {}
    with seeded(seed):
        if predictions:
            draws, chains = _stored(idata)
            sizes = {k: len(v) for k, v in coords_of(idata).items()}
            program, made = predictions_of(model, draws, args, kwargs, sizes, batch_size)
        else:
            program, draws, chains = _read(
                idata, model, args, kwargs, parallel, "sample_posterior_predictive", also_discrete=True
            )
            made = Groups(predictive(program, draws, _count(draws), batch_size))
    return _added(idata, program, made, chains, extend)


def _stored(idata: Any) -> tuple[Draws, int]:
    """All variables of the posterior, chains one after another, by the names that the model has for them."""
    values = group(idata, "posterior")
    chains = next(iter(values.values())).shape[0]
    names = {safe(k): k for k in ("chain", "draw")}
    return {names.get(k, k): _tensor(v.reshape(-1, *v.shape[2:])) for k, v in values.items()}, chains


def _count(draws: Draws) -> int:
    return len(next(iter(draws.values())))


def _tensor(values: np.ndarray) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(values))


def _read(idata: Any, model: Model, args: Any, kwargs: Any, parallel: bool | str,
          who: str, also_discrete: bool = False) -> tuple[Program, Draws, int]:  # fmt: skip
    stored, chains = _stored(idata)
    program = Program(model, None, args, kwargs, parallel, draws=stored, who=who)
    names = program.sites("latent") + (program.enumerable if also_discrete else [])
    return program, {k: stored[k] for k in names if k in stored}, chains


def _added(idata: Any, program: Program, made: Groups, chains: int, extend: bool) -> Any:
    plain = {g: v for g, v in made.groups.items() if g.endswith("constant_data")}
    split = {
        g: {safe(k): a.reshape(chains, -1, *a.shape[1:]) for k, a in v.items()}
        for g, v in made.groups.items()
        if g not in plain
    }
    if not extend:
        return next(iter(split.values())) if split else {}
    return extended(idata, split | plain, site_dims(program, made.groups, {}) | made.dims, made.coords)
