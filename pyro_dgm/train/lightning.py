"""Objectives for Lightning's ``Trainer``, which brings devices, loggers, callbacks and precision (extra ``lightning``)."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pyro_dgm.core.devices import to_device
from pyro_dgm.train.batches import as_args, picked, row_count
from pyro_dgm.train.fit import Asked, begun
from pyro_dgm.train.hooks import Alternating
from pyro_dgm.train.loop import Loop
from pyro_dgm.train.players import MakeOptimizer

try:
    import lightning
except ImportError as error:
    raise ImportError("pyro_dgm.train.lightning needs the extra: pip install 'pyro_dgm[lightning]'") from error

__all__ = ["LightningObjective"]


class LightningObjective(lightning.LightningModule):
    """An objective with its data, trained by ``Trainer(...).fit(module)`` as :func:`~pyro_dgm.fit` trains it.

    Kept of ``fit``: units and start, trainings that come first, the recipe, the schedule over the trainer's steps, averages,
    held-out losses and the best state, both optimisers of two players, and what settles at the end. Several processes of the
    trainer take the same steps. ``loss``, ``lr`` and ``held_out`` are logged; ``history`` is the
    :class:`~pyro_dgm.train.History`.

    Args:
        objective, data, optimizer, lr, batch_size, validation: as of ``fit``. Data may be a ``DataLoader``.
        seed: of what is drawn before the first step; the trainer's own is ``lightning.seed_everything``.

    Raises:
        ValueError: in the trainer's ``fit``, for a trainer without an end (``max_steps``, ``max_epochs``), for 16-bit floats that
            need a scaler (use ``bf16-mixed``), and as ``fit`` does.

    Note:
        The trainer counts the steps of both optimisers of two players, so that ``max_steps=8000`` are about 4,000 of the
        generator. Rates, clipping and accumulation are the objective's: leave ``gradient_clip_val`` and
        ``accumulate_grad_batches`` out.
    """

    def __init__(
        self,
        objective: nn.Module,
        data: Any = (),
        *,
        optimizer: MakeOptimizer | None = None,
        lr: float | None = None,
        batch_size: int | None = None,
        validation: float | tuple[Any, ...] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.objective = objective
        self._asked = Asked(
            objective, data, optimizer, lr, batch_size=batch_size, validation=validation, seed=seed, progress=False
        )
        self._open = ExitStack()
        self._loop: Loop | None = None
        self._handed = _Handed()
        self._saved: dict[str, Any] | None = None

    @property
    def history(self) -> Any:
        """Losses, rates and why training ended; None before the first step."""
        return self._loop and self._loop.history

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        precision = str(self.trainer.precision)
        if precision in ("16-mixed", "16-true"):
            raise ValueError(f"LightningObjective: precision={precision!r} needs a scaler of losses. Use 'bf16-mixed'.")
        self.objective.to(self.trainer.strategy.root_device)
        loop = self._open.enter_context(begun(self._asked))[0]
        self._loop = loop

    def train_dataloader(self) -> DataLoader[Any]:
        batches = self._started().batches
        if batches.loader is not None:
            return batches.loader
        if batches.rows is None:
            return DataLoader(_Whole(), collate_fn=lambda _: batches.args)
        rows = _Rows(batches.args)
        return DataLoader(rows, batch_size=batches.batch_size, shuffle=True, collate_fn=rows.batch)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return self._started().players.optimizers

    def on_train_start(self) -> None:
        loop = self._started()
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("LightningObjective: the trainer has no end. Give it max_steps, or max_epochs.")
        players = 2 if isinstance(self.objective, Alternating) else 1
        loop.limits.max_steps = max(1, int(total) // players)
        own = self.optimizers()
        loop.players.optimizers = own if isinstance(own, list) else [own]  # type: ignore
        loop.ranks.divides = False  # each process has a loader of its own
        loop.stream = self._handed  # type: ignore
        loop.begin(self._saved)

    def training_step(self, batch: Any, index: int) -> None:
        loop = self._started()
        handed = self._handed.batches
        handed.append(to_device(as_args(batch), self.device))
        if len(handed) < getattr(self.objective, "critic_steps", 1):
            return
        loop.advance()
        self.trainer.should_stop = self.trainer.should_stop or loop.done()
        self.log("loss", loop.history.loss[-1], prog_bar=True)
        self.log("lr", loop.history.learning_rate[-1])
        if loop.history.validation:
            self.log("held_out", loop.history.validation[-1][1], prog_bar=True)

    def on_train_end(self) -> None:
        loop = self._started()
        loop.history.stopped = loop.history.stopped or "limit reached"
        loop.end()
        self._open.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["pyro_dgm"] = self._started().state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint["pyro_dgm"]

    def _started(self) -> Loop:
        if self._loop is None:
            raise RuntimeError(
                "LightningObjective: it is not being trained. Call lightning.Trainer(max_steps=...).fit(module)."
            )
        return self._loop


class _Handed:
    """The batches of a trainer, as a loop takes them; their order is the trainer's to resume."""

    def __init__(self) -> None:
        self.batches: deque[tuple[Any, ...]] = deque()

    def __next__(self) -> tuple[Any, ...]:
        return self.batches.popleft()

    def state(self) -> dict[str, Any]:
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


class _Rows(Dataset[int]):
    """Numbers of rows, so that a batch is picked at once."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args
        self.count = row_count(args) or 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> int:
        return i

    def batch(self, rows: list[int]) -> tuple[Any, ...]:
        return picked(self.args, torch.tensor(rows))


class _Whole(Dataset[int]):
    """One batch an epoch: all data."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> int:
        return i
