r"""Where a posterior that follows plates starts: natural gradients for the globals, a conjugate fit for the elements.

At each step draws of :math:`(g, e)` give the gradient and the curvature of the log joint in each element: those of a normal
likelihood of that element. Its parameters move towards a regression of what the draws say on the globals. The globals follow
the natural gradient of the bound, through the elements' answer to them. Then the elements are integrated out, and the globals
follow the gradient of the integral.

References:
    | Khan & Lin (2017), "Conjugate-computation variational inference", arXiv 1703.04265.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_dgm.core.pace import steps
from pyro_dgm.guides.plates import LocalLaw, LocalNormals, PlatedPosterior, Rule
from pyro_dgm.guides.start import antithetic, natural_step, shortened
from pyro_dgm.model.elements import Factors, between, gram, precision_of, rooted, solved, times
from pyro_dgm.model.log_joint import LogJoint, prior_draws, spread

__all__ = ["compared", "draws_for", "outer_step", "rule_for", "start_plates"]

_TOGETHER = 30  # simulated normal, Poisson and binomial hierarchies of 100 to 10,000 groups stand still after 15 to 30
_GLOBALS = 20
_AGAIN = 10  # elements once more: with 10,000 groups of counts the noise of the first stage makes the globals narrow, by 1 / 7
# Where the first start came to nothing: of heavy-tailed groups of counts one can drive all (docs/benchmarks/hierarchies.md).
_NARROW, _STILL = 0.1, 20
_KNOWN = 0.05  # the least information of an element with one latent: below, its mean is a product of 0 and infinity (same page)
# Not measured; chosen by hand.
_REACH = (0.5, 2.0)  # widths of the globals within which quadratures are compared
_COMPARED = 16  # draws at which quadratures are compared, at least
_TOLERANCE = 0.02  # nats that an integral may vary by from draw to draw; a gap of .05 is a good posterior's most
_OFFSET = 0.1  # nats that it may be off by in all draws
_LINE = 0.005  # nats that a finer integral may be off a line: it tells of a few draws only
_NEARLY = 0.02  # nats off a line, which moves the globals by as many sds
_RATES = (0.5, 0.1)
_RIDGE = 1e-3
_WIDER = 1.5  # prior draws' spread, as the width of an element that has no location and scale of its own
_STEEPEST = 3.0  # times the root of G: norm of a whitened residual
_FARTHEST = 1.0  # of an element's mean in a step, in units of its prior
_SHORTEST, _LARGEST = 0.2, 5.0  # change of an element's information in a step
_SLIGHT = 0.1  # information that counts as known along any direction, where elements have several latents


def start_plates(log_joint: LogJoint, factors: Factors, posterior: PlatedPosterior, *, again: bool = False) -> None:
    """Fit the elements, and whiten the globals. ``again`` lets the elements come near their data before the globals move."""
    _take_prior(log_joint, posterior)
    n = draws_for(posterior.size)
    if again:
        posterior.whiten(posterior.outer.loc.clone(), _NARROW * posterior.outer.scale_tril)
        for _ in steps("start again: elements", _STILL, 0.4):
            _joint_step(log_joint, posterior, n, _RATES[0], move=False)
    for _, progress in steps("start 1/3: together", _TOGETHER, 0.4):
        _joint_step(log_joint, posterior, n, _rate(progress))
    _choose_rule(factors, posterior)
    few = _fewer(posterior)
    for _, progress in steps("start 2/3: globals", _GLOBALS, 0.4):
        outer_step(factors, posterior, few, _rate(progress))
    _choose_rule(factors, posterior)
    for _, progress in steps("start 3/3: elements", _AGAIN, 0.8):
        _joint_step(log_joint, posterior, n, _rate(progress), move=False)
        outer_step(factors, posterior, few, _RATES[1])


def _choose_rule(factors: Factors, posterior: PlatedPosterior) -> None:
    """How the elements are integrated out from now on."""
    if not posterior.orders():
        return
    outer = posterior.outer
    pairs = compared(posterior) // 2
    w = antithetic(outer.loc[None], 2 * pairs)[0] * torch.linspace(*_REACH, pairs).repeat(2)[:, None].to(outer.loc)
    posterior.rule = rule_for(posterior, factors, outer.loc + w @ outer.scale_tril.mT, _NEARLY)


def _rate(progress: float) -> float:
    return _RATES[0] * (_RATES[1] / _RATES[0]) ** max(0.0, (progress - 0.3) / 0.7)


def draws_for(size: int) -> int:
    """Draws of a step: a regression on the globals needs some for each."""
    return max(32, 4 * (1 + size))


def _fewer(posterior: PlatedPosterior) -> int:
    """Draws of a step of the globals alone: fewer where elements are many."""
    few = max(posterior.particles(draws_for(posterior.size)), 2 * (1 + posterior.size))
    return few + few % 2


@torch.no_grad()
def _take_prior(log_joint: LogJoint, posterior: PlatedPosterior) -> None:
    """Whiten the globals by the prior's draws, and let the elements be as they are there."""
    u = prior_draws(log_joint, 256)
    centre, width = u.median(0).values, spread(u)
    relative = torch.zeros_like(centre, dtype=torch.bool)
    for name in log_joint.coordinates.relative:
        log_joint.coordinates.parts(relative)[name].fill_(True)
    free = posterior.order[: posterior.size]
    posterior.whiten(centre[free], width[free].diag())
    for group in posterior.groups:
        known = relative[group.index]
        group.loc.copy_(torch.where(known, 0.0, centre[group.index]))
        group.scale.copy_(torch.where(known, 1.0, _WIDER * width[group.index]))
        for parameter in group.parameters():
            parameter.zero_()
        group.log_root[..., 0] = -1.0


def _joint_step(log_joint: LogJoint, posterior: PlatedPosterior, n: int, rho: float, *, move: bool = True) -> None:
    """A step of the elements, and one of the globals where these ``move``."""
    outer = posterior.outer
    w = antithetic(outer.loc[None], n)[0].requires_grad_()
    laws = [group.given(w) for group in posterior.groups]
    zs = [antithetic(each.loc.reshape(1, -1), n).reshape(n, *each.index.shape) for each in posterior.groups]
    placed = [law.place(z) for law, z in zip(laws, zs, strict=True)]
    g = outer.loc + w @ outer.scale_tril.mT
    inside, slopes, curvatures = _derivatives(log_joint, posterior, [g, *(u for u, _ in placed)])
    with torch.no_grad():
        found = [
            _informed(group, law, u, s, c, rho)
            for group, law, (u, _), s, c in zip(posterior.groups, laws, placed, slopes[1:], curvatures, strict=True)
        ]
    volumes = [inside[:, None] * ladj for _, ladj in placed]
    total = [g, *(u for u, _ in placed), *volumes], [*slopes, *map(torch.ones_like, volumes)]
    (slope,) = torch.autograd.grad(total[0], w, total[1])
    fine = inside & slope.isfinite().all(-1)
    for group, (shift, root) in zip(posterior.groups, found, strict=True):
        ok = fine & shift.flatten(1).isfinite().all(1) & root.flatten(1).isfinite().all(1)
        if int(ok.sum()) > 1 + posterior.size:
            _regress(group, w.detach()[ok], shift[ok], root[ok])
    if move:
        _move_globals(posterior, w.detach(), torch.where(fine[:, None], slope, -2.0 * w.detach()), rho)


def _derivatives(
    log_joint: LogJoint, posterior: PlatedPosterior, parts: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Of globals and elements: whether the log joint is finite there, its slopes, and its curvature ``(n, J, F, F)`` in elements.

    They are leaves here: only the model is differentiated twice, not the laws that the elements were drawn from.
    """
    parts = [x.detach().requires_grad_() for x in parts]
    value = log_joint.evaluated(posterior.join(parts[0], parts[1:]))
    inside = value.isfinite()
    slopes = torch.autograd.grad(torch.where(inside, value, 0.0).sum(), parts, create_graph=True)
    curvatures = []
    for u, slope in zip(parts[1:], slopes[1:], strict=True):
        columns = [torch.autograd.grad(s.sum(), u, retain_graph=True)[0] for s in slope.unbind(-1)]
        curvatures.append(torch.stack(columns, -1))
    return inside, [s.detach() for s in slopes], curvatures


def _informed(
    group: LocalNormals, law: LocalLaw, u: Tensor, slope: Tensor, curvature: Tensor, rho: float
) -> tuple[Tensor, Tensor]:
    """What each draw says of ``(shift, root)``: a share ``rho`` of the way from what is known to its gradient and curvature."""
    scale = group.scale
    curved = -curvature * scale[..., None] * scale[..., None, :] - torch.eye(group.features).to(u)
    curved = 0.5 * (curved + curved.mT)
    e = (u - group.loc) / scale
    gradient = slope * scale + e
    root, shift, mean = law.root, law.shift, law.mean
    known = gram(root)
    new_root = _root_of((1.0 - rho) * known + rho * curved, known)
    informed = times(root.mT, shift)
    said = gradient + times(known, e - mean) + times(curved, mean)
    said = _near(new_root, mean, (1.0 - rho) * informed + rho * said)
    return solved(new_root.mT, said, upper=False), new_root


def _near(root: Tensor, mean: Tensor, informed: Tensor) -> Tensor:
    """What moves the mean of elements to where it says, or so far at most."""
    precision = precision_of(root)
    tril = rooted(precision)
    move = solved(tril.mT, solved(tril, informed, upper=False), upper=True) - mean
    move = torch.where(move.isfinite().all(-1, keepdim=True), shortened(move, _FARTHEST), 0.0)
    return times(precision, mean + move)


def _root_of(information: Tensor, known: Tensor) -> Tensor:
    """The upper-triangular root of an information that is positive, and that changed by so much at most along any direction."""
    if information.shape[-1] == 1:
        return information.maximum(_SHORTEST * known + _KNOWN).minimum(_LARGEST * known + 0.5).sqrt()
    tril = rooted(known + _SLIGHT * torch.eye(known.shape[-1]).to(known))
    half = [solved(tril, column, upper=False) for column in information.unbind(-1)]
    turned = torch.stack([solved(tril, row, upper=False) for row in torch.stack(half, -1).unbind(-2)], -1)
    change = rooted(between(turned, _SHORTEST, _LARGEST))
    return torch.stack([times(tril, column) for column in change.unbind(-1)], -2)


@torch.no_grad()
def _regress(group: LocalNormals, w: Tensor, shift: Tensor, root: Tensor) -> None:
    """Parameters that are linear in the globals and nearest to what the draws say."""
    h = torch.cat([torch.ones_like(w[:, :1]), w], 1)
    solve = torch.linalg.solve(h.T @ h + _RIDGE * torch.eye(h.shape[1]).to(h), h.T)
    group.shift.copy_(torch.einsum("hn,njf->jfh", solve, shift))
    group.log_root.copy_(torch.einsum("hn,njf->jfh", solve, root.diagonal(dim1=-2, dim2=-1).log()))
    if group.features > 1:
        group.tilt.copy_(torch.einsum("hn,njfk->jfkh", solve, root))


def outer_step(factors: Any, posterior: Any, n: int, rho: float) -> None:
    """A step of the globals with the elements, or the chain, integrated out."""
    w = antithetic(posterior.outer.loc[None], n)[0]
    parts = [_slope(factors, posterior, some) for some in w.split(posterior.at_once(factors))]
    _move_globals(posterior, w, torch.cat(parts), rho)


def _slope(factors: Any, posterior: Any, w: Tensor) -> Tensor:
    """The gradient of the integral at whitened globals; that of a normal law where it is not finite."""
    w = w.detach().requires_grad_()
    value = posterior.marginal(factors, posterior.outer.loc + w @ posterior.outer.scale_tril.mT)
    (slope,) = torch.autograd.grad(torch.where(value.isfinite(), value, 0.0).sum(), w)
    fine = value.isfinite() & slope.isfinite().all(-1)
    return torch.where(fine[:, None], slope, -2.0 * w.detach())


@torch.no_grad()
def _move_globals(posterior: Any, w: Tensor, slope: Tensor, rho: float) -> None:
    """A natural-gradient step."""
    outer = posterior.outer
    residual = shortened(slope + w, _STEEPEST * math.sqrt(posterior.size))
    loc, tril = natural_step(outer.loc[None], outer.scale_tril[None], w[None], residual[None], rho)
    posterior.whiten(loc[0], tril[0])


# --- How fine the elements are integrated out ---


def compared(posterior: PlatedPosterior) -> int:
    """At how many draws of the globals quadratures are compared."""
    return max(_COMPARED, 4 * (1 + posterior.size))


@torch.no_grad()
def rule_for(posterior: PlatedPosterior, factors: Factors, g: Tensor, line: float = _LINE) -> Rule:
    """The coarsest quadrature that says the same as finer ones at draws of the globals, to so many nats but for a line.

    Finer ones are right as soon as two in a row agree. Half of the draws are the farthest of ``g``, and may be off by more.
    Where elements have too many latents for a quadrature, two sets of random points are compared.
    """
    g, distance = _some(g, posterior.white(g), compared(posterior))
    found: list[tuple[int | None, Tensor]] = []
    for order in posterior.orders() or (None, None):
        found.append((order, posterior.marginal(factors, g, Rule(order))))
        if len(found) > 1 and _agree((found[-1][1] - found[-2][1]) / distance):
            return _coarsest(found, posterior.white(g), distance, line)
    gap = found[-1][1] - found[-2][1]
    return Rule(found[-1][0], unsure=max(float(gap.std()), float(gap.mean().abs())))


def _some(g: Tensor, w: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Some rows, those that are farthest among them, and squares of how far they are beyond the median."""
    square = w.double().square().sum(-1)
    distance = (square / square.median()).clamp_min(1.0)
    far = distance[count // 2 :].argsort(descending=True)[: count - count // 2] + count // 2
    index = torch.cat([torch.arange(min(len(g), count // 2)).to(far), far])
    return g[index], distance[index]


def _agree(gap: Tensor) -> bool:
    """Whether two integrals differ by little at all draws, and by nearly the same."""
    return bool(gap.isfinite().all()) and float(gap.std()) < _TOLERANCE and float(gap.mean().abs()) < _OFFSET


def _coarsest(found: list[tuple[int | None, Tensor]], w: Tensor, distance: Tensor, most: float) -> Rule:
    """The first that differs from the last by a line."""
    finest, right = found[-1]
    h = torch.nn.functional.pad(w.double(), (1, 0), value=1.0) / distance[:, None]
    degrees = len(h) - h.shape[1]
    for order, value in found[:-1] if degrees >= h.shape[1] else ():
        gap = (right - value) / distance
        line = torch.linalg.lstsq(h, gap[:, None]).solution[:, 0]
        if bool((gap - h @ line).square().sum() < degrees * most**2):  # and not where it is NaN
            return Rule(order, line.to(w))
    return Rule(finest)
