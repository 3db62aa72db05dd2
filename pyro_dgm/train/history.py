"""What is kept of a fit: the record of its steps, where it stands between its checks, and its state in a file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pyro_dgm.core.devices import put_random_states, random_states
from pyro_dgm.core.files import load_state, only_here, refuse_no_place, refuse_no_room, save_state, size_of
from pyro_dgm.core.warn import warn_user

__all__ = ["Checkpoint", "FitDiverged", "History", "Patience", "Standing"]

_WHAT = "fit: the checkpoint"
_PARTS = {"about", "stages", "tensors"}
_WHOLE = ({"about", "stages"}, {"about", "tensors"})  # of a fit that was preparing, and of one in its loop
# What a file holds of the objective's tensors, at most: as they are, the best, the module's, an average, two of Adam. Measured
# with an NSF of 110 kB (of 1.2 MB) and an average: 6.0 times its bytes (5.5).
_COPIES = 6
_FILES = 2  # while a file is written the one before stands
# Steps without a lower held-out loss, and share of the whole way: a rate that falls brings gains late. Not measured.
_PATIENCE = (500, 0.25)


@dataclass
class History:
    """Losses and learning rates of every step, held-out losses, and why the fit ended.

    Attributes:
        loss: training loss of each step (nats, for an ELBO: minus the bound of that step's particles).
        learning_rate: rate of each step.
        validation: ``(step, loss)`` pairs on held-out data.
        skipped: steps that were left out because the loss or a gradient was not finite.
        best_step: the step whose parameters were kept; their own loss was finite when they were.
        best_loss: the held-out loss there; without held-out data the mean of the last 50 finite losses up to there.
        stopped: why the fit ended.
        held_out: which data the fit did not train on, but judged its parameters by; empty where none were.
        seconds: time since the call, preparation and settling included; of a fit that resumed, with the time before.
        critic_loss: the critic's loss of each step, where two players are trained; ``loss`` is then the generator's.
        critic_accuracy: share of pairs of a datum and a draw that the critic ranks rightly, of each step.
        quality: ``(step, energy distance, coverage)`` of the generator on held-out rows; coverage is a share of what
            draws of the data's own distribution have.
        stages: ``(name, steps, first loss, last loss)`` of each training that came before the first step, such as the flow
            matching of :class:`~pyro_dgm.MaximumLikelihood`; both losses are means of up to 50 steps.
    """

    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = float("inf")
    stopped: str = ""
    held_out: str = ""
    seconds: float = 0.0
    critic_loss: list[float] = field(default_factory=list)
    critic_accuracy: list[float] = field(default_factory=list)
    quality: list[tuple[int, float, float]] = field(default_factory=list)
    stages: list[tuple[str, int, float, float]] = field(default_factory=list)

    @classmethod
    def resumed(cls, saved: dict[str, Any]) -> History:
        """The record out of a checkpoint; a fit that was stopped from outside goes on."""
        history = cls(**saved)
        for name in ("validation", "quality", "stages"):
            setattr(history, name, [tuple(entry) for entry in getattr(history, name)])
        if history.stopped in ("limit reached", "interrupted", "diverged"):
            history.stopped = ""
        return history

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return len(self.loss)

    def __repr__(self) -> str:
        return (
            f"History(steps={self.steps}, best_loss={self.best_loss:.4g} at step {self.best_step}, "
            f"held_out={self.held_out!r}, skipped={len(self.skipped)}, seconds={self.seconds:.1f}, stopped={self.stopped!r})"
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw the loss over the steps (needs matplotlib); returns the axes."""
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=(6, 3.5), layout="constrained")[1] if ax is None else ax
        ax.plot(range(1, self.steps + 1), self.loss, lw=0.5, alpha=0.5, label="loss of a step")
        ax.plot(range(1, self.steps + 1), _smooth(self.loss), label="mean of 50 steps")
        if self.critic_loss:
            ax.plot(range(1, self.steps + 1), _smooth(self.critic_loss), label="critic, mean of 50 steps")
        if self.validation:
            ax.plot(*zip(*self.validation, strict=True), "o-", ms=3, label="held out")
        ax.axvline(self.best_step, color="0.7", ls=":", label="kept")
        shown = [_smooth(self.loss)[self.steps // 10 :], _smooth(self.critic_loss)[self.steps // 10 :]]
        tail = sorted(shown[0] + shown[1])
        if tail and tail[-1] > tail[0]:
            ax.set_ylim(tail[0] - 0.1 * (tail[-1] - tail[0]), tail[-1] + 0.5 * (tail[-1] - tail[0]))
        ax.set(xlabel="step", ylabel="loss (nats)")
        ax.legend(frameon=False)
        return ax


class FitDiverged(RuntimeError):
    """The loss stayed non-finite. The best parameters were restored; ``history`` holds what happened."""

    def __init__(self, message: str, history: History) -> None:
        super().__init__(message)
        self.history = history


def _smooth(loss: list[float], width: int = 50) -> list[float]:
    means = []
    total = 0.0
    for i, value in enumerate(loss):
        total += value - (loss[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means


class Checkpoint:
    """The file of a fit's state, and what the fit that resumes from it must have in common with the one that wrote it.

    Args:
        path: the file; None keeps nothing.
        about: what the fit is of, by name; plain values that compare.
        resume: whether a file that is there is read.
    """

    def __init__(self, path: str | Path | None, about: Callable[[], dict[str, Any]], resume: bool = True) -> None:
        if not isinstance(path, str | os.PathLike | None):
            raise TypeError(f"fit: checkpoint={path!r}, expected the path of a file, or None.")
        self.path = None if path is None else Path(path)
        self.resume = resume
        self.failed = False
        if self.path is not None:
            refuse_no_place(_WHAT, self.path)
            self.about = about()
            self.began = random_states()

    @contextmanager
    def opened(self) -> Iterator[dict[str, Any] | None]:
        """Within the context no other fit saves to the file; gives what was saved before, None where there is nothing."""
        if self.path is None:
            yield None
            return
        with only_here(f"{_WHAT} {self.path}", self.path.with_name(f"{self.path.name}.lock")):
            yield self.load()

    def refuse_no_room(self, trained: list[Tensor]) -> None:
        """Refuse a disk that cannot hold the states of these tensors, before anything is trained."""
        if self.path is not None:
            there = self.path.stat().st_size if self.path.exists() else 0
            refuse_no_room(_WHAT, self.path, max(0, _FILES * _COPIES * size_of(trained) - there))

    def load(self) -> dict[str, Any] | None:
        """The saved state, on the CPU, wherever it was saved from; None where there is none to go on from.

        Random numbers then begin as they did in the fit that wrote it: its held-out rows are drawn again.
        """
        if self.path is None or not self.resume or not self.path.exists():
            return None
        try:
            saved = load_state(self.path)
        except PermissionError as error:
            raise self.error(
                f"cannot be read ({type(error).__name__}: {error.strerror})", "Make it readable"
            ) from error
        except Exception as error:  # of many kinds: torch's, pickle's, the file system's
            raise self.error(f"cannot be read ({type(error).__name__}): it is damaged, or no checkpoint") from None
        if not isinstance(saved, dict) or saved.keys() & _PARTS not in _WHOLE:
            raise self.error("was not written by this version of fit")
        self.compare(saved["about"], self.about)
        self.began = saved["began"]
        put_random_states(self.began)
        return saved

    def compare(self, was: dict[str, Any], now: dict[str, Any]) -> None:
        """Refuse a state of another fit, and name what differs."""
        differ = [f"{key} was {was.get(key)}, is {now.get(key)}" for key in was | now if was.get(key) != now.get(key)]
        if differ:
            raise self.error("is of another fit: " + "; ".join(differ), "Give each fit a file of its own")

    def error(self, problem: str, advice: str = "Delete it") -> ValueError:
        """That the file cannot be resumed from, and what to do."""
        return ValueError(f"{_WHAT} {self.path} {problem}. {advice}, or pass resume=False to start anew.")

    def save(self, state: dict[str, Any]) -> None:
        """Write the file; where that fails, on a full disk say, the fit is told once and goes on."""
        if self.path is None:
            return
        try:
            save_state(_WHAT, self.path, {"about": self.about, "began": self.began} | state)
        except (OSError, RuntimeError) as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self.failed:
            told = getattr(error, "strerror", None) or f"{_WHAT} {self.path} could not be saved ({error})."
            warn_user(f"{told} Training goes on without saving; the best parameters are kept in memory.")
        self.failed = True


class Patience(NamedTuple):
    """How long a fit goes on without improvement: so many checks, and so much of the whole way."""

    checks: int
    share: float

    @classmethod
    def of(cls, checks: int | None, every: int, held_out: bool) -> Patience | None:
        """What was asked for; otherwise the usual where data are held out, and none where they are not."""
        if checks is not None:
            return cls(checks, 0.0)
        return cls(-(-_PATIENCE[0] // every), _PATIENCE[1]) if held_out else None


@dataclass
class Standing:
    """Where a loop stands, beside its history: its round, what the checks of that round found, and steps that were lost.

    Attributes:
        round, round_began: the round's index and first step.
        round_best, previous_best: the lowest score in the round, and in the one before.
        stale: checks in a row without improvement.
        stale_from: share of the whole way at the last improvement.
        lost: steps in a row that were not finite.
        halved: times that the rate was halved.
        checked_at: the step of the last check.
        lowest: the lowest score of all checks; the state that is kept may be a later one, within the noise.
    """

    round: int = 0
    round_began: int = 0
    round_best: float = math.inf
    previous_best: float = math.inf
    stale: int = 0
    stale_from: float = 0.0
    lost: int = 0
    halved: int = 0
    checked_at: int = 0
    lowest: float = math.inf
