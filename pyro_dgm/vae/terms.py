r"""Terms that are added to a bound, over the aggregated posterior :math:`q(z) = \frac1N \sum_i q(z \mid x_i)`.

:class:`LatentMMD` compares it with the prior, :class:`TotalCorrelation` measures the dependence between its coordinates, and
:class:`Penalised` adds them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from pyro_dgm.core import LearnedDistribution
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.shapes import check_number
from pyro_dgm.vae.model import VAE, as_data, prior_given

__all__ = ["LatentMMD", "Penalised", "TotalCorrelation"]

_SCALES = (
    0.1,
    0.5,
    1.0,
    2.0,
    10.0,
)  # of the kernel, in units of 2 D: not measured; around those of Tolstikhin et al. (2018)


class Penalised(nn.Module):
    r"""``objective + sum(weight * term)``, whose value is the objective's and whose gradient is the sum's.

    Each term is called with the same arguments as the objective and returns a scalar: :class:`TotalCorrelation`,
    :class:`LatentMMD`, or a module of your own.

    Args:
        objective: the bound that is reported.
        terms: pairs of a weight and a module.

    Example:
        >>> square = type("Square", (nn.Module,), {"forward": lambda self, x: x.square().sum()})()
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> loss = Penalised(square, (10.0, square))(x)
        >>> loss.item(), torch.autograd.grad(loss, x)[0].item()
        (9.0, 66.0)
    """

    @checked()
    def __init__(self, objective: nn.Module, *terms: tuple[float, nn.Module]) -> None:
        super().__init__()
        self.objective = objective
        for weight, _ in terms:
            check_number("Penalised", "a weight", float(weight))
        self.weights = [float(weight) for weight, _ in terms]
        self.terms = nn.ModuleList(term for _, term in terms)

    def forward(self, *batch: Tensor | None) -> Tensor:
        value = self.objective(*batch)
        added = sum((w * t(*batch) for w, t in zip(self.weights, self.terms, strict=True)), torch.zeros(()))
        return value + added - added.detach()


class LatentMMD(nn.Module):
    r"""Unbiased estimate of :math:`\mathrm{MMD}^2` between draws of :math:`q(z)` and of the prior, one per row of the batch.

    The kernel is the sum of inverse multiquadrics :math:`C / (C + \|z - z'\|^2)` over scales C around :math:`2 D`. It is
    negative now and then: the expectation is zero where the two agree.

    Args:
        vae: a VAE; any prior and posterior that can be sampled will do.

    Raises:
        ValueError: for a batch of fewer than two rows.

    References:
        | Zhao, Song & Ermon (2019), "InfoVAE", arXiv 1706.02262.
        | Tolstikhin et al. (2018), "Wasserstein auto-encoders", arXiv 1711.01558, algorithm 2.

    Example:
        >>> import pyro_dgm as dgm
        >>> normal = dgm.vae.normal
        >>> vae = dgm.VAE(dgm.vae.StandardNormal(2), dgm.vae.Conditional(3, 2, normal), dgm.vae.Conditional(2, 3, normal))
        >>> LatentMMD(vae)(torch.randn(20, 3)).shape
        torch.Size([])
    """

    @checked()
    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x, context, mask = as_data(self.vae.likelihood, self.vae.likelihood.event_shape, x, context, mask)
        if len(x) < 2:
            raise ValueError("LatentMMD: a batch of one row has no spread; use larger batches.")
        z = self.vae.encode(x, context, mask).rsample().flatten(1)
        other = prior_given(self.vae.prior, context).expand(torch.Size([len(x)])).sample().flatten(1)
        return _unbiased(z) + _unbiased(other) - 2.0 * _kernel(z, other).mean()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    distance = (a[:, None] - b[None]).square().sum(-1)
    scales = [2.0 * a.shape[-1] * s for s in _SCALES]
    return torch.stack([c / (c + distance) for c in scales]).sum(0)


def _unbiased(a: Tensor) -> Tensor:
    """Mean of the kernel over pairs of different rows."""
    k, n = _kernel(a, a), len(a)
    return (k.sum() - k.diagonal().sum()) / (n * (n - 1))


class TotalCorrelation(nn.Module):
    r"""Minibatch estimate of :math:`\mathrm{KL}\big(q(z)\,\|\,\prod_j q(z_j)\big)`, in nats, with :math:`q(z)` over all data.

    :math:`q(z)` and its marginals are estimated by the mixture over the batch, in which the row that z was drawn from
    counts no more than its share of 1 in ``size``. The estimate is biased in small batches: read its gradient, not its value.

    Args:
        vae: a VAE with a diagonal posterior, ``vae.Conditional(..., vae.normal)``.
        size: rows of the whole data set.

    Raises:
        ValueError: for a posterior whose coordinates do not separate, or a batch of fewer than two rows.

    References:
        | Chen et al. (2018), "Isolating sources of disentanglement in VAEs", arXiv 1802.04942.

    Example:
        >>> import pyro_dgm as dgm
        >>> normal = dgm.vae.normal
        >>> vae = dgm.VAE(dgm.vae.StandardNormal(2), dgm.vae.Conditional(3, 2, normal), dgm.vae.Conditional(2, 3, normal))
        >>> TotalCorrelation(vae, size=100)(torch.randn(20, 3)).shape
        torch.Size([])
    """

    @checked(size=1)
    def __init__(self, vae: VAE, size: int) -> None:
        super().__init__()
        self.vae = vae
        self.size = size

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x, context, mask = as_data(self.vae.likelihood, self.vae.likelihood.event_shape, x, context, mask)
        n = len(x)
        if n < 2:
            raise ValueError("TotalCorrelation: a batch of one row has no aggregated posterior; use larger batches.")
        q = self.vae.encode(x, context, mask)
        z = q.rsample()
        pairs = _coordinates(q).log_prob(z[:, None])  # (draw, component, coordinate)
        log_n = _log_shares(n, self.size).to(z)
        joint = (pairs.sum(-1) + log_n).logsumexp(1)
        marginals = (pairs + log_n[..., None]).logsumexp(1).sum(-1)
        return (joint - marginals).mean()


def _log_shares(n: int, size: int) -> Tensor:
    """Log weights of the batch's components for each draw: 1/size for its own, the rest shared by the others."""
    others = math.log((size - 1.0) / size / (n - 1.0)) if size > 1 else -math.inf
    return torch.full((n, n), others).fill_diagonal_(-math.log(size))


def _coordinates(q: LearnedDistribution) -> Distribution:
    """The distributions of the single coordinates."""
    built = q._base()
    if not isinstance(built, Independent) or built.reinterpreted_batch_ndims != 1:
        raise ValueError(
            f"TotalCorrelation: {q!r} does not separate into coordinates. Use a diagonal posterior, vae.Conditional(..., "
            "vae.normal), or LatentMMD."
        )
    return built.base_dist
