r"""Does the density fit? Scores of held-out data, for models with a density.

They alone are comparable across families and proper: :math:`-\mathbb{E}_p \log q` is smallest at q = p.

That holds for densities. One must integrate to one, its inverse must invert, and its log-determinant must be that of the map's
Jacobian; one that counts what is not transformed lowers the loss without bound, and no training curve shows it.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from numpy.typing import ArrayLike
from pyro.distributions import StudentT
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_dgm.core.data import Dequantize
from pyro_dgm.core.kinds import checked
from pyro_dgm.core.module import whole_event
from pyro_dgm.core.shapes import as_tensor_like
from pyro_dgm.evaluate.score import Score, mean_score, random_source
from pyro_dgm.model.supports import onto

__all__ = ["assert_density", "bits_per_dim", "held_out_score", "kl_divergence"]

_BATCH = 4096  # rows scored at once; not measured, chosen by hand


@checked()
def held_out_score(q: Distribution, x: ArrayLike, *, unit: Literal["nats", "bits/dim"] = "nats") -> Score:
    r"""Mean negative log density of held-out data, :math:`-\mathbb{E}_{x \sim p} \log q(x)`, with its standard error.

    Lower is better. The gap to the entropy of p is :math:`\mathrm{KL}(p \| q)`. Unbiased for data that neither
    training nor early stopping has seen. Cost: one density per row.

    Args:
        q: a distribution without batch dimensions and event shape ``event``; for a conditional family, with batch
            shape ``(N,)``, one context a row.
        x: held-out data, shape ``(N, *event)``, in the units that q was trained on.
        unit: ``"nats"`` for the whole event, or ``"bits/dim"``: nats / (D log 2) for real-valued data. For integers
            use :func:`bits_per_dim`.

    Returns:
        ``value, standard_error`` over the N rows. A row where q is zero makes both infinite.

    Raises:
        ValueError: if the rows do not fit q, hold NaN, or lie outside its support; NoDensityError for an implicit
            distribution.

    Note:
        Data on different scales do not compare: if x was divided by s, add :math:`D \log s` nats to come back.

    References:
        | Ruthotto & Haber (2021), "An introduction to deep generative modeling", section 3.

    Example:
        >>> q = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
        >>> value, error = held_out_score(q, q.sample((4000,)))
        >>> bool(abs(value - q.entropy()) < 5 * error)
        True
    """
    if unit not in ("nats", "bits/dim"):
        raise ValueError(f"held_out_score: unit is {unit!r}, expected 'nats' or 'bits/dim'.")
    nats = -_log_density("held_out_score", q, _data("held_out_score", q, x))
    return mean_score(nats if unit == "nats" else nats / (q.event_shape.numel() * math.log(2.0)))


@checked()
def bits_per_dim(
    q: Distribution, x: ArrayLike, *, levels: int = 256, num_samples: int = 1, seed: int | None = None
) -> Score:
    r"""Bits per dimension of integer data under a density on (0, 1): an **upper bound** on those of the best code.

    :math:`\frac{1}{D \log 2}\big(D \log K - \mathbb{E} \log \tfrac1S \sum_s q((x + u_s)/K)\big)`, with uniform noise
    :math:`u_s`. With S = 1 this is the figure that papers report; the bound tightens as S grows (Burda's argument).
    A uniform density over 8-bit images gives exactly 8. Cost: S densities per row.

    Args:
        q: a distribution on the unit cube, event shape ``event``: trained on the draws of
            :class:`~pyro_dgm.core.Dequantize`, for example a flow with ``support=constraints.unit_interval``.
        x: the raw integers 0, ..., K - 1, shape ``(N, *event)``, uint8 or float.
        levels: K, 256 for 8-bit data.
        num_samples: S draws of the noise for each row.
        seed: of the noise; None takes torch's global stream.

    Returns:
        ``value, standard_error`` in bits per dimension, over the N rows.

    Raises:
        ValueError: if x is not integer or out of range, or does not fit q.

    Note:
        Two mistakes give bits that are far too small: to leave out the :math:`D \log K` of the scale (8 bits), and to
        score integers without noise, where a density can be as large as it likes.

    References:
        | Theis et al. (2016), "A note on the evaluation of generative models", section 3.1.
        | Ho et al. (2019), "Flow++", section 3.1, for more than one sample.

    Example:
        >>> from torch.distributions import Independent, Uniform
        >>> q = Independent(Uniform(torch.zeros(3, 8, 8), torch.ones(3, 8, 8)), 3)
        >>> bits_per_dim(q, torch.randint(0, 256, (5, 3, 8, 8)))
        Score(value=8.0, standard_error=0.0)
    """
    if num_samples < 1:
        raise ValueError(f"bits_per_dim: num_samples is {num_samples}, expected at least 1.")
    integers = _data("bits_per_dim", q, x)
    noisy = Dequantize(levels)
    generator = random_source(seed)
    log_q = torch.stack([_log_density("bits_per_dim", q, noisy(integers, generator)) for _ in range(num_samples)])
    per_row = log_q.logsumexp(0) - math.log(num_samples)
    return mean_score((-per_row / q.event_shape.numel() - noisy.log_scale) / math.log(2.0))


@checked()
def kl_divergence(p: Distribution, q: Distribution, *, num_samples: int = 10_000) -> Score:
    r"""Kullback-Leibler divergence :math:`\mathrm{KL}(p \| q) = \mathbb{E}_p[\log p - \log q]` between known densities.

    Unbiased, in nats; may come out below zero by its error. The direction matters: with the data's distribution first,
    it punishes modes that q leaves out; with the model first (``kl_divergence(q, p)``), draws where p has no mass.

    Args:
        p: the distribution to draw from.
        q: the other, of the same event shape.
        num_samples: number of draws.

    Returns:
        ``value, standard_error``. Infinite where q is zero at a draw of p.

    Raises:
        ValueError: if the event shapes differ or one has batch dimensions; NoDensityError where one has no density.

    Note:
        A mode of p that its draws never reach is not seen, nor is it by the error.

    Example:
        >>> from torch.distributions import Normal
        >>> value, error = kl_divergence(Normal(0.0, 1.0), Normal(1.0, 1.0))
        >>> abs(value - 0.5) < 5 * error
        True
    """
    if p.event_shape != q.event_shape or p.batch_shape or q.batch_shape:
        raise ValueError(
            f"kl_divergence: p has batch {tuple(p.batch_shape)} and event {tuple(p.event_shape)}, q has "
            f"{tuple(q.batch_shape)} and {tuple(q.event_shape)}; expected no batch and one event shape. Use .to_event(n)."
        )
    if num_samples < 2:
        raise ValueError(f"kl_divergence: num_samples is {num_samples}, expected at least 2.")
    with torch.no_grad():
        x = p.sample((num_samples,))
    return mean_score(_log_density("kl_divergence", p, x) - _log_density("kl_divergence", q, x))


def _data(who: str, q: Distribution, x: ArrayLike) -> Tensor:
    """The rows as a tensor that fits q; a clear error otherwise."""
    rows = as_tensor_like(who, "data", x, None)
    if rows.dim() != len(q.event_shape) + 1 or rows.shape[1:] != q.event_shape or len(rows) < 2:
        raise ValueError(
            f"{who}: data has shape {tuple(rows.shape)}, expected (N, *{tuple(q.event_shape)}) with N >= 2, the event shape "
            "of the distribution."
        )
    if q.batch_shape not in ((), (len(rows),)):
        raise ValueError(
            f"{who}: the distribution has batch shape {tuple(q.batch_shape)}, expected () or ({len(rows)},), one row a "
            "datum. Use .to_event(n) where the batch belongs to the event."
        )
    return rows


def _log_density(who: str, q: Distribution, x: Tensor) -> Tensor:
    """Log density of every row in float64, without a graph; NaN is refused."""
    parts = (x,) if q.batch_shape else x.split(_BATCH)
    with torch.no_grad():
        log_q = torch.cat([q.log_prob(part).double() for part in parts])
    if log_q.isnan().any():
        raise ValueError(
            f"{who}: the density is NaN at {int(log_q.isnan().sum())} of {len(x)} rows; is the data finite?"
        )
    return log_q


# --- Is it one? ---


@checked(num_samples=1)
def assert_density(q: Distribution, *, num_samples: int = 20_000, tolerance: float = 1e-3) -> tuple[float, float]:
    r"""Raise unless ``q`` is a density: it integrates to one, its map inverts, its log-determinant is autograd's.

    The integral :math:`\int q(x)\,dx = E_{x \sim r}[q(x) / r(x)]` is estimated with draws of a heavy-tailed proposal
    :math:`r`, a Student-t with 4 degrees of freedom around the moments of draws of ``q``, in the unconstrained space of
    ``q``'s support. It must lie within 5 standard errors and 1 % of one. Where ``q`` is a flow, 8 draws are mapped to the
    base and back, and the log-determinant is compared with that of the Jacobian by autograd.

    Args:
        q: a distribution over real vectors with empty batch shape: a family's ``family()`` or ``family(context)`` for one
            context, or any distribution with ``sample`` and ``log_prob``.
        num_samples: draws of the proposal; in more than some ten dimensions the integral's error grows.
        tolerance: of the round trip (absolute and relative) and of the log-determinant, 10 times that.

    Returns:
        The integral and its standard error.

    Raises:
        ValueError: if one of the three fails (it says which, with the number); if fewer than 30 effective draws carry the
            integral or its error is above 0.1, so that it shows nothing; if ``q`` has a batch shape or is not over vectors.

    Example:
        >>> import torch, pyro_dgm as dgm
        >>> total, error = dgm.assert_density(dgm.RealNVP(2)())
        >>> abs(total - 1.0) < 5 * error
        True
    """
    _refuse_unfit(q)
    with torch.no_grad():
        total, error, effective = _integral(q, num_samples)
    if error > 0.1 or effective < 30:
        raise ValueError(
            f"assert_density: the integral of {_name(q)} is {total:.3g} +- {error:.2g}, carried by {effective:.0f} effective "
            f"draws: too uncertain to tell. Take more num_samples (now {num_samples}), or fewer dimensions."
        )
    if abs(total - 1.0) > 5.0 * error + 0.01:
        raise ValueError(
            f"assert_density: {_name(q)} integrates to {total:.4g} +- {error:.2g}, expected 1: no density."
        )
    _check_map(q, tolerance)
    return total, error


def _integral(q: Distribution, num_samples: int) -> tuple[float, float, float]:
    """The integral of a density over vectors, its standard error, and how many draws effectively carry it."""
    to_support = _onto_support(q)
    draws = to_support.inv(q.sample(torch.Size([2000])))
    draws = draws[draws.isfinite().all(-1)]  # a draw that was rounded to an edge lies at infinity
    wide = StudentT(4.0, draws.mean(0), 1.3 * draws.std(0).clamp_min(1e-6)).to_event(1)
    u = wide.sample((num_samples,))
    ratios = torch.cat(
        [(_log_density_of(q, to_support, part) - wide.log_prob(part)).double().exp() for part in u.split(4000)]
    )
    effective = float(ratios.sum() ** 2 / ratios.square().sum())
    return float(ratios.mean()), float(ratios.std()) / num_samples**0.5, effective


def _onto_support(q: Distribution) -> Transform:
    """From vectors of real numbers to the support."""
    try:
        return whole_event(onto(q, None), 1)
    except NotImplementedError as error:
        raise ValueError(
            f"assert_density: {_name(q)} has no support of real numbers that torch has a map onto, so its integral cannot be "
            "estimated here."
        ) from error


def _log_density_of(q: Distribution, to_support: Transform, u: Tensor) -> Tensor:
    """In the unconstrained space; -inf where rounding leads out of the support, far from all draws."""
    x = to_support(u)
    inside = x.isfinite().all(-1) & q.support.check(x)  # type: ignore[union-attr]
    found = torch.full(u.shape[:-1], -math.inf, dtype=u.dtype, device=u.device)
    found[inside] = q.log_prob(x[inside]) + to_support.log_abs_det_jacobian(u[inside], x[inside])
    return found


def _check_map(q: Any, tolerance: float) -> None:
    """Round trip and log-determinant of the flow inside, in its own units, at 8 draws."""
    built = q._base() if hasattr(q, "_base") else q
    transform = getattr(built, "transform", None)
    if transform is None:
        return
    with torch.no_grad():
        z = built.base.sample(torch.Size([8]))
        x, ladj = transform.inv.call_and_ladj(z)
        off = float(((transform(x) - z).abs() / (1.0 + z.abs())).max())
    if not off < tolerance:
        raise ValueError(f"assert_density: the map of {_name(q)} does not invert: off by {off:.2g} > {tolerance:g}.")
    for point, claimed in zip(x, ladj, strict=True):
        _check_log_determinant(q, transform, point, -float(claimed), tolerance)


def _check_log_determinant(q: Any, transform: Any, x: Tensor, claimed: float, tolerance: float) -> None:
    jacobian = torch.autograd.functional.jacobian(transform, x)
    true = float(torch.linalg.slogdet(jacobian.double()).logabsdet)
    if not abs(true - claimed) < 10.0 * tolerance * (1.0 + abs(true)):
        raise ValueError(
            f"assert_density: {_name(q)} claims a log-determinant of {claimed:.4g} where autograd's Jacobian has {true:.4g}."
        )


def _refuse_unfit(q: Distribution) -> None:
    if q.batch_shape or len(q.event_shape) != 1:
        raise ValueError(
            f"assert_density: expected a distribution over vectors with empty batch shape, got batch_shape "
            f"{tuple(q.batch_shape)} and event_shape {tuple(q.event_shape)}. Give one context at a time."
        )


def _name(q: Any) -> str:
    return getattr(q, "_name", type(q).__name__)
