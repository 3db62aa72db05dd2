r"""The posterior of one analysis as the prior of the next: draws of continuous and discrete parameters, as one distribution.

With discrete sites :math:`k` and continuous sites :math:`\theta_1, \theta_2, \dots` the density that is learned from draws is

.. math:: p(k, \theta) = p(k_1)\, p(k_2 \mid k_1) \cdots\ p(\theta_1 \mid k)\, p(\theta_2 \mid \theta_1, k) \cdots

a table of counts, and a flow for each continuous site given all sites before it. So every site keeps its own name and support in
the next model: discrete ones can be enumerated, continuous ones are there for any guide or chain. As one vector (k, theta) it is
also a single distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_dgm.core import DistributionModule, broadcast_cat
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import as_tensor_like, refuse_non_finite
from pyro_dgm.core.upstream import Columns, elementwise, integer_ends
from pyro_dgm.core.warn import in_short, warn_user
from pyro_dgm.flows import NSF
from pyro_dgm.objectives import MaximumLikelihood
from pyro_dgm.train import fit

__all__ = ["LearnedPrior", "as_prior"]

_UNSEEN = 0.5  # added to every count (Jeffreys): what no draw showed stays possible
_MOST_CELLS = 10_000  # of the table of discrete sites; not measured, chosen by hand
_FEWEST = 100  # draws; not measured, chosen by hand

Supports = Mapping[str, constraints.Constraint]


@checked(max_steps=1)
def as_prior(
    draws: Any,
    supports: Supports | None = None,
    *,
    family: Callable[..., DistributionModule] = NSF,
    max_steps: int | None = None,
    seed: int | None = None,
) -> LearnedPrior:
    r"""Learn the joint density of posterior draws, to be the prior of another model; its parameters are frozen.

    In the next model ``prior.sample_sites()`` takes the place of the statements that sampled these sites. The posterior is then
    that of both data sets, as far as the density was learned: nothing is known beyond the draws, so a second data set that
    contradicts the first lands in tails that are the flow's guess.

    Args:
        draws: ``{site: (N, *shape)}``, or a container of ArviZ, whose group ``posterior`` is taken. Only the sites that the next
            model is to sample: of a site that is computed from others the density does not exist. Draws count alike: where
            a container has weights, pass ``dgm.resample(idata)``.
        supports: of the sites; those that are not named lie on the reals, or, where their draws are integers, on 0 to the
            largest draw. ``{"sigma": constraints.positive, "k": constraints.integer_interval(0, 4)}``.
        family: makes the flow of a continuous site, called as ``family(shape, context_features, support=...)``.
        max_steps: of each flow's training; None until nothing is gained.
        seed: of trainings.

    Returns:
        A family over the vector of all sites, discrete ones first, with :meth:`LearnedPrior.sample_sites`.

    Raises:
        ValueError: for fewer than 100 draws, numbers of draws that differ, NaN, draws outside their support, a discrete site
            that is no single number, and tables of more than 10,000 combinations.

    Note:
        A positive quantity left on the reals gets a prior that reaches below 0; a warning says where all draws are positive.

    References:
        | Ibrahim & Chen (2000), "Power prior distributions for regression models", Statistical Science 15 (``power``).

    Example:
        >>> import pyro_dgm as dgm
        >>> draws = {"mu": 0.1 * torch.randn(500), "k": torch.randint(3, (500,))}
        >>> prior = dgm.as_prior(draws, max_steps=50, seed=0)
        >>> def model(x):
        ...     site = prior.sample_sites()
        ...     pyro.sample("x", dist.Normal(site["mu"] + site["k"], 1.0).expand([len(x)]).to_event(1), obs=x)
        >>> pyro.poutine.trace(model).get_trace(torch.zeros(4)).stochastic_nodes
        ['k', 'mu']
        >>> prior().sample((7,)).shape       # as one distribution over (k, mu)
        torch.Size([7, 2])
    """
    table = _table_of(draws)
    supports = {name: _support_of(name, x, (supports or {}).get(name)) for name, x in table.items()}
    prior = LearnedPrior({n: tuple(x.shape[1:]) for n, x in table.items()}, supports, family)
    prior.learn(table, max_steps=max_steps, seed=seed)
    return prior


class LearnedPrior(DistributionModule):
    """A joint distribution of sites, which :func:`as_prior` learns from draws.

    Args:
        shapes: of each site.
        supports: of each site; a discrete one is an ``integer_interval``.
        family: makes the flow of a continuous site.

    Example:
        >>> prior = LearnedPrior({"a": (2,), "k": ()}, {"a": constraints.positive, "k": constraints.integer_interval(0, 3)})
        >>> prior.names, prior().sample((5,)).shape
        (['k', 'a'], torch.Size([5, 3]))
    """

    table: Tensor

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], supports: Supports, family: Callable[..., DistributionModule] = NSF
    ) -> None:
        discrete = [n for n in shapes if supports[n].is_discrete]
        self._sizes = {n: _categories(n, supports[n]) for n in discrete}
        names = [*discrete, *(n for n in shapes if n not in discrete)]
        widths = [Size(shapes[n]).numel() for n in names]
        super().__init__(sum(widths))
        self.names = names
        self.widths = widths
        self.shapes = {n: Size(shapes[n]) for n in names}
        self._on = supports
        cells = Size(self._sizes.values())
        if cells.numel() > _MOST_CELLS:
            raise ValueError(
                f"as_prior: the discrete sites {discrete} have {cells.numel():,} combinations, expected at most {_MOST_CELLS:,}. "
                "Leave out those that the next model does not need."
            )
        self.register_buffer("table", torch.zeros(cells))  # log probabilities, up to a constant
        reads = sum(self._sizes.values())
        known = list(accumulate(widths[len(discrete) :], initial=reads))
        self.flows = nn.ModuleDict()
        for name, features in zip(names[len(discrete) :], known, strict=False):
            self.flows[name] = family(self.shapes[name], features, support=supports[name])

    def learn(self, draws: Mapping[str, Tensor], *, max_steps: int | None = None, seed: int | None = None) -> None:
        """Count the discrete draws, train a flow for each continuous site, and freeze them."""
        values = {n: draws[n] for n in self.names}
        if self._sizes:
            cells = torch.stack([values[n].long() for n in self._sizes], -1)
            counts = torch.zeros(self.table.shape).index_put_(tuple(cells.T), torch.ones(len(cells)), accumulate=True)
            self.table.copy_((counts + _UNSEEN).log())
        for name in self.flows:
            flow: Any = self.flows[name]
            context = self._read(values, name)
            rows = (values[name],) if context is None else (values[name], context)
            fit(MaximumLikelihood(flow), rows, max_steps=max_steps, seed=seed, progress=False)
        self.requires_grad_(False).eval()

    def sample_sites(self, power: float = 1.0) -> dict[str, Tensor]:
        r"""In a model: sample every site under its own name, and return the values.

        With ``power`` a the model's density has the factor :math:`p(k, \theta)^a`, unnormalised: the old analysis counts for
        a of its data. This tempers the whole posterior that was learned, its own prior included, with respect to the coordinates
        in which the sites are given. For the power prior of Ibrahim & Chen, in which only the old likelihood has the power,
        let the old analysis have a flat prior, or add ``pyro.factor("again", (1 - a) * old_prior.log_prob(...))``.

        The parameters are trained with the model's (``pyro.module``) where they are not frozen:
        ``prior.requires_grad_(True)`` gives fine-tuning, which is empirical Bayes.

        Args:
            power: above 0.

        Note:
            With a power other than 1 the factor has no normaliser: evidences of such models do not compare, and what the
            model itself draws (a prior predictive, :func:`~pyro_dgm.simulate`) is of p, not of its power.

        Example:
            >>> prior = LearnedPrior({"mu": ()}, {"mu": constraints.real})
            >>> half = pyro.poutine.trace(prior.sample_sites).get_trace(power=0.5)
            >>> mu = half.nodes["mu"]["value"]
            >>> bool(torch.isclose(half.log_prob_sum(), 0.5 * prior().log_prob(mu.reshape(1))))
            True
        """
        _check_power(power)
        if any(p.requires_grad for p in self.parameters()):
            pyro.module("learned_prior", self)
        with pyro.poutine.scale(scale=float(power)):
            values: dict[str, Tensor] = {}
            for name in self.names:
                values[name] = pyro.sample(name, self.given(name, values))
        return values

    def given(self, name: str, earlier: Mapping[str, Tensor]) -> TorchDistribution:
        """The distribution of a site for values of those before it."""
        if name not in self._sizes:
            return self.flows[name](self._read(earlier, name))
        place = list(self._sizes).index(name)
        later = tuple(range(place + 1, self.table.dim()))
        logits = self.table.logsumexp(later) if later else self.table
        if place:
            index = torch.broadcast_tensors(*[earlier[n].long() for n in list(self._sizes)[:place]])
            logits = logits[tuple(index)]
        return dist.Categorical(logits=logits)

    def _read(self, values: Mapping[str, Tensor], name: str) -> Tensor | None:
        """What the flow of a site reads: discrete sites one-hot, then the continuous ones before it, flat."""
        parts = []
        for known in self.names[: self.names.index(name)]:
            x = values[known]
            if known in self._sizes:
                parts.append(nn.functional.one_hot(x.long(), self._sizes[known]).to(self.table.dtype))
            else:
                parts.append(x.reshape(*x.shape[: x.dim() - len(self.shapes[known])], -1))
        return broadcast_cat(*parts) if parts else None

    def build(self, context: Tensor | None) -> TorchDistribution:
        return _Joint(self)


class _Joint(TorchDistribution):
    """All sites as one vector, discrete ones first."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, prior: LearnedPrior, batch_shape: Any = ()) -> None:
        self.prior = prior
        super().__init__(Size(batch_shape), prior.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        prior = self.prior
        return Columns([prior._on[n] for n in prior.names], [prior.shapes[n] for n in prior.names])

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return not self.prior._sizes and all(
            f().has_rsample for f in self.prior.flows.values() if not f.context_features
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Joint:
        return _Joint(self.prior, batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self._drawn(sample_shape, "rsample")

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self._drawn(sample_shape, "sample")

    def _drawn(self, sample_shape: Any, how: str) -> Tensor:
        batch, prior = Size(sample_shape) + self.batch_shape, self.prior
        values: dict[str, Tensor] = {}
        for name in prior.names:
            values[name] = getattr(prior.given(name, values).expand(batch), how)()
        return torch.cat([values[n].reshape(*batch, -1).to(prior.table.dtype) for n in prior.names], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        prior, batch = self.prior, value.shape[:-1]
        parts = zip(prior.names, value.split(prior.widths, -1), strict=True)
        values = {n: part.reshape(batch + prior.shapes[n]) for n, part in parts}
        terms = [prior.given(n, values).log_prob(values[n]) for n in prior.names]
        return sum(terms[1:], terms[0])


def _table_of(draws: Any) -> dict[str, Tensor]:
    """Draws of every site, as tensors of one length."""
    group = (
        draws if isinstance(draws, Mapping) and not hasattr(draws, "posterior") else getattr(draws, "posterior", None)
    )
    if group is None or not len(group):
        raise ValueError(
            f"as_prior: draws are {type(draws).__name__}, expected {{site: (N, *shape)}} or a container with a group posterior."
        )
    chains = group is not draws  # of xarray: (chain, draw, *shape)
    table = {}
    for name in list(group):
        x = as_tensor_like(
            "as_prior", f"draws of {name!r}", group[name].values if chains else group[name], None
        ).detach()
        x = x.flatten(0, 1) if chains else x
        table[name] = x.to(torch.get_default_dtype()) if x.is_floating_point() else x
    lengths = {n: len(x) if x.dim() else 0 for n, x in table.items()}
    if len(set(lengths.values())) != 1 or min(lengths.values()) < _FEWEST:
        raise ValueError(
            f"as_prior: numbers of draws are {lengths}, expected the same for all sites, {_FEWEST} at least."
        )
    for name, x in table.items():
        refuse_non_finite(f"as_prior, site {name!r}", x.double())
    return table


def _support_of(name: str, x: Tensor, given: Any) -> constraints.Constraint:
    """The support of a site, held against its draws."""
    if given is None and not x.is_floating_point():
        given = constraints.integer_interval(0, int(x.max()))
    if given is None and x.min() > 0:
        warn_user(
            f"as_prior: all draws of {name!r} are positive, and its support is taken to be the reals. Pass "
            f"supports={{{name!r}: constraints.positive}}, or constraints.real to say that it is so."
        )
    support = constraints.real if given is None else _of_whole(name, given, x)
    if not support.check(x).all():
        raise ValueError(
            f"as_prior: draws of {name!r} lie outside of {in_short(support)} (from {float(x.min()):.4g} to {float(x.max()):.4g})."
        )
    if support.is_discrete and x.dim() > 1:
        raise ValueError(
            f"as_prior: the discrete site {name!r} has shape {tuple(x.shape[1:])}, expected a single number. Pass its entries "
            "as sites of their own."
        )
    return support


def _of_whole(name: str, given: constraints.Constraint, x: Tensor) -> Any:
    try:
        return elementwise(given, x.shape[1:])
    except NotImplementedError as error:
        raise ValueError(f"as_prior: the support {in_short(given)} of {name!r} does not fit: {error}.") from error


def _categories(name: str, support: Any) -> int:
    low, high = integer_ends(support) or (-math.inf, math.inf)
    if low != 0.0 or math.isinf(high):
        raise ValueError(
            f"as_prior: the discrete site {name!r} lies on {in_short(support)}, expected integers from 0, as of a Categorical."
        )
    return int(high) + 1


def _check_power(power: float) -> None:
    if isinstance(power, bool) or not isinstance(power, int | float) or not 0.0 < power < float("inf"):
        raise ValueError(
            f"LearnedPrior.sample_sites: power={power!r}, expected a finite number > 0. Without the prior, leave it out."
        )
