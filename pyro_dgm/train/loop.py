"""The loop of a fit: steps, checks, rounds, the state that is kept, recovery and checkpoints, for one player or two."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.pace import Interruption, show
from pyro_dgm.core.warn import warn_user
from pyro_dgm.train.batches import Batches, named_tensors, non_finite
from pyro_dgm.train.descend import OPEN_STEPS, Stages, rate_at, round_length, set_rates
from pyro_dgm.train.history import FitDiverged, History, Patience, Standing
from pyro_dgm.train.hooks import Convergent, Finishing, Judging
from pyro_dgm.train.players import Players, finite_loss, loss_of, number_of, smoothed
from pyro_dgm.train.ranks import ALONE, Ranks

__all__ = ["Loop"]

# Not measured; chosen by hand.
_LARGEST_ERROR = 0.05  # nats, of a smoothed loss that may stop a fit; subsampled data or a poor fit have more
_LEAST_GAIN = 1e-2  # nats that a round has to bring
_MAX_SKIPPED = 20  # consecutive non-finite steps before a fit goes back to the best state
_MOST_HALVED = 3  # times that it does so, at half the rate each time, before it gives up
_SAVE_EVERY = 5.0  # seconds


class Loop:
    """One call of :func:`~pyro_dgm.fit`, from its first step to its end; the players know what a step is."""

    def __init__(
        self,
        objective: nn.Module,
        parameters: list[Tensor],
        players: Players,
        batches: Batches,
        stages: Stages,
        validation: tuple[Any, ...] | None,
        patience: Patience | None,
        ranks: Ranks = ALONE,
        on_check: Callable[[History], object] | None = None,
    ) -> None:
        self.objective = objective
        self.ranks = ranks
        self.players = players
        self.batches = batches
        self.stream = iter(batches)
        self.history = stages.history
        self.limits = stages.limits
        self.bar = stages.bar
        self.checkpoint = stages.checkpoint
        self.validation = validation
        self.patience = patience
        self.on_check = on_check
        self.peaks = [[group["lr"] for group in o.param_groups] for o in players.optimizers]
        self.tensors = list(dict.fromkeys([*parameters, *objective.buffers()]))
        self.standing = Standing()
        self.best = self._snapshot()
        self.saved_at = 0.0
        self.interruption = Interruption()
        self.whole = True  # whether no step is half done

    def run(self, saved: dict[str, Any] | None) -> History:
        """Train to the end, from the saved state of a loop where there is one."""
        self.begin(saved)
        try:
            with self.interruption:
                self._train()
        finally:
            self._settle()
        self.ranks.take_first(self.tensors)
        if isinstance(self.objective, Judging) and self.ranks.world == 1 and self.history.stopped != "interrupted":
            with torch.no_grad(), fork_rng():  # what it draws changes nothing that comes after the fit
                self.objective.judge_losses(iter(self.batches), self.history)
        return self.history

    def begin(self, saved: dict[str, Any] | None) -> None:
        """What comes before the first step: a state to go on from, or a look at the start."""
        self.batches.agreed = self.ranks.agreed
        if saved is not None and "tensors" in saved:
            self._resume(saved)
        else:
            self._refuse_bad_start("loss", self.batches.example())
            if self.validation is not None:
                self._refuse_bad_start("held-out loss", self.validation)
            self.ranks.other_numbers()
        self.ranks.take_first(self.tensors)
        self._set_off()
        if self.validation is not None and not self.players.keeps_last and not self.history.validation:
            self._check()  # the start is a candidate too

    def end(self) -> None:
        """What comes after the last step: the best parameters in place, and parts settled around them."""
        try:
            self._end()
        finally:
            self._settle()
        self.ranks.take_first(self.tensors)

    def _set_off(self) -> None:
        """Let the schedule go over the time that is left."""
        limits = self.limits
        if limits.left() <= 0.0:
            warn_user(
                f"fit: max_seconds={limits.max_seconds:g} was used up before the first step (after {limits.seconds():.1f} s: "
                "start, stages and a first run). No step was taken; give it more."
            )
        limits.begin()

    def _train(self) -> None:
        try:
            self._steps()
        except KeyboardInterrupt:
            self.history.stopped = "interrupted"
        finally:
            self._end()

    def _refuse_bad_start(self, what: str, args: tuple[Any, ...]) -> None:
        with torch.no_grad(), fork_rng():
            loss = number_of(self.objective, loss_of(self.objective, args))  # as the model's own checks see it
        if math.isfinite(loss) or math.isfinite(finite_loss(self.objective, args)):
            return
        found = non_finite(args)
        about = (
            f"Of the data, {found}. " if found else f"The data are finite, the largest entry is {_largest(args):g}. "
        )
        raise ValueError(
            f"fit: the {what} is {loss} before the first step. {about}Clean the data, check that they lie in the "
            "likelihood's support, bring what a network reads to the unit scale (Standardize; the logarithm of counts), or "
            "start elsewhere (init_loc_fn)."
        )

    def _steps(self) -> None:
        show(self.bar, "fit", self.limits.max_steps or (round_length(0) if self.limits.open else None))
        if not self.history.steps and self._converged():
            self.history.stopped = "converged"
            self._keep(finite_loss(self.objective, self.batches.example()))
        while not self.done():
            self.advance()

    def advance(self) -> None:
        """A step, and a check where one is due."""
        epoch_one = self.history.steps < (self.batches.epoch or 0)
        with pyro.validation_enabled(epoch_one and __debug__):
            self._step()
        if self.standing.lost >= _MAX_SKIPPED:
            self._recover()
        if self.history.steps % self.players.every == 0:
            self._check()

    def _step(self) -> None:
        self.whole = False
        step = self.history.steps - self.standing.round_began
        factor = rate_at(step, self._progress(), self.standing.round) * 0.5**self.standing.halved
        for optimizer, peaks in zip(self.players.optimizers, self.peaks, strict=True):
            set_rates(optimizer, peaks, factor)
        loss, taken = self.players.step(self.stream, self.history)
        self._record(self._agree(loss), self.peaks[-1][0] * factor, taken)
        self.whole = True

    def _agree(self, loss: float) -> float:
        """The mean loss over ranks; they agree on seconds and interruptions, too."""
        ranks = self.ranks
        if ranks.world == 1:
            return loss
        self.limits.shown = None
        own = [loss, float(self.interruption.asked), self.limits.seconds() if ranks.first else 0.0]
        total, asked, self.limits.shown = ranks.sums(own, self.tensors[0])
        self.interruption.asked = asked > 0.0
        return total / ranks.world

    def _progress(self) -> float:
        if not self.limits.open:
            return self.limits.progress(self.history.steps)
        return (self.history.steps - self.standing.round_began) / (round_length(self.standing.round) or 1)

    def _record(self, loss: float, rate: float, taken: bool) -> None:
        history = self.history
        history.loss.append(loss if math.isfinite(loss) else math.nan)
        history.learning_rate.append(rate)
        self.standing.lost = 0 if taken else self.standing.lost + 1
        if not taken:
            history.skipped.append(history.steps)
        if self.limits.max_seconds is not None and self.limits.max_steps is None:
            self.bar.total = self._foreseen()
        self.bar.update()
        if history.steps % 10 == 0 and not self.bar.disable:
            self.bar.set_postfix(self.players.postfix(history), refresh=False)

    def _foreseen(self) -> int:
        """Steps at the end of the seconds, at the speed so far."""
        steps = self.history.steps
        return max(steps, round(steps / max(self.limits.progress(steps), 1e-3)))

    def _check(self) -> None:
        """Judge the averaged parameters; keep them if no earlier ones are better by more than the noise; save."""
        history = self.history
        standing = self.standing
        standing.checked_at = history.steps
        with self.players.average.in_place():
            score, error = self.players.check(history, self.limits.progress(history.steps))
            known = math.isfinite(score)
            if known and score < standing.lowest:
                standing.stale = 0
                standing.stale_from = self._way()
            else:
                standing.stale += 1
            if known and (self.players.keeps_last or score <= standing.lowest + 3.0 * error):
                self._keep(score)
            if self._converged():
                self.history.stopped = "converged"
                self._keep(score)
            if known:
                standing.round_best = min(standing.round_best, score)
                standing.lowest = min(standing.lowest, score)
        if not self.history.stopped and self.limits.seconds() - self.saved_at > _SAVE_EVERY:
            self._save()  # not a check that an interruption brought: see _end
        if self.on_check is not None and self.ranks.first:
            with fork_rng():  # what it draws changes no step
                self.on_check(history)

    def _keep(self, score: float) -> None:
        self.history.best_step = self.history.steps
        self.history.best_loss = score
        self.best = self._snapshot()

    def done(self) -> bool:
        """Whether the last step was taken; the history then says why."""
        history = self.history
        if history.stopped:
            return True
        if self.interruption.asked:
            history.stopped = "interrupted"
        elif self._out_of_patience():
            history.stopped = f"no improvement in {self.standing.stale} checks"
        elif not self.limits.open and self.limits.progress(history.steps) >= 1.0:
            history.stopped = "limit reached"
        elif self.limits.open and self._progress() >= 1.0:
            self._next_round()
        return bool(history.stopped)

    def _converged(self) -> bool:
        """Whether the objective says of its parameters, as they are, that more training would change nothing."""
        if not isinstance(self.objective, Convergent) or not self.limits.open or self.batches.epoch:
            return False
        return self.ranks.agreed(self.ranks.first and self.objective.converged(*self.batches.example()))

    def _out_of_patience(self) -> bool:
        standing = self.standing
        if self.patience is None or standing.stale < self.patience.checks:
            return False
        return self._way() - standing.stale_from >= self.patience.share

    def _way(self) -> float:
        """Share of the whole way, over all rounds."""
        steps = self.history.steps
        return steps / OPEN_STEPS if self.limits.open else self.limits.progress(steps)

    def _next_round(self) -> None:
        """End an open fit that has converged or gains nothing; otherwise begin a longer round at a lower rate."""
        standing = self.standing
        error = smoothed(self.history)[1]
        if standing.previous_best - standing.round_best < max(2.0 * error, _LEAST_GAIN) and error < _LARGEST_ERROR:
            self.history.stopped = "a round brought no improvement"
        elif round_length(standing.round + 1) is None:
            self.history.stopped = "last round ended; the loss on the training data was still falling"
        standing.previous_best = standing.round_best
        standing.round_best = math.inf
        standing.round += 1
        standing.round_began = self.history.steps
        self.bar.total = self.history.steps + (0 if self.history.stopped else round_length(standing.round) or 0)

    def _recover(self) -> None:
        """Go back to the best state at half the rate; a few times, then give up."""
        standing = self.standing
        if standing.halved >= _MOST_HALVED:
            self._diverged()
        standing.halved += 1
        warn_user(
            f"fit: loss or gradient was not finite for {standing.lost} steps up to step {self.history.steps}. Training goes on "
            f"from the {self.players.kept.format(self.history.best_step)}, at half the rate ({standing.halved} of "
            f"{_MOST_HALVED} times). Usual causes: a learning rate that is too large, unscaled data."
        )
        standing.lost = 0
        self._restore(self.best)
        self.players.average.begin_again()
        for optimizer in self.players.optimizers:
            optimizer.state.clear()

    def _diverged(self) -> None:
        history = self.history
        finite = [v for v in history.loss if math.isfinite(v)]
        args = self.batches.example()
        scale = ", ".join(f"{float(a.std()):.3g}" for _, a in named_tensors(args) if a.is_floating_point())
        history.stopped = "diverged"
        raise FitDiverged(
            f"fit: loss or gradient was not finite for {self.standing.lost} steps up to step {history.steps} (last finite "
            f"loss {finite[-1] if finite else math.nan:.4g}). The {self.players.kept.format(history.best_step)} was restored. "
            f"Usual causes: learning rate ({self.peaks[-1][0]:g}), unscaled data (sd of the data: {scale or 'no tensors'}).",
            history,
        )

    def _end(self) -> None:
        """Judge the last steps too, save, and put the best parameters in place."""
        stopped = self.history.stopped
        try:
            if self.whole and stopped == "interrupted":
                self._save()  # before the check, which a fit without the interruption does not make here
            if stopped not in ("", "diverged") and self.standing.checked_at != self.history.steps:
                self._check()
            if self.whole and stopped != "interrupted" and (stopped or self.ranks.world == 1):
                self._save()  # not after an error, of which the other ranks know nothing
        except KeyboardInterrupt:
            self.history.stopped = "interrupted"
        finally:
            self._restore(self.best)
        found = [loss for step, loss in self.history.validation if step and math.isfinite(loss)]
        if self.history.steps and not (self.history.best_step or found) and stopped not in ("", "diverged"):
            warn_user(
                f"fit: no check in {self.history.steps} steps found a finite loss, so the parameters are those from before the "
                "first step. Usual causes: a learning rate that is too large, held-out data outside the likelihood's support."
            )

    def _settle(self) -> None:
        """Let parts of the objective settle around the best parameters; an interruption cuts this short."""
        for optimizer in self.players.optimizers:
            optimizer.zero_grad(set_to_none=True)
        try:
            for module in self.objective.modules():
                if isinstance(module, Finishing):
                    module.finish(*self.batches.example())
        except KeyboardInterrupt:
            self.history.stopped = "interrupted"
        finally:
            self.history.seconds += self.limits.seconds()

    def _snapshot(self) -> list[Tensor]:
        return [t.detach().clone() for t in self.tensors]

    @torch.no_grad()
    def _restore(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    def state(self) -> dict[str, Any]:
        """All that :meth:`begin` needs to go on to the same bits."""
        return {
            "best": self.best,
            "tensors": self._snapshot(),
            "average": self.players.average.state(),
            "module": self.objective.state_dict(),
            "optimizers": [o.state_dict() for o in self.players.optimizers],
            "stream": self.ranks.each(self.stream.state()),
            "standing": vars(self.standing),
            "history": vars(self.history) | {"seconds": self.history.seconds + self.limits.seconds()},
            "setting": self._setting(),
        }

    def _save(self) -> None:
        if self.checkpoint.path is None:
            return
        state = self.state()
        if self.ranks.first:
            self.checkpoint.save(state)
        self.saved_at = self.limits.seconds()

    def _setting(self) -> dict[str, Any]:
        """What a saved state has to agree in beyond what is known before the players are."""
        return {
            "tensors": [list(t.shape) for t in self.tensors],
            "optimizers": [type(o).__name__ for o in self.players.optimizers],
            "learning rates": self.peaks,
            "processes": self.ranks.world,
        }

    def _resume(self, saved: dict[str, Any]) -> None:
        self.checkpoint.compare(saved["setting"], self._setting())
        self._restore(saved["tensors"])
        self.players.average.restore(saved["average"])
        for optimizer, state in zip(self.players.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        vars(self.history).update(vars(History.resumed(saved["history"])))
        self.standing = Standing(**saved["standing"])
        self.best = saved["best"]
        self.stream.resume(saved["stream"][self.ranks.rank])


def _largest(args: tuple[Any, ...]) -> float:
    """The largest absolute entry of all tensors."""
    return max((float(a.detach().double().abs().max()) for _, a in named_tensors(args) if a.numel()), default=0.0)
