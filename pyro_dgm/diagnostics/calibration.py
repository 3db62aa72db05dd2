r"""Is a way of computing posteriors right on average over data? Simulation-based calibration, coverage, TARP.

A truth drawn from the prior and draws from the exact posterior of the data that it gave are exchangeable, so the rank of
the truth among the draws is uniform, for any function of parameters and data.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import Unpack

from pyro_dgm.core.devices import one_at_a_time
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.weights import arviz_major
from pyro_dgm.diagnostics.containers import build, fault_of, uniform_by_ks, uniform_p, with_defaults
from pyro_dgm.diagnostics.posteriors import EXPERIMENT, Experiment, ExperimentOptions, Sharpness, experiment
from pyro_dgm.model.program import Model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Calibration", "coverage", "ranks", "sbc", "tarp"]

_LEVEL = 0.01  # of the test of uniformity; a convention
_PANELS = 16  # of the picture; chosen by hand
_NARROWEST = 5.6  # inches of the picture, for its title; chosen by hand
_LETTERS = 16  # in an inch of the picture's title; chosen by hand
_BINS = 10  # of the chi-square test, fewer where one would expect less than 15 ranks in each; chosen by hand
_IN_A_BIN = 15


@dataclass(frozen=True)
class Calibration:
    """Ranks of the truth among posterior draws; uniform if the posterior is right.

    Attributes:
        method: "sbc", "coverage" or "tarp".
        pit: rank divided by its largest value, in (0, 1), ``{variable: (M, *site)}``.
        p_values: of uniformity, ``{variable: (*site)}``.
        draws: posterior draws of each of the M simulations.
        sharpness: what the ranks do not see: a posterior equal to the prior, or too wide for the data, has uniform ranks.
    """

    method: str
    pit: dict[str, np.ndarray]
    p_values: dict[str, np.ndarray] = field(repr=False)
    draws: int
    sharpness: Sharpness | None = field(default=None, repr=False)

    @property
    def p_value(self) -> float:
        """The smallest p-value times their number (Bonferroni)."""
        every = np.concatenate([np.ravel(p) for p in self.p_values.values()])
        return float(min(1.0, len(every) * every.min()))

    @property
    def calibrated(self) -> bool:
        """Whether uniformity is not rejected at 1 %."""
        return self.p_value > _LEVEL

    @checked(level=0)
    def covered(self, level: float) -> tuple[float, float]:
        """Share of simulations whose truth lies in the region of that credibility, over all variables, and its error.

        Central intervals for sbc, highest-density regions for coverage, balls around the reference for tarp.
        """
        rows = np.concatenate([v.reshape(len(v), -1) for v in self.pit.values()], 1)
        inside = np.abs(rows - 0.5) < level / 2 if self.method == "sbc" else rows < level
        share = float(inside.mean())
        return share, float(inside.mean(1).std() / np.sqrt(len(rows)))

    def container(self, kind: str = "auto") -> Any:
        """The ranks as an ArviZ container with the group ``prior_sbc``, which ``az.plot_ecdf_pit`` of ArviZ 1.x draws."""
        groups = {"prior_sbc": {k: v[None] for k, v in self.pit.items()}}
        attrs: dict[str, dict[str, Any]] = {
            "/": {"creation_library": "pyro_dgm"},
            "prior_sbc": {"p_value": self.p_value, "num_draws": self.draws},
        }
        return build(groups, {}, {}, attrs, kind)

    def picture(self, path: str | Path) -> None:
        """ECDF of the ranks minus that of uniform ranks, with simultaneous 95 % bands, drawn by ArviZ, under the verdict."""
        import arviz as az
        import matplotlib.pyplot as plt

        if arviz_major() == 0:
            figure = _ecdfs(self.method, self.pit, self.p_values)
        else:
            figure = az.plot_ecdf_pit(self.container(), group="prior_sbc").viz["figure"].item()
        figure.suptitle(textwrap.fill(str(self), int(_LETTERS * figure.get_figwidth())), fontsize=8)
        figure.supylabel("ECDF minus uniform", fontsize=9)
        figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(figure)

    def __str__(self) -> str:
        return f"{self._of_ranks()} {self.sharpness or ''}".strip()

    def _of_ranks(self) -> str:
        m = len(next(iter(self.pit.values())))
        head = f"{self.method}: {m} simulations x {self.draws} draws, p = {self.p_value:.2g}."
        if self.calibrated:
            limit = f"faults below what {m} simulations can show remain possible"
            return f"{head} No fault was found at the {_LEVEL:.0%} level ({limit})."
        worst = min(self.p_values, key=lambda k: float(np.min(self.p_values[k])))
        index = np.unravel_index(np.argmin(self.p_values[worst]), np.shape(self.p_values[worst]))
        return f"{head} Not calibrated; worst is '{worst}'{list(map(int, index)) or ''}: {self._fault(worst, index)}."

    def _fault(self, name: str, index: Any) -> str:
        pit = self.pit[name][(slice(None), *index)]
        if self.method != "sbc":
            return "regions are too small" if pit.mean() > 0.5 else "regions are too large"
        return f"draws are {fault_of(pit)}"


@checked(seed=0, num_simulations=1, num_draws=1)
@one_at_a_time
def sbc(model: Model | None, posterior: Any, *args: Any, **options: Unpack[ExperimentOptions]) -> Calibration:
    r"""Simulation-based calibration: ranks of every parameter, tested for uniformity.

    Args:
        model: simulates its data where they are None; itself None where ``simulations`` are given.
        posterior: an amortised posterior with ``condition(**data) -> q``, where ``q.sample((S,))`` gives
            ``{site: (S, *site)}`` and ``q.log_prob`` may give the log density of such draws; or a function of
            ``{site: value}`` that returns such draws; or a :class:`~pyro_dgm.diagnostics.Refit`, which fits an ordinary
            guide to each data set. Data may have a leading dimension M, for M data sets at once: a ``q`` that serves them
            says so by ``q.lead = 1``, and its draws are ``{site: (S, M, *site)}``, its log densities ``(S, M)``.
        args: the model's arguments; data in them are drawn anew.
        observed: names of the data sites; None for those that the arguments fix.
        num_simulations (300), num_draws (199): M and S; S + 1 should be a multiple of the number of bins, min(10, M // 15).
        simulations: of :func:`~pyro_dgm.simulate`, the first M of which are taken; they must not have been trained on.
        model_kwargs: further arguments of the model, by name.
        seed: makes it reproducible.
        progress (True): show a bar, of the posteriors and of the joint densities.

    Raises:
        ValueError: if ``observed`` names no data, or the posterior no latent.
        TypeError: if ``posterior`` is neither, or for an option of another name.

    Note:
        The test is ArviZ 1.x's ``uniformity_test``, and chi-square with 0.2x. It tests the average over the prior: a posterior
        may be right on average and wrong for your data. And it tests the marginals: a posterior equal to the prior has uniform
        ranks (and coverage), so read ``sharpness`` beside the p-value. At M = 300 a standard deviation that is 15 % off is
        often missed.

    References:
        | Talts et al. (2018), "Validating Bayesian inference algorithms with simulation-based calibration", arXiv 1804.06788.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x=None):
        ...     pyro.sample("x", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=x)
        >>> exact = lambda data: {"mu": data["x"] / 2 + 0.5**0.5 * torch.randn(199)}
        >>> sbc(model, exact, observed=["x"], seed=0).calibrated
        True
        >>> narrow = lambda data: {"mu": data["x"] / 2 + 0.3 * torch.randn(199)}
        >>> print(sbc(model, narrow, observed=["x"], seed=0))  # doctest: +ELLIPSIS
        sbc: 300 simulations x 199 draws, p = ... Not calibrated; worst is 'mu': draws are too narrow. Sharpness: ...
    """
    complete: ExperimentOptions = with_defaults(sbc, options, EXPERIMENT)
    trials = experiment(model, posterior, args, complete)
    rng = np.random.default_rng(complete["seed"])
    pit = {k: ranks(trials.draws[k], truth, rng) for k, truth in trials.truth.items()}
    p_values = {k: _p_values(v, _by_chi2) for k, v in pit.items()}
    return Calibration("sbc", pit, p_values, complete["num_draws"], trials.sharpness)


@checked(seed=0, num_simulations=1, num_draws=1)
@one_at_a_time
def coverage(model: Model | None, posterior: Any, *args: Any, **options: Unpack[ExperimentOptions]) -> Calibration:
    """Coverage of highest-density regions of the joint posterior: one number per simulation, whatever the dimension.

    The credibility of a truth is the share of draws whose density is above its own, by the posterior's ``log_prob``, or by
    the model's joint density where it has none. It sees wrong scales best, and hardly a bias: run :func:`sbc` too.

    Args:
        model, posterior, args, options: as in :func:`sbc`.

    Raises:
        ValueError, TypeError: as :func:`sbc`.

    References:
        | Hermans et al. (2022), "A trust crisis in simulation-based inference?", arXiv 2110.06581.
        | Modrak et al. (2023), "Simulation-based calibration checking for Bayesian computation", arXiv 2211.02383: ranks of
          functions of parameters and data, such as the joint density.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x=None):
        ...     pyro.sample("x", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=x)
        >>> wide = lambda data: {"mu": data["x"] / 2 + 1.2 * torch.randn(99)}
        >>> result = coverage(model, wide, observed=["x"], num_simulations=200, num_draws=99, seed=0)
        >>> result.calibrated, result.covered(0.5)[0] > 0.6
        (False, True)
    """
    complete: ExperimentOptions = with_defaults(coverage, options, EXPERIMENT)
    trials = experiment(model, posterior, args, complete, density=True)
    of_draws, of_truth = trials.densities
    credibility = 1.0 - ranks(of_draws, of_truth, np.random.default_rng(complete["seed"]))
    p_values = {"credibility": _p_values(credibility, uniform_by_ks)}
    return Calibration("coverage", {"credibility": credibility}, p_values, complete["num_draws"], trials.sharpness)


@checked(seed=0, num_simulations=1, num_draws=1)
@one_at_a_time
def tarp(
    model: Model | None,
    posterior: Any,
    *args: Any,
    references: Callable[[Experiment], np.ndarray] | None = None,
    **options: Unpack[ExperimentOptions],
) -> Calibration:
    """Tests of accuracy with random points: coverage of balls around a reference; needs draws only.

    Args:
        model, posterior, args, options: as in :func:`sbc`.
        references: ``f(experiment) -> (M, D)`` points in units of the prior's standard deviation, of all parameters side by
            side; None for uniform points in the range of the truths. Uniform points do not depend on the data and are
            nearly blind to a bias.

    Raises:
        ValueError, TypeError: as :func:`sbc`.

    References:
        | Lemos, Coogan, Hezaveh & Perreault-Levasseur (2023), "Sampling-based accuracy testing of posterior estimators for
          general inference", arXiv 2302.03026.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x=None):
        ...     pyro.sample("x", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=x)
        >>> exact = lambda data: {"mu": data["x"] / 2 + 0.5**0.5 * torch.randn(199)}
        >>> tarp(model, exact, observed=["x"], seed=0).calibrated
        True
    """
    complete: ExperimentOptions = with_defaults(tarp, options, EXPERIMENT)
    trials = experiment(model, posterior, args, complete)
    rng = np.random.default_rng(complete["seed"])
    truth = np.concatenate([v.reshape(len(v), -1) for v in trials.truth.values()], -1)
    draws = np.concatenate([v.reshape(*v.shape[:2], -1) for v in trials.draws.values()], -1)
    scale = np.where(truth.std(0) > 0, truth.std(0), 1.0)
    truth = truth / scale
    draws = draws / scale
    points = rng.uniform(truth.min(0), truth.max(0), truth.shape) if references is None else references(trials)
    if np.shape(points) != truth.shape:
        raise ValueError(
            f"tarp: references has shape {np.shape(points)}, expected {truth.shape}, a point per simulation."
        )
    distances = np.linalg.norm(draws - points[:, None], axis=-1)
    pit = {"ball": ranks(distances, np.linalg.norm(truth - points, axis=-1), rng)}
    p_values = {"ball": _p_values(pit["ball"], uniform_by_ks)}
    return Calibration("tarp", pit, p_values, complete["num_draws"], trials.sharpness)


def _ecdfs(method: str, pit: dict[str, np.ndarray], p_values: dict[str, np.ndarray]) -> Figure:
    import arviz as az
    import matplotlib.pyplot as plt
    from scipy.stats import uniform

    numbers = {
        f"{k}{list(i) or ''}: p = {p_values[k][i]:.2g}": v[(slice(None), *i)]
        for k, v in pit.items()
        for i in np.ndindex(*v.shape[1:])
    }
    columns = list(numbers.items())[:_PANELS]
    across = min(len(columns), 4)
    down = -(-len(columns) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(max(3.2 * across, _NARROWEST), 2.6 * down + 0.4), squeeze=False, layout="constrained"
    )
    ranks = uniform(0, 1)
    options = {"cdf": ranks.cdf, "rvs": ranks.rvs, "difference": True, "confidence_bands": True, "ci_prob": 0.95}
    for ax, (name, column) in zip(axes.flat, columns, strict=False):
        az.plot_ecdf(column, eval_points=np.linspace(0.0, 1.0, 101)[1:-1], ax=ax, **options)
        ax.set(title=name, xlabel=f"rank ({method}); band: 95 %")
    for ax in axes.flat[len(columns) :]:
        ax.set_axis_off()
    return figure


def ranks(draws: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ranks of ``(M, ...)`` among ``(M, S, ...)`` as points of (0, 1); ties are broken at random."""
    below = (draws < truth[:, None]).sum(1)
    ties = (draws == truth[:, None]).sum(1)
    place = below + np.floor(rng.random(truth.shape) * (ties + 1))
    return (place + rng.random(truth.shape)) / (draws.shape[1] + 1)


def _p_values(pit: np.ndarray, otherwise: Callable[[np.ndarray], float]) -> np.ndarray:
    """p-values of uniformity of every number of a site."""
    columns = pit.reshape(len(pit), -1).T
    return np.array([uniform_p(c, otherwise) for c in columns]).reshape(pit.shape[1:])


def _by_chi2(pit: np.ndarray) -> float:
    from scipy.stats import chisquare

    bins = max(2, min(_BINS, len(pit) // _IN_A_BIN))
    return float(chisquare(np.bincount((pit * bins).astype(int).clip(max=bins - 1), minlength=bins)).pvalue)
