r"""A posterior that follows the plates of a model: globals by a flow, the latents of each element given them.

.. math:: q(g, e) = q(g) \prod_j N\big(e_j;\ P_j^{-1} R_j^\top t_j,\ P_j^{-1}\big), \qquad P_j = I + R_j^\top R_j

:math:`e_j` are the latents of element j in units of their prior given the globals. Of the upper triangular :math:`R_j` the
logarithm of the diagonal and the other entries, and of :math:`t_j` all, are linear in the whitened globals :math:`w`. It is what
Bayes' rule gives for a normal prior :math:`N(0, I)` and normal data :math:`R_j e_j \approx t_j`, so the posterior of a normal
hierarchy is of this form however it is centred, with :math:`R_j = \tau / \sigma_j` and :math:`t_j = (y_j - \mu) / \sigma_j`. Its
size and cost are linear in the elements.

What is trained and judged is the marginal of the globals. The elements are integrated out,

.. math:: \log \hat p(x, g) = r(g) + \sum_j \log \sum_k \omega_k\,
          \exp\big(\ell_j(g, e_{jk}) - \log q(e_{jk} \mid g)\big),

by Gauss-Hermite quadrature around :math:`q(e_j \mid g)` where elements have one or two latents (Naylor & Smith 1982), and by
importance sampling where they have more (Geffner & Domke 2022, "Variational inference with locally enhanced bounds for
hierarchical models", arXiv 2203.04432). The quadrature of a product of thousands of integrals is exact to some 1e-3 nats, where
64 draws of each leave a noise of .1 to .6.

How fine it has to be, a few draws of the globals tell. What a finer quadrature adds to a coarse one is nearly linear in the
globals where these are known well, as those of many elements are. So the coarse one is taken at all draws, and the line that was
found at a few is added: 9 points of two normal latents, and 16 of six trials each, do what 25 and 49 would (:class:`Rule`).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Transform
from torch.utils.checkpoint import checkpoint

from pyro_dgm.core import DistributionModule, frozen
from pyro_dgm.core.module import OnePass
from pyro_dgm.guides.modes import GivenGlobals, log_normal, whitened
from pyro_dgm.model.elements import Elements, Factors, precision_of, rooted, solved, times
from pyro_dgm.model.log_joint import LogJoint

__all__ = ["LocalLaw", "LocalNormals", "Nodes", "PlatedPosterior", "Rule", "quadrature"]

_WIDEST = 3.0  # standard deviation of an element before anything is known of it, in units of its prior
_BOUND = 8.0  # on |log diagonal of R|
# Of quadratures, coarse to fine, by the latents of an element. Of one latent few points are no saving.
_ORDERS = {1: (9, 13, 21, 33), 2: (3, 4, 5, 7, 11)}
_AT_FIRST = {1: 9, 2: 5}  # the order until one is chosen
_DRAWS = 16  # in its place, of elements with more latents
_ROWS = 2**20  # element evaluations in a step
_LEAST = 16  # draws of the globals in it, however many elements there are
_AT_ONCE = 2**21  # entries of the model's terms. At 20,000 groups smaller chunks are slower, larger ones no faster


class Nodes(NamedTuple):
    """Points of a standard normal: ``z (K, J, F)`` or ``(K, n, J, F)``, with their log weights ``(K,)``."""

    z: Tensor
    log_weight: Tensor

    def __len__(self) -> int:
        return len(self.log_weight)


class Rule(NamedTuple):
    """How elements are integrated out.

    Attributes:
        order: of the quadrature; None for random points.
        more: what a finer one adds, linear in the whitened globals, ``(1 + G,)``; None for nothing.
        unsure: nats by which finer ones still differ, from draw to draw, or 0 where they agree.
    """

    order: int | None = None
    more: Tensor | None = None
    unsure: float = 0.0


_hermite = cache(np.polynomial.hermite_e.hermegauss)


def quadrature(features: int, order: int, like: Tensor) -> Nodes:
    """Gauss-Hermite points, ``order`` each way, the same for all elements and draws."""
    points, weights = _hermite(order)
    grid = torch.cartesian_prod(*[torch.as_tensor(points)] * features).reshape(-1, features)
    log_weight = torch.as_tensor(np.log(weights / weights.sum()))
    total = torch.cartesian_prod(*[log_weight] * features).reshape(-1, features).sum(-1)
    return Nodes(grid[:, None, None].to(like), total.to(like))


class LocalNormals(nn.Module):
    """Latents of J elements given the whitened globals, F of each.

    Args:
        elements: where they stand in the vector of all latents.
        size: the number of globals.
        loc, scale: where all of them are before anything is known, ``(J, F)``, and how wide.
    """

    index: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(self, elements: Elements, size: int, loc: Tensor, scale: float) -> None:
        super().__init__()
        count, features = elements.index.shape
        self.features = features
        self.plate = elements.plate
        self.sites = elements.sites
        self.register_buffer("index", elements.index.clone())
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale", torch.full_like(loc, max(_WIDEST, 1.01 * scale)))
        self.shift = nn.Parameter(loc.new_zeros(count, features, 1 + size))
        self.log_root = nn.Parameter(loc.new_zeros(count, features, 1 + size))
        self.tilt = nn.Parameter(loc.new_zeros(count, features, features, 1 + size if features > 1 else 0))
        with torch.no_grad():
            self.log_root[..., 0] = 0.5 * torch.log((self.scale / scale).square() - 1.0)

    def __len__(self) -> int:
        return len(self.index)

    def elements(self) -> Elements:
        """What it was made for."""
        return Elements(self.plate, self.sites, self.index.cpu())

    def given(self, w: Tensor) -> LocalLaw:
        """The law of the elements for whitened globals ``(*batch, G)``."""
        h = torch.cat([torch.ones_like(w[..., :1]), w], -1)
        shift = torch.einsum("...h,jfh->...jf", h, self.shift)
        root = torch.einsum("...h,jfh->...jf", h, self.log_root).clamp(-_BOUND, _BOUND).exp()
        if self.features == 1:
            return LocalLaw(shift, root[..., None], self.loc, self.scale)
        above = torch.ones(self.features, self.features).to(h).triu(1)[..., None]
        tilt = torch.einsum("...h,jfkh->...jfk", h, self.tilt * above)  # of millions of small matrices triu is slow
        return LocalLaw(shift, torch.diag_embed(root) + tilt, self.loc, self.scale)


class LocalLaw:
    """Normal laws of J elements, each with F latents: ``shift (*batch, J, F)``, ``root (*batch, J, F, F)``."""

    def __init__(self, shift: Tensor, root: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.shift = shift
        self.root = root
        self.loc = loc
        self.scale = scale
        self.tril = rooted(precision_of(root))
        self.mean = solved(self.tril.mT, solved(self.tril, times(root.mT, shift), upper=False), upper=True)

    def place(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The latents of standard normal z ``(..., J, F)``, and log determinants ``(..., J)``."""
        e = self.mean + solved(self.tril.mT, z, upper=True)
        ladj = self.scale.log().sum(-1) - self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.loc + self.scale * e, ladj

    def undo(self, u: Tensor) -> Tensor:
        """The z of latents."""
        return times(self.tril.mT, (u - self.loc) / self.scale - self.mean)


class PlatedPosterior(GivenGlobals):
    """A family over :math:`R^D` of which some entries are latents of elements, given the others.

    Args:
        family: of the globals, over vectors of length G.
        loc: the centre, shape ``(D,)``.
        scale: the standard deviation at the start, in each dimension.
        elements: of the model's plates.
    """

    order: Tensor
    place: Tensor
    rule_order: Tensor
    rule_line: Tensor

    def __init__(self, family: DistributionModule, loc: Tensor, scale: float, elements: list[Elements]) -> None:
        inside = torch.cat([each.index.reshape(-1) for each in elements])
        outside = torch.ones(len(loc), dtype=torch.bool, device="cpu")
        outside[inside] = False
        free = outside.nonzero()[:, 0]
        super().__init__(family, loc, scale, free)
        self.locals = nn.ModuleList(
            LocalNormals(each, self.size, loc[each.index.to(loc.device)], scale) for each in elements
        )
        self.register_buffer("order", torch.cat([free, inside]))
        self.register_buffer("place", self.order.argsort())
        self.in_place = bool((self.order == torch.arange(len(loc), device="cpu")).all())
        first = _AT_FIRST[self.groups[0].features] if self.orders() else 0
        self.register_buffer("rule_order", torch.tensor(first))
        self.register_buffer("rule_line", loc.new_zeros(1 + self.size))

    @property
    def groups(self) -> list[LocalNormals]:
        """The latents of elements."""
        return [each for each in self.locals if isinstance(each, LocalNormals)]

    @property
    def rule(self) -> Rule:
        """How the elements are integrated out in a fit; it is kept with the state, for fits that resume and other processes."""
        return Rule(int(self.rule_order) or None, self.rule_line if bool(self.rule_line.any()) else None)

    @rule.setter
    def rule(self, rule: Rule) -> None:
        self.rule_order.fill_(rule.order or 0)
        self.rule_line.copy_(torch.zeros_like(self.rule_line) if rule.more is None else rule.more)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A state of before there were rules has the first one."""
        for name in ("rule_order", "rule_line"):
            state.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state, prefix, *rest)

    @property
    def sites(self) -> tuple[str, ...]:
        """Those of the elements."""
        return tuple(k for group in self.groups for k in group.sites)

    def buffer_version(self) -> int:
        """A number that grows when the whitening is set."""
        return super().buffer_version() + sum(g.loc._version + g.scale._version for g in self.groups)

    @torch.no_grad()
    def whiten(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set the whitening of the globals; the laws of the elements stay as they are, told in the new units."""
        outer = self.outer
        turned = torch.linalg.solve_triangular(outer.scale_tril, scale_tril, upper=False)
        moved = torch.linalg.solve_triangular(outer.scale_tril, (loc - outer.loc)[:, None], upper=False)[:, 0]
        answers = [p for group in self.groups for p in group.parameters() if p.numel()]
        for answer in [*answers, self.rule_line]:
            constant, linear = answer[..., :1], answer[..., 1:]
            answer.copy_(torch.cat([constant + (linear @ moved)[..., None], linear @ turned], -1))
        super().whiten(loc, scale_tril)

    def placed(self, outer: Transform) -> Transform:
        return _Placed(self, outer)

    def factors_of(self, log_joint: LogJoint) -> Factors:
        return Factors(log_joint, [group.elements() for group in self.groups])

    def white(self, g: Tensor) -> Tensor:
        """Whitened globals ``(*batch, G)``."""
        return whitened(g, self.outer.loc, self.outer.scale_tril)

    def join(self, g: Tensor, latents: list[Tensor]) -> Tensor:
        """Vectors ``(*batch, D)`` of globals ``(*batch, G)`` and latents of each group of elements ``(*batch, J, F)``."""
        ordered = self.in_order(g, latents)
        return ordered if self.in_place else _Permuted.apply(ordered, self.place, self.order)

    def in_order(self, g: Tensor, latents: list[Tensor]) -> Tensor:
        """The same, globals first."""
        return torch.cat([g, *(each.reshape(*g.shape[:-1], -1) for each in latents)], -1)

    def cut(self, ordered: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Globals and the latents of each group, of vectors with the globals first."""
        g, *rest = ordered.split([self.size, *(each.index.numel() for each in self.groups)], -1)
        return g, [r.reshape(*r.shape[:-1], *each.index.shape) for r, each in zip(rest, self.groups, strict=True)]

    # --- Elements integrated out ---

    def orders(self) -> tuple[int, ...]:
        """Of the quadratures that there are, coarse to fine; none where elements have more latents, or differ in number."""
        features = {group.features for group in self.groups}
        return _ORDERS.get(features.pop(), ()) if len(features) == 1 else ()

    def nodes(self, n: int, order: int | None) -> list[Nodes]:
        """Points of each group for n draws of the globals: of a quadrature, or random."""
        if order is None:
            return self.random(n, _DRAWS)
        return [quadrature(group.features, order, self.outer.loc) for group in self.groups]

    def random(self, n: int, count: int) -> list[Nodes]:
        """So many random points."""
        like = self.outer.loc
        each = [torch.randn(count, n, len(group), group.features).to(like) for group in self.groups]
        return [Nodes(z, like.new_full((count,), -math.log(count))) for z in each]

    def points(self, rule: Rule | None = None) -> int:
        """How many an element has."""
        order = (rule or self.rule).order
        return order ** self.groups[0].features if order else _DRAWS

    def at_once(self, factors: Factors, rule: Rule | None = None) -> int:
        """Of how many draws of the globals the elements are evaluated at once."""
        return max(1, _AT_ONCE // (factors.size * self.points(rule)))

    def particles(self, most: int) -> int:
        """How many draws of the globals a step has."""
        return max(_LEAST, min(most, _ROWS // (sum(map(len, self.groups)) * self.points())))

    def marginal(self, factors: Factors, g: Tensor, rule: Rule | None = None) -> Tensor:
        """The log density of globals ``(n, G)`` with the elements integrated out, in nats, summed in float64.

        Its gradient is towards the globals, and what the model learns. Of many draws it runs some at a time, and once more for
        the gradient, so that memory does not grow with the draws.
        """
        rule = rule or self.rule
        parts = g.split(self.at_once(factors, rule))
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([self._marginal(factors, some, rule) for some in parts])
        return torch.cat([checkpoint(self._marginal, factors, some, rule, use_reentrant=False) for some in parts])

    def _marginal(self, factors: Factors, g: Tensor, rule: Rule) -> Tensor:
        with frozen(*self.locals.parameters()):
            made = self.inner(factors, g, self.nodes(len(g), rule.order))
        total = made.rest.double() + made.integral.double().sum(-1)
        if rule.more is None:
            return total
        more = rule.more.to(g).double()
        return total + more[0] + self.white(g).double() @ more[1:]

    def inner(self, factors: Factors, g: Tensor, nodes: list[Nodes]) -> Inner:
        """Each element at these points given globals ``(n, G)``."""
        n = len(g)
        w = self.white(g)
        count = len(nodes[0])
        placed = [group.given(w).place(each.z) for group, each in zip(self.groups, nodes, strict=True)]
        latents = [u.expand(count, n, *u.shape[-2:]) for u, _ in placed]
        u = self.join(g.expand(count, *g.shape), latents)
        rest, local = factors(u.reshape(count * n, -1))
        log_q = [log_normal(each.z) - ladj for each, (_, ladj) in zip(nodes, placed, strict=True)]
        log_ratio = local.reshape(count, n, -1) - (torch.cat(log_q, -1) if len(log_q) > 1 else log_q[0])
        weighted = log_ratio + nodes[0].log_weight[:, None, None]
        return Inner(rest.reshape(count, n)[0], weighted.logsumexp(0), latents, weighted, log_ratio)

    @torch.no_grad()
    def chosen(self, g: Tensor, made: Inner) -> Tensor:
        """Vectors ``(n, D)``: of each element one of its points, in proportion to their weights."""
        k = Categorical(logits=made.weighted.permute(1, 2, 0)).sample()
        kept = []
        for latents, own in zip(made.latents, k.split([len(group) for group in self.groups], -1), strict=True):
            kept.append(latents.gather(0, own[None, :, :, None].expand(1, *latents.shape[1:]))[0])
        return self.join(g, kept)


class Inner(NamedTuple):
    """Elements at K points given n draws of the globals.

    Attributes:
        rest: log density of what belongs to no element, ``(n,)``.
        integral: logarithm of the integral over each element, ``(n, J)``.
        latents: the points of each group, ``(K, n, J, F)``.
        weighted: logarithm of each point's part of the integral, ``(K, n, J)``.
        log_ratio: log density over that of q, ``(K, n, J)``.
    """

    rest: Tensor
    integral: Tensor
    latents: list[Tensor]
    weighted: Tensor
    log_ratio: Tensor


class _Permuted(torch.autograd.Function):
    """Entries in another order: ``x[..., place]``. Its gradient is gathered, where torch would add it up entry by entry."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, place: Tensor, order: Tensor) -> Tensor:
        return x.index_select(-1, place)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        place, order = ctx.saved_tensors
        return _Permuted.apply(gradient, order, place), None, None


class _Placed(OnePass):
    """From a flow's globals and standard normals to the vector of all latents."""

    def __init__(self, posterior: PlatedPosterior, outer: Transform) -> None:
        super().__init__()
        self.posterior = posterior
        self.outer = outer

    def call_and_ladj(self, v: Tensor) -> tuple[Tensor, Tensor]:
        own = self.posterior
        x, zs = own.cut(v)
        g = self.outer(x)
        ladj = self.outer.log_abs_det_jacobian(x, g)
        w = own.white(g)
        placed = [group.given(w).place(z) for group, z in zip(own.groups, zs, strict=True)]
        return own.join(g, [u for u, _ in placed]), ladj + sum(d.sum(-1) for _, d in placed)

    def _inverse(self, y: Tensor) -> Tensor:
        own = self.posterior
        g, latents = own.cut(y[..., own.order])
        w = own.white(g)
        zs = [group.given(w).undo(u) for group, u in zip(own.groups, latents, strict=True)]
        return own.in_order(self.outer.inv(g), zs)
