"""Going down a loss: how long and at which rate, one step of an optimiser, a whole descent, and those before a fit's first step.

Without a limit, training goes in up to three rounds, of 300, 600 and 1,200 steps. A round warms up over 30 steps and follows a
cosine to 1 % of its rate; the next round starts lower and runs twice as long. A round that brings nothing is the last.
With a limit there is one round of that length.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from pyro_dgm.core.pace import show
from pyro_dgm.train.batches import BatchStream
from pyro_dgm.train.history import Checkpoint, History
from pyro_dgm.train.ranks import ALONE, Ranks

__all__ = [
    "OPEN_STEPS",
    "ByCurvature",
    "Limits",
    "Schedule",
    "Stages",
    "adam",
    "constant",
    "cosine",
    "descend",
    "mean_loss",
    "rate_at",
    "round_length",
    "set_rates",
    "take_step",
    "warm_up",
]

Schedule = Callable[[int, float], float]  # (step, share of the way that is done) to a factor on the learning rate

# Not measured; chosen by hand.
_FIRST_ROUND = 300  # steps
_ROUNDS = 3
_WARM_UP = 30  # steps
_FLOOR = 0.01  # of a round's rate, at its end
_LOWER = 0.2  # by which each round's rate is lower than that of the round before, as a share of the first
_SHARE = 0.5  # of the seconds that are left, for one stage before the first step.
_SHOWN = 50  # losses in the means of a stage's first and last loss, as in a History's plot


@dataclass
class Limits:
    """Steps and seconds after which training ends, whichever comes first; the clock runs from the start.

    Attributes:
        reserved: seconds that are left for what comes after the steps.
        spent: seconds before the first step.
        recommended: whether the user gave none, so that they are the objective's.
        shown: the seconds that several processes have agreed on; None for this one's own clock.
    """

    max_steps: int | None
    max_seconds: float | None
    reserved: float = 0.0
    spent: float = 0.0
    recommended: bool = False
    began: float = field(default_factory=time.perf_counter)
    shown: float | None = None

    def begin(self) -> None:
        """Let progress, and with it the learning rate, go from here to the end."""
        self.spent = self.seconds()

    def left(self) -> float:
        """Seconds until steps have to end; infinity without such a limit."""
        return math.inf if self.max_seconds is None else self.max_seconds - self.reserved - self.seconds()

    def left_of_all(self) -> float | None:
        """Seconds until everything has to end; None without such a limit."""
        return None if self.max_seconds is None else max(0.0, self.max_seconds - self.seconds())

    @property
    def open(self) -> bool:
        """Whether neither limit was given."""
        return self.max_steps is None and self.max_seconds is None

    def progress(self, step: int) -> float:
        """Share of the budget that is used."""
        steps = step / self.max_steps if self.max_steps else 0.0
        if self.max_seconds is None:
            return steps
        whole = self.max_seconds - self.reserved - self.spent
        return max(steps, (self.seconds() - self.spent) / whole if whole > 0.0 else 1.0)

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began if self.shown is None else self.shown


def round_length(index: int) -> int | None:
    """Length of the ``index``-th round of an open fit; None after the last."""
    return _FIRST_ROUND * 2**index if index < _ROUNDS else None


OPEN_STEPS = sum(round_length(i) or 0 for i in range(_ROUNDS))  # of an open fit, at most


def constant(step: int, progress: float) -> float:
    """A learning rate that stays."""
    return 1.0


def warm_up(step: int) -> float:
    """Factor on a learning rate that rises over the first 30 steps, and is 1 from then on."""
    return min(1.0, (step + 1) / _WARM_UP)


def cosine(progress: float, floor: float) -> float:
    """Factor on a learning rate that falls from 1 to ``floor`` along half a cosine."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def rate_at(step: int, progress: float, index: int) -> float:
    """Factor on the learning rate at ``step`` of round ``index`` with this share of the round done."""
    return warm_up(step) * cosine(progress, _FLOOR) * max(0.2, 1.0 - _LOWER * index)


def adam(parameters: Any, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.99)) -> Optimizer:
    """The optimiser of everything that is not given one: Adam, with decoupled weight decay."""
    return torch.optim.AdamW(parameters, lr, betas=betas, weight_decay=weight_decay, fused=True)


class ByCurvature(torch.optim.LBFGS):
    """L-BFGS on a loss that is the same in each evaluation, with the interface of other optimisers."""

    def __init__(self, parameters: Any, loss: Callable[[], Tensor], iterations: int, history: int) -> None:
        super().__init__(
            parameters,
            max_iter=iterations,
            max_eval=2 * iterations,  # of a step: a line search takes a few more than one
            history_size=history,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        self.loss = loss

    def step(self, closure: Any = None) -> Any:
        return super().step(closure or self._evaluate)

    def _evaluate(self) -> Tensor:
        self.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss


def take_step(
    optimizer: Optimizer, loss: Tensor, clip: float | None = None, owned: Iterable[Tensor] = (), ranks: Ranks = ALONE
) -> bool:
    """One step down a loss; where it is not finite no step is taken, and the answer is False.

    With ``clip`` the gradients of the ``owned`` parameters are clipped to that norm (infinity leaves them), and have to be
    finite too. Several ``ranks`` take the step that their gradients have in the mean.
    """
    owned = list(owned)
    optimizer.zero_grad(set_to_none=True)
    fine = bool(loss.isfinite())
    if fine:
        loss.backward()
    if not ranks.average(owned, fine):
        return False
    if clip is not None and not _clipped(owned, clip):
        return False
    optimizer.step()
    return True


def _clipped(parameters: list[Tensor], norm: float) -> bool:
    """Clip gradients, and say whether they are finite."""
    if norm < math.inf:
        return bool(nn.utils.clip_grad_norm_(parameters, norm).isfinite())
    gradients = [p.grad for p in parameters if p.grad is not None]
    found = torch.zeros((), device=gradients[0].device)
    # one pass, by torch's gradient scaler (a fifth of the time of a norm); its factor of 1 changes nothing
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.ones_like(found))
    return not found


def descend(
    optimizer: Optimizer,
    loss: Callable[[], Tensor],
    steps: int,
    schedule: Schedule = constant,
    *,
    seconds: float | None = None,
    clip: float | None = None,
    after: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """Take steps down a loss that is drawn anew each time; returns the losses. Steps that are not finite are left out.

    Args:
        optimizer: its learning rates are the peaks of the schedule.
        loss: makes the loss of a step.
        steps, seconds: where to end, whichever comes first.
        schedule: ``schedule(step, progress)``, a factor on the rates; ``progress`` is the share of the way that is done.
        clip: largest norm of the gradient; None looks at no gradient.
        after: called with the number of steps that were taken, after each.

    >>> w = torch.nn.Parameter(torch.tensor(3.0))
    >>> losses = descend(torch.optim.SGD([w], 0.5), lambda: w.square(), 10, lambda step, progress: 1.0 - progress)
    >>> len(losses), round(w.item(), 3)
    (10, 0.0)
    """
    limits = Limits(steps, seconds)
    peaks = [group["lr"] for group in optimizer.param_groups]
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    losses: list[Tensor] = []
    while len(losses) < steps and (progress := limits.progress(len(losses))) < 1.0:
        set_rates(optimizer, peaks, schedule(len(losses), progress))
        value = loss()
        take_step(optimizer, value, clip, owned)
        losses.append(value.detach())
        if after is not None:
            after(len(losses))
    set_rates(optimizer, peaks, 1.0)
    optimizer.zero_grad(set_to_none=True)
    return losses


def set_rates(optimizer: Optimizer, peaks: list[float], factor: float) -> None:
    """Set the learning rates to so much of their peaks."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * factor


@dataclass
class Stages:
    """The descents before a fit's first step, as the fit sees them: they enter its history, share its time and move its bar.

    After each a checkpoint is written, so that a fit which resumes does not repeat it. Without arguments there is no fit
    around, and a stage is a plain descent.

    Attributes:
        stream: the batches of the stages.
        ended: what a checkpoint knows of the stages, in their order.
    """

    stream: BatchStream | None = None
    history: History = field(default_factory=History)
    limits: Limits = field(default_factory=lambda: Limits(None, None))
    bar: Any = field(default_factory=lambda: tqdm(disable=True))
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(None, dict))
    ended: list[dict[str, Any]] = field(default_factory=list)

    def descend(
        self,
        name: str,
        module: nn.Module,
        optimizer: Optimizer,
        loss: Callable[[], Tensor],
        steps: int,
        schedule: Schedule = constant,
        clip: float | None = None,
    ) -> None:
        """A named :func:`descend`, whose outcome is in the module; one that a checkpoint knows is not repeated."""
        done = len(self.history.stages)
        if done < len(self.ended):
            self._take(self.ended[done], module, optimizer)
            return
        show(self.bar, name, steps)
        losses = descend(
            optimizer, loss, steps, schedule, seconds=self.seconds(), clip=clip, after=lambda _: self.bar.update()
        )
        self.history.stages.append((name, len(losses), mean_loss(losses[:_SHOWN]), mean_loss(losses[-_SHOWN:])))
        self._keep(module, optimizer)

    def seconds(self) -> float | None:
        """What one stage, or what comes before it, may take; None without a limit."""
        return None if self.limits.max_seconds is None else _SHARE * max(self.limits.left(), 0.0)

    def _keep(self, module: nn.Module, optimizer: Optimizer) -> None:
        if self.checkpoint.path is None:
            return
        history = vars(self.history) | {"seconds": self.history.seconds + self.limits.seconds()}
        state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
        self.ended.append(deepcopy(state | {"stream": self.stream and self.stream.state()}))
        self.checkpoint.save({"stages": self.ended})

    def _take(self, stage: dict[str, Any], module: nn.Module, optimizer: Optimizer) -> None:
        module.load_state_dict(stage["module"])
        optimizer.load_state_dict(stage["optimizer"])
        known = History.resumed(stage["history"])
        self.history.stages = known.stages
        self.history.seconds = known.seconds
        if self.stream is not None:
            self.stream.resume(stage["stream"])


def mean_loss(losses: list[Tensor]) -> float:
    """The mean of losses; NaN of none."""
    return float(torch.stack(losses).mean()) if losses else math.nan
