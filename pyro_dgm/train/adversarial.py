"""The loop of two players: critic steps, a generator step, a running average of the generator, quality on held-out rows."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_dgm.core.data import first_rows
from pyro_dgm.core.devices import fork_rng, put_random_states, random_states
from pyro_dgm.train.batches import Batches
from pyro_dgm.train.checkpoint import save_checkpoint
from pyro_dgm.train.history import FitDiverged, History, Limits, rate_at
from pyro_dgm.train.parameters import Average

__all__ = ["AdversarialRun"]

_STEPS = 4_000  # without a limit
_CHECKS = 10  # of the quality in a fit
_MAX_SKIPPED = 20
_JUDGED = 500  # rows, where no held-out ones are given
_COLLAPSED = 0.5  # coverage as a share of what equal distributions have, below which a user is told


class AdversarialRun:
    """One call of ``fit`` with an :class:`~pyro_dgm.train.hooks.Alternating` objective; made like the run of a loss."""

    def __init__(
        self, objective: Any, parameters: list[Tensor], optimizer: Any, lr: float | None, batches: Batches,
        limits: Limits, validation: Any, patience: int | None, bar: Any, checkpoint: str | Path | None,
    ) -> None:  # fmt: skip
        if patience is not None:
            raise ValueError(
                "fit: patience counts a falling loss, and an adversarial loss need not fall. Use max_steps."
            )
        if limits.open:
            limits.max_steps = _STEPS
        self.objective, self.batches, self.limits = objective, batches, limits
        self.bar, self.checkpoint = bar, checkpoint
        critic, generator = objective.players()
        self.owned = [[p for p in player.parameters() if p.requires_grad] for player in (critic, generator)]
        self.optimizers = [
            optimizer(p) if optimizer else torch.optim.Adam(p, rate, betas=(0.5, 0.99), fused=True)
            for p, rate in zip(self.owned, _rates(objective, lr), strict=True)
        ]
        self.peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.tensors = list(dict.fromkeys([*parameters, *objective.buffers()]))
        self.average = Average(self.owned[1], objective.ema)
        self.held_out = self._held_out(validation)
        self.history, self.good, self.lost = History(), self._state(), 0
        self.every = max(50, limits.max_steps // _CHECKS) if limits.max_steps else 500
        self.position, self.epoch_rng = 0, random_states()
        self.saved_at, self.whole, self.warned = 0.0, True, False

    def run(self, saved: dict[str, Any] | None) -> History:
        self.limits.begin()
        self.bar.total = self.limits.max_steps
        self.iterator = iter(self.batches)
        if saved is not None:
            self._resume(saved)
        try:
            with pyro.validation_enabled(False):
                while not self._done():
                    self._step()
        except KeyboardInterrupt:
            self.history.stopped = "interrupted"
        finally:
            self._finish()
        return self.history

    def _step(self) -> None:
        self.whole, rate, taken = False, self._set_rates(), True
        for _ in range(self.objective.critic_steps):
            batch = self._next()
            critic_loss, accuracy = self.objective.critic_loss(*batch)
            taken = self._update(0, critic_loss) and taken
        loss = self.objective.generator_loss(*batch)
        taken = self._update(1, loss) and taken
        if taken:
            self.average.update()
        self._record(float(loss.detach()), float(critic_loss.detach()), float(accuracy), rate, taken)
        self.whole = True
        if self.history.steps % self.every == 0:
            self._check()

    def _update(self, player: int, loss: Tensor) -> bool:
        """A step of one player, left out where the loss or the gradient is not finite."""
        _clear(self.owned[player])
        loss.backward()
        gradients = [p.grad for p in self.owned[player] if p.grad is not None]
        finite = _all_finite(gradients)
        if finite:
            self.optimizers[player].step()
        return finite

    def _next(self) -> tuple[Any, ...]:
        if self.position % (self.batches.epoch or 1) == 0:
            self.epoch_rng = random_states()
        self.position += 1
        return next(self.iterator)

    def _set_rates(self) -> float:
        factor = rate_at(self.history.steps, self.limits.progress(self.history.steps), 0)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        return self.peaks[1][0] * factor

    def _record(self, loss: float, critic_loss: float, accuracy: float, rate: float, taken: bool) -> None:
        history = self.history
        history.loss.append(loss if math.isfinite(loss) else math.nan)
        history.critic_loss.append(critic_loss if math.isfinite(critic_loss) else math.nan)
        history.critic_accuracy.append(accuracy)
        history.learning_rate.append(rate)
        self.lost = 0 if taken else self.lost + 1
        if not taken:
            history.skipped.append(history.steps)
            if self.lost >= _MAX_SKIPPED:
                self._diverged()
        self.bar.update()
        if history.steps % 10 == 0 and not self.bar.disable:
            energy, coverage = history.quality[-1][1:] if history.quality else (math.nan, math.nan)
            self.bar.set_postfix(
                generator=f"{loss:.3g}", critic=f"{critic_loss:.3g}", accuracy=f"{accuracy:.2f}",
                energy=f"{energy:.2g}", coverage=f"{coverage:.2f}", refresh=False,
            )  # fmt: skip

    def _check(self) -> None:
        """Judge the averaged generator on held-out rows, keep the state, warn of a low coverage, save."""
        history = self.history
        with self.average.in_place(), fork_rng(0):
            energy, coverage = self.objective.quality(*self.held_out)
        history.quality.append((history.steps, energy, coverage))
        history.best_step, history.best_loss = history.steps, energy
        self.good = self._state()
        if coverage < _COLLAPSED and self.limits.progress(history.steps) > 0.49:
            self._warn(coverage)
        if self.checkpoint and self.limits.seconds() - self.saved_at > 5.0:
            self._save()

    def _warn(self, coverage: float) -> None:
        if self.warned:
            return
        self.warned = True
        warnings.warn(
            f"fit: at step {self.history.steps} the generator covers {coverage:.2f} of what draws of the data's distribution "
            f"would cover of {len(self.held_out[0])} held-out rows: mode collapse, or a poor fit so far. Look at draws; train "
            "longer, or use a wider network, a larger r1 and r2, or another loss.",
            stacklevel=2,
        )

    def _held_out(self, validation: Any) -> tuple[Any, ...]:
        """The given held-out rows, or some of the training data: at most 500."""
        if validation is None:
            with fork_rng(0):
                x, context = first_rows(iter(self.batches), _JUDGED)
            validation = (x,) if context is None else (x, context)
        rows = validation if isinstance(validation, tuple | list) else (validation,)
        return tuple(v[:_JUDGED] for v in rows)

    def _done(self) -> bool:
        if self.limits.progress(self.history.steps) >= 1.0:
            self.history.stopped = "limit reached"
        return bool(self.history.stopped)

    def _diverged(self) -> None:
        history = self.history
        history.stopped, self.whole = "diverged", False
        self._put(self.good)
        raise FitDiverged(
            f"fit: a loss or gradient was not finite for {self.lost} steps up to step {history.steps}. The state of step "
            f"{history.best_step} was restored. Usual causes: learning rate ({self.peaks[1][0]:g}), unscaled contexts.",
            history,
        )

    def _finish(self) -> None:
        history = self.history
        if self.whole and history.steps and (not history.quality or history.quality[-1][0] != history.steps):
            self._check()
        history.seconds += self.limits.seconds()
        if self.checkpoint and self.whole:
            self._save()
        self.average.give()
        for owned in self.owned:
            _clear(owned)

    def _state(self) -> dict[str, Any]:
        return {"tensors": [t.detach().clone() for t in self.tensors], "average": self.average.state()}

    @torch.no_grad()
    def _put(self, state: dict[str, Any]) -> None:
        self.average.restore(state["average"])
        for tensor, value in zip(self.tensors, state["tensors"], strict=True):
            tensor.copy_(value)

    def _save(self) -> None:
        state: dict[str, Any] = {k: getattr(self, k) for k in ("position", "epoch_rng", "lost", "warned")}
        state |= self._state() | {"module": self.objective.state_dict()}
        state["optimizers"], state["rng"] = [o.state_dict() for o in self.optimizers], random_states()
        save_checkpoint(self.checkpoint, state | {"history": vars(self.history)})  # type: ignore[arg-type]
        self.saved_at = self.limits.seconds()

    def _resume(self, saved: dict[str, Any]) -> None:
        """Take a saved state, and the place in the epoch: the batches of the epoch so far are drawn again and dropped."""
        self._put(saved)
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.history = History.resumed(saved["history"])
        self.position, self.epoch_rng, self.lost, self.warned = (
            saved[k] for k in ("position", "epoch_rng", "lost", "warned")
        )
        self.good = self._state()
        put_random_states(self.epoch_rng)
        for _ in range(self.position % (self.batches.epoch or 1)):
            next(self.iterator)
        put_random_states(saved["rng"])


def _rates(objective: Any, lr: float | None) -> tuple[float, float]:
    """Of the critic and the generator: the objective's, in proportion to the critic's where one is given."""
    critic, generator = objective.rates
    return (critic, generator) if lr is None else (lr, lr * generator / critic)


def _all_finite(gradients: list[Tensor]) -> bool:
    """By the one pass of torch's gradient scaler; its factor of 1 changes nothing."""
    device = gradients[0].device
    found = torch.zeros((), device=device)
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.ones((), device=device))
    return not found


def _clear(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
