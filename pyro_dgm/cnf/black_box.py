r"""Any module as a field, with its divergence by automatic differentiation; and sums of fields.

.. math:: \nabla\cdot v = \sum_i e_i^\top (\nabla v) e_i = E_\epsilon[\epsilon^\top (\nabla v)\, \epsilon]

by D batched vector-Jacobian products, or by Rademacher probes :math:`\epsilon` (Hutchinson 1989; Grathwohl et al. 2019,
eq. 8). The probes are drawn once a solve, so that the right-hand side is a function of the point and the solver's steps stay
large.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_dgm.cnf.field import NOTHING_KNOWN, Motion, Plan, Rates, VectorField
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import check_number, reference, refuse_two_precisions
from pyro_dgm.core.upstream import in_vmap
from pyro_dgm.core.warn import warn_user

__all__ = ["BlackBoxField", "SumField", "check_trace"]

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

    @checked()
    def __init__(
        self, module: nn.Module, features: int, context_features: int = 0, trace: str = "exact", probes: int = 1
    ) -> None:
        super().__init__(features, context_features)
        check_trace("BlackBoxField", trace, probes)
        self.module = module
        self.trace = trace
        self.probes = probes
        like = reference(module)
        self.scale = nn.Parameter(torch.ones((), dtype=None if like is None else like.dtype))
        _warn_of_kinks(module)

    def bind(self, context: Tensor | None, plan: Plan = NOTHING_KNOWN) -> Motion:
        probe = plan.probe

        def motion(t: Tensor, x: Tensor) -> Rates:
            wanted = torch.is_grad_enabled()
            if in_vmap():
                return self._by_func(t, x, context, probe)
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

    def _by_func(self, t: Tensor, x: Tensor, context: Tensor | None, probe: Tensor | None) -> Rates:
        """The same where ``torch.vmap`` is at work, inside of which ``torch.autograd`` is not."""
        velocity, pull = torch.func.vjp(lambda point: self.velocity(t, point, context), x)[:2]
        vectors = self._basis(x) if probe is None else probe
        divergence = (torch.vmap(lambda v: pull(v)[0])(vectors) * vectors).sum(-1)
        return Rates(velocity, divergence.sum(0) if probe is None else divergence.mean(0))

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
        warn_user(
            f"A continuous flow with {', '.join(kinked)} has a divergence that jumps: solvers lose their order, and log "
            "densities are off by up to 1e-2 nats. Use Tanh, Softplus or SiLU."
        )


class SumField(VectorField):
    """The sum of fields over the same points; its divergence is the sum of theirs.

    Args:
        fields: at least one field, all with the same features.

    Raises:
        ValueError: if they differ in their features.
    """

    fields: Any

    @checked()
    def __init__(self, *fields: VectorField) -> None:
        if len({(f.features, f.context_features) for f in fields}) != 1:
            raise ValueError(
                "SumField: expected one or more fields over the same points, got (features, context_features) "
                f"{[(f.features, f.context_features) for f in fields]}. Build them with the same sizes."
            )
        super().__init__(fields[0].features, fields[0].context_features)
        self.fields = nn.ModuleList(fields)
        refuse_two_precisions("SumField", self)

    def bind(self, context: Tensor | None, plan: Plan = NOTHING_KNOWN) -> Motion:
        motions = [f.bind(context, plan) for f in self.fields]

        def motion(t: Tensor, x: Tensor) -> Rates:
            rates = [m(t, x) for m in motions]
            return Rates(sum(r.velocity for r in rates), sum(r.divergence for r in rates))

        return motion

    def velocity(self, time: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        return sum(f.velocity(time, x, context) for f in self.fields)

    def start_at_rest(self) -> None:
        for field in self.fields:
            field.start_at_rest()

    def probe(self, x: Tensor) -> Tensor | None:
        probes = [p for p in (f.probe(x) for f in self.fields) if p is not None]
        return probes[0] if probes else None


def check_trace(owner: str, trace: str, probes: int) -> None:
    """Refuse an unknown trace, and a number of probes that is none."""
    if trace not in ("exact", "hutchinson"):
        raise ValueError(f"{owner}: trace={trace!r}: expected 'exact' or 'hutchinson'.")
    check_number(owner, "probes", probes, least=1, whole=True)
