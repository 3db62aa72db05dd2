r"""Distances between the features of two samples. The features are yours: no weights are downloaded, so say which
network gave them; figures from different features do not compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_dgm.evaluate.rows import featured, same_features
from pyro_dgm.evaluate.score import JudgedScore, Score, jackknife, random_source
from pyro_dgm.evaluate.two_sample import kernel_test

__all__ = ["frechet_distance", "kernel_distance"]


def frechet_distance(x: Any, y: Any, *, features: Callable[[Tensor], Tensor] | None = None) -> Score:
    r"""Squared Wasserstein-2 distance of the Gaussians with the samples' moments (the FID, if features are Inception's).

    :math:`\|\mu_x - \mu_y\|^2 + \mathrm{tr}(\Sigma_x + \Sigma_y) - 2\,\|\Sigma_x^{1/2} \Sigma_y^{1/2}\|_*`; the nuclear
    norm comes from QR factors of the centred features in float64, so no matrix root is taken, and nothing is NaN.
    Unit: the features', squared. **Biased upwards**, by a term of order D^2 / N: never compare different N. It sees means
    and covariances only.

    Args:
        x: one sample, shape ``(N, *event)``.
        y: the other, shape ``(M, *event)``.
        features: ``(batch, *event) -> (batch, D)``, run without gradients in batches of 512; None for the rows themselves.

    Returns:
        ``value, standard_error``, the latter by the block jackknife (conservative where p = q).

    Raises:
        ValueError: for NaN, features of different length, or fewer than 1.25 D rows, where the bias has no bound.

    References:
        | Heusel et al. (2017), "GANs trained by a two time-scale update rule", eq. 6.
        | Chong & Forsyth (2020), "Effectively unbiased FID", for the bias.

    Example:
        >>> x, y = torch.randn(5000, 2), torch.randn(5000, 2) + torch.tensor([2.0, 0.0])
        >>> value, error = frechet_distance(x, y)
        >>> abs(value - 4.0) < 5 * error
        True
    """
    a, b = _features("frechet_distance", x, y, features)
    n, d = min(len(a), len(b)), a.shape[1]
    if n < 1.25 * d or n < 4:
        raise ValueError(
            f"frechet_distance: {n} rows of {d} features, expected at least {max(4, -(-5 * d // 4))}. The bias grows like "
            "D^2 / N; use more draws, fewer features, or kernel_distance, which is unbiased."
        )
    a, b = a.double(), b.double()
    return Score(float(_frechet(a, b)), float(jackknife(_frechet, a, b)))


def _frechet(a: Tensor, b: Tensor) -> Tensor:
    shift = a.mean(0) - b.mean(0)
    root_a, root_b = _root(a), _root(b)
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return shift.square().sum() + root_a.square().sum() + root_b.square().sum() - 2.0 * overlap


def _root(rows: Tensor) -> Tensor:
    """R with R'R the sample covariance."""
    return torch.linalg.qr(rows - rows.mean(0), mode="r").R / (len(rows) - 1) ** 0.5


def kernel_distance(
    x: Any,
    y: Any,
    *,
    features: Callable[[Tensor], Tensor] | None = None,
    num_permutations: int = 200,
    seed: int | None = None,
) -> JudgedScore:
    r"""Squared MMD of features with the cubic kernel :math:`(f^\top g / D + 1)^3` (the KID): unbiased, with a test.

    Unit: the kernel's. Unlike the Fréchet distance it is unbiased at any N, sees three moments, and has a p-value.

    Args:
        x: one sample, shape ``(N, *event)``.
        y: the other, shape ``(M, *event)``.
        features: ``(batch, *event) -> (batch, D)``; None for the rows themselves.
        num_permutations: B of the test.
        seed: of the permutations.

    Returns:
        ``value, standard_error``, and ``.p_value``, ``.null``; cost as :func:`~pyro_dgm.evaluate.mmd`.

    Raises:
        ValueError: for NaN, fewer than two rows, features of different length.

    Note:
        The kernel is not translation invariant: features far from zero are compared by their mean alone. Features are
        therefore centred at the pooled mean here, which published figures do not do.

    References:
        | Binkowski et al. (2018), "Demystifying MMD GANs", section 4.

    Example:
        >>> x, y = torch.randn(500, 3), torch.randn(500, 3)
        >>> value, error = kernel_distance(x, y)
        >>> abs(value) < 5 * error, kernel_distance(x, 1.5 * y).p_value < 0.01
        (True, True)
    """
    a, b = _features("kernel_distance", x, y, features)

    def cubic(f: Tensor, g: Tensor) -> Tensor:
        return (f @ g.T / f.shape[1]).add_(1.0).pow_(3)

    return kernel_test(a, b, cubic, num_permutations, random_source(seed))


def _features(who: str, x: Any, y: Any, features: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
    return same_features(who, x=featured(features, x), y=featured(features, y))
