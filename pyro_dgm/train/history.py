"""What is kept of a fit: the record of its steps, and its state in a file, from which it resumes."""

from __future__ import annotations

import os
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyro_dgm.core.devices import put_random_states, random_states
from pyro_dgm.core.warn import warn_user

__all__ = ["Checkpoint", "FitDiverged", "History", "load_checkpoint", "refuse_no_place", "save_checkpoint"]

_PARTS = {"about", "stages", "tensors"}
_WHOLE = ({"about", "stages"}, {"about", "tensors"})  # of a fit that was preparing, and of one in its loop


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
            refuse_no_place("fit: the checkpoint", self.path)
            self.about = about()
            self.began = random_states()

    def load(self) -> dict[str, Any] | None:
        """The saved state, on the CPU, wherever it was saved from; None where there is none to go on from.

        Random numbers then begin as they did in the fit that wrote it: its held-out rows are drawn again.
        """
        if self.path is None or not self.resume or not self.path.exists():
            return None
        try:
            saved = load_checkpoint(self.path)
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
        return ValueError(f"fit: the checkpoint {self.path} {problem}. {advice}, or pass resume=False to start anew.")

    def save(self, state: dict[str, Any]) -> None:
        """Write the file; where that fails, on a full disk say, the fit is told once and goes on."""
        if self.path is None:
            return
        try:
            save_checkpoint(self.path, {"about": self.about, "began": self.began} | state)
        except (OSError, RuntimeError) as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self.failed:
            warn_user(
                f"fit: the checkpoint {self.path} could not be saved ({type(error).__name__}: {error}). Training goes on "
                "without; a state that was saved before stands."
            )
        self.failed = True


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write beside the file and move over it, so that a kill leaves the old state or the new one."""
    part = Path(f"{path}.{uuid.uuid4().hex}.part")  # of its own: two processes may save at once
    try:
        torch.save(state, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Any] | None:
    """The saved state, on the CPU, wherever it was saved from; None where there is no file."""
    if not Path(path).exists():
        return None
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()  # torch does not look at the checksums
    if damaged:
        raise zipfile.BadZipFile(f"{path}: the checksum of {damaged} does not fit its values")
    return torch.load(path, map_location="cpu", weights_only=True)


def refuse_no_place(what: str, path: Path) -> None:
    """Refuse a path at which no file can be written."""
    if path.is_dir() or not path.parent.is_dir():
        why = "is a folder" if path.is_dir() else f"cannot be saved: there is no folder {path.parent}"
        raise ValueError(f"{what} {path} {why}. Name a file in a folder that exists.")
