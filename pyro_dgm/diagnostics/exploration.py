"""What was found around a guide's draws: by short chains, by ascents from the prior, and by what weights change."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from pyro_dgm.core.weights import corrections

__all__ = ["Exploration", "percent"]

# Set on the 105 fits on which the verdict's thresholds were set (diagnostics/khat.py).
_DRIFT = 0.25  # sd; chains from exact draws drift by 0.03 to 0.07, largest over coordinates
_DRIFT_SD = 0.2  # log sd; fires on 31 and 1
_ACCEPTANCE = 0.4  # share; any of these three fires on 33 and 1
_CORRECTION = 0.1  # sd; fires on 25 and 0
_DEVIATION = 0.1  # sd, and log sd: what the reference posteriors are held to
_NEARLY = 2.0  # times that; chosen by hand: of the centred eight schools, whose means are right, it is .09 to .11


@dataclass(frozen=True)
class Exploration:
    """What short chains and ascents from prior draws found.

    Attributes:
        drift: largest change of a coordinate's mean along the chains, in standard deviations of the guide.
        drift_sd: largest absolute change of a log standard deviation.
        acceptance: share of accepted proposals in the second half.
        other_modes: modes of comparable density that the guide's draws do not reach.
        correction, correction_sd, correction_quantiles, correction_ends: largest changes by importance weights: of a posterior
            mean, in sd; of a log sd; of a quantile from 5 to 95 %, in sd; and of the shares beyond the 1 % and 99 % quantiles, as
            sd of a normal law. Infinite where they are not known.
        deviation: largest change of a mean (sd) or log sd along longer chains, over latents and the directions in which the score
            is most wrong; infinite where they were not asked, since the weights say enough or the guide is far off.
        unseen: why no chains were run and no modes were looked for; empty where they were.
        unmoved: why modes were looked for, but no chains were run; empty where they were.
        unfitted: what shows that the guide was never fitted; empty where nothing does.
        unsure: why the weights themselves are not known well enough; empty where they are.
    """

    drift: float = 0.0
    drift_sd: float = 0.0
    acceptance: float = 1.0
    other_modes: int = 0
    correction: float = 0.0
    correction_sd: float = math.inf
    correction_quantiles: float = math.inf
    correction_ends: float = math.inf
    deviation: float = math.inf
    unseen: str = ""
    unmoved: str = ""
    unfitted: str = ""
    unsure: str = ""

    def weighed(self, draws: np.ndarray, log_weight: np.ndarray) -> Exploration:
        """With what weights change of draws ``(n, F)``."""
        found = corrections(draws, log_weight)
        return replace(
            self,
            correction=found.means,
            correction_sd=found.sds,
            correction_quantiles=found.quantiles,
            correction_ends=found.ends,
        )

    @property
    def moved(self) -> bool:
        """Whether the chains left the guide, by more than they do by chance."""
        return self.drift >= _DRIFT or self.drift_sd >= _DRIFT_SD or self.acceptance < _ACCEPTANCE

    def scaled(self, factor: float) -> Exploration:
        """With drifts so many times as large."""
        return replace(self, drift=factor * self.drift, drift_sd=factor * self.drift_sd)

    @property
    def contradicts(self) -> bool:
        """Whether something was found that a good guide does not have."""
        corrected = self.corrects_means and self.deviation >= _DEVIATION
        return self.moved or self.other_modes > 0 or corrected or bool(self.unsure)

    @property
    def corrects_means(self) -> bool:
        """Whether weights move a mean."""
        return self.correction >= _CORRECTION

    @property
    def confirms(self) -> bool:
        """Whether longer chains stayed where the guide is, whatever its weights."""
        return self.deviation < _DEVIATION and not self.contradicts

    @property
    def nearly_confirms(self) -> bool:
        """Whether they stayed near enough for means and sds to be of use."""
        return self.deviation < _NEARLY * _DEVIATION and not self.contradicts

    def explored(self, repairable: bool) -> str:
        """What was found, in words; draws that are repairable have weights that can be believed."""
        if self.other_modes:
            return f"{self.other_modes} more mode(s) were found that it does not cover."
        moved = f"mean by {self.drift:.2f} sd, log sd by {self.drift_sd:.2f}, acceptance {self.acceptance:.2f}"
        if self.moved:
            return f"Short MCMC leaves it ({moved}): neutra runs it longer."
        if self.confirms:
            return (
                f"Longer chains change no mean, sd or worst direction by more than {self.deviation:.2f} (sd or log sd)."
            )
        if self.corrects_means and repairable:
            return f"Importance weights move a mean by {self.correction:.2f} sd."
        if self.unseen:
            return f"No short MCMC was run and no modes were looked for: {self.unseen}."
        chains = f" No short MCMC was run: {self.unmoved}." if self.unmoved else ""
        return f"A mode that no start and no draw has seen stays unseen.{chains}"


def percent(share: float) -> str:
    """A share in per cent that says none only of none, and all only of all.

    >>> percent(0.0), percent(0.001), percent(0.5), percent(0.999)
    ('0%', 'fewer than 1%', '50%', 'more than 99%')
    """
    if 0.0 < share < 1.0 and f"{share:.0%}" in ("0%", "100%"):
        return "fewer than 1%" if share < 0.5 else "more than 99%"
    return f"{share:.0%}"
