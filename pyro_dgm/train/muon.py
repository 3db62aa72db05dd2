r"""An optimiser for the matrices of networks: each step goes equally far along all directions of the gradient.

For a matrix W whose averaged gradient has the singular value decomposition :math:`U S V^\top`, the step is

.. math:: W \leftarrow W - \mathrm{lr} \sqrt{\max(1, m / n)}\; U V^\top, \qquad W \in R^{m \times n}.

Directions in which the loss is flat, and which gradient steps hardly move along, go as fast as the steep ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pyro_dgm.core.kinds import Above, checked

__all__ = ["Muon"]

# The polynomial and the momentum of Jordan et al. (2024); the other betas are those of Adam in ``fit``.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5  # they bring singular values above 0.01 of the largest to 0.7 ... 1.2
_MOMENTUM = 0.95
_BETAS = (0.9, 0.99)


class Muon(torch.optim.Optimizer):
    r"""Momentum with orthogonal steps for matrices, and Adam for all else: ``fit(..., optimizer=dgm.train.Muon)``.

    It is for networks that take many steps: a VAE with layers of 200 on MNIST came to a bound of -86.2 nats in the CPU
    seconds in which Adam came to -91.8 (docs/benchmarks/vae.md). A convolution's weight counts as the matrix of its output
    channels. Other parameters with two dimensions or more are treated as matrices too, whether they are or not.

    A step costs some products of matrices, whatever the batch: with batches of 1,000 rows a quarter of the time, with small ones
    most of it. ``torch.optim.Muon`` takes matrices alone, and computes in bfloat16, which on CPUs without such units takes 20
    times as long; here the numbers of the parameters are used, and the iteration runs on the smaller side of the matrix.

    Args:
        parameters: tensors of any shapes.
        lr: the step of matrices: the change of the output of a layer, relative to its input.
        vector_lr: learning rate of Adam, for what has fewer than two dimensions.

    Raises:
        ValueError: for a rate that is not positive, or without parameters.
        TypeError: for what holds no tensors, such as groups of parameters: it makes its own.

    Note:
        Rates do not carry over from Adam. The length of a step does not fall with the gradient, so a rate that stays never comes
        to rest: ``fit`` lowers it.

    References:
        Jordan et al. (2024), "Muon: an optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> w.grad = torch.diag(torch.tensor([100.0, 1.0]))
        >>> dgm.train.Muon([w], lr=0.1).step()
        >>> w.detach().diagonal().round(decimals=2)
        tensor([-0.0700, -0.0700])
    """

    @checked({}, only=("lr", "vector_lr"), lr=Above(0), vector_lr=Above(0))
    def __init__(self, parameters: Iterable[Tensor], lr: float = 0.05, vector_lr: float = 3e-3) -> None:
        parameters = _as_tensors(parameters)
        matrices = [p for p in parameters if p.dim() >= 2]
        others = [p for p in parameters if p.dim() < 2]
        groups = [{"params": matrices, "lr": lr, "rotate": True}, {"params": others, "lr": vector_lr, "rotate": False}]
        super().__init__([g for g in groups if g["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step along the gradients, which ``closure`` computes anew where it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            move = _rotated if group["rotate"] else _scaled
            for p in (p for p in group["params"] if p.grad is not None):
                move(p, p.grad, self.state[p], group["lr"])
        return loss


def _as_tensors(parameters: Iterable[Tensor]) -> list[Tensor]:
    found = list(parameters)
    for p in found:
        if not isinstance(p, Tensor):
            raise TypeError(
                f"Muon: parameters hold a {type(p).__name__}, expected tensors: module.parameters(). Groups it makes by itself."
            )
    return found


def _rotated(p: Tensor, gradient: Tensor, state: dict[str, Any], lr: float) -> None:
    """The step of a matrix."""
    if not state:
        state["mean"] = torch.zeros_like(p)
    state["mean"].lerp_(gradient, 1.0 - _MOMENTUM)
    ahead = gradient.lerp(state["mean"], _MOMENTUM).flatten(1)
    longer = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
    p.add_(orthogonal(ahead).view_as(p), alpha=-lr * longer)


def _scaled(p: Tensor, gradient: Tensor, state: dict[str, Any], lr: float) -> None:
    """The step of Adam."""
    if not state:
        state |= {"mean": torch.zeros_like(p), "square": torch.zeros_like(p), "steps": 0}
    state["steps"] += 1
    state["mean"].lerp_(gradient, 1.0 - _BETAS[0])
    state["square"].lerp_(gradient.square(), 1.0 - _BETAS[1])
    mean = state["mean"] / (1.0 - _BETAS[0] ** state["steps"])
    square = state["square"] / (1.0 - _BETAS[1] ** state["steps"])
    p.addcdiv_(mean, square.sqrt() + 1e-8, value=-lr)


def orthogonal(x: Tensor) -> Tensor:
    """About the nearest orthogonal matrix: the singular vectors of ``x``, with singular values of 0.7 to 1.2.

    The polynomials are iterated on the Gram matrix of the smaller side, and applied to ``x`` once.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T).T
    x = x / (x.norm() + torch.finfo(x.dtype).tiny)
    gram = x @ x.T
    a, b, c = _COEFFICIENTS
    product = torch.eye(len(gram), dtype=x.dtype, device=x.device)
    for _ in range(_ITERATIONS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x
