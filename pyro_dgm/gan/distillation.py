r"""A generator's start by distillation: a continuous flow learns the data, and the generator learns the flow's map in one pass.

.. math:: \min_\theta\; E_z\, \rho\big(G_\theta(z; c) - x(1)\big), \quad \rho(e) = \sqrt{e^2 + \kappa^2} - \kappa,
    \qquad \dot x = v(t, x; c),\quad x(0) = z

The flow sees every mode and its mass, and its map from noise to data is a function, which a network can follow (Luhman &
Luhman 2021, arXiv 2101.02388; Liu et al. 2023, arXiv 2209.03003, section 2.3). Where the latent is shorter than the event,
the flow moves the data's first principal components; where it is longer, its first entries are heard and the others are not.

Data that seem to be of one normal law need no flow: a generator with a default network becomes that law,
whose posteriors a network of pieces would miss by a good part of their sds (docs/benchmarks/gan.md, fields on a grid).

Between two modes the map is steep, and draws of a network that is less steep lie there. So their share near the data is compared
with that of the flow's draws. Where it is far lower, the steps were too large for the network (one of residual blocks, say), and
smaller ones begin anew from the first weights. Where it is lower, the descent goes on by L-BFGS, which makes steep maps sooner
than Adam. The error :math:`\rho` is square up to a corner, so that draws between modes weigh more than small errors elsewhere;
of images it is absolute.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyro_dgm.cnf.matching import match, velocity_error
from pyro_dgm.core.devices import fork_rng
from pyro_dgm.core.shapes import check_context
from pyro_dgm.core.warn import warn_user
from pyro_dgm.flows.many_rows import is_one_normal
from pyro_dgm.gan.generator import Generator
from pyro_dgm.gan.teacher import Teacher, flow_width, teaching_flow
from pyro_dgm.train.batches import first_rows, some_rows
from pyro_dgm.train.descend import ByCurvature, Stages, adam, warm_up

__all__ = ["Distilled", "distil", "share_near"]

# Not measured, but chosen by hand.
_FLOW_RATE = 0.64  # of the flow, times its width
_RATE = 1e-2  # of the distillation, of a network whose units have 128 inputs or more; otherwise in inverse proportion
_INPUTS = (32, 128)  # between which the rate changes (docs/benchmarks/gan.md, networks)
_ROWS = 512  # of a step
_PAIRS = 32_768  # of a latent and what the flow makes of it, at most
_CLIP = 1.0  # norm of a gradient
_LEAST_NOISE = 0.01  # of a learned noise, in standard deviations of the data
_MANY = 1_000  # rows, from which on it is asked whether they are of one normal law; not measured, chosen by hand
_MOST = 30_000  # rows whose covariance is taken
# Steps and rate of the flow that could be better than one normal law (docs/benchmarks/gan.md, fields on a grid).
_TRIAL, _TRIAL_RATE = 500, 2.5e-3

# What a share near the data is: measured on a plane, where 20 neighbours of 2,000 reach to four sd of a normal mode.
_NEIGHBOURS = (5, 100)  # of a row: the first at least, and one in so many
_REFERENCE = 2_000  # rows that draws are held against, at most
_JUDGED = 8_000  # draws of which a share is taken: its standard error is .002 to .005

# L-BFGS was measured on modes in a plane (docs/benchmarks/gan.md, networks); the bounds were chosen by hand.
_FEW = 16  # entries of an event, at most: beyond, shares near the data say less, and an evaluation costs more
_SHORT = 0.01  # of the draws may lie off the data beside the flow's own
_TOLD = 0.03  # above which a user is told
# Of the draws: has to come near the data in so many rounds, or the last was the last; more may not be lost in the game. About the
# error of the difference of two shares.
_WORTH = 0.002
_PATIENCE = 5
_ROUNDS = 12  # at most
_ASTRAY = 0.1  # of the draws off the data beside the flow's own say that steps were too large for the network
_CAREFUL = 0.25  # of the rate, in a second try from the first weights
_TELLING = 2_000  # steps of the flow, at least, before little gained says that the network can do no more
_SHARPENED = 160  # steps of the distillation for one of a round
_ITERATIONS = 20  # of such a step
_HISTORY = 30  # updates that the curvature is taken from
_FIXED = 8_192  # pairs: the loss has to be the same in each evaluation
# Up to which an error counts by its square, in standard deviations of the data: of few entries, with Adam and with L-BFGS, and of
# images, which squares blur (docs/benchmarks/gan.md, networks and digits).
_CORNER, _CORNER_BY_CURVATURE, _CORNER_OF_IMAGES = 0.1, 1.0, 1e-3


@dataclass(repr=False)
class Distilled:
    """What a distillation has reached: shares of draws that lie near rows of the data (:func:`share_near`).

    Attributes:
        reference: rows that draws are held against, in standard units, shape ``(N, D)``.
        context: contexts for draws, in the generator's units; None without.
        rows: the share of other rows of the data.
        flow: of the flow's draws.
        carried: share of the data's variance that the latent can carry: 1, but for a latent shorter than the event.
        steps: of the flow.
        generator: of the generator's draws, after the distillation by Adam and after each round of L-BFGS.
        normal: whether the rows seemed to be of one normal law, which the generator then is: there was no flow.
        weights: the generator's state after the distillation, until the game has ended; empty where an event has many entries.
        undone: whether the game has cost draws near the data, so that the generator has that state again.
    """

    reference: Tensor
    context: Tensor | None
    rows: float
    flow: float
    carried: float
    steps: int
    generator: list[float] = field(default_factory=list)
    normal: bool = False
    weights: dict[str, Tensor] = field(default_factory=dict)
    undone: bool = False

    def __repr__(self) -> str:
        parts = ", ".join(f"{share:.3f}" for share in self.generator)
        if self.normal:
            return f"Distilled(one normal law, rows={self.rows:.3f}, generator=[{parts}], carried={self.carried:.3f})"
        undone = ", the game undone" if self.undone else ""
        return f"Distilled(rows={self.rows:.3f}, flow={self.flow:.3f}, generator=[{parts}], carried={self.carried:.3f}{undone})"

    def share(self, generator: Generator) -> float:
        """Of a generator's draws."""
        draws = self._draws(generator)
        return share_near(draws, self.reference.to(draws))

    @torch.no_grad()
    def _draws(self, generator: Generator) -> Tensor:
        """Always of the same latents, on the generator's device: rows and contexts that were read from a file are on the CPU."""
        context = None if self.context is None else self.context.to(next(generator.parameters()))
        with fork_rng(0):
            contexts = [None] * (_JUDGED // _ROWS) if context is None else context.split(_ROWS)
            parts = [(generator.latents(_ROWS if c is None else len(c), c), c) for c in contexts]
            return torch.cat([generator.noisy(z, c) for z, c in parts])

    def undo_game(self, generator: Generator) -> None:
        """Undo the first game where it has cost draws near rows, or rows near draws.

        A later fit may be to other data, so its game is not judged by these rows.
        """
        if not self.weights:
            return
        played = deepcopy(generator.state_dict())
        after = self._precision_and_recall(generator)
        generator.load_state_dict(self.weights)
        self.undone = self._precision_and_recall(generator) - after > _WORTH
        if not self.undone:
            generator.load_state_dict(played)
        self.weights = {}

    def _precision_and_recall(self, generator: Generator) -> float:
        """Their sum, after Kynkaanniemi et al. (2019)."""
        draws = self._draws(generator)
        rows = self.reference.to(draws)
        return share_near(draws, rows) + share_near(rows, draws[: len(rows)])

    def lacks(self) -> bool:
        """Whether the flow has clearly more of its draws near the data."""
        return self.flow - self.generator[-1] > _SHORT

    def gained(self) -> bool:
        """Whether the last rounds brought draws near the data."""
        return len(self.generator) < 2 or self.generator[-1] - self.generator[-1 - _PATIENCE :][0] >= _WORTH

    def tell(self, generator: Generator) -> None:
        """Warn where too few draws of the trained generator lie near the data, and say what lacks."""
        share = self.share(generator)
        if self.flow - share > _TOLD:
            cause = self._network()
        elif self.carried < 1.0 and self.rows - share > _TOLD:
            cause = (
                f"Its latent lacks entries: they carry {self.carried:.0%} of the variance, and the rest is noise of each "
                "entry's own. Build the generator with a larger base."
            )
        else:
            return
        warn_user(
            f"fit: {share:.1%} of the generator's draws lie near rows of the data, {self.flow:.1%} of those of the flow that it "
            f"was taught by, and {self.rows:.1%} of other rows. {cause}"
        )

    def _network(self) -> str:
        shares = ", ".join(f"{share:.1%}" for share in self.generator)
        after = f"({shares} after each part of the distillation)"
        if self.gained() or self.steps < _TELLING:
            return (
                f"Its network lacks time {after}: give Adversarial pretrain={2 * self.steps}, or fit more max_seconds."
            )
        return f"Its network lacks capacity {after}, the last of which brought little: make it deeper or wider."


def share_near(draws: Tensor, rows: Tensor) -> float:
    """The share of draws within reach of a row: the distance to the nearest hundredth of the other rows, five at least.

    This is the precision of Kynkaanniemi et al. (2019, arXiv 1904.06991); of equal distributions it is near 1 in a plane.

    >>> rows = torch.arange(20.0)[:, None]
    >>> share_near(torch.tensor([[3.5], [22.0], [30.0], [-90.0]]), rows)
    0.5
    """
    least, one_in = _NEIGHBOURS
    which = min(max(least, len(rows) // one_in) + 1, len(rows))  # the first is the row itself
    reach = torch.cdist(rows, rows).topk(which, largest=False).values[:, -1]
    near = [(torch.cdist(some, rows) <= reach).any(-1) for some in draws.split(_REFERENCE)]
    return float(torch.cat(near).float().mean())


def distil(
    generator: Generator, batches: Iterator[tuple[Any, ...]], steps: int, stages: Stages | None = None
) -> Distilled:
    """Train a flow for so many steps, then distil it into a :class:`~pyro_dgm.Generator` for half as many, or for more.

    Where rows seem to be of one normal law, a generator that may be straight becomes that law instead.
    """
    stages = stages or Stages()
    x, context = _rows(generator, first_rows(batches))
    with fork_rng():  # the flow of another law draws as if nothing had been asked
        u = _many_rows(generator, batches, x) if generator.may_be_straight else None
        if u is not None and is_one_normal(u, lambda some, left: _gain(some, left, steps, stages)):
            generator.become_normal(u, _LEAST_NOISE)
            return _judged_as_normal(generator, u, steps)
    teacher = Teacher(generator, x, context)

    def matching() -> Tensor:
        return teacher.loss(*_at_most(_ROWS, *_rows(generator, first_rows(batches, _ROWS))))

    rate = _FLOW_RATE / flow_width(teacher.flow.features)
    optimizer = adam([p for p in teacher.flow.parameters() if p.requires_grad], rate)
    stages.descend("flow matching", teacher, optimizer, matching, steps, _linear, _CLIP)
    later = max(1, steps // 2)
    n = min(_PAIRS, _ROWS * later)
    pairs = _Pairs(generator, teacher, *teacher.pairs(n, _contexts(generator, batches, n), stages.seconds()))
    generator.hear(teacher.flow.features)
    first = deepcopy(generator.state_dict())
    _teach(pairs, _rate(generator), later, stages)
    found = pairs.judged(generator.units(x), steps)
    found.generator.append(found.share(generator))
    if found.flow - found.generator[0] > _ASTRAY:
        reached = deepcopy(generator.state_dict())
        generator.load_state_dict(first)
        _teach(pairs, _CAREFUL * _rate(generator), later, stages)
        _keep_better(found, generator, reached)
    if generator.features <= _FEW:
        _sharpen(pairs, found, later // _SHARPENED, stages)
        found.weights = deepcopy(dict(generator.state_dict()))
    return found


def _teach(pairs: _Pairs, rate: float, steps: int, stages: Stages) -> None:
    """Steps of Adam, and the noise that they leave."""
    stages.descend("distillation", pairs.generator, adam(pairs.taught, rate), pairs.some, steps, _linear, _CLIP)
    pairs.set_noise()


def _keep_better(found: Distilled, generator: Generator, before: dict[str, Tensor]) -> None:
    """Go back to a state where the generator has no more draws near the data than there."""
    found.generator.append(found.share(generator))
    if not found.generator[-1] > found.generator[-2]:
        generator.load_state_dict(before)
        found.generator[-1] = found.generator[-2]


def _many_rows(generator: Generator, batches: Iterator[tuple[Any, ...]], x: Tensor) -> Tensor | None:
    """Different rows of the data, or of those given, in standard units and a random order; None where they are few."""
    known = some_rows(batches, _MOST)
    rows = generator.units(x if known is None else known[0]).unique(dim=0)
    return rows[torch.randperm(len(rows), device=rows.device)] if len(rows) >= _MANY else None


def _gain(some: Tensor, left: Tensor, steps: int, stages: Stages) -> Tensor:
    """Nats of each left-out row that a flow brings over the normal law of the others, as which it begins."""
    flow = teaching_flow(some.shape[1]).to(some)
    flow.decorrelate.fit(some)
    flow.start_at_identity()

    def loss() -> Tensor:
        data = flow.flow_units(some[torch.randint(len(some), (_ROWS,), device=some.device)])
        return velocity_error(flow, "linear", torch.randn_like(data), data, None)

    with torch.no_grad():
        before = flow().log_prob(left)
    match("one normal law?", flow, loss, stages, min(steps, _TRIAL), _TRIAL_RATE, _CLIP)
    with torch.no_grad():
        return flow().log_prob(left) - before


def _judged_as_normal(generator: Generator, u: Tensor, steps: int) -> Distilled:
    """Half of so many rows in a random order, and draws, against the other half."""
    reference, others = u[: 2 * _REFERENCE].chunk(2)
    left = u.var(0) - generator.straight.weight.square().sum(1)
    carried = 1.0 - float(left.clamp_min(0.0).sum() / u.var(0).sum())
    found = Distilled(reference, None, share_near(others, reference), 0.0, carried, steps, normal=True)
    found.flow = found.share(generator)
    found.generator.append(found.flow)
    return found


def _sharpen(pairs: _Pairs, found: Distilled, steps: int, stages: Stages) -> None:
    """Rounds of so many steps of L-BFGS while the generator lacks and gains; one at most where the fit's time is limited."""
    generator = pairs.generator
    if not steps:
        return
    rounds = _ROUNDS if stages.seconds() is None else 1
    optimizer = ByCurvature(pairs.taught, pairs.fixed, _ITERATIONS, _HISTORY)
    while len(found.generator) <= rounds and found.lacks() and found.gained():
        before = deepcopy(generator.state_dict())
        stages.descend("distillation by L-BFGS", generator, optimizer, pairs.some, steps)
        pairs.set_noise()
        _keep_better(found, generator, before)


class _Pairs:
    """Latents, what a flow makes of them in a generator's units, and contexts; and how far the generator is from them."""

    def __init__(self, generator: Generator, teacher: Teacher, z: Tensor, u: Tensor, context: Tensor | None) -> None:
        self.generator = generator
        self.residual = teacher.residual
        self.z = z
        self.u = u
        self.context = context
        self.taught = [p for p in generator.network.parameters() if p.requires_grad]
        self.corner = _CORNER if generator.features <= _FEW else _CORNER_OF_IMAGES

    def error(self, which: Any) -> Tensor:
        """Of these pairs, in standard units, shape ``(N, D)``."""
        context = None if self.context is None else self.context[which]
        return self.generator.location(self.z[which], context) - self.u[which]

    def some(self) -> Tensor:
        """The mean error of pairs that are drawn anew each time."""
        return _rho(self.error(torch.randint(len(self.z), (_ROWS,), device=self.z.device)), self.corner)

    def fixed(self) -> Tensor:
        """The mean error of always the same pairs."""
        return _rho(self.error(slice(_FIXED)), _CORNER_BY_CURVATURE)

    @torch.no_grad()
    def set_noise(self) -> None:
        """The learned noise of each entry: what the map and the principal components leave."""
        if not isinstance(self.generator.log_noise, nn.Parameter):
            return
        typical = self.error(slice(_ROWS)).abs().median(0).values
        noise = (typical.square() + self.residual.square()).sqrt().clamp_min(_LEAST_NOISE)
        self.generator.log_noise.copy_(noise.log())

    def judged(self, rows: Tensor, steps: int) -> Distilled:
        """The flow's draws and half of these rows against the other half; batches of few rows repeat them."""
        rows = rows.unique(dim=0)
        rows = rows[torch.randperm(len(rows), device=rows.device)[: 2 * _REFERENCE]]
        reference, others = rows.chunk(2)
        noise = self.residual if isinstance(self.generator.log_noise, nn.Parameter) else self.generator.sigma
        flow = self.u[:_JUDGED] + noise * torch.randn_like(self.u[:_JUDGED])
        carried = 1.0 - float(self.residual.square().sum() / rows.var(0).sum())
        context = None if self.context is None else self.context[:_JUDGED]
        return Distilled(reference, context, share_near(others, reference), share_near(flow, reference), carried, steps)


def _rho(error: Tensor, corner: float) -> Tensor:
    """Square up to the corner, absolute beyond (pseudo-Huber), in the mean over all entries."""
    return ((error.square() + corner**2).sqrt() - corner).mean()


def _rate(generator: Generator) -> float:
    """Of the distillation: narrow networks take larger steps, as their weights have farther to go."""
    inputs = max((p[0].numel() for p in generator.network.parameters() if p.dim() > 1), default=_INPUTS[1])
    return _RATE * _INPUTS[1] / min(max(inputs, _INPUTS[0]), _INPUTS[1])


def _linear(step: int, progress: float) -> float:
    """Up over a few steps, then down to zero on a line."""
    return min(warm_up(step), 1.0 - progress)


def _rows(generator: Generator, rows: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Data, and contexts in the generator's units."""
    return rows[0], check_context(generator, rows[1])


def _contexts(generator: Generator, batches: Iterator[tuple[Any, ...]], rows: int) -> Tensor | None:
    """So many contexts of the data, in the generator's units; None without any."""
    context = _rows(generator, first_rows(batches))[1]
    return None if context is None else context[torch.randint(len(context), (rows,), device=context.device)]


def _at_most(rows: int, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows of both, drawn at random where there are too many."""
    if len(x) <= rows:
        return x, context
    some = torch.randperm(len(x), device=x.device)[:rows]
    return x[some], None if context is None else context[some]
