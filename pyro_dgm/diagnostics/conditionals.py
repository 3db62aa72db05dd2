r"""Is a generator a prior? Its conditionals against those of held-out data, of which no score of joint draws says enough.

Where both have one law, held-out rows and fresh rows of the generator can change places. So the spread, the shift and the
surprise each have an exact p-value: how often a random division of all rows gives as much. Ranks, entry by entry, have those of
Kolmogorov and Smirnov. The smallest of the four times four is the p-value of the verdict.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from pyro_dgm.core.devices import one_at_a_time, seeded
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.pace import steps
from pyro_dgm.diagnostics.calibration import Calibration, sbc
from pyro_dgm.evaluate.score import Score, as_rows, grouped
from pyro_dgm.flows import NSF, RealNVP
from pyro_dgm.flows.base import NormalizingFlow
from pyro_dgm.objectives import MaximumLikelihood
from pyro_dgm.train import fit

__all__ = ["Conditionals", "conditionals"]

_PAIRS = 20_000  # draws of a generator that teach its conditionals; not measured, chosen by hand
_FEW = (
    16  # hidden entries up to which they have a spline flow, which draws them one by one. Not measured; chosen by hand
)
_LAYERS = 6  # of the coupling flow; not measured, chosen by hand
_LEAST_ROWS = 100  # held out: the spread then has an error of 7 %
_CONTROL = (
    1_500  # rows of the generator's own, at least: fewer would double the error of small held-out sets; chosen by hand
)
_ROUGH = 0.05  # of their spread, beyond which the flow has not learned the conditionals; chosen by hand
_SHOWN = 8  # positions in a message
_LEVEL = 0.01  # of the test; a convention
_DIVISIONS = 4_000  # at random: the least p-value is then .001; chosen by hand
_AT_ONCE = 200  # divisions; not measured, chosen by hand


@dataclass(frozen=True)
class Conditionals:
    """Are the conditionals of a generator those of the data? What :func:`conditionals` found.

    Held-out rows are compared with fresh rows of the generator, whose ranks have the same law where the generator is right,
    however well its conditionals were learned; sizes are those of the generator where they were learned well.

    Attributes:
        held_out: ranks of the hidden entries of held-out rows among draws given their other entries.
        control: the same for fresh rows of the generator itself; uniform where its conditionals were learned.
        p_values: of "spread", "shift", "surprise" and "ranks" (of the entries the smallest, times their number), each as if it
            alone were asked.
        shift: by how much the draws' means are off, in sd of the draws: root mean square over the hidden entries.
        spread: sd of held-out entries around the draws' means, over that of the generator's own: 1.2 says that draws are too
            narrow, or that their means are off by amounts that follow the seen entries.
        surprise: by how many nats held-out rows are less probable than the generator's own, given what is seen.
    """

    held_out: Calibration
    control: Calibration
    p_values: dict[str, float]
    shift: Score
    spread: Score
    surprise: Score

    @property
    def p_value(self) -> float:
        """Of the verdict: the smallest p-value times their number (Bonferroni)."""
        return min(1.0, len(self.p_values) * min(self.p_values.values()))

    @property
    def learned(self) -> bool:
        """Whether the generator's own rows spread as the flow's draws do, so that sizes are those of its conditionals."""
        return abs(float(np.sqrt(np.square(_quantiles(self.control)).mean())) - 1.0) < _ROUGH

    @property
    def faults(self) -> list[str]:
        """What is significantly wrong with the generator's conditionals, in words; empty where ``p_value`` is above 1 %."""
        words = {
            "spread": f"held-out entries spread {_of(self.spread)} times as far as its draws",
            "shift": f"means are off by {_of(self.shift)} sd",
            "surprise": f"held-out rows are less probable than its own by {_of(self.surprise)} nats",
            "ranks": "the ranks of held-out rows are not those of its own",
        }
        found = [k for k, p in self.p_values.items() if len(self.p_values) * p < _LEVEL]
        return [words[k] for k in found if k != "ranks" or len(found) == 1]

    def __str__(self) -> str:
        head = f"conditionals: {len(self.held_out.pit['hidden'])} held-out rows, p = {self.p_value:.2g}."
        rough = "" if self.learned else " Sizes are rough: its conditionals were not learned well; give more steps."
        if not self.faults:
            sizes = f"spread {_of(self.spread)}, shift {_of(self.shift)} sd, surprise {_of(self.surprise)} nats"
            return f"{head} No fault was found at the {_LEVEL:.0%} level: {sizes}.{rough}"
        return (
            f"{head} Not those of the data: {'; '.join(self.faults)}. A posterior with this prior inherits it.{rough}"
        )


def _of(score: Score) -> str:
    return f"{score.value:.2f} +- {score.standard_error:.2f}"


@checked(num_draws=1, max_steps=1)
@one_at_a_time
def conditionals(
    generator: Callable[[int], Tensor] | Distribution,
    held_out: Tensor,
    seen: Sequence[int],
    *,
    num_draws: int = 99,
    max_steps: int = 800,
    progress: bool = True,
    seed: int | None = None,
) -> Conditionals:
    r"""Check of a generator as a prior: simulation-based calibration with held-out rows as truths.

    An inverse problem asks for :math:`p(x_{hidden} \mid x_{seen})`, of which a score of the joint law, such as C2ST, says
    little. Each held-out row is split; its hidden entries are ranked among draws of the generator's conditional, which a
    conditional flow learns from 20,000 of the generator's own draws. Fresh rows of the generator are ranked in the same way, and
    the two are compared: the test holds however well the flow has learned, and a flow that has learned little sees little.

    Args:
        generator: a function from a number to that many rows, or a distribution, such as ``Generator(...)()``.
        held_out: rows that it was not trained on, shape ``(N, *event)``, at least 100.
        seen: positions in the flattened event that are seen; the others are hidden.
        num_draws: draws for each row.
        max_steps: of the flow's training. Conditionals on a ring were learned to .01 nats in 800 as in 2,000, with 200 to .08.
        progress: show bars, of the training and of the draws.
        seed: makes it reproducible.

    Raises:
        ValueError: for fewer than 100 rows, positions that the event lacks, or none left to hide.

    References:
        | Talts et al. (2018), arXiv 1804.06788, with rows of data in the place of the prior's draws.

    Example:
        >>> pair = lambda n, r: torch.randn(n, 2) @ torch.tensor([[1.0, r], [0.0, (1 - r * r) ** 0.5]])
        >>> held_out = pair(1_000, 0.9)  # sd of the second given the first: 0.44
        >>> found = conditionals(lambda n: pair(n, 0.95), held_out, [0], max_steps=200, seed=0, progress=False)
        >>> print(found)  # doctest: +ELLIPSIS
        conditionals: 1000 held-out rows, p = ... Not those of the data: held-out entries spread 1.4... times as far as its...
    """
    rows = as_rows("conditionals", "held_out", held_out)
    seen = [operator.index(i) for i in seen]
    hidden = _hidden(rows, seen)
    sample = _drawn_from(generator)
    with seeded(seed):
        fresh = max(len(rows), _CONTROL)
        drawn = _rows_of(sample, _PAIRS + fresh, rows.shape[-1])
        flow = _flow(len(hidden), len(seen))
        pairs = (drawn[:_PAIRS, hidden], drawn[:_PAIRS, seen])
        fit(MaximumLikelihood(flow), pairs, batch_size=512, max_steps=max_steps, validation=0.05, progress=progress)
        posterior = _Conditional(flow.eval())
        results, log_q = [], []
        for truths in (rows, drawn[_PAIRS:]):
            given = {"seen": truths[:, seen], "hidden": truths[:, hidden]}
            results.append(
                sbc(
                    None,
                    posterior,
                    simulations=given,
                    observed=["seen"],
                    num_simulations=len(truths),
                    num_draws=num_draws,
                    progress=progress,
                )
            )
            with torch.no_grad():
                log_q.append(flow(given["seen"]).log_prob(given["hidden"]).double().cpu().numpy())
        return _compared(results, log_q)


def _drawn_from(generator: Callable[[int], Tensor] | Distribution) -> Callable[[int], Tensor]:
    """A distribution of Pyro can be called, too, with a shape."""
    if isinstance(generator, Distribution):
        law = generator
        return lambda n: law.sample(Size((n,)))
    return generator


def _rows_of(sample: Callable[[int], Tensor], n: int, width: int) -> Tensor:
    """Draws of the generator as rows of the held-out rows' width, or an error."""
    drawn = as_rows("conditionals", "what the generator drew", sample(n)).detach()
    if drawn.shape != (n, width):
        raise ValueError(
            f"conditionals: the generator drew {tuple(drawn.shape)} (rows, entries) where {n} rows were asked for, expected "
            f"({n}, {width}), entries as those of held_out. Give a function from a number to that many rows."
        )
    return drawn


def _compared(results: list[Calibration], log_q: list[np.ndarray]) -> Conditionals:
    """Both of held-out rows and of the generator's own, in this order."""
    data, own = (_quantiles(each) for each in results)
    held_out, control = results
    surprise = Score(
        float(log_q[1].mean() - log_q[0].mean()), math.hypot(*(x.std(ddof=1) / math.sqrt(len(x)) for x in log_q))
    )
    p_values = _by_divisions(data, own, *log_q) | {"ranks": _of_ranks(data, own)}
    return Conditionals(held_out, control, p_values, _shift(data, own), _spread(data, own), surprise)


def _of_ranks(data: np.ndarray, own: np.ndarray) -> float:
    from scipy.stats import ks_2samp

    p_values = [ks_2samp(*columns).pvalue for columns in zip(data.T, own.T, strict=True)]
    return min(1.0, float(min(p_values)) * len(p_values))


def _by_divisions(data: np.ndarray, own: np.ndarray, *log_q: np.ndarray) -> dict[str, float]:
    """How often random divisions of all rows spread, shift and surprise as much; the true one counts as one of them."""
    z = np.concatenate([data, own])
    z = (z - z.mean(0)) / z.std(0)
    table = np.column_stack([z, np.square(z).mean(1), np.concatenate(log_q)])
    found = []
    for _ in range(_DIVISIONS // _AT_ONCE):
        first = grouped(len(data), len(own), _AT_ONCE, None).numpy().T.astype(float)
        mean = first @ table / len(data)
        found.append(_differences(mean, (table.sum(0) - len(data) * mean) / len(own)))
    true = found[0][:, 0]
    drawn = np.concatenate([each[:, 1:] for each in found], 1)
    more = (drawn >= true[:, None] - 1e-9 * np.abs(true[:, None])).sum(1)
    return dict(zip(("spread", "shift", "surprise"), ((1 + more) / (1 + drawn.shape[1])).tolist(), strict=True))


def _differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of two groups of rows by means of their quantiles, squares and log densities: three rows, large where they differ."""
    spread = [x[:, -2] - np.square(x[:, :-2]).mean(1) for x in (a, b)]
    return np.stack([np.abs(np.log(spread[0] / spread[1])), np.square(a - b)[:, :-2].sum(1), b[:, -1] - a[:, -1]])


def _quantiles(result: Calibration) -> np.ndarray:
    """Ranks as normal quantiles, ``(N, H)``."""
    from scipy.stats import norm

    pit = result.pit["hidden"]
    return norm.ppf(pit.reshape(len(pit), -1))


def _shift(data: np.ndarray, own: np.ndarray) -> Score:
    """Root mean square over entries of the difference of means of normal quantiles, less what chance gives."""
    difference = data.mean(0) - own.mean(0)
    noise = sum(np.atleast_2d(np.cov(z.T)) / len(z) for z in (data, own))
    square = float((np.square(difference) - np.diag(noise)).mean())
    variance = 2.0 * np.square(noise).mean() + 4.0 * difference @ noise @ difference / len(difference) ** 2
    error = math.sqrt(float(variance))  # of the square
    value = math.sqrt(max(square, 0.0))
    return Score(value, error / (2.0 * value) if square > error else math.sqrt(error))


def _spread(data: np.ndarray, own: np.ndarray) -> Score:
    """The sd of normal quantiles around each entry's mean, over that of the generator's own rows."""
    squares = [np.square(z - z.mean(0)).mean(1) for z in (data, own)]
    relative = [float(s.std(ddof=1) / s.mean() / math.sqrt(len(s))) for s in squares]
    ratio = math.sqrt(float(squares[0].mean() / squares[1].mean()))
    return Score(ratio, 0.5 * ratio * math.hypot(*relative))


def _flow(features: int, context_features: int) -> NormalizingFlow:
    """A spline flow draws entry by entry: too slow for images."""
    if features <= _FEW:
        return NSF(features, context_features=context_features)
    return RealNVP(features, context_features=context_features, transforms=_LAYERS)


class _Conditional:
    """A conditional flow as an amortised posterior of many data sets."""

    def __init__(self, flow: NormalizingFlow) -> None:
        self.flow = flow

    def condition(self, seen: Tensor) -> _Hidden:
        return _Hidden(self.flow(seen), seen.dim() - 1)


@dataclass
class _Hidden:
    q: Distribution
    lead: int

    def sample(self, sample_shape: tuple[int, ...]) -> dict[str, Tensor]:
        parts = [self.q.sample(Size([1])) for _ in steps("posteriors", sample_shape[0])]
        return {"hidden": torch.cat(parts)}

    def log_prob(self, values: dict[str, Tensor]) -> Tensor:
        return self.q.log_prob(values["hidden"])


def _hidden(rows: Tensor, seen: Sequence[int]) -> list[int]:
    size = rows.shape[-1]
    hidden = [i for i in range(size) if i not in set(seen)]
    if len(rows) < _LEAST_ROWS or not hidden or len(hidden) + len(seen) != size or not seen:
        few = f"{list(seen)}" if len(seen) <= _SHOWN else f"{len(seen)} positions, {min(seen)} to {max(seen)}"
        raise ValueError(
            f"conditionals: held_out has {len(rows)} rows of {size} entries and seen={few}: expected {_LEAST_ROWS} rows or "
            f"more, and different positions from 0 to {size - 1}, not none and not all."
        )
    return hidden
