"""``fit(objective, data)``: minimise any objective, with progress, early stop, recovery and resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_dgm.core.devices import device_of, fork_rng, put_random_states, random_states, seeded, to_device
from pyro_dgm.train.adversarial import AdversarialRun
from pyro_dgm.train.batches import Batches, held_out_split, named_tensors, non_finite, row_count
from pyro_dgm.train.checkpoint import load_checkpoint, save_checkpoint
from pyro_dgm.train.history import FitDiverged, History, Limits, rate_at, round_length
from pyro_dgm.train.hooks import (
    Alternating,
    Convergent,
    Finishing,
    Paced,
    Pretrainable,
    Recipe,
    Recommending,
    Startable,
)
from pyro_dgm.train.parameters import Average, owned_parameters

__all__ = ["FitDiverged", "fit"]

_WINDOW = 50  # steps in a smoothed loss, and between checks
_LARGEST_ERROR = 0.05  # nats, of a smoothed loss that may stop a fit; subsampled data or a poor fit have more
_MAX_SKIPPED = 20  # consecutive non-finite steps before a fit gives up
_CLIP = 10.0


def fit(
    objective: nn.Module,
    data: Any = (),
    *,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    lr: float | None = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
    max_seconds: float | None = None,
    batch_size: int | None = None,
    validation: float | tuple[Any, ...] | None = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    seed: int | None = None,
) -> History:
    """Minimise ``objective(*batch)`` over all its parameters, and keep the best ones.

    Parts of the objective that can find their own start (an :class:`~pyro_dgm.AutoFlow`) do so first. Without a limit
    training goes in rounds of 300, 600 and 1,200 steps, each with a cosine schedule, until a round brings nothing; with
    ``max_steps``, ``max_epochs`` or ``max_seconds`` it is one such round. Gradients are clipped to norm 10. A
    non-finite step is left out; 20 in a row end the fit. Parameters of ``pyro.param`` and ``pyro.module`` statements
    are trained too and stand in the param store afterwards. An :class:`~pyro_dgm.Adversarial` objective has a loop of its
    own: two optimisers, one round of 4,000 steps unless limited, the last averaged weights kept, no clipping.

    Args:
        objective: a module that turns a batch into a scalar loss, such as ``STL_ELBO()(model, guide)``.
        data: the objective's arguments: a tensor, a tuple, a mapping of tensors (one argument), or a ``DataLoader``. Batches are
            moved to the objective's device.
        optimizer: makes the optimiser from a list of parameters; None for Adam with betas (0.9, 0.99).
        lr: peak learning rate, used where ``optimizer`` is None; 0.005, or what the objective asks for (the flow of an
            :class:`~pyro_dgm.AutoFlow`: 0.015). Of an adversarial
            pair it is the critic's, and the generator's in proportion. So with the other
            arguments that are None: :class:`~pyro_dgm.ForwardKL` brings a recipe, other objectives none.
        max_steps, max_epochs, max_seconds: limits; the first that is reached ends the fit.
        batch_size: rows per minibatch, taken from the first dimension of all tensors; None for full batches.
        validation: held-out arguments, or the fraction of rows to hold out; the best parameters are then those with
            the lowest held-out loss.
        patience: checks (each 50 steps, or each epoch) without improvement before the fit stops; 10 with validation.
        checkpoint: a file to save the state to, every few seconds.
        resume: continue from that file where it exists, on any device; on the CPU the result is the same as without a stop.
        progress: show a progress bar.
        seed: makes the fit reproducible, and leaves the global random state as it was.

    Returns:
        The losses, rates and skipped steps, and why the fit ended.

    Raises:
        ValueError: if the first loss is not finite, minibatch data hold NaN, or nothing is trainable.
        FitDiverged: if the loss stays non-finite; the best parameters were restored.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> class Distance(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = torch.nn.Parameter(torch.tensor(0.0))
        ...     def forward(self, x):
        ...         return (x - self.w).square().mean()
        >>> objective = Distance()
        >>> history = dgm.fit(objective, torch.tensor([1.0, 3.0]), lr=0.1, max_steps=300, progress=False, seed=0)
        >>> round(objective.w.item(), 2)
        2.0
    """
    with seeded(seed):
        recipe = objective.recipe(row_count(data)) if isinstance(objective, Recommending) else Recipe()
        batch_size, patience = batch_size or recipe.batch_size, patience or recipe.patience
        validation = recipe.validation if validation is None else validation
        if max_steps is None and max_epochs is None and max_seconds is None:
            max_epochs = recipe.max_epochs
        if isinstance(validation, float):
            data, validation = held_out_split(data, validation)
        batches = Batches(data, batch_size, device_of(objective))
        limits = Limits(_smaller(max_steps, max_epochs and max_epochs * (batches.epoch or 1)), max_seconds)
        saved = load_checkpoint(checkpoint) if resume and checkpoint else None
        bar = tqdm(desc="warm start", unit="step", disable=not progress, mininterval=0.5)
        with (
            bar,
            owned_parameters(objective, batches.example(), lambda: _prepare(objective, batches, saved, bar)) as found,
        ):
            bar.reset(), bar.set_description("fit", refresh=False)
            ends: Any = (batches, limits, to_device(validation, batches.device), patience, bar, checkpoint)
            if isinstance(objective, Alternating):
                return AdversarialRun(objective, found, optimizer, lr, *ends).run(saved)
            groups: Any = found if lr else _by_rate(objective, found, recipe.lr)
            made = _adam(groups, lr or recipe.lr, recipe.weight_decay) if optimizer is None else optimizer(found)
            return _Run(objective, found, made, Average(found, recipe.averaging), *ends).run(saved)


def _prepare(objective: nn.Module, batches: Batches, saved: dict[str, Any] | None, bar: Any) -> None:
    """Let parts of the objective find their start, or take the structure of a saved state."""
    if saved is not None:
        _take(objective, saved["module"])
        return
    for module in objective.modules():
        if isinstance(module, Startable):
            module.warm_start(*batches.example())
        if isinstance(module, Pretrainable):
            module.pretrain(_counted(batches, bar))


def _counted(batches: Batches, bar: Any) -> Iterator[tuple[Any, ...]]:
    """Endless batches, which move the bar."""
    for batch in batches:
        bar.update()
        yield batch


def _take(objective: nn.Module, state: dict[str, Tensor]) -> None:
    try:
        objective.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            "fit: the checkpoint is of another objective (its tensors have other names or shapes). Give each objective "
            f"its own checkpoint, or pass resume=False. torch says: {error}"
        ) from error


class _Run:
    """One call of :func:`fit`: the loop's state and its steps."""

    def __init__(
        self, objective: nn.Module, parameters: list[Tensor], optimizer: Any, average: Average, batches: Batches,
        limits: Limits, validation: Any, patience: int | None, bar: Any, checkpoint: str | Path | None,
    ) -> None:  # fmt: skip
        self.objective, self.parameters, self.batches, self.limits = objective, parameters, batches, limits
        self.optimizer, self.average = optimizer, average
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.validation = validation
        self.patience = patience or (10 if validation is not None else None)
        self.checkpoint: Any = checkpoint
        self.saved_at = limits.seconds()
        self.bar = bar
        self.tensors = list(dict.fromkeys([*parameters, *objective.buffers()]))
        self.history, self.best = History(), self._snapshot()
        self.round, self.round_began, self.round_best, self.stale, self.lost = 0, 0, math.inf, 0, 0

    def run(self, saved: dict[str, Any] | None) -> History:
        self.limits.begin()
        if saved is None:
            self._refuse_bad_start()
        else:
            self._resume(saved)
        try:
            self._loop()
        except KeyboardInterrupt:
            self.history.stopped = "interrupted"
        finally:
            self._finish()
        return self.history

    def _refuse_bad_start(self) -> None:
        args = self.batches.example()
        with torch.no_grad(), fork_rng():
            losses = [float(self._loss(args)) for _ in range(3)]
        if not any(math.isfinite(loss) for loss in losses):
            found = non_finite(args)
            raise ValueError(
                f"fit: the loss is {losses[0]} before the first step. "
                + (
                    f"Of the data, {found}. "
                    if found
                    else f"The data are finite, the largest entry is {_largest(args):g}. "
                )
                + "Clean the data, check that they lie in the likelihood's support, bring what a network reads to the unit "
                "scale (Standardize; the logarithm of counts), or start elsewhere (init_loc_fn)."
            )

    def _loop(self) -> None:
        batches = iter(self.batches)
        self.bar.total = self.limits.max_steps or (round_length(self.round) if self.limits.open else None)
        while not self._done():
            epoch_one = self.history.steps < (self.batches.epoch or 0)
            with pyro.validation_enabled(epoch_one and __debug__):
                self._step(next(batches))
            if self.history.steps % (self.batches.epoch or _WINDOW) == 0:
                self._check()

    def _step(self, batch: tuple[Any, ...]) -> None:
        rate = self._set_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch)
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, _CLIP)) if math.isfinite(value) else math.nan
        if math.isfinite(norm):
            self.optimizer.step()
            self.average.update()
        self._record(value, rate, math.isfinite(norm))

    def _loss(self, batch: tuple[Any, ...]) -> Tensor:
        """The objective; a matrix that cannot be factorised, or an equation that cannot be solved, makes it NaN."""
        try:
            return self.objective(*batch)
        except (torch.linalg.LinAlgError, ArithmeticError):
            return torch.tensor(math.nan)

    def _set_rate(self) -> float:
        step = self.history.steps - self.round_began
        factor = rate_at(step, self._progress(), self.round)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        return self.peaks[0] * factor

    def _progress(self) -> float:
        if not self.limits.open:
            return self.limits.progress(self.history.steps)
        return (self.history.steps - self.round_began) / (round_length(self.round) or 1)

    def _record(self, loss: float, rate: float, taken: bool) -> None:
        history = self.history
        history.loss.append(loss if math.isfinite(loss) else math.nan)
        history.learning_rate.append(rate)
        self.lost = 0 if taken else self.lost + 1
        if not taken:
            history.skipped.append(history.steps)
            if self.lost >= _MAX_SKIPPED:
                self._diverged()
        self.bar.update()
        if history.steps % 10 == 0:
            self.bar.set_postfix(loss=f"{self._smoothed()[0]:.4g}", lr=f"{rate:.1e}", refresh=False)

    def _smoothed(self) -> tuple[float, float]:
        """Mean of the window's finite losses, and its standard error."""
        window = torch.tensor(
            [v for v in self.history.loss[-_WINDOW:] if math.isfinite(v)] or [math.nan], dtype=torch.float64
        )
        return float(window.mean()), float(window.std(correction=0)) / math.sqrt(len(window))

    def _check(self) -> None:
        """Keep the best parameters (of those that noise cannot tell apart, the latest), count stale checks, save."""
        with self.average.in_place():
            score, error = self._smoothed() if self.validation is None else (self._held_out(), 0.0)
            self.round_best = min(self.round_best, score)
            self.stale = 0 if score < self.history.best_loss else self.stale + 1
            if score <= self.history.best_loss + 3.0 * error:
                self.history.best_step, self.best = self.history.steps, self._snapshot()
            self.history.best_loss = min(self.history.best_loss, score)
        if self.checkpoint and self.limits.seconds() - self.saved_at > 5.0:
            self._save()

    def _held_out(self) -> float:
        with torch.no_grad(), fork_rng(0):
            loss = float(self.objective(*self.validation))
        self.history.validation.append((self.history.steps, loss))
        return loss

    def _done(self) -> bool:
        history = self.history
        if self.patience and self.stale >= self.patience:
            history.stopped = f"no improvement in {self.stale} checks"
        elif not self.limits.open and self.limits.progress(history.steps) >= 1.0:
            history.stopped = "limit reached"
        elif self.limits.open and self._progress() >= 1.0:
            self._next_round()
        return bool(history.stopped)

    def _next_round(self) -> None:
        """End an open fit that has converged or gains nothing; otherwise begin a longer round at a lower rate."""
        before, error = getattr(self, "_previous_best", math.inf), self._smoothed()[1]
        if isinstance(self.objective, Convergent) and self.objective.converged():
            self.history.stopped = "converged"
        elif before - self.round_best < max(2.0 * error, 1e-2) and error < _LARGEST_ERROR:
            self.history.stopped = "a round brought no improvement"
        elif round_length(self.round + 1) is None:
            self.history.stopped = "last round ended; the loss was still falling"
        self._previous_best, self.round_best = self.round_best, math.inf
        self.round, self.round_began = self.round + 1, self.history.steps
        self.bar.total = self.history.steps + (0 if self.history.stopped else round_length(self.round) or 0)

    def _snapshot(self) -> list[Tensor]:
        return [t.detach().clone() for t in self.tensors]

    @torch.no_grad()
    def _restore(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    def _diverged(self) -> None:
        history, args = self.history, self.batches.example()
        finite = [v for v in history.loss if math.isfinite(v)]
        scale = ", ".join(f"{float(a.std()):.3g}" for _, a in named_tensors(args) if a.is_floating_point())
        history.stopped = "diverged"
        raise FitDiverged(
            f"fit: loss or gradient was not finite for {self.lost} steps up to step {history.steps} (last finite loss "
            f"{finite[-1] if finite else math.nan:.4g}). The best state (step {history.best_step}) was restored. Usual "
            f"causes: learning rate ({self.peaks[0]:g}), unscaled data (sd of the data: {scale or 'no tensors'}).",
            history,
        )

    def _finish(self) -> None:
        if self.history.steps % (self.batches.epoch or _WINDOW) and self.history.stopped in ("limit reached", ""):
            self._check()
        self.history.seconds += self.limits.seconds()
        if self.checkpoint:
            self._save()
        self._restore(self.best)
        self.optimizer.zero_grad(set_to_none=True)
        for module in self.objective.modules():
            if isinstance(module, Finishing):
                module.finish(*self.batches.example())

    def _save(self) -> None:
        fields = ("round", "round_began", "round_best", "stale", "lost", "best")
        state = {k: getattr(self, k) for k in fields} | {"previous_best": getattr(self, "_previous_best", math.inf)}
        now = {"tensors": self._snapshot(), "optimizer": self.optimizer.state_dict(), "rng": random_states()}
        now |= {"module": self.objective.state_dict(), "average": self.average.state()}
        save_checkpoint(self.checkpoint, state | now | {"history": vars(self.history)})
        self.saved_at = self.limits.seconds()

    def _resume(self, saved: dict[str, Any]) -> None:
        self._restore(saved["tensors"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average.restore(saved["average"])
        put_random_states(saved["rng"])
        self.history = History.resumed(saved["history"])
        for name in ("round", "round_began", "round_best", "stale", "lost", "best"):
            setattr(self, name, saved[name])
        self._previous_best = saved["previous_best"]


def _smaller(a: int | None, b: int | None) -> int | None:
    return min((n for n in (a, b) if n is not None), default=None)


def _largest(args: tuple[Any, ...]) -> float:
    """The largest absolute entry of all tensors."""
    return max((float(a.abs().max()) for _, a in named_tensors(args) if a.numel()), default=0.0)


def _by_rate(objective: nn.Module, parameters: list[Tensor], lr: float) -> list[dict[str, Any]]:
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


def _adam(parameters: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
