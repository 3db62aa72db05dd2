r"""Is an amortised posterior right near one data set? Ranks of the truths of the simulations that are nearest to it.

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

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_dgm.amortized.sets import Range
from pyro_dgm.core.shapes import as_tensor_like
from pyro_dgm.diagnostics.calibration import ranks
from pyro_dgm.diagnostics.containers import with_defaults
from pyro_dgm.diagnostics.posteriors import EXPERIMENT, ExperimentOptions, experiment

__all__ = ["local_p_values"]

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
