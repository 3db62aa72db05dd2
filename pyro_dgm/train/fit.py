"""``fit(objective, data)``: minimise any objective, with progress, early stop, recovery and resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pyro_dgm.core.devices import device_of, one_at_a_time, seeded, to_device
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.module import DistributionModule
from pyro_dgm.core.pace import UNCOUNTED, few_threads, working
from pyro_dgm.core.shapes import check_number
from pyro_dgm.train.batches import (
    Batches,
    as_args,
    described,
    held_out_split,
    largest_of,
    on_disk,
    refuse_non_finite_data,
    row_count,
)
from pyro_dgm.train.descend import Limits, Stages
from pyro_dgm.train.history import Checkpoint, FitDiverged, History, Patience
from pyro_dgm.train.hooks import Alternating, Recipe, Recommending, Refusing, Settling, settings
from pyro_dgm.train.loop import Loop
from pyro_dgm.train.players import MakeOptimizer, OnePlayer, Players, TwoPlayers
from pyro_dgm.train.preparing import owned_parameters, prepare
from pyro_dgm.train.ranks import Ranks, ranks_for

__all__ = ["Asked", "FitDiverged", "begun", "fit"]


_MOST_SETTLING = 10.0  # seconds that are left for what settles
_SEEDS = (-(2**63), 2**64 - 1)  # that torch takes
_ADVICE = "Of a model and a guide write fit(STL_ELBO()(model, guide), data); of a family, fit(MaximumLikelihood(family), data)."
_STEPS_OF_TWO = 4_000  # without a limit: a few thousand are usual (docs/gan.md)


@checked(
    {"objective": _ADVICE},
    only=("objective", "optimizer", "resume", "progress", "on_check"),
)
@one_at_a_time
def fit(
    objective: nn.Module,
    data: Any = (),
    *,
    optimizer: MakeOptimizer | None = None,
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
    strategy: str = "auto",
    on_check: Callable[[History], object] | None = None,
) -> History:
    """Minimise ``objective(*batch)`` over all its parameters, and keep the best ones.

    Parts of the objective that can find their own start (an :class:`~pyro_dgm.AutoFlow`) do so first. Without a limit
    training goes in rounds of 300, 600 and 1,200 steps, each with a cosine schedule, until a round brings nothing, or a posterior
    is right by the weights of its draws (it may be so from the start); with
    ``max_steps``, ``max_epochs`` or ``max_seconds`` it is one such round. Gradients are clipped to norm 10. A
    non-finite step is left out; after 20 in a row training goes on from the best parameters at half the rate, with a warning,
    three times at most. Parameters of ``pyro.param`` and ``pyro.module`` statements are trained too and stand in the param
    store afterwards. An :class:`~pyro_dgm.Adversarial` objective has two players: two optimisers, one round of 4,000 steps
    unless limited, the last averaged weights kept, no clipping.
    A cheaper training that comes first (flow matching, distillation) is a stage: it stands in ``History.stages``, takes at
    most half of the seconds that are left, moves the bar, and is not repeated after a resume.

    Ctrl-C ends the fit after the step at hand: the best parameters are put in place, the last ones included, and a resume goes
    on to the bits of a fit that was not stopped. A second Ctrl-C ends a long step at once. While parts find their start,
    KeyboardInterrupt is raised: nothing is trained yet, and the checkpoint has the stages that ended.

    Args:
        objective: a module that turns a batch into a scalar loss, such as ``STL_ELBO()(model, guide)``.
        data: the objective's arguments: a tensor, a tuple, a mapping of tensors (one argument), or a ``DataLoader``. Batches are
            moved to the objective's device.
        optimizer: makes the optimiser from a list of parameters, such as :class:`~pyro_dgm.train.Muon`; None for Adam with
            betas (0.9, 0.99).
        lr: peak learning rate, used where ``optimizer`` is None; 0.005, or what the objective asks for (the flow of an
            :class:`~pyro_dgm.AutoFlow`: 0.03). Of an adversarial
            pair it is the critic's, and the generator's in proportion. So with the other
            arguments that are None: :class:`~pyro_dgm.ForwardKL`, :class:`~pyro_dgm.MaximumLikelihood` and
            :class:`~pyro_dgm.FlowMatching` bring a recipe, other objectives none.
        max_steps, max_epochs, max_seconds: limits; the first that is reached ends the fit. The seconds count from the call; a
            start, a step or a last check that has begun is not cut short.
        batch_size: rows per minibatch, taken from the first dimension of all tensors; None for full batches, or the objective's.
        validation: held-out arguments, given as ``data`` are, or the fraction of rows to hold out; the best parameters are
            then those with the lowest held-out loss, the first ones included. Held-out losses are taken with the same
            random numbers each time, and as the mean of several draws where the objective is random. 0 holds nothing out;
            None leaves it to the objective: :class:`~pyro_dgm.MaximumLikelihood` holds a tenth out, at most 2,000 rows.
        patience: checks without improvement before the fit stops. A check is made each 50 steps; with minibatches each epoch, or
            each few of them where an epoch has less than 25 steps. None with validation for 500 steps, and at least a
            quarter of the way to the limit.
        checkpoint: a file to save the state to, every few seconds. It belongs to one fit: data, seed, rates and settings
            have to agree at a resume, limits may be longer. A disk that cannot hold it is refused before anything is trained, and
            a file that another fit saves to; if it cannot be saved later, a warning says so and training goes on.
        resume: continue from that file where it exists, on any device; on the CPU the result is the same as without a stop.
        progress: show a progress bar.
        seed: makes the fit reproducible, and leaves the global random state as it was. A module's first weights are drawn when it
            is built: call ``torch.manual_seed`` before that.
        strategy: "auto" trains in all processes that ``torchrun`` started, or that share a begun ``torch.distributed``: each
            minibatch is divided among them, all take the same steps, and each has the trained objective at the end. "ddp"
            asks for it, "alone" is one process whatever there is. Every process is given the same data, or a loader of its own
            share; without minibatches they differ in their noise alone.
        on_check: called with the history so far after each check, to log it or to copy the checkpoint; what it draws at random
            changes no step. Of several processes the first one calls it.

    Returns:
        The losses, rates and skipped steps, and why the fit ended.

    Raises:
        ValueError: if the first loss is not finite, minibatch data hold NaN, or nothing is trainable; for a number that is no
            limit, rate or share; for a checkpoint that is damaged, or of another fit: it names what differs.
        OSError: if the checkpoint's disk has no room for it, or nothing can be written there.
        RuntimeError: if another fit saves to the checkpoint.
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
    asked = Asked(
        objective, data, optimizer, lr, max_steps, max_epochs, max_seconds, batch_size, validation, patience, checkpoint, resume,
        progress, seed, strategy, on_check
    )  # fmt: skip
    with begun(asked) as (loop, saved):
        return loop.run(saved)


@dataclass
class Asked:
    """What :func:`fit` was asked for."""

    objective: nn.Module
    data: Any = ()
    optimizer: MakeOptimizer | None = None
    lr: float | None = None
    max_steps: int | None = None
    max_epochs: int | None = None
    max_seconds: float | None = None
    batch_size: int | None = None
    validation: float | tuple[Any, ...] | None = None
    patience: int | None = None
    checkpoint: str | Path | None = None
    resume: bool = True
    progress: bool = True
    seed: int | None = None
    strategy: str = "auto"
    on_check: Callable[[History], object] | None = None


@contextmanager
def begun(asked: Asked) -> Iterator[tuple[Loop, dict[str, Any] | None]]:
    """The loop of a fit whose objective is prepared, and the state that it resumes from; within the context it may run."""
    objective, data = asked.objective, asked.data
    _refuse_no_objective(objective, data)
    _refuse_patience_of_two(objective, asked.patience)
    _refuse_bad_numbers(asked)
    clock = Limits(None, asked.max_seconds)
    data = data if isinstance(data, DataLoader) else as_args(data)
    held_out = _checked_validation(asked.validation, data)
    ranks = ranks_for(asked.strategy, device_of(objective))
    seed = ranks.agreed(torch.seed() if asked.seed is None else asked.seed) if ranks.world > 1 else asked.seed
    with seeded(seed), ranks.told(), ExitStack() as stack:
        rows = row_count(data)
        recipe = _recipe(objective, rows, held_out is not None or asked.patience is not None)
        held_out = recipe.validation if held_out is None else held_out
        held_out = None if isinstance(held_out, float) and not held_out else held_out
        batch_size = asked.batch_size or recipe.batch_size
        about = {"data": data, "validation": held_out, "batch_size": batch_size, "seed": asked.seed}
        file = Checkpoint(asked.checkpoint, partial(_described, objective, about), asked.resume)
        saved = ranks.agreed(stack.enter_context(file.opened()) if ranks.first else None)
        _refuse_rows(objective, data, batch_size is not None)
        if isinstance(held_out, float):
            data, held_out = held_out_split(data, held_out)
        batches = Batches(data, batch_size, device_of(objective))
        ranks.divides = batches.epoch is not None and batches.loader is None
        history = History(held_out=_told(held_out, rows, about["validation"]))
        limits = _limits(objective, batches, recipe, asked.max_steps, asked.max_epochs, clock)
        bar = stack.enter_context(_bar(asked.progress and ranks.first))
        stack.enter_context(few_threads(largest_of(objective, batches)))
        stack.enter_context(working(clock.left_of_all(), bar, history))
        stages = Stages(history=history, limits=limits, bar=bar, checkpoint=file)
        parameters = stack.enter_context(
            owned_parameters(objective, batches, lambda: prepare(objective, batches, stages, saved, ranks))
        )
        yield _loop(asked, recipe, parameters, batches, stages, to_device(held_out, batches.device), ranks), saved


def _refuse_rows(objective: nn.Module, data: Any, in_batches: bool) -> None:
    """Refuse rows while they can be counted as the user counts them: before some are held out."""
    if isinstance(data, DataLoader) or any(map(on_disk, data)):
        return
    if in_batches:
        refuse_non_finite_data(data)
    if isinstance(objective, Refusing):
        objective.refuse_rows(*data)


def _described(objective: nn.Module, about: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint belongs to."""
    return settings(objective) | {k: described(v) for k, v in about.items()}


def _bar(shown: bool) -> Any:
    return tqdm(desc="prepare", unit="step", bar_format=UNCOUNTED, disable=not shown, mininterval=0.5, miniters=1)


def _loop(
    asked: Asked,
    recipe: Recipe,
    parameters: list[Tensor],
    batches: Batches,
    stages: Stages,
    held_out: Any,
    ranks: Ranks,
) -> Loop:
    objective, optimizer, lr = asked.objective, asked.optimizer, asked.lr
    players: Players
    if isinstance(objective, Alternating):
        players = TwoPlayers(objective, batches, held_out, optimizer, lr, stages.limits.max_steps, ranks)
    else:
        players = OnePlayer(objective, batches, held_out, optimizer, lr, recipe, parameters, ranks)
    judged = held_out is not None and not players.keeps_last
    waits = Patience.of(asked.patience or recipe.patience, players.every, judged)
    return Loop(objective, parameters, players, batches, stages, held_out, waits, ranks, asked.on_check)


def _recipe(objective: nn.Module, rows: int | None, counted: bool) -> Recipe:
    """The objective's; where the user counts checks, or gives rows that may be very many, they are as far apart as usual."""
    recipe = objective.recipe(rows) if isinstance(objective, Recommending) else Recipe()
    return replace(recipe, every=None) if counted else recipe


def _refuse_bad_numbers(asked: Asked) -> None:
    """Refuse numbers that would make a fit endless, empty or another one than was asked for."""
    for name in ("max_steps", "max_epochs", "batch_size", "patience"):
        if (value := getattr(asked, name)) is not None:
            check_number("fit", name, value, least=1, whole=True, advice="Leave it out for no limit of this kind.")
    for name in ("lr", "max_seconds"):
        if (value := getattr(asked, name)) is not None:
            check_number("fit", name, value, above=0, advice="Leave it out for the usual.")
    seed = asked.seed
    if seed is not None:
        check_number("fit", "seed", seed, least=_SEEDS[0], whole=True)
        if seed > _SEEDS[1]:
            raise ValueError(f"fit: seed={seed!r}, expected at most {_SEEDS[1]}.")


def _checked_validation(validation: Any, data: Any) -> float | tuple[Any, ...] | None:
    """A share of the rows (0: none), or the arguments of the objective that held-out data stand for."""
    if isinstance(validation, Real):
        check_number("fit", "validation", validation, least=0)
        if float(validation) >= 1.0:
            raise ValueError(
                f"fit: validation={validation!r}, expected a share of the rows between 0 and 1, or held-out data."
            )
        return float(validation)
    if isinstance(validation, tuple | list) and not validation:
        raise ValueError("fit: validation holds no arguments, expected a share of the rows, or held-out data.")
    held_out = None if validation is None else as_args(validation)
    if held_out and isinstance(data, tuple) and data and len(held_out) != len(data):
        raise ValueError(
            f"fit: validation holds {len(held_out)} arguments of the objective, and the data {len(data)}; expected as many."
        )
    return held_out


def _told(held_out: Any, rows: int | None, asked: Any) -> str:
    """Which data are held out, in words."""
    if held_out is None:
        return ""
    count = row_count(held_out)
    if isinstance(asked, float):
        return f"{count} of {rows} rows, at random"
    return "given data" if count is None else f"{count} given rows"


def _refuse_no_objective(objective: nn.Module, data: Any) -> None:
    if isinstance(objective, DistributionModule):
        raise TypeError(f"fit: {type(objective).__name__} is a family, expected an objective. {_ADVICE}")
    if hasattr(objective, "condition"):  # an amortised guide, which is trained on simulations
        raise TypeError(
            f"fit: {type(objective).__name__} is a guide, expected an objective. Write fit(ForwardKL(guide), sims)."
        )
    if callable(data):
        got = f"{type(objective).__name__} and {type(data).__name__}"
        raise TypeError(f"fit: expected an objective and its data, got {got}. {_ADVICE}")
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "fit: gradients are switched off, so nothing can be trained. Call it outside torch.no_grad()."
        )


def _refuse_patience_of_two(objective: nn.Module, patience: int | None) -> None:
    if patience is not None and isinstance(objective, Alternating):
        raise ValueError("fit: patience counts a falling loss, and an adversarial loss need not fall. Use max_steps.")


def _limits(
    objective: nn.Module,
    batches: Batches,
    recipe: Recipe,
    max_steps: int | None,
    max_epochs: int | None,
    clock: Limits,
) -> Limits:
    """The given limits, on a clock that runs; without any those of the recipe, or of two players."""
    timed = clock.max_seconds is not None
    clock.recommended = max_steps is None and max_epochs is None and not timed
    if clock.recommended:
        max_epochs = recipe.max_epochs
        max_steps = recipe.max_steps
    if max_epochs is not None:
        steps = max_epochs * (batches.epoch or 1)
        max_steps = steps if max_steps is None else min(max_steps, steps)
    if max_steps is None and not timed and isinstance(objective, Alternating):
        max_steps = _STEPS_OF_TWO
    clock.max_steps = max_steps
    if clock.max_seconds is not None:
        shares = [part.settling for part in objective.modules() if isinstance(part, Settling)]
        clock.reserved = min(max(shares, default=0.0) * clock.max_seconds, _MOST_SETTLING)
    return clock
