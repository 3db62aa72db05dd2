r"""Leave-one-out prediction from draws of a guide, corrected for the guide.

The draws come from q, not from the posterior, so the weights that leave datum i out are
:math:`w_i \propto p(y, \theta) / (q(\theta)\, p(y_i \mid \theta))`, Pareto-smoothed. ``az.loo`` takes draws for the
posterior's own and gives, for guides of one model, whatever their errors make of it.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pyro_dgm.core.kinds import checked, shown
from pyro_dgm.core.warn import warn_user
from pyro_dgm.core.weights import arviz_major, evidence_error, k_threshold, log_mean, moment_matched, psis
from pyro_dgm.diagnostics.containers import build, group, group_attrs
from pyro_dgm.diagnostics.khat import KHat, judge, khat

__all__ = ["compare", "elpd_of", "loo", "loo_pit"]

_CLEAN = 0.5  # k-hat below which weights have a finite variance: if the guide's are, the data are heavy. Draws are moved to there
_SMALL = 4.0  # nats; below it a difference of elpd is small and its error unreliable (Sivula et al. 2020)

_MOST_PIT = 2_000  # data whose rank among predictions is looked at, 1 ms each

_EMPTY: dict[str, Any] = {"dims": {}, "coords": {}, "attrs": {}}  # what a container of dictionaries may leave out


@checked()
def loo(idata: Any, var_name: str | None = None, *, correct: bool = True, repair: tuple[Any, ...] | None = None) -> Any:
    r"""Expected log predictive density by leave-one-out, in nats, as ArviZ's own ``ELPDData``.

    :math:`\sum_i \log \sum_s w_{is}\, p(y_i \mid \theta_s)`. Draws of MCMC, of :func:`~pyro_dgm.neutra` and of
    :func:`~pyro_dgm.resample` are the posterior's and go to ``az.loo``. The result has ``mcse`` beside ``se``: the error
    by the finite number of draws, where ``se`` is the spread over data.

    Args:
        idata: a container with ``log_likelihood``.
        var_name: which variable of it, if there are several.
        correct: False takes the draws for the posterior's, as ``az.loo`` does.
        repair: ``(model, guide, args)`` or ``(model, guide, args, kwargs)`` of a guide over one vector, to repair the data whose
            Pareto k is above the threshold: new draws of the guide are moved, by affine maps, to where the posterior without the
            datum is, and its elpd is the log evidence minus that without it. Some ten runs of the model for each of them.

    Raises:
        ValueError: without ``log_likelihood``, where it holds NaN or infinity, for several variables and no ``var_name``, or
            for draws of a guide without ``log_q`` (a point estimate, an implicit guide) unless ``correct=False``; for a
            ``repair`` of draws that are not a guide's, or by a guide that has no density over one vector.

    Warns:
        UserWarning: where Pareto k of some datum is above the threshold, or the verdict of :func:`~pyro_dgm.khat` is "bad":
            the number is then not reliable, and biased by more than ``mcse``.

    References:
        | Magnusson et al. (2019), "Bayesian leave-one-out cross-validation for large data", PMLR 97.
        | Paananen, Piironen, Buerkner & Vehtari (2021), "Implicitly adaptive importance sampling": moment matching.
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
        if repair is not None:
            raise ValueError(
                "loo: repair= moves draws of a guide, and these are taken for the posterior's: expected repair=None."
            )
        import arviz as az

        return az.loo(container, var_name=name, pointwise=True)
    stats = group(idata, "sample_stats")
    if not {"lp", "log_q"} <= set(stats):
        raise ValueError(
            "loo: sample_stats has no log_q, so draws of the guide cannot be corrected (a guide without a density?). Make the "
            "container with from_svi and a guide that has one, or accept the guide's error by loo(idata, correct=False)."
        )
    ll = values.reshape(stats["lp"].size, -1).astype(np.float64)
    log_weight = _log_weights(idata)
    elpd, k, error = _pointwise(ll, log_weight)
    verdict = khat(idata) if "log_weight" in stats else judge(log_weight)
    if repair is not None and verdict.k < verdict.threshold:
        added = _repair(name, repair, elpd, k, verdict.threshold)
        error = math.hypot(_pointwise(ll[:, ~added.done], log_weight)[2], added.error) if added.done.any() else error
    _warn_of_unreliable(k, verdict)
    return _result(container, name, ll, elpd, k, error, repair is not None)


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


class _Repaired(NamedTuple):
    """Which data have new values, and the error of their sum."""

    done: np.ndarray
    error: float


def _repair(name: str, repair: tuple[Any, ...], elpd: np.ndarray, k: np.ndarray, threshold: float) -> _Repaired:
    """Put better values of ``elpd`` and ``k`` in the place of those of influential data."""
    done, variance = np.zeros(len(k), dtype=bool), 0.0
    parts = _parts_of(repair)
    if not (k > threshold).any():
        return _Repaired(done, 0.0)
    from pyro_dgm.diagnostics.short_chains import densities_around

    points, log_q, densities = densities_around(*parts, name, len(k))
    whole, smoothed, of_whole = moment_matched(points, log_q, lambda x: densities(x)[0], _CLEAN)
    for i in np.flatnonzero(k > threshold).tolist():
        raw, of_raw, lower = moment_matched(points, log_q, partial(_without, densities, i), _CLEAN)
        if max(lower, of_whole) < k[i]:
            elpd[i] = float(log_mean(whole) - log_mean(raw))
            k[i] = max(lower, of_whole)
            done[i] = True
            variance += evidence_error(raw, of_raw, lower) ** 2
    shared = done.sum() * evidence_error(whole, smoothed, of_whole)
    return _Repaired(done, math.hypot(math.sqrt(variance), shared))


def _without(densities: Any, i: int, points: np.ndarray) -> np.ndarray:
    joint, ll = densities(points)
    return joint - ll[:, i]


def _parts_of(repair: tuple[Any, ...]) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    parts = (*repair, {}) if isinstance(repair, tuple) and len(repair) == 3 else repair
    if (
        not isinstance(parts, tuple)
        or len(parts) != 4
        or not isinstance(parts[2], tuple)
        or not isinstance(parts[3], dict)
    ):
        raise ValueError(
            f"loo: repair={shown(repair)}: expected (model, guide, args) or (model, guide, args, kwargs), the arguments as a "
            "tuple and a dictionary: repair=(model, guide, (x,))."
        )
    return parts


def loo_pit(idata: Any, name: str) -> np.ndarray:
    r"""Probability :math:`p(\tilde y_i \le y_i \mid y_{-i})` of each datum, by ArviZ; uniform where the model predicts right.

    Whole numbers, data and predictions alike, get a uniform number added, which makes theirs uniform, too.

    Args:
        idata, name: as of :func:`loo`, with ``posterior_predictive``.

    Returns:
        Numbers in (0, 1) of at most 2,000 data, evenly spaced; none of a variable whose data are not one number each.
    """
    ll, new, y = (group(idata, g).get(name) for g in ("log_likelihood", "posterior_predictive", "observed_data"))
    if ll is None or new is None or y is None:
        return np.zeros(0)
    y = y.astype(np.float64).ravel()
    there = np.flatnonzero(~np.isnan(y))
    n = ll.shape[0] * ll.shape[1]
    ll = ll.reshape(n, -1)
    if ll.shape[1] != len(there):
        return np.zeros(0)
    seen = np.unique(np.linspace(0, len(there) - 1, min(_MOST_PIT, len(there))).round().astype(int))
    values, new = y[there][seen], new.reshape(n, -1)[:, there[seen]].astype(np.float64)
    if (values == values.round()).all() and (new == new.round()).all():
        rng = np.random.default_rng(0)
        values, new = values + rng.random(values.shape), new + rng.random(new.shape)
    corrected = "log_q" in group(idata, "sample_stats") and not _is_posterior(idata)
    log_weight = _log_weights(idata) if corrected else np.zeros(n)
    weights = np.stack([psis(log_weight - ll[:, i])[0] for i in seen])
    return _pit_by_arviz(values, np.ascontiguousarray(new.T), weights)


def _log_weights(idata: Any) -> np.ndarray:
    stats = group(idata, "sample_stats")
    return (stats["lp"] - stats["log_q"]).reshape(-1)


def _pit_by_arviz(y: np.ndarray, new: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    """Of data ``(N,)`` among predictions ``(N, n)``. ArviZ 1.x fits the tails, beyond which its test would see a zero."""
    if arviz_major() == 0:
        import arviz as az

        return np.asarray(az.loo_pit(y=y, y_hat=new, log_weights=log_weights))
    from arviz_stats.base import array_stats

    options = {"pareto_pit": True} if hasattr(array_stats, "uniformity_test") else {}
    return np.asarray(array_stats.loo_pit(new, y, log_weights, chain_axis=None, draw_axis=-1, **options))


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


def _result(
    container: Any, name: str, ll: np.ndarray, elpd: np.ndarray, k: np.ndarray, error: float, repaired: bool
) -> Any:
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
    if repaired:
        _put(result, ll, elpd, k)
    return result


def _put(result: Any, ll: np.ndarray, elpd: np.ndarray, k: np.ndarray) -> None:
    """Other values than those of ArviZ 1.x, by datum and in all."""
    result.elpd_i = result.elpd_i.copy(data=elpd.reshape(result.elpd_i.shape))
    result.pareto_k = result.pareto_k.copy(data=k.reshape(result.pareto_k.shape))
    result.elpd, result.se = float(elpd.sum()), float(np.sqrt(len(elpd) * elpd.var()))
    result.p = float(log_mean(ll).sum() - elpd.sum())
    result.warning = bool((k > result.good_k).any())


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
