r"""Is a posterior right at one data set? Ranks of the truths of the simulations nearest to it, or of truths drawn given it.

A truth and draws of the exact posterior of its data are exchangeable given the data, so the ranks of truths are uniform among the
simulations of any neighbourhood, too. Of the n nearest, with :math:`u_i` the rank over its largest value, the two numbers

.. math:: \sqrt{n}\,\frac1n\sum_i \sqrt{12}\,(u_i - \tfrac12), \qquad
          \sqrt{n}\,\frac1n\sum_i \sqrt{5}\,(6 u_i^2 - 6 u_i + 1)

see a shift and a wrong width. The sum of their squares is chi-square with two degrees of freedom where all is right (Neyman 1937,
"Smooth test for goodness of fit"). Ranks are of every latent, and of the posterior's density, which sees a wrong dependence.

Source: Zhao, Dalmasso, Izbicki & Lee (2021), "Diagnostics for conditional density models and Bayesian inference algorithms",
arXiv 2102.10473, who fit a regression to the ranks where here neighbours are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_dgm.amortized.sets import Range
from pyro_dgm.core.devices import one_at_a_time
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import as_tensor_like
from pyro_dgm.diagnostics.calibration import Calibration, ranks, sbc
from pyro_dgm.diagnostics.containers import dims_of, group, has_group, with_defaults
from pyro_dgm.diagnostics.khat import khat, repaired
from pyro_dgm.diagnostics.posteriors import EXPERIMENT, ExperimentOptions, experiment

__all__ = ["local_p_values", "posterior_sbc"]

# Not measured beside others; chosen by hand. At 200 ranks a shift of .3 sd and a width of 1.3 are seen in more than nine of ten.
_NEAR = 200  # simulations of a neighbourhood
_ROWS = 5_000  # simulations that are used
_DRAWS = 99  # of each
_LEAST = 5 * _NEAR  # simulations


def local_p_values(
    guide: Any, simulations: Mapping[str, Tensor], data: Mapping[str, Tensor], names: Sequence[str]
) -> np.ndarray:
    """p-values ``(M,)`` of the guide's posteriors of M data sets, as such that M of them are looked at.

    Of the tests of a data set the smallest p-value times their number (Bonferroni), of all data sets so large that those below a
    level are false alarms in no more than that share, on average (Benjamini & Hochberg 1995).

    Args:
        guide: with ``condition(**data)`` for many data sets at once.
        simulations: ``{site: (N, *site)}``, not trained on; 5,000 are used.
        data: ``{site: (M, *site)}``.
        names: of the sites that are data, covariates among them.

    Raises:
        ValueError: for fewer than 1,000 simulations, those that lack a site or have other sizes than the data, and as
            :func:`~pyro_dgm.sbc`.
    """
    from scipy.stats import false_discovery_control

    simulated, observed = _flat(simulations, names), _flat(data, names)
    _refuse_unfit(simulated, observed)
    pit = _ranked(guide, simulations, names, len(simulated))
    each = _smooth_p_values(pit[_nearest(simulated, observed).numpy()])
    smallest = (each.min(1) * each.shape[1]).clip(max=1.0)
    return np.asarray(false_discovery_control(smallest))


def _refuse_unfit(simulated: Tensor, observed: Tensor) -> None:
    if len(simulated) < _LEAST:
        raise ValueError(
            f"workflow: {len(simulated)} simulations, expected at least {_LEAST} that the guide was not trained on: posteriors "
            f"are judged by the {_NEAR} nearest to each data set."
        )
    if simulated.shape[1] != observed.shape[1]:
        raise ValueError(
            f"workflow: the simulations have {simulated.shape[1]} numbers of data each, expected {observed.shape[1]} as the data "
            "sets have: simulate plates of the same size."
        )


def _ranked(guide: Any, simulations: Mapping[str, Tensor], names: Sequence[str], count: int) -> np.ndarray:
    """Ranks of all numbers of the truths, and of the truths' density, in (0, 1), ``(count, F)``."""
    options = ExperimentOptions(
        observed=names, num_simulations=count, num_draws=_DRAWS, simulations=simulations, progress=False
    )
    trials = experiment(None, guide, (), with_defaults(local_p_values, options, EXPERIMENT), density=True)
    rng = np.random.default_rng(int(torch.randint(2**31, (), device="cpu")))
    parts = [ranks(trials.draws[k], truth, rng).reshape(count, -1) for k, truth in trials.truth.items()]
    of_draws, of_truth = trials.densities
    return np.concatenate([*parts, ranks(of_draws, of_truth, rng)[:, None]], 1)


def _flat(rows: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """All numbers of the first data sets side by side, ``(n, F)``."""
    lacking = [k for k in names if k not in rows]
    if lacking:
        raise ValueError(f"workflow: the simulations lack {lacking}, expected all of {list(names)} and the latents.")
    values = [as_tensor_like("workflow", f"simulations of '{k}'", rows[k], None)[:_ROWS] for k in names]
    return torch.cat([v.reshape(len(v), -1).double() for v in values], 1)


def _nearest(simulated: Tensor, data: Tensor) -> Tensor:
    """Places ``(M, near)`` of the simulations nearest to each data set, in the simulations' own units and axes."""
    known = Range(simulated.shape[1], len(simulated) // 2).to(simulated)
    known.fit(simulated, torch.Generator().manual_seed(0))
    apart = torch.cdist(known.whitened(data), known.whitened(simulated))
    return apart.topk(_NEAR, largest=False).indices.cpu()


def _smooth_p_values(pit: np.ndarray) -> np.ndarray:
    """Of uniformity of ranks ``(M, n, F)``, ``(M, F)``."""
    from scipy.stats import chi2

    shift = np.sqrt(12.0) * (pit - 0.5).mean(1)
    width = np.sqrt(5.0) * (6.0 * pit * (pit - 1.0) + 1.0).mean(1)
    return np.asarray(chi2.sf(pit.shape[1] * (shift**2 + width**2), 2))


# --- Truths given the data ---


@checked(seed=0, num_simulations=2, num_draws=1)
@one_at_a_time
def posterior_sbc(
    idata: Any,
    posterior: Any,
    *,
    join: Callable[[Tensor, Tensor], Tensor] | None = None,
    num_simulations: int = 100,
    num_draws: int = 199,
    seed: int | None = None,
    progress: bool = True,
) -> Calibration:
    r"""Simulation-based calibration at the data that were seen, where :func:`sbc` averages over the prior.

    A truth :math:`\theta \sim p(\theta \mid y)`, new data :math:`y' \sim p(y' \mid \theta)`, and draws of
    :math:`p(\theta \mid y, y')`: the truth's rank among them is uniform. Truths and new data are draws of the container, so what
    is asked for is a posterior of both data sets, that is of twice as many rows.

    Args:
        idata: a container with ``posterior_predictive``. Draws that weights repair are resampled.
        posterior: as in :func:`sbc`, of the joined data: :class:`~pyro_dgm.diagnostics.Refit` of the model for twice as many rows
            (its inputs twice: ``Refit(model, train, torch.cat([x, x]))``), an amortised guide for data of any size, a function.
        join: ``join(y, new)`` makes one data set of two; None puts the rows of new below those of y. A model whose latents belong
            to the rows has new data of the same latents: give it both, ``join=torch.stack``-like, by a model that reads them so.
        num_simulations, num_draws: M and S; each simulation is a fit where the posterior is a ``Refit``.
        seed: makes it reproducible.
        progress: show a bar.

    Raises:
        ValueError: without predictive draws, for fewer draws than simulations, draws that are not the posterior's, and, without
            ``join``, latents in the plate of the data's rows.
        TypeError: as :func:`sbc`.

    References:
        | Saeilynoja, Schmitt, Buerkner & Vehtari (2025), "Posterior SBC: simulation-based calibration checking conditional on
          data", arXiv 2502.03279.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_dgm as dgm
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("item", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> def exact(data, width=1.0):  # of any number of data
        ...     precision = 1.0 + len(data["x"])
        ...     return {"mu": data["x"].sum() / precision + width * precision**-0.5 * torch.randn(199)}
        >>> x = torch.ones(4)
        >>> idata = dgm.from_posterior_samples(model, exact({"x": x}), x, prior=0, seed=0)
        >>> posterior_sbc(idata, exact, seed=0, progress=False).calibrated
        True
        >>> print(posterior_sbc(idata, lambda data: exact(data, 0.5), seed=0, progress=False))  # doctest: +ELLIPSIS
        sbc: 100 simulations x 199 draws, p = ... Not calibrated; worst is 'mu': draws are too narrow. Sharpness: ...
    """
    idata = _of_posterior(idata, seed)
    data, new = group(idata, "observed_data"), group(idata, "posterior_predictive")
    names = [k for k in new if k in data]
    if join is None:
        _refuse_rows_of_latents(idata, names)
    latents = {k: v.reshape(-1, *v.shape[2:]) for k, v in group(idata, "posterior").items()}
    n = min(map(len, latents.values()), default=0)
    if not names or n < num_simulations:
        raise ValueError(
            f"posterior_sbc: the container has {n} draws, and new data of {names}; expected as many draws as the "
            f"{num_simulations} simulations (num_simulations=), and posterior_predictive of some data."
        )
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(n)[:num_simulations]
    rows = {k: _floats(v[chosen]) for k, v in latents.items() if k not in names}
    for k in names:
        y, drawn = _floats(data[k]), _floats(new[k].reshape(n, *data[k].shape)[chosen])
        rows[k] = torch.stack([torch.cat([y, each]) if join is None else join(y, each) for each in drawn])
    again = None if seed is None else int(rng.integers(2**31))  # the truths may be of the seed itself
    options = {"num_simulations": num_simulations, "num_draws": num_draws, "seed": again, "progress": progress}
    return sbc(None, posterior, simulations=rows, observed=names, **options)  # type: ignore[arg-type]


def _of_posterior(idata: Any, seed: int | None) -> Any:
    """The container, resampled where its draws are a guide's and weights repair them."""
    if "log_weight" not in group(idata, "sample_stats"):
        return idata
    verdict = khat(idata)
    found = repaired(idata, verdict, seed)
    if found is None:
        raise ValueError(f"posterior_sbc: the draws are not the posterior's ({verdict.status}). {verdict.next_step}")
    return found


def _refuse_rows_of_latents(idata: Any, names: list[str]) -> None:
    first = {k: (dims_of(idata, "observed_data", k) or [f"{k}_dim_0"])[0] for k in names}
    without = [k for k, dim in first.items() if dim == f"{k}_dim_0"]  # as what lies in no plate is named
    latents = group(idata, "log_prior" if has_group(idata, "log_prior") else "posterior")
    local = [k for k in latents if set(first.values()) & set(dims_of(idata, "posterior", k))]
    if local or without:
        fault = f"latents {local} belong to them" if local else f"{without} has no plate"
        raise ValueError(
            f"posterior_sbc: rows cannot be joined, since {fault}: expected join=, which makes one data set of two, and a "
            "posterior of it."
        )


def _floats(values: np.ndarray) -> Tensor:
    tensor = torch.as_tensor(values)
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor
