r"""A field with two hidden layers whose divergence is exact and costs one more matrix product, whatever D is.

.. math:: v = W_2\, g_1 \odot \tanh\big(W_1\, g_0 \odot \tanh(W_0 x + b_0) + b_1\big) + b_2 + a x

with gates :math:`g` and a rate :math:`a` that follow time, and biases :math:`b` that follow time and context. With
:math:`d_k = g_k \odot (1 - \tanh^2)` of layer k,

.. math:: \nabla \cdot v = d_1^\top \big(W_1 \odot (W_0 W_2)^\top\big)\, d_0 + D a,

and the bracket does not depend on the point.

A gradient field :math:`v = -\nabla\Phi`, with divergence and Hamilton-Jacobi residual in closed form.

.. math:: \Phi(t, x; c) = w^\top \log\cosh(Kx + b) + \tfrac12 a |x|^2 + \tfrac12 |A x|^2 + l^\top x,

with :math:`w, b, a, l` functions of time and context. With :math:`s = \tanh(Kx + b)`:
:math:`\nabla\Phi = K^\top(w \odot s) + a x + A^\top A x + l` and
:math:`\Delta\Phi = \sum_j w_j (1 - s_j^2) |K_j|^2 + D a + |A|_F^2`. Along optimal paths
:math:`\partial_t\Phi = \frac12 |\nabla\Phi|^2` (Onken et al. 2021, arXiv 2006.00104, eqs. 6-8; Ruthotto & Haber 2021,
section 3.2).

Any module as a field; its divergence by batched vector-Jacobian products, or by random probes.

.. math:: \nabla\cdot v = \sum_i e_i^\top (\nabla v) e_i = E_\epsilon[\epsilon^\top (\nabla v)\, \epsilon]

for Rademacher :math:`\epsilon` (Hutchinson 1989; Grathwohl et al. 2019, eq. 8). The probes are drawn once a solve, so
that the right-hand side is a function of the point and the solver's steps stay large.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from pyro_dgm.cnf.field import (
    FREQUENCIES,
    NOTHING_KNOWN,
    Motion,
    Plan,
    Rates,
    VectorField,
    at_times,
    time_features,
    time_features_rate,
)
from pyro_dgm.core import MLP

__all__ = ["BlackBoxField", "PotentialField", "TwoLayerField"]


class _Stage(NamedTuple):
    """The field at one time."""

    first: Tensor
    bias0: Tensor
    second: Tensor
    bias1: Tensor
    third: Tensor
    bias2: Tensor
    coupling: Tensor
    gate: Tensor
    rate: Tensor


class TwoLayerField(VectorField):
    """The default field: smooth, gated by time and context, with an exact divergence at a cost independent of D.

    Args:
        features: length D of the points.
        context_features: length of the context; 0 for none.
        hidden_features: width H of both layers.

    Example:
        >>> import torch
        >>> field = TwoLayerField(3)
        >>> x, t = torch.randn(5, 3), torch.tensor(0.4)
        >>> rates = field.bind(None)(t, x)
        >>> jacobian = torch.autograd.functional.jacobian(lambda x: field.bind(None)(t, x).velocity, x[0])
        >>> torch.allclose(rates.divergence[0], jacobian.trace(), atol=1e-5)
        True
    """

    def __init__(self, features: int, context_features: int = 0, hidden_features: int = 64) -> None:
        super().__init__(features, context_features)
        width = hidden_features
        self.first = nn.Parameter(torch.randn(width, features) * (2.0 / features) ** 0.5)
        self.second = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.third = nn.Parameter(torch.randn(features, width) * 0.3 * width**-0.5)
        self.sizes = (width, width, features, width, width, 1)
        self.time = nn.Linear(1 + 2 * FREQUENCIES, sum(self.sizes))
        biases = 2 * width + features
        self.context: Any = MLP(context_features, biases, (width,)) if context_features else None
        with torch.no_grad():
            self.time.weight[2 * width : biases] *= 0.1
            self.time.bias[biases:-1] = 1.0  # gates are open
            self.time.weight[-1] *= 0.1
            self.time.bias[-1] *= 0.1

    def bind(self, context: Tensor | None, plan: Plan = NOTHING_KNOWN) -> Motion:
        c0, c1, c2 = self._of_context(context) or (None, None, None)
        stage = at_times(self._stages, plan.times)

        def motion(t: Tensor, x: Tensor) -> Rates:
            at = stage(t)
            s0 = _layer(x, at.first, at.bias0, c0).sigmoid()
            s1 = _layer(s0, at.second, at.bias1, c1).sigmoid()
            velocity = torch.addcmul(_layer(s1, at.third, at.bias2, c2), at.rate, x)
            divergence = _slope(s1, linear(_slope(s0), at.coupling)) @ at.gate + self.features * at.rate
            return Rates(velocity, divergence)

        return motion

    def _stages(self, times: Tensor) -> list[_Stage]:
        """The field at each of some times; a gate that all points share is folded into the weights.

        ``sigmoid(z) - 1/2 = tanh(z / 2) / 2`` is six times as fast as tanh: weights are scaled for it.
        """
        b0, b1, b2, g0, g1, a = self.time(time_features(times[:, None])).split(self.sizes, -1)
        first, second, third = 2.0 * self.first, 4.0 * self.second, 2.0 * self.third
        coupling = second * (first @ third).mT * g0[:, None]
        second, third = second * g0[:, None], third * g1[:, None]
        b1, b2 = b1 - 0.5 * second.sum(-1), b2 - 0.5 * third.sum(-1)
        columns = [c.unbind() for c in (b0, second, b1, third, b2, coupling, g1, a.squeeze(-1))]
        return [_Stage(first, *row) for row in zip(*columns, strict=True)]

    def velocity(self, time: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        b0, b1, b2, g0, g1, a = self.time(time_features(time)).split(self.sizes, -1)
        c0, c1, c2 = self._of_context(context) or (None, None, None)
        s0 = _layer(x, 2.0 * self.first, None, b0, c0).sigmoid()
        s1 = _layer((s0 - 0.5) * g0, 4.0 * self.second, None, b1, c1).sigmoid()
        return _layer((s1 - 0.5) * g1, 2.0 * self.third, None, b2, c2) + a * x

    def _of_context(self, context: Tensor | None) -> tuple[Tensor, ...] | None:
        return None if self.context is None else self.context(context).split(self.sizes[:3], -1)

    @torch.no_grad()
    def start_at_rest(self) -> None:
        width = self.sizes[0]
        self.third.zero_()
        for layer in [self.time] + ([] if self.context is None else [self.context[-1]]):
            layer.weight[2 * width : 2 * width + self.features] = 0.0
            layer.bias[2 * width : 2 * width + self.features] = 0.0
        self.time.weight[-1] = 0.0
        self.time.bias[-1] = 0.0


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, *more: Tensor | None) -> Tensor:
    """A linear layer, with biases of each point added to that of all."""
    y = linear(x, weight, bias)
    for each in more:
        y = y if each is None else y + each
    return y


def _slope(s: Tensor, factor: Tensor | None = None) -> Tensor:
    """``factor * s * (1 - s)``: the derivative of the sigmoid whose value is ``s``, in one pass."""
    return torch.ops.aten.sigmoid_backward(s.new_ones(()) if factor is None else factor, s)


class PotentialField(VectorField):
    """The gradient field of a potential with one wide hidden layer; the cost of its divergence is linear in D.

    Args:
        features: length D of the points.
        context_features: length of the context; 0 for none.
        hidden_features: number of ridge functions in the potential.
        rank: rows of the quadratic part.

    Example:
        >>> import torch
        >>> field = PotentialField(3)
        >>> x, t = torch.randn(3), torch.tensor(0.4)
        >>> jacobian = torch.autograd.functional.jacobian(lambda x: field.bind(None)(t, x).velocity, x)
        >>> torch.allclose(jacobian, jacobian.mT, atol=1e-5)   # a gradient field: no rotation
        True
    """

    def __init__(
        self, features: int, context_features: int = 0, hidden_features: int = 256, rank: int | None = None
    ) -> None:
        super().__init__(features, context_features)
        width = hidden_features
        self.ridges = nn.Parameter(torch.randn(width, features) * (4.0 / features) ** 0.5)
        self.quadratic = nn.Parameter(0.1 * torch.randn(min(10, features) if rank is None else rank, features))
        self.sizes = (width, width, features, 1)
        self.time = nn.Linear(1 + 2 * FREQUENCIES, sum(self.sizes))
        self.context: Any = MLP(context_features, sum(self.sizes), (64,)) if context_features else None
        with torch.no_grad():
            self.time.bias[:width] = 2.0 * torch.randn(width)
            for layer in self._outputs():
                layer.weight[width:] *= 0.3 / width**0.5
                layer.bias[width:] *= 0.3 / width**0.5

    def _outputs(self) -> list[Any]:
        """The linear layers whose outputs are summed into the potential's coefficients."""
        return [self.time] + ([] if self.context is None else [list(self.context)[-1]])

    def bind(self, context: Tensor | None, plan: Plan = NOTHING_KNOWN) -> Motion:
        of_context = None if self.context is None else self.context(context)
        lengths, trace = self.ridges.square().sum(-1), self.quadratic.square().sum()
        stage = at_times(lambda times: list(self.time(time_features(times[:, None])).unbind()), plan.times)

        def motion(t: Tensor, x: Tensor) -> Rates:
            b, w, l, a = self._split(stage(t), of_context)
            z = linear(x, self.ridges, b) if of_context is None else linear(x, self.ridges) + b
            s = _tanh(z)
            gradient = self._gradient(x, w * s, l, a)
            curvature = (1.0 - s * s) @ (w * lengths) if of_context is None else ((1.0 - s * s) * (w * lengths)).sum(-1)
            laplacian = curvature + self.features * a.squeeze(-1) + trace
            if not plan.hjb:
                return Rates(-gradient, -laplacian)
            residual = (self._rate(t, x, z, w * s) - 0.5 * gradient.square().sum(-1)).abs()
            return Rates(-gradient, -laplacian, residual)

        return motion

    def velocity(self, time: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        of_context = None if self.context is None else self.context(context)
        b, w, l, a = self._split(self.time(time_features(time)), of_context)
        return -self._gradient(x, w * _tanh(linear(x, self.ridges) + b), l, a)

    def _split(self, of_time: Tensor, of_context: Tensor | None) -> tuple[Tensor, ...]:
        return (of_time if of_context is None else of_time + of_context).split(self.sizes, -1)

    def _gradient(self, x: Tensor, weighted: Tensor, l: Tensor, a: Tensor) -> Tensor:
        return weighted @ self.ridges + linear(x, self.quadratic) @ self.quadratic + a * x + l

    def _rate(self, t: Tensor, x: Tensor, z: Tensor, weighted: Tensor) -> Tensor:
        """The potential's derivative in time, at a fixed point."""
        db, dw, dl, da = linear(time_features_rate(t), self.time.weight).split(self.sizes, -1)
        log_cosh = z + softplus(-2.0 * z) - math.log(2.0)
        return weighted @ db + log_cosh @ dw + x @ dl + 0.5 * da.squeeze(-1) * x.square().sum(-1)

    @torch.no_grad()
    def start_at_rest(self) -> None:
        width = self.sizes[0]
        self.quadratic.mul_(1e-4)
        for layer in self._outputs():
            layer.weight[width:] = 0.0
            layer.bias[width:] = 0.0


def _tanh(z: Tensor) -> Tensor:
    """The same as torch's, by the sigmoid, which is six times as fast."""
    return 2.0 * torch.sigmoid(2.0 * z) - 1.0


_KINKED = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.Threshold, nn.Softshrink, nn.Hardshrink, nn.MaxPool1d, nn.MaxPool2d,
)  # fmt: skip


class BlackBoxField(VectorField):
    """A field from any module ``module(t, x)``, or ``module(t, x, context)`` where there is a context.

    ``t`` comes with shape ``(*batch, 1)``, ``x`` with ``(*batch, D)``, ``context`` with ``(*batch, context_features)``.

    Args:
        module: returns a tensor like ``x``; smooth activations only (a kink makes the divergence jump).
        features: length D of the points.
        context_features: length of the context; 0 for none.
        trace: ``"exact"`` costs D vector-Jacobian products an evaluation, ``"hutchinson"`` costs ``probes``.
        probes: Rademacher probes of a solve.

    Raises:
        ValueError: for an unknown trace, fewer than one probe, or a module that returns another shape.

    Note:
        With probes, ``log_prob`` is an unbiased estimate: good for an ELBO or for maximum likelihood; its
        exponential is biased, so neither importance weights nor chains may use it.
    """

    def __init__(
        self, module: nn.Module, features: int, context_features: int = 0, trace: str = "exact", probes: int = 1
    ) -> None:
        super().__init__(features, context_features)
        if trace not in ("exact", "hutchinson"):
            raise ValueError(f"trace={trace!r}: expected 'exact' or 'hutchinson'.")
        if probes < 1:
            raise ValueError(f"probes={probes}: expected at least 1.")
        self.module, self.trace, self.probes = module, trace, probes
        self.scale = nn.Parameter(torch.ones(()))
        _warn_of_kinks(module)

    def bind(self, context: Tensor | None, plan: Plan = NOTHING_KNOWN) -> Motion:
        probe = plan.probe

        def motion(t: Tensor, x: Tensor) -> Rates:
            wanted = torch.is_grad_enabled()
            with torch.enable_grad():
                x = x if x.requires_grad else x.detach().requires_grad_()
                velocity = self.velocity(t, x, context)
                vectors = self._basis(x) if probe is None else probe
                (products,) = torch.autograd.grad(
                    velocity, x, vectors, create_graph=wanted, is_grads_batched=True, allow_unused=True
                )
            divergence = x.new_zeros(x.shape[:-1]) if products is None else (products * vectors).sum(-1)
            divergence = divergence.sum(0) if probe is None else divergence.mean(0)
            return Rates(velocity, divergence) if wanted else Rates(velocity.detach(), divergence.detach())

        return motion

    def velocity(self, time: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        parts = [time.expand(*x.shape[:-1], 1), x]
        parts += [] if context is None else [context.expand(*x.shape[:-1], context.shape[-1])]
        velocity = self.module(*parts)
        if velocity.shape != x.shape:
            raise ValueError(
                f"{type(self.module).__name__} as a field: returned shape {tuple(velocity.shape)} for points of shape "
                f"{tuple(x.shape)}; expected the same shape. Its arguments are (t, x) or (t, x, context)."
            )
        return self.scale * velocity

    def start_at_rest(self) -> None:
        nn.init.zeros_(self.scale)

    def probe(self, x: Tensor) -> Tensor | None:
        if self.trace == "exact":
            return None
        return torch.randint(2, (self.probes, *x.shape), device=x.device).to(x.dtype) * 2.0 - 1.0

    def _basis(self, x: Tensor) -> Tensor:
        unit = torch.eye(self.features, dtype=x.dtype, device=x.device)
        return unit.reshape(self.features, *(1,) * (x.dim() - 1), self.features).expand(self.features, *x.shape)


def _warn_of_kinks(module: nn.Module) -> None:
    kinked = sorted({type(m).__name__ for m in module.modules() if isinstance(m, _KINKED)})
    if kinked:
        warnings.warn(
            f"A continuous flow with {', '.join(kinked)} has a divergence that jumps: solvers lose their order, and log "
            "densities are off by up to 1e-2 nats. Use Tanh, Softplus or SiLU.",
            stacklevel=4,
        )
