"""Can an implicit posterior's classifier be believed? A fresh one is fitted, and both are checked against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_dgm.core.ratio import RatioCheck, calibration, learn_ratio
from pyro_dgm.core.weights import log_mean_exp
from pyro_dgm.objectives.contrast import Contrast

__all__ = ["Diagnosis", "diagnosed"]


@dataclass(frozen=True)
class Diagnosis:
    r"""What a fresh classifier says of an implicit posterior q against its reference r. All numbers are **estimates**.

    Attributes:
        elbo, elbo_error: the ELBO by the classifier of the training, and the draws' standard error, in nats.
        fresh_elbo, fresh_error: the same by a fresh one, on draws that it has not seen.
        gap, gap_error: :math:`\log \frac1S \sum w - \frac1S \sum \log w` by the fresh one: an estimate of KL(q || p).
        trained: calibration of the training's classifier on draws of r.
        fresh: that of the fresh one.
        c2st, c2st_error: accuracy of the fresh classifier in telling q from r: how far the reference is from q.
        other_modes: modes of the posterior that were found and that q does not reach.
    """

    elbo: float
    elbo_error: float
    fresh_elbo: float
    fresh_error: float
    gap: float
    gap_error: float
    trained: RatioCheck
    fresh: RatioCheck
    c2st: float
    c2st_error: float
    other_modes: int

    @property
    def faults(self) -> list[str]:
        """What speaks against believing it; empty where nothing does."""
        found = [f"training's classifier: {self.trained.fault}"] if self.trained.fault else []
        found += [f"fresh classifier: {self.fresh.fault}"] if self.fresh.fault else []
        apart = abs(self.elbo - self.fresh_elbo)
        if not apart < 0.1 + 4.0 * math.hypot(self.elbo_error, self.fresh_error):
            found.append(f"the two classifiers differ by {apart:.2g} nats in the ELBO")
        if self.other_modes:
            found.append(f"{self.other_modes} mode(s) of the posterior were found that it does not reach")
        if self.c2st > 0.95:
            found.append(f"q and its reference are told apart with accuracy {self.c2st:.2f}: no ratio can be learned")
        if self.gap > 0.1 + 4.0 * self.gap_error:
            found.append(f"q is some {self.gap:.2g} nats from the posterior")
        return found

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against it. That is no proof: a density would be."""
        return not self.faults

    def __str__(self) -> str:
        return "\n".join([
            "estimates by a learned ratio, no bounds (nats):",
            f"  ELBO, the training's classifier   {self.elbo:.3f} +- {self.elbo_error:.3f}",
            f"  ELBO, a fresh classifier          {self.fresh_elbo:.3f} +- {self.fresh_error:.3f}",
            f"  KL(q || p), a fresh classifier    {self.gap:.3f} +- {self.gap_error:.3f}",
            f"  training's classifier             {self.trained}",
            f"  fresh classifier                  {self.fresh}",
            f"  C2ST of q against the reference   {self.c2st:.3f} +- {self.c2st_error:.3f} (0.5: the same)",
            f"  modes found that q does not reach {self.other_modes}",
            "verdict: nothing speaks against it" if self.ok else "verdict: do not believe it. " + "; ".join(self.faults),
        ])  # fmt: skip

    __repr__ = __str__


def diagnosed(contrast: Contrast, log_joint: Callable[[Tensor], Tensor], theta: Tensor, other_modes: int) -> Diagnosis:
    """The diagnosis from fresh draws of q: half of them train the new classifier, the others are scored."""
    excess, other, of_other = contrast.pairs(theta, log_joint)
    q, r = (
        torch.cat([contrast.whiten(t), contrast.read(e)[:, None]], -1) for t, e in ((theta, excess), (other, of_other))
    )
    half = len(theta) // 2
    ratio, _ = learn_ratio(q[:half], r[:half], max_steps=1000)
    with torch.no_grad():
        trained = calibration(contrast.log_ratio(other, of_other))
        of_q, of_r = ratio(q[half:]), ratio(r[half:])
        old = (excess - contrast.log_ratio(theta, excess)).double()
        new = (excess[half:] - of_q).double()
    right = torch.cat([of_q > 0, of_r <= 0]).double()
    gap, gap_error = _gap(new)
    return Diagnosis(
        *_mean(old), *_mean(new), gap, gap_error, trained, calibration(of_r),
        *_mean(right), other_modes,
    )  # fmt: skip


def _mean(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def _gap(log_w: Tensor) -> tuple[float, float]:
    """Log of the mean weight minus the mean log weight, and its standard error by the delta method."""
    log_of_mean = log_mean_exp(log_w)[0]
    terms = (log_w - log_of_mean).exp() - log_w
    return float(log_of_mean - log_w.mean()), float(terms.std()) / math.sqrt(len(log_w))
