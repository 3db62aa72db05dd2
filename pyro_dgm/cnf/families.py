r"""Continuous normalizing flows as Pyro families: :math:`x = x(1)`, :math:`\dot x = v(t, x; c)`, :math:`x(0) \sim N(0, I)`.

.. math:: \log p(x(1)) = \log N(x(0); 0, I) - \int_0^1 \nabla\cdot v(t, x(t); c)\, dt
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_dgm.cnf.black_box import BlackBoxField, check_trace
from pyro_dgm.cnf.field import COSTS, Plan, PotentialField, TwoLayerField, VectorField, path_costs
from pyro_dgm.cnf.solver import FIXED, MOST, FlowMap, Solver
from pyro_dgm.core import zuko
from pyro_dgm.core.devices import fork_rng, same_bits
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.module import values_of
from pyro_dgm.core.shapes import check_context, reference
from pyro_dgm.core.upstream import passing
from pyro_dgm.flows.base import NormalizingFlow, StandardNormalBase

__all__ = ["FFJORD", "ContinuousFlow", "OTFlow"]

_EVERY = 20  # changes of the parameters between two looks at the number of steps
_WATCHED = 128  # points on which they are compared
_WHILE_TRAINING = 1e-2  # nats between n and 2n steps, on average
# After training, for 95 % of points: errors (nats) and the most steps spent on each.
_FINISHED = ((1e-4, 25), (1e-3, MOST))


class _Watched(NamedTuple):
    """Points on which the steps are checked, changes of the parameters since, and what the last one left."""

    points: tuple[Tensor, Tensor | None, bool]
    changes: int
    version: int
    values: Tensor


class ContinuousFlow(NormalizingFlow):
    """What all continuous flows share; see :class:`FFJORD` for the arguments.

    Where steps are to be found, ``log_prob`` and draws with gradients **may change** ``solver.steps``: they watch whether
    parameters change, and after 20 changes compare n steps with 2n. Under ``torch.no_grad()`` nothing changes.
    """

    field: VectorField
    solver: Solver
    settling = 0.2  # of a fit's seconds, for ``finish``: measured .4 of 2

    def build(self, context: Tensor | None) -> Distribution:
        zero = next(self.field.parameters()).new_zeros(self.features)
        if torch.finfo(zero.dtype).eps > 1e-6:
            raise TypeError(f"{self._name}: parameters are {zero.dtype}; an ODE needs float32 or float64.")
        base = StandardNormalBase(zero, () if context is None else context.shape[:-1])
        return zuko.distributions.NormalizingFlow(FlowMap(self, context), base)

    @property
    def _name(self) -> str:
        return type(self).__name__.removeprefix("Pyro")

    def start_at_identity(self) -> ContinuousFlow:
        """Stop the field: the flow is the identity, its density the standard normal."""
        self.field.start_at_rest()
        return self

    def solve(
        self, point: Tensor, context: Tensor | None, sampling: bool = False, costs: Sequence[str] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Move points from data to the base, or back (``sampling``), in the flow's own units.

        Returns the images ``(*batch, D)``, the log-determinants ``(*batch,)`` and the path's costs ``(*batch, k)``.
        """
        if context is not None:
            point = point.expand(*torch.broadcast_shapes(point.shape[:-1], context.shape[:-1]), point.shape[-1])
        self._watch(point, context, sampling)
        return self._solve(point, context, sampling, costs)

    def _solve(
        self, point: Tensor, context: Tensor | None, sampling: bool, costs: Sequence[str] = (), steps: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        dynamics = self._dynamics(point, context, costs, steps)
        start, end = (0.0, 1.0) if sampling else (1.0, 0.0)
        state = torch.cat([point, point.new_zeros(*point.shape[:-1], 1 + len(costs))], -1)
        state = self.solver(dynamics, state, start, end, self._adjoint_parameters(context), steps)
        image, ladj, spent = state.split([self.features, 1, len(costs)], -1)
        return image, ladj.squeeze(-1), spent if sampling else -spent

    def _dynamics(self, point: Tensor, context: Tensor | None, costs: Sequence[str], steps: int | None):  # noqa: ANN202
        """The right-hand side for the state (point, log-determinant, costs)."""
        features = self.features
        noise = torch.randn_like(point) if "jacobian" in costs else None
        plan = Plan(self.solver.times(point, steps), self.field.probe(point), "hjb" in costs)
        bind = partial(self.field.bind, context, plan)
        bound = None if self.solver.adjoint else bind()

        def dynamics(t: Tensor, state: Tensor) -> Tensor:
            x = state[..., :features]
            motion = bound or bind()  # the adjoint differentiates parameters, not products
            if costs:
                rates, spent = path_costs(motion, t, x, costs, noise)
                return torch.cat([rates.velocity, rates.divergence[..., None], spent], -1)
            rates = motion(t, x)
            return torch.cat([rates.velocity, rates.divergence[..., None]], -1)

        return dynamics

    def _stages(self, built: Any, z: Tensor, times: Sequence[float] | None) -> tuple[Tensor, Tensor]:
        asked = (
            torch.linspace(0.0, 1.0, 11) if times is None else torch.as_tensor(times, dtype=torch.get_default_dtype())
        )
        if asked.dim() != 1 or not len(asked) or not bool(((asked >= 0.0) & (asked <= 1.0)).all()):
            raise ValueError(
                f"{self._name}: times are {times}, expected a list of numbers between 0 (the base) and 1 (the data)."
            )
        whole, place = torch.cat([torch.tensor([0.0, 1.0]), asked]).unique(return_inverse=True)
        dynamics = self._dynamics(z, built.transform.context, (), None)
        states = self.solver.path(dynamics, torch.cat([z, z.new_zeros(*z.shape[:-1], 1)], -1), whole)
        return asked, states[place[2:].to(z.device), ..., :-1]

    def _adjoint_parameters(self, context: Tensor | None) -> list[Tensor]:
        """Every tensor that the adjoint has to give a gradient to: parameters and the context."""
        if not self.solver.adjoint:
            return []
        if any(isinstance(m, PyroModule) and m._pyro_samples for m in self.field.modules()):
            raise ValueError(
                f"{self._name}: adjoint=True with sampled weights (PyroSample); the backward solve would draw them anew. "
                "Use adjoint=False."
            )
        return [t for t in [*self.field.parameters(), context] if t is not None and t.requires_grad]

    def velocity(self, time: Tensor, u: Tensor, context: Tensor | None = None) -> Tensor:
        r""":math:`v(t, u; c)` for times ``(*batch, 1)`` and points ``(*batch, D)``, in the flow's units."""
        return self.field.velocity(time, u, context)

    def score_and_costs(self, x: Tensor, context: Tensor | None, costs: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Log density of events ``(*batch,)`` and the costs of their paths ``(*batch, k)``, in one solve.

        Args:
            x: events, shape ``(*batch, *event_shape)``.
            context: shape ``(*batch, context_features)``, or None.
            costs: names out of ``transport``, ``kinetic``, ``jacobian`` and, for a potential field, ``hjb``.

        Raises:
            ValueError: for ``hjb`` of a field that is no gradient.
        """
        self.refuse_costs(costs)
        x = self._events(x, self.event_shape)
        context = check_context(self, context)
        built: Any = self.build(context)
        to_event = self.bijection(built)
        u = x if to_event is None else to_event.inv(x)
        z, ladj, spent = self.solve(u, context, costs=costs)
        score = built.base.log_prob(z) + ladj
        return score if to_event is None else score - to_event.log_abs_det_jacobian(u, x), spent

    def refuse_costs(self, costs: Sequence[str]) -> None:
        """Raise for costs that the paths of this flow do not have."""
        unknown = set(costs) - set(COSTS)
        if unknown or ("hjb" in costs and not isinstance(self.field, PotentialField)):
            raise ValueError(
                f"{self._name}: no path cost {sorted(unknown) or 'hjb'} for {type(self.field).__name__}. Known: "
                f"{', '.join(COSTS)}; hjb needs the potential of an OTFlow."
            )

    def _watch(self, point: Tensor, context: Tensor | None, sampling: bool) -> None:
        """While parameters change, look every 20 changes whether the steps are right, on points of this batch."""
        if not self.solver.controlled or not torch.is_grad_enabled():
            return
        values = values_of(self.field)
        if passing(point, values):
            return
        version = sum(p._version for p in self.field.parameters())
        watched: _Watched | None = self.__dict__.get("_watched")
        if watched is None:
            self.__dict__["_watched"] = _Watched((*self._points(point, context), sampling), 0, version, values)
        elif version != watched.version or not same_bits(values, watched.values):
            due = watched.changes + 1 >= _EVERY
            points = (*self._points(point, context), sampling) if due else watched.points
            self.__dict__["_watched"] = _Watched(points, 0 if due else watched.changes + 1, version, values)
            if due:
                self.solver.adapt(float(self._error(*points).mean()), _WHILE_TRAINING)

    @torch.no_grad()
    def _points(self, point: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A few of the batch's points with their contexts."""
        rows = point.shape[:-1].numel()
        index = torch.linspace(0, rows - 1, min(rows, _WATCHED), device=point.device).long()
        if context is not None:
            context = context.expand(*point.shape[:-1], -1).reshape(rows, -1)[index]
        return point.reshape(rows, -1)[index], context

    @torch.no_grad()
    def _error(self, u: Tensor, context: Tensor | None, sampling: bool = False) -> Tensor:
        """``|log p_n - log p_2n|`` of points in the flow's units, or of the draws made from them."""
        n, scores = int(self.solver.steps), []
        u = self._solve(u, context, True)[0] if sampling else u
        for steps in (n, 2 * n):
            with fork_rng(0):  # the same probes, where the trace is stochastic
                z, ladj, _ = self._solve(u, context, False, steps=steps)
                scores.append(ladj - 0.5 * z.square().sum(-1))
        return (scores[0] - scores[1]).abs()

    def finish(self, *args: object, **kwargs: object) -> None:
        """After training, take as many steps as the densities of the last watched points ask for.

        They are to agree with twice the steps to 1e-4 nats for 95 % of the points, in at most 25 steps (100 evaluations);
        in more only where they would not agree to 1e-3. ``fit`` calls it; after a training loop of your own, call it
        yourself. Nothing happens where steps were given.
        """
        if "_watched" not in self.__dict__:
            return
        for target, most in _FINISHED:
            for _ in range(8):
                before, error = int(self.solver.steps), self._watched_error()
                if most < MOST or error > target:
                    self.solver.adapt(error, target, most)
                if int(self.solver.steps) == before:
                    break

    def _watched_error(self) -> float:
        """What 95 % of the last watched points stay below."""
        return float(self._error(*self.__dict__["_watched"].points).quantile(0.95))

    @torch.no_grad()
    def solver_error(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``|log p_n(x) - log p_2n(x)|`` in nats, shape ``(*batch,)``: what the solver leaves uncertain.

        Args:
            x: events, shape ``(*batch, *event_shape)``.
            context: shape ``(*batch, context_features)``, or None.

        Raises:
            ValueError: for adaptive steps, which have no n.
        """
        if self.solver.method not in FIXED:
            raise ValueError(f"{self._name}: solver_error compares fixed grids; compare two tolerances instead.")
        return self._error(self.flow_units(x), check_context(self, context))

    def __getstate__(self) -> dict:
        return {k: v for k, v in super().__getstate__().items() if k != "_watched"}


class FFJORD(ContinuousFlow):
    r"""Continuous flow along a free vector field, :math:`\dot x = v_\theta(t, x; c)`.

    A draw comes with its density from one solve, and a score takes one solve: the two directions cost the same,
    ``4 steps`` evaluations of the field with the default method. The default field has an exact divergence whose cost
    does not grow with D. Good for densities with holes and many modes in up to some 60 dimensions; slower per call than
    a coupling flow.

    Args:
        event_shape: an int (a vector) or a shape.
        context_features: length of the context's last dimension.
        support: constraint of the event, through ``biject_to``.
        field: a :class:`~pyro_dgm.cnf.VectorField`, or any module ``(t, x)`` or ``(t, x, context)`` on the flat event;
            None for :class:`~pyro_dgm.cnf.TwoLayerField`.
        trace: for a module as field: ``"exact"`` by D vector-Jacobian products, or ``"hutchinson"``.
        probes: random probes of a solve, for ``"hutchinson"``.
        hidden_features: width of the default field.
        method: a fixed grid (``rk4``, ``heun3``, ``midpoint``, ``euler``) or adaptive steps (``dopri5``, ``dopri8``,
            ``bosh3``).
        steps: of a fixed grid; None has them found while training, by comparing n with 2n, and after it: ``log_prob`` and
            draws with gradients then change ``solver.steps``, at every 20th change of the parameters.
        tolerance: of adaptive steps.
        adjoint: gradients by a second solve, for memory; no second derivatives.
        max_nfe: evaluations of the field after which a solve raises ``SolverError``.

    Raises:
        ValueError: for unknown methods and traces.
        SolverError: from draws and scores, if the field returns NaN or infinity or ``max_nfe`` is exceeded.

    Note:
        With adaptive steps all rows of a batch share their steps, so a density changes within the tolerance with its
        neighbours; with a fixed grid it does not.

    References:
        | Grathwohl et al. (2019), "FFJORD", arXiv 1810.01367.
        | Chen et al. (2018), "Neural ordinary differential equations", arXiv 1806.07366, theorem 1.
        | Finlay et al. (2020), "How to train your neural ODE", arXiv 2002.02798 (the kinetic and Jacobian costs).

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> flow = dgm.FFJORD(2, context_features=3)
        >>> q = flow(torch.zeros(5, 3))
        >>> x, log_prob = q.rsample_and_log_prob((4,))     # one solve
        >>> x.shape, log_prob.shape, flow.solver.evaluations.forward
        (torch.Size([4, 5, 2]), torch.Size([4, 5]), 32)
    """

    @checked(only=("support", "field", "method", "adjoint"))
    def __init__(
        self,
        event_shape: int | Iterable[int],
        context_features: int = 0,
        *,
        support: constraints.Constraint | None = None,
        field: nn.Module | None = None,
        trace: str = "exact",
        probes: int = 1,
        hidden_features: int = 64,
        method: str = "rk4",
        steps: int | None = None,
        tolerance: float = 1e-5,
        adjoint: bool = False,
        max_nfe: int = 10_000,
    ) -> None:
        super().__init__(event_shape, context_features, support=support)
        self.solver = Solver(method, steps, tolerance, adjoint, max_nfe, self._name)
        check_trace(self._name, trace, probes)  # also where the field has a trace of its own
        if field is None:
            field = TwoLayerField(self.features, context_features, hidden_features)
        elif not isinstance(field, VectorField):
            field = BlackBoxField(field, self.features, context_features, trace, probes)
        self.field = _fitting(self, field)
        like = reference(self.field)
        if like is not None:
            self.to(like.dtype)


class OTFlow(ContinuousFlow):
    r"""Continuous flow along the gradient of a potential, :math:`\dot x = -\nabla\Phi_\theta(t, x; c)`.

    The optimal transport between base and data is of this form, with straight paths; train it with
    ``MaximumLikelihood(flow, transport=..., hjb=...)`` to come near it. Straight paths need few steps. A potential is a
    narrower family than a free field at the same number of parameters.

    Args:
        event_shape: an int (a vector) or a shape.
        context_features: length of the context's last dimension.
        support: constraint of the event, through ``biject_to``.
        hidden_features: ridge functions in the potential.
        method, steps, tolerance, adjoint, max_nfe: as in :class:`FFJORD`.

    Raises:
        ValueError: for an unknown method.
        SolverError: as :class:`FFJORD`.

    References:
        | Onken et al. (2021), "OT-Flow", arXiv 2006.00104. There the potential is a residual network and the trace
        | costs O(D m^2) a point; here it has one wide layer and costs O(m).
        | Ruthotto & Haber (2021), "An introduction to deep generative modeling", section 3.2.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> flow = dgm.OTFlow(3)
        >>> flow().log_prob(torch.zeros(4, 3)).shape
        torch.Size([4])
    """

    @checked(only=("support", "field", "method", "adjoint"))
    def __init__(
        self,
        event_shape: int | Iterable[int],
        context_features: int = 0,
        *,
        support: constraints.Constraint | None = None,
        hidden_features: int = 256,
        method: str = "rk4",
        steps: int | None = None,
        tolerance: float = 1e-5,
        adjoint: bool = False,
        max_nfe: int = 10_000,
    ) -> None:
        super().__init__(event_shape, context_features, support=support)
        self.solver = Solver(method, steps, tolerance, adjoint, max_nfe, self._name)
        self.field = PotentialField(self.features, context_features, hidden_features)


def _fitting(family: ContinuousFlow, field: VectorField) -> VectorField:
    expected = (family.features, family.context_features)
    if (field.features, field.context_features) != expected:
        raise ValueError(
            f"{family._name}: the field has (features, context_features) = {(field.features, field.context_features)}, "
            f"expected {expected}: the flat unconstrained event and the context."
        )
    return field
