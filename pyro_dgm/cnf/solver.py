r"""Solving :math:`\dot y = f(t, y)` with torchdiffeq: fixed grids or adaptive steps, counted and guarded.

A fixed grid treats every row alone, so a density does not depend on its neighbours, and backpropagation through it has
derivatives of all orders. Its number of steps is set by comparing ``n`` with ``2 n`` (:meth:`Solver.adapt`): a fixed
coarse grid lets training lower the loss by the quadrature's error instead of by the density.

:class:`FlowMap` is the map of a continuous flow as a transform: each direction gives its log-determinant in the same solve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_dgm.core.devices import same_bits
from pyro_dgm.core.module import OnePass
from pyro_dgm.core.shapes import check_number
from pyro_dgm.core.upstream import in_vmap, plain_of, unseen

if TYPE_CHECKING:
    from pyro_dgm.cnf.families import ContinuousFlow

__all__ = ["Evaluations", "FlowMap", "Solver", "SolverError"]

FIXED = {"euler": 1, "midpoint": 2, "heun3": 3, "rk4": 4}  # method: order
ADAPTIVE = ("bosh3", "dopri5", "dopri8")
FEWEST, MOST = 3, 64  # steps that adapt() may choose

Dynamics = Callable[[Tensor, Tensor], Tensor]


class SolverError(ArithmeticError):
    """The differential equation of a flow could not be solved: the field diverged, or took too many evaluations."""


class Evaluations:
    """How often a field was evaluated, in forward and in backward passes, since the start or the last reset."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.forward = 0
        self.backward = 0

    def __repr__(self) -> str:
        return f"Evaluations(forward={self.forward}, backward={self.backward})"


class Solver(nn.Module):
    """One way to solve; the number of steps is part of the ``state_dict``.

    Args:
        method: a fixed grid (``rk4``, ``heun3``, ``midpoint``, ``euler``) or adaptive steps (``dopri5``, ``dopri8``,
            ``bosh3``).
        steps: of a fixed grid; None has them found.
        tolerance: relative and absolute, of adaptive steps; it holds for every row of a batch.
        adjoint: solve backwards for gradients instead of keeping the graph: little memory, four to nine times the
            time, no second derivatives.
        max_nfe: evaluations after which a solve is given up.

    Raises:
        ValueError: for an unknown method, steps below 1, and a tolerance that is not positive.
        SolverError: from a call, if the field returns NaN or infinity, or needs more than ``max_nfe`` evaluations.
    """

    steps: Tensor

    def __init__(
        self, method: str, steps: int | None, tolerance: float, adjoint: bool, max_nfe: int, name: str = "Solver"
    ) -> None:
        super().__init__()
        if method not in FIXED and method not in ADAPTIVE:
            raise ValueError(f"{name}: method={method!r}, expected one of {', '.join([*FIXED, *ADAPTIVE])}.")
        if steps is not None:
            check_number(name, "steps", steps, least=1, whole=True, advice="None has them found.")
        check_number(name, "tolerance", tolerance, above=0)
        check_number(name, "max_nfe", max_nfe, least=1, whole=True)
        self.method = method
        self.tolerance = tolerance
        self.adjoint = adjoint
        self.max_nfe = max_nfe
        self._name = name
        self.controlled = steps is None and method in FIXED
        self.register_buffer("steps", torch.tensor(8 if steps is None else steps))
        self.evaluations = Evaluations()

    def forward(
        self,
        dynamics: Dynamics,
        y: Tensor,
        start: float,
        end: float,
        parameters: Sequence[Tensor] = (),
        steps: int | None = None,
    ) -> Tensor:
        """The state at ``end``; ``parameters`` are all tensors that the adjoint is to give gradients to."""
        return self.path(dynamics, y, torch.tensor([start, end]), parameters, steps)[-1]

    def path(
        self,
        dynamics: Dynamics,
        y: Tensor,
        times: Tensor,
        parameters: Sequence[Tensor] = (),
        steps: int | None = None,
    ) -> Tensor:
        """The states at times that rise or fall, the first and the last of which are 0 and 1: shape ``(T, *y.shape)``."""
        counted = _Counted(dynamics, self)
        t = times.to(y)
        if self.method in ADAPTIVE:
            self._refuse_non_finite_start(y)
        try:
            with self._room_for(dynamics, t, y):
                states = self._odeint(counted, y, t, parameters, steps or self.step_count())
        except AssertionError as error:  # torchdiffeq's word for steps that shrink to nothing
            raise SolverError(f"{self._name}: {error} after {counted.calls} evaluations. {_ADVICE}") from error
        self._check(y, states[-1], counted.calls)
        counted.phase = "backward"
        if states.requires_grad and not self.adjoint:
            states.register_hook(lambda _: self._count_backward(counted.calls))
        return states

    def step_count(self) -> int:
        """Steps of a fixed grid; of flows stacked for ``torch.vmap``, the most that one of them takes."""
        return int(plain_of(self.steps).max())

    def _room_for(self, dynamics: Dynamics, t: Tensor, y: Tensor) -> AbstractContextManager[Any]:
        """In ``torch.vmap`` what torchdiffeq writes the state into has to stand for as many as the state does."""
        if not in_vmap():
            return nullcontext()
        rates = dynamics(t[0], y)
        if unseen(rates) and (self.adjoint or self.method in ADAPTIVE):
            how = "adjoint=True" if self.adjoint else f"method={self.method!r}"
            raise NotImplementedError(
                f"{self._name}: {how} looks at numbers, which torch.vmap does not let it. Build the flow with a fixed grid and "
                "adjoint=False, or give rows and contexts a batch dimension on the left, which does the same work."
            )
        return _Roomy(rates)

    def _odeint(self, f: Dynamics, y: Tensor, t: Tensor, parameters: Sequence[Tensor], steps: int) -> Tensor:
        from torchdiffeq import odeint, odeint_adjoint

        options: dict[str, Any] = {"norm": _largest_row, "step_t": t[-1:]}  # stop at the end, do not look beyond
        backward: dict[str, Any] = {"step_t": t[:1]}
        if self.method in FIXED:
            options = backward = {
                "grid_constructor": partial(_grid, steps),
                "interp": "cubic" if len(t) > 2 else "linear",  # at the ends neither is asked for
            }
        tolerance = max(self.tolerance, 10.0 * torch.finfo(y.dtype).eps)
        arguments: dict[str, Any] = {"method": self.method, "rtol": tolerance, "atol": tolerance, "options": options}
        if self.adjoint and torch.is_grad_enabled() and len(t) == 2:
            return odeint_adjoint(f, y, t, adjoint_params=tuple(parameters), adjoint_options=backward, **arguments)
        return odeint(f, y, t, **arguments)

    def times(self, y: Tensor, steps: int | None) -> Tensor | None:
        """The times at which a solve will ask, where the method tells: those of the four stages of each step."""
        if self.method != "rk4" or self.adjoint:
            return None
        nodes = _nodes(steps or self.step_count(), y.device)
        inner = nodes[:-1, None] + nodes.diff()[:, None] * torch.tensor([0.0, 1 / 3, 2 / 3], device=y.device)
        return torch.cat([inner.flatten(), nodes[-1:]]).to(y.dtype)

    def adapt(self, error: float, target: float, most: int = MOST) -> None:
        """Set the steps by the error in ``log p`` between ``n`` and ``2 n`` of them: ``n (error / target)^(1 / order)``."""
        factor = 1.1 * (max(error, 1e-12) / target) ** (1.0 / FIXED[self.method]) if math.isfinite(error) else 2.0
        n = math.ceil(int(self.steps) * min(max(factor, 0.75), 2.0))
        n = min(max(n, FEWEST), most)
        if n != int(self.steps):
            self.steps.fill_(n)

    def _count_backward(self, calls: int) -> None:
        self.evaluations.backward += calls

    def _refuse_non_finite_start(self, y: Tensor) -> None:
        if not _all_finite(y):
            raise ValueError(f"{self._name}: the value holds {int((~y.isfinite()).sum())} NaN or infinite entries.")

    def _check(self, start: Tensor, end: Tensor, calls: int) -> None:
        if not _all_finite(end):
            self._refuse_non_finite_start(start)
            bad = int((~end.isfinite()).any(-1).sum())
            raise SolverError(
                f"{self._name}: {bad} of {end[..., 0].numel()} points became NaN or infinite in {calls} evaluations of "
                f"the field. {_ADVICE}"
            )


_ADVICE = (
    "Usual causes: a diverged training (lower the learning rate), data far from the unit scale (standardise them), an "
    "activation with a kink, or parameters that are NaN."
)


def _nodes(steps: int, device: torch.device) -> Tensor:
    r"""Times :math:`\frac12 (s + \sin\frac{\pi s}{2})` of even :math:`s`: steps half as long at the data's end.

    There velocities change fastest; on trained flows the worst errors were half of those of an even grid.
    """
    s = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64, device=device)
    return 0.5 * (s + torch.sin(0.5 * math.pi * s))


def _grid(steps: int, f: Dynamics, y: Tensor, t: Tensor) -> Tensor:
    """The nodes in the direction of ``t``; the adjoint of a solve from 1 to 0 runs in negative times."""
    nodes = _nodes(steps, t.device).to(t.dtype)
    nodes = -nodes if min(t[0], t[-1]) < 0 else nodes
    return nodes if (nodes[0] < nodes[-1]) == (t[0] < t[-1]) else nodes.flip(0)


class _Counted:
    """The right-hand side, counted; more evaluations than allowed are an error."""

    def __init__(self, dynamics: Dynamics, solver: Solver) -> None:
        self.dynamics = dynamics
        self.solver = solver
        self.phase = "forward"
        self.calls = 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        evaluations = self.solver.evaluations
        setattr(evaluations, self.phase, getattr(evaluations, self.phase) + 1)
        self.calls += 1
        if self.calls > self.solver.max_nfe * (1 if self.phase == "forward" else 2):
            raise SolverError(
                f"{self.solver._name}: more than max_nfe={self.solver.max_nfe} evaluations of the field. The field is "
                f"stiff; loosen tolerance={self.solver.tolerance:g}, regularise it (kinetic=), or raise max_nfe."
            )
        return self.dynamics(t, y)


class _Roomy(TorchFunctionMode):
    """Within the context ``torch.empty`` makes tensors of as many as ``like`` stands for."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.like = like

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.like.new_empty if func is torch.empty else func)(*args, **(kwargs or {}))


def _largest_row(error: Tensor) -> Tensor:
    """The error norm of adaptive steps: every row has to meet the tolerance, not the batch on average."""
    return error.square().mean(-1).sqrt().max() if error.dim() else error.abs()


def _all_finite(y: Tensor) -> bool:
    """Whether all entries are finite; not asked under ``torch.vmap``, where no value may be looked at."""
    return unseen(y) or bool(y.sum().isfinite() or y.isfinite().all())


class _Solved(NamedTuple):
    """A draw that was solved, the circumstances, the parameters' values, and the image with its log-determinant."""

    x: Tensor
    asked: tuple[int, bool, int]
    values: Tensor
    result: tuple[Tensor, Tensor]


class FlowMap(OnePass):
    r"""From data at time 1 to the base at time 0, or (``sampling``) from the base to data.

    The base draw that was solved last is remembered with its image and log-determinant, while all parameters keep their values.
    """

    def __init__(self, family: ContinuousFlow, context: Tensor | None, sampling: bool = False) -> None:
        super().__init__()
        self.family = family
        self.context = context
        self.sampling = sampling
        self._last: _Solved | None = None
        self._other: FlowMap | None = None

    def __repr__(self) -> str:
        return f"{type(self.family).__name__} map ({'base to data' if self.sampling else 'data to base'})"

    @property
    def inv(self) -> FlowMap:  # type: ignore[override]
        if self._other is None:
            self._other = FlowMap(self.family, self.context, not self.sampling)
        return self._other

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image of ``x``, shape ``(*batch, D)``, and the log-determinant there, shape ``(*batch,)``."""
        if not self.sampling:
            return self.family.solve(x, self.context)[:2]
        asked = (x._version, torch.is_grad_enabled(), self.family.solver.steps._version)
        values = self.family.values()
        last = self._last
        if last is None or last.x is not x or last.asked != asked or not same_bits(last.values, values):
            last = _Solved(x, asked, values, self.family.solve(x, self.context, sampling=True)[:2])
            self._last = last
        return last.result
