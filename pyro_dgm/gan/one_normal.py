r"""Data of one normal law, which a generator with a straight map is at once, and better than any flow teaches it.

.. math:: u = W z + b + \sigma \epsilon, \qquad W W^\top + \mathrm{diag}(\sigma^2) = \mathrm{Cov}(u)

A network that follows a flow has the covariances nearly right, and conditionals that are off by a good part of their sds: its map
is bent in pieces, and an inverse problem divides its errors by the sds of what is not seen (docs/benchmarks/gan.md, kriging).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyro_dgm.cnf import FFJORD
from pyro_dgm.cnf.matching import match, velocity_error
from pyro_dgm.flows.few_rows import Decorrelate
from pyro_dgm.flows.many_rows import ColumnUnits, column_splines, seems_normal
from pyro_dgm.gan.generator import Generator
from pyro_dgm.train.batches import some_rows
from pyro_dgm.train.descend import Stages

__all__ = ["become_normal", "many_rows", "seem_one_normal"]

_MANY = 1_000  # rows, from which on it is asked
_MOST = 30_000  # rows whose covariance is taken
_TAUGHT = 0.8  # of them, to what could be better than one normal law
_CLEAR = 2.0  # standard errors of what that gains on the others
# Of the flow that could be better; one of 500 steps sees all of what more steps see (docs/benchmarks/gan.md, kriging).
_STEPS, _ROWS, _RATE, _CLIP = 500, 512, 2.5e-3, 1.0
_ROUNDS = 50  # of principal factors; with a latent as long as the event the first is the last


def many_rows(generator: Generator, batches: Iterator[tuple[Any, ...]], x: Tensor) -> Tensor | None:
    """Different rows of data ``(N, D)`` in a generator's units, in a random order; of those given where others are not known.

    None where they are few.
    """
    known = some_rows(batches, _MOST)
    rows = generator.units(x if known is None else known[0]).unique(dim=0)
    return rows[torch.randperm(len(rows), device=rows.device)] if len(rows) >= _MANY else None


def seem_one_normal(u: Tensor, make: Callable[[int], FFJORD], steps: int, stages: Stages) -> bool:
    """Whether nothing scores left-out rows clearly better: columns of their own shapes, two normals or scales, or a flow.

    The flow begins as the normal law, so that what it learns is where the rows differ from it.
    """
    u = u[:, u.var(0) > 0.0]
    some, left = u.tensor_split([round(_TAUGHT * len(u))])
    if _clear(_gain_of_columns(some, left)) or not seems_normal(u):
        return False
    return not _clear(_gain_of_flow(make(u.shape[1]).to(u), some, left, min(steps, _STEPS), stages))


def become_normal(generator: Generator, u: Tensor, least_noise: float) -> None:
    """Make a generator the normal law of rows in its units; a learned noise is what a short latent leaves, or the least."""
    latent = generator.base.event_shape.numel()
    learned = isinstance(generator.log_noise, nn.Parameter)
    weight, noise = _factors(u, min(latent, u.shape[1]), least_noise if learned else generator.sigma)
    with torch.no_grad():
        if learned:
            generator.log_noise.copy_(noise.log())
    generator.straighten(nn.functional.pad(weight, (0, latent - weight.shape[1])), u.mean(0))


def _clear(gain: Tensor) -> bool:
    return float(gain.mean()) > _CLEAR * float(gain.std()) * len(gain) ** -0.5


def _gain_of_columns(some: Tensor, left: Tensor) -> Tensor:
    """Nats of each left-out row that splines of the columns bring over normal columns, without their correlations."""
    splines = column_splines(some).all
    if all(spline is None for spline in splines):
        return torch.zeros_like(left[:, 0])
    shape = ColumnUnits().to(left).take(splines).transform()
    v = shape.inv(left)
    return 0.5 * (left.square() - v.square()).sum(1) - shape.log_abs_det_jacobian(v, left)


def _gain_of_flow(flow: FFJORD, some: Tensor, left: Tensor, steps: int, stages: Stages) -> Tensor:
    """Nats of each left-out row that a flow brings over the normal law that it begins as."""
    flow.decorrelate.fit(some)
    flow.start_at_identity()

    def loss() -> Tensor:
        data = flow.flow_units(some[torch.randint(len(some), (_ROWS,), device=some.device)])
        return velocity_error(flow, "linear", torch.randn_like(data), data, None)

    before = _scores(flow, left)
    match("one normal law?", flow, loss, stages, steps, _RATE, _CLIP)
    return _scores(flow, left) - before


@torch.no_grad()
def _scores(flow: FFJORD, u: Tensor) -> Tensor:
    return flow().log_prob(u)


def _factors(u: Tensor, size: int, noise: Tensor | float) -> tuple[Tensor, Tensor]:
    r"""Loadings W ``(D, size)`` and noise of each entry, with :math:`W W^\top + \mathrm{diag}(\sigma^2)` the rows' covariance.

    Given a number, the noise is what W leaves of each entry's variance, and that at least: principal factors (Harman 1976,
    "Modern factor analysis", chapter 9).
    """
    root = Decorrelate().fit(u).tril.double()
    varies = (u.var(0) > 0.0).to(root)
    covariance = root @ root.mT * varies * varies[:, None]
    square = torch.zeros_like(covariance[0]) + torch.as_tensor(noise, dtype=torch.double).cpu() ** 2
    for _ in range(_ROUNDS):
        values, vectors = torch.linalg.eigh(covariance - square.diag())
        weight = vectors[:, -size:] * values[-size:].clamp_min(0.0).sqrt()
        if isinstance(noise, float):
            square = (covariance.diagonal() - weight.square().sum(1)).clamp_min(noise**2)
    return weight.to(u), square.sqrt().to(u)
