r"""What importance weights :math:`w = p(x, \theta) / q(\theta)` say of a guide's draws.

**Verdict.** Pareto k alone is none: it passed 15 of 34 deliberately bad fits (a Gaussian that is too wide, shifted by half a
standard deviation, a mean field). The gap between the importance-weighted evidence and the ELBO, an estimate of
:math:`\mathrm{KL}(q\|p)`, caught all of them, but no weight can show a mode that q has never visited. The verdict uses
both, and what :mod:`~pyro_dgm.diagnostics.short_chains` found. Where a gap is spread over many latents, and longer chains
stay where the guide is, means, standard deviations and dependence are right all the same: the verdict is good, of the draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from typing import Any, Literal

import numpy as np

from pyro_dgm.core.kinds import checked, shown
from pyro_dgm.core.weights import LEAST_DRAWS, NEARLY_EQUAL, correction, evidence_error, k_threshold, log_mean, psis
from pyro_dgm.diagnostics.containers import group_attrs, log_weights_of, resample
from pyro_dgm.diagnostics.exploration import Exploration, percent

__all__ = [
    "KHat",
    "Rows",
    "judge",
    "judge_elements",
    "judge_rows",
    "khat",
    "repaired",
    "seen_rows",
    "with_rows",
]

# Thresholds. Unless said otherwise they were set on 105 fits of posteriordb models, of 4,000 draws: 34 bad ones (a mean off by
# more than 0.1 sd, a log sd or the KL by more than 0.1) and 71 good ones. Pareto k >= 0.7 alone fires on 19 and 4 of them.
_GAP = 0.05  # nats; fires on 34 of the bad and 3 of the good, which had not converged
_NO_TAIL = 1.5  # nats from ELBO to the largest log weight: no weight above 4.5, so k means nothing. Chosen by hand
_USABLE = 0.1  # ESS as a share of the draws, below which resampling leaves too few. Not measured; chosen by hand
_ENOUGH = 100  # ESS below which resample is not advised: an sd of so few draws has an error of 7 %
_MOST_ROWS = 0.95  # share of rows that must be good: k-hat of one in twenty is off by two of its errors
_SEEN_ROWS = 2_000  # rows of a plate that get a k-hat, evenly spaced. Not measured; chosen by hand
# Of what weights change, below which the draws are taken as they are; chosen by hand, as what counts as a fault (docs/trust.md).
_CHANGES = {"means": 0.1, "sds": 0.1, "quantiles": 0.15, "tails": 0.25}

Status = Literal["exact", "good", "usable", "bad"]
Source = Literal["as drawn", "by weights", "a bound", "not known"]
_STATUSES: tuple[Status, ...] = ("exact", "good", "usable", "bad")


@dataclass(frozen=True)
class Rows:
    """Verdicts on the rows of a plate, each by its own weights.

    Attributes:
        plate: its name; several joined by a comma.
        given: the latents outside of the plate, which were held at one draw of the guide; empty where there are none: the
            rows are then independent posteriors.
        total: rows of the plate; of more than 2,000 so many, evenly spaced, were looked at.
        k, ess: Pareto k of each row, and its effective number of draws.
        gap: estimates of each row's KL(q || p), nats.
        status: 0 to 3, for "exact", "good", "usable", "bad".
    """

    plate: str
    given: str
    total: int
    k: tuple[float, ...]
    ess: tuple[float, ...]
    gap: tuple[float, ...]
    status: tuple[int, ...]

    def share(self, status: Status) -> float:
        """Share of the rows whose verdict is this one or a better one."""
        return float(np.mean(np.asarray(self.status) <= _STATUSES.index(status)))

    @property
    def fine(self) -> float:
        """Share of the rows whose draws can be used as they are."""
        return self.share("good")

    @property
    def shares(self) -> tuple[str, str, str]:
        """Of good, usable and bad rows, in words."""
        usable = self.share("usable")
        return percent(self.fine), percent(usable - self.fine), percent(1.0 - usable)

    def __str__(self) -> str:
        all_seen = len(self.k) == self.total
        seen = f"{len(self.k)} rows" if all_seen else f"the {len(self.k)} rows that were looked at, of {self.total},"
        given = f" given {self.given}" if self.given else ""
        good, usable, bad = self.shares
        return (
            f"plate '{self.plate}'{given}: {good} of {seen} are good, {usable} usable, {bad} bad (k-hat: "
            f"median {np.median(self.k):.2f}, largest {max(self.k):.2f}; their gap {np.mean(self.gap):.3f} nats a row)"
        )


@dataclass(frozen=True, kw_only=True)
class KHat(Exploration):
    r"""The verdict on a variational posterior: what the weights say, and what exploration found.

    Attributes:
        k: Pareto shape of the weights' tail; below ``threshold`` importance estimates converge. Its own error is
            about 0.1 at 4,000 draws. -inf for constant weights; never NaN.
        threshold: :math:`\min(1 - 1/\log_{10} S, 0.7)`.
        ess: effective number of the S draws, :math:`(\sum w)^2 / \sum w^2` after smoothing.
        elbo, elbo_error: mean of log w in nats, and its standard error; a lower bound on the log evidence.
        log_evidence, log_evidence_error: :math:`\log \frac1S \sum w`, and its standard error (nats), of which 1.96 cover in
            95 % of repetitions; infinite where k is too high for an error: the value is then too low on average, and may be
            too high in one run.
        draws: S.
        status: "exact", "good", "usable" or "bad".
        rows: verdicts row by row where the guide's latents are independent over a plate; None where they are not. Where no
            latent is outside of the plate, k and ess are those that 95 % of the rows keep, and the evidence is the rows' sum.
    """

    k: float
    threshold: float
    ess: float
    elbo: float
    elbo_error: float
    log_evidence: float
    log_evidence_error: float
    draws: int
    status: Status
    rows: Rows | None = None

    @property
    def gap(self) -> float:
        r"""Evidence minus ELBO: an estimate of :math:`\mathrm{KL}(q\|p)` in nats."""
        return self.log_evidence - self.elbo

    @property
    def independent(self) -> bool:
        """Whether each row of a plate has a posterior of its own, so that all rows together have no weights of use."""
        return self.rows is not None and not self.rows.given

    @property
    def repairable(self) -> bool:
        """Whether :func:`resample` gives draws of the posterior: k is below the threshold and enough distinct draws are left."""
        return not self.independent and self.k < self.threshold and self.ess >= min(_ENOUGH, self.draws)

    @property
    def statements(self) -> dict[str, Source]:
        """Where each statement can be taken from: means, sds, quantiles (5 to 95 %), tails (beyond 1 and 99 %), and the evidence.

        "as drawn": from the draws as they are, tails in this way alone; "by weights": from those of :func:`resample`, and of
        the evidence with its error; "a bound": the ELBO; "not known". Of globals alone, where elements of plates have weights
        of their own.
        """
        sizes = (self.correction, self.correction_sd, self.correction_quantiles, self.correction_ends)
        changes = dict(zip(_CHANGES, sizes, strict=True))
        silent = self.moved and all(
            size < _CHANGES[what] for what, size in changes.items()
        )  # chains contradict weights
        if silent or self.other_modes or self.unsure or self.unfitted:
            return dict.fromkeys(_CHANGES, "not known") | {"evidence": "a bound"}  # type: ignore[return-value]
        evidence: Source = "by weights" if math.isfinite(self.log_evidence_error) else "a bound"
        return {what: self._source(what, size) for what, size in changes.items()} | {"evidence": evidence}

    def _source(self, what: str, change: float) -> Source:
        """Of one statement: by weights where they are reliable, else by how near the draws are as a whole."""
        if self.repairable and change < _CHANGES[what] and not self.moved:
            return "as drawn"
        if what == "tails":  # what lies beyond the draws no weight shows
            return "not known"
        if self.repairable:
            return "by weights"
        near = self.status in ("exact", "good") or (self.gap < _GAP and not self.moved and self.status == "usable")
        return "as drawn" if near else "not known"

    def _stated(self) -> str:
        """The statements in words, where some can be made and others cannot, or not in the same way."""
        stated = {k: v for k, v in self.statements.items() if k != "evidence"}
        if len(set(stated.values())) < 2:
            return ""
        by_source = {v: ", ".join(k for k in stated if stated[k] == v) for v in stated.values()}
        return f" Trust: {'; '.join(f'{names} {source}' for source, names in by_source.items())}."

    @property
    def next_step(self) -> str:
        """What to do, in one sentence."""
        if self.status == "exact":
            return "q is the posterior, up to the draws' error."
        if self.status == "good":
            if any(source == "by weights" for what, source in self.statements.items() if what != "evidence"):
                return "Use the draws as they are, and those of resample(idata) for what is said by weights."
            return f"Use the draws as they are{', without weights; the evidence is a bound' if self.confirms else ''}."
        if self.unfitted:
            return f"The guide was never fitted ({self.unfitted}): call fit(STL_ELBO()(model, guide), data) first."
        if self.unsure:
            return f"{self.unsure}: NUTS, or structure='joint' where groups are few."
        if self.other_modes:
            return "Draws miss a mode: explore(model, guide, *args) finds and weighs modes."
        if self.repairable:
            return f"resample(idata) gives draws of the posterior, {self.ess:.0f} distinct ones; training longer, more."
        if self.independent:
            return "Train longer, or give each row's posterior a richer family; means over many rows may be right all the same."
        if self.k < self.threshold:
            return f"Weights would leave {self.ess:.0f} distinct draws, too few: train longer, or draw more (num_samples=)."
        if self.statements["means"] == "as drawn":
            return "Use means, sds and quantiles from 5 to 95 % as they are; tails and evidence need longer training, or NUTS."
        return "Do not use it. Train longer, try another family or reparameterise the model; check with NUTS."

    def _of_rows(self) -> str:
        if self.rows is None:
            return ""
        return f" By rows of {self.rows}."

    def _in_spite(self) -> str:
        """Why the verdict is good where k-hat is not."""
        if self.status != "good" or self.k < self.threshold:
            return ""
        if self.gap < _GAP and self.ess > NEARLY_EQUAL * self.draws:
            return " good in spite of k-hat since the weights are nearly equal,"
        return " good in spite of k-hat since longer chains stay where the draws are,"

    def attrs(self) -> dict[str, Any]:
        """The numbers, for a container's attributes."""
        own = {("khat" if k == "k" else k): v for k, v in asdict(self).items() if k != "rows"}
        return own | {f"rows_{k}": v for k, v in (asdict(self.rows) if self.rows else {}).items()}

    def __str__(self) -> str:
        weights = f" k-hat {self.k:.2f} (threshold {self.threshold:.2f}), ESS {self.ess:.0f} of {self.draws},{self._in_spite()}"
        error = f" +- {self.log_evidence_error:.3f} nats"
        if self.log_evidence_error == math.inf:
            error = " nats of unknown error (k-hat is too high)"
        return (
            f"posterior: {self.status}.{'' if self.independent else weights} ELBO {self.elbo:.3f} +- {self.elbo_error:.3f}, "
            f"log evidence {self.log_evidence:.3f}{error}.{self._of_rows()}{self._stated()} {self.next_step} "
            f"{self.explored(self.repairable)}"
        )


@checked()
def khat(idata: Any) -> KHat:
    """The verdict on the draws of :func:`~pyro_dgm.from_svi`.

    Raises:
        ValueError: if the container has no importance weights (draws of MCMC, of an implicit guide).

    References:
        | Yao et al. (2018), "Yes, but did it work?", arXiv 1802.02538.
        | Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72).

    Example:
        >>> import numpy as np
        >>> stats = {"log_weight": np.random.default_rng(0).normal(-3.0, 0.1, (1, 2000))}
        >>> verdict = khat({"groups": {"sample_stats": stats}})
        >>> verdict.status, round(verdict.elbo, 1)
        ('good', -3.0)
    """
    log_weight = log_weights_of("khat", idata)
    attrs = group_attrs(idata, "sample_stats")
    for each in fields(Exploration):
        kind = str if isinstance(each.default, str) else Real
        if not isinstance(attrs.get(each.name, each.default), kind):
            raise TypeError(
                f"khat: the attribute {each.name} of sample_stats is {shown(attrs[each.name])}, expected a "
                f"{'text' if kind is str else 'number'}."
            )
    rows = None
    if "rows_plate" in attrs:
        rows = Rows(**{f.name: _plain(attrs[f"rows_{f.name}"]) for f in fields(Rows)})
    if rows is not None and not rows.given:
        own = {f.name: attrs["khat" if f.name == "k" else f.name] for f in fields(KHat) if f.name != "rows"}
        return KHat(**{k: _plain(v) for k, v in own.items()}, rows=rows)
    explored = Exploration(**{f.name: attrs[f.name] for f in fields(Exploration) if f.name in attrs})
    return with_rows(judge(log_weight, explored), rows)


def repaired(idata: Any, verdict: KHat | None, seed: int | None) -> Any:
    """The container where its draws are the posterior's, resampled where weights repair them; None where they do not."""
    if verdict is None or verdict.status in ("exact", "good"):
        return idata
    return resample(idata, seed=seed) if verdict.status == "usable" and verdict.repairable else None


def with_rows(verdict: KHat, rows: Rows | None) -> KHat:
    """The verdict with that on the rows of a plate given the rest, which may lower it."""
    if rows is None or rows.fine >= _MOST_ROWS:
        return replace(verdict, rows=rows)
    least: Status = "usable" if rows.share("usable") >= _MOST_ROWS else "bad"
    return replace(verdict, rows=rows, status=max(verdict.status, least, key=_STATUSES.index))


def _plain(value: Any) -> Any:
    """An attribute as it was before a file was written."""
    if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value):
        return tuple(np.asarray(value).tolist())
    return value.item() if isinstance(value, np.generic) else value


def judge(log_weight: np.ndarray, explored: Exploration | None = None) -> KHat:
    """The verdict on log weights of any shape, lowered where exploration contradicts it."""
    explored = explored or Exploration()
    lw = np.asarray(log_weight, dtype=np.float64).ravel()
    n = len(lw)
    finite = lw[np.isfinite(lw)]
    elbo = -math.inf
    ess = 0.0
    k = math.inf
    error = math.inf
    if len(finite) == n:
        smoothed = lw - log_mean(lw) - math.log(n)
        if n >= LEAST_DRAWS:
            smoothed, k = psis(lw)
            error = evidence_error(lw, smoothed, k)
        elbo = float(lw.mean())
        ess = float(np.exp(-np.logaddexp.reduce(2.0 * smoothed)))
    evidence = float(log_mean(finite)) + math.log(max(len(finite), 1) / n)
    status = _status(k, k_threshold(n), ess / n, evidence - elbo, float(finite.max(initial=-math.inf)) - elbo)
    if explored.contradicts and status in ("exact", "good"):
        status = "usable"
    if explored.confirms and status in ("usable", "bad") and len(finite) == n:
        status = "good"
    if explored.nearly_confirms and status == "bad" and evidence - elbo < _GAP:  # k from 1 on, of a funnel say
        status = "usable"
    return KHat(
        k=k,
        threshold=k_threshold(n),
        ess=ess,
        elbo=elbo,
        elbo_error=float(finite.std() / math.sqrt(n)) if len(finite) else math.inf,
        log_evidence=evidence,
        log_evidence_error=error,
        draws=n,
        status=status,
        **asdict(explored),
    )


def seen_rows(total: int) -> np.ndarray:
    """The rows of a plate that are looked at."""
    return np.unique(np.linspace(0, total - 1, min(total, _SEEN_ROWS)).round().astype(int))


def judge_rows(
    log_weight: np.ndarray,
    draws: np.ndarray,
    explored: Exploration,
    plate: str,
    given: Sequence[str],
    total: int | None = None,
) -> KHat:
    """The verdict on log weights ``(n, N)`` of the N rows of a plate, as if each row were a posterior of its own.

    Args:
        draws: of each row, ``(n, N, F)``.
        plate, given: as in :class:`Rows`.
        total: of the rows, where these are the ones that are looked at.
    """
    total = total or log_weight.shape[1]
    seen = seen_rows(log_weight.shape[1])
    found = [Exploration(correction=correction(draws[:, i].astype(np.float64), log_weight[:, i])) for i in seen]
    verdicts = [judge(log_weight[:, i], each) for i, each in zip(seen, found, strict=True)]
    k, ess, gap, error = (
        np.array([getattr(v, a) for v in verdicts]) for a in ("k", "ess", "gap", "log_evidence_error")
    )
    status = tuple(_STATUSES.index(v.status) for v in verdicts)
    rows = Rows(plate, ", ".join(given), total, tuple(k.tolist()), tuple(ess.tolist()), tuple(gap.tolist()), status)
    return replace(
        judge(log_weight.sum(1), explored),
        k=float(np.quantile(k, _MOST_ROWS, method="lower")),
        ess=float(np.quantile(ess, 1.0 - _MOST_ROWS, method="higher")),
        log_evidence=float(log_mean(log_weight).sum()),
        log_evidence_error=math.sqrt(float(np.square(error).sum()) * total / len(seen)),
        status=next(s for s in _STATUSES if rows.share(s) >= _MOST_ROWS),
        rows=rows,
    )


def judge_elements(
    log_weight: np.ndarray,
    explored: Exploration,
    local: np.ndarray,
    values: np.ndarray,
    plate: str,
    given: Sequence[str],
    total: int,
) -> KHat:
    """The verdict on weights ``(n,)`` of the globals; that of some elements, by weights given these, may lower it."""
    return with_rows(judge(log_weight, explored), judge_rows(local, values, Exploration(), plate, given, total).rows)


def _status(k: float, threshold: float, ess: float, gap: float, top: float) -> Status:
    """``ess`` is a share of the draws, ``gap`` and ``top`` are evidence and largest log weight above the ELBO."""
    if k == -math.inf:
        return "exact"
    if not (math.isfinite(gap) and math.isfinite(k)):
        return "bad"
    if gap < _GAP and (k < threshold or (ess > NEARLY_EQUAL and (k < 1.0 or top < _NO_TAIL))):
        return "good"
    if (k < threshold and ess > _USABLE) or (gap < _GAP and k < 1.0):
        return "usable"
    return "bad"
