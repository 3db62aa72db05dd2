r"""Draws and weights of a guide that follows plates, or a chain.

The globals are weighted with the elements integrated out, :math:`w(g) = \hat p(x, g) / q(g)`; a weight of thousands of
latents together would say that any guide is bad. Each element is then one of some draws given the globals, in proportion to
their weights, and is judged by weights of its own. Of a chain there are some draws for each draw of the globals, too; their mean
weight makes the weight of both, and one of them is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_dgm.diagnostics.containers import ContainerOptions
from pyro_dgm.diagnostics.converters import groups_of_samples
from pyro_dgm.diagnostics.exploration import Exploration
from pyro_dgm.diagnostics.groups import Groups
from pyro_dgm.diagnostics.khat import judge, judge_elements, seen_rows
from pyro_dgm.guides.autoflow import AutoFlow
from pyro_dgm.guides.chains import ChainPosterior
from pyro_dgm.guides.plate_start import rule_for
from pyro_dgm.guides.plates import PlatedPosterior, Rule
from pyro_dgm.model.chains import BandedChain
from pyro_dgm.model.elements import Factors
from pyro_dgm.model.log_joint import LogJoint
from pyro_dgm.model.program import Model, Program, refuse_missing
from pyro_dgm.model.runs import Draws
from pyro_dgm.model.uncovered import uncovered

__all__ = ["FoundByElements", "groups_by_elements"]

# Not measured; chosen by hand.
_PROPOSALS = 8  # of an element given the globals, of which one is kept
_AT_ONCE = 2**23  # entries of the model's terms
_COMPARED = 16  # draws of the globals at which draws of a chain are counted
_NOISE = 0.02  # variance of a weight by its draws of the chain
_MOST_PAIRS = 64  # of draws of a chain
_NOT_LOOKED = "neither is made for a time series"
_UNSURE = "The elements of a plate are integrated out to {:.2g} nats only, so the weights are not known well"
_LOOKED = 64  # draws around which modes are looked for


class FoundByElements(NamedTuple):
    """What a container is made of."""

    program: Program
    groups: Groups
    attrs: dict[str, Any]


@dataclass(frozen=True)
class _GuideDraws:
    """What n draws of a guide that follows plates, or a chain, leave behind.

    Attributes:
        draws: values of all latents, by site.
        vectors: some of them as unconstrained vectors, ``(m, D)``.
        log_weight: of the globals, ``(n,)``.
        local: log weight of one draw of each looked-at element given the globals, normalised, ``(n, N)``; none of a chain.
        values: of that draw, ``(n, N, F)``, unconstrained; F is that of the largest element.
        unsure: why the weights are not known well enough for a verdict; empty where they are.
    """

    draws: Draws
    vectors: Tensor
    log_weight: np.ndarray
    local: np.ndarray
    values: np.ndarray
    unsure: str = ""


def groups_by_elements(
    who: str,
    model: Model,
    guides: list[AutoFlow],
    args: tuple[Any, ...],
    n: int,
    options: ContainerOptions,
    *,
    check: bool,
    unfitted: str,
) -> FoundByElements:
    """The groups of n draws of each guide, with weights of the globals, and the verdict on both."""
    joints = [LogJoint.known(guide, model, args, options["model_kwargs"] or {}) for guide in guides]
    refuse_missing(who, joints[0].missing)
    follows_chain = guides[0].follows_chain
    draw = _draw_chain if follows_chain else _draw
    drawn = [draw(guide, joint, n) for guide, joint in zip(guides, joints, strict=True)]
    draws = {k: torch.cat([each.draws[k] for each in drawn]) for k in drawn[0].draws}
    program, groups = groups_of_samples(who, model, draws, args, options)
    log_weight = np.concatenate([each.log_weight for each in drawn])
    stats = groups.arrays["sample_stats"]
    stats["log_weight"] = log_weight
    stats["log_q"] = stats["lp"] - log_weight
    plated = guides[0].plated
    given = [k for k in draws if k not in plated.sites]
    values = np.concatenate([draws[k].reshape(len(log_weight), -1).double().cpu().numpy() for k in given], -1)
    explored = Exploration(unseen=_NOT_LOOKED if check else "it was not asked for")
    if check and not follows_chain:
        explored = _look(joints[0], drawn[0])
    unsure = max(each.unsure for each in drawn)
    explored = replace(explored, unfitted=unfitted, unsure=unsure).weighed(values, log_weight)
    verdict = judge(log_weight, explored)
    if not follows_chain:
        local, latents = (np.concatenate([getattr(each, k) for each in drawn]) for k in ("local", "values"))
        plate = ", ".join(dict.fromkeys(group.plate for group in plated.groups))
        total = sum(map(len, plated.groups))
        verdict = judge_elements(log_weight, explored, local, latents, plate, given, total)
    attrs = {"guide": type(guides[0]).__name__} | verdict.attrs()
    if len(guides) > 1:
        attrs["khat_by_chain"] = [judge(w).k for w in np.split(log_weight, len(guides))]
    return FoundByElements(program, groups, attrs)


@torch.no_grad()
def _draw(guide: AutoFlow, log_joint: LogJoint, n: int) -> _GuideDraws:
    """Draws of the posterior's globals and elements, with their weights."""
    posterior = guide.plated
    factors = guide.factors_of(log_joint)
    g = posterior.outer().sample((n,))
    rule = rule_for(posterior, factors, g)
    size = max(1, _AT_ONCE // (max(_PROPOSALS, posterior.points(rule)) * factors.size))
    parts = [
        _drawn(log_joint, posterior, factors, rows, rule, max(0, _LOOKED - i * size))
        for i, rows in enumerate(g.split(size))
    ]
    draws = {k: torch.cat([each.draws[k] for each in parts]) for k in parts[0].draws}
    vectors = torch.cat([each.vectors for each in parts])
    arrays = [np.concatenate([getattr(each, k) for each in parts]) for k in ("log_weight", "local", "values")]
    return _GuideDraws(
        draws, vectors, arrays[0], arrays[1], arrays[2], _UNSURE.format(rule.unsure) if rule.unsure else ""
    )


def _drawn(
    log_joint: LogJoint, posterior: PlatedPosterior, factors: Factors, g: Tensor, rule: Rule, kept: int
) -> _GuideDraws:
    """Those of given globals, so many vectors among them."""
    made = posterior.inner(factors, g, posterior.random(len(g), _PROPOSALS))
    first = torch.nn.utils.rnn.pad_sequence([u[0].flatten(2).movedim(-1, 0) for u in made.latents], batch_first=True)
    values = torch.cat(list(first.movedim(1, -1)), 1)
    u = posterior.chosen(g, made)
    log_weight = posterior.marginal(factors, g, rule) - posterior.outer().log_prob(g).double()
    seen = seen_rows(values.shape[1])
    local = (made.log_ratio[0] - made.integral)[:, seen]
    arrays = [x.double().cpu().numpy() for x in (log_weight, local, values[:, seen])]
    return _GuideDraws(log_joint.constrain(u)[0], u[:kept].clone(), arrays[0], arrays[1], arrays[2])


@torch.no_grad()
def _draw_chain(guide: AutoFlow, log_joint: LogJoint, n: int) -> _GuideDraws:
    """Draws of the posterior's globals, each with one of some draws of the chain."""
    posterior = guide.plated
    chain = guide.factors_of(log_joint)
    g = posterior.outer().sample((n,))
    count = _count_for(posterior, chain, g[:_COMPARED])
    rows = g.split(max(1, _AT_ONCE // (2 * count * chain.size)))
    u, marginal = (
        torch.cat(each) for each in zip(*(posterior.chosen(chain, some, count) for some in rows), strict=True)
    )
    weights = (marginal - posterior.outer().log_prob(g).double()).double().cpu().numpy()
    vectors, nothing = u.to(g), np.zeros((n, 0))
    return _GuideDraws(log_joint.constrain(vectors)[0], vectors, weights, nothing, nothing)


def _count_for(posterior: ChainPosterior, chain: BandedChain, g: Tensor) -> int:
    """So many draws of the chain that their noise is small: two where they are all the same, as those of an exact law are."""
    pairs = posterior.inner(chain, g, _PROPOSALS)[1].unflatten(0, (2, -1)).logsumexp(0)
    weight = (pairs - pairs.amax(0)).exp()
    noise = float((weight.var(0) / weight.mean(0).square()).nan_to_num(torch.inf).mean())
    return 2 * int(min(max(1, math.ceil(noise / _NOISE)), _MOST_PAIRS)) if math.isfinite(noise) else 2 * _MOST_PAIRS


def _look(log_joint: LogJoint, drawn: _GuideDraws) -> Exploration:
    """Look for modes that the draws miss; no chains are run, since each element has weights of its own."""
    found = uncovered(log_joint, drawn.vectors, lambda x: x, log_joint)
    return Exploration(other_modes=len(found))
