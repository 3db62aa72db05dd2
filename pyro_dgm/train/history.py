"""What is kept of a fit: the record of its steps, and its state in a file, from which it resumes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["FitDiverged", "History", "load_checkpoint", "save_checkpoint"]


@dataclass
class History:
    """Losses and learning rates of every step, held-out losses, and why the fit ended.

    Attributes:
        loss: training loss of each step (nats, for an ELBO: minus the bound of that step's particles).
        learning_rate: rate of each step.
        validation: ``(step, loss)`` pairs on held-out data.
        skipped: steps that were left out because the loss or a gradient was not finite.
        best_step: the step whose parameters were kept.
        best_loss: the smoothed (or held-out) loss there.
        stopped: why the fit ended.
        seconds: time in the stages and in the loop.
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
            f"skipped={len(self.skipped)}, seconds={self.seconds:.1f}, stopped={self.stopped!r})"
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


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write beside the file and move over it, so that a kill leaves the old state or the new one."""
    part = Path(f"{path}.part")
    torch.save(state, part)
    os.replace(part, path)


def load_checkpoint(path: str | Path) -> dict[str, Any] | None:
    """The saved state, on the CPU, wherever it was saved from; None where there is no file."""
    if not Path(path).exists():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)
