r"""What a step of training is: one player goes down one loss, or a critic and a generator go down a loss each.

Each kind says how to step, how to judge the parameters at a check, and what of its state :class:`~pyro_dgm.train.loop.Loop`
keeps: the best parameters of one player, the last of two, whose losses need not fall. What is judged and kept may be a running
average of the weights, :math:`\bar w \leftarrow d\,\bar w + (1 - d)\,w` (Polyak & Juditsky 1992).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.warn import warn_user
from pyro_dgm.train.batches import Batches, BatchStream, first_rows, row_count
from pyro_dgm.train.descend import adam, take_step
from pyro_dgm.train.history import History
from pyro_dgm.train.hooks import Alternating, Paced, Recipe
from pyro_dgm.train.ranks import ALONE, Ranks

__all__ = [
    "Average",
    "MakeOptimizer",
    "OnePlayer",
    "Players",
    "TwoPlayers",
    "by_rate",
    "finite_loss",
    "loss_of",
    "number_of",
    "smoothed",
]

# Not measured; chosen by hand.
_WINDOW = 50  # steps in a smoothed loss, and between checks of data without epochs
_SHORTEST = 25  # steps between checks of minibatches: whole epochs, of which there may be many
_HELD_OUT_ROWS = 2_000  # times draws, in a held-out loss that is drawn at random: its own noise is .02 of a row's
_MOST_DRAWS = 16  # of such a loss
_CLIP = 10.0  # norm of one player's gradient
_CHECKS = 10  # of two players in a fit
_TRIES = 3  # of a loss that is drawn at random, before parameters count as bad
_FEWEST = 20  # rows, of which a low coverage is told
_JUDGED = 500  # rows on which draws are judged, at most
_COLLAPSED = 0.5  # coverage as a share of what equal distributions have, below which a user is told
_BETAS_OF_TWO = (
    0.5,
    0.99,
)  # the first is the usual one of adversarial training (Radford et al. 2016, arXiv 1511.06434)

MakeOptimizer = Callable[[list[Tensor]], Optimizer]


class Average:
    """The average of parameters over steps; with ``decay`` 0 nothing is averaged.

    Early steps are forgotten faster, unless the average begins at parameters that are good already (``begins_well``).

    >>> w = torch.nn.Parameter(torch.tensor(1.0))
    >>> average = Average([w], 0.5, begins_well=True)
    >>> with torch.no_grad():
    ...     _ = w.fill_(3.0)
    >>> average.update(), average.give(), w.item()
    (None, None, 2.0)
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float, begins_well: bool = False) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.steps = 0
        self.begins_well = begins_well
        self.values = [p.detach().clone() for p in parameters] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after a step."""
        self.steps += 1
        if self.decay:
            early = 1.0 if self.begins_well else (1.0 + self.steps) / (10.0 + self.steps)
            decay = min(self.decay, early)
            torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context the parameters have their averages."""
        if not self.decay:
            yield
            return
        now = [p.detach().clone() for p in self.parameters]
        self._put(self.values)
        try:
            yield
        finally:
            self._put(now)

    def give(self) -> None:
        """Set the parameters to their averages."""
        if self.decay:
            self._put(self.values)

    def begin_again(self) -> None:
        """Average from the parameters on, as they are."""
        self.values = [p.detach().clone() for p in self.parameters] if self.decay else []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"steps": self.steps, "values": [v.clone() for v in self.values]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        pairs = zip(state["values"], self.parameters, strict=False)  # no values without a decay
        self.steps = state["steps"]
        self.values = [v.to(p.device, copy=True) for v, p in pairs]

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


class OnePlayer:
    """All parameters go down the objective, with clipped gradients; the best are kept."""

    keeps_last = False
    kept = "best state (step {})"

    def __init__(
        self,
        objective: nn.Module,
        batches: Batches,
        validation: Any,
        optimizer: MakeOptimizer | None,
        lr: float | None,
        recipe: Recipe,
        parameters: list[Tensor],
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        groups = parameters if lr else by_rate(objective, parameters, recipe.lr)
        made = optimizer(parameters) if optimizer else adam(groups, lr or recipe.lr, recipe.weight_decay)
        self.objective = objective
        self.parameters = parameters
        self.optimizers = [made]
        self.average = Average(parameters, recipe.averaging)
        self.validation: Any = None
        if validation is not None:
            self.validation, self.weight = ranks.share(validation)
        usual = batches.epoch * -(-_SHORTEST // batches.epoch) if batches.epoch else _WINDOW
        self.every = recipe.every or usual
        self.draws: int | None = None  # of the held-out loss; found at the first check
        self.batch: tuple[Any, ...] = ()

    def step(self, stream: BatchStream, history: History) -> tuple[float, bool]:
        """The loss, and whether a step was taken."""
        self.batch, weight = self.ranks.share(next(stream))
        loss = _times(weight, loss_of(self.objective, self.batch))
        taken = take_step(self.optimizers[0], loss, _CLIP, self.parameters, self.ranks)
        if taken:
            self.average.update()
        return float(loss.detach()), taken

    def check(self, history: History, progress: float) -> tuple[float, float]:
        """The held-out loss, or the smoothed one with its standard error; not finite where the parameters' own loss is not.

        The smoothed loss is of the steps that led to the parameters: the last of them may have overshot.
        """
        if self.validation is None:
            own = finite_loss(self.objective, self.batch)
            own = self._mean(own)
            return smoothed(history) if math.isfinite(own) else (own, 0.0)
        loss = self._mean(self.weight * self._held_out_loss())
        history.validation.append((history.steps, loss))
        return loss, 0.0

    def _mean(self, value: float) -> float:
        """Over ranks."""
        return self.ranks.sums([value], self.parameters[0])[0] / self.ranks.world

    def _held_out_loss(self) -> float:
        """With the same random numbers at each check: one draw where they do not matter, otherwise the mean of enough."""
        first = self._held_out_draw(0)
        if self.draws is None:
            rows = row_count(self.validation) or 1
            varies = self._held_out_draw(1) != first
            self.draws = min(_MOST_DRAWS, -(-_HELD_OUT_ROWS // rows)) if varies else 1
        return (first + sum(self._held_out_draw(i) for i in range(1, self.draws))) / self.draws

    @torch.no_grad()
    def _held_out_draw(self, seed: int) -> float:
        with fork_rng(seed), pyro.validation_enabled(False):
            return float(loss_of(self.objective, self.validation))

    def postfix(self, history: History) -> dict[str, str]:
        """What the progress bar shows."""
        return {"loss": f"{smoothed(history)[0]:.4g}", "lr": f"{history.learning_rate[-1]:.1e}"}


class TwoPlayers:
    """Critic steps, then a generator step; the generator's running average is judged, and the last is kept."""

    keeps_last = True
    kept = "state of step {}"

    def __init__(
        self,
        objective: Alternating,
        batches: Batches,
        validation: Any,
        optimizer: MakeOptimizer | None,
        lr: float | None,
        max_steps: int | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        rates = objective.rates if lr is None else (lr, lr * objective.rates[1] / objective.rates[0])
        self.objective = objective
        self.owned: list[list[Tensor]] = [
            [p for p in who.parameters() if p.requires_grad] for who in objective.players()
        ]
        self.optimizers = [
            optimizer(parameters) if optimizer else adam(parameters, rate, betas=_BETAS_OF_TWO)
            for parameters, rate in zip(self.owned, rates, strict=True)
        ]
        self.average = Average(self.owned[1], objective.ema)
        self.held_out = _held_out(validation, batches)
        self.every = max(_WINDOW, max_steps // _CHECKS) if max_steps else 500
        self.warned = len(self.held_out[0]) < _FEWEST

    def step(self, stream: BatchStream, history: History) -> tuple[float, bool]:
        """The generator's loss, and whether all steps were taken."""
        taken = True
        for _ in range(self.objective.critic_steps):
            batch, weight = self.ranks.share(next(stream))
            critic_loss, accuracy = self.objective.critic_loss(*batch)
            taken = self._update(0, _times(weight, critic_loss)) and taken
        loss = _times(weight, self.objective.generator_loss(*batch))
        taken = self._update(1, loss) and taken
        if taken:
            self.average.update()
        critic = float(critic_loss.detach())
        history.critic_loss.append(critic if math.isfinite(critic) else math.nan)
        history.critic_accuracy.append(float(accuracy))
        return float(loss.detach()), taken

    def _update(self, player: int, loss: Tensor) -> bool:
        return take_step(self.optimizers[player], loss, math.inf, self.owned[player], self.ranks)

    def check(self, history: History, progress: float) -> tuple[float, float]:
        """The energy distance of the generator's draws to held-out rows; in the second half a low coverage is told."""
        with fork_rng(0):
            energy, coverage = self.objective.quality(*self.held_out)
        history.quality.append((history.steps, energy, coverage))
        if coverage < _COLLAPSED and progress > 0.49 and not self.warned:
            self._warn(history.steps, coverage)
        return self.ranks.agreed(energy), 0.0

    def _warn(self, step: int, coverage: float) -> None:
        self.warned = True
        warn_user(
            f"fit: at step {step} the generator covers {coverage:.2f} of what draws of the data's distribution "
            f"would cover of {len(self.held_out[0])} held-out rows: mode collapse, or a poor fit so far. Look at draws; train "
            "longer, or use a wider network, a larger r1 and r2, or another loss."
        )

    def postfix(self, history: History) -> dict[str, str]:
        """What the progress bar shows."""
        shown = {
            "generator": f"{history.loss[-1]:.3g}",
            "critic": f"{history.critic_loss[-1]:.3g}",
            "accuracy": f"{history.critic_accuracy[-1]:.2f}",
        }
        if history.quality:
            _, energy, coverage = history.quality[-1]
            shown |= {"energy": f"{energy:.2g}", "coverage": f"{coverage:.2f}"}
        return shown


Players = OnePlayer | TwoPlayers


def by_rate(objective: nn.Module, parameters: list[Tensor], lr: float) -> list[dict[str, Any]]:
    """Groups of parameters: those of paced parts at their own rates, the others at ``lr``."""
    rates: dict[int, float] = {}
    for module in objective.modules():
        if isinstance(module, Paced):
            rates |= {id(p): module.peak_rate() or lr for p in module.parameters()}
    each = [rates.get(id(p), lr) for p in parameters]
    return [
        {"params": [p for p, r in zip(parameters, each, strict=True) if r == rate], "lr": rate}
        for rate in dict.fromkeys(each)
    ]


def loss_of(objective: nn.Module, batch: tuple[Any, ...]) -> Tensor:
    """The objective; a matrix that cannot be factorised, or an equation that cannot be solved, makes it NaN."""
    try:
        return objective(*batch)
    except (torch.linalg.LinAlgError, ArithmeticError):
        return torch.tensor(math.nan)


def number_of(objective: nn.Module, loss: Any) -> float:
    """A loss as a number; what is none, such as the draws that a guide returns, is refused."""
    if isinstance(loss, (int, float)) or isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss)
    what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    raise TypeError(
        f"fit: {type(objective).__name__} returned {what}, expected a loss: a tensor with one number. Is it a guide? Then write "
        "fit(STL_ELBO()(model, guide), data), and fit(ForwardKL(guide), simulations) for an AmortizedGuide."
    )


def _times(weight: float, loss: Tensor) -> Tensor:
    return loss if weight == 1.0 else weight * loss


@torch.no_grad()
def finite_loss(objective: nn.Module, batch: tuple[Any, ...]) -> float:
    """The loss of a batch at the parameters as they are: of three tries the first that is finite, or the last."""
    loss = math.nan
    with fork_rng(), pyro.validation_enabled(False):
        for _ in range(_TRIES):
            loss = float(loss_of(objective, batch))
            if math.isfinite(loss):
                break
    return loss


def smoothed(history: History) -> tuple[float, float]:
    """Mean of the last 50 losses that are finite, and its standard error."""
    finite = [v for v in history.loss[-_WINDOW:] if math.isfinite(v)] or [math.nan]
    window = torch.tensor(finite, dtype=torch.float64)
    return float(window.mean()), float(window.std(correction=0)) / math.sqrt(len(window))


def _held_out(validation: Any, batches: Batches) -> tuple[Any, ...]:
    """The given held-out rows, or some of the training data, each once: at most 500."""
    most = _JUDGED
    if validation is None:
        most = min(most, row_count(batches.args) or most)
        with fork_rng(0):
            x, context = first_rows(iter(batches), _JUDGED)
        validation = (x,) if context is None else (x, context)
    return tuple(v[:most] for v in validation)
