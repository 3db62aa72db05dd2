r"""Does the observation look like what the simulator produces? An amortised posterior knows nothing of other data.

Summaries of the simulations are whitened, and the score of a data set is its distance to the k-th nearest neighbour in one
half of the simulations. The p-value is the rank of the observation's score among those of the other half:

.. math:: p = \frac{1 + \#\{i : s(x_i) \ge s(x_o)\}}{n + 1}

If the observation comes from the model, it is one of n + 1 exchangeable scores, so :math:`P(p \le \alpha) \le \alpha` exactly,
for any score (Vovk, Gammerman & Shafer 2005, "Algorithmic learning in a random world", section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_dgm.amortized.sets import Range
from pyro_dgm.core.devices import one_at_a_time
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import as_tensor_like, refuse_non_finite
from pyro_dgm.core.warn import warn_user
from pyro_dgm.diagnostics.posteriors import observed_names
from pyro_dgm.simulation.store import Simulations

__all__ = ["Misspecification", "misspecification"]

# Not measured; chosen by hand. The test keeps its level whatever they are.
_ROWS = 10_000  # simulations that are used
_LEAST = 200  # the smallest p-value is then 0.01, the level
_LEVEL = 0.01
Summary = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Misspecification:
    """How far an observation is from the simulations.

    Attributes:
        p_value: at most alpha with probability at most alpha if the observation comes from the model.
        score: distance of the observation to its 5th neighbour, in whitened summaries.
        scores: the same of simulations.
        marginal: for every number of the summary, the two-sided share of simulations that are as extreme.
    """

    p_value: float
    score: float
    scores: np.ndarray = field(repr=False)
    marginal: dict[str, float] = field(repr=False)

    @property
    def outside(self) -> bool:
        """Whether the observation is rejected at 1 %."""
        return self.p_value <= _LEVEL

    def __str__(self) -> str:
        head = f"p = {self.p_value:.2g} (distance {self.score:.3g}; median of simulations {np.median(self.scores):.3g})"
        if not self.outside:
            return f"{head}: the observation lies where simulations lie, as far as these summaries tell."
        worst = min(self.marginal, key=lambda k: self.marginal[k])
        if self.marginal[worst] * len(self.marginal) < 5 * _LEVEL:
            return (
                f"{head}: outside; {worst} is more extreme than all but {self.marginal[worst]:.2g} of the simulations."
            )
        return f"{head}: outside; no single number is unusual, their combination is."


@checked()
@one_at_a_time
def misspecification(
    simulations: Mapping[str, Tensor],
    *,
    observed: Sequence[str] | None = None,
    summary: Summary | None = None,
    seed: int | None = 0,
    **data: Any,
) -> Misspecification:
    """Test whether one data set is among those that the simulator produces; warns where it is not.

    Args:
        simulations: of :func:`~pyro_dgm.simulate`; at least 200, of which 10,000 are used.
        observed: names of the data sites, if ``simulations`` is a plain mapping; None for those that it knows.
        summary: ``f({site: (n, *site)}) -> (n, F)``, what is compared: moments, or the features that a guide's encoder
            learned. None for all numbers of the data side by side; padded sites by mean, deviation and count.
        seed: of the split in two halves.
        data: the observation, ``{observed site: value}``.

    Raises:
        ValueError: for a name that is unknown or missing, a wrong shape, NaN, too few simulations, and a summary that is
            not ``(n, F)``.

    Note:
        It sees what the summary shows, and an observation inside the range can still come from another model. It is a test
        of the joint prior predictive: a vague prior predicts almost anything, and hardly any data lie outside.

    References:
        | Cannon, Ward & Schmon (2022), "Investigating the impact of model misspecification in neural simulation-based
          inference", arXiv 2209.01845: amortised posteriors go wrong outside of the simulations.
        | Schmitt, Buerkner, Koethe & Radev (2023), "Detecting model misspecification in amortized Bayesian inference with
          neural networks", arXiv 2112.08866.

    Example:
        >>> import warnings, pyro_dgm as dgm, pyro, pyro.distributions as dist
        >>> def model(x=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        ...     with pyro.plate("n", 10):
        ...         pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> sims = dgm.simulate(model, 4_000, observed=["x"], seed=0, progress=False)
        >>> inside = misspecification(sims, x=2.0 + torch.tensor([-1.3, 0.2, 0.9, -0.4, 1.2, 0.1, -0.8, 0.5, -0.2, 0.3]))
        >>> inside.p_value > 0.05
        True
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     outside = misspecification(sims, x=torch.linspace(-8.0, 8.0, 10))
        >>> print(str(outside).split(": ")[1])
        outside; no single number is unusual, their combination is.
    """
    names = observed_names(simulations, observed)
    all_masks = simulations.mask if isinstance(simulations, Simulations) else {}
    masks = {k: all_masks[k][:_ROWS] for k in names if k in all_masks}
    observation = _checked(simulations, names, masks, data)
    for name in names:
        refuse_non_finite("misspecification", simulations[name][:_ROWS], f"simulations of '{name}'")
    features, labels = _features({k: simulations[k][:_ROWS] for k in names}, masks, summary)
    refuse_non_finite("misspecification", features, "summaries")  # that of the observation may be infinitely far
    present = {k: m.new_ones(observation[k].shape[: m.dim()]) for k, m in masks.items()}
    at, _ = _features(observation, present, summary)
    if bool(at.isnan().any()):
        raise ValueError("misspecification: the summary of the observation is NaN, expected numbers.")
    result = _compared(features, at[0], labels, seed)
    if result.outside:
        warn_user(
            f"misspecification: {result} An amortised posterior was not trained on such data, and may be anything there."
        )
    return result


def _checked(
    simulations: Mapping[str, Tensor], names: list[str], masks: Mapping[str, Tensor], data: dict[str, Any]
) -> dict[str, Tensor]:
    """The observation with a leading dimension of one."""
    if not names or set(names) - set(simulations):
        raise ValueError(
            f"misspecification: observed={names}: expected names among the simulated sites {list(simulations)}."
        )
    if set(data) != set(names):
        raise ValueError(f"misspecification: got data of {sorted(data)}, expected all observed sites, {sorted(names)}.")
    observation = {}
    for name in names:
        value = as_tensor_like("misspecification", f"'{name}'", data[name], None)
        shape = simulations[name].shape[1:]
        ragged = masks[name].dim() - 1 if name in masks else 0
        if value.dim() != len(shape) or value.shape[ragged:] != shape[ragged:]:
            raise ValueError(
                f"misspecification: '{name}' has shape {tuple(value.shape)}, expected {tuple(shape)}, one data set as simulated."
            )
        if not value.isfinite().all():
            raise ValueError(
                f"misspecification: '{name}' holds NaN or infinite entries; fill or leave out what is missing."
            )
        observation[name] = value[None].to(simulations[name])
    return observation


def _features(
    rows: dict[str, Tensor], masks: Mapping[str, Tensor], summary: Summary | None
) -> tuple[Tensor, list[str]]:
    """The summary of every row in float64, and what its numbers are."""
    n = len(next(iter(rows.values())))
    if summary is not None:
        with torch.no_grad():
            features = as_tensor_like("misspecification", "the summary", summary(rows), None)
        if features.dim() != 2 or len(features) != n:
            raise ValueError(
                f"misspecification: summary gave shape {tuple(features.shape)} for {n} data sets, expected ({n}, F)."
            )
        return features.double(), [f"summary[{i}]" for i in range(features.shape[1])]
    parts = []
    labels: list[str] = []
    for name, value in rows.items():
        if name in masks:
            parts.append(_moments(value.double(), masks[name]))
            labels += [f"{what} of '{name}'" for what in ("mean", "deviation", "count")]
        else:
            parts.append(value.reshape(n, -1).double())
            labels += [f"'{name}'{list(map(int, i))}" for i in np.ndindex(*value.shape[1:])]
    return torch.cat(parts, 1), labels


def _moments(value: Tensor, mask: Tensor) -> Tensor:
    """Mean, standard deviation and count of what is there."""
    there = mask.reshape(*mask.shape, *(1,) * (value.dim() - mask.dim())).expand(value.shape).reshape(len(value), -1)
    value = value.reshape(len(value), -1)
    count = there.sum(1)
    divisor = count.clamp_min(1)
    mean = (value * there).sum(1) / divisor
    variance = ((value - mean[:, None]).square() * there).sum(1) / divisor
    return torch.stack([mean, variance.sqrt(), count.double()], 1)


def _range(features: Tensor, seed: int | None) -> Range:
    """Where simulations ``(n, F)`` lie."""
    if len(features) < _LEAST:
        raise ValueError(
            f"misspecification: {len(features)} simulations, expected at least {_LEAST}: the least p-value is 2 / n."
        )
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    found = Range(features.shape[1], len(features) // 2, axes=features.shape[1]).to(features)
    found.fit(features, generator)
    return found


def _compared(features: Tensor, at: Tensor, labels: list[str], seed: int | None) -> Misspecification:
    """The test of one data set, ``(F,)``, whose numbers have these labels."""
    known = _range(features, seed)
    p, score = known.p_values(at[None])
    below = (features <= at).sum(0)
    above = (features >= at).sum(0)
    tail = (2.0 * (torch.minimum(below, above) + 1) / (len(features) + 1)).clamp_max(1.0)
    marginal = dict(zip(labels, tail.tolist(), strict=True))
    return Misspecification(float(p[0]), float(score[0]), known.known().cpu().numpy(), marginal)
