r"""Is a generator a prior? Its conditionals against those of held-out data, of which no score of joint draws says enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.distributions import Distribution

from pyro_dgm.core.devices import seeded
from pyro_dgm.diagnostics.calibration import Calibration, sbc
from pyro_dgm.evaluate.score import Score
from pyro_dgm.flows import NSF
from pyro_dgm.objectives import MaximumLikelihood
from pyro_dgm.train import fit

__all__ = ["Conditionals", "conditionals"]

_PAIRS = 20_000  # draws of a generator that teach its conditionals; not measured, chosen by hand
_LEAST_ROWS = 100  # held out: the spread then has an error of 7 %
_CONTROL = 0.05  # of the spread of the generator's own rows, beyond which the flow is too far off; chosen by hand
_CLEAR = 3.0  # standard errors; a convention


@dataclass(frozen=True)
class Conditionals:
    """Are the conditionals of a generator those of the data? What :func:`conditionals` found.

    Attributes:
        held_out: ranks of the hidden entries of held-out rows among draws given their other entries.
        control: the same for fresh rows of the generator itself, of which the draws must be right.
        shift: by how much the draws' means are off, in sd of the draws: root mean square over the hidden entries.
        spread: sd of the truths in the place of the draws' own, where one is right: 1.2 says that draws are too narrow by as
            much, or that their means are off by amounts that follow the seen entries.
        control_spread: the same for the control.
        surprise: by how many nats held-out rows are less probable than the generator's own, given what is seen.
    """

    held_out: Calibration
    control: Calibration
    shift: Score
    spread: Score
    control_spread: Score
    surprise: Score

    @property
    def known(self) -> bool:
        """Whether the draws are those of the generator's conditionals, so that the rest says something of the generator."""
        return self.control.calibrated and abs(self.control_spread.value - 1.0) < _CONTROL

    @property
    def faults(self) -> list[str]:
        """What is significantly wrong with the generator's conditionals, in words; empty where nothing was found."""
        found = []
        wider = self.spread.value / self.control_spread.value
        error = np.hypot(self.spread.standard_error, self.control_spread.standard_error)
        if abs(wider - 1.0) > _CLEAR * error:
            found.append(f"held-out entries spread {wider:.2f} +- {error:.2f} times as far as its draws")
        if self.shift.value > _CLEAR * self.shift.standard_error:
            found.append(f"means are off by {self.shift.value:.2f} +- {self.shift.standard_error:.2f} sd")
        if self.surprise.value > _CLEAR * self.surprise.standard_error:
            found.append(f"held-out rows are less probable than its own by {self.surprise} nats")
        if not self.held_out.calibrated and not found:
            found.append(f"ranks are not uniform (p = {self.held_out.p_value:.2g})")
        return found

    def __str__(self) -> str:
        head = f"conditionals: {len(next(iter(self.held_out.pit.values())))} held-out rows."
        if not self.known:
            return (
                f"{head} Nothing can be said of the generator: the flow has not learned its conditionals (on the "
                f"generator's own rows p = {self.control.p_value:.2g}, spread {self.control_spread}). Give more steps."
            )
        if not self.faults:
            return f"{head} No fault was found: spread {self.spread}, shift {self.shift} sd, surprise {self.surprise} nats."
        return f"{head} Not those of the data: {'; '.join(self.faults)}. A posterior with this prior inherits it."


def conditionals(
    generator: Callable[[int], Tensor] | Distribution,
    held_out: Tensor,
    seen: Sequence[int],
    *,
    num_draws: int = 199,
    max_steps: int = 2000,
    progress: bool = False,
    seed: int | None = None,
) -> Conditionals:
    r"""Check of a generator as a prior: simulation-based calibration with held-out rows as truths.

    An inverse problem asks for :math:`p(x_{hidden} \mid x_{seen})`, of which a score of the joint law, such as C2ST, says
    little. Each held-out row is split; its hidden entries are ranked among draws of the generator's conditional, which a
    conditional flow learns from 20,000 of the generator's own draws. Fresh rows of the generator are ranked in the same way:
    they show whether the flow has learned it.

    Args:
        generator: a function from a number to that many rows, or a distribution, such as ``Generator(...)()``.
        held_out: rows that it was not trained on, shape ``(N, *event)``, at least 100.
        seen: positions in the flattened event that are seen; the others are hidden.
        num_draws: draws for each row.
        max_steps: of the flow's training.
        progress: show it.
        seed: makes it reproducible.

    Raises:
        ValueError: for fewer than 100 rows, positions that the event lacks, or none left to hide.

    References:
        | Talts et al. (2018), arXiv 1804.06788, with rows of data in the place of the prior's draws.

    Example:
        >>> import torch
        >>> pair = lambda n, r: torch.randn(n, 2) @ torch.tensor([[1.0, r], [0.0, (1 - r * r) ** 0.5]])
        >>> held_out = pair(1_000, 0.9)  # sd of the second given the first: 0.44
        >>> print(conditionals(lambda n: pair(n, 0.95), held_out, [0], max_steps=200, seed=0))  # doctest: +ELLIPSIS
        conditionals: 1000 held-out rows. Not those of the data: held-out entries spread 1.4... times as far as its draws...
    """
    rows = held_out.reshape(len(held_out), -1)
    hidden = _hidden(rows, seen)
    sample = generator if callable(generator) else lambda n: generator.sample((n,))
    with seeded(seed):
        drawn = sample(_PAIRS + len(rows)).detach().reshape(_PAIRS + len(rows), -1)
        flow = NSF(len(hidden), context_features=len(seen))
        pairs = (drawn[:_PAIRS, hidden], drawn[:_PAIRS, list(seen)])
        fit(MaximumLikelihood(flow), pairs, batch_size=512, max_steps=max_steps, validation=0.05, progress=progress)
        posterior = _Conditional(flow.eval())
        found = []
        for truths in (rows, drawn[_PAIRS:]):
            given = {"seen": truths[:, list(seen)], "hidden": truths[:, hidden]}
            found.append(
                sbc(
                    None,
                    posterior,
                    simulations=given,
                    observed=["seen"],
                    num_simulations=len(rows),
                    num_draws=num_draws,
                )
            )
    of_data, control = found
    shift, spread = _place(of_data.pit["hidden"])
    log_q = [result.sharpness.log_q for result in found if result.sharpness and result.sharpness.log_q]
    surprise = Score(log_q[1].value - log_q[0].value, float(np.hypot(log_q[0].standard_error, log_q[1].standard_error)))
    return Conditionals(of_data, control, shift, spread, _place(control.pit["hidden"])[1], surprise)


class _Conditional:
    """A conditional flow as an amortised posterior of many data sets."""

    def __init__(self, flow: NSF) -> None:
        self.flow = flow

    def condition(self, seen: Tensor) -> _Hidden:
        return _Hidden(self.flow(seen), seen.dim() - 1)


@dataclass
class _Hidden:
    q: Distribution
    lead: int

    def sample(self, sample_shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {"hidden": self.q.sample(sample_shape)}

    def log_prob(self, values: dict[str, Tensor]) -> Tensor:
        return self.q.log_prob(values["hidden"])


def _hidden(rows: Tensor, seen: Sequence[int]) -> list[int]:
    size = rows.shape[-1]
    hidden = [i for i in range(size) if i not in set(seen)]
    if len(rows) < _LEAST_ROWS or not hidden or len(hidden) + len(seen) != size or not seen:
        raise ValueError(
            f"conditionals: held_out has {len(rows)} rows of {size} entries and seen={list(seen)[:8]}: expected {_LEAST_ROWS} "
            f"rows or more, and different positions from 0 to {size - 1}, not none and not all."
        )
    return hidden


def _place(pit: np.ndarray) -> tuple[Score, Score]:
    """Root mean square of the entries' means, less what chance gives, and the sd, of ranks ``(N, H)`` as normal quantiles."""
    from scipy.stats import norm

    z = norm.ppf(pit.reshape(len(pit), -1))
    n = len(z)
    mean = z.mean(0)
    noise = z.var(0, ddof=1).mean() / n
    shift = np.sqrt(max(0.0, float(np.square(mean).mean() - noise)))
    squares = np.square(z - mean).mean(1) * n / (n - 1)
    spread = float(np.sqrt(squares.mean()))
    error = np.sqrt(noise / 2.0 if shift > np.sqrt(noise) else noise)
    return Score(shift, float(error)), Score(spread, float(squares.std() / np.sqrt(n) / (2.0 * spread)))
