r"""How sharp posteriors are: what ranks and coverage cannot show, since the prior itself has both right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyro_dgm.evaluate.score import Score

__all__ = ["Sharpness", "sharpness_of"]

_CLEAR = 3.0  # standard errors; a convention
_LOST = 0.05  # nats; as the gap of a verdict


@dataclass(frozen=True)
class Sharpness:
    r"""How much a posterior knows, where its ranks say only that it is right on average; each with its standard error.

    Attributes:
        removed: share of the prior's score that is removed, 0 for the prior and 1 for the truth itself: one minus the ratio
            of the mean CRPS of the draws to that of other simulations' truths, both on the scale of the prior's ranks.
        log_q: expected log density at the true parameters, nats; None for a posterior without a density.
        read: the same minus the log density of the truth of another simulation, nats: what depends on the data.
        lost: a lower bound of :math:`E\,\mathrm{KL}(p(\theta|x) \| q)`, nats, at most :math:`\log(S + 1)`: how much higher
            ``log_q`` of the exact posterior is. With :math:`w = p(\theta, x) / q(\theta)` it is the mean of
            :math:`\log w^* - \log \frac{1}{S+1}(w^* + \sum_s w_s)` with :math:`w^*` at the truth. None without the densities.

    References:
        | Gneiting & Raftery (2007), "Strictly proper scoring rules": CRPS, the log score.
        | Grosse et al. (2015), arXiv 1511.02543: a draw of the posterior among those of q bounds the evidence from above.
    """

    removed: Score
    log_q: Score | None = None
    read: Score | None = None
    lost: Score | None = None

    @property
    def faults(self) -> list[str]:
        """What is significantly wrong, in words; a posterior may be calibrated and have them all."""
        lost = self.lost is not None and self.lost.value > max(_CLEAR * self.lost.standard_error, _LOST)
        blind = not _is_clear(self.removed) and (self.read is None or not _is_clear(self.read))
        found = []
        if blind and (lost or self.lost is None):
            found.append("it knows no more than the prior: it does not read the data, or they say nothing")
        if lost and self.lost is not None:
            found.append(
                f"the exact posterior is sharper by {self.lost.value:.2f} +- {self.lost.standard_error:.2f} nats or more"
            )
        return found

    def __str__(self) -> str:
        share = f"{100 * self.removed.value:.0f} +- {100 * self.removed.standard_error:.0f}"
        parts = [f"{share} % of the prior's score removed"]
        if self.log_q is not None:
            parts.append(f"log q at the truths {self.log_q} nats")
        if self.lost is not None:
            parts.append(f"short of the exact posterior by {_in_words(self.lost)}")
        faults = "".join(f" Fault: {fault}." for fault in self.faults)
        return f"Sharpness: {', '.join(parts)}.{faults}"


def _in_words(bound: Score) -> str:
    return f"{max(bound.value, 0.0):.2f} +- {bound.standard_error:.2f} nats or more"


def _is_clear(score: Score) -> bool:
    return score.value > _CLEAR * score.standard_error


def sharpness_of(
    draws: dict[str, np.ndarray],
    truth: dict[str, np.ndarray],
    log_q: tuple[np.ndarray, ...] = (),
    of_others: np.ndarray | None = None,
    joint: tuple[np.ndarray, ...] = (),
) -> Sharpness:
    """Sharpness of M posteriors.

    Args:
        draws, truth: ``{site: (M, S, *site)}`` and ``{site: (M, *site)}``.
        log_q: log densities of draws ``(M, S)`` and truths ``(M,)``; empty where not known.
        of_others: log densities of truths that belong to other data, ``(M,)``.
        joint: log joint densities like ``log_q``, of the first of the simulations; empty where not known.
    """
    removed = _removed(draws, truth)
    if not log_q or of_others is None:
        return Sharpness(removed)
    lost = _lost(log_q, joint) if joint else None
    return Sharpness(removed, _mean(log_q[1]), _mean(log_q[1] - of_others), lost)


def _lost(log_q: tuple[np.ndarray, ...], joint: tuple[np.ndarray, ...]) -> Score | None:
    m = len(joint[1])
    lw = np.concatenate([joint[0] - log_q[0][:m], (joint[1] - log_q[1][:m])[:, None]], 1)
    lw = lw[np.isfinite(lw[:, -1]) & ~np.isnan(lw).any(1)]
    if len(lw) < 2:
        return None
    return _mean(lw[:, -1] - np.logaddexp.reduce(lw, axis=1) + np.log(lw.shape[1]))


def _removed(draws: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> Score:
    """On the scale of the prior's ranks, whatever the parameters' units and tails."""
    own = []
    prior = []
    for name, values in truth.items():
        drawn = draws[name].reshape(*draws[name].shape[:2], -1)
        for j, column in enumerate(values.reshape(len(values), -1).T):
            order = np.sort(column)
            at = np.searchsorted(order, column) / len(order)
            own.append(_crps(np.searchsorted(order, drawn[..., j]) / len(order), at))
            prior.append(_crps_of_all(at))
    a = np.mean(own, 0)
    b = np.mean(prior, 0)
    if not b.sum():
        return Score(0.0, 0.0)
    ratio = a.sum() / b.sum()
    return Score(float(1.0 - ratio), float(np.sqrt(np.square(a - ratio * b).sum()) / b.sum()))


def _crps(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of draws ``(M, S)`` at truths ``(M,)``, without bias in S."""
    n = draws.shape[1]
    place = 2.0 * np.arange(1, n + 1) - n - 1.0
    spread = (np.sort(draws, 1) * place).sum(1) / (n * max(n - 1, 1))
    return np.abs(draws - truth[:, None]).mean(1) - spread


def _crps_of_all(truth: np.ndarray) -> np.ndarray:
    """The same where all truths are the draws of each: in N log N operations."""
    n = len(truth)
    order = np.sort(truth)
    below = np.concatenate([[0.0], np.cumsum(order)])
    i = np.searchsorted(order, truth)
    spread = ((2.0 * np.arange(1, n + 1) - n - 1.0) * order).sum() / (n * max(n - 1, 1))
    return (truth * (2 * i - n) + below[-1] - 2.0 * below[i]) / n - spread


def _mean(values: np.ndarray) -> Score:
    return Score(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))
