r"""A set of data as one vector: statistics that converge as the set grows, its size, and learned means.

.. math:: s = \rho\Big(\frac1n \sum_i \phi(x_i, t),\; t\Big), \qquad t = \text{statistics of } x_{1..n} \text{ and } \log n

(Zaheer et al. 2017, "Deep sets", arXiv 1703.06114, theorem 2, with statistics beside the learned means.) The networks see
statistics inside the range of training only, so that a set that is larger than all of them is read as a large one.
"""

from __future__ import annotations

import torch
from torch import Size, Tensor, nn

from pyro_dgm.core import Standardize
from pyro_dgm.core.networks import MLP, LinearPosterior

__all__ = ["Range", "SetEncoder", "Sets", "Statistics"]

# Not measured; chosen by hand.
_MOST_TOLD = 64  # features whose means and deviations are told
_MOST_PAIRS = 6  # features whose correlations are told
_MOST_REGRESSED = 16  # features of a regression of data on what stands beside them
_LEAST_VARIANCE = 1e-10  # in the units of the features
_UNIQUE = 0.1  # share of different values below which numbers are taken for discrete
_MARGIN = 1e-3  # of a mean to the end of its range, for one element
_NEIGHBOUR = 5
_FLOOR = 1e-6  # of the largest variance, for directions in which simulations do not vary
_FAR = 1e6  # where no simulation is


class Sets:
    """Elements of many sets, one after the other: those that are present, and to which set each belongs.

    Args:
        batch: shape of the batch.
        dims: negative dimensions of the batch that are pooled.
        mask: which elements are present, of a shape that expands to the batch; None for all.
    """

    def __init__(self, batch: Size, dims: list[int], mask: Tensor | None) -> None:
        rank = len(batch)
        self.pooled = sorted(d % rank for d in dims)
        self.kept = [d for d in range(rank) if d not in self.pooled]
        self.out = Size([1 if d in self.pooled else n for d, n in enumerate(batch)])
        self.members = Size([batch[d] for d in self.pooled]).numel()
        self.sets = self.out.numel()
        self.present: Tensor | None = None
        if mask is not None:
            rows = mask.expand(batch).permute(*self.kept, *self.pooled).reshape(self.sets, self.members)
            if not bool(rows.all()):
                self.present = rows
                self.owner = torch.nonzero(rows)[:, 0]

    def take(self, x: Tensor) -> Tensor:
        """Elements ``(*batch, F)`` side by side, ``(K, F)``."""
        rows = x.permute(*self.kept, *self.pooled, x.dim() - 1).reshape(self.sets, self.members, x.shape[-1])
        return rows.flatten(0, 1) if self.present is None else rows[self.present]

    def sum(self, x: Tensor) -> Tensor:
        """Sums of elements ``(K, F)`` over each set, ``(sets, F)``."""
        if self.present is None:
            return x.unflatten(0, (self.sets, self.members)).sum(1)
        return x.new_zeros(self.sets, x.shape[-1]).index_add(0, self.owner, x)

    def spread(self, y: Tensor) -> Tensor:
        """What each element's set has, ``(K, F)``."""
        if self.present is None:
            return y.unsqueeze(1).expand(-1, self.members, -1).flatten(0, 1)
        return y.index_select(0, self.owner)

    def count(self, like: Tensor) -> Tensor:
        """Elements of each set, ``(sets, 1)``."""
        if self.present is None:
            return like.new_full((self.sets, 1), float(self.members))
        return self.present.sum(1, keepdim=True).to(like)

    def laid(self, y: Tensor) -> Tensor:
        """``(sets, F)`` as a batch whose pooled dimensions are 1."""
        return y.reshape(*self.out, y.shape[-1])


class Statistics(nn.Module):
    r"""Statistics of a set that converge as it grows, and the logarithm of its size.

    Of each feature the mean and the log of its deviation; of raw data also the log distances of the mean to the ends of the
    range (a rate's and a probability's natural parameter); of few features all correlations. Where data have inputs beside
    them, the posterior of their regression on these, intercept included (:class:`~pyro_dgm.core.networks.LinearPosterior`).

    Args:
        told: features, the first of the elements.
        inputs: how many of these, the first, are regressors.
        raw: whether they are data, not statistics of smaller sets.
    """

    low: Tensor
    high: Tensor
    step: Tensor
    least: Tensor
    most: Tensor

    def __init__(self, told: int, inputs: int, raw: bool = True) -> None:
        super().__init__()
        self.told = told if told <= _MOST_TOLD else 0
        self.inputs = inputs if 0 < inputs < told <= _MOST_REGRESSED else 0
        self.pairs = raw and 1 < told <= _MOST_PAIRS
        self.raw = raw
        self.register_buffer("low", torch.full((self.told,), -1.0))
        self.register_buffer("high", torch.full((self.told,), 1.0))
        self.register_buffer("step", torch.zeros(self.told))
        self.linear = LinearPosterior(1 + self.inputs, told - self.inputs) if self.inputs else None
        self.features = self._features()
        self.standard = Standardize(self.features)
        self.register_buffer("least", torch.full((self.features,), -torch.inf))
        self.register_buffer("most", torch.full((self.features,), torch.inf))

    @property
    def bent(self) -> list[int]:
        """1 for logs of deviations, 2 for logs of the distances to the ends of the range, 0 for others."""
        found = [0] * (1 + self.told) + [1] * self.told + [2] * (2 * self.told if self.raw else 0)
        return found + [0] * (self.features - len(found))

    def _features(self) -> int:
        regression = self.linear.features if self.linear else 0
        pairs = self.told * (self.told - 1) // 2 if self.pairs else 0
        return 1 + (4 if self.raw else 2) * self.told + pairs + regression

    @torch.no_grad()
    def fit(self, x: Tensor, sets: Sets, there: Tensor | None) -> None:
        """Take ranges and units from elements ``(K, told)`` of simulated sets."""
        if self.raw and self.told and len(x):
            self.low.copy_(x.amin(0))
            self.high.copy_(x.amax(0))
            self.step.copy_(torch.stack([_step(column) for column in x.T]))
        found = self.of(x, sets, there, fit=True)
        self.standard.fit(found)
        found = self.standard(found)
        self.least.copy_(found.amin(0))
        self.most.copy_(found.amax(0))

    def forward(self, x: Tensor, sets: Sets, there: Tensor | None) -> Tensor:
        """Of elements ``(K, told)``, in units of the simulations: ``(sets, features)``. The first is the log of the count."""
        return self.standard(self.of(x, sets, there))

    def inside(self, statistics: Tensor) -> Tensor:
        """The same, moved into the range of the simulations."""
        return torch.minimum(torch.maximum(statistics, self.least), self.most)

    def held(self, statistics: Tensor) -> Tensor:
        """The same, of which the logs of deviations and distances are moved into that range: a set may have no spread."""
        logs = slice(1 + self.told, 1 + (4 if self.raw else 2) * self.told)
        out = statistics.clone()
        out[..., logs] = self.inside(statistics)[..., logs]
        return out

    def of(self, x: Tensor, sets: Sets, there: Tensor | None, fit: bool = False) -> Tensor:
        """The same in their own units; ``fit`` takes the prior of a regression from them."""
        total = sets.count(x).clamp_min(0.5)
        found = [total.log()]
        if not self.told:
            return found[0]
        n = total if there is None else sets.sum(there)
        mean = sets.sum(x if there is None else x * there) / n.clamp_min(1.0)
        d = x - sets.spread(mean)
        d = d if there is None else d * there
        variance = self._variance(sets.sum(d.square()), n)
        found += [mean, 0.5 * variance.log()]
        if self.raw:
            margin = (0.5 * self.step + _MARGIN) / n.clamp_min(1.0)
            found += [(end.clamp_min(0.0) + margin).log() for end in (mean - self.low, self.high - mean)]
        if self.pairs or self.inputs:
            found += self._second(sets, d, n, mean, fit)
        return torch.cat(found, -1)

    def _variance(self, squares: Tensor, n: Tensor) -> Tensor:
        """Of few discrete numbers a little more than that of the sample, which may be none; 1 of a single number."""
        variance = squares / (n - 1.0).clamp_min(1.0) + 0.5 * self.step.square() / n.clamp_min(1.0)
        return torch.where(n < 1.5, 1.0, variance.clamp_min(_LEAST_VARIANCE))

    def _second(self, sets: Sets, d: Tensor, n: Tensor, mean: Tensor, fit: bool) -> list[Tensor]:
        products = sets.sum((d.unsqueeze(-1) * d.unsqueeze(-2)).flatten(1)).unflatten(-1, (self.told, self.told))
        found: list[Tensor] = []
        if self.pairs:
            i, j = torch.triu_indices(self.told, self.told, 1, device=d.device)
            scale = products.diagonal(dim1=-2, dim2=-1).clamp_min(_LEAST_VARIANCE).sqrt()
            found.append(products[:, i, j] / (scale[:, i] * scale[:, j]))
        if self.linear:
            sums = self._sums(products, n.amin(-1, keepdim=True), mean)
            if fit:
                self.linear.fit(*sums)
            found.append(self.linear(*sums))
        return found

    def _sums(self, products: Tensor, n: Tensor, mean: Tensor) -> list[Tensor]:
        """What a regression takes: sums of products of inputs, a one before them, and responses; rows, and least variance."""
        p = self.inputs
        whole = products + n.unsqueeze(-1) * mean.unsqueeze(-1) * mean.unsqueeze(-2)
        sums = n * mean
        gram = nn.functional.pad(whole[:, :p, :p], (1, 0, 1, 0))
        gram[:, 0, 0] = n[:, 0]
        gram[:, 0, 1:] = gram[:, 1:, 0] = sums[:, :p]
        cross = torch.cat([sums[:, None, p:], whole[:, :p, p:]], 1)
        square = whole.diagonal(dim1=-2, dim2=-1)[:, p:]
        least = 0.5 * self.step[p:].square() / n.clamp_min(1.0) + _LEAST_VARIANCE
        return [gram, cross, square, n[:, 0], least]


def _step(column: Tensor) -> Tensor:
    """The least distance of different values, where there are few of them; otherwise 0."""
    values = column[:10_000].unique()
    few = 1 < len(values) < _UNIQUE * len(column[:10_000])
    return values.diff().amin() if few else column.new_zeros(())


class SetEncoder(nn.Module):
    """Elements ``(*batch, F)`` pooled over chosen batch dimensions (which become 1): ``(*batch, out_features)``.

    The first ``told_features`` of them are statistics, whose limits for a large set are those of the data's distribution;
    the others are learned.

    Args:
        in_features: F.
        out_features: length of the learned part of the summary.
        hidden_features: width of the networks on single elements.
        told: how many of the features, the first, statistics are made of; None for all.
        inputs: how many of these, the first, are regressors of the others.
        raw: whether the features are data, not summaries of smaller sets.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 32,
        hidden_features: int = 64,
        *,
        told: int | None = None,
        inputs: int = 0,
        raw: bool = True,
    ) -> None:
        super().__init__()
        h = hidden_features
        self.statistics = Statistics(in_features if told is None else told, inputs, raw)
        self.told_features = self.statistics.features
        relative = self.statistics.told
        self.first = MLP(in_features, h, (h,))
        self.own = nn.Linear(h + relative, h)
        self.whole = nn.Linear(h + self.told_features, h)
        self.second = nn.Sequential(nn.SiLU(), nn.Linear(h, h))
        self.last = MLP(h + self.told_features, out_features, (h,))
        self.out_features = self.told_features + out_features

    def forward(
        self,
        x: Tensor,
        dims: list[int],
        mask: Tensor | None = None,
        there: Tensor | None = None,
        *,
        learned: bool = True,
    ) -> Tensor:
        """``dims`` are negative dimensions of the batch; ``mask`` has the batch's shape, True where there is a datum.

        Args:
            there: which of the told features are present, ``(*batch, told)``.
            learned: False for zeros in the place of what is learned.
        """
        sets = Sets(x.shape[:-1], dims, mask)
        rows = sets.take(x)
        told = rows[:, : self.statistics.told]
        present = None if there is None or not self.statistics.told else sets.take(there)
        statistics = self.statistics(told, sets, present)
        if not learned:
            return sets.laid(nn.functional.pad(statistics, (0, self.out_features - self.told_features)))
        statistics = self.statistics.held(statistics)
        seen = self.statistics.inside(statistics)
        n = sets.count(rows).clamp_min(1.0)
        elements = self.first(rows)
        whole = self.whole(torch.cat([sets.sum(elements) / n, seen], -1))
        elements = self.second(self.own(torch.cat([elements, self._relative(told, sets)], -1)) + sets.spread(whole))
        summary = self.last(torch.cat([sets.sum(elements) / n, seen], -1))
        return sets.laid(torch.cat([statistics, summary], -1))

    def _relative(self, told: Tensor, sets: Sets) -> Tensor:
        """Elements beside the others of their set: in units of its mean and deviation, long tails drawn in."""
        n = sets.count(told).clamp_min(1.0)
        d = told - sets.spread(sets.sum(told) / n)
        scale = (sets.sum(d.square()) / n).clamp_min(_LEAST_VARIANCE).sqrt()
        return torch.asinh(d / sets.spread(scale))

    def fit(self, x: Tensor, dims: list[int], mask: Tensor | None, there: Tensor | None) -> None:
        """Take ranges and units from simulations."""
        sets = Sets(x.shape[:-1], dims, mask)
        told = sets.take(x)[:, : self.statistics.told]
        self.statistics.fit(told, sets, None if there is None else sets.take(there))


class Range(nn.Module):
    r"""Where vectors of simulations lie: the conformal score of a vector is its distance to the 5th nearest of one half.

    .. math:: p = \frac{1 + \#\{i : s(x_i) \ge s(x_o)\}}{n + 1}

    over the other half's scores: for another simulation :math:`P(p \le \alpha) \le \alpha` exactly (Vovk, Gammerman & Shafer
    2005, "Algorithmic learning in a random world", section 4.2). Vectors are whitened; of many numbers the axes of largest
    variance are taken, and how far a vector is from these axes.

    Args:
        features: length of the vectors.
        rows: of each half.
        axes: at most.
    """

    mean: Tensor
    scale: Tensor
    axes: Tensor
    root: Tensor
    reference: Tensor
    scores: Tensor

    def __init__(self, features: int, rows: int = 1_000, axes: int = 32) -> None:
        super().__init__()
        kept = min(features, axes)
        self.beyond = features > kept
        width = kept + self.beyond
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("axes", torch.zeros(features, kept))
        self.register_buffer("root", torch.ones(width))
        self.register_buffer("reference", torch.full((rows, width), _FAR))
        self.register_buffer("scores", torch.full((rows,), torch.inf))

    @torch.no_grad()
    def fit(self, features: Tensor, generator: torch.Generator) -> None:
        """Take the range from vectors ``(N, F)``, of which twice ``rows`` are used, or all."""
        order = torch.randperm(len(features), generator=generator, device="cpu").to(features.device)
        half = min(len(features) // 2, len(self.scores))
        reference = features[order[:half]].double()
        mean = reference.mean(0)
        scale = reference.std(0)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        variance, axes = torch.linalg.eigh(torch.atleast_2d(torch.cov(((reference - mean) / scale).T)))
        kept = self.axes.shape[1]
        root = variance[-kept:].clamp_min(_FLOOR * float(variance.max().clamp_min(1e-30))).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.axes.copy_(axes[:, -kept:])
        self.root.fill_(1.0)
        self.root[:kept] = root.to(self.root)
        if self.beyond:
            self.root[-1] = self.whitened(reference)[:, -1].std().clamp_min(_FLOOR)
        self.reference[:half] = self.whitened(reference)
        held = self.distances(features[order[half : 2 * half]])
        self.scores[: len(held)] = held.to(self.scores)

    def whitened(self, features: Tensor) -> Tensor:
        """In units of the simulations' axes."""
        z = (features.to(self.mean) - self.mean) / self.scale
        along = z @ self.axes
        if self.beyond:
            along = torch.cat([along, (z - along @ self.axes.mT).norm(dim=-1, keepdim=True)], -1)
        return along / self.root

    def distances(self, features: Tensor) -> Tensor:
        """Scores of vectors ``(m, F)``."""
        parts = self.whitened(features).split(1_000)  # rows at a time, for memory
        return torch.cat([torch.cdist(part, self.reference).kthvalue(_NEIGHBOUR, 1).values for part in parts])

    def known(self) -> Tensor:
        """The scores of simulations."""
        return self.scores[self.scores.isfinite()]

    def p_values(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """p-values and scores of vectors ``(m, F)``."""
        scores = self.distances(features)
        known = self.known()
        above = (known[None] >= scores[:, None]).sum(1)
        return (1.0 + above) / (len(known) + 1.0), scores
