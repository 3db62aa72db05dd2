r"""Leave-one-out prediction from draws of a guide, corrected for the guide.

The draws come from q, not from the posterior, so the weights that leave datum i out are
:math:`w_i \propto p(y, \theta) / (q(\theta)\, p(y_i \mid \theta))`, Pareto-smoothed. ``az.loo`` takes draws for the
posterior's own and gives, for guides of one model, whatever their errors make of it.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from pyro_dgm.core.kinds import checked
from pyro_dgm.core.warn import warn_user
from pyro_dgm.core.weights import arviz_major, k_threshold, log_mean, psis
from pyro_dgm.diagnostics.containers import build, group, group_attrs
from pyro_dgm.diagnostics.khat import KHat, judge, khat

__all__ = ["compare", "elpd_of", "loo"]

_CLEAN = 0.5  # k-hat of the guide below which its weights have a finite variance: what is heavy then are the data
_SMALL = 4.0  # nats; below it a difference of elpd is small and its error unreliable (Sivula et al. 2020)

_EMPTY: dict[str, Any] = {"dims": {}, "coords": {}, "attrs": {}}  # what a container of dictionaries may leave out


@checked()
def loo(idata: Any, var_name: str | None = None, *, correct: bool = True) -> Any:
    r"""Expected log predictive density by leave-one-out, in nats, as ArviZ's own ``ELPDData``.

    :math:`\sum_i \log \sum_s w_{is}\, p(y_i \mid \theta_s)`. Draws of MCMC, of :func:`~pyro_dgm.neutra` and of
    :func:`~pyro_dgm.resample` are the posterior's and go to ``az.loo``. The result has ``mcse`` beside ``se``: the error
    by the finite number of draws, where ``se`` is the spread over data.

    Args:
        idata: a container with ``log_likelihood``.
        var_name: which variable of it, if there are several.
        correct: False takes the draws for the posterior's, as ``az.loo`` does.

    Raises:
        ValueError: without ``log_likelihood``, where it holds NaN or infinity, for several variables and no ``var_name``, or
            for draws of a guide without ``log_q`` (a point estimate, an implicit guide) unless ``correct=False``.

    Warns:
        UserWarning: where Pareto k of some datum is above the threshold, or the verdict of :func:`~pyro_dgm.khat` is "bad":
            the number is then not reliable, and biased by more than ``mcse``.

    References:
        | Magnusson et al. (2019), "Bayesian leave-one-out cross-validation for large data", PMLR 97.
        | Vehtari, Gelman & Gabry (2017), "Practical Bayesian model evaluation", eq. 10.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> mu, y = 0.5 + 0.6 * rng.normal(size=(1, 4000)), np.array([0.2, 0.9, 0.4])  # q is off and too wide
        >>> normal = lambda x, m, s: -0.5 * ((x - m) / s) ** 2 - np.log(s * np.sqrt(2 * np.pi))
        >>> ll = normal(y, mu[..., None], 1.0)
        >>> stats = {"lp": ll.sum(-1) + normal(mu, 0.0, 1.0), "log_q": normal(mu, 0.5, 0.6)}
        >>> groups = {"posterior": {"mu": mu}, "sample_stats": stats, "log_likelihood": {"y": ll}}
        >>> result = loo({"groups": groups, "dims": {}, "coords": {}, "attrs": {}})
        >>> exact = sum(normal(y[i], (y.sum() - y[i]) / 3, (1 + 1 / 3) ** 0.5) for i in range(3))
        >>> bool(abs(elpd_of(result) - exact) < 0.02)
        True
    """
    name, values = _chosen(idata, var_name)
    _refuse_non_finite(name, values)
    container = build(**_EMPTY | idata) if isinstance(idata, dict) else idata
    if not correct or _is_posterior(idata):
        import arviz as az

        return az.loo(container, var_name=name, pointwise=True)
    stats = group(idata, "sample_stats")
    if not {"lp", "log_q"} <= set(stats):
        raise ValueError(
            "loo: sample_stats has no log_q, so draws of the guide cannot be corrected (a guide without a density?). Make the "
            "container with from_svi and a guide that has one, or accept the guide's error by loo(idata, correct=False)."
        )
    ll = values.reshape(stats["lp"].size, -1).astype(np.float64)
    log_weight = (stats["lp"] - stats["log_q"]).reshape(-1)
    elpd, k, error = _pointwise(ll, log_weight)
    _warn_of_unreliable(k, khat(idata) if "log_weight" in stats else judge(log_weight))
    return _result(container, name, ll, elpd, k, error)


def _chosen(idata: Any, var_name: str | None) -> tuple[str, np.ndarray]:
    ll = group(idata, "log_likelihood")
    if var_name is None and len(ll) != 1:
        raise ValueError(f"loo: log_likelihood has the variables {sorted(ll)}; say which by var_name=.")
    name = next(iter(ll)) if var_name is None else var_name
    if name not in ll:
        raise ValueError(f"loo: log_likelihood has no variable '{name}'; it has {sorted(ll)}.")
    return name, ll[name]


def _refuse_non_finite(name: str, values: np.ndarray) -> None:
    """A datum that some draw finds impossible has no leave-one-out score: its weight would be infinite."""
    bad = ~np.isfinite(values)
    if bad.any():
        data = [tuple(map(int, i)) for i in np.argwhere(bad.any((0, 1)))[:5]]
        raise ValueError(
            f"loo: log_likelihood['{name}'] is NaN or infinite in {int(bad.sum())} of {bad.size} entries, for the data (by "
            f"index) {data}{' and others' if len(data) == 5 else ''}. Leave these draws out, or these data, or repair the "
            "likelihood: minus infinity says that a datum is impossible under a draw."
        )


def _is_posterior(idata: Any) -> bool:
    """Whether draws are the posterior's own: by MCMC, by chains that jump, or resampled."""
    method = str(group_attrs(idata, "/").get("inference_method", "svi"))
    return method in ("mcmc", "neutra", "explore") or bool(group_attrs(idata, "sample_stats").get("resampled", False))


def _pointwise(ll: np.ndarray, log_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """elpd and Pareto k of every datum, and the Monte-Carlo error of the sum, by the delta method for weighted means."""
    elpd = np.empty(ll.shape[1])
    k = np.empty(ll.shape[1])
    influence = np.zeros(len(ll))
    for i, column in enumerate(ll.T):
        weights, k[i] = psis(log_weight - column)
        elpd[i] = np.logaddexp.reduce(weights + column)
        influence += np.exp(weights) * np.expm1(column - elpd[i])
    return elpd, k, float(np.sqrt((influence**2).sum()))


def _warn_of_unreliable(k: np.ndarray, verdict: KHat) -> None:
    good = verdict.threshold
    if verdict.rows is not None and verdict.independent:
        fault = (
            f"rows of plate '{verdict.rows.plate}' share no latent, so a row left out is predicted by its prior alone"
        )
        advice = f"Its elpd is the log evidence, {verdict.log_evidence:.2f} nats in all (khat)."
    elif verdict.status == "bad":
        fault = f"the guide is far from the posterior (ESS {verdict.ess:.0f} of {verdict.draws}, gap {verdict.gap:.2f} nats)"
        advice = verdict.next_step
    elif (k > good).any():
        fault = f"Pareto k of {int((k > good).sum())} of {len(k)} data is above {good:.2f} (largest {k.max():.2f})"
        advice = (
            f"The guide is not the cause (its own k-hat is {verdict.k:.2f}): these data move the posterior, and it must be "
            "fitted without them (K-fold cross-validation), or their likelihood needs heavier tails."
        )
        if verdict.k >= _CLEAN:
            advice = f"The guide has a part in it (its own k-hat is {verdict.k:.2f}): {verdict.next_step}"
    else:
        return
    warn_user(f"loo: {fault}; the estimate is not reliable. {advice}")


def _result(container: Any, name: str, ll: np.ndarray, elpd: np.ndarray, k: np.ndarray, error: float) -> Any:
    if arviz_major() == 0:
        result = _elpd_data(container, name, ll, elpd, k)
        result["mcse"] = error
        return result
    import arviz as az

    stats = container["sample_stats"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = az.loo_approximate_posterior(container, stats["lp"], stats["log_q"], pointwise=True, var_name=name)
    result.mcse = error
    result.n_samples = len(ll)
    return result


def _elpd_data(container: Any, name: str, ll: np.ndarray, elpd: np.ndarray, k: np.ndarray) -> Any:
    """What ``loo_approximate_posterior`` of ArviZ 1.x returns, in the container of 0.x."""
    from arviz.stats.stats_utils import ELPDData

    template = container["log_likelihood"][name].isel(chain=0, draw=0, drop=True)
    good = k_threshold(len(ll))
    values = {
        "elpd_loo": elpd.sum(),
        "se": float(np.sqrt(len(elpd) * elpd.var())),
        "p_loo": log_mean(ll).sum() - elpd.sum(),
        "n_samples": len(ll),
        "n_data_points": len(elpd),
        "warning": bool((k > good).any()),
        "loo_i": template.copy(data=elpd.reshape(template.shape)).rename("loo_i"),
        "pareto_k": template.copy(data=k.reshape(template.shape)).rename("pareto_k"),
        "scale": "log",
        "good_k": good,
    }
    return ELPDData(data=list(values.values()), index=list(values))


@checked()
def compare(containers: dict[str, Any], var_name: str | None = None) -> Any:
    """``az.compare`` of models by their corrected :func:`loo`: a table ranked by elpd, in nats.

    Args:
        containers: name -> container, or a result of :func:`loo`. All must hold the same data.
        var_name: as in :func:`loo`.

    Raises:
        ValueError: for fewer than two models, and as :func:`loo`.

    Warns:
        UserWarning: where Pareto k is high, and where the best two differ by less than two standard errors or four nats:
            then neither their order nor the stacking weights say that one is better.

    References:
        | Sivula, Magnusson, Matamoros & Vehtari (2020), "Uncertainty in Bayesian leave-one-out cross-validation based model
          comparison", arXiv 2008.10296: below 4 nats the error of a difference is itself unreliable.
    """
    import arviz as az

    if len(containers) < 2:
        raise ValueError(f"compare: expected two or more models, got {list(containers)}.")
    results = {k: v if _is_result(v) else loo(v, var_name) for k, v in containers.items()}
    table = az.compare(results)
    _warn_of_ties(table, results)
    return table


def _is_result(value: Any) -> bool:
    return type(value).__name__.startswith("ELPDData")


def _warn_of_ties(table: Any, results: dict[str, Any]) -> None:
    first, second = (results[name] for name in table.index[:2])
    difference = elpd_of(first) - elpd_of(second)
    gaps = _elpd_by_datum(first) - _elpd_by_datum(second)
    error = float(np.sqrt(len(gaps) * gaps.var() + _mcse(first) ** 2 + _mcse(second) ** 2))
    if difference < max(2.0 * error, _SMALL):
        warn_user(
            f"compare: '{table.index[0]}' and '{table.index[1]}' differ by {difference:.2f} +- {error:.2f} nats, which is not "
            "resolved: their order and the weights do not say that one is better."
        )


def elpd_of(result: Any) -> float:
    """The estimate in a result of either line of ArviZ, in nats."""
    return float(result["elpd_loo"] if arviz_major() == 0 else result.elpd)


def _elpd_by_datum(result: Any) -> np.ndarray:
    return np.asarray(result["loo_i"] if arviz_major() == 0 else result.elpd_i).ravel()


def _mcse(result: Any) -> float:
    """Zero for results of ``az.loo``, which has none."""
    return float(getattr(result, "mcse", 0.0))
