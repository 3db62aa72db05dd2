r"""Several processes that train one objective together: each goes down its share of every batch, and all take the same step.

Gradients are averaged over the processes ("ranks") by one ``all_reduce`` of all of them after each backward pass. A loss
that is a mean over rows, or an estimate of the whole from some rows (a subsampled plate), then has the gradient of one process
that sees the whole batch:

.. math:: \nabla L(B) = \sum_r \frac{|B_r|}{|B|} \nabla L(B_r).

Preparation (units, start, cheaper trainings) is done by the first rank, whose state the others take. What decides on the way of
a fit, losses, seconds and interruptions, is agreed at every step, so that all ranks end together.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as together
from torch import Tensor

from pyro_dgm.train.batches import picked, row_count

__all__ = ["ALONE", "Ranks", "ranks_for"]

T = TypeVar("T")
_LOST = ("closed by peer", "reset by peer", "broken pipe", "timed out", "timeout", "connection refused", "socket")


class Ranks:
    """The processes of a fit; where there is one, nothing is sent.

    Args:
        rank, world: which process this is, and how many there are.
        divides: whether a batch is the same in all of them, and divided; otherwise each has its own.
    """

    def __init__(self, rank: int = 0, world: int = 1, divides: bool = True) -> None:
        self.rank = rank
        self.world = world
        self.divides = divides

    @property
    def first(self) -> bool:
        """Whether this rank prepares, saves and shows."""
        return self.rank == 0

    def share(self, batch: tuple[Any, ...]) -> tuple[tuple[Any, ...], float]:
        """This rank's rows of a batch, and the weight of their loss; the whole of one with too few rows, or without rows."""
        rows = row_count(batch) if self.divides and self.world > 1 else None
        if rows is None or rows < self.world:
            return batch, 1.0
        index = torch.arange(self.rank, rows, self.world)
        return picked(batch, index), len(index) * self.world / rows

    def average(self, parameters: Sequence[Tensor], fine: bool) -> bool:
        """Set gradients to their means over ranks; False where one of them has none that is finite."""
        if self.world == 1:
            return fine
        like = parameters[0]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(part.reshape(-1).to(like) for part in parts), like.new_tensor([float(fine)])])
        together.all_reduce(flat)
        flat /= self.world
        if not fine or not float(flat[-1]) == 1.0:
            return False
        for p, mean in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
            if p.grad is not None:
                p.grad.copy_(mean.view_as(p))
        return True

    def sums(self, values: Sequence[float], like: Tensor) -> list[float]:
        """Sums over ranks."""
        if self.world == 1:
            return list(values)
        flat = torch.tensor(values, dtype=torch.float64, device=like.device)
        together.all_reduce(flat)
        return flat.tolist()

    def agreed(self, value: T) -> T:
        """The first rank's."""
        if self.world == 1:
            return value
        box = [value]
        together.broadcast_object_list(box)
        return box[0]

    def each(self, value: T) -> list[T]:
        """That of every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        together.all_gather_object(found, value)
        return found

    @torch.no_grad()
    def take_first(self, tensors: Sequence[Tensor]) -> None:
        """Set tensors to those of the first rank."""
        if self.world == 1:
            return
        shapes = [tuple(t.shape) for t in tensors]
        if self.agreed(shapes) != shapes:
            raise RuntimeError(
                f"fit: rank {self.rank} trains other tensors than rank 0. Build the same objective, from the same data, in each "
                "process."
            )
        for tensor in tensors:
            value = tensor.detach().contiguous()
            together.broadcast(value, 0)
            tensor.copy_(value)

    def other_numbers(self) -> None:
        """Let each rank draw noise of its own from here on."""
        if self.rank:
            torch.manual_seed(torch.initial_seed() + self.rank)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Say which rank has lost the others, and what to do."""
        try:
            yield
        except (RuntimeError, ConnectionError) as error:
            if self.world == 1 or not any(words in str(error).lower() for words in _LOST):
                raise
            raise RuntimeError(
                f"fit: rank {self.rank} of {self.world} waited for another rank, which has ended or cannot be reached; its own "
                "output says why. Start all of them again: with checkpoint= the fit goes on where it was saved last."
            ) from error


ALONE = Ranks()


def ranks_for(strategy: str, device: torch.device | None) -> Ranks:
    """The ranks of a fit: those of ``torch.distributed`` where it was begun, or where ``torchrun`` started this process.

    Raises:
        ValueError: for a strategy of another name, and for "ddp" in a process that was started alone.
    """
    if strategy not in ("auto", "ddp", "alone"):
        raise ValueError(f"fit: strategy={strategy!r}, expected 'auto', 'ddp' or 'alone'.")
    if strategy == "alone" or not together.is_available():
        return Ranks()
    if together.is_torchelastic_launched() and not together.is_initialized():
        together.init_process_group("nccl" if device is not None and device.type == "cuda" else "gloo")
        atexit.register(_part)
    if together.is_initialized():
        return Ranks(together.get_rank(), together.get_world_size())
    if strategy == "ddp":
        raise ValueError(
            "fit: strategy='ddp', but this process was started alone. Start the script by torchrun --nproc-per-node=2 "
            "script.py, or call torch.distributed.init_process_group first."
        )
    return Ranks()


def _part() -> None:
    if together.is_initialized():
        together.destroy_process_group()
