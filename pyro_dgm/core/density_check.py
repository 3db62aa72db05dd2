r"""The check that a density is one.

A density must integrate to one, its inverse must invert, and its log-determinant must be that of the map's Jacobian. A
log-determinant that counts what is not transformed lowers the loss without bound, and no training curve shows it.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import StudentT
from torch import Tensor
from torch.distributions import Distribution

from pyro_dgm.core.kinds import checked

__all__ = ["assert_density"]


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
    draws = q.sample(torch.Size([2000]))
    scale = 1.3 * draws.std(0).clamp_min(1e-6)
    wide = StudentT(4.0, draws.mean(0), scale).to_event(1)
    x = wide.sample((num_samples,))
    ratios = torch.cat([(q.log_prob(part) - wide.log_prob(part)).double().exp() for part in x.split(4000)])
    effective = float(ratios.sum() ** 2 / ratios.square().sum())
    return float(ratios.mean()), float(ratios.std()) / num_samples**0.5, effective


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
